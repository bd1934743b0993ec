"""The optimiser step of a run: weights whole on each rank (alone, DDP), or sharded by DeepSpeed's
ZeRO."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import Batch
from genrec_dist.model.causal.kinds import AnyModel, empty_copy, set_up, trained_parameters
from genrec_dist.model.genrec import choose_packing
from genrec_dist.model.low_weights import LowWeights
from genrec_dist.model.optimizer import build_optimizer


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of one parameter, and their place in one of this rank's masters.

    An example: ZeRO-1 on two ranks concatenates parameters a (6 elements) and b (4) into one flat
    tensor and gives each rank half of it as its master 0:

        a: 0 1 2 3 4 | 5      b: 6 7 8 9
           rank 0         rank 1

    Rank 0 has Segment("a", start=0, master=0, offset=0, numel=5); rank 1 has Segment("a", start=5,
    master=0, offset=0, numel=1) and Segment("b", start=0, master=0, offset=1, numel=4).
    """

    name: str
    """Of the parameter in the model."""
    start: int
    """First element, counted in the flattened parameter."""
    master: int
    """Index in `Engine.masters`."""
    offset: int
    """First element, counted in the flattened master."""
    numel: int

    def of(self, masters: list[Tensor]) -> Tensor:
        """A flat view of these elements in the masters, or in tensors of their shapes."""
        return masters[self.master].detach().view(-1)[self.offset : self.offset + self.numel]


class Engine(Protocol):
    """One optimiser step, however the weights are stored; and what a checkpoint has to know."""

    optimizer: torch.optim.AdamW
    """Steps `masters`; the `lr` of its groups counts."""
    masters: list[Tensor]
    """float32, what the optimiser steps: the parameters themselves, or this rank's flat shards of
    them."""
    segments_read: list[Segment]
    """What of the model is in this rank's masters."""
    segments: list[Segment]
    """What this rank stores in a checkpoint; over all ranks each element of each parameter once."""
    needs_equal_micro_steps: bool
    """Whether all ranks must take equally many micro-batches per step."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Context of forward and backward of a micro-batch; in the last one of a step the ranks'
        gradients are summed."""

    def loss(self, batch: Batch, label_smoothing: float, tokens_a_target: float = 1.0) -> Tensor:
        """The summed cross-entropy of a micro-batch on the device, in training mode: a float32
        scalar."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the step's loss, which is a sum over micro-batches and
        ranks."""

    def step(self) -> Tensor:
        """Clip, step and clear the gradients; returns the global gradient norm before clipping. If
        it is not finite, nothing was stepped or the weights are lost, and the run has to end."""

    def whole(self) -> AbstractContextManager[AnyModel]:
        """Collective: the model with the masters' values in float32, for decoding and for
        `best/`."""


def make_engine(model: AnyModel, recipe: Recipe, accelerator: Accelerator) -> Engine:
    """The engine of a model, on its device; under DeepSpeed it shards the model. Collective."""
    if recipe.compile == "layers" and not choose_packing(recipe, accelerator.device):
        raise ValueError(
            "compile layers: it concerns packed micro-batches, and on a GPU they are padded by "
            "default: set packing packed, or compile none"
        )
    set_up(model.to(accelerator.device), recipe)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return Spread(model, recipe, accelerator)
    return Replicated(model, recipe, accelerator)


class Replicated:
    """Whole float32 weights on each rank; DDP sums the gradients of several ranks."""

    needs_equal_micro_steps = False

    def __init__(self, model: AnyModel, recipe: Recipe, accelerator: Accelerator):
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        self.max_grad_norm = recipe.optimizer.max_grad_norm or math.inf
        self.low = LowWeights(model, torch.bfloat16) if _lowers(recipe, accelerator) else None
        self.optimizer = build_optimizer(model, recipe.optimizer)
        self.prepared, self.prepared_optimizer = accelerator.prepare(model, self.optimizer)
        named = trained_parameters(model)
        self.masters: list[Tensor] = list(named.values())
        self.segments_read = [
            Segment(name, start=0, master=number, offset=0, numel=p.numel())
            for number, (name, p) in enumerate(named.items())
        ]
        # The other ranks hold the same.
        self.segments = self.segments_read if accelerator.is_main_process else []

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        unsynced = contextlib.nullcontext() if last else self.accelerator.no_sync(self.prepared)
        with unsynced, _strict(self.recipe.deterministic):
            yield

    def loss(
        self, batch: Batch, label_smoothing: float, tokens_a_target: float | Tensor = 1.0
    ) -> Tensor:
        self.prepared.train()
        with self.low.in_place() if self.low else contextlib.nullcontext():
            return _loss(self.prepared, batch, label_smoothing, tokens_a_target)

    def backward(self, loss: Tensor) -> None:
        # DDP averages gradients over ranks; the loss is a sum over them.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(
            self.prepared.parameters(), self.max_grad_norm
        )
        self.prepared_optimizer.step()
        if self.low:
            self.low.is_fresh = False
        self.prepared_optimizer.zero_grad(set_to_none=True)
        return norm

    @contextlib.contextmanager
    def whole(self) -> Iterator[AnyModel]:
        self.model.eval()
        with self.accelerator.autocast():
            yield self.model


