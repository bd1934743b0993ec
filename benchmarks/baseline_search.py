"""Search of a baseline's settings by validation: published spaces, seeded draws, and what the best
so far is changed in."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Value = int | float


@dataclass(frozen=True)
class Range:
    """All numbers from low to high."""

    low: float
    high: float
    log: bool = False
    """Uniform in the logarithm."""

    def at(self, share: float) -> float:
        """The value below which this share of the range lies, in four digits: what is written is
        what is used."""
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class Choice:
    """One of some values, all alike likely."""

    values: tuple[Value, ...]

    def at(self, share: float) -> Value:
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


@dataclass(frozen=True)
class Search:
    """Where settings of a baseline are looked for, and in which order."""

    space: Mapping[str, Range | Choice]
    """What a draw sets; all other settings keep their defaults."""
    moves: tuple[Mapping[str, Value], ...]
    """The first tries: the best settings so far, changed in these; the first of all is the
    defaults."""

    def settings(
        self, number: int, seed: int, tried: Iterable[Mapping[str, Any]]
    ) -> dict[str, Value]:
        """What differs from the defaults in try `number` (from 0): a move away from the best of
        those before it, later a draw.

        `tried`: rows with `number`, `settings` and `score` (None: none was reached). The same rows
        and seed, the same settings."""
        if number >= len(self.moves):
            # Of Python's own generator `random` alone is promised to stay what it is.
            dice = random.Random(f"{seed} {number}")
            return {key: domain.at(dice.random()) for key, domain in self.space.items()}
        before = best(row for row in tried if row["number"] < number)
        return {**(before["settings"] if before else {}), **self.moves[number]}

    def as_dict(self) -> dict[str, Any]:
        """What is published beside the tries."""
        return {
            "space": {
                key: list(domain.values)
                if isinstance(domain, Choice)
                else {"loguniform" if domain.log else "uniform": [domain.low, domain.high]}
                for key, domain in self.space.items()
            },
            "moves": [dict(move) for move in self.moves],
        }


def best(tried: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the highest score, of equal ones the first; None where no row has one."""
    scored = [row for row in tried if row["score"] is not None]
    return max(scored, key=lambda row: (row["score"], -row["number"]), default=None)


KNN = Search(
    space={
        "window": Choice((1, 2, 3, 4, 6, 8, 12, 20, 50)),
        "backward": Range(0.0, 1.0),
        "decay": Range(0.3, 1.0),
        "recent": Choice((1, 2, 3, 5, 10, 20, 50)),
        "smoothing": Range(0.03, 30.0, log=True),
        "out_power": Range(0.0, 1.0),
        "in_power": Range(0.0, 1.0),
    },
    moves=({},),
)
"""`forward` is the unit in which the other weights are measured."""

SASREC = Search(
    space={
        "dropout": Range(0.3, 0.6),
        "learning_rate": Range(0.5e-3, 3e-3, log=True),
        "batch_size": Choice((128, 256, 512)),
        "d_model": Choice((64, 128, 256)),
        "heads": Choice((1, 2, 4)),
        "label_smoothing": Choice((0.0, 0.1)),
        "average": Choice((0.0, 0.99, 0.995)),
        "layers": Choice((2, 3)),
    },
    moves=(
        {},
        {"label_smoothing": 0.1},
        {"dropout": 0.6},
        {"d_model": 256},
        {"batch_size": 512, "learning_rate": 2e-3},
        {"heads": 2},
        {"layers": 3},
        {"average": 0.995},
        {"learning_rate": 1e-3},
        {"dropout": 0.4},
        {"heads": 4},
        {"d_model": 64},
        {"batch_size": 128},
    ),
)
"""Trainings take minutes and not seconds, so that few fit a budget: the first go from the defaults
to their neighbours."""
