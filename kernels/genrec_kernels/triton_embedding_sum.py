"""The embedding sum in Triton: one pass forward, and row sums in a fixed order backward. No
atomics, no sort."""

# n places, K places of a tile, D width

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec_kernels.gradient_order import CHUNK, parts

WIDEST = 8192
"""A program holds whole rows: the layer norm needs all of one, and no row is read in parts."""

_TILE = 2048  # numbers a program holds of one array
_STRIP = 32  # places whose layer norm gradients one program adds up
_PROGRAMS = 2048  # programs that share a table's row sums; more than a device runs at once, so that all are busy


@triton.jit
def _kept(seed_at, place_K, columns, table: tl.constexpr, dropped):
    """bool [K, columns]: what dropout keeps, a function of the seed, the place, the column and the
    table alone."""
    place_KD = (place_K[:, None] + columns[None, :] * 0).to(tl.uint32)
    column_KD = (place_K[:, None] * 0 + columns[None, :]).to(tl.uint32)
    none_KD = place_KD * 0
    word_KD, _, _, _ = tl.philox(tl.load(seed_at), place_KD, column_KD, none_KD + table, none_KD)
    return tl.uint_to_uniform_float(word_KD) >= dropped


@triton.jit
def _id_term(
    rows_at, table_at, seed_at, place_K, columns, here_K, inside, dropped, kept_scale,
    WIDTH: tl.constexpr, table: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """float32 [K, columns] of an id table. Row 0 is zero: it is not read."""
    row_K = tl.load(rows_at + place_K, mask=here_K, other=0).to(tl.int64)
    mask = ((row_K != 0) & here_K)[:, None] & inside[None, :]
    term_KD = tl.load(
        table_at + row_K[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    if DROPOUT:
        term_KD = tl.where(
            _kept(seed_at, place_K, columns, table, dropped), term_KD * kept_scale, 0.0
        )
    return term_KD


@triton.jit
def _sum_kernel(
    tokens_at, positions_at, users_at, items_at, token_table, position_table, user_table, item_table,
    norm_weight, norm_bias, seed_at, out_at, hat_at, rstd_at,
    num_places, position_offset, scale, dropped, kept_scale, eps,
    WIDTH: tl.constexpr, USERS: tl.constexpr, ITEMS: tl.constexpr, DROPOUT: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    here_K = place_K < num_places
    columns = tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    mask = here_K[:, None] & inside[None, :]
    token_K = tl.load(tokens_at + place_K, mask=here_K, other=0).to(tl.int64)
    position_K = (
        tl.load(positions_at + place_K, mask=here_K, other=0).to(tl.int64) + position_offset
    )
    token_KD = tl.load(
        token_table + token_K[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0
    )
    position_KD = tl.load(
        position_table + position_K[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0
    )
    sum_KD = token_KD.to(tl.float32) * scale + position_KD.to(tl.float32)
    if USERS:
        sum_KD += _id_term(
            users_at,
            user_table,
            seed_at,
            place_K,
            columns,
            here_K,
            inside,
            dropped,
            kept_scale,
            WIDTH,
            0,
            DROPOUT,
        )
    if ITEMS:
        sum_KD += _id_term(
            items_at,
            item_table,
            seed_at,
            place_K,
            columns,
            here_K,
            inside,
            dropped,
            kept_scale,
            WIDTH,
            1,
            DROPOUT,
        )
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
    gradient_at, hat_at, rstd_at, weight_at, out_at, weight_parts, bias_parts, num_places,
    WIDTH: tl.constexpr, STRIP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
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
    gradient_at, header_at, order_at, chunks_at, seed_at, out_at, partial_at, scale, dropped, kept_scale,
    WIDTH: tl.constexpr, table: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
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
            part_KD = tl.load(
                gradient_at + at_KD, mask=here_K[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            if DROPOUT:
                part_KD = tl.where(
                    _kept(seed_at, place_K, columns, table, dropped), part_KD * kept_scale, 0.0
                )
            sum_KD += part_KD
        sum_D = tl.sum(sum_KD, axis=0)
        if target >= 0:
            result_D = (sum_D * scale).to(out_at.dtype.element_ty)
            tl.store(out_at + target.to(tl.int64) * WIDTH + columns, result_D, mask=inside)
        else:
            tl.store(partial_at + (-1 - target).to(tl.int64) * WIDTH + columns, sum_D, mask=inside)


@triton.jit
def _long_kernel(
    partial_at, header_at, longs_at, out_at, scale, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Level 2: the partial sums of each long row. Few rows are long, so columns are shared among
    programs too."""
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    num_longs = tl.load(header_at + 1)
    for long in range(tl.program_id(0), num_longs, tl.num_programs(0)):
        first = tl.load(longs_at + 3 * long)
        count = tl.load(longs_at + 3 * long + 1)
        row = tl.load(longs_at + 3 * long + 2)
        sum_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for start in range(0, count, BLOCK_K):
            nth_K = start + tl.arange(0, BLOCK_K)
            at_KD = (first + nth_K)[:, None].to(tl.int64) * WIDTH + columns[None, :]
            mask = (nth_K < count)[:, None] & inside[None, :]
            sum_KD += tl.load(partial_at + at_KD, mask=mask, other=0.0)
        result_D = (tl.sum(sum_KD, axis=0) * scale).to(out_at.dtype.element_ty)
        tl.store(out_at + row.to(tl.int64) * WIDTH + columns, result_D, mask=inside)


def embedding_sum(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    norm: tuple[Tensor, Tensor] | None,
    seed: Tensor | None,
    *,
    scale: float,
    position_offset: int,
    id_dropout: float,
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(X [..., D] in the token table's type, normalised [n, D], 1 / deviation float32 [n]); the
    last two only with `norm` and `keep`, else empty. `ids`, `tables`: token, position, user, item.
    Contiguous; one launch."""
    token_ids, token_table = ids[0], tables[0]
    assert token_table is not None
    num_places, width = token_ids.numel(), token_table.shape[1]
    out = token_table.new_empty(*token_ids.shape, width)
    kept = keep and norm is not None
    hat = token_table.new_empty((num_places if kept else 0, width))
    rstd = torch.empty(num_places if kept else 0, dtype=torch.float32, device=token_table.device)
    if num_places == 0:
        return out, hat, rstd
    block_d = triton.next_power_of_2(width)
    block_k = max(1, _TILE // block_d)
    weight, bias = norm if norm is not None else (token_table, token_table)
    users, items = tables[2], tables[3]
    with _on(token_table):
        _sum_kernel[(triton.cdiv(num_places, block_k),)](
            *ids, token_table, tables[1], token_table if users is None else users, token_table if items is None else items,
            weight, bias, token_ids if seed is None else seed, out, hat, rstd,
            num_places, position_offset, scale, id_dropout, _kept_scale(id_dropout), norm_eps,
            WIDTH=width, USERS=users is not None, ITEMS=items is not None, DROPOUT=seed is not None, NORM=norm is not None,
            KEEP=kept, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=_warps(block_k * block_d),
        )  # fmt: skip
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
        block_k = max(1, min(_STRIP, _TILE // block_d))
        with _on(hat):
            _norm_kernel[(num_strips,)](
                gradient, hat, rstd, weight, out, weights, biases, num_places,
                WIDTH=width, STRIP=_STRIP, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=_warps(block_k * block_d),
            )  # fmt: skip
    return out, weights.sum(0).to(weight.dtype), biases.sum(0).to(weight.dtype)


def row_sums(
    gradient: Tensor,
    packed: Tensor,
    stretch: Sequence[int],
    num_rows: int,
    dtype: torch.dtype,
    *,
    scale: float,
    seed: Tensor | None,
    id_dropout: float,
    table: int,
) -> Tensor:
    """The gradient of a table, [num_rows, D]: the gradients [n, D] of its rows' occurrences in the
    plan's order, times `scale`; rows without any are zero. `table`: 0 or 1, whose dropout; two
    launches."""
    width = gradient.shape[1]
    out = torch.zeros(num_rows, width, dtype=dtype, device=gradient.device)
    header, order, chunks, longs = parts(packed, stretch)
    if not gradient.shape[0]:
        return out
    partial = torch.empty(
        2 * len(order) // CHUNK + 1, width, dtype=torch.float32, device=gradient.device
    )
    block_d = triton.next_power_of_2(width)
    block_k = max(1, min(8, 2 * _TILE // block_d))
    narrow = min(128, block_d)
    with _on(gradient):
        _chunk_kernel[(min(_PROGRAMS, len(chunks)),)](
            gradient, header, order, chunks, header if seed is None else seed, out, partial,
            scale, id_dropout, _kept_scale(id_dropout),
            WIDTH=width, table=table, DROPOUT=seed is not None, BLOCK_K=block_k, BLOCK_D=block_d,
            num_warps=_warps(block_k * block_d),
        )  # fmt: skip
        _long_kernel[(min(_PROGRAMS, len(longs)), triton.cdiv(width, narrow))](
            partial, header, longs, out, scale, WIDTH=width, BLOCK_K=32, BLOCK_D=narrow, num_warps=4,
        )  # fmt: skip
    return out


def _kept_scale(id_dropout: float) -> float:
    return 0.0 if id_dropout >= 1 else 1 / (1 - id_dropout)


def _warps(numbers: int) -> int:
    """16 numbers of one array a thread, as long as that needs no more than 16 warps: at 32 the
    registers run out."""
    return min(16, max(1, triton.next_power_of_2(triton.cdiv(numbers, 16 * 32))))


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A launch goes to the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
