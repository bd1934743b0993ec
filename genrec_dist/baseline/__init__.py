"""Rules that learn little or nothing: the numbers that stand beside every number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from genrec_shards.sequences import Sequences, Split, TrainedThrough

from genrec_dist.baseline import counting, knn, popularity, repeat
from genrec_dist.baseline.history import histories
from genrec_dist.baseline.lists import Lists
from genrec_dist.metrics import bootstrap_ci95, metrics_from_histogram, rank_histogram, target_ranks

BASELINES: dict[str, Callable[..., Lists]] = {
    "popularity": popularity.recommend,
    "counting": counting.recommend,
    "repeat": repeat.recommend,
    "knn": knn.recommend,
}

BESIDE = ("counting", "popularity", "knn")
"""Whose scores stand in every metrics file."""


def recommend(
    name: str,
    sequences: Sequences,
    codes: list[str],
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | None = None,
) -> Lists:
    """Top-20 lists of the baseline `name` for these user rows (None: all). Raises ValueError for an unknown name."""
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: choose one of {', '.join(BASELINES)}")
    more = {"codes": codes} if name == "counting" else {}
    return BASELINES[name](
        sequences, split, exclude_history=exclude_history, trained_through=trained_through, users=users, **more
    )


def beside(
    sequences: Sequences,
    codes: list[str],
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | None = None,
) -> dict[str, dict[str, Any] | None]:
    """Metrics with `ci95` of counting, popularity and knn on exactly these user rows (int64[U], None: all).

    counting is None where the codes are not whole numbers: the rule does not apply.
    """
    targets_U = histories(sequences, split, users).targets_U
    scores: dict[str, dict[str, Any] | None] = {}
    for name in BESIDE:
        if name == "counting" and counting.whole_numbers(codes) is None:
            scores[name] = None
            continue
        lists = recommend(
            name, sequences, codes, split,
            exclude_history=exclude_history, trained_through=trained_through, users=users,
        )  # fmt: skip
        hist = rank_histogram(target_ranks(lists.items_UN, targets_U))
        scores[name] = {**metrics_from_histogram(hist), "ci95": bootstrap_ci95(hist)}
    return scores
