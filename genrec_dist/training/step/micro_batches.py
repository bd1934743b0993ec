"""What `micro_batch_tokens: auto` is on a run's devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from genrec_shards.dataset import Dataset

from genrec_dist.config.load import with_values
from genrec_dist.config.recipe import MICRO_BATCH, Recipe
from genrec_dist.config.validate import foretold_problem
from genrec_dist.data.word_table import WordTable
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.estimate.memory.fit import GIB, RankMemory, usual_micro_batch
from genrec_dist.estimate.memory.state import METHODS, Method, ZeroSettings, settings_in
from genrec_dist.estimate.samples import catalogue_of, stage_samples
from genrec_dist.estimate.sizes import TextSizes, count_parameters
from genrec_dist.model.causal.kinds import AnyModel
from genrec_dist.model.genrec import GenRecForConditionalGeneration


@dataclass(frozen=True)
class Devices:
    """What of a run's devices decides its micro-batches."""

    method: Method = "ddp"
    settings: ZeroSettings | None = None
    """Of DeepSpeed's file."""
    processes: int = 1
    free: int | None = None
    """Bytes that are free on the smallest card; None: on no card."""

    @classmethod
    def of(cls, accelerator: Accelerator, ranks: Ranks) -> Devices:
        """Of a run before its model is on them. Collective."""
        plugin, device = accelerator.deepspeed_plugin, accelerator.device
        method: Method = "ddp"
        settings = None
        if plugin is not None:
            zero = plugin.deepspeed_config.get("zero_optimization", {})
            offloads = any(_is_on_host(zero, part) for part in ("optimizer", "param"))
            names = (f"zero{plugin.zero_stage}" + "_offload" * offloads, f"zero{plugin.zero_stage}")
            method = next(each for name in names for each in METHODS if each == name)
            settings = settings_in(plugin.deepspeed_config)
        mine = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else -1
        free = min(theirs for (theirs,) in ranks.exchange([mine]))
        return cls(method, settings, ranks.size, None if free < 0 else free)

    @classmethod
    def of_this_process(cls) -> Devices:
        """Of one process alone."""
        on_gpu = torch.cuda.is_available()
        return cls(free=torch.cuda.mem_get_info()[0] if on_gpu else None)


def _is_on_host(zero: dict[str, object], name: str) -> bool:
    found = zero.get(f"offload_{name}")
    return isinstance(found, dict) and found.get("device", "none") != "none"


def memory_of(
    recipe: Recipe,
    dataset: Dataset,
    words: WordTable,
    model: GenRecForConditionalGeneration,
    processes: int,
) -> RankMemory:
    """What `genrec plan` foretells, by the data and the model of a run."""
    text = None
    if model.item_text is not None:
        text = TextSizes(*model.item_text.vectors_NF.shape)
    return RankMemory(
        recipe=recipe,
        config=model.config,
        counts=count_parameters(recipe, model.config, text),
        samples=stage_samples(recipe, catalogue_of(recipe, dataset, words)),
        gpus=processes,
    )


def settle_micro_batches(
    recipe: Recipe, dataset: Dataset, words: WordTable, model: AnyModel, devices: Devices
) -> tuple[Recipe, str]:
    """The recipe with a number in place of `micro_batch_tokens: auto`, and why it is this one; ""
    where the recipe gives a number.

    Args:
        recipe: of the run.
        dataset: its data.
        words: of items and users.
        model: the run's.
        devices: of all ranks, so that they agree.

    Raises:
        ValueError: if a GPU does not hold one longest sample.
    """
    if MICRO_BATCH not in recipe.auto_keys:
        return recipe, ""
    if devices.free is None:
        tokens, reason = usual_micro_batch(recipe), "the usual number on a CPU"
    elif not isinstance(model, GenRecForConditionalGeneration) or foretold_problem(recipe):
        tokens, reason = usual_micro_batch(recipe), f"the usual number; {foretold_problem(recipe)}"
    else:
        memory = memory_of(recipe, dataset, words, model, devices.processes)
        tokens = memory.micro_batch_tokens(devices.method, devices.free, devices.settings)
        reason = "a whole step" if tokens >= memory.step_tokens else "as many as fit"
        reason += f"; {devices.free / GIB:.1f} GiB are free on the smallest card"
    return with_values(recipe, {MICRO_BATCH: tokens}), f"{MICRO_BATCH} {tokens:,}: {reason}"
