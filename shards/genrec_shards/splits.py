"""A split by time: two dates part a log into training, validation and test period, and each user's
rows with it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

import numpy as np

from genrec_shards.timestamps import moment

if TYPE_CHECKING:
    import hashlib


# U users, total interactions.

LEAVE_ONE_OUT, GLOBAL_TIME = "leave-one-out", "global-time"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Cutoff:
    """Where the periods begin; the same for all users. Both in microseconds since 1970."""

    validation: int
    """First moment of the validation period: the training period is what lies before."""
    test: int
    """First moment of the test period, which has no end."""

    def __post_init__(self) -> None:
        if self.validation >= self.test:
            raise ValueError(
                f"--cutoff {_text_of(self.validation)},{_text_of(self.test)}: the test period begins after the validation "
                "period: give the earlier date first"
            )

    def __str__(self) -> str:
        return f"{_text_of(self.validation)},{_text_of(self.test)}"

    def periods(self, timestamps: np.ndarray, offsets: np.ndarray) -> "Periods":
        """Of users' rows in time order, none of whom is without: `timestamps` int64[total],
        `offsets` int64[U+1]."""
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
            f"--cutoff {text[:60]}: give the first date of the validation period and that of the test period, as "
            "2014-01-01,2014-04-01"
        )
    return Cutoff(*(moment(part, "--cutoff") for part in parts))


@dataclass(frozen=True, eq=False)
class Periods:
    """How many of each user's items, oldest first, lie in which period."""

    training_U: np.ndarray
    """int64[U], in the training period."""
    known_U: np.ndarray
    """int64[U], in training and validation period."""

    def lengths(self, trained_through: "TrainedThrough") -> np.ndarray:
        """int64[U], items of each user's training part: n-2 is the training period, n-1 also the
        validation period."""
        return self.training_U if trained_through == "n-2" else self.known_U

    def flat(self) -> np.ndarray:
        """int64[2 U], both one behind the other, as shards keep them."""
        return np.concatenate([self.training_U, self.known_U])

    @classmethod
    def of_flat(cls, values: np.ndarray) -> "Periods":
        """The same read again."""
        return cls(*(half.astype(np.int64) for half in np.split(values, 2)))

    def fit(self, lengths_U: np.ndarray) -> bool:
        """May sequences of so many items be cut like this? Each user has something to learn
        from."""
        if len(self.training_U) != len(lengths_U) or len(self.known_U) != len(lengths_U):
            return False
        return bool(
            (self.training_U > 0).all()
            and (self.training_U <= self.known_U).all()
            and (self.known_U <= lengths_U).all()
        )

    def update(self, digest: "hashlib._Hash") -> None:
        """Feed them to a hash."""
        digest.update(b"periods 1\n")
        for counts_U in (self.training_U, self.known_U):
            digest.update(np.ascontiguousarray(counts_U, dtype="<i8").data)


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

    def told(self) -> str:
        """A line for a person."""
        validation, test = self.cutoff.split(",")
        return (
            f"trained before {validation}, validated before {test}, tested from there on: {self.validation_targets:,} users "
            f"have a validation target, {self.test_targets:,} a test target; {self.users_without_history:,} users "
            "without history left out"
        )


def _text_of(micros: int) -> str:
    """A date where it is midnight, else a time; equal moments have equal texts."""
    found = _EPOCH + timedelta(microseconds=micros)
    whole_day = micros % 86_400_000_000 == 0
    return found.date().isoformat() if whole_day else found.replace(tzinfo=None).isoformat() + "Z"


Split = Literal["validation", "test"]

TrainedThrough = Literal["n-2", "n-1"]

MINIMUM_LENGTH = 3

NO_TARGET = -1
"""Stands for the target of a user who has none in a split."""


def num_held_out(trained_through: TrainedThrough) -> int:
    """How many items at the end of each sequence training must not touch under leave-one-out."""
    if trained_through not in ("n-2", "n-1"):
        raise ValueError(f"trained_through is {trained_through!r}: choose n-2 or n-1")
    return 2 if trained_through == "n-2" else 1
