"""HR, NDCG and MRR of top lists, from a histogram of the targets' ranks."""

# U users, N list, R resamples

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

TOP = 20
"""How far down a list is scored; no list is asked to be shorter."""

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
"""What tables and comparisons show."""

EMPTY = -1
"""A place of a list that holds nothing; only at the end of a list."""

INVALID = -2
"""A place whose generated text is no item (unconstrained decoding); it keeps its place and counts
as a miss."""


def _first(k: int, gains: np.ndarray) -> np.ndarray:
    """float64[21]: the gain of each rank down to k, nothing below it and nothing for rank 0."""
    weights = np.zeros(TOP + 1)
    weights[1 : k + 1] = gains[:k]
    return weights


_RANKS = np.arange(1, TOP + 1)

WEIGHTS: dict[str, np.ndarray] = {
    **{f"HR@{k}": _first(k, np.ones(TOP)) for k in (1, 5, 10, 20)},
    **{f"NDCG@{k}": _first(k, 1 / np.log2(_RANKS + 1)) for k in (5, 10, 20)},
    "MRR@20": _first(20, 1 / _RANKS),
}
"""What a user counts whose target stands at rank r (0: absent). With one target a user the ideal
DCG is 1."""


def target_ranks(lists_UN: np.ndarray, targets_U: np.ndarray) -> np.ndarray:
    """int32[U]: the place of each target in its list, 1 = first, 0 = absent; the first place where
    it stands twice."""
    if len(lists_UN) != len(targets_U):
        raise ValueError(
            f"{len(lists_UN)} lists for {len(targets_U)} targets: give one list a target"
        )
    hits_UN = lists_UN == np.asarray(targets_U)[:, None]
    return np.where(hits_UN.any(axis=1), hits_UN.argmax(axis=1) + 1, 0).astype(np.int32)


def pessimistic_ranks(
    ranks_U: np.ndarray, scores_UN: np.ndarray, tied_beyond_U: np.ndarray
) -> np.ndarray:
    """int32[U]: the ranks with every item that ties with the target above it; 0 where a tie goes on
    beyond the list.

    For systems that score all items. Among equal scores a list's order is chance; counting the
    worst one, a system that cannot tell items apart gains nothing by it, and its score needs no
    seed. `scores_UN` falls along each list, -inf where it is empty; `tied_beyond_U`: has an item
    without a place the score of the last one listed?"""
    listed_U = ranks_U > 0
    scores_U1 = np.take_along_axis(scores_UN, np.maximum(ranks_U, 1)[:, None] - 1, axis=1)
    last_U = (scores_UN >= scores_U1).sum(axis=1)
    filled_U = np.isfinite(scores_UN).sum(axis=1)
    reaches_beyond_U = tied_beyond_U & (last_U == filled_U)
    return np.where(listed_U & ~reaches_beyond_U, last_U, 0).astype(np.int32)


def rank_histogram(ranks: np.ndarray, N: int = TOP) -> np.ndarray:
    """int64[N+1]: how many users have their target at each rank; index 0 = absent, or below place
    N.

    Histograms of disjoint sets of users add up to the histogram of all, so any split among
    processes gives the metrics of the whole to the digit."""
    ranks = np.asarray(ranks)
    if ranks.size and ranks.min() < 0:
        raise ValueError(f"rank {ranks.min()}: ranks start at 1, 0 is absent")
    return np.bincount(np.where(ranks <= N, ranks, 0), minlength=N + 1).astype(np.int64)


def metrics_from_histogram(hist: np.ndarray) -> dict[str, float]:
    """HR@1,5,10,20, NDCG@5,10,20 and MRR@20 of a histogram int64[21] of target ranks."""
    num_users = _num_users(hist)
    return {name: float(weights @ hist / num_users) for name, weights in WEIGHTS.items()}


def bootstrap_ci95(
    hist: np.ndarray, resamples: int = 2000, seed: int = 0, names: Iterable[str] = tuple(WEIGHTS)
) -> dict[str, list[float]]:
    """[low, high] of each metric named: the 2.5th and 97.5th percentile over resamples of the
    users.

    A metric sees a user through her rank alone. Drawing U users with replacement and counting their
    ranks is by definition one multinomial draw of U from the observed shares, so R draws of 21
    numbers do what R draws of U users would, at a cost that does not grow with U."""
    num_users = _num_users(hist)
    chosen = {name: WEIGHTS[name] for name in names}
    draws_RN = np.random.default_rng(seed).multinomial(num_users, hist / num_users, size=resamples)
    bounds = {
        name: np.percentile(draws_RN @ weights / num_users, [2.5, 97.5])
        for name, weights in chosen.items()
    }
    return {name: [float(low), float(high)] for name, (low, high) in bounds.items()}


def fault_counts(lists_UN: np.ndarray, num_items: int) -> np.ndarray:
    """int64[3]: filled places, those that hold no item, those whose item is listed above. Counts of
    users add up."""
    filled_UN = lists_UN != EMPTY
    valid_UN = is_item(lists_UN, num_items)
    repeated_UN = listed_above(lists_UN) & valid_UN
    return np.array(
        [filled_UN.sum(), (filled_UN & ~valid_UN).sum(), repeated_UN.sum()], dtype=np.int64
    )


def fault_rates(counts: np.ndarray) -> dict[str, float]:
    """`invalid_rate` and `duplicate_rate`: shares of the filled places that hold no item, or one
    listed above, out of what `fault_counts` counted."""
    total = max(int(counts[0]), 1)
    return {"invalid_rate": float(counts[1] / total), "duplicate_rate": float(counts[2] / total)}


def is_item(lists_UN: np.ndarray, num_items: int) -> np.ndarray:
    """bool[U, N]: does the place hold an item row of the catalogue?"""
    return (lists_UN >= 0) & (lists_UN < num_items)


def listed_above(lists_UN: np.ndarray) -> np.ndarray:
    """bool[U, N]: does the value of this place stand at an earlier place of the same list as
    well?"""
    order_UN = np.argsort(lists_UN, axis=1, kind="stable")
    sorted_UN = np.take_along_axis(lists_UN, order_UN, axis=1)
    repeats_UN = np.zeros(lists_UN.shape, dtype=bool)
    repeats_UN[:, 1:] = sorted_UN[:, 1:] == sorted_UN[:, :-1]
    result_UN = np.empty_like(repeats_UN)
    np.put_along_axis(result_UN, order_UN, repeats_UN, axis=1)
    return result_UN


def as_written(value: float | None) -> str:
    """A metric as the field writes it: .0566; a dash where there is none."""
    return "–" if value is None else f"{value:.4f}".removeprefix("0")


def signed(value: float) -> str:
    """A difference of metrics as the field writes it: +.0021."""
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")


def _num_users(hist: np.ndarray) -> int:
    if hist.shape != (TOP + 1,):
        raise ValueError(
            f"a histogram of shape {hist.shape}: expected ({TOP + 1},), index 0 = absent"
        )
    num_users = int(hist.sum())
    if num_users == 0:
        raise ValueError("0 users in the histogram: metrics need at least one user")
    return num_users
