"""The embedding sum in Triton: one pass forward, and row sums in a fixed order backward. No
atomics, no sort."""

# n places, K places of a tile, D width

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec_kernels.gradient_order import CHUNK, unpack
from genrec_kernels.torch_reference import EmbeddingTables

_TILE = 2048  # numbers a program holds of one array
_STRIP = 32  # places whose layer norm gradients one program adds up
_PROGRAMS = 2048  # programs that share a table's row sums: more than a device runs at once


@triton.jit
def _drop(term_KD, seed_at, place_K, columns, table: tl.constexpr, dropped, kept_scale):
    """The term [K, columns] after dropout, a function of the seed, the place, the column and the
    table alone."""
    place_KD = (place_K[:, None] + columns[None, :] * 0).to(tl.uint32)
    column_KD = (place_K[:, None] * 0 + columns[None, :]).to(tl.uint32)
    none_KD = place_KD * 0
    word_KD, _, _, _ = tl.philox(tl.load(seed_at), place_KD, column_KD, none_KD + table, none_KD)
    kept_KD = tl.uint_to_uniform_float(word_KD) >= dropped
    return tl.where(kept_KD, term_KD * kept_scale, 0.0)


@triton.jit
def _id_rows(rows_at, table_at, place_K, columns, here_K, inside, WIDTH: tl.constexpr):
    """float32 [K, columns] of an id table. Row 0 is zero: it is not read."""
    row_K = tl.load(rows_at + place_K, mask=here_K, other=0).to(tl.int64)
    mask = ((row_K != 0) & here_K)[:, None] & inside[None, :]
    at_KD = row_K[:, None] * WIDTH + columns[None, :]
    return tl.load(table_at + at_KD, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sum_kernel(
    tokens_at,
    positions_at,
    users_at,
    items_at,
    token_table,
    position_table,
    user_table,
    item_table,
    norm_weight,
    norm_bias,
    seed_at,
    out_at,
    hat_at,
    rstd_at,
    num_places,
    position_offset,
    scale,
    dropped,
    kept_scale,
    eps,
    WIDTH: tl.constexpr,
    USERS: tl.constexpr,
    ITEMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    here_K = place_K < num_places
    columns = tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    mask = here_K[:, None] & inside[None, :]
    token_K = tl.load(tokens_at + place_K, mask=here_K, other=0).to(tl.int64)
    position_K = tl.load(positions_at + place_K, mask=here_K, other=0).to(tl.int64)
    token_at = token_K[:, None] * WIDTH + columns[None, :]
    position_at = (position_K[:, None] + position_offset) * WIDTH + columns[None, :]
    token_KD = tl.load(token_table + token_at, mask=mask, other=0.0)
    position_KD = tl.load(position_table + position_at, mask=mask, other=0.0)
    sum_KD = token_KD.to(tl.float32) * scale + position_KD.to(tl.float32)
    if USERS:
        user_KD = _id_rows(users_at, user_table, place_K, columns, here_K, inside, WIDTH)
        if DROPOUT:
            user_KD = _drop(user_KD, seed_at, place_K, columns, 0, dropped, kept_scale)
        sum_KD += user_KD
    if ITEMS:
        item_KD = _id_rows(items_at, item_table, place_K, columns, here_K, inside, WIDTH)
        if DROPOUT:
            item_KD = _drop(item_KD, seed_at, place_K, columns, 1, dropped, kept_scale)
        sum_KD += item_KD
    at_KD = place_K[:, None].to(tl.int64) * WIDTH + columns[None, :]
    if NORM:
        mean_K = tl.sum(sum_KD, axis=1) / WIDTH
        apart_KD = tl.where(inside[None, :], sum_KD - mean_K[:, None], 0.0)
        rstd_K = 1.0 / tl.sqrt(tl.sum(apart_KD * apart_KD, axis=1) / WIDTH + eps)
        hat_KD = apart_KD * rstd_K[:, None]
        if KEEP:
            tl.store(hat_at + at_KD, hat_KD.to(hat_at.dtype.element_ty), mask=mask)
            tl.store(rstd_at + place_K, rstd_K, mask=here_K)
        weight_D = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
        bias_D = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
        sum_KD = hat_KD * weight_D[None, :] + bias_D[None, :]
    tl.store(out_at + at_KD, sum_KD.to(out_at.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    gradient_at,
    hat_at,
    rstd_at,
    weight_at,
    out_at,
    weight_parts,
    bias_parts,
    num_places,
    WIDTH: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    strip = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    weight_D = tl.load(weight_at + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    bias_sum_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(0, STRIP, BLOCK_K):
        place_K = strip * STRIP + first + tl.arange(0, BLOCK_K)
        here_K = place_K < num_places
        mask = here_K[:, None] & inside[None, :]
        at_KD = place_K[:, None].to(tl.int64) * WIDTH + columns[None, :]
        gradient_KD = tl.load(gradient_at + at_KD, mask=mask, other=0.0).to(tl.float32)
        hat_KD = tl.load(hat_at + at_KD, mask=mask, other=0.0).to(tl.float32)
        rstd_K = tl.load(rstd_at + place_K, mask=here_K, other=0.0)
        weighted_KD = gradient_KD * weight_D[None, :]
        along_K = tl.sum(weighted_KD * hat_KD, axis=1) / WIDTH
        mean_K = tl.sum(weighted_KD, axis=1) / WIDTH
        result_KD = (weighted_KD - mean_K[:, None] - hat_KD * along_K[:, None]) * rstd_K[:, None]
        tl.store(out_at + at_KD, result_KD.to(out_at.dtype.element_ty), mask=mask)
        weight_sum_KD += gradient_KD * hat_KD
        bias_sum_KD += gradient_KD
    at_D = strip.to(tl.int64) * WIDTH + columns
    tl.store(weight_parts + at_D, tl.sum(weight_sum_KD, axis=0), mask=inside)
    tl.store(bias_parts + at_D, tl.sum(bias_sum_KD, axis=0), mask=inside)


@triton.jit
def _chunk_kernel(
    gradient_at,
    header_at,
    order_at,
    chunks_at,
    seed_at,
    out_at,
    partial_at,
    scale,
    dropped,
    kept_scale,
    WIDTH: tl.constexpr,
    table: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Level 1: each chunk's occurrences in their order, into the row's gradient or into a partial
    sum."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    num_chunks = tl.load(header_at)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        first = tl.load(chunks_at + 3 * chunk)
        count = tl.load(chunks_at + 3 * chunk + 1)
        target = tl.load(chunks_at + 3 * chunk + 2)
        sum_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for start in range(0, count, BLOCK_K):
            nth_K = start + tl.arange(0, BLOCK_K)
            here_K = nth_K < count
            place_K = tl.load(order_at + first + nth_K, mask=here_K, other=0)
            at_KD = place_K[:, None].to(tl.int64) * WIDTH + columns[None, :]
            mask = here_K[:, None] & inside[None, :]
            part_KD = tl.load(gradient_at + at_KD, mask=mask, other=0.0).to(tl.float32)
            if DROPOUT:
                part_KD = _drop(part_KD, seed_at, place_K, columns, table, dropped, kept_scale)
            sum_KD += part_KD
        sum_D = tl.sum(sum_KD, axis=0)
        if target >= 0:
            result_D = (sum_D * scale).to(out_at.dtype.element_ty)
            tl.store(out_at + target.to(tl.int64) * WIDTH + columns, result_D, mask=inside)
        else:
            tl.store(partial_at + (-1 - target).to(tl.int64) * WIDTH + columns, sum_D, mask=inside)


@triton.jit
def _long_kernel(
    partial_at,
    header_at,
    long_rows_at,
    out_at,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Level 2: the partial sums of each long row. Few rows are long, so columns are shared among
    programs too."""
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    num_long_rows = tl.load(header_at + 1)
    for long in range(tl.program_id(0), num_long_rows, tl.num_programs(0)):
        first = tl.load(long_rows_at + 3 * long)
        count = tl.load(long_rows_at + 3 * long + 1)
        row = tl.load(long_rows_at + 3 * long + 2)
        sum_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for start in range(0, count, BLOCK_K):
            nth_K = start + tl.arange(0, BLOCK_K)
            at_KD = (first + nth_K)[:, None].to(tl.int64) * WIDTH + columns[None, :]
            mask = (nth_K < count)[:, None] & inside[None, :]
            sum_KD += tl.load(partial_at + at_KD, mask=mask, other=0.0)
        result_D = (tl.sum(sum_KD, axis=0) * scale).to(out_at.dtype.element_ty)
        tl.store(out_at + row.to(tl.int64) * WIDTH + columns, result_D, mask=inside)


@triton.jit
def _one_kernel(out_at):
    tl.store(out_at, 1.0)


def launch_one() -> None:
    """Compile and launch a kernel on the current GPU and read what it wrote. Raises what
    Triton or CUDA raises where that does not work."""
    out = torch.zeros(1, device="cuda")
    _one_kernel[(1,)](out)
    if out.item() != 1.0:
        raise ArithmeticError("a kernel wrote nothing")


def embedding_sum(
    ids: Sequence[Tensor], tables: EmbeddingTables, seed: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum in one launch.

    Args:
        ids: token, position, user, item; integers [...], contiguous.
        tables: contiguous and already projected.
        seed: int64 [1], of the dropout; None: nothing is dropped.
        keep: whether to return what the norm's backward needs.

    Returns:
        X [..., D] in the token table's type; the normalised rows [n, D] and 1 / deviation float32
        [n], both empty unless there is a norm and `keep`.
    """
    token_ids, token_table, norm_weight = ids[0], tables.token, tables.norm_weight
    num_places, width = token_ids.numel(), token_table.shape[1]
    out = token_table.new_empty(*token_ids.shape, width)
    kept = keep and norm_weight is not None
    hat = token_table.new_empty((num_places if kept else 0, width))
    rstd = torch.empty(num_places if kept else 0, dtype=torch.float32, device=token_table.device)
    if num_places == 0:
        return out, hat, rstd
    block_d = triton.next_power_of_2(width)
    block_k = max(1, _TILE // block_d)
    # An argument that is not used must be a tensor all the same.
    users = token_table if tables.user is None else tables.user
    items = token_table if tables.item is None else tables.item
    weight = token_table if norm_weight is None else norm_weight
    bias = token_table if tables.norm_bias is None else tables.norm_bias
    inputs = (*ids, token_table, tables.position, users, items, weight, bias)
    outputs = (token_ids if seed is None else seed, out, hat, rstd)
    share = tables.id_dropout
    numbers = (num_places, tables.position_offset, tables.scale, share, _kept_scale(share))
    constants = {
        "WIDTH": width,
        "USERS": tables.user is not None,
        "ITEMS": tables.item is not None,
        "DROPOUT": seed is not None,
        "NORM": norm_weight is not None,
        "KEEP": kept,
        **_tile(block_k, block_d),
    }
    with _on(token_table):
        grid = (triton.cdiv(num_places, block_k),)
        _sum_kernel[grid](*inputs, *outputs, *numbers, tables.norm_eps, **constants)
    return out, hat, rstd


def norm_backward(
    gradient: Tensor, hat: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (the sum [n, D], the norm's weight [D], its bias [D]): strips of places, then
    the strips in order."""
    num_places, width = hat.shape
    num_strips = triton.cdiv(num_places, _STRIP)
    out = torch.empty_like(gradient)
    weights, biases = (
        torch.empty(num_strips, width, dtype=torch.float32, device=hat.device) for _ in range(2)
    )
    if num_places:
        block_d = triton.next_power_of_2(width)
        constants = _tile(max(1, min(_STRIP, _TILE // block_d)), block_d)
        arrays = (gradient, hat, rstd, weight, out, weights, biases)
        with _on(hat):
            _norm_kernel[(num_strips,)](*arrays, num_places, WIDTH=width, STRIP=_STRIP, **constants)
    return out, weights.sum(0).to(weight.dtype), biases.sum(0).to(weight.dtype)


class Dropout(NamedTuple):
    """The dropout of an id table's term."""

    seed: Tensor | None
    """int64 [1]; None: nothing is dropped."""
    share: float
    table: int
    """0: users, 1: items."""


def row_sums(
    gradient: Tensor,
    packed: Tensor,
    segment: Sequence[int],
    num_rows: int,
    dtype: torch.dtype,
    *,
    scale: float,
    dropout: Dropout,
) -> Tensor:
    """The gradient of a table, [num_rows, D], in two launches; rows that the batch does not read
    are zero.

    Args:
        gradient: of the sum, [n, D].
        packed: a `GradientOrder`'s, in whose order a row's occurrences are added.
        segment: the table's segment of `packed`.
        num_rows: rows of the table.
        dtype: the table's.
        scale: factor of the table's rows.
        dropout: what the forward dropped of them.
    """
    width = gradient.shape[1]
    out = torch.zeros(num_rows, width, dtype=dtype, device=gradient.device)
    header, order, chunks, long_rows = unpack(packed, segment)
    if not gradient.shape[0]:
        return out
    num_partials = 2 * len(order) // CHUNK + 1
    partial = torch.empty(num_partials, width, dtype=torch.float32, device=gradient.device)
    block_d = triton.next_power_of_2(width)
    narrow = min(128, block_d)
    seed = header if dropout.seed is None else dropout.seed
    arrays = (gradient, header, order, chunks, seed, out, partial)
    numbers = (scale, dropout.share, _kept_scale(dropout.share))
    constants = {
        "WIDTH": width,
        "table": dropout.table,
        "DROPOUT": dropout.seed is not None,
        **_tile(max(1, min(8, 2 * _TILE // block_d)), block_d),
    }
    with _on(gradient):
        _chunk_kernel[(min(_PROGRAMS, len(chunks)),)](*arrays, *numbers, **constants)
        grid = (min(_PROGRAMS, len(long_rows)), triton.cdiv(width, narrow))
        inputs = (partial, header, long_rows, out)
        _long_kernel[grid](*inputs, scale, WIDTH=width, BLOCK_K=32, BLOCK_D=narrow, num_warps=4)
    return out


def _kept_scale(id_dropout: float) -> float:
    return 0.0 if id_dropout >= 1 else 1 / (1 - id_dropout)


def _tile(block_k: int, block_d: int) -> dict[str, int]:
    """A tile's sizes and warps: 16 numbers of one array per thread, as long as that needs no more
    than 16 warps; at 32 the registers run out."""
    warps = triton.next_power_of_2(triton.cdiv(block_k * block_d, 16 * 32))
    return {"BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": min(16, max(1, warps))}


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A launch goes to the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
