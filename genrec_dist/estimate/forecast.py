"""What a recipe needs before a GPU is rented: which method fits, the largest micro-batch, the time,
and advice."""

# L input tokens, T target tokens

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from genrec_shards.splits import num_held_out

from genrec_dist.config.load import with_values
from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.recipe import MICRO_BATCH, Recipe
from genrec_dist.config.validate import foretold_problem
from genrec_dist.data.batch import Work
from genrec_dist.data.fit_recipe import DataFacts, fit_recipe, resolve_recipe
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.hardware import CARDS, MEMORIES
from genrec_dist.estimate.memory.activations import MicroBatch
from genrec_dist.estimate.memory.fit import (
    GIB,
    RESERVE_GIB,
    Fit,
    RankMemory,
    usual_micro_batch,
)
from genrec_dist.estimate.memory.state import METHODS, Method, ZeroSettings, read_settings
from genrec_dist.estimate.rates import CPU, card_rates, cpu_rates, given_rates
from genrec_dist.estimate.samples import (
    ASSUMED_ITEMS,
    Catalogue,
    Samples,
    read_catalogue,
    stage_samples,
)
from genrec_dist.estimate.sizes import ParameterCounts, TextSizes, build_config, count_parameters
from genrec_dist.estimate.step_time import StepSetup, StepTime, draw, products, step_time
from genrec_dist.model.genrec import GenRecConfig, choose_packing

MOST_GPUS, MOST_GIB, MOST_ROWS = 65_536, 65_536, 2**31 - 1
"""Sizes beyond those of any machine or data, which are refused."""
ASSUMED_GIB = 24.0
"""Memory of a GPU where neither it nor a card is named."""
BY_COST: tuple[Method, ...] = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
"""From the fastest to the slowest; stage 0 holds no less than DDP."""


@dataclass(frozen=True)
class Duration:
    epoch_seconds: float
    total_seconds: float
    step: StepTime
    """Of one process; the others take as long."""
    assumption: str


@dataclass(frozen=True)
class Forecast:
    recipe: Recipe
    gpus: int
    memory_gib: float
    sizes: ParameterCounts
    catalogue: Catalogue
    samples: list[Samples]
    fits: list[Fit]
    step_flops: dict[str, float]
    """Floating-point operations of a step over all GPUs, by stage, padding left out."""
    duration: dict[str, Duration]

    @property
    def limit(self) -> float:
        """Bytes that may be used."""
        return (self.memory_gib - RESERVE_GIB) * GIB


