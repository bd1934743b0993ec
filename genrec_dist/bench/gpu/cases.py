"""Trainings whose first steps are measured, case by case, until the time is over."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from genrec_dist.bench.measure import Measured, OnPart, table
from genrec_dist.bench.synthetic import make_data
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.model.causal.kinds import AnyModel
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import stage_of

BART_BASE = (
    "finetune.targets=last",
    "model.d_model=768",
    "model.encoder_layers=6",
    "model.decoder_layers=6",
    "model.heads=12",
    "model.ffn=3072",
    "model.dropout=0.1",
    "model.embedding_dropout=0",
)
"""BART-base's shape, as changes to the recipe `tiny`."""
Case = Callable[[tuple[str, ...]], dict[str, Any]]
"""Figures of a case; it is given the recipe keys that say where data and run are."""


def measure_cases(
    name: str, cases: Mapping[str, Case], small: bool, seconds: float, on_part: OnPart
) -> Measured:
    """The table of a step of `genrec_dist.bench.gpu.check`.

    Args:
        name: of the table.
        cases: by name, in their order.
        small: the sizes of a test.
        seconds: what would begin later than this is left out by name.
        on_part: told each case as soon as it is measured.
    """
    from genrec_shards.storage.write import write_shards

    end, found = time.monotonic() + seconds, dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="genrec-check-") as temporary:
        folder = Path(temporary)
        dataset = make_data(folder / "made", *((200, 60) if small else ()))
        write_shards(dataset, folder / "shards")
        where = (f"data={dataset.path}", f"shards={folder / 'shards'}", f"run={folder / 'run'}")
        for case, measure in cases.items():
            if time.monotonic() > end:
                found[case] = {"left out": "there was no time"}
            else:
                try:
                    found[case] = measure(where)
                except Exception as error:  # the other cases say something all the same
                    problem = " ".join(f"{type(error).__name__}: {error}".split())
                    found[case] = {"failed": problem[:500]}
            on_part(case, found[case])
    return [], table(name, [], cases=found)


def start_loop(recipe: Recipe, change: Callable[[AnyModel], AnyModel] | None = None) -> Loop:
    """A training before its first step, in a process that may have had others. `change`: puts
    another model in place of the recipe's."""
    setup, model = build_setup(recipe)
    return Loop(setup, model if change is None else change(model), make_accelerator(recipe))


def first_steps(loop: Loop, count: int, one_size: bool | None = None) -> list[tuple[int, RankStep]]:
    """(global step, samples) of its first steps, in memory. `one_size`: as of `Loop.batches`."""
    with contextlib.closing(loop.batches(one_size)) as batches:  # type: ignore[type-var]
        return list(islice(batches, count))


def take(loop: Loop, place: int, share: RankStep) -> torch.Tensor:
    """One step at its stage's peak learning rate; returns its loss, still on the device."""
    stage = stage_of(loop.setup.stages, place).stage
    loss, _ = loop.take_step(place, share, loop.step_totals(share), stage, 1.0)
    loop.unchecked.clear()
    return loss
