"""Hierarchical codes as words, `a12-b45-c7`, and how evenly a set of codes is spread over its
levels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SEPARATOR = "-"
"""Begins each level but the first; the tokenizer cuts there."""
MOST_LEVELS = len(LETTERS)


@dataclass(frozen=True)
class LevelBalance:
    """How many items share the beginning of a code down to one level."""

    beginnings: int
    """Distinct ones."""
    smallest: int
    """Items with the rarest beginning."""
    median: float
    largest: int
    entropy_share: float
    """Entropy of a random item's beginning over that of as many equally full ones; 1 where there is
    one."""


def code_texts(places: np.ndarray) -> list[str]:
    """A word for each row of int[N, L]: `a`, `b`, ... name the level, so that levels share no
    token; numbers from 1."""
    assert places.shape[1] <= MOST_LEVELS
    letters = LETTERS[: places.shape[1]]
    return [
        SEPARATOR.join(f"{letter}{place + 1}" for letter, place in zip(letters, row, strict=True))
        for row in places.tolist()
    ]


def places_of_codes(codes: Sequence[str]) -> np.ndarray:
    """int64[N, L], what `code_texts` made these words of."""
    rows = [[int(part[1:]) - 1 for part in code.split(SEPARATOR)] for code in codes]
    return np.array(rows, np.int64)


def balance(codes: Sequence[str]) -> list[LevelBalance]:
    """By level, from the first; codes without a separator have one level."""
    counters: list[Counter[str]] = []
    for code in codes:
        # a1-b2 begins with a1, then with a1-b2.
        beginnings = accumulate(code.split(SEPARATOR), lambda one, other: one + SEPARATOR + other)
        for level, beginning in enumerate(beginnings):
            if level == len(counters):
                counters.append(Counter())
            counters[level][beginning] += 1
    levels = []
    for counter in counters:
        sizes = np.array(list(counter.values()))
        shares = sizes / sizes.sum()
        entropy = -float((shares * np.log(shares)).sum())
        found = LevelBalance(
            beginnings=len(sizes),
            smallest=int(sizes.min()),
            median=float(np.median(sizes)),
            largest=int(sizes.max()),
            entropy_share=entropy / float(np.log(len(sizes))) if len(sizes) > 1 else 1.0,
        )
        levels.append(found)
    return levels
