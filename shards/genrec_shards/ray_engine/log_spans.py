"""Which part of a log one task reads: cut where a reader of the whole log begins a block anew, line
numbers known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.ray_engine.sources import LogFile
from genrec_shards.ray_engine.tasks import Tasks
from genrec_shards.readers.tabular import LONGEST_JOINED, is_parquet
from genrec_shards.readers.text_blocks import (
    BLOCK_BYTES,
    BYTE_ORDER_MARK,
    LONGEST_LINE,
    is_packed,
)

# C pieces of a text file


@dataclass(frozen=True)
class Sizes:
    """How the work is cut; the result does not depend on it."""

    block: int = BLOCK_BYTES
    span: int = 32 << 20
    """Bytes of a log that a task reads, about, where `most` allows it."""
    bucket: int = 64 << 20
    """Bytes of a log whose users make a bucket, about, where `most` allows it."""
    most: int = 256
    """Reading tasks, and buckets: each reading task gives each bucket its own rows."""

    def num_buckets(self, total: int, num_cpus: int) -> int:
        return max(1, min(max(total // self.bucket, num_cpus), self.most))

    def bytes_per_task(self, total: int, num_cpus: int) -> int:
        return max(total // self.most, min(self.span, total // (2 * num_cpus)), self.block)


@dataclass(frozen=True)
class Span:
    """A part of a file, or all of it."""

    file: LogFile
    start: int = 0
    """Bytes before it; a line begins there."""
    end: int | None = None
    """Of a text that is cut: the byte after its last line."""
    piece: int = 0
    """Number of the piece of the file, of `Sizes.block` bytes, that its first block ends in."""
    line: int = 1
    """Number of its first line; of Parquet, of its first row."""
    groups: tuple[int, ...] | None = None
    """Row groups of Parquet; None: all."""

    @property
    def size(self) -> int:
        return (self.file.size if self.end is None else self.end) - self.start


def plan_spans(
    files: list[LogFile], is_table: bool, sizes: Sizes, tasks: Tasks
) -> list[list[Span]]:
    """The spans of each task, in the log's order. A gzip or zip cannot be entered half-way, so it
    is one span. `is_table`: whether cells may be quoted and files may be Parquet."""
    target = sizes.bytes_per_task(sum(file.size for file in files), tasks.num_cpus)
    found: list[list[Span]] = []
    held = 0
    for file in files:
        for span in _spans(file, is_table, target, sizes.block, tasks):
            if not found or held + span.size > target:
                found.append([])
                held = 0
            found[-1].append(span)
            held += span.size
    return found


def _spans(file: LogFile, is_table: bool, target: int, block: int, tasks: Tasks) -> list[Span]:
    """The file in spans of about `target` bytes."""
    if file.size <= target:
        return [Span(file)]
    if is_table and is_parquet(file.name):
        return _spans_of_groups(file, target, tasks)
    with file.open() as raw:
        beginning = raw.read(4)
    if is_packed(beginning):
        return [Span(file)]
    num_pieces, each = -(-file.size // block), max(target // block, 1)
    surveys = [
        tasks.start(survey, file, first, min(first + each, num_pieces), block)
        for first in range(0, num_pieces, each)
    ]
    found_C4 = np.concatenate([tasks.get(part) for part in surveys])
    first_byte = len(BYTE_ORDER_MARK) if beginning.startswith(BYTE_ORDER_MARK) else 0
    spans = [Span(file)]
    for start, piece, line in cuts(found_C4, block, is_table, first_byte):
        if start - spans[-1].start >= target and start < file.size:
            spans[-1] = replace(spans[-1], end=start)
            spans.append(Span(file, start, file.size, piece, line))
    return spans


def _spans_of_groups(file: LogFile, target: int, tasks: Tasks) -> list[Span]:
    """Spans of whole row groups; one of a file that is no Parquet, whose reader says so."""
    spans: list[Span] = []
    groups: list[int] = []
    first, rows, held = 1, 0, 0
    found = tasks.get(tasks.start(row_groups, file))
    for group, (num_rows, size) in enumerate(found):
        groups.append(group)
        rows += num_rows
        held += size
        if held >= target or group == len(found) - 1:
            spans.append(Span(file, line=first, groups=tuple(groups)))
            first, groups, rows, held = first + rows, [], 0, 0
    return spans or [Span(file)]


def row_groups(file: LogFile) -> list[tuple[int, int]]:
    """(rows, bytes) of each row group; none of a file that cannot be opened as Parquet."""
    try:
        with file.open() as raw, pq.ParquetFile(raw) as table:
            data = table.metadata
            groups = [data.row_group(number) for number in range(data.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in groups]
    except (pa.ArrowException, OSError):
        return []


def survey(file: LogFile, first: int, end: int, size: int) -> np.ndarray:
    """int64[C, 4] of the pieces first..end-1: line ends, bytes through the last of them, quotes
    through it and after it."""
    found = np.zeros((end - first, 4), np.int64)
    with file.open() as raw:
        raw.seek(first * size)
        for row in found:
            data = raw.read(size)
            through = data.rfind(b"\n") + 1
            quotes = data.count(b'"', 0, through), data.count(b'"', through)
            row[:] = data.count(b"\n"), through, *quotes
    return found


def cuts(
    found_C4: np.ndarray, size: int, quoted: bool, start: int = 0
) -> Iterator[tuple[int, int, int]]:
    """(byte, piece, line) where `whole_lines`, and of quoted text `with_whole_cells`, begins anew.

    None come after a line that is too long: there the reader stops.

    Example, pieces of 4 bytes: `a"\\nb`, `c"\\nd`, `e\\n`. A reader of lines begins anew at bytes
    3, 7 and 10, lines 2, 3 and 4; one of quoted text not at 3, where a quote is open.

    Args:
        found_C4: of all pieces, as `survey` gives it.
        size: bytes of a piece.
        quoted: whether cells may be quoted.
        start: the first line's byte.
    """
    line, begin, last = 1, start, start
    quotes = waiting = 0
    for piece, (ends, through, quotes_through, quotes_after) in enumerate(found_C4.tolist()):
        if not ends:
            waiting += quotes_after
            if (piece + 1) * size - last > LONGEST_LINE:
                return
            continue
        line += ends
        last = piece * size + through
        quotes += waiting + quotes_through
        waiting = quotes_after
        if not quoted or quotes % 2 == 0 or last - begin >= LONGEST_JOINED:
            quotes, begin = 0, last
            yield last, piece + 1, line
