"""Which part of a log one task reads: cut where a reader of the whole log begins a block anew, line
numbers known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.ray_engine.sources import LogFile
from genrec_shards.ray_engine.tasks import Tasks
from genrec_shards.readers.tabular import LONGEST_JOINED, is_parquet
from genrec_shards.readers.text_blocks import BLOCK_BYTES, LONGEST_LINE
from genrec_shards.sequences import BYTE_ORDER_MARK, GZIP_MAGIC

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

    def bytes_a_task(self, total: int, num_cpus: int) -> int:
        return max(total // self.most, min(self.span, total // (2 * num_cpus)), self.block)


@dataclass(frozen=True)
class Span:
    """A part of a file, or all of it."""

    file: LogFile
    start: int = 0
    """Bytes before it; a line begins there."""
    end: int | None = None
    """Of a text that is cut: the byte behind its last line."""
    piece: int = 0
    """Number of the piece of the file, of `Sizes.block` bytes, that its first block ends in."""
    line: int = 1
    """Number of its first line; of Parquet, of its first row."""
    groups: tuple[int, ...] | None = None
    """Row groups of Parquet; None: all."""

    @property
    def size(self) -> int:
        return (self.file.size if self.end is None else self.end) - self.start


def planned(files: list[LogFile], is_table: bool, sizes: Sizes, tasks: Tasks) -> list[list[Span]]:
    """The spans of each task, in the log's order. `is_table`: may cells be quoted, or files be
    Parquet?

    A gzip cannot be entered half-way, so it is one span.
    """
    total = sum(file.size for file in files)
    target = sizes.bytes_a_task(total, tasks.num_cpus)
    spans = [span for file in files for span in _spans(file, is_table, target, sizes, tasks)]
    found: list[list[Span]] = []
    held = 0
    for span in spans:
        if not found or held + span.size > target:
            found.append([])
            held = 0
        found[-1].append(span)
        held += span.size
    return found


def _spans(file: LogFile, is_table: bool, target: int, sizes: Sizes, tasks: Tasks) -> list[Span]:
    if file.size <= target:
        return [Span(file)]
    if is_table and is_parquet(file.name):
        return _groups(file, target, tasks)
    with file.open() as raw:
        beginning = raw.read(len(BYTE_ORDER_MARK))
    if beginning.startswith(GZIP_MAGIC):
        return [Span(file)]
    marked = len(BYTE_ORDER_MARK) if beginning == BYTE_ORDER_MARK else 0
    num_pieces = -(-file.size // sizes.block)
    each = max(target // sizes.block, 1)
    surveys = [
        tasks.start(survey, file, first, min(first + each, num_pieces), sizes.block)
        for first in range(0, num_pieces, each)
    ]
    found_C4 = np.concatenate([tasks.get(part) for part in surveys])
    spans = [Span(file)]
    for cut in cuts(found_C4, sizes.block, is_table, marked):
        if cut[0] - spans[-1].start >= target and cut[0] < file.size:
            first = spans.pop()
            spans += [
                Span(file, first.start, cut[0], first.piece, first.line),
                Span(file, cut[0], file.size, cut[1], cut[2]),
            ]
    return spans


def _groups(file: LogFile, target: int, tasks: Tasks) -> list[Span]:
    """Spans of whole row groups; of a file that is none, one, whose reader says so."""
    found = tasks.get(tasks.start(row_groups, file))
    if not found:
        return [Span(file)]
    spans: list[Span] = []
    groups: list[int] = []
    first, rows, held = 1, 0, 0
    for group, (num_rows, size) in enumerate(found):
        groups.append(group)
        rows += num_rows
        held += size
        if held >= target or group == len(found) - 1:
            spans.append(Span(file, line=first, groups=tuple(groups)))
            first, groups, rows, held = first + rows, [], 0, 0
    return spans


def row_groups(file: LogFile) -> list[tuple[int, int]]:
    """(rows, bytes) of each row group; none of a file that cannot be opened as Parquet."""
    try:
        with file.open() as raw, pq.ParquetFile(raw) as table:
            groups = [
                table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)
            ]
            return [(group.num_rows, group.total_byte_size) for group in groups]
    except (pa.ArrowException, OSError):
        return []


def survey(file: LogFile, first: int, end: int, size: int) -> np.ndarray:
    """int64[C, 4] of the pieces first..end-1: line ends, bytes through the last of them, quotes
    through it and behind it."""
    found = np.zeros((end - first, 4), np.int64)
    with file.open() as raw:
        raw.seek(first * size)
        for row in found:
            data = raw.read(size)
            through = data.rfind(b"\n") + 1
            row[:] = (
                data.count(b"\n"),
                through,
                data.count(b'"', 0, through),
                data.count(b'"', through),
            )
    return found


def cuts(
    found_C4: np.ndarray, size: int, quoted: bool, start: int = 0
) -> Iterator[tuple[int, int, int]]:
    """(byte, piece, line) where `whole_lines`, and of quoted text `with_whole_cells`, begins anew.
    `start`: the first line's byte.

    None come behind a line that is too long: there the reader stops.
    """
    line, begin, last = 1, start, start
    quotes = behind = 0
    for piece, (ends, through, quotes_through, quotes_behind) in enumerate(found_C4.tolist()):
        if not ends:
            behind += quotes_behind
            if (piece + 1) * size - last > LONGEST_LINE:
                return
            continue
        line += ends
        last = piece * size + through
        quotes += behind + quotes_through
        behind = quotes_behind
        if not quoted or quotes % 2 == 0 or last - begin >= LONGEST_JOINED:
            quotes, begin = 0, last
            yield last, piece + 1, line
