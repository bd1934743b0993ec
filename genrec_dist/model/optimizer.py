"""AdamW, what it decays, its learning rate, and the running average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from genrec_dist.config.recipe import Optimizer, Stage


def build_optimizer(model: nn.Module, optimizer: Optimizer) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained, in two groups, decayed and not; the learning rate
    is set at every step."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # adapters are trained in its place
            continue
        # An id's row is seen seldom; decay at every step would shrink rare ids towards nothing.
        is_table = "user_embedding" in name or "item_embedding" in name
        is_matrix = parameter.ndim >= 2 and not is_table
        is_decayed = is_matrix if optimizer.decay == "matrices" else optimizer.decay == "all"
        (decayed if is_decayed else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optimizer.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=optimizer.betas, eps=optimizer.eps, fused=True)


def peak_share(stage: Stage, step: int, num_steps: int) -> float:
    """Share of the peak learning rate at a step (0-based) of a stage with `num_steps` steps: linear
    warm-up, then the stage's schedule."""
    warmup = math.ceil(stage.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if stage.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress


class AveragedWeights:
    """An exponential running average of parameters; a growing decay removes the bias of its
    start."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` (0-based) earlier updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; call twice to come back."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


@contextlib.contextmanager
def swapped(average: AveragedWeights | None) -> Iterator[None]:
    """Context in which the average is where the weights are, if there is one: it is scored and
    kept."""
    if average is not None:
        average.swap()
    try:
        yield
    finally:
        if average is not None:
            average.swap()
