"""Mask strategies: which items of a training part become targets, as pure functions of keyed random
numbers."""

# B samples, K most targets of a sample

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from genrec_dist.config.recipe import Mask

Draw = Callable[[int], np.ndarray]
"""draw(i) -> float64 [B], the i-th uniform number of each sample, keyed by (seed, epoch, sample
id)."""


@dataclass(frozen=True)
class Targets:
    """The items of each sample that are masked and generated."""

    positions_BK: np.ndarray
    """int64 [B, K], positions of the targets, ascending, -1 where a sample has fewer."""
    together: bool
    """True: one mask for all, and one decoder row that generates them in order. False: a mask and a
    row for each."""


def single(lengths_B: np.ndarray, draw: Draw, mask: Mask) -> Targets:
    """One item, uniformly (the paper's pretraining)."""
    return Targets(_uniform(lengths_B, draw(0))[:, None], together=False)


def last_biased(lengths_B: np.ndarray, draw: Draw, mask: Mask) -> Targets:
    """The last item with probability p, otherwise any item uniformly (as the published code, but by
    whole items)."""
    positions_B = np.where(draw(1) < mask.p, lengths_B - 1, _uniform(lengths_B, draw(0)))
    return Targets(positions_B[:, None], together=False)


def recency(lengths_B: np.ndarray, draw: Draw, mask: Mask) -> Targets:
    """One item whose age from the end is geometric with ratio p, truncated to the sequence:
    P(age a) ~ (1-p)^a."""
    if mask.p >= 1:
        return Targets((lengths_B - 1)[:, None], together=False)
    # Inverse of the truncated geometric distribution function.
    ratio = 1 - mask.p
    ages_B = np.floor(np.log1p(-draw(0) * (1 - ratio**lengths_B)) / np.log(ratio)).astype(np.int64)
    return Targets((lengths_B - 1 - np.clip(ages_B, 0, lengths_B - 1))[:, None], together=False)


def span(lengths_B: np.ndarray, draw: Draw, mask: Mask) -> Targets:
    """1 to k neighbouring items, generated in order for one mask."""
    widths_B = 1 + _uniform(np.minimum(mask.k, lengths_B), draw(1))
    starts_B = _uniform(lengths_B - widths_B + 1, draw(0))
    columns_K = np.arange(mask.k)
    positions_BK = np.where(columns_K < widths_B[:, None], starts_B[:, None] + columns_K, -1)
    return Targets(positions_BK, together=True)


def multi(lengths_B: np.ndarray, draw: Draw, mask: Mask) -> Targets:
    """Up to k distinct items, each with its own mask and decoder row; at least one item in two
    stays visible.

    Sampled without replacement by Floyd's algorithm, vectorised over samples: column j draws from
    [0, length - count + j] and, where that is taken, takes the upper end.
    """
    # Three users of 4, 1 and 6 items, k = 2: counts_B = [2 1 2].
    #   column 0 draws from [0, 2], [0, 0], [0, 4], say 1, 0, 3: chosen_BK = [[1 -] [0 -] [3 -]]
    #   column 1 draws from [0, 3], none, [0, 5], say 1 and 2. User 0 has 1 already, so takes 3:
    #   chosen_BK = [[1 3] [0 -1] [3 2]], sorted with -1 last [[1 3] [0 -1] [2 3]]
    counts_B = np.minimum(mask.k, np.maximum(1, lengths_B // 2))
    chosen_BK = np.full((len(lengths_B), mask.k), -1, np.int64)
    for column in range(mask.k):
        upper_B = lengths_B - counts_B + column
        candidate_B = _uniform(np.maximum(upper_B, 0) + 1, draw(column))
        taken_B = (chosen_BK == candidate_B[:, None]).any(axis=1)
        drawn_B = np.where(taken_B, upper_B, candidate_B)
        chosen_BK[:, column] = np.where(column < counts_B, drawn_B, -1)
    last = np.iinfo(np.int64).max
    ordered_BK = np.sort(np.where(chosen_BK < 0, last, chosen_BK), axis=1)
    return Targets(np.where(ordered_BK == last, -1, ordered_BK), together=False)


def _uniform(sizes_B: np.ndarray, draws_B: np.ndarray) -> np.ndarray:
    """Whole numbers in [0, size) from uniform numbers in [0, 1)."""
    return np.minimum((draws_B * sizes_B).astype(np.int64), sizes_B - 1)


STRATEGIES: dict[str, Callable[[np.ndarray, Draw, Mask], Targets]] = {
    "single": single,
    "last-biased": last_biased,
    "recency": recency,
    "span": span,
    "multi": multi,
}
"""Name in the recipe -> strategy(lengths int64 [B], draw, parameters) -> Targets."""
