"""A captured step beside one whose operators are launched one by one: time and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from genrec_dist.bench.gpu.steps import BASE, BF16, SMALL_MODEL
from genrec_dist.bench.measure import Measured, OnPart, table
from genrec_dist.bench.synthetic import make_data
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.training.engine import Replicated
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import stage_of
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
    """The table of `genrec_dist.bench.gpu.check graph`.

    Args:
        small: the sizes of a test.
        seconds: what would begin later than this is left out by name.
        on_part: told each case as soon as it is measured.
    """
    from genrec_shards.storage.write import write_shards

    end, found = time.monotonic() + seconds, {}
    with tempfile.TemporaryDirectory(prefix="genrec-check-") as temporary:
        folder = Path(temporary)
        dataset = make_data(folder / "made", *((200, 60) if small else ()))
        write_shards(dataset, folder / "shards")
        where = (f"data={dataset.path}", f"shards={folder / 'shards'}", "run=nowhere")
        shrunk = (*SMALL_MODEL, "finetune.batch_size=16") if small else ()
        for name, (base, changes) in CASES.items():
            if time.monotonic() > end:
                found[name] = {"left out": "there was no time"}
            else:
                try:
                    recipe = load_recipe(base, [*where, *changes, *_PLAIN, *shrunk])
                    found[name] = compare(resolve_recipe(recipe)[0], 6 if small else NUM_STEPS)
                except Exception as error:  # the other cases say something all the same
                    problem = " ".join(f"{type(error).__name__}: {error}".split())
                    found[name] = {"failed": problem[:500]}
            on_part(name, found[name])
    return [], table("graph", [], cases=found)


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
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    on_gpu = torch.cuda.is_available()
    setup, model = build_setup(recipe)
    loop = Loop(setup, model, make_accelerator(recipe))
    if with_graph:
        assert isinstance(loop.engine, Replicated)
        loop.graph = StepGraph(loop.engine, capture=on_gpu)
    with contextlib.closing(loop.batches(one_size=with_graph)) as batches:  # type: ignore[type-var]
        shares = list(islice(batches, steps))
    losses, begun = [], 0.0
    for number, (place, share) in enumerate(shares):
        if number == steps // 2:
            if on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
        stage = stage_of(setup.stages, place).stage
        losses.append(loop.take_step(place, share, loop.step_totals(share), stage, 1.0)[0])
    if on_gpu:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - begun) / (steps - steps // 2)
    captured = loop.graph is not None and loop.graph.is_captured
    weights = {name: p.detach().cpu() for name, p in loop.model.named_parameters()}
    return [float(loss) for loss in losses], weights, milliseconds, captured
