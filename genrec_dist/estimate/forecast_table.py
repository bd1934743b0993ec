"""A forecast as a table for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from genrec_shards.atomic import atomic_file
from rich.box import HEAVY_HEAD, Box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from genrec_dist.estimate.advice import NAMES, advise
from genrec_dist.estimate.forecast import Forecast
from genrec_dist.estimate.memory.fit import GIB, RESERVE_GIB
from genrec_dist.estimate.samples import ASSUMED_ITEM_TOKENS
from genrec_dist.estimate.step_time import WORDS

UNCHECKED = [
    "States are compared with measured storages of two CPU ranks (test_memory.py); no figure was "
    "checked on a GPU.",
    "Activations are compared with autograd's on a CPU; on a GPU dropout keeps 1 byte per element, "
    "and attention's own workspaces, the decoding of a validation and NCCL's buffers are left to "
    "the reserve.",
    "Times are those of steps: of each micro-batch the slowest of arithmetic, memory and host, on "
    "a CPU their sum, which is compared with measured steps. Communication, waiting for data, "
    "validation and checkpoints come besides.",
]


def as_dict(plan: Forecast) -> dict[str, Any]:
    """All of it as JSON values; sizes in bytes."""
    methods = [
        {
            "method": fit.method,
            "fits": fit.fits(plan.limit),
            "peak": fit.peak,
            "largest_micro_batch_tokens": fit.largest,
            "state": {**dataclasses.asdict(fit.state), "total": fit.state.total},
        }
        for fit in plan.fits
    ]
    durations = {stage: dataclasses.asdict(found) for stage, found in plan.duration.items()}
    stages = [
        {
            "stage": each.stage,
            "epoch_samples": each.epoch_samples,
            "mean_tokens": float(each.lengths.mean()),
            "longest_tokens": int(each.lengths[-1]),
            "target_tokens": each.target_tokens,
            "step_flops": plan.step_flops[each.stage],
            "duration": durations.get(each.stage),
        }
        for each in plan.samples
    ]
    return {
        "data": plan.catalogue.source,
        "users": plan.catalogue.users,
        "items": plan.catalogue.items,
        "parameters": plan.sizes.parameters,
        "id_parameters": plan.sizes.ids,
        "precision": plan.recipe.precision,
        "micro_batch_tokens": plan.recipe.micro_batch_tokens,
        "gpus": plan.gpus,
        "memory_gib": plan.memory_gib,
        "reserve_gib": RESERVE_GIB,
        "methods": methods,
        "stages": stages,
        "advice": advise(plan),
        "unchecked": UNCHECKED,
    }


def write_json(plan: Forecast, path: Path) -> None:
    """Write `as_dict`, complete or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(as_dict(plan), indent=1) + "\n", encoding="utf-8")


def render(plan: Forecast, width: int = 120) -> RenderableType:
    """A table, or two where one is wider than `width`; the stages, and the advice."""
    sizes, catalogue = plan.sizes, plan.catalogue
    words = "" if catalogue.words else f"; {ASSUMED_ITEM_TOKENS} sub-words per word assumed"
    head = (
        f"{sizes.parameters:,} parameters, {sizes.ids:,} of them in id tables; {catalogue.users:,} "
        f"users, {catalogue.items:,} items ({catalogue.source}{words}); {plan.recipe.precision}, "
        f"{plan.gpus} GPU of {plan.memory_gib:g} GiB, {RESERVE_GIB} of them kept free"
    )
    parts: list[RenderableType] = [Text(head)]
    title = f"GiB per GPU; micro_batch_tokens {plan.recipe.micro_batch_tokens:,}"
    if width >= _ONE_TABLE:
        parts.append(_table(plan, title, (*_STATE_COLUMNS, *_FIT_COLUMNS)))
    else:
        parts.append(_table(plan, title, _FIT_COLUMNS, box=None))
        parts.append(_table(plan, "The parts of the state, GiB per GPU", _STATE_COLUMNS, box=None))
    for each in plan.samples:
        unit = getattr(plan.recipe, each.stage).sample_unit
        line = (
            f"{each.stage}: {each.epoch_samples:,} {unit} per epoch, {each.lengths.mean():.0f} "
            f"encoder tokens on average, {each.lengths[-1]:,} at most; "
            f"{plan.step_flops[each.stage] / 1e12:.2f} TFLOP per step of {each.batch_size:,}"
        )
        if each.stage in plan.duration:
            took = plan.duration[each.stage]
            epoch, total = _time(took.epoch_seconds), _time(took.total_seconds)
            step, bound = took.step, took.step.bound
            line += (
                f"; a step {_time(step.seconds)}, bound by {WORDS[bound]}; {epoch} per epoch, "
                f"{total} in all ({took.assumption})"
            )
        parts.append(Text(line))
    parts += [Text(f"-> {line}", style="bold") for line in advise(plan)]
    parts += [Text(f"unchecked: {line}", style="dim") for line in UNCHECKED]
    return Group(*parts)


_FIT_COLUMNS = ("peak", "fits", "largest", "host")
_STATE_COLUMNS = ("weights", "optimiser", "gradients", "ids", "buffers", "state")
_ONE_TABLE = 116
"""Width of a terminal that holds all columns beside each other."""


def _table(
    plan: Forecast, title: str, columns: tuple[str, ...], box: Box | None = HEAVY_HEAD
) -> Table:
    """A row per method, with these columns."""
    table = Table("method", title=title, title_justify="left", box=box)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for fit in plan.fits:
        state, fits = fit.state, fit.fits(plan.limit)
        sizes = {
            "weights": state.weights,
            "optimiser": state.masters + state.moments + state.average,
            "gradients": state.gradients,
            "ids": state.id_rows + state.frozen,
            "buffers": state.buffers,
            "state": state.total,
            "peak": fit.peak,
            "host": state.host_total,
        }
        cells = {name: f"{size / GIB:.2f}" for name, size in sizes.items()}
        cells |= {
            "fits": "yes" if fits else "no",
            "largest": f"{fit.largest:,}" if fit.largest else "none",
        }
        row = [cells[name] for name in columns]
        table.add_row(NAMES[fit.method], *row, style="" if fits else "red")
    return table


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
