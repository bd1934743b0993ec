"""New interactions beside a data directory: what it knows keeps its row, what is new gets the next
numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genrec_shards.cleaning.buckets import ROW
from genrec_shards.cleaning.clean import Ties, id_hashes, tie_keys
from genrec_shards.dataset import Dataset, Source, load_dataset, source_of
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.detect_format import LOG_FORMATS, Format
from genrec_shards.readers.read_log import LogOptions, read_log, source_files
from genrec_shards.sequences import Sequences, read_sequences
from genrec_shards.splits import LEAVE_ONE_OUT

if TYPE_CHECKING:
    import polars as pl

# R rows


@dataclass(frozen=True, eq=False)
class Incoming:
    """Rows that are to be appended, a user's in the order in which they are to come."""

    users_R: np.ndarray
    """int64: a known user's row, else a number behind these."""
    items_R: np.ndarray
    times_R: np.ndarray | None
    """int64, microseconds since 1970; None where the source has none."""
    user_ids: list[str]
    """Index = number; the known ones first."""
    item_ids: list[str]
    source: Source
    is_log: bool

    @property
    def num_rows(self) -> int:
        return len(self.users_R)

    def keep(self, kept_R: np.ndarray) -> Incoming:
        """The rows at these places, or where a mask says so."""
        times_R = None if self.times_R is None else self.times_R[kept_R]
        return replace(
            self, users_R=self.users_R[kept_R], items_R=self.items_R[kept_R], times_R=times_R
        )


def read_incoming(
    path: Path, format: Format, data: Dataset, bad: BadLines, log: LogOptions
) -> Incoming:
    """Read a source of any format but `auto`. Raises DataError, one line, as its reader does."""
    users = {id_: row for row, id_ in enumerate(data.sequences.user_ids)}
    items = {id_: row for row, id_ in enumerate(data.sequences.item_ids)}
    times_R: np.ndarray | None
    if format in LOG_FORMATS:
        rows = [_numbered(found, users, items) for found in read_log(path, format, bad, log)]
        users_R, items_R, times_R = (
            np.concatenate([np.zeros(0, np.int64), *(part[place] for part in rows)])
            for place in range(3)
        )
        origin = source_of(path, source_files(path, format))
        return Incoming(users_R, items_R, times_R, list(users), list(items), origin, is_log=True)
    if format == "sequences":
        found, times_R = read_sequences(path, bad, known=users), None
        origin = source_of(path, [path])
    else:
        other = load_dataset(path)
        if other.info.split != LEAVE_ONE_OUT:
            raise DataError(
                f"{path}: a split by time ({other.info.split}) cannot be appended: append its log"
            )
        found, times_R, origin = other.sequences, other.timestamps, other.info.source
    users_R, items_R = _rows_of(found, users, items)
    return Incoming(users_R, items_R, times_R, list(users), list(items), origin, is_log=False)


def in_order(new: Incoming, ties: Ties, seed: int) -> Incoming:
    """Sorted by user and time, rows of one user and time as `clean` has them; untouched where there
    are no times."""
    if new.times_R is None:
        return new
    if ties == "keep":
        return new.keep(np.lexsort((new.times_R, new.users_R)))
    rows_R = np.empty(new.num_rows, ROW)
    rows_R["user"], rows_R["item"], rows_R["time"] = new.users_R, new.items_R, new.times_R
    keys_R = tie_keys(rows_R, id_hashes(new.user_ids), id_hashes(new.item_ids), seed)
    return new.keep(np.lexsort((new.items_R, keys_R, new.times_R, new.users_R)))


def without_known(new: Incoming, data: Dataset) -> Incoming:
    """Without rows that equal an earlier one, or one of the data, in user, item and time; as it is
    where there are no times."""
    if new.times_R is None or data.timestamps is None:
        return (
            new
            if new.times_R is None
            else new.keep(_first_of_equals(new.users_R, new.items_R, new.times_R))
        )
    users = np.repeat(np.arange(data.sequences.num_users), data.sequences.lengths)
    asked = np.zeros(len(new.user_ids), bool)
    asked[new.users_R] = True
    there = asked[users]  # no others can meet
    kept = _first_of_equals(
        np.concatenate([users[there], new.users_R]),
        np.concatenate([data.sequences.items[there], new.items_R]),
        np.concatenate([data.timestamps[there], new.times_R]),
    )
    return new.keep(kept[-new.num_rows :] if new.num_rows else kept[:0])


def _first_of_equals(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """bool, whether no row before it is the same."""
    order = np.lexsort((items, times, users))  # stable: of equal rows the first comes first
    again = np.zeros(len(order), bool)
    again[1:] = np.logical_and.reduce(
        [column[order][1:] == column[order][:-1] for column in (users, items, times)]
    )
    first = np.empty(len(order), bool)
    first[order] = ~again
    return first


def check_not_there(new: Incoming, data: Dataset, place: str) -> None:
    """Without times nothing tells a repeat from a row that is there already: what looks like an old
    source is refused."""
    info = data.info
    known = [info.source.sha256, *(entry.source.sha256 for entry in info.appended or ())]
    if new.source.sha256 in known:
        raise DataError(
            f"{place}: {data.path} holds it already (the same sha256), and without times its rows cannot be told from new ones: "
            "give what is new alone"
        )
    stretches = list(_stretches(new, data.sequences.num_users))
    if not stretches:
        return
    sequences = data.sequences
    for what, same in (("end with", _ends_with), ("begin", _begins)):
        if all(
            same(sequences.items[sequences.offsets[u] : sequences.offsets[u + 1]], found)
            for u, found in stretches
        ):
            raise DataError(
                f"{place}: the items of all {len(stretches):,} known users in it {what} what {data.path} holds of them, and "
                "without times they cannot be told from new ones: give what is new alone"
            )


def _ends_with(held: np.ndarray, found: np.ndarray) -> bool:
    return len(found) <= len(held) and np.array_equal(held[len(held) - len(found) :], found)


def _begins(held: np.ndarray, found: np.ndarray) -> bool:
    return len(found) >= len(held) and np.array_equal(found[: len(held)], held)


def _stretches(new: Incoming, num_known: int) -> Iterable[tuple[int, np.ndarray]]:
    """(row, items) of each known user."""
    order = np.argsort(new.users_R, kind="stable")
    users, starts = np.unique(new.users_R[order], return_index=True)
    parts = np.split(new.items_R[order], starts[1:])
    return [
        (user, part) for user, part in zip(users.tolist(), parts, strict=True) if user < num_known
    ]


def _numbered(
    found: pl.DataFrame, users: dict[str, int], items: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        _numbers(found["user"].to_list(), users),
        _numbers(found["item"].to_list(), items),
        found["time"].to_numpy().astype(np.int64),
    )


def _rows_of(
    found: Sequences, users: dict[str, int], items: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    user_numbers, item_numbers = _numbers(found.user_ids, users), _numbers(found.item_ids, items)
    return np.repeat(user_numbers, found.lengths), item_numbers[found.items]


def _numbers(ids: list[str], known: dict[str, int]) -> np.ndarray:
    """int64, the number of each id; new ones get the next numbers."""
    number: Callable[[str], int] = lambda id_: known.setdefault(id_, len(known))  # noqa: E731
    return np.fromiter(map(number, ids), np.int64, len(ids))
