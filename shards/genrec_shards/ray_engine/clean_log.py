"""A log on a cluster: read, shuffled by user, reduced to its core and put in order; one process
holds ids and counts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from genrec_shards.cleaning.buckets import ROW, Numbers, rows_of_frame
from genrec_shards.cleaning.clean import (
    Cleaning,
    CleanLog,
    Core,
    check_read,
    id_hashes,
    in_order,
    nobody_left,
)
from genrec_shards.dataset import Source, source_named
from genrec_shards.errors import NUM_SHOWN, BadLines, DataError
from genrec_shards.ray_engine.log_spans import Sizes, Span, plan_spans
from genrec_shards.ray_engine.read_tasks import Reading, SpanReport, read_spans
from genrec_shards.ray_engine.sources import LogFile, log_files_of
from genrec_shards.ray_engine.tasks import Tasks, connected
from genrec_shards.readers.frames import polars
from genrec_shards.readers.read_log import LogOptions
from genrec_shards.readers.recognise import file_read_as
from genrec_shards.sequences import Sequences, flat_ranges, sort_ids

# P buckets, U users of a bucket or of the log, N items of the log, R rows of a bucket.

SIZES = Sizes()
READING_AHEAD = 4
"""Reading tasks per core that are begun before the first of them has answered."""


def clean_on_ray(
    source: str | Path,
    format: str,
    bad: BadLines,
    cleaning: Cleaning,
    options: LogOptions,
    folder: Path,
    address: str | None,
) -> tuple[CleanLog, Source, str]:
    """What `clean`, `source_of` and `read_as` give, to the byte.

    This process holds each user and item once (id, row, count) and one range of users at a time;
    the sequences are in files under `folder`, 12 bytes per row, mapped and not read. A task holds
    1 / `Sizes.num_buckets` of the log, or one gzip.

    Args:
        source: path or address of the log.
        format: of the log.
        bad: takes lines that cannot be read.
        cleaning: what is left out.
        options: how the log is read.
        folder: an empty directory of this process to work in.
        address: of the cluster; None: one of our own.
    """
    options.reader(format, bad)  # raises where the options do not go with the format
    files = log_files_of(source, format)
    is_folder = [file.place for file in files] != [str(source)]
    named_path = is_folder and isinstance(source, Path)
    name = Path(source).resolve().name if named_path else str(source).rpartition("/")[2]
    with connected(address) as tasks:
        hashes = [tasks.start(_sha256, file) for file in files]
        num_buckets = SIZES.num_buckets(sum(file.size for file in files), tasks.num_cpus)
        reading = Reading(format, options, bad.on_error, cleaning, num_buckets, SIZES.block)
        spans = plan_spans(files, format == "interactions", SIZES, tasks)
        log = _clean(spans, reading, bad, folder, str(source), tasks)
        digests = [(file.name, tasks.get(one)) for file, one in zip(files, hashes, strict=True)]
        words = file_read_as(files[0].place, files[0].open, format, options.columns)
        return log, source_named(name, digests, is_folder), words


def _sha256(file: LogFile) -> str:
    with file.open() as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]


def _clean(
    spans: list[list[Span]],
    reading: Reading,
    bad: BadLines,
    folder: Path,
    source: str,
    tasks: Tasks,
) -> CleanLog:
    cleaning = reading.cleaning
    reports, parts_TP = _read(spans, reading, bad, tasks)
    num_read = sum(report.num_read for report in reports)
    check_read(num_read, source)
    buckets = [
        _Bucket(*tasks.start(_gathered, cleaning, *parts, parts=5))
        for parts in zip(*parts_TP, strict=True)
    ]
    del parts_TP
    counts = [tasks.get(bucket.counts) for bucket in buckets]
    dropped = {
        "outside_dates": num_read - sum(report.num_within for report in reports),
        "duplicates": sum(duplicates for _, duplicates in counts),
    }
    # The log's numbers of items, by each bucket's own.
    number_of: dict[str, int] = {}
    for bucket in buckets:
        names = tasks.get(bucket.item_ids).to_pylist()
        numbers = [number_of.setdefault(name, len(number_of)) for name in names]
        bucket.item_numbers = tasks.put(np.array(numbers, np.int64))
    counts_N, stay_N, num_few_items = _peel(buckets, len(number_of), cleaning, tasks)

    total = tasks.put(counts_N)
    settled = []
    for bucket in buckets:
        known = (bucket.rows, bucket.user_ids, bucket.item_numbers, bucket.core)
        bucket.core, found = tasks.start(_settled, *known, total, parts=2)
        settled.append(found)
    settled = [tasks.get(found) for found in settled]
    for reason in settled[0].dropped:
        dropped[reason] = sum(part.dropped[reason] for part in settled)
    users = {
        reason: sum(part.dropped_users[reason] for part in settled)
        for reason in settled[0].dropped_users
    }
    cleaned = cleaning.cleaned(num_few_items, users)
    if not any(part.user_ids for part in settled):
        num_users = sum(users for users, _ in counts)
        raise nobody_left(num_users, num_read, dropped, cleaning, cleaned, source)
    ordered = _in_order(buckets, settled, list(number_of), stay_N & (counts_N > 0), folder, tasks)
    items, timestamps, offsets, user_ids, item_ids = ordered
    cutoff = cleaning.cutoff
    periods = None if cutoff is None else cutoff.periods(timestamps, offsets)
    sequences = Sequences(items, offsets, user_ids, item_ids, periods)
    without = sum(part.users_without_history for part in settled)
    log = CleanLog(sequences, timestamps, num_read, dropped, cleaned, without)
    log.check(cutoff, source)
    return log


# Read


def _read(
    spans: Sequence[list[Span]], reading: Reading, bad: BadLines, tasks: Tasks
) -> tuple[list[SpanReport], list[list[Any]]]:
    """Reports, and references to the rows of each bucket, by task: what a reader from first to last
    would have found.

    Of numbers without a unit the first one of the log settles it. Every task begins as if it were
    the first; one that took its numbers for another unit than the log's is done again.

    At most `READING_AHEAD` tasks per core are begun before the first of them has answered. A bad
    line so ends the reading after those, and nothing has to be cancelled: in Ray 2.60 a task that
    is cancelled while it ends takes this process with it (ray-project/ray, pull request 54798).
    """
    unit, num_parts = reading.options.time_unit, reading.num_buckets + 1
    ahead = READING_AHEAD * tasks.num_cpus
    started: list[list[Any]] = []
    reports: list[SpanReport] = []
    for number, part in enumerate(spans):
        for later in spans[len(started) : number + ahead]:
            started.append(tasks.start(read_spans, later, unit, reading, parts=num_parts))
        report = tasks.get(started[number][0])
        if unit != "auto" and report.unit not in ("auto", unit):
            started[number] = tasks.start(read_spans, part, unit, reading, parts=num_parts)
            report = tasks.get(started[number][0])
        unit = report.unit if unit == "auto" else unit
        bad.count += report.bad
        bad.shown += report.shown[: NUM_SHOWN - len(bad.shown)]
        if report.error is not None:
            raise DataError(report.error)
        reports.append(report)
    return reports, [references[1:] for references in started]


@dataclass
class _Bucket:
    """References to what is known of the users of one bucket."""

    rows: Any
    """ROW[R] in order; users and items have numbers of the bucket's own."""
    user_ids: Any
    """Arrow array by number."""
    item_ids: Any
    core: Any
    counts: Any
    """(users, duplicates)"""
    item_numbers: Any = None
    """int64 by the bucket's number of an item: the log's number."""


