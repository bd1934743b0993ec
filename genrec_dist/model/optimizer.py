"""AdamW, what it decays, its learning rate, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genrec_dist.config.recipe import Optimizer, Stage


def build_optimizer(model: nn.Module, optimizer: Optimizer) -> torch.optim.AdamW:
    """AdamW over all parameters in two groups, decayed and not; the learning rate is set at every
    step."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if _is_decayed(name, parameter, optimizer) else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optimizer.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )


def _is_decayed(name: str, parameter: Tensor, optimizer: Optimizer) -> bool:
    if optimizer.decay != "matrices":
        return optimizer.decay == "all"
    # An id's row is seen seldom; decay at every step would shrink rare ids towards nothing.
    return parameter.ndim >= 2 and "user_embedding" not in name and "item_embedding" not in name


def peak_share(stage: Stage, step: int, num_steps: int) -> float:
    """Share of the peak learning rate at a step (0-based) of a stage with `num_steps` steps: linear
    warm-up, then its law."""
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
    """An exponential running average of parameters, with the bias of its start removed by a growing
    decay."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (0-based) updates of the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; call twice to come back."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)
