"""From a log to sequences: duplicates, order and ties, k-core and shortest length; each row left
out is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from genrec_shards.cleaning.buckets import Buckets
from genrec_shards.errors import DataError
from genrec_shards.keyed_random import keyed_bits, mixed_key
from genrec_shards.sequences import Sequences, flat_ranges, sort_ids
from genrec_shards.splits import MINIMUM_LENGTH, Cutoff, Split

if TYPE_CHECKING:
    import polars as pl

    from genrec_shards.cleaning.buckets import Numbers, Rows

# U users, N items, R rows of a bucket; users and items have numbers until the last step.

Ties = Literal["shuffle", "keep"]
_TIE_STREAM = 4


@dataclass(frozen=True)
class Cleaning:
    """What is left out, and in which order items of one time come."""

    k_core: int = 5
    """Each user and each item that stays has at least this many rows; 0 and 1 leave all."""
    min_length: int = MINIMUM_LENGTH
    """Fewest items of a user; of a split by time: of her training period."""
    ties: Ties = "shuffle"
    """Rows of one user and time: in an order drawn from seed, user, item and time, or as the log
    has them."""
    seed: int = 0
    since: int | None = None
    until: int | None = None
    """Microseconds since 1970, both included: rows before and after are left out before all
    else."""
    cutoff: Cutoff | None = None
    """Of a split by time: the core is that of the training period, and held-out rows of others are
    left out."""

    def __post_init__(self) -> None:
        if self.ties not in get_args(Ties):
            raise ValueError(f"ties is {self.ties!r}: choose shuffle or keep")
        if self.k_core < 0:
            raise ValueError(f"k_core is {self.k_core}: give a whole number, 0 for none")
        if self.since is not None and self.until is not None and self.since > self.until:
            raise ValueError("since lies after until: no row can be between them")
        if self.min_length < shortest(self.cutoff):
            why = "training, validation, test" if self.cutoff is None else "in the training period"
            raise ValueError(
                f"min_length is {self.min_length}: at least {shortest(self.cutoff)} are needed ({why})"
            )


def shortest(cutoff: Cutoff | None) -> int:
    """The least that `min_length` may be: an item to train on, and under leave-one-out one each to
    validate and test with."""
    return MINIMUM_LENGTH if cutoff is None else 1


@dataclass(frozen=True, eq=False)
class CleanLog:
    """What a log has become."""

    sequences: Sequences
    """Users and items in the order of `sort_ids`, whatever the order of the log."""
    timestamps: np.ndarray
    """int64[total], microseconds since 1970 of each of the sequences' items."""
    num_read: int
    """Rows of the log: the sequences' interactions and those dropped add up to it."""
    dropped: dict[str, int]
    """Rows left out, by reason; all reasons are there."""
    users_without_history: int = 0
    """Of a split by time, users with held-out rows who are not among those of the training period's
    core."""


def clean(
    frames: Iterable[pl.DataFrame], cleaning: Cleaning, folder: Path, source: str
) -> CleanLog:
    """Frames of a reader -> sequences. `folder`: an empty directory to work in; `source`: the log's
    name in messages.

    In this order: of equal rows (user, item and time) the first is kept; rows are sorted by user
    and time; then users with fewer than max(k_core, min_length) rows and items with fewer than
    k_core go, again and again until all have enough. Of a split by time only rows of the training
    period count, so that no held-out row decides on a user or an item; held-out rows of users and
    items that are not left then go too. Memory: a bucket of rows, what users and items take, and 12
    bytes for each row that stays. Raises DataError where nothing is left, OSError where the disk is
    full."""
    buckets, num_read = Buckets(folder), 0
    for found in frames:
        num_read += found.height
        buckets.add(between(found, cleaning))
    check_read(num_read, source)
    dropped = {
        "outside_dates": num_read - buckets.num_rows,
        "duplicates": sort_buckets(buckets, cleaning),
    }
    core = Core(buckets, cleaning)
    while True:
        counts_N = core.count(buckets)
        few_N = core.few_items(counts_N)
        if not few_N.any() and not core.few_users().any():
            break
        core.drop(few_N)
    core.settle(buckets, counts_N)
    dropped |= core.dropped
    if not core.users_U.any():
        raise nobody_left(buckets.num_users, num_read, dropped, cleaning, source)
    sequences, timestamps = _gathered(buckets, core, cleaning.cutoff)
    assert sequences.num_interactions + sum(dropped.values()) == num_read
    if cleaning.cutoff is not None:
        check_targets(sequences, cleaning.cutoff, source)
    return CleanLog(sequences, timestamps, num_read, dropped, core.users_without_history)


def check_read(num_read: int, source: str) -> None:
    """Raises DataError for a log without a row."""
    if not num_read:
        raise DataError(f"{source}: empty: no interaction in it that can be read")


