"""The embedding kernel's peer that adds gradients by atomics, in the manner of Liger-Kernel's
embedding; its sum is fused, too."""

# n places, D width, M places of a tile, N columns of a tile

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_SIDE = 128
"""Largest side of a tile, places and columns alike, as Liger has it."""


@triton.jit
def _rows(ids_at, table_at, place_M, column_N, here_M, mask, WIDTH: tl.constexpr):
    row_M = tl.load(ids_at + place_M, mask=here_M, other=0).to(tl.int64)
    return tl.load(table_at + row_M[:, None] * WIDTH + column_N[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _sum_kernel(
    tokens_at, positions_at, users_at, items_at, token_table, position_table, user_table, item_table, out_at, num_places,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    place_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here_M = place_M < num_places
    mask = here_M[:, None] & (column_N < WIDTH)[None, :]
    sum_MN = _rows(tokens_at, token_table, place_M, column_N, here_M, mask, WIDTH)
    sum_MN += _rows(positions_at, position_table, place_M, column_N, here_M, mask, WIDTH)
    sum_MN += _rows(users_at, user_table, place_M, column_N, here_M, mask, WIDTH)
    sum_MN += _rows(items_at, item_table, place_M, column_N, here_M, mask, WIDTH)
    at_MN = place_M[:, None].to(tl.int64) * WIDTH + column_N[None, :]
    tl.store(out_at + at_MN, sum_MN.to(out_at.dtype.element_ty), mask=mask)


@triton.jit
def _add(ids_at, grad_at, part_MN, place_M, column_N, here_M, mask, silent, WIDTH: tl.constexpr):
    row_M = tl.load(ids_at + place_M, mask=here_M, other=0).to(tl.int64)
    at_MN = row_M[:, None] * WIDTH + column_N[None, :]
    loud = mask & (row_M != silent)[:, None]
    tl.atomic_add(grad_at + at_MN, part_MN.to(grad_at.dtype.element_ty), mask=loud, sem="relaxed")


@triton.jit
def _add_kernel(
    gradient_at, tokens_at, positions_at, users_at, items_at, token_grad, position_grad, user_grad, item_grad,
    num_places, pad, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    place_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here_M = place_M < num_places
    mask = here_M[:, None] & (column_N < WIDTH)[None, :]
    at_MN = place_M[:, None].to(tl.int64) * WIDTH + column_N[None, :]
    part_MN = tl.load(gradient_at + at_MN, mask=mask, other=0.0)
    _add(tokens_at, token_grad, part_MN, place_M, column_N, here_M, mask, pad, WIDTH)
    _add(positions_at, position_grad, part_MN, place_M, column_N, here_M, mask, -1, WIDTH)
    _add(users_at, user_grad, part_MN, place_M, column_N, here_M, mask, 0, WIDTH)
    _add(items_at, item_grad, part_MN, place_M, column_N, here_M, mask, 0, WIDTH)


class _Atomics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pad: int, sums: torch.dtype | None, *arguments: Tensor) -> Tensor:
        ids, tables = arguments[:4], arguments[4:]
        out = tables[0].new_empty(*ids[0].shape, tables[0].shape[1])
        _sum_kernel[_grid(out)](*ids, *tables, out, ids[0].numel(), **_tile(out))
        ctx.save_for_backward(*ids)
        ctx.sizes, ctx.pad, ctx.sums, ctx.dtype = (
            [len(table) for table in tables],
            pad,
            sums,
            tables[0].dtype,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient, width = gradient.contiguous(), gradient.shape[-1]
        sums = ctx.sums or ctx.dtype
        grads = [torch.zeros(rows, width, dtype=sums, device=gradient.device) for rows in ctx.sizes]
        num_places = gradient.numel() // width
        _add_kernel[_grid(gradient)](
            gradient, *ctx.saved_tensors, *grads, num_places, ctx.pad, **_tile(gradient)
        )
        return (None,) * 6 + tuple(grad.to(ctx.dtype) for grad in grads)


def atomics(
    ids: Sequence[Tensor], tables: Sequence[Tensor], pad: int, sums: torch.dtype | None = None
) -> Tensor:
    """The sum of the rows of token, position, user and item tables, float [..., D]. Ids are
    contiguous, positions rows of their table. `sums`: the type gradients are added in; None: the
    tables', as Liger does."""
    result: Tensor = _Atomics.apply(pad, sums, *ids, *tables)
    return result


def _tile(values: Tensor) -> dict[str, int]:
    side = triton.next_power_of_2(min(_SIDE, values.shape[-1]))
    return {"WIDTH": values.shape[-1], "BLOCK_M": side, "BLOCK_N": side, "num_warps": 8}


def _grid(values: Tensor) -> tuple[int, int]:
    tile = _tile(values)
    width = values.shape[-1]
    return triton.cdiv(values.numel() // width, tile["BLOCK_M"]), triton.cdiv(
        width, tile["BLOCK_N"]
    )
