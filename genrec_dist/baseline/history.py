"""The histories and targets of some users in one split, with quick membership."""

# U users chosen, total items of their histories

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from genrec_shards.sequences import Sequences, Split, flat_ranges

WINDOW = 65_536
"""Users looked at together, so that memory does not grow with their number."""


@dataclass(frozen=True, eq=False)
class Histories:
    """What a rule may look at when it makes the lists of a split, and the targets it is scored against."""

    items: np.ndarray
    """int32[total], item rows, user after user, oldest first."""
    offsets: np.ndarray
    """int64[U+1]: the u-th chosen user's history is `items[offsets[u]:offsets[u + 1]]`."""
    targets_U: np.ndarray
    """int32[U], NO_TARGET of those whom a split by time leaves without; a rule may still make their lists."""
    num_items: int
    """Size of the catalogue."""

    @property
    def num_users(self) -> int:
        return len(self.targets_U)

    @property
    def lengths_U(self) -> np.ndarray:
        """int64[U], items of each history."""
        return np.diff(self.offsets)

    @cached_property
    def users(self) -> np.ndarray:
        """int64[total], whose item it is: 0..U-1."""
        return np.repeat(np.arange(self.num_users), np.diff(self.offsets))

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.unique(self.users * self.num_items + self.items)

    def holds(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """bool, broadcast: is the item in the history of the user (0..U-1)?"""
        keys = users * np.int64(self.num_items) + items
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[places] == keys


def histories(sequences: Sequences, split: Split, users: np.ndarray | None = None) -> Histories:
    """Histories of these user rows (int64[U], None: all), in their order; it costs what these users have."""
    view = sequences.history_and_target(split, None if users is None else np.asarray(users, dtype=np.int64))
    lengths = view.ends - view.starts
    return Histories(
        view.items[flat_ranges(view.starts, lengths)], _offsets(lengths), view.targets, sequences.num_items
    )


def windows(users: np.ndarray | range, size: int | None = None) -> Iterator[np.ndarray]:
    """int64 user rows, `size` at a time (None: WINDOW): whoever looks at all users holds few of them at once."""
    size = size or WINDOW
    for start in range(0, len(users), size):
        yield np.asarray(users[start : start + size], dtype=np.int64)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