def _gathered(cleaning: Cleaning, *parts: Any) -> tuple[np.ndarray, Any, Any, Core, Any]:
    """The fields of a `_Bucket`. `parts`: its rows from all reading tasks in the log's order."""
    pl = polars()
    users, items = Numbers(), Numbers()
    found = [rows_of_frame(pl.from_arrow(part), users, items) for part in parts if part is not None]
    rows_R = np.concatenate([np.zeros(0, ROW), *found])
    kept_R = in_order(rows_R, (id_hashes(users), id_hashes(items)), cleaning)
    user_ids, item_ids = (pa.array(list(ids), pa.large_string()) for ids in (users, items))
    core = Core(len(users), len(items), cleaning)
    return kept_R, user_ids, item_ids, core, (len(users), len(rows_R) - len(kept_R))


# Core


def _peel(
    buckets: list[_Bucket], num_items: int, cleaning: Cleaning, tasks: Tasks
) -> tuple[np.ndarray, np.ndarray, int]:
    """int64[N] the items' last counts, bool[N] which stay, and how many that had rows do not; of
    each round only counts are exchanged."""
    stay_N = np.ones(num_items, bool)
    first_counts_N: np.ndarray | None = None
    few: Any = None
    while True:
        rounds = []
        for bucket in buckets:
            known = (bucket.core, bucket.rows, bucket.item_numbers)
            bucket.core, *found = tasks.start(_round, *known, num_items, few, parts=3)
            rounds.append(found)
        counts_N, any_user = np.zeros(num_items, np.int64), False
        for counts, few_users in rounds:
            counts_N += tasks.get(counts)
            any_user |= tasks.get(few_users)
        first_counts_N = counts_N if first_counts_N is None else first_counts_N
        few_N = stay_N & (counts_N < cleaning.k_core)
        if not any_user and not few_N.any():
            return counts_N, stay_N, int((~stay_N & (first_counts_N > 0)).sum())
        stay_N &= ~few_N
        few = tasks.put(few_N)


