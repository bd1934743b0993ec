"""Repeat: the user's own recent items again."""

# U users, N list

from __future__ import annotations

from functools import partial

import numpy as np
from genrec_shards.histories import check_trained_through, histories
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists


def recommend(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool = False,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | None = None,
    top: int = TOP,
) -> Lists:
    """Top lists of these user rows (None: all with a target), as `fit` says."""
    rule = fit(
        sequences, split, exclude_history=exclude_history, trained_through=trained_through, top=top
    )
    return rule(sequences.history_and_target(split).users if users is None else users)


def fit(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool = False,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
) -> Rule:
    """The distinct items of the history, the most recently taken first; short lists stay short. The
    score is 1 / place.

    `exclude_history` does not apply: the lists are the history. What the rule knows is the history
    alone, so `trained_through` changes nothing; it is checked as everywhere."""
    check_trained_through(split, trained_through)
    return partial(_lists, sequences, split, top)


def _lists(sequences: Sequences, split: Split, top: int, users: np.ndarray) -> Lists:
    past = histories(sequences, split, users)
    # Newest first over all users at once; unique keeps the first place of each (user, item), which
    # is the latest one.
    users_newest, items_newest = past.users[::-1], past.items[::-1]
    _, latest = np.unique(users_newest * past.num_items + items_newest, return_index=True)
    latest.sort()
    takers, items = users_newest[latest], items_newest[latest]
    distinct_U = np.bincount(takers, minlength=past.num_users)
    # Users come from the last to the first, so the block of user u begins after those of all later
    # users.
    begins_U = np.cumsum(distinct_U[::-1])[::-1] - distinct_U
    places = np.arange(len(takers)) - begins_U[takers]
    lists, kept = empty_lists(past.num_users, top), places < top
    lists.items_UN[takers[kept], places[kept]] = items[kept]
    lists.scores_UN[takers[kept], places[kept]] = 1 / (places[kept] + 1)
    return lists
