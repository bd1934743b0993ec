"""What a reading task does: the readers of one machine on a part of the log, its rows dealt to
buckets by their user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from genrec_shards.cleaning.clean import Cleaning, between, id_hashes
from genrec_shards.errors import BadLines, DataError, OnError
from genrec_shards.ray_engine.log_spans import Span
from genrec_shards.ray_engine.sources import LogFile
from genrec_shards.readers.frames import polars
from genrec_shards.readers.json_reviews import (
    AMAZON_RELEASES,
    YELP_RELEASES,
    Fields,
    read_reviews,
    release_of,
)
from genrec_shards.readers.read_log import LogOptions
from genrec_shards.readers.tabular import head, is_parquet, read_parquet, read_text
from genrec_shards.readers.text_blocks import Block, unpacked, whole_lines
from genrec_shards.timestamps import Clock, TimeUnit

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
class Met:
    """What a task has to say of its part."""

    num_read: int
    num_within: int
    """Rows within the dates."""
    bad: int
    shown: tuple[str, ...]
    error: str | None
    """What ended the reading."""
    unit: TimeUnit
    """Of times, at the end."""


def read_spans(spans: list[Span], unit: TimeUnit, reading: Reading) -> tuple[Any, ...]:
    """What was met, and for each of P buckets its rows as an Arrow table in the log's order, or
    None.

    `unit`: of times, as the log before these spans has settled it. What is wrong with a file is
    told and not raised: an earlier task may have met something, and the first counts."""
    bad, clock = BadLines(reading.on_error), Clock(unit)
    parts: list[list[pl.DataFrame]] = [[] for _ in range(reading.num_buckets)]
    num_read = num_within = 0
    error = None
    try:
        for found in (found for span in spans for found in _frames(span, bad, clock, reading)):
            num_read += found.height
            found = between(found, reading.cleaning)
            num_within += found.height
            for bucket, rows in _dealt(found, reading.num_buckets):
                parts[bucket].append(rows)
    except DataError as stopped:
        error = str(stopped)
    met = Met(num_read, num_within, bad.count, tuple(bad.shown), error, clock.unit)
    return met, *(None if error else _joined(frames) for frames in parts)


def _joined(frames: list[pl.DataFrame]) -> Any:
    pl = polars()
    return (
        pl.concat(frames, rechunk=True).to_arrow(compat_level=pl.CompatLevel.oldest())
        if frames
        else None
    )


def _dealt(found: pl.DataFrame, num_buckets: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """(bucket, its rows): a function of the user's id alone, the same on every machine."""
    if not found.height:
        return
    encoded = found["user"].to_arrow().dictionary_encode()
    bucket_of_name = id_hashes(encoded.dictionary.to_pylist()) % np.uint64(num_buckets)
    bucket_of_row = bucket_of_name[encoded.indices.to_numpy()]
    order = np.argsort(bucket_of_row, kind="stable")
    used, starts = np.unique(bucket_of_row[order], return_index=True)
    for bucket, part in zip(used.tolist(), np.split(order, starts[1:]), strict=True):
        yield bucket, found[part]


def _frames(span: Span, bad: BadLines, clock: Clock, reading: Reading) -> Iterator[pl.DataFrame]:
    columns, place = reading.options.columns, span.file.place
    with span.file.open() as raw:
        if reading.format == "interactions" and is_parquet(span.file.name):
            yield from read_parquet(place, raw, bad, clock, columns, span.groups, span.line)
            return
        found = _blocks(span, raw, reading.block)
        if reading.format == "interactions":
            table = head(place, _first_block(span.file), columns)[0] if span.start else None
            yield from read_text(place, found, bad, clock, columns, table)
            return
        releases = AMAZON_RELEASES if reading.format == "amazon" else YELP_RELEASES
        fields = _release(span, reading.block, releases) if span.start else None
        yield from read_reviews(place, found, releases, reading.format, bad, clock, fields)
    if not span.file.size:
        raise DataError(f"{place}: empty: expected a review a line")


def _blocks(span: Span, raw: BinaryIO, size: int) -> Iterator[Block]:
    """The blocks that a reader of the whole file has there."""
    if span.end is None:
        return whole_lines(span.file.place, unpacked(span.file.place, raw))
    return whole_lines(
        span.file.place, _pieces(span, span.end, raw, size), span.line, start=not span.start
    )


def _pieces(span: Span, end: int, raw: BinaryIO, size: int) -> Iterator[bytes]:
    at, piece = span.start, span.piece
    raw.seek(at)
    while at < end:
        data = raw.read(min((piece + 1) * size, end) - at)
        if not data:
            raise DataError(
                f"{span.file.place}: became shorter while it was read: leave it alone meanwhile"
            )
        yield data
        at += len(data)
        piece = at // size


def _first_block(file: LogFile) -> Block:
    with file.open() as raw:
        return next(whole_lines(file.place, unpacked(file.place, raw)))


def _release(span: Span, size: int, releases: tuple[Fields, ...]) -> Fields | None:
    """The fields that the lines before the span have told."""
    before = Span(span.file, end=span.start)
    with span.file.open() as raw:
        found = (release_of(block, releases) for block in _blocks(before, raw, size))
        return next((fields for fields in found if fields is not None), None)