class Spread:
    """A DeepSpeed engine of any ZeRO stage, prepared by Accelerate."""

    needs_equal_micro_steps = True

    def __init__(self, model: AnyModel, recipe: Recipe, accelerator: Accelerator):
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        optimizer = build_optimizer(model, recipe.optimizer)
        named = dict(model.named_parameters())
        frozen = named.keys() - trained_parameters(model).keys()
        kept = named.keys() if recipe.precision != "fp32" else frozen
        exact = {name: named[name].detach().to("cpu", copy=True) for name in kept}
        # What is not trained is in no master: each rank keeps it whole.
        self.frozen = {name: exact.pop(name) for name in frozen}
        self.engine, _ = accelerator.prepare(model, optimizer)
        self.stage = self.engine.zero_optimization_stage()
        # Only stage 0 in float32 has no wrapper that keeps masters: its parameters are stepped.
        self.wrapped = self.engine.optimizer is not self.engine.basic_optimizer
        self.optimizer = self.engine.basic_optimizer
        for state in self.optimizer.state.values():
            # At stage 0 in bf16 DeepSpeed allocates the moments by a step without gradients, which
            # AdamW counts.
            state["step"].zero_()
        self.masters, self.segments_read = self._masters_and_segments()
        self.segments = self.segments_read if self.stage or accelerator.is_main_process else []
        # DeepSpeed makes its float32 masters of weights that it has rounded to bf16 before; a
        # resumed run would drift.
        for segment in self.segments_read if exact else []:
            values = exact[segment.name].view(-1)[segment.start : segment.start + segment.numel]
            segment.of(self.masters).copy_(values)

    def _masters_and_segments(self) -> tuple[list[Tensor], list[Segment]]:
        """The float32 tensors that DeepSpeed's optimiser steps, and the model's segments in
        them."""
        wrapper, named = self.engine.optimizer, trained_parameters(self.model)
        if self.stage == 0:
            pairs = [(parameter, parameter) for parameter in named.values()]
            if self.wrapped:
                groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
                pairs = [pair for group in groups for pair in zip(*group, strict=True)]
            number_of = {id(parameter): number for number, (parameter, _) in enumerate(pairs)}
            segments = [
                Segment(name, start=0, master=number_of[id(p)], offset=0, numel=p.numel())
                for name, p in named.items()
            ]
            return [master for _, master in pairs], segments
        for name in (
            "fp32_partitioned_groups_flat",  # ZeRO-3
            "single_partition_of_fp32_groups",  # ZeRO-1 and -2
            "fp32_groups_flat_partition",  # ZeRO-1 in bf16
        ):
            if hasattr(wrapper, name):
                find = self._zero3_segment if self.stage == 3 else self._flat_segment
                found = [find(parameter_name, p) for parameter_name, p in named.items()]
                masters = list(getattr(wrapper, name))
                return masters, [segment for segment in found if segment is not None]
        raise ValueError(
            f"{type(wrapper).__name__} of this DeepSpeed is unknown here: use a version that "
            "pyproject.toml names"
        )

    def _flat_segment(self, name: str, parameter: Any) -> Segment | None:
        """Of stages 1 and 2, which cut the concatenation of a group's parameters into as many
        shards as there are ranks."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Segment(name, low.start, mapping.param_group_index, high.start, low.numel)

    def _zero3_segment(self, name: str, parameter: Any) -> Segment | None:
        """Of stage 3, which cuts each parameter into equal shards, the last one padded."""
        wrapper = self.engine.optimizer
        group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = self.accelerator.process_index * numel
        held = min(numel, parameter.ds_numel - start)
        return Segment(name, start, group, offset, held) if held > 0 else None

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        with _strict(self.recipe.deterministic):
            yield

    def loss(self, batch: Batch, label_smoothing: float, tokens_a_target: float = 1.0) -> Tensor:
        self.engine.train()
        return _loss(self.engine, batch, label_smoothing, tokens_a_target)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed, too, averages over ranks what is a sum here.
        self.engine.backward(loss * self.accelerator.num_processes)

    def step(self) -> Tensor:
        norm = None
        if not self.wrapped:  # DeepSpeed would clip as well, without giving the norm
            limit = self.recipe.optimizer.max_grad_norm or math.inf
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):
            # DeepSpeed has skipped the step and would go on silently.
            return torch.tensor(math.nan)
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32)

    @contextlib.contextmanager
    def whole(self) -> Iterator[AnyModel]:
        device = self.accelerator.device
        model = empty_copy(self.model, self.recipe, device)
        mine = {segment.name: segment for segment in self.segments}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.frozen:
                    parameter.copy_(self.frozen[name])
                    continue
                # Each element is in the segments of one rank alone, and a sum of one number and
                # zeros is that number.
                flat = torch.zeros(parameter.numel(), device=device)
                if name in mine:
                    start, numel = mine[name].start, mine[name].numel
                    flat[start : start + numel] = mine[name].of(self.masters).to(device)
                dist.all_reduce(flat)
                parameter.copy_(flat.view_as(parameter))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            yield model


def _loss(
    prepared: Any, batch: Batch, label_smoothing: float, tokens_a_target: float | Tensor
) -> Tensor:
    summed: Tensor = prepared(
        inputs=batch, label_smoothing=label_smoothing, tokens_per_target=tokens_a_target
    )
    return summed


def _lowers(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether linear layers get their bf16 weights by one copy. With several ranks DDP sends each
    gradient as soon as it is there, and with all of them at the end nothing would overlap; layers
    that are computed again or compiled take their weights by themselves."""
    alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    plain = recipe.compile == "none" and not recipe.activation_checkpointing
    plain = plain and not recipe.prompt.template
    return alone and plain and recipe.precision == "bf16"


@contextlib.contextmanager
def _strict(deterministic: bool) -> Iterator[None]:
    """Refuse operations whose sums have no fixed order, where the recipe asks for that.

    A warning would not do: attention on a GPU then keeps its faster backward pass, in which they
    have none. Outside of forward and backward, as in validation, a warning does."""
    if deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
