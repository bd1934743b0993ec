"""Copies of the linear layers' weights in the type of matrix products, made together once a
step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genrec_dist.model.network import IdProjection


class LowWeights:
    """What autocast gives linear layers, without its casts: it casts each weight and bias in each
    micro-batch, and each gradient back, one launch each, which for small batches on a GPU is two
    launches of five.

    The bits are autocast's. The head, whose weight is also an embedding, and projections of id
    tables stay with autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """Of all linear layers of `model`, which keep their float32 weights as parameters."""
        head = getattr(model, "lm_head", None)
        self.places = [
            (module, name)
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
            if not isinstance(module, IdProjection)
            for name, _ in module.named_parameters(recurse=False)
        ]
        self.masters: list[Tensor] = [module._parameters[name] for module, name in self.places]  # type: ignore[misc]
        self.copies = [torch.empty_like(master, dtype=dtype) for master in self.masters]
        self.is_fresh = False
        """Whether the copies are those of the masters; whoever changes these sets it to False."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters."""
        torch._foreach_copy_(self.copies, self.masters)
        self.is_fresh = True

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the layers compute with the copies; gradients reach the masters."""
        if not self.is_fresh:
            self.refresh()
        lowered = _Lowered.apply(self.copies, *self.masters)
        for (module, name), low in zip(self.places, lowered, strict=True):
            # Found before the parameter of the same name, which stays where it is.
            module.__dict__[name] = low
        try:
            yield
        finally:
            for module, name in self.places:
                del module.__dict__[name]


class _Lowered(torch.autograd.Function):
    """The copies as functions of the masters, all of whose gradients are cast by one copy."""

    @staticmethod
    def forward(ctx: Any, copies: Sequence[Tensor], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.masters = masters
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        made = [
            None if grad is None else torch.empty_like(master)
            for grad, master in zip(grads, ctx.masters, strict=True)
        ]
        targets = [one for one in made if one is not None]
        if targets:
            torch._foreach_copy_(targets, [grad for grad in grads if grad is not None])
        return None, *made
