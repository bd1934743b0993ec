"""Amazon's reviews as released in 2014, 2018 and 2023."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from genrec_shards.bad_lines import BadLines
from genrec_shards.readers.json_lines import Fields, read_json_lines
from genrec_shards.readers.times import Clock

if TYPE_CHECKING:
    import polars as pl

RELEASES: tuple[Fields, ...] = (
    ("reviewerID", "asin", "unixReviewTime"),  # 2014, some lines in Python's spelling, and 2018: seconds
    ("user_id", "parent_asin", "timestamp"),  # 2023: milliseconds; variants of a product share its parent
)


def read_amazon(path: Path, bad: BadLines, clock: Clock) -> Iterator[pl.DataFrame]:
    """Frames of reviews, as `read_json_lines`."""
    return read_json_lines(path, RELEASES, "amazon", bad, clock)
