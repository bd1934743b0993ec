"""Popularity: the items taken most often in the training parts, the same for everybody."""

# U users, N list

from __future__ import annotations

import numpy as np
from genrec_shards.histories import check_trained_through, histories, training_counts
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists, tie_order, without_last


def fit(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
) -> Rule:
    """The rule that lists the items with the most training interactions, which are the score.

    Every item has a score; equal ones are listed in `tie_order`. Arguments are those of `knn.fit`.
    """
    check_trained_through(split, trained_through)
    counts_I = training_counts(sequences, trained_through)
    by_chance = tie_order(sequences.num_items)
    order = by_chance[np.argsort(-counts_I[by_chance], kind="stable")]

    def lists(users: np.ndarray) -> Lists:
        past = histories(sequences, split, users)
        longer = empty_lists(past.num_users, top + 1)
        filled_U = np.zeros(past.num_users, dtype=np.int64)
        waiting = np.arange(past.num_users)
        # Go down the order once; each item is listed by everybody who may have it and has room.
        for item in order:
            takers = waiting[~past.holds(waiting, item)] if exclude_history else waiting
            longer.items_UN[takers, filled_U[takers]] = item
            longer.scores_UN[takers, filled_U[takers]] = counts_I[item]
            filled_U[takers] += 1
            waiting = waiting[filled_U[waiting] < top + 1]
            if not len(waiting):
                break
        return without_last(longer)

    return lists
