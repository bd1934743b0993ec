"""The interactions that a rule may count."""

# I items

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from genrec_shards.sequences import Sequences, Split, TrainedThrough, flat_ranges

from genrec_dist.baseline.history import windows


class TrainingPart(NamedTuple):
    items: np.ndarray
    """int32[total], item rows, user after user, oldest first."""
    users: np.ndarray
    """int64[total], user rows."""


def check_trained_through(split: Split, trained_through: TrainedThrough) -> None:
    """Raises ValueError where the targets of the split are training data."""
    if split == "validation" and trained_through == "n-1":
        raise ValueError(
            "trained_through n-1 has seen the validation targets: score the test split, or train through n-2"
        )


def training_part(sequences: Sequences, split: Split, trained_through: TrainedThrough) -> TrainingPart:
    """t_1..t_{n-2} of all users, or t_1..t_{n-1}, or their periods; other splits' users and targets are never left out."""
    check_trained_through(split, trained_through)
    return _part(sequences, np.arange(sequences.num_users), trained_through)


def training_windows(sequences: Sequences, trained_through: TrainedThrough) -> Iterator[TrainingPart]:
    """The training part of all users, a window of users after the other."""
    for rows in windows(range(sequences.num_users)):
        yield _part(sequences, rows, trained_through)


def training_counts(sequences: Sequences, trained_through: TrainedThrough) -> np.ndarray:
    """int64[I]: how often each item was taken in the training parts."""
    counts_I = np.zeros(sequences.num_items, dtype=np.int64)
    for part in training_windows(sequences, trained_through):
        counts_I += np.bincount(part.items, minlength=len(counts_I))
    return counts_I


def _part(sequences: Sequences, rows: np.ndarray, trained_through: TrainedThrough) -> TrainingPart:
    starts = sequences.offsets[rows]
    lengths = sequences.training_ends(trained_through, rows) - starts
    return TrainingPart(sequences.items[flat_ranges(starts, lengths)], np.repeat(rows, lengths))
