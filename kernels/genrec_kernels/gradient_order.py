"""The order in which a batch's gradients are added, made on the host with the batch, so that no
device sorts."""

# n places (tokens of a batch, padding included), R rows of a table, D width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 64
"""Occurrences that one program adds up. A row with more of them is summed in two levels."""

_HEADER = 4
# int32 numbers: a part that starts at 16 bytes is read in wide loads, and each batch meets one
# compiled kernel.
_ALIGN = 4


class Rows(NamedTuple):
    """Which rows of one table a batch reads."""

    name: str
    ids: np.ndarray
    """Whole numbers of any shape, the same for all tables of a batch."""
    num_rows: int
    silent: int | None = None
    """The row that learns nothing: its places are left out."""


class Segment(NamedTuple):
    """Where one table's order is in `GradientOrder.packed`, and how large its parts are. All zero:
    the table has no order."""

    start: int = 0
    order: int = 0
    chunks: int = 0
    long_rows: int = 0

    @property
    def size(self) -> int:
        return _HEADER + self.order + 3 * self.chunks + 3 * self.long_rows


class TableOrder(NamedTuple):
    """One table's order, views of `packed`."""

    header: Tensor
    """int32 [4]: chunks in use, long rows in use, distinct rows, occurrences."""
    order: Tensor
    """int32 [order]: places, by row, within a row ascending."""
    chunks: Tensor
    """int32 [chunks, 3]: first entry of `order`, how many, and where their sum goes: a row, or
    -1 - p for partial sum p."""
    long_rows: Tensor
    """int32 [long_rows, 3]: first partial sum, how many, and the row."""


@dataclass(frozen=True)
class GradientOrder:
    """The orders of a batch's tables: token, position, user, item. Sizes are rounded up, so that
    few of them occur."""

    packed: Tensor
    """int32, all of it in one tensor: one copy takes it to a device."""
    segments: tuple[Segment, ...]
    """Of the four tables."""
    num_places: int

    def to(self, device: torch.device) -> GradientOrder:
        packed = self.packed.to(device, non_blocking=True)
        return GradientOrder(packed, segments=self.segments, num_places=self.num_places)

    def sizes(self) -> list[int]:
        """The segments as plain numbers, for an operator's arguments."""
        return [number for segment in self.segments for number in segment]


def unpack(packed: Tensor, segment: Sequence[int]) -> TableOrder:
    """One table's order within `packed`."""
    start, order, chunks, long_rows = segment
    part = packed.narrow(0, start, Segment(*segment).size)
    header, places, chunk_part, long_part = part.split([_HEADER, order, 3 * chunks, 3 * long_rows])
    return TableOrder(header, places, chunk_part.view(chunks, 3), long_part.view(long_rows, 3))


def make_gradient_order(tables: Sequence[Rows | None], fixed: bool = False) -> GradientOrder:
    """The order for `embedding_sum`'s backward.

    Args:
        tables: of token, position, user and item; None for a table that is not there.
        fixed: the sizes depend on the number of places alone, as a captured graph requires.

    Raises:
        ValueError: an id is outside its table; nobody looks again on the device.
    """
    first = tables[0]
    assert first is not None
    packed: list[np.ndarray] = []
    segments: list[Segment] = []
    start = 0
    for rows in tables:
        segment = Segment()
        if rows is not None:
            check_rows(rows)
            assert rows.ids.size == first.ids.size, (rows.name, rows.ids.shape, first.ids.shape)
            segment, array = _table_order(rows, start, fixed)
            packed.append(array)
            start += segment.size
        segments.append(segment)
    joined = torch.from_numpy(np.concatenate(packed))
    return GradientOrder(joined, segments=tuple(segments), num_places=first.ids.size)


def check_rows(rows: Rows) -> None:
    """Raise ValueError naming the table if an id is outside it."""
    if not rows.ids.size:
        return
    low, high = int(rows.ids.min()), int(rows.ids.max())
    if low < 0 or high >= rows.num_rows:
        found = f"{rows.name} id {low if low < 0 else high}"
        table = f"its table of {rows.num_rows} rows"
        raise ValueError(f"{found} is outside {table}: prepare and shard again")


def _table_order(rows: Rows, start: int, fixed: bool) -> tuple[Segment, np.ndarray]:
    # Worked example, CHUNK = 2: one table of 4 rows, silent row 0, and six places that read
    #     ids_n        3 1 0 3 3 1
    #     places       0 1 3 4 5        place 2 reads the silent row
    #     row_of       1 1 3 3 3        sorted by row, then by place
    #     order        1 5 0 3 4
    #     firsts       0 2              row 1 begins at entry 0 of the order, row 3 at entry 2
    #     counts       2 3              occurrences of rows 1 and 3
    #     num_chunks   1 2              row 3 is long: two chunks, of 2 and of 1 places
    #     row_index    0 1 1            by chunk: which of the rows (1, 3)
    #     nth          0 0 1            by chunk: which one of its row
    #     chunk_first  0 2 4
    #     chunk_count  2 2 1
    #     target       1 -1 -2          row 1 at once; row 3 by the partial sums 0 and 1
    #     long_rows    [[0, 2, 3]]      two partial sums from number 0 on make row 3
    ids_n = rows.ids.reshape(-1)
    num_places = len(ids_n)
    places = np.arange(num_places) if rows.silent is None else np.flatnonzero(ids_n != rows.silent)
    # One sort of whole numbers instead of a stable argsort, which takes several times as long.
    keys = np.sort((ids_n[places].astype(np.int64) << 32) | places)
    row_of, order = keys >> 32, keys & 0xFFFFFFFF
    firsts = np.flatnonzero(np.diff(row_of, prepend=-1))
    counts = np.diff(firsts, append=len(keys))
    num_chunks = -(-counts // CHUNK)
    row_index = np.repeat(np.arange(len(firsts)), num_chunks)
    nth = np.arange(len(row_index)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    chunk_first = firsts[row_index] + nth * CHUNK
    chunk_count = np.minimum(counts[row_index] - nth * CHUNK, CHUNK)
    target = row_of[chunk_first]
    in_long = num_chunks[row_index] > 1
    target[in_long] = -1 - np.arange(in_long.sum())
    partials = num_chunks[num_chunks > 1]
    first_partial = np.cumsum(partials) - partials
    long_rows = np.stack([first_partial, partials, row_of[firsts[num_chunks > 1]]], 1)

    segment = Segment(
        start,
        order=_rounded(num_places, 0),
        # At most one chunk a place, and a long row has more than CHUNK places.
        chunks=_rounded(num_places if fixed else len(row_index), num_places),
        long_rows=_rounded(num_places // CHUNK if fixed else len(long_rows), num_places // 16),
    )
    array = np.zeros(segment.size, np.int32)
    array[:_HEADER] = len(row_index), len(long_rows), len(firsts), len(keys)
    at = _HEADER
    array[at : at + len(order)] = order
    at += segment.order
    chunks = np.stack([chunk_first, chunk_count, target], 1)
    array[at : at + chunks.size] = chunks.reshape(-1)
    at += 3 * segment.chunks
    array[at : at + long_rows.size] = long_rows.reshape(-1)
    return segment, array


def _rounded(count: int, num_places: int) -> int:
    """Up to a sixteenth of the places, so that batches of one shape differ in few sizes."""
    step = max(_ALIGN, num_places // 16 // _ALIGN * _ALIGN)
    return -(-max(count, 1) // step) * step
