"""HR, NDCG and MRR of top lists, from a histogram of the targets' ranks."""

# U users, N list, R resamples

from __future__ import annotations

import numpy as np

TOP = 20
"""Length of the lists that are scored and written."""

EMPTY = -1
"""A place of a list that holds nothing; only at the end of a list."""

INVALID = -2
"""A place whose generated text is no item (unconstrained decoding); it keeps its place and counts as a miss."""


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
"""What a user counts whose target stands at rank r (0: absent). With one target a user the ideal DCG is 1."""


def target_ranks(lists_UN: np.ndarray, targets_U: np.ndarray) -> np.ndarray:
    """int32[U]: the place of each target in its list, 1 = first, 0 = absent; the first place where it stands twice."""
    if len(lists_UN) != len(targets_U):
        raise ValueError(f"{len(lists_UN)} lists for {len(targets_U)} targets: give one list a target")
    hits_UN = lists_UN == np.asarray(targets_U)[:, None]
    return np.where(hits_UN.any(axis=1), hits_UN.argmax(axis=1) + 1, 0).astype(np.int32)


def rank_histogram(ranks: np.ndarray, N: int = TOP) -> np.ndarray:
    """int64[N+1]: how many users have their target at each rank; index 0 = absent, or below place N.

    Histograms of disjoint sets of users add up to the histogram of all, so any split among processes gives the metrics
    of the whole to the digit.
    """
    ranks = np.asarray(ranks)
    if ranks.size and ranks.min() < 0:
        raise ValueError(f"rank {ranks.min()}: ranks start at 1, 0 is absent")
    return np.bincount(np.where(ranks <= N, ranks, 0), minlength=N + 1).astype(np.int64)


def metrics_from_histogram(hist: np.ndarray) -> dict[str, float]:
    """HR@1,5,10,20, NDCG@5,10,20 and MRR@20 of a histogram int64[21] of target ranks."""
    num_users = _num_users(hist)
    return {name: float(weights @ hist / num_users) for name, weights in WEIGHTS.items()}


def bootstrap_ci95(hist: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, list[float]]:
    """[low, high] of each metric: the 2.5th and 97.5th percentile over resamples of the users.

    A metric sees a user through her rank alone. Drawing U users with replacement and counting their ranks is by
    definition one multinomial draw of U from the observed shares, so R draws of 21 numbers do what R draws of U users
    would, at a cost that does not grow with U.
    """
    num_users = _num_users(hist)
    draws_RN = np.random.default_rng(seed).multinomial(num_users, hist / num_users, size=resamples)
    bounds = {name: np.percentile(draws_RN @ weights / num_users, [2.5, 97.5]) for name, weights in WEIGHTS.items()}
    return {name: [float(low), float(high)] for name, (low, high) in bounds.items()}


def list_faults(lists_UN: np.ndarray, num_items: int) -> dict[str, float]:
    """`invalid_rate` and `duplicate_rate`: shares of the filled places that hold no item, or one listed above."""
    filled_UN = lists_UN != EMPTY
    valid_UN = (lists_UN >= 0) & (lists_UN < num_items)
    total = max(int(filled_UN.sum()), 1)
    return {
        "invalid_rate": float((filled_UN & ~valid_UN).sum() / total),
        "duplicate_rate": float((listed_above(lists_UN) & valid_UN).sum() / total),
    }


def listed_above(lists_UN: np.ndarray) -> np.ndarray:
    """bool[U, N]: does the value of this place stand at an earlier place of the same list as well?"""
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


def _num_users(hist: np.ndarray) -> int:
    if hist.shape != (TOP + 1,):
        raise ValueError(f"a histogram of shape {hist.shape}: expected ({TOP + 1},), index 0 = absent")
    num_users = int(hist.sum())
    if num_users == 0:
        raise ValueError("0 users in the histogram: metrics need at least one user")
    return num_users
