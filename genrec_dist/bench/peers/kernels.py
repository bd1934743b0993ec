"""The embedding sum by eager torch, torch.compile and atomics, and the cases that all sum."""

# n places, D width, R rows of a table

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from genrec_kernels import (
    EmbeddingTables,
    GradientOrder,
    Rows,
    embedding_sum,
    make_gradient_order,
    wants_gradient_order,
)
from torch import Tensor
from torch.nn import functional as F

from genrec_dist.bench.synthetic import PAD

OURS, EAGER, COMPILED, CLONE = "ours", "eager", "torch.compile", "clone() of the same bytes"
ATOMICS = "atomics"
TABLES = ("token", "position", "user", "item")
ZERO_ROWS = (PAD, None, 0, 0)
"""The row of each table that gets no gradient."""


@dataclass(frozen=True)
class Shape:
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"d={self.width} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Case:
    """One set of inputs on its device."""

    ids: list[Tensor]
    """Rows of token, position, user and item tables, int64 [n]."""
    tables: list[Tensor]
    norm: list[Tensor]
    """Weight and bias of the layer norm, or nothing."""
    gradient: Tensor
    plan: GradientOrder | None
    """As a data worker makes it, where the device's kernel wants one."""

    @property
    def learned(self) -> list[Tensor]:
        return [*self.tables, *self.norm]


def make_case(
    ids: list[Tensor], rows: Sequence[int], shape: Shape, norm: bool, device: torch.device
) -> Case:
    """The ids with random tables of `rows` rows and a random gradient."""
    dice = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=dice, device=device).to(shape.dtype)

    arrays = (one.numpy() for one in ids)
    plan = make_gradient_order(list(map(Rows, TABLES, arrays, rows, ZERO_ROWS)))
    tables = [draw(size, shape.width).mul_(0.02) for size in rows]
    tables[2][0] = tables[3][0] = 0
    learned = [1 + 0.1 * draw(shape.width), 0.1 * draw(shape.width)] if norm else []
    return Case(
        ids=[one.to(device) for one in ids],
        tables=[one.requires_grad_() for one in tables],
        norm=[one.requires_grad_() for one in learned],
        gradient=draw(len(ids[0]), shape.width),
        plan=plan.to(device) if wants_gradient_order(device.type) else None,
    )


# The rivals: each takes a case and gives the sum.


Rival = Callable[[Case], Tensor]


def ours(case: Case) -> Tensor:
    weight, bias = case.norm or (None, None)
    token, position, user, item = case.tables
    tables = EmbeddingTables(
        token=token, position=position, user=user, item=item, pad_token_id=PAD,
        norm_weight=weight, norm_bias=bias,
    )  # fmt: skip
    tokens, positions, users, items = case.ids
    return embedding_sum(tokens, positions, users, items, tables, order=case.plan)


def plain(ids: list[Tensor], tables: list[Tensor], norm: list[Tensor]) -> Tensor:
    """As anybody writes it: what eager torch runs and torch.compile is given."""
    first, *more = zip(ids, tables, ZERO_ROWS, strict=True)
    summed = F.embedding(first[0], first[1], padding_idx=first[2])
    for rows, table_RD, zero_row in more:
        summed = summed + F.embedding(rows, table_RD, padding_idx=zero_row)
    return normed(summed, norm)


def normed(summed: Tensor, norm: list[Tensor]) -> Tensor:
    return F.layer_norm(summed, summed.shape[-1:], norm[0], norm[1]) if norm else summed


class _AtomicEmbedding(torch.autograd.Function):
    """A lookup whose backward is `index_add_`, which on a GPU adds by atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table_RD: Tensor, zero_row: int | None) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.zero_row = table_RD.shape, zero_row
        return table_RD[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (rows,) = ctx.saved_tensors
        summed_RD = gradient.new_zeros(ctx.shape).index_add_(0, rows, gradient)
        if ctx.zero_row is not None:
            summed_RD[ctx.zero_row] = 0
        return None, summed_RD, None


def by_atomics(case: Case) -> Tensor:
    parts = map(_AtomicEmbedding.apply, case.ids, case.tables, ZERO_ROWS)
    summed = sum(parts, start=torch.zeros_like(case.gradient))
    return normed(summed, case.norm)


def make_rivals(device: torch.device) -> dict[str, Rival]:
    # Each shape is compiled for itself: left alone, the second would be compiled for any size.
    torch._dynamo.reset()
    compiled = torch.compile(plain, dynamic=False)
    rivals: dict[str, Rival] = {
        OURS: ours,
        EAGER: lambda case: plain(case.ids, case.tables, case.norm),
        COMPILED: lambda case: compiled(case.ids, case.tables, case.norm),
    }
    return {**rivals, ATOMICS: by_atomics} if device.type == "cuda" else rivals


def forward_alone(rival: Rival, case: Case) -> object:
    with torch.no_grad():
        return rival(case)


def forward_and_backward(rival: Rival, case: Case) -> list[Tensor]:
    """The sum, then the gradients of tables and layer norm."""
    summed = rival(case)
    return [summed.detach(), *torch.autograd.grad(summed, case.learned, case.gradient)]
