"""From a log to sequences: duplicates, order and ties, k-core and shortest length; each row left
out is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from genrec_shards.cleaning.buckets import Buckets, Numbers
from genrec_shards.cleaning.left_out import Cleaned, left_out
from genrec_shards.errors import DataError
from genrec_shards.keyed_random import keyed_bits, mixed_key
from genrec_shards.sequences import Sequences, flat_ranges, sort_ids
from genrec_shards.splits import MINIMUM_LENGTH, Cutoff, Split

if TYPE_CHECKING:
    import polars as pl

# U users, N items, R rows of a bucket; users and items have numbers until the last step.

Ties = Literal["shuffle", "keep"]
_TIE_STREAM = 4


@dataclass(frozen=True)
class Cleaning:
    """What is left out, and in which order items of one time come."""

    k_core: int = 5
    """Each user and each item that stays has at least this many rows; 0 and 1 leave all."""
    min_length: int | None = None
    """Fewest items of a user, of a split by time in the training period; None: the fewest that the
    split allows, `shortest`."""
    ties: Ties = "shuffle"
    """Rows of one user and time: in an order drawn from seed, user, item and time, or as the log
    has them."""
    seed: int = 0
    since: int | None = None
    """Microseconds since 1970: rows before are left out before all else."""
    until: int | None = None
    """The same for rows after it."""
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
        if self.fewest < self.shortest:
            why = "training, validation, test" if self.cutoff is None else "in the training period"
            needed = f"at least {self.shortest} are needed ({why})"
            raise ValueError(f"min_length is {self.min_length}: {needed}")

    @property
    def shortest(self) -> int:
        """The least that `min_length` may be: an item to train on, and under leave-one-out one each
        to validate and test with."""
        return MINIMUM_LENGTH if self.cutoff is None else 1

    @property
    def fewest(self) -> int:
        """Fewest items of a user."""
        return self.shortest if self.min_length is None else self.min_length

    def cleaned(self, num_items: int, num_users: dict[str, int]) -> Cleaned:
        """These rules, with how many items and users they left out (`Core.dropped_users`)."""
        return Cleaned(self.k_core, self.fewest, items_below_k_core=num_items, **num_users)

    def within_dates(self, found: pl.DataFrame) -> pl.DataFrame:
        """The rows of a frame that are neither before `since` nor after `until`."""
        if self.since is not None:
            found = found.filter(found["time"] >= self.since)
        if self.until is not None:
            found = found.filter(found["time"] <= self.until)
        return found


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
    cleaned: Cleaned
    users_without_history: int = 0
    """Of a split by time, users with held-out rows who are not among those of the training period's
    core."""

    def check(self, cutoff: Cutoff | None, source: str) -> None:
        """Raises DataError where a split by time gives nobody a target in one of the periods."""
        assert self.sequences.num_interactions + sum(self.dropped.values()) == self.num_read
        for split in () if cutoff is None else get_args(Split):
            if not len(self.sequences.history_and_target(split).users):
                users = f"none of {self.sequences.num_users:,} users of the training period"
                remedy = f"give other dates than --cutoff {cutoff}"
                raise DataError(f"{source}: {users} has a row in the {split} period: {remedy}")


def clean(
    frames: Iterable[pl.DataFrame], cleaning: Cleaning, folder: Path, source: str
) -> CleanLog:
    """Sequences of a reader's frames.

    In this order: of equal rows (user, item and time) the first is kept; rows are sorted by user
    and time; then users with fewer than max(k_core, min_length) rows and items with fewer than
    k_core go, again and again until all have enough. Of a split by time only rows of the training
    period count, so that no held-out row decides on a user or an item; held-out rows of users and
    items that are not left then go too. Memory: a bucket of rows, what users and items take, and 12
    bytes for each row that stays.

    Args:
        frames: rows of the log.
        cleaning: what is left out.
        folder: an empty directory to work in.
        source: the log's name in messages.

    Raises:
        DataError: nothing is left.
        OSError: the disk is full.
    """
    buckets, num_read = Buckets(folder), 0
    for found in frames:
        num_read += found.height
        buckets.add(cleaning.within_dates(found))
    check_read(num_read, source)
    dropped = {"outside_dates": num_read - buckets.num_rows, "duplicates": 0}
    hashes = id_hashes(buckets.users), id_hashes(buckets.items)
    for bucket, rows_R in enumerate(buckets):
        kept_R = in_order(rows_R, hashes, cleaning)
        dropped["duplicates"] += len(rows_R) - len(kept_R)
        buckets.replace(bucket, kept_R)
    core = Core(len(buckets.users), len(buckets.items), cleaning)
    counts_N = first_counts_N = core.count(buckets)
    while True:
        few_N = core.few_items(counts_N)
        if not few_N.any() and not core.few_users().any():
            break
        core.drop(few_N)
        counts_N = core.count(buckets)
    core.settle(buckets, counts_N)
    dropped |= core.dropped
    num_items = int((~core.items_N & (first_counts_N > 0)).sum())
    cleaned = cleaning.cleaned(num_items, core.dropped_users)
    if not core.users_U.any():
        raise nobody_left(len(buckets.users), num_read, dropped, cleaning, cleaned, source)

    user_ids, rows_U = _rows_by_number(buckets.users, core.users_U)
    item_ids, rows_N = _rows_by_number(buckets.items, core.catalogue_N)
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    offsets[1:][rows_U[core.users_U]] = core.lengths_U[core.users_U]
    np.cumsum(offsets, out=offsets)
    items, timestamps = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.int64)
    for rows_R in buckets:
        rows_R = rows_R[core.stay(rows_R)]
        users, lengths = np.unique(rows_R["user"], return_counts=True)
        places = flat_ranges(offsets[rows_U[users]], lengths)
        items[places], timestamps[places] = rows_N[rows_R["item"]], rows_R["time"]
    cutoff = cleaning.cutoff
    periods = None if cutoff is None else cutoff.periods(timestamps, offsets)
    sequences = Sequences(items, offsets, user_ids, item_ids, periods)
    log = CleanLog(sequences, timestamps, num_read, dropped, cleaned, core.users_without_history)
    log.check(cutoff, source)
    return log


def _rows_by_number(numbers: Numbers, stay: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The ids that stay in order, and int32 by number: an id's row, -1 of one that goes."""
    staying = np.flatnonzero(stay)
    names = numbers.names(staying)
    ids = sort_ids(names)
    row_of = {name: row for row, name in enumerate(ids)}
    rows = np.full(len(numbers), -1, np.int32)
    rows[staying] = np.fromiter(map(row_of.__getitem__, names), np.int32, len(names))
    return ids, rows


