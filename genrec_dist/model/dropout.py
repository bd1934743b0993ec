"""Dropout, and its sum with what it is added to, in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEVELS = 1 << 16
"""A CPU decides by 16 random bits: probabilities are rounded to multiples of 1 / 65,536."""


def drop(values: Tensor, share: float, training: bool) -> Tensor:
    """Zero this share of the values at random and scale up the others, as
    `torch.nn.functional.dropout`."""
    if not training or share == 0:
        return values
    if values.is_cuda or torch.compiler.is_compiling():
        return F.dropout(values, share)
    dropped: Tensor = _Drop.apply(values, share)
    return dropped


def add_dropped(base: Tensor, values: Tensor, share: float, training: bool) -> Tensor:
    """`base + drop(values)`, in the type of `base`."""
    if not training or share == 0:
        return base + values
    if values.is_cuda or torch.compiler.is_compiling():
        return base + F.dropout(values, share)
    total: Tensor = _AddDropped.apply(base, values, share)
    return total


def keep_mask(shape: torch.Size, share: float) -> tuple[Tensor, float]:
    """(bool, True where a value is kept; the factor of kept values), by torch's CPU generator.

    Four decisions per random word of 64 bits: `bernoulli_` makes its numbers one at a time and
    takes five times as long, which is a seventh of a training step (docs/log.md)."""
    numel = shape.numel()
    words = torch.empty(-(-numel // 4), dtype=torch.int64).random_(-(2**63), None)
    bar = round(share * LEVELS)
    kept = words.view(torch.int16)[:numel] >= bar - LEVELS // 2
    return kept.view(shape), LEVELS / max(LEVELS - bar, 1)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        kept, ctx.factor = keep_mask(values.shape, share)
        ctx.save_for_backward(kept)
        return (values * kept).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.factor), None


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, values: Tensor, share: float) -> Tensor:
        kept, ctx.factor = keep_mask(values.shape, share)
        ctx.save_for_backward(kept)
        ctx.dtype = values.dtype
        return torch.addcmul(base, values, kept, value=ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return grad, (grad.to(ctx.dtype) * kept).mul_(ctx.factor), None
