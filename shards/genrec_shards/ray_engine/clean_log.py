"""A log on a cluster: read, shuffled by user, peeled to its core and put in order; one process
holds ids and counts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from genrec_shards.cleaning.buckets import ROW, Numbers
from genrec_shards.cleaning.clean import (
    Cleaning,
    CleanLog,
    Core,
    check_read,
    check_targets,
    nobody_left,
    sort_buckets,
)
from genrec_shards.dataset import Source, source_named
from genrec_shards.errors import NUM_SHOWN, BadLines, DataError
from genrec_shards.ray_engine.log_spans import Sizes, planned
from genrec_shards.ray_engine.read_tasks import Met, Reading, read_spans
from genrec_shards.ray_engine.sources import LogFile
from genrec_shards.ray_engine.tasks import Tasks, cancel
from genrec_shards.readers.frames import polars
from genrec_shards.readers.read_log import LogOptions, clock_of
from genrec_shards.sequences import Sequences, flat_ranges, sort_ids

# P buckets, U users of a bucket or of the log, N items of the log, R rows of a bucket.


def clean_log(
    files: list[LogFile],
    format: str,
    bad: BadLines,
    cleaning: Cleaning,
    options: LogOptions,
    folder: Path,
    source: str,
    tasks: Tasks,
    sizes: Sizes,
) -> CleanLog:
    """What `clean` gives, to the byte. `folder`: an empty directory of this process to work in;
    `source`: as messages name it.

    This process holds each user and item once (id, row, count) and one range of users at a time;
    the sequences lie in files under `folder`, 12 bytes a row, mapped and not read. A task holds 1 /
    `Sizes.num_buckets` of the log, or one gzip."""
    clock = clock_of(format, options)
    total = sum(file.size for file in files)
    reading = Reading(
        format,
        options,
        bad.on_error,
        cleaning,
        sizes.num_buckets(total, tasks.num_cpus),
        sizes.block,
    )
    spans = planned(files, format == "interactions", sizes, tasks)
    met, parts_TP = _read(spans, clock.unit, reading, bad, tasks)
    num_read = sum(part.num_read for part in met)
    check_read(num_read, source)
    buckets = [_Bucket.of(parts_P, cleaning, tasks) for parts_P in zip(*parts_TP, strict=True)]
    del parts_TP
    dropped = {"outside_dates": num_read - sum(part.num_within for part in met), "duplicates": 0}
    for bucket in buckets:
        bucket.num_users, duplicates = tasks.get(bucket.facts)
        dropped["duplicates"] += duplicates
    item_ids = _number_items(buckets, tasks)
    counts_N, stay_N = _peel(buckets, len(item_ids), cleaning, tasks)
    settled = _settle(buckets, tasks.put(counts_N), tasks)
    for reason in settled[0].dropped:
        dropped[reason] = sum(part.dropped[reason] for part in settled)
    if not any(len(part.lengths_U) for part in settled):
        raise nobody_left(
            sum(bucket.num_users for bucket in buckets), num_read, dropped, cleaning, source
        )
    sequences, timestamps = _in_order(
        buckets, settled, item_ids, stay_N & (counts_N > 0), cleaning, folder, tasks
    )  # fmt: skip
    assert sequences.num_interactions + sum(dropped.values()) == num_read
    if cleaning.cutoff is not None:
        check_targets(sequences, cleaning.cutoff, source)
    return CleanLog(
        sequences, timestamps, num_read, dropped, sum(part.users_without_history for part in settled)
    )  # fmt: skip


def hashes_of(files: list[LogFile], tasks: Tasks) -> list[Any]:
    """References to each file's sha256, on their way; `source_from` takes them."""
    return [tasks.start(_sha256, file) for file in files]


def source_from(
    name: str, files: list[LogFile], is_folder: bool, hashes: list[Any], tasks: Tasks
) -> Source:
    """What `source_of` says of them."""
    return source_named(
        name,
        [(file.name, tasks.get(one)) for file, one in zip(files, hashes, strict=True)],
        is_folder,
    )


def _sha256(file: LogFile) -> str:
    with file.open() as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]


# Read


def _read(
    spans: Sequence[Any], unit: Any, reading: Reading, bad: BadLines, tasks: Tasks
) -> tuple[list[Met], list[list[Any]]]:
    """What was met, and references to the rows of each bucket, by task: what a reader from first to
    last would have met.

    Of numbers without a unit the first one of the log settles it. All tasks begin at once as if
    theirs were the first; one that took its numbers for another unit than the log's is done again.
    """
    started = [
        tasks.start(read_spans, part, unit, reading, parts=reading.num_buckets + 1)
        for part in spans
    ]
    found: list[Met] = []
    try:
        for number, part in enumerate(spans):
            met = tasks.get(started[number][0])
            if unit != "auto" and met.unit not in ("auto", unit):
                started[number] = tasks.start(
                    read_spans, part, unit, reading, parts=reading.num_buckets + 1
                )
                met = tasks.get(started[number][0])
            unit = met.unit if unit == "auto" else unit
            bad.count += met.bad
            bad.shown += met.shown[: NUM_SHOWN - len(bad.shown)]
            if met.error is not None:
                raise DataError(met.error)
            found.append(met)
    except BaseException:
        cancel(tasks, [references[0] for references in started])
        raise
    return found, [references[1:] for references in started]


