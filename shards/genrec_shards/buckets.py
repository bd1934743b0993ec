"""A log on its way to sequences: rows of numbers in files by user, so that memory holds one bucket and not the log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from genrec_shards.sequences import DataError

if TYPE_CHECKING:
    import polars as pl

USERS_A_BUCKET = 1 << 15
ROW = np.dtype([("time", "<i8"), ("user", "<u4"), ("item", "<u4")])
"""One interaction: microseconds, and numbers of user and item by first appearance."""


class Buckets:
    """Files of rows: a user's are all in one of them, in the order of the log until `replace` sorts them.

    A sort of the whole log by polars' streaming engine holds it in memory: 57 bytes a row of 16 (2.1.0, 10^7 rows in Parquet).
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: an empty directory that is the buckets' own."""
        self.folder = folder
        self.user_numbers: dict[str, int] = {}
        self.item_numbers: dict[str, int] = {}
        self.num_rows = 0

    @property
    def num_users(self) -> int:
        return len(self.user_numbers)

    @property
    def num_items(self) -> int:
        return len(self.item_numbers)

    def add(self, found: pl.DataFrame) -> None:
        """Append a frame's rows. Raises OSError where the disk is full."""
        rows = np.empty(found.height, ROW)
        rows["time"] = found["time"].to_numpy()
        rows["user"] = _numbers(found["user"], self.user_numbers)
        rows["item"] = _numbers(found["item"], self.item_numbers)
        self.num_rows += len(rows)
        bucket_of_row = rows["user"] // USERS_A_BUCKET
        order = np.argsort(bucket_of_row, kind="stable")
        used, starts = np.unique(bucket_of_row[order], return_index=True)
        for bucket, part in zip(used.tolist(), np.split(order, starts[1:]), strict=True):
            with self._path(bucket).open("ab") as file:
                file.write(rows[part].tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        """ROW[n] of each bucket, users in ascending order of buckets."""
        for bucket in range(-(-self.num_users // USERS_A_BUCKET)):
            yield np.fromfile(self._path(bucket), ROW)

    def replace(self, bucket: int, rows: np.ndarray) -> None:
        """Let a bucket hold these rows."""
        with self._path(bucket).open("wb") as file:
            file.write(rows.tobytes())

    def _path(self, bucket: int) -> Path:
        return self.folder / f"bucket-{bucket:06d}"


def _numbers(ids: pl.Series, known: dict[str, int]) -> np.ndarray:
    """uint32[n], the number of each id; new ones get the next numbers."""
    encoded = ids.to_arrow().dictionary_encode()
    assert isinstance(encoded, pa.DictionaryArray)
    names = encoded.dictionary.to_pylist()
    numbers = np.array([known.setdefault(name, len(known)) for name in names], np.uint32)
    if len(known) >= 1 << 32:
        raise DataError("more than 4,294,967,295 users or items: split the log")
    return numbers[encoded.indices.to_numpy()]
