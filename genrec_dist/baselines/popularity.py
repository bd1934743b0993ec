"""Popularity: the items taken most often in the training parts, the same for everybody."""

# U users, N list

from __future__ import annotations

from functools import partial

import numpy as np
from genrec_shards.histories import Histories, check_trained_through, histories, training_counts
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists, tie_order, without_last


def recommend(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
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
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
) -> Rule:
    """The rule of these training parts; the score is the number of training interactions.

    Every item has a score; equal ones are listed in `tie_order`. Raises ValueError if training saw
    the split's targets."""
    check_trained_through(split, trained_through)
    counts = training_counts(sequences, trained_through)
    by_chance = tie_order(sequences.num_items)
    order = by_chance[np.argsort(-counts[by_chance], kind="stable")]
    return partial(_lists, sequences, split, order, counts, exclude_history, top)


def _lists(
    sequences: Sequences,
    split: Split,
    order: np.ndarray,
    counts: np.ndarray,
    exclude_history: bool,
    top: int,
    users: np.ndarray,
) -> Lists:
    past = histories(sequences, split, users)
    return without_last(_first_allowed(order, counts, past, exclude_history, top + 1))


def _first_allowed(
    order: np.ndarray, counts: np.ndarray, past: Histories, exclude_history: bool, top: int
) -> Lists:
    """Walk down the order once and give each item to everybody who may have it and still has
    room."""
    lists = empty_lists(past.num_users, top)
    filled_U = np.zeros(past.num_users, dtype=np.int64)
    waiting = np.arange(past.num_users)
    for item in order:
        takers = waiting[~past.holds(waiting, item)] if exclude_history else waiting
        lists.items_UN[takers, filled_U[takers]] = item
        lists.scores_UN[takers, filled_U[takers]] = counts[item]
        filled_U[takers] += 1
        waiting = waiting[filled_U[waiting] < top]
        if not len(waiting):
            break
    return lists
