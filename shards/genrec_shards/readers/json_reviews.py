"""Reviews or interactions as one object per line, of which three fields are read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from genrec_shards.errors import DataError
from genrec_shards.readers.columns import COLUMNS, NAME_THEM, find_columns
from genrec_shards.readers.frames import LogReader, listed, polars
from genrec_shards.readers.python_literals import parsed_line
from genrec_shards.readers.text_blocks import Block, find_fault

if TYPE_CHECKING:
    import polars as pl

Fields = tuple[str, str, str]
"""Names of user, item and time."""
RELEASES: dict[str, tuple[Fields, ...]] = {
    "amazon": (
        # 2014, some lines in Python's spelling, and 2018: seconds.
        ("reviewerID", "asin", "unixReviewTime"),
        # 2023: milliseconds; variants of a product share its parent.
        ("user_id", "parent_asin", "timestamp"),
    ),
    "yelp": (("user_id", "business_id", "date"),),  # dates are taken as UTC
}
_PLAIN_ID = r"^[A-Za-z0-9_-]*[A-Z0-9_-][A-Za-z0-9_-]*$"


def read_reviews(
    path: str, found: Iterator[Block], reader: LogReader, fields: Fields | None = None
) -> Iterator[pl.DataFrame]:
    """Frames of a file's blocks; arguments as of `read_text`. `fields`: of the file's release,
    where earlier blocks told it; else the first object tells."""
    for block in found:
        fields = fields or release_of(block, reader)
        if fields is None and reader.format == "interactions":
            _check_names(path, block, reader)
        frame = None if fields is None else _fast_frame(block, fields, reader)
        if frame is None:
            frame = reader.frame_one_by_one(path, _rows(block, fields, reader.format))
        yield frame


def release_of(block: Block, reader: LogReader) -> Fields | None:
    """The fields of the block's first object that has those of a release, or of `interactions`
    those that are named or have usual names."""
    for _, record in _records(block):
        if isinstance(record, dict) and (fields := fields_of(record, reader)) is not None:
            return fields
    return None


def fields_of(record: dict[str, Any], reader: LogReader) -> Fields | None:
    """The names of an object's user, item and time; None where it lacks one."""
    if reader.format != "interactions":
        releases = RELEASES[reader.format]
        return next((fields for fields in releases if record.keys() >= set(fields)), None)
    names = list(record)
    places = find_columns(names, reader.columns)
    if None in places:
        return None
    user, item, time = (names[place] for place in places if place is not None)
    return user, item, time


def _check_names(path: str, block: Block, reader: LogReader) -> None:
    """Raises DataError where objects are there, and none of them has the three fields."""
    objects = ((line, found) for line, found in _records(block) if isinstance(found, dict))
    for line, record in objects:
        missing = find_columns(list(record), reader.columns).index(None)
        wanted = list(COLUMNS)[missing] if reader.columns is None else reader.columns[missing]
        found = listed(record, 8) or "nothing"
        raise DataError(f"{path}:{line}: no field of {wanted}, it has {found}: {NAME_THEM}")


def _fast_frame(block: Block, fields: Fields, reader: LogReader) -> pl.DataFrame | None:
    """All rows at once, or None where one of them is to be looked at."""
    pl = polars()
    lines = sum(1 for line in block.data.split(b"\n") if line.strip())
    user, item, time = fields
    for kind in (pl.Int64, pl.String):
        schema = {user: pl.String, item: pl.String, time: kind}
        try:
            found = pl.read_ndjson(io.BytesIO(block.data), schema=schema)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            continue
        if found.height != lines:
            return None
        # Polars spells lists, truth values and fractions as text too, and replaces half a
        # surrogate pair.
        plain = (found[name].str.contains(_PLAIN_ID) for name in (user, item))
        if all(column.null_count() == 0 and column.all() for column in plain):
            frame = reader.frame(found[user], found[item], found[time])
            if frame is not None:
                return frame
    return None


def _rows(
    block: Block, fields: Fields | None, format: str
) -> Iterator[tuple[int, tuple[Any, Any, Any] | str]]:
    """(line, values of the three fields or what is wrong). `fields`: None where no line so far is
    of any release."""
    for line, record in _records(block):
        if isinstance(record, str):
            yield line, record
        elif not isinstance(record, dict):
            yield line, f"no object in JSON, and --format {format} has one a line"
        elif fields is None or not record.keys() >= set(fields):
            wanted = " or ".join(
                ", ".join(names) for names in ([fields] if fields else RELEASES[format])
            )
            needed = f"fields {wanted} are needed, it has {listed(record, 8) or 'nothing'}"
            kind = "interaction" if format == "interactions" else "review"
            yield line, f"no {kind} of --format {format}: {needed}"
        else:
            yield line, (record[fields[0]], record[fields[1]], record[fields[2]])


def _records(block: Block) -> Iterator[tuple[int, Any]]:
    """(line, its object), a text that says what is wrong where its bytes are no text, None where
    it is no object; blank lines are left out."""
    for line, data in enumerate(block.data.split(b"\n"), start=block.first_line):
        if not data.strip():
            continue
        if (fault := find_fault(data)) is not None:
            yield line, fault[1]
            continue
        record = parsed_line(data.decode())
        yield line, record if isinstance(record, dict) else None
