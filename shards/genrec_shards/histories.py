"""The histories and targets of some users in one split, with quick membership."""

# U users chosen, total items of their histories

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, get_args

import numpy as np

from genrec_shards.keyed_random import keyed_permutation
from genrec_shards.sequences import Sequences, flat_ranges, offsets_of
from genrec_shards.splits import Split, TrainedThrough

WINDOW = 65_536
"""Users looked at together, so that memory does not grow with their number."""
MANY_TIES = 1 / 3
"""Share of tied targets above which there is a warning: the time does not say what came last."""
_SAMPLE_STREAM = 0x56A1


@dataclass(frozen=True, eq=False)
class Histories:
    """What a rule may look at when it makes the lists of a split, and the targets it is scored
    against."""

    items: np.ndarray
    """int32[total], item rows, user after user, oldest first."""
    offsets: np.ndarray
    """int64[U+1]: the u-th chosen user's history is `items[offsets[u]:offsets[u + 1]]`."""
    targets_U: np.ndarray
    """int32[U], NO_TARGET of those whom a split by time leaves without; a rule may still make their
    lists."""
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
        """bool, broadcast: whether the item is in the history of the user (0..U-1)."""
        keys = users * np.int64(self.num_items) + items
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[places] == keys


def histories(sequences: Sequences, split: Split, users: np.ndarray | None = None) -> Histories:
    """Histories of these user rows (int64[U], None: all), in their order; it costs what these users
    have."""
    rows = None if users is None else np.asarray(users, dtype=np.int64)
    view = sequences.history_and_target(split, rows)
    lengths = view.ends - view.starts
    return Histories(
        items=view.items[flat_ranges(view.starts, lengths)],
        offsets=offsets_of(lengths),
        targets_U=view.targets,
        num_items=sequences.num_items,
    )


def windows(users: np.ndarray | range, size: int | None = None) -> Iterator[np.ndarray]:
    """int64 user rows, `size` at a time (None: WINDOW), so that a loop over all users holds few of
    them at once."""
    size = size or WINDOW
    for start in range(0, len(users), size):
        yield np.asarray(users[start : start + size], dtype=np.int64)


def exclude_history_default(sequences: Sequences) -> bool:
    """Whether to leave the history out of the lists: True where no target of either split repeats
    it."""
    return not any(repeated_targets(sequences).values())


def repeated_targets(sequences: Sequences) -> dict[str, float]:
    """Share of targets that are in the user's own history, by split."""
    shares = {}
    for split in get_args(Split):
        repeated = 0
        users = sequences.history_and_target(split).users
        for rows in windows(users):
            past = histories(sequences, split, rows)
            repeated += int(past.holds(np.arange(past.num_users), past.targets_U).sum())
        shares[split] = repeated / len(users)
    return shares


def tied_targets(sequences: Sequences, timestamps: np.ndarray) -> dict[str, float]:
    """Share of targets that have the time of another item of their user, so that the time alone
    does not say which of them is the target, by split.

    Example, one user with items at 1, 2, 2, 3: validation (the third) is tied, test is not.

    Args:
        sequences: the data.
        timestamps: int64[total], of each of the sequences' items.
    """
    equal = timestamps[1:] == timestamps[:-1]
    tied = np.zeros(len(timestamps), bool)
    same_user = np.ones(len(timestamps) - 1, bool)
    same_user[sequences.offsets[1:-1] - 1] = False  # the next item is another user's
    tied[1:] = equal & same_user
    tied[:-1] |= equal & same_user
    shares = {}
    for split in get_args(Split):
        view = sequences.history_and_target(split)
        shares[split] = float(tied[view.ends[view.users]].mean())
    return shares


class TrainingPart(NamedTuple):
    items: np.ndarray
    """int32[total], item rows, user after user, oldest first."""
    users: np.ndarray
    """int64[total], user rows."""


def check_trained_through(split: Split, trained_through: TrainedThrough) -> None:
    """Raises ValueError where the targets of the split are training data."""
    if split == "validation" and trained_through == "n-1":
        remedy = "score the test split, or train through n-2"
        raise ValueError(f"trained_through n-1 has seen the validation targets: {remedy}")


def training_part(
    sequences: Sequences, split: Split, trained_through: TrainedThrough
) -> TrainingPart:
    """t_1..t_{n-2} of all users, or t_1..t_{n-1}, or their periods; other splits' users and targets
    are never left out."""
    check_trained_through(split, trained_through)
    return _part(sequences, np.arange(sequences.num_users), trained_through)


def training_windows(
    sequences: Sequences, trained_through: TrainedThrough
) -> Iterator[TrainingPart]:
    """The training part of all users, one window of users after the other."""
    for rows in windows(range(sequences.num_users)):
        yield _part(sequences, rows, trained_through)


def training_counts(sequences: Sequences, trained_through: TrainedThrough) -> np.ndarray:
    """int64[num_items], how often each item is in the training parts of all users."""
    counts_I = np.zeros(sequences.num_items, dtype=np.int64)
    for part in training_windows(sequences, trained_through):
        counts_I += np.bincount(part.items, minlength=len(counts_I))
    return counts_I


def _part(sequences: Sequences, rows: np.ndarray, trained_through: TrainedThrough) -> TrainingPart:
    starts = sequences.offsets[rows]
    lengths = sequences.training_ends(trained_through, rows) - starts
    items = sequences.items[flat_ranges(starts, lengths)]
    return TrainingPart(items, np.repeat(rows, lengths))


def sample_users(num_users: int, sample: int, seed: int) -> np.ndarray:
    """int64 rows of a seeded sample of users, ascending; all of them where the sample is 0 or not
    smaller.

    The same rows on every machine and with every version of numpy, so that two runs can be compared
    on a sample."""
    if sample == 0 or sample >= num_users:
        return np.arange(num_users)
    return np.sort(keyed_permutation(num_users, seed, _SAMPLE_STREAM)[:sample])
