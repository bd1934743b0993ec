"""The fused operations in plain torch: specification, CPU path and fallback."""

# B users, L input tokens, n places, D width

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 1 << 16
"""Numbers of the result that a CPU finishes before it goes on: a quarter of a megabyte of float32,
which stays in its cache."""

_LARGE = 1 << 23
"""Numbers from which a table's gradient is memory fresh from the system at each step: malloc keeps
no 32 MB back."""


@dataclass(frozen=True)
class EmbeddingTables:
    """The tables of the embedding sum, and how their rows are added."""

    token: Tensor
    """float [vocabulary, D]"""
    position: Tensor
    """float [positions, D]"""
    user: Tensor | None = None
    """float [users + 1, D], or [users + 1, F] with a projection; row 0 is the zero row. None adds
    nothing."""
    item: Tensor | None = None
    """float [items + 1, D], or [items + 1, F] with a projection; row 0 is the zero row."""
    scale: float = 1.0
    """Factor of the token's row."""
    position_offset: int = 0
    """Row of position 0."""
    pad_token_id: int | None = None
    """The token whose row never learns."""
    id_dropout: float = 0.0
    """Share of the entries of the id terms that is dropped in training."""
    user_projection: Tensor | None = None
    """[D, F]"""
    item_projection: Tensor | None = None
    """[D, F]"""
    norm_weight: Tensor | None = None
    """[D]; with it and the bias the layer norm of the sum is computed."""
    norm_bias: Tensor | None = None
    norm_eps: float = 1e-5


def embedding_sum(
    token_ids_BL: Tensor,
    position_ids_BL: Tensor,
    user_rows_BL: Tensor,
    item_rows_BL: Tensor,
    tables: EmbeddingTables,
    *,
    training: bool = False,
) -> Tensor:
    """X = EMB(S) * scale + PosEMB + UIDEMB + TIDEMB (GenRec, equation 2), float [B, L, D] in the
    token table's type.

    Row 0 of the id tables never learns, nor does the row of `pad_token_id`.

    Args:
        token_ids_BL: integers [B, L], or [n] for packed input; the next three alike. All must be
            in range: the caller checks them where batches are made.
        position_ids_BL: positions, before `tables.position_offset`.
        user_rows_BL: rows of the user table; 0: none.
        item_rows_BL: rows of the item table; 0: none.
        tables: what is added.
        training: whether `tables.id_dropout` applies.
    """
    token_table, norm = tables.token, tables.norm_weight
    dropout = tables.id_dropout if training else 0.0
    plain = tables.user_projection is None and tables.item_projection is None and not dropout
    if plain and token_table.device.type == "cpu" and not torch.compiler.is_compiling():
        ids = (token_ids_BL, position_ids_BL, user_rows_BL, item_rows_BL)
        four = (token_table, tables.position, tables.user, tables.item)
        options = (tables.scale, tables.position_offset, tables.pad_token_id)
        summed = _InBlocks.apply(*ids, *four, *options)
    else:
        summed = F.embedding(token_ids_BL, token_table, padding_idx=tables.pad_token_id)
        if tables.scale != 1.0:
            summed = summed * tables.scale
        summed = summed + F.embedding(position_ids_BL + tables.position_offset, tables.position)
        for rows_BL, table, projection in (
            (user_rows_BL, tables.user, tables.user_projection),
            (item_rows_BL, tables.item, tables.item_projection),
        ):
            if table is not None:
                # Fetched rows are float32, the layers may not be.
                ids_BLD = F.embedding(rows_BL, table.to(token_table.dtype), padding_idx=0)
                if projection is not None:
                    ids_BLD = F.linear(ids_BLD, projection)
                summed = summed + F.dropout(ids_BLD, dropout, training)
    if norm is None:
        return summed
    return F.layer_norm(summed, norm.shape, norm, tables.norm_bias, tables.norm_eps)


