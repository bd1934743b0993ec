"""One training run, from its recipe to its finished directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from genrec_shards.atomic import atomic_file
from genrec_shards.histories import exclude_history_default

from genrec_dist.config.load import dump_recipe
from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.paths import check_run_is_new
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import Stopped
from genrec_dist.training.checkpoint import Checkpoint, find_checkpoint
from genrec_dist.training.engine import make_accelerator
from genrec_dist.training.loop import EpochReport, Loop
from genrec_dist.training.setup import build_setup


def train(
    recipe: Recipe,
    resume: str | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    trace_steps: int = 0,
) -> Path:
    """Train by a recipe.

    Args:
        recipe: of the run.
        resume: "latest" or a checkpoint directory.
        on_epoch: called on rank 0 after each validated epoch, once the epoch's checkpoint is
            written, so that the run can be resumed after what it reports.
        trace_steps: how many steps are recorded (`profiling.Trace`).

    Returns:
        The run directory.

    Raises:
        ValueError: for input that does not fit.
        NotFinite: naming the step whose loss or gradient is not finite.
        Stopped: after a signal, once the checkpoint is written.
    """
    run = Path(recipe.run)
    recipe = with_precision(recipe, run if resume else None)
    accelerator = make_accelerator(recipe)
    if resume is None:
        check_run_is_new(run)
    ranks = Ranks()
    setup, model = ranks.run_on_all(lambda: build_setup(recipe))
    model.config.exclude_history = exclude_history_default(setup.dataset.sequences)
    checkpoint = None
    if resume:
        # Only one rank looks for the latest: a directory may appear on other nodes a moment later.
        found = ranks.run_on_all(lambda: str(find_checkpoint(run, resume)) if ranks.is_main else "")
        checkpoint = Checkpoint(Path(ranks.broadcast_str(found)), setup.identity, ranks)
        checkpoint.fill_model(model)
    loop = Loop(setup, model, accelerator, ranks)
    if checkpoint is not None:
        loop.progress = checkpoint.restore(loop.state())
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        with atomic_file(run / "recipe.yaml") as temporary:
            temporary.write_text(dump_recipe(recipe), encoding="utf-8")
        audit = setup.dataset.path / "audit.json"
        if audit.is_file():
            with atomic_file(run / "audit.json") as temporary:
                temporary.write_bytes(audit.read_bytes())
    with _status_of(loop), loop.stop:
        loop.start(str(checkpoint.path) if checkpoint else None)
        loop.run(on_epoch, trace_steps)
    return run


@contextlib.contextmanager
def _status_of(loop: Loop) -> Iterator[None]:
    """Record in the event log and in `status.json` how a run ended."""
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
