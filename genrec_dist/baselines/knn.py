"""Co-occurrence kNN: what was taken near the items of the history, near in time counting more."""

# U users, I items, B users of a batch, M most candidates of one user in it, N list

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from genrec_shards.histories import Histories, histories
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.data.item_graph import KnnSettings, neighbour_weights, recent_item_weights
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists, tie_order, without_last

if TYPE_CHECKING:
    import scipy.sparse as sp

_LOW_32 = np.uint64(0xFFFFFFFF)


def fit(
    sequences: Sequences,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
    settings: KnnSettings | None = None,
) -> Rule:
    """The rule that lists items by the summed neighbour weights of the user's recent items.

    Only items with a positive score are listed, so lists can be short. Scores are summed in float64
    and compared in float32, where sums of equal terms in another order are equal; ties are listed
    in `tie_order`.

    Args:
        sequences: The data.
        split: Whose histories are continued.
        exclude_history: Leave them out of the lists.
        trained_through: The last position that neighbours are counted in.
        top: Length of the lists.
        settings: How neighbours are counted.

    Raises:
        ValueError: If training saw the split's targets.
    """
    settings = settings or KnnSettings()
    weights_II = neighbour_weights(sequences, split, trained_through, settings)
    return rule_of(weights_II, sequences, split, settings, exclude_history, top)


def rule_of(
    weights_II: sp.csr_matrix,
    sequences: Sequences,
    split: Split,
    settings: KnnSettings,
    exclude_history: bool,
    top: int = TOP,
) -> Rule:
    """The rule of `fit`, of neighbour weights that are there already."""
    by_chance = tie_order(sequences.num_items)
    # Columns are in tie order from here on: of two equal scores the lower column goes first.
    weights_II = weights_II[:, by_chance].tocsr()
    column_of = np.empty(len(by_chance), dtype=np.int64)
    column_of[by_chance] = np.arange(len(by_chance))

    def lists(users: np.ndarray) -> Lists:
        past = histories(sequences, split, users)
        found = empty_lists(past.num_users, top + 1)
        history_UI = recent_item_weights(
            past.items, past.offsets, past.num_items, settings.recent, settings.decay
        )
        for start in range(0, past.num_users, settings.batch_size):
            scores_BI = history_UI[start : start + settings.batch_size] @ weights_II
            if exclude_history:
                scores_BI = _without_history(scores_BI, past, start, column_of)
            columns_BN, values_BN = _top(scores_BI, top + 1)
            rows, width = slice(start, start + len(values_BN)), values_BN.shape[1]
            found.items_UN[rows, :width] = np.where(values_BN > 0, by_chance[columns_BN], -1)
            found.scores_UN[rows, :width] = np.where(values_BN > 0, values_BN, -np.inf)
        return without_last(found)

    return lists


def _without_history(
    scores_BI: sp.csr_matrix, past: Histories, start: int, column_of: np.ndarray
) -> sp.csr_matrix:
    """The scores with zeros (or less) for the whole history, also for what is older than the recent
    items."""
    import scipy.sparse as sp

    first, last = past.offsets[start], past.offsets[start + scores_BI.shape[0]]
    places = past.users[first:last] - start, column_of[past.items[first:last]]
    taken_BI = sp.csr_matrix((np.ones(last - first), places), shape=scores_BI.shape)
    # An item taken twice is subtracted twice; what is not positive is no candidate.
    return scores_BI - scores_BI.multiply(taken_BI)


def _top(scores_BI: sp.csr_matrix, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int64[B, n] and values float32[B, n] of the best, n = min(top, M); value 0 where
    there is no candidate.

    Score and column are packed into one 64-bit word (bits of a positive float32 rise with its
    value), so that a partition of plain words obeys the tie rule, which argpartition would not.
    With 8-bit halves in place of 32-bit ones, a user's scores of bits 3, 5 and 5 in columns 0, 4
    and 6 are the words 0x03ff, 0x05fb and 0x05f9: sorted, column 4 comes before 6 and 0."""
    scores_BI = scores_BI.tocsr()
    lengths_B = np.diff(scores_BI.indptr)
    bits = scores_BI.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    low = _LOW_32 - scores_BI.indices.astype(np.uint64)
    words = np.where(scores_BI.data > 0, (bits << np.uint64(32)) | low, 0)
    words_BM = np.zeros((len(lengths_B), max(int(lengths_B.max(initial=0)), 1)), dtype=np.uint64)
    words_BM[np.arange(words_BM.shape[1]) < lengths_B[:, None]] = words
    if words_BM.shape[1] > top:
        words_BM = np.partition(words_BM, words_BM.shape[1] - top, axis=1)[:, -top:]
    best_BN = np.sort(words_BM, axis=1)[:, ::-1]
    values_BN = (best_BN >> np.uint64(32)).astype(np.uint32).view(np.float32)
    columns_BN = np.where(best_BN > 0, _LOW_32 - (best_BN & _LOW_32), 0).astype(np.int64)
    return columns_BN, values_BN
