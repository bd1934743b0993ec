"""The counting rule: guesses the next item from the numbers alone and learns nothing; it measures a
leak."""

# U users, C candidates, N list

from __future__ import annotations

import numpy as np
from genrec_shards.histories import check_trained_through, histories
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Split, TrainedThrough

from genrec_dist.evaluation.metrics import EMPTY, TOP, listed_above
from genrec_dist.evaluation.ranked_lists import Lists, Rule, first_candidates

STEPS = 13
"""How far above the last and the largest number of the history the rule looks."""

_MOST_DIGITS = 18
"""What int64 can always hold, a step added."""


def fit(
    sequences: Sequences,
    split: Split,
    *,
    codes: list[str],
    exclude_history: bool = True,
    trained_through: TrainedThrough = "n-2",
    top: int = TOP,
) -> Rule:
    """The rule that lists, for d = 1..13 and base in (last item, largest item of the history), the
    candidates base + d in this order.

    A candidate is listed if it is an item, not in the history and not yet listed. In a numbering
    without gaps "an item" is "not above the largest item"; in one with gaps a number that no item
    has is passed over.

    Arguments are those of `knn.fit`, and `codes`, the items' numbers by row. `exclude_history` has
    no effect, since leaving out the history is part of the rule; `trained_through` is checked
    alone. Raises ValueError for codes that are not distinct whole numbers.
    """
    check_trained_through(split, trained_through)
    numbers = whole_numbers(codes)
    if numbers is None:
        odd = next((repr(code) for code in codes if not _is_whole(code)), None)
        raise ValueError(
            "the counting rule needs distinct whole numbers as item codes, not "
            f"{odd or 'two spellings of one number'}"
        )
    order = np.argsort(numbers)
    steps = np.arange(1, STEPS + 1)

    def lists(users: np.ndarray) -> Lists:
        past = histories(sequences, split, users)
        # A user with the history 7, 9, 4 has the bases 4 and 9 and the candidates 5, 10, 6, 11, ...
        taken = numbers[past.items]
        last_U = taken[past.offsets[1:] - 1]
        largest_U = np.maximum.reduceat(taken, past.offsets[:-1])
        bases_U2 = np.stack([last_U, largest_U], axis=1)
        candidates_UC = (bases_U2[:, None, :] + steps[None, :, None]).reshape(-1, 2 * STEPS)
        # The item row that has each number, EMPTY where none has.
        places_UC = np.searchsorted(numbers, candidates_UC, sorter=order)
        rows_UC = order[np.minimum(places_UC, len(numbers) - 1)]
        rows_UC = np.where(numbers[rows_UC] == candidates_UC, rows_UC, EMPTY)
        taken_UC = past.holds(np.arange(past.num_users)[:, None], rows_UC)
        allowed_UC = ~listed_above(candidates_UC) & (rows_UC != EMPTY) & ~taken_UC
        return first_candidates(rows_UC, allowed_UC, top)

    return lists


def whole_numbers(codes: list[str]) -> np.ndarray | None:
    """int64[N] where all codes are distinct whole numbers, None elsewhere."""
    if not all(_is_whole(code) for code in codes):
        return None
    numbers = np.array(codes, dtype=np.int64)
    return numbers if len(np.unique(numbers)) == len(numbers) else None


def _is_whole(code: str) -> bool:
    return code.isascii() and code.isdigit() and len(code) <= _MOST_DIGITS