def nobody_left(
    num_users: int, num_read: int, dropped: dict[str, int], cleaning: Cleaning, source: str
) -> DataError:  # fmt: skip
    """What to raise where no user stays of so many."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
    later = (
        "" if cleaning.cutoff is None else f", or give later dates than --cutoff {cleaning.cutoff}"
    )
    return DataError(
        f"{source}: no user is left of {num_users:,} with {num_read:,} rows ({told}): "
        f"lower --k-core {cleaning.k_core} or --min-length {cleaning.min_length}{later}"
    )


def check_targets(sequences: Sequences, cutoff: Cutoff, source: str) -> None:
    """Raises DataError where nobody has a target in one of the periods."""
    for split in get_args(Split):
        if not len(sequences.history_and_target(split).users):
            raise DataError(
                f"{source}: none of {sequences.num_users:,} users of the training period has a row in the {split} period: "
                f"give other dates than --cutoff {cutoff}"
            )


def between(found: pl.DataFrame, cleaning: Cleaning) -> pl.DataFrame:
    """The rows within the dates."""
    if cleaning.since is not None:
        found = found.filter(found["time"] >= cleaning.since)
    if cleaning.until is not None:
        found = found.filter(found["time"] <= cleaning.until)
    return found


def sort_buckets(buckets: Rows, cleaning: Cleaning) -> int:
    """Order each bucket by user, time and tie, without duplicates; how many these were."""
    num_duplicates = 0
    hashes = [id_hashes(names) for names in (buckets.user_numbers, buckets.item_numbers)]
    for bucket, rows_R in enumerate(buckets):
        if cleaning.ties == "shuffle":
            keys_R = tie_keys(rows_R, hashes[0], hashes[1], cleaning.seed)
            order = np.lexsort((rows_R["item"], keys_R, rows_R["time"], rows_R["user"]))
            kept = rows_R[order]
            kept = kept[~_repeats(kept)]
        else:
            # Sorting is stable, so among equal rows the first of the log comes first.
            order = np.lexsort((rows_R["item"], rows_R["time"], rows_R["user"]))
            repeats_R = np.zeros(len(rows_R), bool)
            repeats_R[order] = _repeats(rows_R[order])
            kept = rows_R[~repeats_R]
            kept = kept[np.lexsort((kept["time"], kept["user"]))]
        num_duplicates += len(rows_R) - len(kept)
        buckets.replace(bucket, kept)
    return num_duplicates


def _repeats(rows_R: np.ndarray) -> np.ndarray:
    """bool[R]: is the row the same as the one before?"""
    same = np.zeros(len(rows_R), bool)
    same[1:] = rows_R[1:] == rows_R[:-1]
    return same


def tie_keys(
    rows_R: np.ndarray, user_hashes: np.ndarray, item_hashes: np.ndarray, seed: int
) -> np.ndarray:
    """uint64[R], random numbers that are a function of the interaction itself, so that no order of
    the log counts."""
    key = mixed_key(seed, _TIE_STREAM)
    bits_R = keyed_bits(key, item_hashes[rows_R["item"]])
    bits_R = keyed_bits(key, bits_R ^ user_hashes[rows_R["user"]])
    return keyed_bits(key, bits_R ^ rows_R["time"].astype(np.uint64))


def id_hashes(names: Iterable[str]) -> np.ndarray:
    """uint64 of each id, the same on every machine."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8")