class _InBlocks(torch.autograd.Function):
    """The same numbers to the bit, block by block: no array of the result's size is made but the
    result.

    Otherwise each term and each sum is one, and on a CPU most of the time goes into fetching memory
    for them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        token_ids, position_ids, user_rows, item_rows, *tables = inputs[:8]
        scale, position_offset, pad_token_id = inputs[8:]
        token_table = tables[0]
        position_ids = position_ids + position_offset if position_offset else position_ids
        ids = (token_ids, position_ids, user_rows, item_rows)
        ctx.save_for_backward(*ids)
        ctx.tables = [None if table is None else (len(table), table.dtype) for table in tables]
        ctx.silent = (pad_token_id, None, 0, 0)
        ctx.scale = scale
        # Fetched rows are float32, the layers may not be.
        terms = [
            (rows.reshape(-1), table.to(token_table.dtype))
            for rows, table in zip(ids, tables, strict=True)
            if table is not None
        ]
        out_nD = token_table.new_empty(token_ids.numel(), token_table.shape[1])
        rare = [n for n, (rows_n, _) in enumerate(terms) if n > 1 and _is_rare(rows_n != 0)]
        _add_up(out_nD, [term for n, term in enumerate(terms) if n not in rare], scale)
        if rare:
            # The places of users, where they have tokens of their own: all of their terms once
            # more, in the same order.
            is_rare_n = torch.stack([terms[n][0] != 0 for n in rare]).any(0)
            places = is_rare_n.nonzero().view(-1)
            rows_pD = out_nD.new_empty(len(places), out_nD.shape[1])
            _add_up(rows_pD, [(rows_n[places], table) for rows_n, table in terms], scale)
            out_nD.index_copy_(0, places, rows_pD)
        return out_nD.view(*token_ids.shape, out_nD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        parts = zip(ctx.saved_tensors, ctx.tables, ctx.silent, strict=True)
        for number, (rows, table, silent) in enumerate(parts):
            if table is None or not ctx.needs_input_grad[4 + number]:
                grads.append(None)
                continue
            scaled = number == 0 and ctx.scale != 1.0
            scaled_BLD = gradient_BLD * ctx.scale if scaled else gradient_BLD
            num_rows, dtype = table
            grads.append(_row_sums(scaled_BLD, rows, num_rows, silent).to(dtype))
        return (None,) * 4 + tuple(grads) + (None,) * 3


def _add_up(out_nD: Tensor, terms: list[tuple[Tensor, Tensor]], scale: float) -> None:
    """Sum the rows of the terms, (ids [n], table), into `out_nD` from left to right, the first one
    times `scale`."""
    size = max(1, _BLOCK // out_nD.shape[1] * torch.get_num_threads())
    room_kD = torch.empty_like(out_nD[:size])
    (first_n, first_table), *others = terms
    for start in range(0, len(out_nD), size):
        block = slice(start, start + size)
        out_kD = out_nD[block]
        torch.index_select(first_table, 0, first_n[block], out=out_kD)
        if scale != 1.0:
            out_kD *= scale
        for rows_n, table in others:
            out_kD += torch.index_select(table, 0, rows_n[block], out=room_kD[: len(out_kD)])


def _row_sums(gradient_BLD: Tensor, rows: Tensor, num_rows: int, silent: int | None) -> Tensor:
    """[num_rows, D], each row's gradients added in the order of their places; nothing in row
    `silent`."""
    if gradient_BLD.dtype not in (torch.float32, torch.float64):
        padding = -1 if silent is None else silent
        return torch.ops.aten.embedding_dense_backward(
            gradient_BLD.contiguous(), rows, num_rows, padding, False
        )
    gradient_nD, rows_n = gradient_BLD.reshape(-1, gradient_BLD.shape[-1]), rows.reshape(-1)
    if silent is not None and _is_rare(learns_n := rows_n != silent):
        places = learns_n.nonzero().view(-1)
        gradient_nD, rows_n = gradient_nD[places], rows_n[places]
    # In this order too: it sorts the places by row, stably, and adds a row's one by one.
    zeros = _zeros(num_rows, gradient_nD.shape[1], gradient_nD.dtype)
    grad = zeros.index_add_(0, rows_n, gradient_nD)
    if silent is not None:
        grad[silent] = 0
    return grad


def _is_rare(mask_n: Tensor) -> bool:
    """Whether so few places count that going for them alone is less work than going through all."""
    return 4 * int(mask_n.count_nonzero()) < len(mask_n)


def _zeros(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros for a table's gradient; of a large table as the system hands them out, so that what a
    batch does not touch is not written once more. Small pages: large ones would be cleared whole,
    and the system may have to make room for them first."""
    count = num_rows * width
    if count < _LARGE:
        return torch.zeros(num_rows, width, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, width)
