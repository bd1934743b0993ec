"""The kernels as operators of torch: what autograd and torch.compile see of them. Triton is
imported at the first call."""

# n places, D width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "genrec::embedding_sum",
    mutates_args=(),
    schema="(Tensor token_ids, Tensor position_ids, Tensor user_rows, Tensor item_rows, Tensor token_table, "
    "Tensor position_table, Tensor? user_table, Tensor? item_table, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, "
    "Tensor? packed, int[] sizes, float scale, int position_offset, float id_dropout, float norm_eps, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
)
def embedding_sum(
    token_ids: Tensor,
    position_ids: Tensor,
    user_rows: Tensor,
    item_rows: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    user_table: Tensor | None,
    item_table: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    packed: Tensor | None,
    sizes: list[int],
    scale: float,
    position_offset: int,
    id_dropout: float,
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_sum.embedding_sum`. `packed`, `sizes`: a SumPlan's, which the backward alone
    reads."""
    from genrec_kernels import triton_embedding_sum as triton_sum

    return triton_sum.embedding_sum(
        (token_ids, position_ids, user_rows, item_rows),
        (token_table, position_table, user_table, item_table),
        None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias),
        seed,
        scale=scale,
        position_offset=position_offset,
        id_dropout=id_dropout,
        norm_eps=norm_eps,
        keep=keep,
    )


@embedding_sum.register_fake
def _(token_ids: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    token_table, norm_weight, keep = others[3], others[7], others[-1]
    width = token_table.shape[1]
    kept = token_ids.numel() if keep and norm_weight is not None else 0
    return (
        token_table.new_empty(*token_ids.shape, width),
        token_table.new_empty(kept, width),
        token_table.new_empty(kept, dtype=torch.float32),
    )


@torch.library.custom_op(
    "genrec::norm_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor hat, Tensor rstd, Tensor weight) -> (Tensor, Tensor, Tensor)",
)
def norm_backward(
    gradient: Tensor, hat: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_sum.norm_backward`."""
    from genrec_kernels import triton_embedding_sum as triton_sum

    return triton_sum.norm_backward(gradient, hat, rstd, weight)


@norm_backward.register_fake
def _(gradient: Tensor, hat: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gradient), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op(
    "genrec::row_sums",
    mutates_args=(),
    schema="(Tensor gradient, Tensor packed, int[] stretch, SymInt num_rows, ScalarType dtype, float scale, Tensor? seed, "
    "float id_dropout, int table) -> Tensor",
)
def row_sums(
    gradient: Tensor,
    packed: Tensor,
    stretch: list[int],
    num_rows: int,
    dtype: torch.dtype,
    scale: float,
    seed: Tensor | None,
    id_dropout: float,
    table: int,
) -> Tensor:
    """`triton_sum.row_sums`."""
    from genrec_kernels import triton_embedding_sum as triton_sum

    return triton_sum.row_sums(
        gradient,
        packed,
        stretch,
        num_rows,
        dtype,
        scale=scale,
        seed=seed,
        id_dropout=id_dropout,
        table=table,
    )


@row_sums.register_fake
def _(
    gradient: Tensor,
    packed: Tensor,
    stretch: list[int],
    num_rows: int,
    dtype: torch.dtype,
    *others: Any,
) -> Tensor:
    return gradient.new_empty(num_rows, gradient.shape[1], dtype=dtype)


def _keep_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    tables, norm_weight, (seed, packed, sizes, scale) = inputs[4:8], inputs[8], inputs[10:14]
    ctx.save_for_backward(norm_weight, seed, packed, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.tables = [None if table is None else (table.shape[0], table.dtype) for table in tables]
    ctx.sizes, ctx.scale, ctx.id_dropout = sizes, scale, inputs[15]


def _backward(ctx: Any, gradient: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    norm_weight, seed, packed, hat, rstd = ctx.saved_tensors
    summed = gradient.reshape(-1, gradient.shape[-1]).contiguous()
    norm: tuple[Tensor | None, Tensor | None] = (None, None)
    if norm_weight is not None:
        summed, *rest = norm_backward(summed, hat, rstd, norm_weight)
        norm = (rest[0], rest[1])
    grads: list[Tensor | None] = []
    for number, table in enumerate(ctx.tables):
        if table is None or not ctx.needs_input_grad[4 + number]:
            grads.append(None)
            continue
        (num_rows, dtype), sizes = table, ctx.sizes[4 * number : 4 * number + 4]
        scale = ctx.scale if number == 0 else 1.0
        dropped = (seed, ctx.id_dropout) if number >= 2 else (None, 0.0)
        grads.append(row_sums(summed, packed, sizes, num_rows, dtype, scale, *dropped, number % 2))
    return (None,) * 4 + tuple(grads) + norm + (None,) * 8


torch.library.register_autograd(
    "genrec::embedding_sum", _backward, setup_context=_keep_for_backward
)