class Core:
    """The users and items that stay, and how many rows the others took along.

    First `count` and `drop` in turn, until `few_items` and `few_users` name nobody; then `settle`.
    Of several cores with the users of one log among them, and the same items, the items' counts are
    to be added up. Its arrays are never written into."""

    def __init__(self, buckets: Rows, cleaning: Cleaning) -> None:
        self.cleaning, self.cutoff = cleaning, cleaning.cutoff
        self.users_U = np.ones(buckets.num_users, bool)
        self.items_N = np.ones(buckets.num_items, bool)
        self.catalogue_N = self.items_N
        self.lengths_U = np.zeros(buckets.num_users, np.int64)
        self.short_U = np.zeros(buckets.num_users, bool)
        self.dropped: dict[str, int] = {}
        self.users_without_history = 0

    def count(self, buckets: Rows) -> np.ndarray:
        """int64[N], each item's rows that stay so far; `lengths_U` holds the users'."""
        self.lengths_U, counts_N = self._counts(buckets)
        return counts_N

    def few_items(self, counts_N: np.ndarray) -> np.ndarray:
        """bool[N], the items so far that have too few rows."""
        return self.items_N & (counts_N < self.cleaning.k_core)

    def few_users(self) -> np.ndarray:
        """bool[U], the users so far that have too few rows."""
        return self.users_U & (self.lengths_U < max(self.cleaning.k_core, self.cleaning.min_length))

    def drop(self, few_N: np.ndarray) -> None:
        """Leave out these items and all users with too few rows."""
        few_U = self.few_users()
        self.short_U = self.short_U | few_U & (self.lengths_U >= self.cleaning.k_core)
        self.users_U = self.users_U & ~few_U
        self.items_N = self.items_N & ~few_N

    def settle(self, buckets: Rows, counts_N: np.ndarray) -> None:
        """Nobody has too few rows any more: which items are left, and what became of the rows.
        `counts_N`: the last ones."""
        self.catalogue_N, self.lengths_U = self.items_N & (counts_N > 0), self.lengths_U.copy()
        self.dropped = self._dropped(buckets, self.short_U)
        if self.cutoff is not None:
            self.dropped |= self._dropped_held_out(buckets)

    def stay(self, rows_R: np.ndarray) -> np.ndarray:
        """bool[R]"""
        return self.users_U[rows_R["user"]] & self.catalogue_N[rows_R["item"]]

    def _training(self, rows_R: np.ndarray) -> np.ndarray:
        """The rows that decide who stays: all but the held-out ones of a split by time."""
        return rows_R if self.cutoff is None else rows_R[rows_R["time"] < self.cutoff.validation]

    def _counts(self, buckets: Rows) -> tuple[np.ndarray, np.ndarray]:
        """int64[U] and int64[N], rows that stay so far."""
        counts_U, counts_N = (
            np.zeros(len(self.users_U), np.int64),
            np.zeros(len(self.items_N), np.int64),
        )
        for rows_R in buckets:
            rows_R = self._training(rows_R)
            rows_R = rows_R[self.users_U[rows_R["user"]] & self.items_N[rows_R["item"]]]
            _count_users(rows_R, counts_U)
            counts_N += np.bincount(rows_R["item"], minlength=len(counts_N))
        return counts_U, counts_N

    def _dropped(self, buckets: Rows, short_U: np.ndarray) -> dict[str, int]:
        """A row whose item goes counts there, any other with its user."""
        of_items = of_short = of_users = 0
        for rows_R in buckets:
            rows_R = self._training(rows_R)
            by_item_R = ~self.items_N[rows_R["item"]]
            by_user_R = ~by_item_R & ~self.users_U[rows_R["user"]]
            short = int((by_user_R & short_U[rows_R["user"]]).sum())
            of_items += int(by_item_R.sum())
            of_short += short
            of_users += int(by_user_R.sum()) - short
        return {
            "items_below_k_core": of_items,
            "users_below_k_core": of_users,
            "users_below_min_length": of_short,
        }

    def _dropped_held_out(self, buckets: Rows) -> dict[str, int]:
        """A row of a user who goes counts with her, whatever its item: she is not asked. The rows
        that stay lengthen users."""
        assert self.cutoff is not None
        of_users = of_items = 0
        without_U = np.zeros(len(self.users_U), bool)
        for rows_R in buckets:
            rows_R = rows_R[rows_R["time"] >= self.cutoff.validation]
            by_user_R = ~self.users_U[rows_R["user"]]
            without_U[rows_R["user"][by_user_R]] = True
            stay_R = self.stay(rows_R)
            of_users += int(by_user_R.sum())
            of_items += int((~by_user_R & ~stay_R).sum())
            _count_users(rows_R[stay_R], self.lengths_U)
        self.users_without_history = int(without_U.sum())
        return {
            "rows_of_users_without_history": of_users,
            "rows_of_items_outside_the_catalogue": of_items,
        }


def _count_users(rows_R: np.ndarray, counts_U: np.ndarray) -> None:
    """Add the rows of a bucket, whose users are near each other."""
    if len(rows_R):
        first = rows_R["user"].min()
        counted = np.bincount(rows_R["user"] - first)
        counts_U[first : first + len(counted)] += counted


def _gathered(buckets: Buckets, core: Core, cutoff: Cutoff | None) -> tuple[Sequences, np.ndarray]:
    user_ids, rows_U = _rows_of(buckets.user_numbers, core.users_U)
    item_ids, rows_N = _rows_of(buckets.item_numbers, core.catalogue_N)
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    offsets[1:][rows_U[core.users_U]] = core.lengths_U[core.users_U]
    np.cumsum(offsets, out=offsets)
    items, timestamps = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.int64)
    for found in buckets:
        found = found[core.stay(found)]
        users, lengths = np.unique(found["user"], return_counts=True)
        places = flat_ranges(offsets[rows_U[users]], lengths)
        items[places] = rows_N[found["item"]]
        timestamps[places] = found["time"]
    periods = None if cutoff is None else cutoff.periods(timestamps, offsets)
    return Sequences(items, offsets, user_ids, item_ids, periods), timestamps


def _rows_of(numbers: Numbers, stay: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The ids that stay in order, and int32 by number: an id's row, -1 of one that goes."""
    staying = np.flatnonzero(stay)
    names = numbers.names(staying)
    ids = sort_ids(names)
    row_of = {name: row for row, name in enumerate(ids)}
    rows = np.full(len(numbers), -1, np.int32)
    rows[staying] = np.fromiter(map(row_of.__getitem__, names), np.int32, len(names))
    return ids, rows
