"""Inputs of the embedding sum, and the sum as anyone writes it, of torch's own lookups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from genrec_kernels import EmbeddingTables, GradientOrder, Rows, make_gradient_order
from torch import Tensor
from torch.nn import functional as F

PAD, OFFSET = 1, 2
NAMES = ("token", "position", "user", "item", "norm_weight", "norm_bias")


@dataclass
class Case:
    """Ids on the CPU: token, position, user, item; tables in fp64, by their names in
    `EmbeddingTables`."""

    ids: list[Tensor]
    weights: dict[str, Tensor]
    gradient: Tensor
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def tables(self, dtype: torch.dtype, device: str = "cpu", **more: Any) -> EmbeddingTables:
        weights = {name: one.to(device, dtype) for name, one in self.weights.items()}
        given = {"scale": self.scale, "position_offset": OFFSET, "pad_token_id": PAD}
        return EmbeddingTables(**{**weights, **given, **self.options, **more})

    def order(self, device: str = "cpu") -> GradientOrder:
        tokens, positions, users, items = (rows.numpy() for rows in self.ids)
        sizes = [len(self.weights[name]) for name in NAMES[:4]]
        tables = [
            Rows("token", tokens, sizes[0], PAD),
            Rows("position", positions + OFFSET, sizes[1]),
            Rows("user", users, sizes[2], 0),
            Rows("item", items, sizes[3], 0),
        ]
        return make_gradient_order(tables).to(torch.device(device))

    def run(
        self, sum_of: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu", **more: Any
    ) -> list[Tensor]:
        """[X, gradient of each weight] in `dtype`."""
        tables = self.tables(dtype, device)
        learned = [getattr(tables, name).requires_grad_() for name in self.weights]
        summed = sum_of(*(rows.to(device) for rows in self.ids), tables, **more)
        assert summed.dtype == dtype
        assert summed.shape == (*self.ids[0].shape, self.weights["token"].shape[1])
        return [summed.detach(), *torch.autograd.grad(summed, learned, self.like(summed))]

    def like(self, summed: Tensor) -> Tensor:
        return self.gradient.to(summed.device, summed.dtype)

    def reshaped(self, *shape: int) -> Case:
        """The first places, in another shape."""
        size = int(np.prod(shape))
        ids = [rows.reshape(-1)[:size].view(shape) for rows in self.ids]
        gradient = self.gradient.flatten(0, -2)[:size].view(*shape, self.gradient.shape[-1])
        return replace(self, ids=ids, gradient=gradient)


def make_case(
    shape: tuple[int, ...],
    width: int,
    *,
    norm: bool = False,
    scale: float = 1.0,
    hot: float = 0.3,
    seed: int = 0,
) -> Case:
    """A hot sub-word, padding, positions in order, and a user or an item or neither at a place."""
    dice = np.random.default_rng(seed)
    sizes = {"token": 37, "position": 300, "user": 5, "item": 19}
    tokens = np.where(dice.random(shape) < hot, 7, dice.integers(0, sizes["token"], shape))
    tokens[dice.random(shape) < 0.1] = PAD
    positions = np.broadcast_to(np.arange(shape[-1]) % (sizes["position"] - OFFSET), shape).copy()
    kind = dice.integers(0, 3, shape)
    users = dice.integers(1, sizes["user"], shape) * (kind == 1)
    items = dice.integers(1, sizes["item"], shape) * (kind == 2)
    weights = {name: dice.standard_normal((rows, width)) for name, rows in sizes.items()}
    weights["user"][0] = weights["item"][0] = 0
    if norm:
        weights |= {name: dice.standard_normal(width) for name in NAMES[4:]}
    return Case(
        ids=[torch.from_numpy(rows) for rows in (tokens, positions, users, items)],
        weights={name: torch.from_numpy(one) for name, one in weights.items()},
        gradient=torch.from_numpy(dice.standard_normal((*shape, width))),
        scale=scale,
    )


def plain_sum(
    tokens: Tensor, positions: Tensor, users: Tensor, items: Tensor, tables: EmbeddingTables
) -> Tensor:
    """Equation 2 of the paper."""
    summed = F.embedding(tokens, tables.token, padding_idx=tables.pad_token_id) * tables.scale
    summed = summed + F.embedding(positions + tables.position_offset, tables.position)
    summed = summed + F.embedding(users, tables.user, padding_idx=0)
    summed = summed + F.embedding(items, tables.item, padding_idx=0)
    if tables.norm_weight is None:
        return summed
    weight, bias = tables.norm_weight, tables.norm_bias
    return F.layer_norm(summed, weight.shape, weight, bias, tables.norm_eps)


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
