"""The interactions that a rule may count."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from genrec_shards.sequences import Sequences, Split, TrainedThrough


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
    """t_1..t_{n-2} of all users, or t_1..t_{n-1}; other splits' users and targets are never left out."""
    check_trained_through(split, trained_through)
    users = np.repeat(np.arange(sequences.num_users), sequences.lengths)
    inside = np.arange(sequences.num_interactions) < sequences.training_ends(trained_through)[users]
    return TrainingPart(sequences.items[inside], users[inside])
