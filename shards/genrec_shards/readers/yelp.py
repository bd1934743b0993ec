"""Reviews of Yelp's academic data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from genrec_shards.bad_lines import BadLines
from genrec_shards.readers.json_lines import Fields, read_json_lines
from genrec_shards.readers.times import Clock

if TYPE_CHECKING:
    import polars as pl

RELEASES: tuple[Fields, ...] = (("user_id", "business_id", "date"),)


def read_yelp(path: Path, bad: BadLines, clock: Clock) -> Iterator[pl.DataFrame]:
    """Frames of reviews, as `read_json_lines`; dates are taken as UTC."""
    return read_json_lines(path, RELEASES, "yelp", bad, clock)
