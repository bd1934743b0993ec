"""What a reading task does: the readers of one machine on a part of the log, its rows dealt to
buckets by their user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from genrec_shards.cleaning.buckets import places_by_key
from genrec_shards.cleaning.clean import Cleaning, id_hashes
from genrec_shards.errors import BadLines, DataError, OnError
from genrec_shards.ray_engine.log_spans import Span
from genrec_shards.readers.frames import LogReader, polars
from genrec_shards.readers.json_reviews import read_reviews, release_of
from genrec_shards.readers.read_log import LogOptions, first_blocks, holds_objects
from genrec_shards.readers.tabular import is_parquet, read_header, read_parquet, read_text
from genrec_shards.readers.text_blocks import Block, unpacked, whole_lines
from genrec_shards.timestamps import TimeUnit

if TYPE_CHECKING:
    import polars as pl

# P buckets


@dataclass(frozen=True)
class Reading:
    """How the whole log is read."""

    format: str
    options: LogOptions
    on_error: OnError
    cleaning: Cleaning
    num_buckets: int
    block: int
    """Bytes, as `Sizes.block`."""


@dataclass(frozen=True)
class SpanReport:
    """What a task has found in its part."""

    num_read: int
    num_within: int
    """Rows within the dates."""
    bad: int
    shown: list[str]
    error: str | None
    """What ended the reading."""
    unit: TimeUnit
    """Of times, at the end."""


def read_spans(spans: list[Span], unit: TimeUnit, reading: Reading) -> tuple[Any, ...]:
    """A report, and for each of P buckets its rows as an Arrow table in the log's order, or None.

    What is wrong with a file is reported and not raised: an earlier task may have found something,
    and the first counts. `unit`: of times, as the log before these spans has settled it.
    """
    bad = BadLines(reading.on_error)
    reader = LogOptions(reading.options.columns, unit).reader(reading.format, bad)
    parts: list[list[pl.DataFrame]] = [[] for _ in range(reading.num_buckets)]
    num_read = num_within = 0
    error = None
    try:
        for frame in (frame for span in spans for frame in _frames(span, reader, reading.block)):
            num_read += frame.height
            frame = reading.cleaning.within_dates(frame)
            num_within += frame.height
            if frame.height:
                # The bucket is a function of the user's id alone, the same on every machine.
                encoded = frame["user"].to_arrow().dictionary_encode()
                hashes = id_hashes(encoded.dictionary.to_pylist())
                buckets = (hashes % np.uint64(reading.num_buckets))[encoded.indices.to_numpy()]
                for bucket, places in places_by_key(buckets):
                    parts[bucket].append(frame[places])
    except DataError as stopped:
        error = str(stopped)
    report = SpanReport(num_read, num_within, bad.count, bad.shown, error, reader.clock.unit)
    concat, oldest = polars().concat, polars().CompatLevel.oldest()
    tables = (
        concat(frames, rechunk=True).to_arrow(compat_level=oldest) if frames and not error else None
        for frames in parts
    )
    return report, *tables


def _frames(span: Span, reader: LogReader, block: int) -> Iterator[pl.DataFrame]:
    """As `read_log` yields them of the whole file, those of the span."""
    file = span.file
    is_table = reader.format == "interactions"
    with file.open() as raw:
        if is_table and is_parquet(file.name):
            yield from read_parquet(file.place, raw, reader, span.groups, span.line)
            return
        found = _blocks(span, raw, block)
        if is_table and span.start:
            with file.open() as again:
                first = first_blocks(whole_lines(file.place, unpacked(file.place, again)))
        elif is_table:
            first = first_blocks(found)
            found = chain(first, found)
        if is_table and not holds_objects(first):
            header = read_header(file.place, first[0], reader.columns)[0] if span.start else None
            yield from read_text(file.place, found, reader, header)
            return
        fields = None
        if span.start:  # the lines before the span tell the release
            with file.open() as again:
                before = _blocks(Span(file, end=span.start), again, block)
                releases = (release_of(part, reader) for part in before)
                fields = next((fields for fields in releases if fields is not None), None)
        yield from read_reviews(file.place, found, reader, fields)
        if not file.size and not is_table:
            raise DataError(f"{file.place}: empty: expected a review a line")


def _blocks(span: Span, raw: BinaryIO, size: int) -> Iterator[Block]:
    """The blocks that a reader of the whole file has there."""
    place = span.file.place
    if span.end is None:
        return whole_lines(place, unpacked(place, raw))
    return whole_lines(place, _pieces(span, span.end, raw, size), span.line, start=not span.start)


def _pieces(span: Span, end: int, raw: BinaryIO, size: int) -> Iterator[bytes]:
    at, piece = span.start, span.piece
    raw.seek(at)
    while at < end:
        data = raw.read(min((piece + 1) * size, end) - at)
        if not data:
            shorter = "became shorter while it was read: leave it alone meanwhile"
            raise DataError(f"{span.file.place}: {shorter}")
        yield data
        at += len(data)
        piece = at // size
