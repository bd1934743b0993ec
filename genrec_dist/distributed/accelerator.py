"""Accelerate's state for a recipe: what of a run the launcher decides, and what the recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations import unset_hf_deepspeed_config

from genrec_dist.distributed import launch_check

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
)

# What the recipe decides, by its keys in a DeepSpeed file.
_DECIDED_BY_RECIPE = ("gradient_clipping", "bf16", "fp16", "optimizer", "scheduler")


class Settings(Protocol):
    """What of a recipe is read here."""

    @property
    def precision(self) -> str: ...
    @property
    def optimizer(self) -> Any: ...


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Have torch warn of operations whose sums have no fixed order, where that is wanted; what was
    set before is set again at the end. Enter it before the first use of a GPU."""
    if not wanted:
        yield
        return
    # Read when cuBLAS starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = options.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every element that is read has been written: filling it before costs time alone.
    options.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        options.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


def make_accelerator(recipe: Settings) -> Accelerator:
    """Accelerate's state for this recipe; topology comes from the launcher, the rest from the
    recipe. Raises ValueError where the launcher's files decide what the recipe decides, or ask for
    what is not supported."""
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a GPU: use bf16 or fp32 here")
    on_gpu = torch.accelerator.is_available()
    launch_check.name_device_to_deepspeed()
    plugin = _deepspeed_plugin(recipe)
    handlers = None
    if plugin is not None and not on_gpu:
        # Plain gloo. Otherwise DeepSpeed would look for a collective library of its own on a CPU,
        # and at each start compile one for the ranks of a node, under a lock that a killed run
        # leaves to all later ones.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        handlers = [InitProcessGroupKwargs(backend="gloo")]
    if AcceleratorState._shared_state and AcceleratorState().deepspeed_plugin is None:
        # An earlier run of this process, in a notebook or a sweep, may have had another precision.
        AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(recipe.precision, recipe.precision)
    accelerator = Accelerator(
        mixed_precision=precision, deepspeed_plugin=plugin, kwargs_handlers=handlers
    )
    # Otherwise from_pretrained would shard a backbone before it has its weights and id tables.
    unset_hf_deepspeed_config()
    if accelerator.distributed_type not in SUPPORTED:
        names = ", ".join(str(kind.value) for kind in SUPPORTED)
        raise ValueError(
            f"{accelerator.distributed_type.value}: not supported; launch with one of {names}"
        )
    launch_check.check(accelerator, recipe.precision)
    return accelerator


def _deepspeed_plugin(recipe: Settings) -> DeepSpeedPlugin | None:
    """The launcher's DeepSpeed file with the recipe's values put in; None where no DeepSpeed was
    asked for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    if AcceleratorState._shared_state and AcceleratorState().deepspeed_plugin is not None:
        return None  # a second loop in one process, as in tests: accelerate keeps its state
    if find_spec("deepspeed") is None:
        raise ValueError(
            "DeepSpeed was asked for and is not installed: pip install 'genrec-dist[zero]', or "
            "launch with DDP"
        )
    if recipe.precision == "fp16":
        raise ValueError(
            "precision fp16 under DeepSpeed: not supported, its loss scale is in no checkpoint; "
            "use bf16"
        )
    plugin = DeepSpeedPlugin()
    source = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "the launcher's DeepSpeed settings")
    config = plugin.deepspeed_config
    for key in _DECIDED_BY_RECIPE:
        found = config.get(key)
        values = list(found.values()) if isinstance(found, dict) else [found]
        if any(value not in (None, "auto") for value in values):
            raise ValueError(
                f"{source}: {key} is {found}: the recipe decides it; remove it or write auto"
            )
    config |= {
        # Micro-batches are cut by tokens, so their number varies from step to step: the loop tells
        # the engine which is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }
    if plugin.zero_stage > 0:
        # bf16 sums over micro-batches would lose small gradients; stage 0 has no other dtype.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config.pop("train_batch_size", None)
    config.setdefault("steps_per_print", 2**62)  # it prints to standard output
    return plugin
