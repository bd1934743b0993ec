"""Repeat: the user's own recent items again."""

# U users, N list

from __future__ import annotations

import numpy as np
from genrec_shards.histories import check_trained_through, histories
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists


def fit(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool = False,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
) -> Rule:
    """The rule that lists the distinct items of the history, the most recently taken first; short
    lists stay short. The score is 1 / place.

    Arguments are those of `knn.fit`. `exclude_history` has no effect, since the lists are the
    history; `trained_through` is checked alone.
    """
    check_trained_through(split, trained_through)

    def lists(users: np.ndarray) -> Lists:
        past = histories(sequences, split, users)
        # Newest first over all users at once; unique keeps the first place of each (user, item),
        # which is the latest one. Histories 5 6 5 of user 0 and 7 8 of user 1:
        #   users_newest 1 1 0 0 0, items_newest 8 7 5 6 5, latest 0 1 2 3 (the older 5 goes),
        #   begins_U [2, 0], places 0 1 0 1.
        users_newest, items_newest = past.users[::-1], past.items[::-1]
        keys = users_newest * past.num_items + items_newest
        _, latest = np.unique(keys, return_index=True)
        latest.sort()
        takers, items = users_newest[latest], items_newest[latest]
        distinct_U = np.bincount(takers, minlength=past.num_users)
        # Users go from the last to the first, so user u's block begins after those of all later
        # users.
        begins_U = np.cumsum(distinct_U[::-1])[::-1] - distinct_U
        places = np.arange(len(takers)) - begins_U[takers]
        found, kept = empty_lists(past.num_users, top), places < top
        found.items_UN[takers[kept], places[kept]] = items[kept]
        found.scores_UN[takers[kept], places[kept]] = 1 / (places[kept] + 1)
        return found

    return lists
