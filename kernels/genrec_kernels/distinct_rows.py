"""The distinct rows of a step's ids, and the lookup in a table of those alone."""

# N table rows, D width, W ranks, u rows of this rank's step, n rows this rank owns that some rank
# requests

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_FEW_ROWS = 1_000_000  # up to here a table of all rows' places beats a sort of those that come


def distinct_rows(arrays: Sequence[np.ndarray], num_rows: int) -> tuple[Tensor, list[np.ndarray]]:
    """The distinct table rows of a step, made where the batch is made.

    For arrays [5, 0, 9] and [9, 2] the rows are [1, 4, 8] and the arrays become [2, 0, 3] and
    [3, 1].

    Args:
        arrays: whole numbers of any shapes: 0 means "no row", and r + 1 table row r.
        num_rows: rows of the table.

    Returns:
        The rows, int64 [u], strictly ascending; and the arrays, shapes and dtypes kept, in which 0
        stays 0 and p + 1 means `rows[p]`.

    Raises:
        ValueError: a number is outside 0..num_rows.
    """
    # The zero in front is always there to be found, so that the others' places follow it.
    flat = np.concatenate([np.zeros(1, np.int64), *(array.reshape(-1) for array in arrays)])
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high > num_rows:
        wrong = f"id {low if low < 0 else high} is outside its table"
        raise ValueError(f"{wrong} of {num_rows} rows and the zero row: prepare and shard again")
    if num_rows <= _FEW_ROWS:
        # What np.unique gives, several times as fast. Only the entries of rows that come are ever
        # written or read.
        ordered = np.sort(flat)
        found = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
        place_of = np.empty(num_rows + 1, np.int32)
        place_of[found] = np.arange(len(found), dtype=np.int32)
        places = place_of.take(flat)
    else:
        found, inverse = np.unique(flat, return_inverse=True)
        places = inverse.astype(np.int32)
    local, end = [], 1
    for array in arrays:
        part = places[end : end + array.size]
        local.append(part.reshape(array.shape).astype(array.dtype, copy=False))
        end += array.size
    return torch.from_numpy(found[1:] - 1), local


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """`table[places]`, float [..., D], where gradients reach the table: its backward adds into
    [rows, D], no more.

    On CPU this backward takes half the time of `F.embedding`'s. Elsewhere it is `F.embedding`'s,
    which sorts and is therefore the same to the bit each time. Row 0 gets a gradient too: update()
    is given `table.grad[1:]`."""
    if table.device.type == "cpu":
        return table.index_select(0, places.reshape(-1)).view(*places.shape, table.shape[1])
    return F.embedding(places, table, padding_idx=0)
