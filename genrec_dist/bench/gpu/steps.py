"""Training steps on a GPU, case by case: where their time goes, and who waits for the device."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from genrec_kernels.embedding import SWITCH
from torch.profiler import ProfilerActivity, profile

from genrec_dist.bench.gpu.cases import (
    BART_BASE,
    first_steps,
    measure_cases,
    start_loop,
    take,
)
from genrec_dist.bench.measure import Measured, OnPart
from genrec_dist.bench.synthetic import VOCABULARY
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import CPU_MICRO_BATCH, MICRO_BATCH, Recipe
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.distributed.accelerator import deterministic_algorithms
from genrec_dist.estimate.forecast import forecast
from genrec_dist.model.causal.kinds import AnyModel
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.training.loop import Loop

GIB = 2**30
NUM_STEPS, WARM_STEPS, TRACED_STEPS = 18, 3, 3
_PLAIN = ("workers=0", f"{MICRO_BATCH}={CPU_MICRO_BATCH}")
BASE = (
    *BART_BASE,
    "model.max_tokens=512",
    "model.user_ids=true",
    "model.positions=from-start",
    "tokens.vocab_size=400",
)
"""BART-base's shape and the paper's input, as changes to the recipe `tiny`. So small a vocabulary
makes three to four sub-words of an item's word, as BART's does of the paper's."""
SMALL_MODEL = (
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=16",
    "model.max_tokens=64",
    "tokens.vocab_size=300",
)


@dataclass(frozen=True)
class Case:
    """A training whose first steps are measured."""

    name: str
    recipe: str = "tiny"
    changes: tuple[str, ...] = ()
    kernels: str = "triton"

    @property
    def is_base(self) -> bool:
        return self.recipe == "tiny" and BART_BASE[1] in self.changes


def _base(name: str, samples: int, *changes: str, kernels: str = "triton") -> Case:
    return Case(name, "tiny", (*BASE, f"finetune.batch_size={samples}", *changes), kernels)


BF16, PACKED = "precision=bf16", "packing=packed"
# The cheapest and most telling ones first: what begins too late is left out by name.
CASES = (
    Case("best", "best"),
    Case("best, plain sum", "best", kernels="reference"),
    _base("train-base, 16 samples, bf16", 16, BF16),
    _base("train-base, 16 samples, fp32", 16, "precision=fp32"),
    Case("best, packed", "best", (PACKED,)),
    _base("train-base, 16 samples, packed", 16, BF16, PACKED),
    _base("train-base, 1,024 samples, 64k", 1024, BF16, "micro_batch_tokens=65536"),
    _base("train-base, 1,024 samples, 64k, packed", 1024, BF16, "micro_batch_tokens=65536", PACKED),
    Case("tiny, 6k"),
    Case("tiny, 64k", changes=("micro_batch_tokens=65536",)),
    Case("tiny, 64k, packed", changes=("micro_batch_tokens=65536", PACKED)),
    Case("best, deterministic", "best", ("deterministic=true",)),
    _base("train-base, 16 samples, deterministic", 16, BF16, "deterministic=true"),
    Case("tiny, tables outside", changes=("optimizer.id_tables=row-adagrad",)),
    _base("train-base, 1,024 samples, 8k", 1024, BF16, "micro_batch_tokens=8192"),
    _base("train-base, 16 samples, plain sum", 16, BF16, kernels="reference"),
)


def bench_steps(small: bool, seconds: float, on_part: OnPart) -> Measured:
    """The table of `genrec_dist.bench.gpu.check steps`; arguments are those of `measure_cases`."""
    cases = {case.name: partial(measure_case, case, small) for case in CASES}
    return measure_cases("steps", cases, small, seconds, on_part)


def measure_case(case: Case, small: bool, where: tuple[str, ...]) -> dict[str, Any]:
    """Milliseconds of its steps on the host and in all, what the device does, and whether the same
    steps twice give the same bits. No checkpoint is written."""
    shrunk = (*SMALL_MODEL, "finetune.batch_size=64") if small else ()
    recipe = load_recipe(case.recipe, [*where, *_PLAIN, *case.changes, *shrunk])
    recipe = resolve_recipe(recipe)[0]
    on_gpu = torch.cuda.is_available()
    os.environ[SWITCH] = case.kernels if on_gpu else ""
    try:
        with deterministic_algorithms(recipe.deterministic):
            return _measure(recipe, VOCABULARY if case.is_base and not small else 0, on_gpu)
    finally:
        del os.environ[SWITCH]
        if on_gpu:
            torch.cuda.empty_cache()


