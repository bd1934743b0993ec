"""What is held out of a user's items: the last two of them, or those after two dates."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import numpy as np

from genrec_shards.timestamps import DAY_MICROS, EPOCH, moment

# U users, total interactions.

Split = Literal["validation", "test"]
TrainedThrough = Literal["n-2", "n-1"]
LEAVE_ONE_OUT, GLOBAL_TIME = "leave-one-out", "global-time"
MINIMUM_LENGTH = 3
"""Items of a user under leave-one-out: one each to train on, validate and test with."""
NO_TARGET = -1
"""In place of the target of a user who has none in a split."""


def num_held_out(trained_through: TrainedThrough) -> int:
    """How many items at the end of each sequence training must not touch under leave-one-out."""
    if trained_through not in ("n-2", "n-1"):
        raise ValueError(f"trained_through is {trained_through!r}: choose n-2 or n-1")
    return 2 if trained_through == "n-2" else 1


@dataclass(frozen=True, eq=False)
class Periods:
    """How many of each user's items, oldest first, are in which period."""

    training_U: np.ndarray
    """int64[U], in the training period."""
    known_U: np.ndarray
    """int64[U], in training and validation period."""

    def lengths(self, trained_through: TrainedThrough) -> np.ndarray:
        """int64[U], items of each user's training part: n-2 is the training period, n-1 also the
        validation period."""
        return self.training_U if trained_through == "n-2" else self.known_U

    def flat(self) -> np.ndarray:
        """int64[2 U], `training_U` and then `known_U`, as shards keep them."""
        return np.concatenate([self.training_U, self.known_U])

    @classmethod
    def of_flat(cls, values: np.ndarray) -> "Periods":
        """The periods that `flat` gave."""
        return cls(*(half.astype(np.int64) for half in np.split(values, 2)))

    def fit(self, lengths_U: np.ndarray) -> bool:
        """Whether sequences of so many items can have these periods: each user has something to
        train on, and no period reaches further than the sequence."""
        if len(self.training_U) != len(lengths_U) or len(self.known_U) != len(lengths_U):
            return False
        ordered = (self.training_U <= self.known_U) & (self.known_U <= lengths_U)
        return bool((ordered & (self.training_U > 0)).all())


@dataclass(frozen=True)
class Cutoff:
    """Where the periods begin, the same for all users, in microseconds since 1970."""

    validation: int
    """First moment of the validation period; the training period is all time before."""
    test: int
    """First moment of the test period, which has no end."""

    def __post_init__(self) -> None:
        if self.validation >= self.test:
            order = "the test period begins after the validation period: give the earlier date"
            raise ValueError(f"--cutoff {self}: {order} first")

    def __str__(self) -> str:
        """Equal moments have equal texts: a date where it is midnight, else a time."""
        texts = []
        for micros in (self.validation, self.test):
            found = (EPOCH + timedelta(microseconds=micros)).replace(tzinfo=None)
            midnight = micros % DAY_MICROS == 0
            texts.append(found.date().isoformat() if midnight else found.isoformat() + "Z")
        return ",".join(texts)

    def periods(self, timestamps: np.ndarray, offsets: np.ndarray) -> Periods:
        """The periods of users who all have items.

        Args:
            timestamps: int64[total], microseconds since 1970, each user's ascending.
            offsets: int64[U+1], user u's are `timestamps[offsets[u]:offsets[u + 1]]`.
        """
        training_U, known_U = (
            np.add.reduceat(timestamps < first, offsets[:-1], dtype=np.int64)
            for first in (self.validation, self.test)
        )
        return Periods(training_U, known_U)


def cutoff_of(text: str) -> Cutoff:
    """The two dates of `2014-01-01,2014-04-01`. Raises ValueError for anything else."""
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(
            f"--cutoff {text[:60]}: give the first date of the validation period and that of the "
            "test period, as 2014-01-01,2014-04-01"
        )
    validation, test = (moment(part, "--cutoff") for part in parts)
    return Cutoff(validation, test)


@dataclass(frozen=True)
class GlobalTime:
    """What `dataset.json` says of a split by time."""

    cutoff: str
    """First date of the validation period, and of the test period."""
    validation_targets: int
    """Users with a row in the validation period."""
    test_targets: int
    users_without_history: int
    """Users with held-out rows who are not among those of the training period: they are left
    out."""

    def summary(self) -> str:
        """A line for a person."""
        validation, test = self.cutoff.split(",")
        return (
            f"trained before {validation}, validated before {test}, tested from there on: "
            f"{self.validation_targets:,} users have a validation target, {self.test_targets:,} a "
            f"test target; {self.users_without_history:,} users without history left out"
        )