def check_read(num_read: int, source: str) -> None:
    """Raises DataError for a log without a row."""
    if not num_read:
        raise DataError(f"{source}: empty: no interaction in it that can be read")


def nobody_left(
    num_users: int,
    num_read: int,
    dropped: dict[str, int],
    cleaning: Cleaning,
    cleaned: Cleaned,
    source: str,
) -> DataError:
    """What to raise where no user stays of so many."""
    remedy = f"lower --k-core {cleaning.k_core} or --min-length {cleaning.fewest}"
    if dropped.get("outside_dates") == num_read:
        remedy = "mend --since and --until"  # no number of rows would have been enough
    if cleaning.cutoff is not None:
        remedy += f", or give later dates than --cutoff {cleaning.cutoff}"
    reasons = left_out(dropped, asdict(cleaned))
    left = f"no user is left of {num_users:,} with {num_read:,} rows ({reasons})"
    return DataError(f"{source}: {left}: {remedy}")


# Order and duplicates


def in_order(rows_R: np.ndarray, hashes: Sequence[np.ndarray], cleaning: Cleaning) -> np.ndarray:
    """ROW, sorted by user, time and tie, without duplicates. `hashes`: `id_hashes` by the numbers
    of users and of items."""
    if cleaning.ties == "keep":
        kept_R = rows_R[first_of_equals(rows_R)]
        return kept_R[time_order(kept_R, hashes, cleaning)]
    kept_R = rows_R[time_order(rows_R, hashes, cleaning)]
    again_R = np.zeros(len(kept_R), bool)  # equal rows are neighbours
    again_R[1:] = kept_R[1:] == kept_R[:-1]
    return kept_R[~again_R]


def time_order(rows_R: np.ndarray, hashes: Sequence[np.ndarray], cleaning: Cleaning) -> np.ndarray:
    """int64[R], the places of rows in the order of user, time and tie.

    Shuffled ties have random keys that are a function of seed and interaction alone, so that the
    order of the log does not count.
    """
    if cleaning.ties == "keep":
        return np.lexsort((rows_R["time"], rows_R["user"]))
    key = mixed_key(cleaning.seed, _TIE_STREAM)
    bits_R = keyed_bits(key, hashes[1][rows_R["item"]])
    bits_R = keyed_bits(key, bits_R ^ hashes[0][rows_R["user"]])
    bits_R = keyed_bits(key, bits_R ^ rows_R["time"].astype(np.uint64))
    return np.lexsort((rows_R["item"], bits_R, rows_R["time"], rows_R["user"]))


def first_of_equals(rows_R: np.ndarray) -> np.ndarray:
    """bool[R], whether no row before it is the same."""
    order = np.lexsort((rows_R["item"], rows_R["time"], rows_R["user"]))  # stable
    first_R = np.ones(len(rows_R), bool)
    first_R[order[1:]] = rows_R[order[1:]] != rows_R[order[:-1]]
    return first_R