# Shuffle


class _Held:
    """The rows of one bucket in memory, as `Rows` has them."""

    def __init__(self, rows: np.ndarray, users: Any, items: Any) -> None:
        self.rows, self.user_numbers, self.item_numbers = rows, users, items

    @property
    def num_users(self) -> int:
        return len(self.user_numbers)

    @property
    def num_items(self) -> int:
        return len(self.item_numbers)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.rows

    def replace(self, bucket: int, rows: np.ndarray) -> None:
        self.rows = rows


@dataclass
class _Bucket:
    """References to what is known of one bucket."""

    rows: Any
    """ROW[R] in order; users and items have numbers of the bucket's own."""
    user_ids: Any
    """Arrow array by number."""
    item_ids: Any
    facts: Any
    """Users and duplicates."""
    num_users: int = 0
    item_numbers: Any = None
    """int64 by the bucket's number of an item: the log's number."""
    core: Any = None

    @classmethod
    def of(cls, parts: Sequence[Any], cleaning: Cleaning, tasks: Tasks) -> _Bucket:
        return cls(*tasks.start(_gathered, cleaning, *parts, parts=4))


def _gathered(cleaning: Cleaning, *parts: Any) -> tuple[np.ndarray, Any, Any, tuple[int, int]]:
    """The fields of a `_Bucket`, of its rows from all tasks in the log's order; sorted, without
    duplicates."""
    pl = polars()
    users, items = Numbers(), Numbers()
    found = [np.zeros(0, ROW)]
    for part in parts:
        if part is not None:
            frame = pl.from_arrow(part)
            rows = np.empty(frame.height, ROW)
            rows["time"] = frame["time"].to_numpy()
            rows["user"], rows["item"] = users.of(frame["user"]), items.of(frame["item"])
            found.append(rows)
    held = _Held(np.concatenate(found), users, items)
    duplicates = sort_buckets(held, cleaning)
    names = [pa.array(list(numbers), pa.large_string()) for numbers in (users, items)]
    return held.rows, names[0], names[1], (held.num_users, duplicates)


def _number_items(buckets: list[_Bucket], tasks: Tasks) -> list[str]:
    """Give each bucket the log's numbers of its items; the ids by number."""
    number_of: dict[str, int] = {}
    for bucket in buckets:
        names = tasks.get(bucket.item_ids).to_pylist()
        numbers = [number_of.setdefault(name, len(number_of)) for name in names]
        bucket.item_numbers = tasks.put(np.array(numbers, np.int64))
    return list(number_of)


# Core


def _peel(
    buckets: list[_Bucket], num_items: int, cleaning: Cleaning, tasks: Tasks
) -> tuple[np.ndarray, np.ndarray]:
    """int64[N] the items' last counts and bool[N] which stay; of each round only counts are
    exchanged."""
    stay_N = np.ones(num_items, bool)
    few: Any = None
    while True:
        rounds = [
            tasks.start(
                _round, bucket.rows, bucket.num_users, bucket.item_numbers, num_items, bucket.core, few, cleaning, parts=3
            )
            for bucket in buckets
        ]  # fmt: skip
        counts_N, any_user = np.zeros(num_items, np.int64), False
        for bucket, (core, counts, few_users) in zip(buckets, rounds, strict=True):
            bucket.core = core
            counts_N += tasks.get(counts)
            any_user |= tasks.get(few_users)
        few_N = stay_N & (counts_N < cleaning.k_core)
        if not any_user and not few_N.any():
            return counts_N, stay_N
        stay_N &= ~few_N
        few = tasks.put(few_N)


def _round(
    rows_R: np.ndarray,
    num_users: int,
    item_numbers: np.ndarray,
    num_items: int,
    core: Core | None,
    few_N: np.ndarray | None,
    cleaning: Cleaning,
) -> tuple[Core, np.ndarray, bool]:
    """The bucket's core without the items that were found to have too few rows, int64[N] the
    others' rows, and whether a user has too few."""
    held = _Held(rows_R, range(num_users), range(len(item_numbers)))
    if core is None:
        core = Core(held, cleaning)
    else:
        assert few_N is not None
        core.drop(few_N[item_numbers])
    counts_N = np.zeros(num_items, np.int64)
    counts_N[item_numbers] = core.count(held)
    return core, counts_N, bool(core.few_users().any())


@dataclass(frozen=True, eq=False)
class _Settled:
    """What is left of a bucket, its users in the order of their numbers."""

    user_ids: list[str]
    lengths_U: np.ndarray
    dropped: dict[str, int]
    users_without_history: int