def forecast(
    recipe: Recipe,
    *,
    gpus: int = 1,
    memory_gib: float | None = None,
    users: int | None = None,
    items: int | None = None,
    zero_files: Path | None = None,
    card: str | None = None,
    tflops: float | None = None,
) -> Forecast:
    """Estimate memory and time of a recipe; nothing is trained, downloaded or written.

    Args:
        recipe: What is to be trained.
        gpus: GPUs that the run is spread over.
        memory_gib: GiB of each; None: of `card`, or `ASSUMED_GIB`.
        users: With `items`, sizes in place of the recipe's data directory.
        items: See `users`.
        zero_files: Directory of zero0.json ... whose bucket sizes count.
        card: Name of a card whose published peak gives the time.
        tflops: TFLOP/s that a GPU really reaches, in place of `card`.

    Raises:
        ValueError: Where sizes are missing or do not fit, or the model has a prompt or
            is a T5.
    """
    if not 1 <= gpus <= MOST_GPUS:
        raise ValueError(f"--gpus {gpus}: it has to be from 1 to {MOST_GPUS:,}")
    if memory_gib is None:
        memory_gib = MEMORIES.get(card or "", ASSUMED_GIB)
    if not memory_gib <= MOST_GIB:  # not a number either
        raise ValueError(f"--memory {memory_gib:g}: it has to be GiB of one GPU, to {MOST_GIB:,}")
    if problem := foretold_problem(recipe):
        raise ValueError(f"{problem}; `genrec train --dry-run` says its sizes")
    if memory_gib <= RESERVE_GIB:
        raise ValueError(
            f"--memory {memory_gib:g}: {RESERVE_GIB} GiB of it are kept free; give more"
        )
    if (users or 0) > MOST_ROWS or (items or 0) > MOST_ROWS:
        raise ValueError(f"--users {users} --items {items}: rows are int32, {MOST_ROWS:,} at most")
    precision, assumed = recipe.precision, ""
    if recipe.auto_keys and users is not None and items is not None:
        lengths = np.array(ASSUMED_ITEMS) - num_held_out(recipe.trained_through)
        assumed = "; items without texts assumed" if "model.item_text" in recipe.auto_keys else ""
        recipe, _ = fit_recipe(recipe, DataFacts(items, np.resize(lengths, max(users, 1))))
    elif recipe.auto_keys:
        # The precision is that of the GPUs, not of this machine.
        recipe = dataclasses.replace(resolve_recipe(recipe)[0], precision=precision)
    catalogue = read_catalogue(recipe, users, items)
    catalogue = dataclasses.replace(catalogue, source=catalogue.source + assumed)
    trimmed = catalogue.words.vocabulary if catalogue.words is not None else None
    config = build_config(
        recipe,
        catalogue.users,
        catalogue.items,
        catalogue.vocabulary,
        spoken=trimmed.num_outputs if trimmed is not None else 0,
    )
    samples = stage_samples(recipe, catalogue)
    flops_per_sample = {}
    for each in samples:
        lengths, counts = np.unique(each.lengths, return_counts=True)
        found = [step_flops(config, each.micro_batch(1, int(length))) for length in lengths]
        flops_per_sample[each.stage] = float(np.average(found, weights=counts))
    sizes = count_parameters(recipe, config, TextSizes.of(recipe, catalogue.items))
    memory = RankMemory(recipe, config, sizes, samples, gpus)
    settings = {method: read_settings(zero_files, method) for method in METHODS}
    if MICRO_BATCH in recipe.auto_keys:
        chosen = None if card == CPU else _choose(memory, memory_gib * GIB, settings)
        recipe = with_values(recipe, {MICRO_BATCH: chosen or usual_micro_batch(recipe)})
        memory = dataclasses.replace(memory, recipe=recipe)
    plan = Forecast(
        recipe=recipe,
        gpus=gpus,
        memory_gib=memory_gib,
        sizes=sizes,
        catalogue=catalogue,
        samples=samples,
        fits=[],
        step_flops={each.stage: flops_per_sample[each.stage] * each.batch_size for each in samples},
        duration={},
    )
    fits = [memory.fit(method, plan.limit, settings[method]) for method in METHODS]
    duration = {}
    if card is not None or tflops is not None:
        _check_speed(card, tflops)
        setup = StepSetup(
            config=config,
            counts=sizes,
            bf16=(with_precision(recipe) if card == CPU else recipe).precision != "fp32",
            packed=choose_packing(recipe, torch.device("cpu" if card == CPU else "cuda")),
            on_cpu=card == CPU,
            micro_batch_tokens=recipe.micro_batch_tokens,
            average=recipe.optimizer.ema_decay > 0,
        )
        duration = {each.stage: _duration(setup, each, gpus, card, tflops) for each in samples}
    return dataclasses.replace(plan, fits=fits, duration=duration)


def _choose(memory: RankMemory, free: float, settings: dict[Method, ZeroSettings]) -> int | None:
    """`micro_batch_tokens: auto` under the fastest method with which it fits."""
    for method in BY_COST:
        with contextlib.suppress(ValueError):
            return memory.micro_batch_tokens(method, free, settings[method])
    return None


def step_flops(config: GenRecConfig, batch: MicroBatch) -> float:
    """Floating-point operations of forward and backward of full rectangles."""
    rows, length = batch.samples * batch.rows_per_sample, batch.input_tokens
    work = Work(
        inputs=batch.samples * length,
        targets=rows * batch.target_tokens,
        labels=rows * batch.target_tokens,
        encoder_pairs=batch.samples * length**2,
        decoder_pairs=rows * batch.target_tokens**2,
        cross_pairs=rows * batch.target_tokens * length,
    )
    return flops(config, work)


def _check_speed(card: str | None, tflops: float | None) -> None:
    if card is not None and tflops is not None:
        raise ValueError("--card and --tflops: give one of them")
    if tflops is not None and not 0 < tflops < math.inf:
        raise ValueError(f"--tflops {tflops}: it has to be above 0")
    if card is not None and card not in (*CARDS, CPU):
        known = ", ".join((*CARDS, f"{CPU} for this machine's"))
        raise ValueError(f"--card {card}: known are {known}; or give --tflops")


def _duration(
    setup: StepSetup, samples: Samples, gpus: int, card: str | None, tflops: float | None
) -> Duration:
    """Of a stage, by a card or by its operations in a second."""
    steps = draw(setup, samples.lengths, samples.windows, samples.per_rank(gpus))
    if tflops is not None:
        rates = given_rates(tflops)
    elif card == CPU:
        rates = cpu_rates(products(setup, steps, samples.rows), setup.config.d_model, setup.bf16)
    else:
        assert card is not None
        rates = card_rates(card, setup.bf16)
    step = step_time(setup, rates, steps, samples.rows)
    epoch = step.seconds * -(-samples.epoch_samples // samples.batch_size)
    return Duration(epoch, epoch * samples.epochs, step, rates.source)
