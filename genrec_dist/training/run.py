"""One training run from its recipe to its finished directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from genrec_shards.atomic import atomic_file
from genrec_shards.histories import exclude_history_default

from genrec_dist.config.load import dump_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import Stopped
from genrec_dist.training.checkpoint import Checkpoint, find_checkpoint
from genrec_dist.training.engine import make_accelerator
from genrec_dist.training.loop import EpochReport, Loop
from genrec_dist.training.setup import TrainingSetup, build_setup


def train(
    recipe: Recipe,
    resume: str | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    trace_steps: int = 0,
) -> Path:
    """Train by a recipe and return its run directory.

    `resume`: "latest" or a checkpoint directory. `on_epoch` is called on rank 0 after each
    validated epoch, when the epoch's checkpoint is written: what it is told can be resumed from.
    `trace_steps`: so many are recorded (`trace.py`). Raises ValueError for input that does not fit,
    NotFinite with the step for a loss that is no number, Stopped after a signal, when the
    checkpoint is written."""
    accelerator = make_accelerator(recipe)
    run = Path(recipe.run)
    if resume is None and (run / "events.jsonl").exists():
        raise ValueError(
            f"{run}: a run is there already: continue it with --resume latest, or set another run directory"
        )
    ranks = Ranks()
    setup, model = ranks.run_on_all(lambda: build_setup(recipe))
    model.config.exclude_history = exclude_history_default(setup.dataset.sequences)
    checkpoint = _checkpoint(run, resume, setup, ranks) if resume else None
    if checkpoint is not None:
        checkpoint.fill_model(model)
    loop = Loop(setup, model, accelerator, ranks)
    if checkpoint is not None:
        loop.progress = checkpoint.restore(loop.state())
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        with atomic_file(run / "recipe.yaml") as temporary:
            temporary.write_text(dump_recipe(recipe), encoding="utf-8")
        _copy_audit(setup)
    with _status_of(loop), loop.stop:
        loop.start(str(checkpoint.path) if checkpoint else None)
        loop.run(on_epoch, trace_steps)
    return run


def _checkpoint(run: Path, resume: str, setup: TrainingSetup, ranks: Ranks) -> Checkpoint:
    # Only one rank looks for the latest: a directory may show up on other nodes a moment later.
    found = ranks.run_on_all(lambda: str(find_checkpoint(run, resume)) if ranks.is_main else "")
    return Checkpoint(Path(ranks.broadcast_str(found)), setup.identity, ranks)


def _copy_audit(setup: TrainingSetup) -> None:
    source = setup.dataset.path / "audit.json"
    if source.is_file():
        with atomic_file(setup.run / "audit.json") as temporary:
            temporary.write_bytes(source.read_bytes())


@contextlib.contextmanager
def _status_of(loop: Loop) -> Iterator[None]:
    """Whatever ends the run, `status.json` says it."""
    try:
        yield
    except Stopped as stop:
        loop.log.write("end", status="stopped", step=loop.progress.step, signal=stop.number)
        loop.write_status("stopped", reason=str(stop), resume="--resume latest")
        raise
    except BaseException as error:
        loop.log.write("end", status="failed", step=loop.progress.step, error=str(error))
        loop.write_status("failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        loop.log.close()
