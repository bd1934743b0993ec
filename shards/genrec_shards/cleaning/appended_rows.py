"""New interactions beside a data directory: what it knows keeps its row, what is new gets the next
numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from genrec_shards.cleaning.buckets import ROW, places_by_key
from genrec_shards.cleaning.clean import Cleaning, first_of_equals, id_hashes, time_order
from genrec_shards.dataset import Dataset, Source, load_dataset, source_of
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.read_log import LOG_FORMATS, Format, LogOptions, read_log, source_files
from genrec_shards.readers.recognise import read_as
from genrec_shards.sequences import read_sequences
from genrec_shards.splits import LEAVE_ONE_OUT

# R rows


@dataclass(frozen=True, eq=False)
class Incoming:
    """Rows that are to be appended, a user's in the order in which they are to come."""

    rows_R: np.ndarray
    """ROW; users and items that the data has are numbered by their rows, others after these."""
    has_times: bool
    """Whether the source has times; if not, those of `rows_R` mean nothing."""
    user_ids: list[str]
    """Index = number."""
    item_ids: list[str]
    source: Source
    read_as: str
    """What the source was recognised as, in words."""
    is_log: bool

    def keep(self, kept_R: np.ndarray) -> Incoming:
        """The rows at these places, or where a mask says so."""
        return replace(self, rows_R=self.rows_R[kept_R])


def read_incoming(
    path: Path, format: Format, data: Dataset, bad: BadLines, log: LogOptions
) -> Incoming:
    """Read a source of any format but `auto`. Raises DataError, one line, as its reader does."""
    users = {id_: row for row, id_ in enumerate(data.sequences.user_ids)}
    items = {id_: row for row, id_ in enumerate(data.sequences.item_ids)}
    rows, has_times = [np.zeros(0, ROW)], True
    if format in LOG_FORMATS:
        for frame in read_log(path, format, bad, log):
            user_R, item_R = (
                _numbers(frame[name].to_list(), known)
                for name, known in (("user", users), ("item", items))
            )
            rows.append(_rows(user_R, item_R, frame["time"].to_numpy()))
        source = source_of(path, source_files(path, format))
        words = read_as(path, format, log.columns)
    else:
        if format == "sequences":
            found, times_R = read_sequences(path, bad, known=users), None
            source = source_of(path, [path])
            words = read_as(path, format)
        else:
            words = "a data directory"
            other = load_dataset(path)
            if other.info.split != LEAVE_ONE_OUT:
                split = f"a split by time ({other.info.split})"
                raise DataError(f"{path}: {split} cannot be appended: append its log")
            found, times_R, source = other.sequences, other.timestamps, other.info.source
        has_times = times_R is not None
        user_R = np.repeat(_numbers(found.user_ids, users), found.lengths)
        item_R = _numbers(found.item_ids, items)[found.items]
        rows.append(_rows(user_R, item_R, np.zeros(len(user_R)) if times_R is None else times_R))
    is_log = format in LOG_FORMATS
    return Incoming(
        np.concatenate(rows), has_times, list(users), list(items), source, words, is_log
    )


def _numbers(ids: Sequence[str], known: dict[str, int]) -> np.ndarray:
    """int64, the number of each id; new ones get the next numbers."""
    return np.fromiter((known.setdefault(id_, len(known)) for id_ in ids), np.int64, len(ids))


def _rows(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    rows_R = np.empty(len(users), ROW)
    rows_R["user"], rows_R["item"], rows_R["time"] = users, items, times
    return rows_R


def without_known(new: Incoming, data: Dataset) -> Incoming:
    """Without rows that equal an earlier one, or one of the data, in user, item and time; as it is
    where there are no times."""
    if not new.has_times:
        return new
    old_R = np.zeros(0, ROW)
    if data.timestamps is not None:
        users = np.repeat(np.arange(data.sequences.num_users), data.sequences.lengths)
        comes_again = np.zeros(len(new.user_ids), bool)
        comes_again[new.rows_R["user"]] = True
        kept = comes_again[users]  # rows of other users equal none
        old_R = _rows(users[kept], data.sequences.items[kept], data.timestamps[kept])
    return new.keep(first_of_equals(np.concatenate([old_R, new.rows_R]))[len(old_R) :])


def in_time_order(new: Incoming, cleaning: Cleaning) -> Incoming:
    """Sorted by user and time, rows of one user and time as `clean` has them; as it is where there
    are no times."""
    if not new.has_times:
        return new
    shuffled = cleaning.ties == "shuffle"
    hashes = [id_hashes(ids) for ids in (new.user_ids, new.item_ids)] if shuffled else []
    return new.keep(time_order(new.rows_R, hashes, cleaning))


def check_not_there(new: Incoming, data: Dataset, place: str) -> None:
    """Raises DataError for what looks like an old source: without times nothing tells a repeat from
    a row that is there already."""
    info, sequences, alone = data.info, data.sequences, "give what is new alone"
    known = [info.source.sha256, *(entry.source.sha256 for entry in info.appended or ())]
    if new.source.sha256 in known:
        cannot = "without times its rows cannot be told from new ones"
        raise DataError(
            f"{place}: {data.path} holds it already (the same sha256), and {cannot}: {alone}"
        )
    pairs = [
        (sequences.items[slice(*sequences.offsets[user : user + 2])], new.rows_R["item"][places])
        for user, places in places_by_key(new.rows_R["user"])
        if user < sequences.num_users
    ]
    ends = all(np.array_equal(old[max(len(old) - len(add), 0) :], add) for old, add in pairs)
    begins = all(np.array_equal(add[: len(old)], old) for old, add in pairs)
    if pairs and (ends or begins):
        users = f"the items of all {len(pairs):,} known users in it"
        what = f"{'end with' if ends else 'begin'} what {data.path} holds of them"
        cannot = "without times they cannot be told from new ones"
        raise DataError(f"{place}: {users} {what}, and {cannot}: {alone}")
