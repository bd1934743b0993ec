"""The transition graph of the training parts: how near items are to those of a history, as shares
that sum to one."""

# B users, N items

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from genrec_shards.histories import check_trained_through, training_windows
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough
from torch import Tensor

from genrec_dist.config.load import section_from

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True, eq=False)
class Graph:
    """Co-occurrence kNN as a distribution over the next item."""

    weights_NN: sp.csr_matrix
    """float64, row = item of the history, column = candidate: `neighbour_weights`."""
    settings: KnnSettings

    @classmethod
    def of(
        cls,
        sequences: Sequences,
        split: Split,
        trained_through: TrainedThrough,
        settings: KnnSettings | None = None,
    ) -> Graph:
        """Of the training parts alone. Raises ValueError if training saw the split's targets."""
        settings = settings or KnnSettings()
        return cls(neighbour_weights(sequences, split, trained_through, settings), settings)

    @property
    def num_items(self) -> int:
        return int(self.weights_NN.shape[0])

    def probabilities(
        self, items: np.ndarray, offsets: np.ndarray, *, only_new: bool = False
    ) -> Tensor:
        """float64 [B, N]: an item's kNN score over the sum of all items' scores; zeros for a
        history without neighbours.

        `items[offsets[b]:offsets[b + 1]]` is a history, oldest first; its own items have shares,
        too, unless `only_new`."""
        import scipy.sparse as sp

        scores_BN = (
            recent_item_weights(
                items, offsets, self.num_items, self.settings.recent, self.settings.decay
            )
            @ self.weights_NN
        )
        if only_new:
            users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
            taken_BN = sp.csr_matrix((np.ones(len(items)), (users, items)), shape=scores_BN.shape)
            scores_BN = scores_BN - scores_BN.multiply(taken_BN > 0)
        sums_B = np.asarray(scores_BN.sum(axis=1)).ravel()
        inverse_B = np.divide(1.0, sums_B, out=np.zeros_like(sums_B), where=sums_B > 0)
        return torch.from_numpy((sp.diags(inverse_B) @ scores_BN).toarray())


def log_near(shares: Tensor, epsilon: float, num_items: int) -> Tensor:
    """log((1 - epsilon) share + epsilon / N), of shares of any shape: a distribution mixed with a
    uniform one, so that an item without a share is unlikely and not impossible."""
    return shares.mul(1 - epsilon).add_(epsilon / num_items).log_()


MOST_WINDOW = 10_000
"""Most steps of a window; each step is a pass over the data."""
MOST_RECENT = 1_000_000
"""Most items of a history that count; no user has taken more."""


@dataclass(frozen=True)
class KnnSettings:
    """How neighbours are counted; one set of defaults for all data sets."""

    window: int = 6
    """Most steps between two items of one training part that count as a pair."""
    forward: float = 1.0
    """Weight of a pair from the earlier item to the later one, divided by their distance in
    steps."""
    backward: float = 0.5
    """The same from the later item to the earlier one."""
    decay: float = 0.7
    """Weight of the history's items: decay^age, age 0 being the last item."""
    recent: int = 10
    """How many items at the end of the history count."""
    smoothing: float = 1.0
    """Added to both masses before their powers, so that a rare item with one lucky pair does not
    outweigh everything."""
    out_power: float = 0.5
    """Power of the history item's mass by which its pairs are divided; 0 does not divide."""
    in_power: float = 0.5
    """The same of the candidate's mass: 0 favours popular items, 1 unpopular ones."""
    batch_size: int = 1024
    """Users scored at once; it changes memory, not results."""

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            least = 1 if key in ("window", "recent", "batch_size") else 0
            most = {"window": MOST_WINDOW, "recent": MOST_RECENT}.get(key)
            if most is not None and not least <= value <= most:
                raise ValueError(f"knn: {key} is {value}: it has to be from {least} to {most:,}")
            if not least <= value < float("inf"):
                raise ValueError(f"knn: {key} is {value}: it has to be {least} or above")


def knn_settings(
    overrides: list[str] | None,
    values: dict[str, Any] | None = None,
    more_keys: Sequence[str] = (),
) -> KnnSettings:
    """The defaults, changed by `values` and by `key=value`; arguments as of `section_from`. Raises
    ValueError, one line that names the key."""
    return section_from(KnnSettings, dict(values or {}), overrides, "knn", more_keys)


def neighbour_weights(
    sequences: Sequences, split: Split, trained_through: TrainedThrough, settings: KnnSettings
) -> sp.csr_matrix:
    """float64[I, I], row = item of the history, column = candidate: pairs(x, y) / ((out(x) + s)^a
    (in(y) + s)^b). Raises ValueError if training saw the split's targets.

    pairs(x, y) sums forward/d where y follows x by d steps in a training part, and backward/d where
    it precedes it. Mass: out(x) is x's row sum, in(y) is y's column sum, both of pairs; s is the
    smoothing, a and b are the powers: by default 1, 1/2 and 1/2."""
    check_trained_through(split, trained_through)
    forward_II = forward_pairs(sequences, trained_through, settings.window)
    return scaled_weights(forward_II, settings)


def forward_pairs(
    sequences: Sequences, trained_through: TrainedThrough, window: int
) -> sp.csr_matrix:
    """float64[I, I]: the sum of 1/d over all pairs of a training part in which the column's item
    follows the row's by d steps, d at most `window`."""
    import scipy.sparse as sp

    shape = (sequences.num_items, sequences.num_items)
    pairs_II = sp.csr_matrix(shape, dtype=np.float64)
    for part in training_windows(sequences, trained_through):
        for distance in range(1, window + 1):
            same_user = part.users[:-distance] == part.users[distance:]
            places = part.items[:-distance][same_user], part.items[distance:][same_user]
            shares = np.full(len(places[0]), 1 / distance)
            pairs_II = pairs_II + sp.csr_matrix((shares, places), shape=shape)
    return pairs_II


def scaled_weights(forward_II: sp.csr_matrix, settings: KnnSettings) -> sp.csr_matrix:
    """`neighbour_weights` of pairs that are counted already, whatever else the settings say."""
    import scipy.sparse as sp

    pairs_II = settings.forward * forward_II + settings.backward * forward_II.T
    out_I = np.asarray(pairs_II.sum(axis=1)).ravel()
    in_I = np.asarray(pairs_II.sum(axis=0)).ravel()
    scaled = sp.diags(inverse_power(out_I + settings.smoothing, settings.out_power)) @ pairs_II
    return (scaled @ sp.diags(inverse_power(in_I + settings.smoothing, settings.in_power))).tocsr()


def inverse_power(mass_I: np.ndarray, power: float) -> np.ndarray:
    raised_I = np.sqrt(mass_I) if power == 0.5 else mass_I**power
    return np.divide(1, raised_I, out=np.zeros_like(mass_I), where=mass_I > 0)


def recent_item_weights(
    items: np.ndarray, offsets: np.ndarray, num_items: int, recent: int, decay: float
) -> sp.csr_matrix:
    """float64 [U, I]: the weight, decay^age, of the last `recent` items of each history.

    `items[offsets[u]:offsets[u + 1]]` is a history, oldest first.
    """
    import scipy.sparse as sp

    lengths_U = np.diff(offsets)
    ages = np.repeat(offsets[1:], lengths_U) - 1 - np.arange(len(items))
    counts = ages < recent
    users = np.repeat(np.arange(len(lengths_U)), lengths_U)
    entries = (decay ** ages[counts], (users[counts], items[counts]))
    return sp.csr_matrix(entries, shape=(len(lengths_U), num_items))
