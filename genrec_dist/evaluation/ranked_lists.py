"""Top lists of a rule: item rows and scores, best first, and where its ties end."""

# U users, C candidates, N list

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from genrec_shards.histories import Histories
from genrec_shards.keyed_random import keyed_permutation

from genrec_dist.evaluation.metrics import EMPTY, is_item, pessimistic_ranks, target_ranks

_TIE_STREAM = 0x71E5


class Lists(NamedTuple):
    items_UN: np.ndarray
    """int32[U, N], item rows, -1 after the end of a short list."""
    scores_UN: np.ndarray
    """float32[U, N], falling; -inf where the list is empty."""
    tied_beyond_U: np.ndarray | None = None
    """bool[U], of a rule that scores items: has an item without a place the score of the last one
    listed?

    None: the scores are places, and no two are equal."""

    def ranks(self, targets_U: np.ndarray) -> np.ndarray:
        """int32[U], 1 = first, 0 = not listed: where items tie with the target, all of them count
        as above it."""
        ranks_U = target_ranks(self.items_UN, targets_U)
        if self.tied_beyond_U is None:
            return ranks_U
        return pessimistic_ranks(ranks_U, self.scores_UN, self.tied_beyond_U)


Rule = Callable[[np.ndarray], Lists]
"""A rule that has learned what it learns: user rows int64[U] -> their lists."""


def empty_lists(num_users: int, top: int) -> Lists:
    return Lists(
        np.full((num_users, top), EMPTY, np.int32), np.full((num_users, top), -np.inf, np.float32)
    )


def first_candidates(candidates_UC: np.ndarray, allowed_UC: np.ndarray, top: int) -> Lists:
    """The first `top` allowed candidates of each row in their order; the score is 1 / place, the
    rule has no other."""
    lists = empty_lists(len(candidates_UC), top)
    places_UC = np.cumsum(allowed_UC, axis=1) - 1
    users, columns = np.nonzero(allowed_UC & (places_UC < top))
    places = places_UC[users, columns]
    lists.items_UN[users, places] = candidates_UC[users, columns]
    lists.scores_UN[users, places] = 1 / (places + 1)
    return lists


def without_last(longer: Lists) -> Lists:
    """Lists one shorter; the place that goes tells whether a tie goes on beyond the end."""
    items_UN, scores_UN = longer.items_UN, longer.scores_UN
    beyond_U = (items_UN[:, -1] != EMPTY) & (scores_UN[:, -1] == scores_UN[:, -2])
    return Lists(items_UN[:, :-1], scores_UN[:, :-1], beyond_U)


def history_listed(lists_UN: np.ndarray, past: Histories) -> np.ndarray:
    """bool[U, N]: is the listed item in its user's history?"""
    listed_UN = is_item(lists_UN, past.num_items)
    users_U1 = np.arange(past.num_users)[:, None]
    held_UN: np.ndarray = past.holds(users_U1, np.where(listed_UN, lists_UN, 0))
    return listed_UN & held_UN


def tie_order(num_items: int) -> np.ndarray:
    """int64[num_items]: item rows in the order in which items of one score are listed.

    A fixed random order, a function of the catalogue's size alone. Rows follow the items' own ids,
    which may tell when an item was first taken, and the order of a sort may favour whatever came
    first; this order knows neither the ids nor any interaction, so no rule is the better for it.
    What a target's rank is does not depend on it either: `Lists.ranks`."""
    return keyed_permutation(num_items, _TIE_STREAM)
