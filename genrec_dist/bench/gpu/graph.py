"""A captured step beside one whose operators are launched one by one: time and weights."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import torch

from genrec_dist.bench.gpu.cases import first_steps, measure_cases, start_loop, take
from genrec_dist.bench.gpu.steps import BASE, BF16, SMALL_MODEL
from genrec_dist.bench.measure import Measured, OnPart
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.training.engine import Replicated
from genrec_dist.training.step.graph import StepGraph

NUM_STEPS = 20
_PLAIN = ("packing=packed", "model.dropout=0", "model.embedding_dropout=0", "workers=0")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "train-base, 16 samples": (
        "tiny",
        (*BASE, "finetune.batch_size=16", BF16, "micro_batch_tokens=2048"),
    ),
    "best": ("best", (BF16, "micro_batch_tokens=4096")),
    "tiny": ("tiny", (BF16, "micro_batch_tokens=16384")),
}


def bench_graph(small: bool, seconds: float, on_part: OnPart) -> Measured:
    """The table of `genrec_dist.bench.gpu.check graph`; arguments are those of `measure_cases`."""
    shrunk = (*SMALL_MODEL, "finetune.batch_size=16") if small else ()

    def measure(base: str, changes: tuple[str, ...], where: tuple[str, ...]) -> dict[str, Any]:
        recipe = load_recipe(base, [*where, *changes, *_PLAIN, *shrunk])
        return compare(resolve_recipe(recipe)[0], 6 if small else NUM_STEPS)

    cases = {name: partial(measure, *case) for name, case in CASES.items()}
    return measure_cases("graph", cases, small, seconds, on_part)


def compare(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The same steps of the same weights, captured and not: their milliseconds, and how far losses
    and weights are apart. Without a GPU nothing is captured."""
    recipe = dataclasses.replace(recipe, head="full")
    plain_losses, plain, plain_ms, _ = _run(recipe, steps, with_graph=False)
    losses, weights, milliseconds, captured = _run(recipe, steps, with_graph=True)
    apart = max(float((weights[name] - plain[name]).abs().max()) for name in plain)
    moved = max(float(weight.abs().max()) for weight in plain.values())
    return {
        "steps": steps,
        "captured": captured,
        "losses apart": max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)),
        "weights apart": apart,
        "largest weight": moved,
        "plain, ms": plain_ms,
        "graph, ms": milliseconds,
    }


def _run(
    recipe: Recipe, steps: int, with_graph: bool
) -> tuple[list[float], dict[str, torch.Tensor], float, bool]:
    """(losses, weights, milliseconds of a step in the later half, whether steps were captured)."""
    on_gpu, loop = torch.cuda.is_available(), start_loop(recipe)
    if with_graph:
        assert isinstance(loop.engine, Replicated)
        loop.graph = StepGraph(loop.engine, capture=on_gpu)
    losses, begun = [], 0.0
    for number, (place, share) in enumerate(first_steps(loop, steps, one_size=with_graph)):
        if number == steps // 2:
            if on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
        losses.append(take(loop, place, share))
    if on_gpu:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - begun) / (steps - steps // 2)
    captured = loop.graph is not None and loop.graph.is_captured
    weights = {name: p.detach().cpu() for name, p in loop.model.named_parameters()}
    return [float(loss) for loss in losses], weights, milliseconds, captured
