"""What a system's lists add up to: whole numbers, out of which every metric is computed."""

# U users, N list, I items

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genrec_dist.evaluation.metrics import (
    TOP,
    bootstrap_ci95,
    fault_counts,
    fault_rates,
    is_item,
    metrics_from_histogram,
    rank_histogram,
)

COVERAGE = (10, 20)
"""Cut-offs at which coverage is told."""
BIAS = 10
"""The cut-off at which bias towards popular items is told."""
BREAKDOWN_METRICS = ("HR@10", "NDCG@10")

Buckets = Sequence[int]
"""The smallest value of each bucket, ascending; the last one has no end."""
BUCKETS: Mapping[str, Buckets] = {
    "history_length": (1, 3, 6, 11, 21, 51),
    "target_popularity": (0, 1, 5, 10, 20, 50),
}
"""By the items of the user's whole history in this split, and by how often her target was taken in
the training parts."""


class Tally:
    """Counts of lists, users in any order and in parts of any size; memory does not grow with
    them."""

    def __init__(self, training_counts_I: np.ndarray):
        """`training_counts_I` int64[I]: how often each item was taken in what the system may have
        learned from."""
        self.training_counts_I = training_counts_I
        self.hists = {
            name: np.zeros((len(bounds), TOP + 1), np.int64) for name, bounds in BUCKETS.items()
        }
        self.listed = {
            k: np.zeros(len(training_counts_I), np.int64) for k in sorted({*COVERAGE, BIAS})
        }
        self.faults = np.zeros(3, np.int64)
        self.target_taken = 0

    def add(
        self,
        lists_UN: np.ndarray,
        ranks_U: np.ndarray,
        targets_U: np.ndarray,
        lengths_U: np.ndarray,
    ) -> None:
        """Count some users: their lists int[U, N], N >= 20, target ranks, targets and history
        lengths."""
        taken_U = self.training_counts_I[targets_U]
        self.target_taken += int(taken_U.sum())
        for (name, bounds), values_U in zip(BUCKETS.items(), (lengths_U, taken_U), strict=True):
            buckets_U = np.searchsorted(bounds, values_U, side="right") - 1
            assert (buckets_U >= 0).all(), name
            self.hists[name] += np.stack(
                [rank_histogram(ranks_U[buckets_U == at]) for at in range(len(bounds))]
            )
        for k, listed_I in self.listed.items():
            first = lists_UN[:, :k]
            listed_I += np.bincount(first[is_item(first, len(listed_I))], minlength=len(listed_I))
        self.faults += fault_counts(lists_UN, len(self.training_counts_I))

    @property
    def num_users(self) -> int:
        return int(self.histogram.sum())

    @property
    def histogram(self) -> np.ndarray:
        """int64[21]: users by the rank of their target; index 0 = absent."""
        return self.hists["history_length"].sum(axis=0)

    def metrics(self) -> dict[str, Any]:
        """HR, NDCG, MRR, coverage, popularity and Gini, with `ci95` and `breakdown`, as
        `metrics-SPLIT.json` has them."""
        return {
            **metrics_from_histogram(self.histogram),
            **self._catalogue(),
            "ci95": bootstrap_ci95(self.histogram),
            "breakdown": {
                name: _breakdown(self.hists[name], bounds) for name, bounds in BUCKETS.items()
            },
        }

    def fault_rates(self) -> dict[str, float]:
        """`invalid_rate` and `duplicate_rate`."""
        return fault_rates(self.faults)

    def _catalogue(self) -> dict[str, float | None]:
        listed_I = self.listed[BIAS]
        places, taken = int(listed_I.sum()), int(listed_I @ self.training_counts_I)
        told: dict[str, float | None] = {
            f"coverage@{k}": float((self.listed[k] > 0).mean()) for k in COVERAGE
        }
        # Mean count of what is listed over mean count of what was taken next: 1 has no bias, above
        # 1 leans to the popular.
        ratio = (
            taken / places * self.num_users / self.target_taken
            if places and self.target_taken
            else None
        )
        return {**told, f"popularity@{BIAS}": ratio, f"gini@{BIAS}": gini(listed_I)}


def gini(counts_I: np.ndarray) -> float | None:
    """How unequal the counts are: 0 where all are equal, 1 - 1/I where one item has them all; None
    without a count."""
    total, num_items = int(counts_I.sum()), len(counts_I)
    if total == 0:
        return None
    places = np.arange(1, num_items + 1)
    return float(
        2 * int(places @ np.sort(counts_I)) / (num_items * total) - (num_items + 1) / num_items
    )


def bucket_names(bounds: Buckets) -> list[str]:
    """As people write them: 0, 1-4, ..., 50+."""
    ends = [after - 1 for after in bounds[1:]]
    names = [
        str(low) if low == high else f"{low}-{high}"
        for low, high in zip(bounds, ends, strict=False)
    ]
    return [*names, f"{bounds[-1]}+"]


def _breakdown(hists: np.ndarray, bounds: Buckets) -> dict[str, dict[str, Any]]:
    """Users and scores of each bucket; a bucket without users has no scores."""
    return {name: _bucket(hist) for name, hist in zip(bucket_names(bounds), hists, strict=True)}


def _bucket(hist: np.ndarray) -> dict[str, Any]:
    if not hist.any():
        return {"users": 0, **dict.fromkeys(BREAKDOWN_METRICS), "ci95": {}}
    scores = metrics_from_histogram(hist)
    return {
        "users": int(hist.sum()),
        **{name: scores[name] for name in BREAKDOWN_METRICS},
        "ci95": bootstrap_ci95(hist, names=BREAKDOWN_METRICS),
    }