def _settle(buckets: list[_Bucket], counts: Any, tasks: Tasks) -> list[_Settled]:
    started = [
        tasks.start(
            _settled,
            bucket.rows,
            bucket.user_ids,
            bucket.item_numbers,
            bucket.core,
            counts,
            parts=2,
        )
        for bucket in buckets
    ]
    for bucket, (core, _) in zip(buckets, started, strict=True):
        bucket.core = core
    return [tasks.get(settled) for _, settled in started]


def _settled(
    rows_R: np.ndarray, user_ids: Any, item_numbers: np.ndarray, core: Core, counts_N: np.ndarray
) -> tuple[Core, _Settled]:
    core.settle(
        _Held(rows_R, range(len(user_ids)), range(len(item_numbers))), counts_N[item_numbers]
    )
    names = user_ids.filter(pa.array(core.users_U)).to_pylist()
    return core, _Settled(
        names, core.lengths_U[core.users_U], core.dropped, core.users_without_history
    )


# Order


def _in_order(
    buckets: list[_Bucket],
    settled: list[_Settled],
    names_N: list[str],
    catalogue_N: np.ndarray,
    cleaning: Cleaning,
    folder: Path,
    tasks: Tasks,
) -> tuple[Sequences, np.ndarray]:
    item_ids = sort_ids(
        name for name, stays in zip(names_N, catalogue_N.tolist(), strict=True) if stays
    )
    item_rows = tasks.put(_rows_of(item_ids, names_N))
    user_ids = sort_ids(name for part in settled for name in part.user_ids)
    row_of = {name: row for row, name in enumerate(user_ids)}
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    # As many ranges of users as there are buckets, so that neither is large.
    borders = np.linspace(0, len(user_ids), len(buckets) + 1).astype(np.int64)
    dealt = []
    for bucket, part in zip(buckets, settled, strict=True):
        rows_U = np.fromiter(map(row_of.__getitem__, part.user_ids), np.int64, len(part.user_ids))
        offsets[1:][rows_U] = part.lengths_U
        dealt.append(
            tasks.start(
                _dealt,
                bucket.rows,
                bucket.item_numbers,
                bucket.core,
                rows_U,
                item_rows,
                borders,
                parts=len(buckets),
            )
        )
    del row_of
    np.cumsum(offsets, out=offsets)
    # Of one part Ray gives a reference and not a list of one.
    dealt = dealt if len(buckets) > 1 else [[part] for part in dealt]
    ranges = [
        tasks.start(
            _joined, borders[number], borders[number + 1], *(parts[number] for parts in dealt)
        )
        for number in range(len(buckets))
    ]
    with (folder / "items").open("wb") as items_file, (folder / "times").open("wb") as times_file:
        for number in range(len(ranges)):
            items_R, times_R = tasks.get(ranges[number])
            ranges[number] = None
            items_file.write(items_R.astype("<i4", copy=False).data)
            times_file.write(times_R.astype("<i8", copy=False).data)
    items, timestamps = _mapped(folder / "items", "<i4"), _mapped(folder / "times", "<i8")
    periods = None if cleaning.cutoff is None else cleaning.cutoff.periods(timestamps, offsets)
    return Sequences(items, offsets, user_ids, item_ids, periods), timestamps


def _rows_of(ids: list[str], names: list[str]) -> np.ndarray:
    """int32 by number: an id's row, -1 of one that goes."""
    row_of = {name: row for row, name in enumerate(ids)}
    return np.fromiter((row_of.get(name, -1) for name in names), np.int32, len(names))


def _mapped(path: Path, kind: str) -> np.ndarray:
    return np.asarray(np.memmap(path, kind, "r"))


def _dealt(
    rows_R: np.ndarray,
    item_numbers: np.ndarray,
    core: Core,
    rows_U: np.ndarray,
    item_rows: np.ndarray,
    borders: np.ndarray,
) -> tuple[Any, ...] | Any:
    """The rows that stay, by range of users: rows of users, their lengths, items and times."""
    found = rows_R[core.stay(rows_R)]
    user_rows = np.full(len(core.users_U), -1, np.int64)
    user_rows[core.users_U] = rows_U
    users_R = user_rows[found["user"]]
    order = np.argsort(users_R, kind="stable")
    users_R, found = users_R[order], found[order]
    items_R = item_rows[item_numbers][found["item"]]
    at = np.searchsorted(users_R, borders)
    parts = []
    for start, end in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
        users, lengths = np.unique(users_R[start:end], return_counts=True)
        parts.append((users, lengths, items_R[start:end], found["time"][start:end].copy()))
    return tuple(parts) if len(parts) > 1 else parts[0]


def _joined(first: int, end: int, *parts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Items and times of the users first..end-1, from all buckets."""
    offsets = np.zeros(end - first + 1, np.int64)
    for users, lengths, _, _ in parts:
        offsets[1:][users - first] = lengths
    np.cumsum(offsets, out=offsets)
    items, times = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.int64)
    for users, lengths, items_R, times_R in parts:
        places = flat_ranges(offsets[users - first], lengths)
        items[places], times[places] = items_R, times_R
    return items, times
