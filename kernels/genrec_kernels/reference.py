"""The fused operations in plain torch: specification, CPU path and fallback."""

# B users, L input tokens, n places, D width

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from genrec_kernels.plan import SumPlan

_BLOCK = 1 << 17
"""Numbers of the result that a CPU finishes before it goes on: half a megabyte of float32, which stays in its cache."""

_LARGE = 1 << 23
"""Numbers from which a table's gradient is memory fresh from the system at each step: malloc keeps no 32 MB back."""


def embedding_sum(
    token_ids_BL: Tensor,
    position_ids_BL: Tensor,
    user_rows_BL: Tensor,
    item_rows_BL: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    user_table: Tensor | None,
    item_table: Tensor | None,
    *,
    scale: float = 1.0,
    position_offset: int = 0,
    id_dropout: float = 0.0,
    training: bool = False,
    pad_token_id: int | None = None,
    user_projection: Tensor | None = None,
    item_projection: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    plan: SumPlan | None = None,
) -> Tensor:
    """X = EMB(S) * scale + PosEMB + UIDEMB + TIDEMB, float [B, L, D] in the token table's type (GenRec, equation 2).

    All indices are integer [B, L], or [n] for packed input; tables are [rows, D]; an id table that is None adds nothing.
    Row 0 of the id tables is the zero row and never learns, nor does the row of `pad_token_id`. Positions count from row
    `position_offset` of their table. An id table may be factorised: [rows, F] with a projection [D, F]. `id_dropout` drops
    entries of the id terms alone. With `norm_weight` and `norm_bias`, [D], the layer norm of the sum comes back. `plan` is
    for a kernel's backward and changes nothing here. Indices must be in range: the caller checks them where batches are made.
    """
    ids = (token_ids_BL, position_ids_BL, user_rows_BL, item_rows_BL)
    plain = user_projection is None and item_projection is None and not (training and id_dropout)
    if plain and token_table.device.type == "cpu" and not torch.compiler.is_compiling():
        tables = (token_table, position_table, user_table, item_table)
        embedded = _InBlocks.apply(*ids, *tables, scale, position_offset, pad_token_id)
    else:
        embedded = F.embedding(token_ids_BL, token_table, padding_idx=pad_token_id)
        if scale != 1.0:
            embedded = embedded * scale
        embedded = embedded + F.embedding(position_ids_BL + position_offset, position_table)
        for rows_BL, table, projection in (
            (user_rows_BL, user_table, user_projection),
            (item_rows_BL, item_table, item_projection),
        ):
            if table is not None:
                # Fetched rows are float32, the layers may not be.
                ids_BLD = F.embedding(rows_BL, table.to(token_table.dtype), padding_idx=0)
                if projection is not None:
                    ids_BLD = F.linear(ids_BLD, projection)
                embedded = embedded + F.dropout(ids_BLD, id_dropout, training)
    if norm_weight is None:
        return embedded
    return F.layer_norm(embedded, norm_weight.shape, norm_weight, norm_bias, norm_eps)


class _InBlocks(torch.autograd.Function):
    """The same numbers to the bit, block by block: no array of the result's size is made but the result.

    Otherwise each term and each sum is one, and on a CPU most of the time goes into fetching memory for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token_ids: Tensor,
        position_ids: Tensor,
        user_rows: Tensor,
        item_rows: Tensor,
        token_table: Tensor,
        position_table: Tensor,
        user_table: Tensor | None,
        item_table: Tensor | None,
        scale: float,
        position_offset: int,
        pad_token_id: int | None,
    ) -> Tensor:
        position_ids = position_ids + position_offset if position_offset else position_ids
        ids = (token_ids, position_ids, user_rows, item_rows)
        tables = (token_table, position_table, user_table, item_table)
        ctx.save_for_backward(*ids)
        ctx.tables = [None if table is None else (len(table), table.dtype) for table in tables]
        ctx.silent = (pad_token_id, None, 0, 0)
        ctx.scale = scale
        tokens_n, positions_n, *id_rows = (rows.reshape(-1) for rows in ids)
        out_nD = token_table.new_empty(len(tokens_n), token_table.shape[1])
        terms = [
            (rows_n, table.to(token_table.dtype))
            for rows_n, table in zip(id_rows, tables[2:], strict=True)
            if table is not None
        ]
        size = max(1, _BLOCK // token_table.shape[1] * torch.get_num_threads())
        room_kD = torch.empty_like(out_nD[:size])
        for start in range(0, len(out_nD), size):
            block = slice(start, start + size)
            out_kD = out_nD[block]
            term_kD = room_kD[: len(out_kD)]
            torch.index_select(token_table, 0, tokens_n[block], out=out_kD)
            if scale != 1.0:
                out_kD *= scale
            out_kD += torch.index_select(position_table, 0, positions_n[block], out=term_kD)
            for rows_n, table in terms:
                _add_rows(out_kD, rows_n[block], table, term_kD)
        return out_nD.view(*token_ids.shape, out_nD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for number, (rows, table, silent) in enumerate(zip(ctx.saved_tensors, ctx.tables, ctx.silent, strict=True)):
            if table is None or not ctx.needs_input_grad[4 + number]:
                grads.append(None)
                continue
            scaled_BLD = gradient_BLD * ctx.scale if number == 0 and ctx.scale != 1.0 else gradient_BLD
            num_rows, dtype = table
            grads.append(_row_sums(scaled_BLD, rows, num_rows, silent).to(dtype))
        return (None,) * 4 + tuple(grads) + (None,) * 3


def _row_sums(gradient_BLD: Tensor, rows: Tensor, num_rows: int, silent: int | None) -> Tensor:
    """[num_rows, D], each row's gradients added in the order of their places; nothing in row `silent`."""
    width = gradient_BLD.shape[-1]
    if gradient_BLD.dtype not in (torch.float32, torch.float64) or num_rows * width < _LARGE:
        return torch.ops.aten.embedding_dense_backward(
            gradient_BLD.contiguous(), rows, num_rows, -1 if silent is None else silent, False
        )
    # Zeros as the system hands them out: what a batch does not touch of a large table is not written once more.
    zeros = np.zeros((num_rows, width), np.float32 if gradient_BLD.dtype == torch.float32 else np.float64)
    grad = torch.from_numpy(zeros).index_add_(0, rows.reshape(-1), gradient_BLD.reshape(-1, width))
    if silent is not None:
        grad[silent] = 0
    return grad


def _add_rows(out_kD: Tensor, rows_k: Tensor, table: Tensor, room_kD: Tensor) -> None:
    """Add the rows of an id table. Places with row 0 are left out where they are most, as a user's are."""
    places = rows_k.nonzero().view(-1)
    if 4 * len(places) >= len(rows_k):
        out_kD += torch.index_select(table, 0, rows_k, out=room_kD)
    elif len(places):
        out_kD.index_add_(0, places, table.index_select(0, rows_k.index_select(0, places)))