def _round(
    core: Core,
    rows_R: np.ndarray,
    item_numbers: np.ndarray,
    num_items: int,
    few_N: np.ndarray | None,
) -> tuple[Core, np.ndarray, bool]:
    """The bucket's core without the items that were found to have too few rows (None: the first
    round), int64[N] the others' rows, and whether a user has too few."""
    if few_N is not None:
        core.drop(few_N[item_numbers])
    counts_N = np.zeros(num_items, np.int64)
    counts_N[item_numbers] = core.count([rows_R])
    return core, counts_N, bool(core.few_users().any())


@dataclass(frozen=True, eq=False)
class _Settled:
    """What is left of a bucket, its users in the order of their numbers."""

    user_ids: list[str]
    lengths_U: np.ndarray
    dropped: dict[str, int]
    dropped_users: dict[str, int]
    users_without_history: int


def _settled(
    rows_R: np.ndarray, user_ids: Any, item_numbers: np.ndarray, core: Core, counts_N: np.ndarray
) -> tuple[Core, _Settled]:
    core.settle([rows_R], counts_N[item_numbers])
    names = user_ids.filter(pa.array(core.users_U)).to_pylist()
    lengths_U = core.lengths_U[core.users_U]
    gone = core.dropped, core.dropped_users, core.users_without_history
    return core, _Settled(names, lengths_U, *gone)


# Order


def _in_order(
    buckets: list[_Bucket],
    settled: list[_Settled],
    names_N: list[str],
    catalogue_N: np.ndarray,
    folder: Path,
    tasks: Tasks,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], list[str]]:
    """Items, timestamps and offsets of all users, and the ids of users and items, by row.

    Each bucket deals its rows to ranges of users, as many as there are buckets, so that neither is
    large; the ranges' rows follow each other in the files.
    """
    item_ids = sort_ids(name for name, stays in zip(names_N, catalogue_N, strict=True) if stays)
    row_of = {name: row for row, name in enumerate(item_ids)}
    rows_N = np.fromiter((row_of.get(name, -1) for name in names_N), np.int32, len(names_N))
    item_rows = tasks.put(rows_N)
    user_ids = sort_ids(name for part in settled for name in part.user_ids)
    row_of = {name: row for row, name in enumerate(user_ids)}
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    borders = np.linspace(0, len(user_ids), len(buckets) + 1).astype(np.int64)
    dealt = []
    for bucket, part in zip(buckets, settled, strict=True):
        rows_U = np.fromiter(map(row_of.__getitem__, part.user_ids), np.int64, len(part.user_ids))
        offsets[1:][rows_U] = part.lengths_U
        known = (bucket.rows, bucket.item_numbers, bucket.core)
        dealt.append(tasks.start(_dealt, *known, rows_U, item_rows, borders, parts=len(buckets)))
    del row_of
    np.cumsum(offsets, out=offsets)
    # Of one part Ray gives a reference and not a list of one.
    dealt = dealt if len(buckets) > 1 else [[part] for part in dealt]
    ranges = [
        tasks.start(_joined, first, end, *parts)
        for first, end, *parts in zip(borders[:-1], borders[1:], *dealt, strict=True)
    ]
    with (folder / "items").open("wb") as items_file, (folder / "times").open("wb") as times_file:
        while ranges:  # which are let go as soon as they are written
            items_R, times_R = tasks.get(ranges.pop(0))
            items_file.write(items_R.astype("<i4", copy=False).data)
            times_file.write(times_R.astype("<i8", copy=False).data)
    items, times = (
        np.asarray(np.memmap(folder / name, kind, "r"))
        for name, kind in (("items", "<i4"), ("times", "<i8"))
    )
    return items, times, offsets, user_ids, item_ids


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
    at = np.searchsorted(users_R, borders).tolist()
    parts = []
    for start, end in pairwise(at):
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