def _measure(recipe: Recipe, rows: int, on_gpu: bool) -> dict[str, Any]:
    def with_rows(model: AnyModel) -> AnyModel:
        """BART's table and head, of which this tokenizer uses the first rows."""
        assert isinstance(model.config, GenRecConfig)
        config = GenRecConfig(**{**model.config.to_dict(), "vocab_size": rows})
        return GenRecForConditionalGeneration(config)

    loop = start_loop(recipe, with_rows if rows else None)
    shares = first_steps(loop, NUM_STEPS)

    def step(number: int) -> None:
        take(loop, *shares[number % len(shares)])

    synchronise: Callable[[], None] = torch.cuda.synchronize if on_gpu else (lambda: None)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    step(0)
    synchronise()
    first = time.perf_counter() - begun
    for number in range(1, WARM_STEPS):
        step(number)
    synchronise()
    alone, host = [], []
    for number in range(WARM_STEPS, NUM_STEPS):
        begun = time.perf_counter()
        step(number)
        host.append(time.perf_counter() - begun)
        synchronise()
        alone.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for number in range(WARM_STEPS, NUM_STEPS):
        step(number)
    synchronise()
    per_step = (time.perf_counter() - begun) / (NUM_STEPS - WARM_STEPS)
    batches_of_step = [batch for _, share in shares for batch in share.micro_batches]
    tokens = sum(batch.num_tokens for batch in batches_of_step) / len(shares)
    found: dict[str, Any] = {
        "first step, s": first,
        "host, ms": 1e3 * statistics.median(host),
        "alone, ms": 1e3 * statistics.median(alone),
        "in a row, ms": 1e3 * per_step,
        "tokens a second": tokens / per_step,
        "tokens a step": tokens,
        "slots a step": sum(batch.num_slots for batch in batches_of_step) / len(shares),
        "micro-batches a step": len(batches_of_step) / len(shares),
        "parameters": loop.num_parameters,
        "precision": recipe.precision,
    }
    if on_gpu:
        # Of a table with more rows than the tokenizer has tokens nothing is foretold.
        found |= _of_the_device(step, None if rows else recipe)
    found["the same bits twice"] = _same_twice(loop, step)
    return found


def _of_the_device(step: Callable[[int], None], recipe: Recipe | None) -> dict[str, Any]:
    """Kernels, their milliseconds, memory beside what `genrec plan` foretells, and the lines that
    wait."""
    peak = torch.cuda.max_memory_allocated()
    card = torch.cuda.get_device_properties(0).total_memory
    foretold = None
    if recipe is not None:
        plan = forecast(recipe, memory_gib=card / GIB)
        foretold = next(fit.peak for fit in plan.fits if fit.method == "ddp") / GIB
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for number in range(TRACED_STEPS):
            step(number)
        torch.cuda.synchronize()
    events = [event for event in seen.events() if str(event.device_type).endswith("CUDA")]
    microseconds = sum(event.time_range.elapsed_us() for event in events)
    return {
        "kernels a step": len(events) / TRACED_STEPS,
        "kernels, ms a step": microseconds / TRACED_STEPS / 1e3,
        "peak memory, GiB": peak / GIB,
        "foretold memory, GiB": foretold,
        "waits": _waits(step),
    }


def _waits(step: Callable[[int], None]) -> dict[str, int]:
    """The lines at which a step waits for the device, by torch's own watch."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [one for one in seen if "synchroniz" in str(one.message)]
    return dict(Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told))


def _same_twice(loop: Loop, step: Callable[[int], None]) -> bool:
    """Whether two steps from the same weights end at the same bits, both times."""
    parameters, ends = list(loop.model.parameters()), []
    before = [parameter.detach().clone() for parameter in parameters]
    rows = [(table.values, table.squares) for table in loop.tables.tables.values()]
    rows_before = [tuple(part.clone() for part in one) for one in rows]
    for _ in range(2):
        with torch.no_grad():
            for parameter, weight in zip(parameters, before, strict=True):
                parameter.copy_(weight)
            for one, weights in zip(rows, rows_before, strict=True):
                for part, weight in zip(one, weights, strict=True):
                    part.copy_(weight)
        loop.engine.optimizer.state.clear()
        step(0)
        step(1)
        ends.append([parameter.detach().clone() for parameter in parameters])
    return all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
