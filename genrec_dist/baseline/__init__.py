"""Rules that learn little or nothing: the numbers that stand beside every number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from genrec_shards.sequences import Sequences, Split, TrainedThrough

from genrec_dist.baseline import counting, knn, popularity, repeat
from genrec_dist.baseline.history import histories, windows
from genrec_dist.baseline.lists import Lists, Rule
from genrec_dist.baseline.training import training_counts
from genrec_dist.tally import Tally

BASELINES: dict[str, Callable[..., Rule]] = {
    "popularity": popularity.fit,
    "counting": counting.fit,
    "repeat": repeat.fit,
    "knn": knn.fit,
}

BESIDE = ("counting", "popularity", "knn")
"""Whose scores stand in every metrics file."""


def fit(
    name: str,
    sequences: Sequences,
    codes: list[str],
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
) -> Rule:
    """The baseline `name`, ready to make top-20 lists of any user rows. Raises ValueError for an unknown name."""
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: choose one of {', '.join(BASELINES)}")
    more = {"codes": codes} if name == "counting" else {}
    return BASELINES[name](sequences, split, exclude_history=exclude_history, trained_through=trained_through, **more)


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
    """Top-20 lists of the baseline `name` for these user rows (None: all with a target), all in memory at once."""
    rule = fit(name, sequences, codes, split, exclude_history=exclude_history, trained_through=trained_through)
    return rule(sequences.history_and_target(split).users if users is None else users)


def beside(
    sequences: Sequences,
    codes: list[str],
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | range | None = None,
) -> dict[str, dict[str, Any] | None]:
    """Metrics of counting, popularity and knn (`Tally.metrics`) on exactly these user rows (None: all with a target).

    counting is None where the codes are not whole numbers: the rule does not apply. Users are taken window by window.
    """
    rows = sequences.history_and_target(split).users if users is None else users
    counts_I = training_counts(sequences, trained_through)
    scores: dict[str, dict[str, Any] | None] = {}
    for name in BESIDE:
        if name == "counting" and counting.whole_numbers(codes) is None:
            scores[name] = None
            continue
        rule = fit(name, sequences, codes, split, exclude_history=exclude_history, trained_through=trained_through)
        scores[name] = _tally(rule, sequences, split, rows, counts_I).metrics()
    return scores


def _tally(rule: Rule, sequences: Sequences, split: Split, rows: np.ndarray | range, counts_I: np.ndarray) -> Tally:
    tally = Tally(counts_I)
    for users in windows(rows):
        past, lists = histories(sequences, split, users), rule(users)
        tally.add(lists.items_UN, lists.ranks(past.targets_U), past.targets_U, past.lengths_U)
    return tally
