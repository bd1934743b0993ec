"""What cleaning left out of a log, as numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cleaned:
    """What the rules of cleaning were, and how many items and users they left out; how many rows
    that were is in `dropped`."""

    k_core: int
    min_length: int
    items_below_k_core: int
    users_below_k_core: int
    users_below_min_length: int


_OF_WHOM = {
    "items_below_k_core": ("item", "k_core"),
    "users_below_k_core": ("user", "k_core"),
    "users_below_min_length": ("user", "min_length"),
    "new_items_below_k": ("new item", "k_core"),
    "new_users_below_min_length": ("new user", "min_length"),
}
"""Reason -> who had too few interactions, and by which rule."""
_WORDS = {
    "bad_lines": ("line", "that could not be read"),
    "outside_dates": ("row", "outside the dates"),
    "duplicates": ("row", "there already with the same user, item and time"),
    "rows_of_users_without_history": ("held-out row", "of users without history"),
    "rows_of_items_outside_the_catalogue": ("held-out row", "of items outside the catalogue"),
}
"""Reason -> what is counted, and what is so of it."""


def left_out(dropped: Mapping[str, int], details: Mapping[str, int | None]) -> str:
    """The rows that were left out, by reason, as part of a sentence; empty where none were.

    Example: 713 rows of 333 items with fewer than 5 interactions, 2 lines that could not be read.

    Args:
        dropped: rows by reason.
        details: `k_core` and `min_length`, and by reason how many items or users the rows are of;
            what is missing is left unsaid.
    """
    parts = []
    for reason, num_rows in dropped.items():
        if not num_rows:
            continue
        if reason in _OF_WHOM:
            who, rule = _OF_WHOM[reason]
            count, fewest = details.get(reason), details.get(rule)
            whom = f"{who}s" if count is None else counted(count, who)
            too_few = "too few" if fewest is None else f"fewer than {fewest}"
            parts.append(f"{counted(num_rows, 'row')} of {whom} with {too_few} interactions")
        else:
            unit, what = _WORDS.get(reason, ("row", f"for {reason}"))
            parts.append(f"{counted(num_rows, unit)} {what}")
    return ", ".join(parts)


def counted(number: int, unit: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{number:,} {unit}{'s' * (number != 1)}"
