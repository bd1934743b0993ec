"""The counting rule: guesses the next item from the numbers alone and learns nothing; it measures a
leak."""

# U users, C candidates, N list

from __future__ import annotations

from functools import partial

import numpy as np
from genrec_shards.histories import Histories, check_trained_through, histories
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.evaluation.metrics import EMPTY, TOP, listed_above
from genrec_dist.evaluation.ranked_lists import Lists, Rule, first_candidates

STEPS = 13
"""How far above the last and the largest number of the history the rule looks."""

_MOST_DIGITS = 18
"""What int64 holds for certain, a step added."""


def recommend(
    sequences: Sequences,
    split: Split,
    *,
    codes: list[str],
    exclude_history: bool = True,
    trained_through: TrainedThrough = "n-2",
    users: np.ndarray | None = None,
    top: int = TOP,
) -> Lists:
    """Top lists of these user rows (None: all with a target), as `fit` says."""
    rule = fit(
        sequences,
        split,
        codes=codes,
        exclude_history=exclude_history,
        trained_through=trained_through,
        top=top,
    )
    return rule(sequences.history_and_target(split).users if users is None else users)


def fit(
    sequences: Sequences,
    split: Split,
    *,
    codes: list[str],
    exclude_history: bool = True,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
) -> Rule:
    """For d = 1..13, for base in (last item, largest item of the history): candidate base + d, in
    this order.

    Listed: candidates that are an item, not in the history and not yet listed. `codes` are the
    items' numbers by row. In a numbering without gaps "an item" is "not above the largest item"; in
    one with gaps a number that no item bears is passed over. Items of the history are always left
    out: that is the rule, whatever `exclude_history` is. Raises ValueError for codes that are not
    distinct whole numbers."""
    check_trained_through(split, trained_through)
    numbers = whole_numbers(codes)
    if numbers is None:
        raise ValueError(
            f"the counting rule needs distinct whole numbers as item codes, not {_odd_one(codes)}"
        )
    return partial(_lists, sequences, split, numbers, top)


def _lists(
    sequences: Sequences, split: Split, numbers: np.ndarray, top: int, users: np.ndarray
) -> Lists:
    past = histories(sequences, split, users)
    candidates_UC = _candidates(past, numbers)
    allowed_UC = ~listed_above(candidates_UC)
    rows_UC = _rows(numbers, candidates_UC)
    allowed_UC &= (rows_UC != EMPTY) & ~past.holds(np.arange(past.num_users)[:, None], rows_UC)
    return first_candidates(rows_UC, allowed_UC, top)


def whole_numbers(codes: list[str]) -> np.ndarray | None:
    """int64[N] where all codes are distinct whole numbers, None elsewhere."""
    if not all(_is_whole(code) for code in codes):
        return None
    numbers = np.array(codes, dtype=np.int64)
    return numbers if len(np.unique(numbers)) == len(numbers) else None


def _is_whole(code: str) -> bool:
    return code.isascii() and code.isdigit() and len(code) <= _MOST_DIGITS


def _odd_one(codes: list[str]) -> str:
    return next(
        (repr(code) for code in codes if not _is_whole(code)), "two spellings of one number"
    )


def _candidates(past: Histories, numbers: np.ndarray) -> np.ndarray:
    """int64[U, 2 * STEPS]: last + 1, largest + 1, last + 2, largest + 2, ..."""
    taken = numbers[past.items]
    last_U = taken[past.offsets[1:] - 1]
    largest_U = np.maximum.reduceat(taken, past.offsets[:-1])
    bases_U2 = np.stack([last_U, largest_U], axis=1)
    steps = np.arange(1, STEPS + 1)
    return (bases_U2[:, None, :] + steps[None, :, None]).reshape(past.num_users, 2 * STEPS)


def _rows(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64, shaped as `wanted`: the item row that bears each number, -1 where none does."""
    order = np.argsort(numbers)
    places = np.minimum(np.searchsorted(numbers, wanted, sorter=order), len(numbers) - 1)
    rows = order[places]
    return np.where(numbers[rows] == wanted, rows, EMPTY)
