"""How near the items' texts are to those of a history, as shares that sum to one."""

# B users, N items, F words or dims

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.numbering.item_text import word_weights
from torch import Tensor

from genrec_dist.data.item_graph import recent_item_weights
from genrec_dist.evaluation.score_mixture import TextTerm
from genrec_dist.text.vectors import described, item_vectors

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True, eq=False)
class TextSimilarity:
    """Nearness of texts as a distribution over the next item."""

    rows_NF: sp.csr_matrix | np.ndarray
    """By item, of length 1, or 0 without a text: float64 TF-IDF of the words, or float32 vectors of
    another source."""
    term: TextTerm

    @classmethod
    def of(cls, dataset: Dataset, term: TextTerm | None) -> TextSimilarity | None:
        """Of the dataset's texts; None where the mixture has no such term. Raises ValueError where
        the items have no texts."""
        return None if term is None else cls(text_rows(dataset, term.source), term)

    def cosines(self, items: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """float64 [B, N], in a scale of each history's own: of its query, the decayed sum of its
        last items' rows, with every item's row; 0 where that is negative, and for the history's own
        items, which are always nearest to themselves.

        `items[offsets[b]:offsets[b + 1]]` is a history, oldest first."""
        num_items = int(self.rows_NF.shape[0])
        history_BN = recent_item_weights(
            items, offsets, num_items, self.term.recent, self.term.decay
        )
        near_BN = (history_BN @ self.rows_NF) @ self.rows_NF.T
        near_BN = np.asarray(near_BN if isinstance(near_BN, np.ndarray) else near_BN.toarray())
        near_BN = np.maximum(near_BN, 0, dtype=np.float64)
        near_BN[np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), items] = 0
        return near_BN

    def probabilities(self, items: np.ndarray, offsets: np.ndarray) -> Tensor:
        """float64 [B, N]: `cosines` to the power of the term, over their sum; zeros for a history
        without a text."""
        return torch.from_numpy(shares_of(self.cosines(items, offsets), self.term.power))


def text_rows(dataset: Dataset, source: str) -> sp.csr_matrix | np.ndarray:
    """Rows by item of a source: `words`, or one of `item_vectors`."""
    return (
        word_weights(described(dataset).texts)
        if source == "words"
        else item_vectors(dataset, source)
    )


def shares_of(near_BN: np.ndarray, power: float) -> np.ndarray:
    """The values to a power over their row's sum; rows of zeros stay."""
    # Over the largest first, so that a high power does not underflow.
    largest_B1 = near_BN.max(axis=1, keepdims=True, initial=0)
    raised_BN = np.divide(near_BN, largest_B1, out=np.zeros_like(near_BN), where=largest_B1 > 0)
    raised_BN **= power
    sums_B1 = raised_BN.sum(axis=1, keepdims=True)
    return np.divide(raised_BN, sums_B1, out=raised_BN, where=sums_B1 > 0)
