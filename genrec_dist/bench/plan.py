"""What `genrec plan` foretells of a step beside steps that are taken."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genrec_dist.bench.gpu.cases import BART_BASE, first_steps, start_loop, take
from genrec_dist.bench.measure import Claim, Measured, format_columns, processor_seconds, table
from genrec_dist.bench.synthetic import make_data
from genrec_dist.config.load import load_recipe
from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.recipe import CPU_MICRO_BATCH, MICRO_BATCH
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.estimate.forecast import forecast
from genrec_dist.estimate.hardware import card_named
from genrec_dist.estimate.rates import CPU

GOAL = 1.5
"""Factor that measured and foretold may differ by."""
WARM_STEPS = 2
_MICRO_BATCH = f"{MICRO_BATCH}={CPU_MICRO_BATCH}"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tiny": ("tiny", ()),
    "best": ("best", ()),
    "BART-base shape, 16 samples": ("tiny", (*BART_BASE, "finetune.batch_size=16")),
}
"""Recipes, with changes."""


@dataclass(frozen=True)
class Compared:
    """Seconds of a step."""

    foretold: float
    measured: float
    bound: str
    """The part that is foretold to take longest."""
    rates: str
    """What the forecast rests on."""


def bench_plan(data: Path | None = None, steps: int = 12) -> Measured:
    """Claims that each case's steps take what was foretold."""
    from genrec_shards.storage.write import write_shards

    with tempfile.TemporaryDirectory(prefix="genrec-plan-") as temporary:
        folder = Path(temporary)
        path = make_data(folder / "made").path if data is None else data
        if not (path / "shards").is_dir():
            from genrec_shards.dataset import load_dataset

            write_shards(load_dataset(path), folder / "shards")
        shards = path / "shards" if (path / "shards").is_dir() else folder / "shards"
        where = [f"data={path}", f"shards={shards}"]
        found = {name: measure_plan(name, where, steps) for name in CASES}
    claims = [
        Claim(
            id=name,
            peer="foretold",
            ours=one.measured,
            theirs=one.foretold,
            unit="s",
            ratio=one.measured / one.foretold,
            goal=f"within {GOAL}x",
            holds=1 / GOAL < one.measured / one.foretold < GOAL,
        )
        for name, one in found.items()
    ]
    return claims, table("plan", claims, cases={name: vars(one) for name, one in found.items()})


def measure_plan(name: str, sets: list[str], steps: int) -> Compared:
    """A case's step as foretold, and the median of some that are taken. On a CPU both are
    processor time, so that other work on the machine counts on neither side.

    Args:
        name: of CASES.
        sets: further changes to its recipe: where the data is.
        steps: how many are taken.

    Raises:
        ValueError: the GPU is none that `genrec plan` knows.
    """
    base, changes = CASES[name]
    recipe = load_recipe(base, [*changes, "run=nowhere", "workers=0", _MICRO_BATCH, *sets])
    recipe = with_precision(resolve_recipe(recipe)[0])
    on_gpu = torch.cuda.is_available()
    card = card_named(torch.cuda.get_device_name()) if on_gpu else CPU
    if card is None:
        raise ValueError(f"{torch.cuda.get_device_name()}: a card that `genrec plan` does not know")
    foretold = forecast(recipe, card=card).duration["finetune"]
    loop, seconds = start_loop(recipe), []
    for place, share in first_steps(loop, WARM_STEPS + steps):
        begun = _now(on_gpu)
        take(loop, place, share)
        seconds.append(_now(on_gpu) - begun)
    return Compared(
        foretold=foretold.step.seconds,
        measured=statistics.median(seconds[WARM_STEPS:]),
        bound=foretold.step.bound,
        rates=foretold.assumption,
    )


def _now(on_gpu: bool) -> float:
    if not on_gpu:
        return processor_seconds()
    torch.cuda.synchronize()
    return time.perf_counter()


def format_plan(table: dict[str, Any]) -> str:
    """What binds in each case, and what the forecast rests on."""
    found = table["cases"].items()
    return format_columns([(name, f"bound by {c['bound']}", c["rates"]) for name, c in found])
