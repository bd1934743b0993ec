"""How weights lie over ranks and take a step: whole on each (alone, DDP), or spread by DeepSpeed's
ZeRO."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import Batch
from genrec_dist.distributed import launch_check as topology
from genrec_dist.model.genrec import (
    GenRecForConditionalGeneration,
    choose_attention,
    choose_layers,
    choose_loss,
)
from genrec_dist.model.optimizer import build_optimizer

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
)

# What the recipe decides, under its names in a DeepSpeed file.
_DECIDED_BY_RECIPE = ("gradient_clipping", "bf16", "fp16", "optimizer", "scheduler")


@dataclass(frozen=True)
class Fragment:
    """A stretch of one parameter that this rank owns, as a stretch of one of its masters."""

    name: str
    """Of the parameter in the model."""
    start: int
    """First element, counted in the flattened parameter."""
    master: int
    """Place in `Engine.masters`."""
    offset: int
    """First element, counted in the flattened master."""
    numel: int


class Engine(Protocol):
    """One optimiser step, whatever the spread; and what a checkpoint has to know of it."""

    optimizer: torch.optim.AdamW
    """Ours, stepping `masters`; its groups' `lr` counts."""
    masters: list[Tensor]
    """float32, what the optimiser steps: the parameters themselves, or this rank's flat partitions
    of them."""
    fragments_read: list[Fragment]
    """What of the model lies in this rank's masters."""
    fragments: list[Fragment]
    """What of it this rank stores in a checkpoint; over all ranks each element of each parameter
    once."""
    needs_equal_micro_steps: bool
    """Whether a rank with fewer micro-batches than another would leave it waiting."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; at the last one of a step the ranks'
        gradients meet."""

    def loss(self, batch: Batch, label_smoothing: float, tokens_a_target: float = 1.0) -> Tensor:
        """The summed cross-entropy of a micro-batch on the device, in training mode: a float32
        scalar."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the step's loss, which is a sum over micro-batches and
        ranks."""

    def step(self) -> Tensor:
        """Clip, step, forget the gradients; the global gradient norm before clipping. Not finite:
        nothing was stepped or the weights are lost, and the run has to end."""

    def whole(self) -> AbstractContextManager[GenRecForConditionalGeneration]:
        """Collective: the model with the masters' values in float32, for decoding and for
        `best/`."""


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate's state for this recipe; topology comes from the launcher, the rest from the
    recipe.

    Raises ValueError where the launcher's files decide what the recipe decides, or ask for what is
    not supported."""
    precision = {"fp32": "no"}.get(recipe.precision, recipe.precision)
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a GPU: use bf16 or fp32 here")
    on_gpu = torch.accelerator.is_available()
    if not on_gpu:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # what DeepSpeed would find anyway, and warn of
    plugin = _deepspeed_plugin(recipe)
    gloo = [_gloo_for_deepspeed()] if plugin is not None and not on_gpu else None
    accelerator = Accelerator(
        mixed_precision=precision, deepspeed_plugin=plugin, kwargs_handlers=gloo
    )
    # Otherwise from_pretrained would spread a backbone that is still to be read and given its id
    # tables.
    unset_hf_deepspeed_config()
    if accelerator.distributed_type not in SUPPORTED:
        names = ", ".join(str(kind.value) for kind in SUPPORTED)
        raise ValueError(
            f"{accelerator.distributed_type.value}: not supported; launch with one of {names}"
        )
    topology.check(accelerator, recipe.precision)
    return accelerator


def _gloo_for_deepspeed() -> InitProcessGroupKwargs:
    """Plain gloo. Left to itself, DeepSpeed would look for a collective library of its own on a
    CPU, and at each start compile one for ranks of a node, behind a lock that a killed run leaves
    to all later ones."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return InitProcessGroupKwargs(backend="gloo")