def id_hashes(names: Iterable[str]) -> np.ndarray:
    """uint64 of each id, the same on every machine."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8")


class Core:
    """The users and items that stay, and why the rows of the others go.

    First `count` and `drop` in turn, until `few_items` and `few_users` are empty; then `settle`. A
    log may have several cores, each with some of its users and all rows of these; the items' counts
    are then to be added up. Its arrays are never written into, so that they can be shared.

    Example, k_core 2: users a, b, c took x y, x y, z. First `count` is [2, 2, 1] (z has too few),
    `lengths_U` [2, 2, 1] (c has too few); after `drop` users_U is [1, 1, 0], items_N [1, 1, 0].
    """

    def __init__(self, num_users: int, num_items: int, cleaning: Cleaning) -> None:
        self.cleaning, self.cutoff = cleaning, cleaning.cutoff
        self.users_U = np.ones(num_users, bool)
        self.items_N = np.ones(num_items, bool)
        self.catalogue_N = self.items_N
        self.lengths_U = np.zeros(num_users, np.int64)
        self.short_U = np.zeros(num_users, bool)
        self.dropped: dict[str, int] = {}
        self.dropped_users: dict[str, int] = {}
        """Users who go with the rows in `dropped`, by reason."""
        self.users_without_history = 0

    def count(self, buckets: Iterable[np.ndarray]) -> np.ndarray:
        """int64[N], each item's rows that stay so far; `lengths_U` holds the users'."""
        self.lengths_U = np.zeros(len(self.users_U), np.int64)
        counts_N = np.zeros(len(self.items_N), np.int64)
        for rows_R in buckets:
            if self.cutoff is not None:
                rows_R = rows_R[rows_R["time"] < self.cutoff.validation]
            rows_R = rows_R[self.users_U[rows_R["user"]] & self.items_N[rows_R["item"]]]
            _count_users(rows_R, self.lengths_U)
            counts_N += np.bincount(rows_R["item"], minlength=len(counts_N))
        return counts_N

    def few_items(self, counts_N: np.ndarray) -> np.ndarray:
        """bool[N], the items so far that have too few rows."""
        return self.items_N & (counts_N < self.cleaning.k_core)

    def few_users(self) -> np.ndarray:
        """bool[U], the users so far that have too few rows."""
        return self.users_U & (self.lengths_U < max(self.cleaning.k_core, self.cleaning.fewest))

    def drop(self, few_N: np.ndarray) -> None:
        """Leave out these items and all users with too few rows."""
        few_U = self.few_users()
        self.short_U = self.short_U | few_U & (self.lengths_U >= self.cleaning.k_core)
        self.users_U = self.users_U & ~few_U
        self.items_N = self.items_N & ~few_N

    def settle(self, buckets: Iterable[np.ndarray], counts_N: np.ndarray) -> None:
        """Find the catalogue, the users' final lengths and the reason of each row that goes.

        A training row whose item goes counts there, any other with its user. A held-out row of a
        user who goes counts with them, whatever its item.

        Args:
            buckets: all rows.
            counts_N: what `count` gave last, when nobody had too few rows.
        """
        self.catalogue_N, self.lengths_U = self.items_N & (counts_N > 0), self.lengths_U.copy()
        dropped = dict.fromkeys(
            ("items_below_k_core", "users_below_k_core", "users_below_min_length"), 0
        )
        if self.cutoff is not None:
            dropped |= {"rows_of_users_without_history": 0}
            dropped |= {"rows_of_items_outside_the_catalogue": 0}
        without_U = np.zeros(len(self.users_U), bool)
        users = dict.fromkeys(("users_below_k_core", "users_below_min_length"), 0)
        for rows_R in buckets:
            if self.cutoff is not None:
                held_out_R = rows_R["time"] >= self.cutoff.validation
                later_R, rows_R = rows_R[held_out_R], rows_R[~held_out_R]
                by_user_R, stay_R = ~self.users_U[later_R["user"]], self.stay(later_R)
                without_U[later_R["user"][by_user_R]] = True
                dropped["rows_of_users_without_history"] += int(by_user_R.sum())
                by_item_R = ~by_user_R & ~stay_R
                dropped["rows_of_items_outside_the_catalogue"] += int(by_item_R.sum())
                _count_users(later_R[stay_R], self.lengths_U)
            by_item_R = ~self.items_N[rows_R["item"]]
            by_user_R = ~by_item_R & ~self.users_U[rows_R["user"]]
            short_R = by_user_R & self.short_U[rows_R["user"]]
            dropped["items_below_k_core"] += int(by_item_R.sum())
            for reason, gone_R in (
                ("users_below_k_core", by_user_R & ~short_R),
                ("users_below_min_length", short_R),
            ):
                dropped[reason] += int(gone_R.sum())
                # A user's rows are all in one bucket, so nobody is counted twice.
                users[reason] += len(np.unique(rows_R["user"][gone_R]))
        self.dropped, self.dropped_users = dropped, users
        self.users_without_history = int(without_U.sum())

    def stay(self, rows_R: np.ndarray) -> np.ndarray:
        """bool[R], whether user and item of a row are left."""
        return self.users_U[rows_R["user"]] & self.catalogue_N[rows_R["item"]]


def _count_users(rows_R: np.ndarray, counts_U: np.ndarray) -> None:
    """Add the rows of a bucket, whose users have numbers near each other."""
    if len(rows_R):
        first = rows_R["user"].min()
        counted = np.bincount(rows_R["user"] - first)
        counts_U[first : first + len(counted)] += counted
