"""The transition graph of the training parts: which items stand near those of a history, as shares of one."""

# B users, N items

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from genrec_shards.sequences import Sequences, Split, TrainedThrough
from torch import Tensor

from genrec_dist.baseline.knn import KnnSettings, asked, neighbour_weights


@dataclass(frozen=True, eq=False)
class Graph:
    """Co-occurrence kNN as a distribution over the next item."""

    weights_NN: sp.csr_matrix
    """float64, row = item of the history, column = candidate: `neighbour_weights`."""
    settings: KnnSettings

    @classmethod
    def of(
        cls, sequences: Sequences, split: Split, trained_through: TrainedThrough, settings: KnnSettings | None = None
    ) -> Graph:
        """Of the training parts alone. Raises ValueError if training saw the split's targets."""
        settings = settings or KnnSettings()
        return cls(neighbour_weights(sequences, split, trained_through, settings), settings)

    @property
    def num_items(self) -> int:
        return int(self.weights_NN.shape[0])

    def shares(self, items: np.ndarray, offsets: np.ndarray) -> Tensor:
        """float64 [B, N]: an item's kNN score over the sum of all items' scores; zeros for a history without neighbours.

        `items[offsets[b]:offsets[b + 1]]` is a history, oldest first; what of it may be listed is not asked here.
        """
        scores_BN = asked(items, offsets, self.num_items, self.settings) @ self.weights_NN
        sums_B = np.asarray(scores_BN.sum(axis=1)).ravel()
        inverse_B = np.divide(1.0, sums_B, out=np.zeros_like(sums_B), where=sums_B > 0)
        return torch.from_numpy((sp.diags(inverse_B) @ scores_BN).toarray())


def log_near(shares: Tensor, epsilon: float, num_items: int) -> Tensor:
    """log((1 - epsilon) share + epsilon / N), of shares of any shape: the graph's distribution with a uniform one beside it, so
    that an item without a neighbour in the history is unlikely and not impossible."""
    return shares.mul(1 - epsilon).add_(epsilon / num_items).log_()
