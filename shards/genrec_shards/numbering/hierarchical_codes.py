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
    return np.array(
        [[int(part[1:]) - 1 for part in code.split(SEPARATOR)] for code in codes], np.int64
    )


def balance(codes: Sequence[str]) -> list[LevelBalance]:
    """By level, from the first; codes without a separator have one level."""
    levels: list[Counter[str]] = []
    for code in codes:
        parts = [
            SEPARATOR + part if number else part
            for number, part in enumerate(code.split(SEPARATOR))
        ]
        for level, beginning in enumerate(accumulate(parts)):
            if level == len(levels):
                levels.append(Counter())
            levels[level][beginning] += 1
    return [_level_balance(np.array(list(counter.values()))) for counter in levels]


def num_collisions(codes: Sequence[str]) -> int:
    """Items whose code another item of a lower row bears."""
    return len(codes) - len(set(codes))


def _level_balance(sizes: np.ndarray) -> LevelBalance:
    shares = sizes / sizes.sum()
    entropy = -float((shares * np.log(shares)).sum())
    share = entropy / float(np.log(len(sizes))) if len(sizes) > 1 else 1.0
    return LevelBalance(
        len(sizes), int(sizes.min()), float(np.median(sizes)), int(sizes.max()), share
    )
