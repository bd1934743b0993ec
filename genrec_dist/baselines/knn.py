"""Co-occurrence kNN: what was taken near the items of the history, near in time counting more."""

# U users, I items, B users of a batch, M most candidates of one user in it, N list

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import scipy.sparse as sp
from genrec_shards.histories import Histories, histories
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.data.item_graph import KnnSettings, neighbour_weights, recent_item_weights
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists, tie_order, without_last

_LOW_32 = np.uint64(0xFFFFFFFF)


def recommend(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | None = None,
    top: int = TOP,
    settings: KnnSettings | None = None,
) -> Lists:
    """Top lists of these user rows (None: all with a target), as `fit` says."""
    rule = fit(
        sequences,
        split,
        exclude_history=exclude_history,
        trained_through=trained_through,
        top=top,
        settings=settings,
    )
    return rule(sequences.history_and_target(split).users if users is None else users)


def fit(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
    settings: KnnSettings | None = None,
) -> Rule:
    """The rule of these training parts: lists by the summed neighbour weights of the user's recent
    items.

    Only items with a positive score are listed, so lists can be short. Scores are summed in float64
    and compared in float32, where sums of equal terms in another order are equal; ties are listed
    in `tie_order`. Raises ValueError if training saw the split's targets."""
    settings = settings or KnnSettings()
    by_chance = tie_order(sequences.num_items)
    # Columns stand in tie order from here on: of two equal scores the lower column goes first.
    weights_II = neighbour_weights(sequences, split, trained_through, settings)[
        :, by_chance
    ].tocsr()
    return partial(_lists, sequences, split, weights_II, by_chance, exclude_history, top, settings)


def _lists(
    sequences: Sequences,
    split: Split,
    weights_II: sp.csr_matrix,
    by_chance: np.ndarray,
    exclude_history: bool,
    top: int,
    settings: KnnSettings,
    users: np.ndarray,
) -> Lists:
    past = histories(sequences, split, users)
    lists = empty_lists(past.num_users, top + 1)
    for start, scores_BI in _score_batches(past, weights_II, settings):
        if exclude_history:
            scores_BI = _without_history(scores_BI, past, start, by_chance)
        columns_BN, values_BN = _top(scores_BI, top + 1)
        rows = slice(start, start + len(values_BN))
        width = values_BN.shape[1]
        lists.items_UN[rows, :width] = np.where(values_BN > 0, by_chance[columns_BN], -1)
        lists.scores_UN[rows, :width] = np.where(values_BN > 0, values_BN, -np.inf)
    return without_last(lists)


def _score_batches(
    past: Histories, weights_II: sp.csr_matrix, settings: KnnSettings
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(first user, float64[B, I]) of one batch of users after the other."""
    history_UI = recent_item_weights(past.items, past.offsets, past.num_items, settings)
    for start in range(0, past.num_users, settings.batch_size):
        yield start, history_UI[start : start + settings.batch_size] @ weights_II


def _without_history(
    scores_BI: sp.csr_matrix, past: Histories, start: int, by_chance: np.ndarray
) -> sp.csr_matrix:
    """The whole history scores zero, also what is too old to be asked."""
    column_of = np.empty(len(by_chance), dtype=np.int64)
    column_of[by_chance] = np.arange(len(by_chance))
    first, last = past.offsets[start], past.offsets[start + scores_BI.shape[0]]
    entries = (
        np.ones(last - first),
        (past.users[first:last] - start, column_of[past.items[first:last]]),
    )
    taken_BI = sp.csr_matrix(entries, shape=scores_BI.shape)
    # An item taken twice is subtracted twice; what is not positive is no candidate.
    return scores_BI - scores_BI.multiply(taken_BI)


def _top(scores_BI: sp.csr_matrix, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int64[B, n] and values float32[B, n] of the best, n = min(top, M); value 0 where
    there is no candidate.

    Score and column are packed into one 64-bit word (bits of a positive float32 rise with its
    value), so that a partition of plain words obeys the tie rule, which argpartition would not."""
    scores_BI = scores_BI.tocsr()
    lengths_B = np.diff(scores_BI.indptr)
    bits = scores_BI.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    words = np.where(
        scores_BI.data > 0,
        (bits << np.uint64(32)) | (_LOW_32 - scores_BI.indices.astype(np.uint64)),
        0,
    )
    words_BM = np.zeros((len(lengths_B), max(int(lengths_B.max(initial=0)), 1)), dtype=np.uint64)
    words_BM[np.arange(words_BM.shape[1]) < lengths_B[:, None]] = words
    if words_BM.shape[1] > top:
        words_BM = np.partition(words_BM, words_BM.shape[1] - top, axis=1)[:, -top:]
    best_BN = np.sort(words_BM, axis=1)[:, ::-1]
    values_BN = (best_BN >> np.uint64(32)).astype(np.uint32).view(np.float32)
    columns_BN = np.where(best_BN > 0, _LOW_32 - (best_BN & _LOW_32), 0).astype(np.int64)
    return columns_BN, values_BN
