"""What a recipe needs before a GPU is rented: which method fits, the largest micro-batch, the time,
and advice."""

# L input tokens, T target tokens

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from genrec_shards.splits import num_held_out

from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import Work
from genrec_dist.data.fit_recipe import DataFacts, fit_recipe, resolve_recipe
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.hardware import CARDS
from genrec_dist.estimate.memory.activations import MicroBatch, activation_bytes, compute_of
from genrec_dist.estimate.memory.state import METHODS, Method, State, read_settings, state_bytes
from genrec_dist.estimate.rates import CPU, card_rates, cpu_rates, given_rates
from genrec_dist.estimate.samples import (
    ASSUMED_ITEMS,
    Catalogue,
    Samples,
    read_catalogue,
    stage_samples,
)
from genrec_dist.estimate.sizes import ParameterCounts, build_config, count_parameters
from genrec_dist.estimate.step_time import StepSetup, StepTime, draw, products, step_time
from genrec_dist.model.genrec import GenRecConfig, choose_packing

GIB = 2**30
RESERVE_GIB = 1.5
"""Kept free for the CUDA context, libraries' workspaces and fragmentation; not measured."""
MOST_GPUS, MOST_GIB, MOST_ROWS = 65_536, 65_536, 2**31 - 1
"""Sizes beyond those of any machine or data, which are refused."""
LARGEST_SEARCHED = 1 << 24
_STEP = 256


@dataclass(frozen=True)
class Fit:
    """One way to spread the weights."""

    method: Method
    state: State
    peak: int
    """Bytes on the GPU at their most, with the recipe's micro-batches."""
    largest: int
    """The largest `micro_batch_tokens` that fits; 0: not even the longest sample."""

    def fits(self, limit: float) -> bool:
        return self.peak <= limit


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
    memory_gib: float = 24.0,
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
        memory_gib: GiB of each.
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
    if not memory_gib <= MOST_GIB:  # not a number either
        raise ValueError(f"--memory {memory_gib:g}: it has to be GiB of one GPU, to {MOST_GIB:,}")
    if recipe.prompt.template or recipe.model.architecture == "t5":
        which = "prompt.template" if recipe.prompt.template else "model.architecture t5"
        raise ValueError(
            f"{which}: memory and time of such a model are not foretold; `genrec train --dry-run` "
            "says its sizes"
        )
    if memory_gib <= RESERVE_GIB:
        raise ValueError(
            f"--memory {memory_gib:g}: {RESERVE_GIB} GiB of it are kept free; give more"
        )
    if (users or 0) > MOST_ROWS or (items or 0) > MOST_ROWS:
        raise ValueError(f"--users {users} --items {items}: rows are int32, {MOST_ROWS:,} at most")
    if recipe.from_data and users is not None and items is not None:
        lengths = np.array(ASSUMED_ITEMS) - num_held_out(recipe.trained_through)
        recipe, _ = fit_recipe(recipe, DataFacts(items, np.resize(lengths, max(users, 1))))
    elif recipe.from_data:
        recipe, _ = resolve_recipe(recipe)
    catalogue = read_catalogue(recipe, users, items)
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
    sizes = count_parameters(recipe, config)
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
    plan = Forecast(
        recipe=recipe,
        gpus=gpus,
        memory_gib=memory_gib,
        sizes=sizes,
        catalogue=catalogue,
        samples=samples,
        fits=[],
        step_flops={each.stage: flops_per_sample[each.stage] * each.batch_size for each in samples},
        duration=duration,
    )
    fits = [_fit(plan, config, method, zero_files) for method in METHODS]
    return dataclasses.replace(plan, fits=fits)


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


def _fit(plan: Forecast, config: GenRecConfig, method: Method, zero_files: Path | None) -> Fit:
    recipe, gpus = plan.recipe, plan.gpus
    bf16 = recipe.precision != "fp32"
    compute = compute_of(method, bf16)
    head = "full" if recipe.head == "auto" else recipe.head  # what `auto` means on a GPU
    # At most one user per sample, and each token an item of its own.
    id_rows = [each.per_rank(gpus) * (1 + each.lengths.mean()) for each in plan.samples]
    state = state_bytes(
        plan.sizes,
        method,
        gpus,
        bf16,
        settings=read_settings(zero_files, method),
        average=recipe.optimizer.ema_decay > 0,
        step_id_rows=int(max(id_rows)),
    )

    def peak(tokens: int, whole_steps: bool) -> int:
        """Bytes with micro-batches of so many tokens, of samples of one length each; `whole_steps`:
        with no more of them than a rank's share of a step has."""
        most = 0
        for each in plan.samples:
            for length in map(int, each.quantiles):
                count = max(1, tokens // length)
                if whole_steps:
                    count = min(count, each.per_rank(gpus))
                batch = each.micro_batch(count, length)
                found = activation_bytes(config, plan.sizes, batch, compute, head=head)
                most = max(most, found.total)
        return state.peak(most)

    largest = _largest(lambda tokens: peak(tokens, False) <= plan.limit)
    return Fit(method, state, peak(recipe.micro_batch_tokens, True), largest)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest multiple of 256 that fits, which is monotone; 0 if none does."""
    low, high = 0, LARGEST_SEARCHED // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP


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