def _deepspeed_plugin(recipe: Recipe) -> DeepSpeedPlugin | None:
    """The launcher's DeepSpeed file with the recipe's values put in; None where no DeepSpeed was
    asked for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    if AcceleratorState._shared_state and AcceleratorState().deepspeed_plugin is not None:
        return None  # a second loop of one process, as in tests: the state stands
    if find_spec("deepspeed") is None:
        raise ValueError(
            "DeepSpeed was asked for and is not installed: pip install 'genrec-dist[zero]', or launch with DDP"
        )
    if recipe.precision == "fp16":
        raise ValueError(
            "precision fp16 under DeepSpeed: not supported, its loss scale is in no checkpoint; use bf16"
        )
    plugin = DeepSpeedPlugin()
    source = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "the launcher's DeepSpeed settings")
    config = plugin.deepspeed_config
    for key in _DECIDED_BY_RECIPE:
        found = config.get(key)
        if found not in (None, "auto") and not (
            isinstance(found, dict) and set(found.values()) <= {"auto"}
        ):
            raise ValueError(
                f"{source}: {key} is {found}: the recipe decides it; remove it or write auto"
            )
    config |= {
        # A step's micro-batches are cut by tokens and may differ in number: the loop tells the
        # engine which is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.clip,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }
    if plugin.zero_stage > 0:
        # bf16 sums over micro-batches would lose what small gradients add; stage 0 knows no other.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config.pop("train_batch_size", None)
    config.setdefault("steps_per_print", 2**62)  # it prints to standard output
    return plugin


def make_engine(
    model: GenRecForConditionalGeneration, recipe: Recipe, accelerator: Accelerator
) -> Engine:
    """Put a model on its device and under its optimiser; under DeepSpeed, spread it. Collective."""
    choose_attention(model.to(accelerator.device), recipe.precision)
    choose_loss(model, recipe.head)
    choose_layers(model, recipe.compile == "layers", recipe.recompute)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return Spread(model, recipe, accelerator)
    return Replicated(model, recipe, accelerator)


class Replicated:
    """Whole weights in float32 on each rank; gradients are summed by DDP where there is more than
    one."""

    needs_equal_micro_steps = False

    def __init__(
        self, model: GenRecForConditionalGeneration, recipe: Recipe, accelerator: Accelerator
    ):
        self.model, self.accelerator = model, accelerator
        self.clip = recipe.optimizer.clip or math.inf
        self.optimizer = build_optimizer(model, recipe.optimizer)
        self.prepared, self.prepared_optimizer = accelerator.prepare(model, self.optimizer)
        named = dict(model.named_parameters())
        self.masters: list[Tensor] = list(named.values())
        self.fragments_read = [
            Fragment(name, 0, place, 0, p.numel()) for place, (name, p) in enumerate(named.items())
        ]
        self.fragments = (
            self.fragments_read if accelerator.is_main_process else []
        )  # the others hold the same

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.prepared)

    def loss(self, batch: Batch, label_smoothing: float, tokens_a_target: float = 1.0) -> Tensor:
        self.prepared.train()
        return _loss(self.prepared, batch, label_smoothing, tokens_a_target)

    def backward(self, loss: Tensor) -> None:
        # DDP averages gradients over ranks; the loss is a sum over them.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.clip)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad(set_to_none=True)
        return norm

    @contextlib.contextmanager
    def whole(self) -> Iterator[GenRecForConditionalGeneration]:
        self.model.eval()
        with self.accelerator.autocast():
            yield self.model


class Spread:
    """A DeepSpeed engine of any ZeRO stage, prepared by Accelerate."""

    needs_equal_micro_steps = True

    def __init__(
        self, model: GenRecForConditionalGeneration, recipe: Recipe, accelerator: Accelerator
    ):
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        ours = build_optimizer(model, recipe.optimizer)
        low = recipe.precision != "fp32"
        exact = {
            name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if low
        }
        self.engine, _ = accelerator.prepare(model, ours)
        self.stage = self.engine.zero_optimization_stage()
        # Float32 at stage 0 alone has no wrapper that keeps masters: the parameters are stepped
        # themselves.
        self.wrapped = self.engine.optimizer is not self.engine.basic_optimizer
        self.optimizer = self.engine.basic_optimizer
        for state in self.optimizer.state.values():
            # At stage 0 in bf16 DeepSpeed makes room for the moments by a step without gradients,
            # and AdamW counts it.
            state["step"].zero_()
        self.masters = self._masters()
        self.fragments_read = self._fragments()
        self.fragments = self.fragments_read if self.stage or accelerator.is_main_process else []
        if low:
            self._fill_masters(exact)

    @torch.no_grad()
    def _fill_masters(self, exact: dict[str, Tensor]) -> None:
        """DeepSpeed makes its float32 masters of weights that it has rounded to bf16 before; a
        resume would drift."""
        for fragment in self.fragments_read:
            values = exact[fragment.name].view(-1)[fragment.start : fragment.start + fragment.numel]
            master = self.masters[fragment.master].view(-1)
            master[fragment.offset : fragment.offset + fragment.numel] = values.to(master.device)

    def _masters(self) -> list[Tensor]:
        wrapper = self.engine.optimizer
        if self.stage == 0:
            return [master for _, master in self._pairs()]
        for name in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(wrapper, name):  # ZeRO-3, ZeRO-1 and -2, ZeRO-1 in bf16
                return list(getattr(wrapper, name))
        raise ValueError(
            f"{type(wrapper).__name__} of this DeepSpeed is unknown here: use a version pyproject.toml names"
        )

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Stage 0: (parameter, its master); in float32 the two are one."""
        wrapper = self.engine.optimizer
        if not self.wrapped:
            return [(parameter, parameter) for parameter in self.model.parameters()]
        groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return [pair for ours, masters in groups for pair in zip(ours, masters, strict=True)]

    def _fragments(self) -> list[Fragment]:
        named = self.model.named_parameters()
        if self.stage == 0:
            place = {id(parameter): k for k, (parameter, _) in enumerate(self._pairs())}
            return [Fragment(name, 0, place[id(p)], 0, p.numel()) for name, p in named]
        found = self._zero3_fragment if self.stage == 3 else self._flat_fragment
        return [fragment for name, p in named if (fragment := found(name, p)) is not None]

    def _flat_fragment(self, name: str, parameter: Any) -> Fragment | None:
        """Stages 1 and 2 cut the concatenation of a group's parameters into as many pieces as there
        are ranks."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(name, here.start, mapping.param_group_index, there.start, here.numel)

    def _zero3_fragment(self, name: str, parameter: Any) -> Fragment | None:
        """Stage 3 cuts each parameter into equal pieces, the last one padded."""
        wrapper = self.engine.optimizer
        group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = self.accelerator.process_index * numel
        held = min(numel, parameter.ds_numel - start)
        return Fragment(name, start, group, offset, held) if held > 0 else None

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def loss(self, batch: Batch, label_smoothing: float, tokens_a_target: float = 1.0) -> Tensor:
        self.engine.train()
        return _loss(self.engine, batch, label_smoothing, tokens_a_target)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed, too, averages over ranks what is a sum here.
        self.engine.backward(loss * self.accelerator.num_processes)

    def step(self) -> Tensor:
        norm = None
        if not self.wrapped:  # DeepSpeed would clip as well, and keep the norm to itself
            norm = nn.utils.clip_grad_norm_(
                self.model.parameters(), self.recipe.optimizer.clip or math.inf
            )
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):
            # DeepSpeed has skipped the step and would go on without a word.
            return torch.tensor(math.nan)
        return torch.as_tensor(
            self.engine.get_global_grad_norm() if norm is None else norm, dtype=torch.float32
        )

    @contextlib.contextmanager
    def whole(self) -> Iterator[GenRecForConditionalGeneration]:
        model = self._empty_copy()
        device = self.accelerator.device
        mine = {
            fragment.name: fragment for fragment in self.fragments
        }  # each element once over all ranks
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # A sum of one number and zeros is that number.
                flat = torch.zeros(parameter.numel(), device=device)
                if name in mine:
                    part = mine[name]
                    values = (
                        self.masters[part.master]
                        .detach()
                        .view(-1)[part.offset : part.offset + part.numel]
                    )
                    flat[part.start : part.start + part.numel] = values.to(device)
                dist.all_reduce(flat)
                parameter.copy_(flat.view_as(parameter))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            yield model

    def _empty_copy(self) -> GenRecForConditionalGeneration:
        with torch.device("meta"):
            model = GenRecForConditionalGeneration(self.model.config)
        model.to_empty(device=self.accelerator.device)
        model.tie_weights()
        for (_, ours), (_, theirs) in zip(
            model.named_buffers(), self.model.named_buffers(), strict=True
        ):
            ours.copy_(theirs)
        choose_attention(model, self.recipe.precision)
        return model.eval()


def _loss(prepared: Any, batch: Batch, label_smoothing: float, tokens_a_target: float) -> Tensor:
    summed: Tensor = prepared(
        inputs=batch, label_smoothing=label_smoothing, tokens_per_target=tokens_a_target
    )
    return summed
