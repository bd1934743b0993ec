"""The kernels as operators of torch: what autograd and torch.compile see of them. Triton is
imported at the first call."""

# n places, D width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec_kernels.gradient_order import GradientOrder
from genrec_kernels.torch_reference import EmbeddingTables


def embedding_sum(
    ids: tuple[Tensor, ...],
    tables: EmbeddingTables,
    seed: Tensor | None,
    order: GradientOrder | None,
    *,
    keep: bool,
) -> Tensor:
    """The kernel as one operator, differentiable by the tables and the norm.

    Args:
        ids: token, position, user, item; integers [B, L] or [n].
        tables: already projected.
        seed: int64 [1], of the dropout; None: nothing is dropped.
        order: of the backward; None where nothing learns.
        keep: whether the backward will need the normalised rows.
    """
    present = [tables.token, tables.position, tables.user, tables.item]
    arrays = [None if array is None else array.contiguous() for array in (*ids, *present)]
    norm = (tables.norm_weight, tables.norm_bias)
    plan = (None, []) if order is None else (order.packed, order.sizes())
    numbers = (tables.scale, tables.position_offset, tables.id_dropout, tables.norm_eps)
    out: Tensor = _embedding_sum(*arrays, *norm, seed, *plan, *numbers, keep)[0]
    return out


@torch.library.custom_op(
    "genrec::embedding_sum",
    mutates_args=(),
    schema="(Tensor token_ids, Tensor position_ids, Tensor user_rows, Tensor item_rows, "
    "Tensor token_table, Tensor position_table, Tensor? user_table, Tensor? item_table, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, Tensor? packed, int[] sizes, "
    "float scale, int position_offset, float id_dropout, float norm_eps, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
)
def _embedding_sum(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_embedding_sum.embedding_sum`; `packed` and `sizes` are for the backward alone."""
    from genrec_kernels import triton_embedding_sum as triton_sum

    norm_weight, norm_bias, seed, _packed, _sizes, scale, offset, dropout, eps, keep = inputs[8:]
    token, position, user, item = inputs[4:8]
    tables = EmbeddingTables(
        token=token,
        position=position,
        user=user,
        item=item,
        scale=scale,
        position_offset=offset,
        id_dropout=dropout,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=eps,
    )
    return triton_sum.embedding_sum(inputs[:4], tables, seed, keep=keep)


@_embedding_sum.register_fake
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
    """`triton_embedding_sum.norm_backward`."""
    from genrec_kernels import triton_embedding_sum as triton_sum

    return triton_sum.norm_backward(gradient, hat, rstd, weight)


@norm_backward.register_fake
def _(gradient: Tensor, hat: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gradient), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op(
    "genrec::row_sums",
    mutates_args=(),
    schema="(Tensor gradient, Tensor packed, int[] segment, SymInt num_rows, ScalarType dtype, "
    "float scale, Tensor? seed, float id_dropout, int table) -> Tensor",
)
def row_sums(*inputs: Any) -> Tensor:
    """`triton_embedding_sum.row_sums`."""
    from genrec_kernels import triton_embedding_sum as triton_sum

    scale, seed, id_dropout, table = inputs[5:]
    dropout = triton_sum.Dropout(seed, share=id_dropout, table=table)
    return triton_sum.row_sums(*inputs[:5], scale=scale, dropout=dropout)


@row_sums.register_fake
def _(gradient: Tensor, *others: Any) -> Tensor:
    num_rows, dtype = others[2:4]
    return gradient.new_empty(num_rows, gradient.shape[1], dtype=dtype)


def _keep_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    tables, norm_weight, (seed, packed, sizes, scale) = inputs[4:8], inputs[8], inputs[10:14]
    ctx.save_for_backward(norm_weight, seed, packed, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # The tables' sizes alone: ZeRO-3 may take the tables away until the backward.
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
        (num_rows, dtype), segment = table, ctx.sizes[4 * number : 4 * number + 4]
        scale = ctx.scale if number == 0 else 1.0
        dropout = (seed, ctx.id_dropout) if number >= 2 else (None, 0.0)
        grad = row_sums(summed, packed, segment, num_rows, dtype, scale, *dropout, number % 2)
        grads.append(grad)
    return (None,) * 4 + tuple(grads) + norm + (None,) * 8


torch.library.register_autograd(
    "genrec::embedding_sum", _backward, setup_context=_keep_for_backward
)
