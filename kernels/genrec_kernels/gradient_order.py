"""The order in which a batch's gradients are added, made on the host with the batch: no device ever
sorts."""

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
_ALIGN = 4  # int32 numbers: a part that starts at 16 bytes is read in wide loads, and each batch meets one compiled kernel


class Rows(NamedTuple):
    """Which rows of one table a batch reads."""

    name: str
    ids: np.ndarray
    """Whole numbers of any shape, the same for all tables of a plan."""
    num_rows: int
    silent: int | None = None
    """The row that learns nothing: its places are left out."""


class Stretch(NamedTuple):
    """Where one table's order lies in `SumPlan.packed`, and how large its parts are. All zero: the
    table has no order."""

    start: int = 0
    order: int = 0
    chunks: int = 0
    longs: int = 0

    @property
    def size(self) -> int:
        return _HEADER + self.order + 3 * self.chunks + 3 * self.longs


class Parts(NamedTuple):
    """One table's order, views of `packed`."""

    header: Tensor
    """int32 [4]: chunks in use, long rows in use, distinct rows, occurrences."""
    order: Tensor
    """int32 [order]: places, by row, within a row ascending."""
    chunks: Tensor
    """int32 [chunks, 3]: first entry of `order`, how many, and where their sum goes: a row, or -1 -
    p for partial sum p."""
    longs: Tensor
    """int32 [longs, 3]: first partial sum, how many, and the row."""


@dataclass(frozen=True)
class SumPlan:
    """The orders of a batch's tables: token, position, user, item. Sizes are rounded up, so that
    few of them occur."""

    packed: Tensor
    """int32, all of it in one tensor: one copy takes it to a device."""
    stretches: tuple[Stretch, Stretch, Stretch, Stretch]
    num_places: int

    def to(self, device: torch.device) -> SumPlan:
        return SumPlan(self.packed.to(device, non_blocking=True), self.stretches, self.num_places)

    def sizes(self) -> list[int]:
        """The stretches as plain numbers, for an operator's arguments."""
        return [number for stretch in self.stretches for number in stretch]


def parts(packed: Tensor, stretch: Sequence[int]) -> Parts:
    """One table's order within `packed`."""
    start, order, chunks, longs = stretch
    header, places, chunk_parts, long_parts = packed.narrow(0, start, Stretch(*stretch).size).split(
        [_HEADER, order, 3 * chunks, 3 * longs]
    )
    return Parts(header, places, chunk_parts.view(chunks, 3), long_parts.view(longs, 3))


def plan_sum(
    token: Rows, position: Rows, user: Rows | None, item: Rows | None, *, static: bool = False
) -> SumPlan:
    """Orders for `embedding_sum`'s backward. `static`: sizes that any batch of this shape fits in,
    for a CUDA graph.

    Raises ValueError for an id outside its table: nobody looks again on the device.
    """
    packed: list[np.ndarray] = []
    stretches: list[Stretch] = []
    start = 0
    for rows in (token, position, user, item):
        if rows is None:
            stretches.append(Stretch())
            continue
        check_rows(rows)
        assert rows.ids.size == token.ids.size, (rows.name, rows.ids.shape, token.ids.shape)
        stretch, array = _order(rows, start, static)
        packed.append(array)
        stretches.append(stretch)
        start += stretch.size
    first, second, third, fourth = stretches
    return SumPlan(
        torch.from_numpy(np.concatenate(packed)), (first, second, third, fourth), token.ids.size
    )


def check_rows(rows: Rows) -> None:
    """Raise ValueError naming the table if an id lies outside it."""
    if not rows.ids.size:
        return
    low, high = int(rows.ids.min()), int(rows.ids.max())
    if low < 0 or high >= rows.num_rows:
        bad = low if low < 0 else high
        raise ValueError(
            f"{rows.name} id {bad} is outside its table of {rows.num_rows} rows: prepare and shard again"
        )


def _order(rows: Rows, start: int, static: bool) -> tuple[Stretch, np.ndarray]:
    ids_n = rows.ids.reshape(-1)
    num_places = len(ids_n)
    places = np.arange(num_places) if rows.silent is None else np.flatnonzero(ids_n != rows.silent)
    # One sort of whole numbers instead of a stable argsort, which takes several times as long.
    keys = np.sort((ids_n[places].astype(np.int64) << 32) | places)
    row_of, order = keys >> 32, keys & 0xFFFFFFFF
    firsts = (
        np.flatnonzero(np.concatenate([[True], row_of[1:] != row_of[:-1]]))
        if len(keys)
        else np.zeros(0, np.int64)
    )
    counts = np.diff(np.concatenate([firsts, [len(keys)]]))
    pieces = -(-counts // CHUNK)
    segment = np.repeat(np.arange(len(firsts)), pieces)
    piece = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    chunk_first = firsts[segment] + piece * CHUNK
    chunk_count = np.minimum(counts[segment] - piece * CHUNK, CHUNK)
    target = row_of[chunk_first]
    in_long = pieces[segment] > 1
    target[in_long] = -1 - np.arange(in_long.sum())
    long_pieces = pieces[pieces > 1]
    longs = np.stack(
        [np.cumsum(long_pieces) - long_pieces, long_pieces, row_of[firsts[pieces > 1]]], 1
    )

    most_rows = min(num_places, rows.num_rows)
    stretch = Stretch(
        start,
        _rounded(num_places, 0),
        _rounded(most_rows + num_places // CHUNK, 0)
        if static
        else _rounded(len(segment), num_places),
        _rounded(num_places // CHUNK, 0) if static else _rounded(len(longs), num_places // 16),
    )
    array = np.zeros(stretch.size, np.int32)
    array[:_HEADER] = len(segment), len(longs), len(firsts), len(keys)
    at = _HEADER
    array[at : at + len(order)] = order
    at += stretch.order
    array[at : at + 3 * len(segment)] = np.stack([chunk_first, chunk_count, target], 1).reshape(-1)
    at += 3 * stretch.chunks
    array[at : at + longs.size] = longs.reshape(-1)
    return stretch, array


def _rounded(count: int, num_places: int) -> int:
    """Up to a sixteenth of the places, so that batches of one shape differ in few sizes."""
    step = max(_ALIGN, num_places // 16 // _ALIGN * _ALIGN)
    return -(-max(count, 1) // step) * step
