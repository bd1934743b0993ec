"""Errors that a user's data can cause, and the collection of bad lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

OnError = Literal["stop", "skip"]
NUM_SHOWN = 10


class DataError(ValueError):
    """Something in a user's data that they can mend; the message is one line: place, value,
    remedy."""


def printable(text: str) -> str:
    """Foreign text as a terminal may get it: without control characters, cut at 200."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


@dataclass
class BadLines:
    """What happens at a line that cannot be read and, under `skip`, what was left out so far."""

    on_error: OnError = "stop"
    count: int = 0
    shown: list[str] = field(default_factory=list)
    """The first NUM_SHOWN of them: file, line and what is wrong."""

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error is {self.on_error!r}: choose stop or skip")

    def add(self, path: Path | str, line: int, reason: str) -> None:
        """Count a bad line.

        Args:
            path: the file, as messages name it.
            line: number from 1; of Parquet, of the row.
            reason: what is wrong, without a remedy.

        Raises:
            DataError: under `stop`.
        """
        if self.on_error == "stop":
            remedy = "mend it, or use --on-error skip to leave such lines out"
            raise DataError(f"{path}:{line}: {reason}: {remedy}")
        self.count += 1
        if len(self.shown) < NUM_SHOWN:
            self.shown.append(f"{path}:{line}: {reason}")

    def summary(self) -> list[str]:
        """Lines for a person; none where nothing was left out."""
        if not self.count:
            return []
        more = f"; the first {len(self.shown)}:" if self.count > len(self.shown) else ":"
        return [f"{self.count:,} lines could not be read and were left out{more}", *self.shown]
