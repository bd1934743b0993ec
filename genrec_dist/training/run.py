"""One training run, from its recipe to its finished directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from genrec_shards.atomic import atomic_file
from genrec_shards.histories import exclude_history_default

from genrec_dist.config.load import dump_recipe
from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.recipe import Recipe
from genrec_dist.console import say
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
        resume: "latest" or a checkpoint directory. The latest of a run that has ended before its
            first checkpoint is its start.
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
    if resume is None and (run / "events.jsonl").exists():
        raise ValueError(
            f"{run}: a run is there already: continue it with --resume latest, or set another run "
            "directory"
        )
    ranks = Ranks()
    setup, model = ranks.run_on_all(lambda: build_setup(recipe))
    model.config.exclude_history = exclude_history_default(setup.dataset.sequences)
    checkpoint = None
    if resume:
        # Only one rank looks for the latest: a directory may appear on other nodes a moment later.
        found = ranks.run_on_all(lambda: find_checkpoint(run, resume) if ranks.is_main else None)
        if path := ranks.broadcast_str(str(found or "")):
            checkpoint = Checkpoint(Path(path), setup.identity, ranks, recipe)
            checkpoint.fill_model(model)
        elif ranks.is_main:
            say(f"{run}: it ended before its first checkpoint, so it starts anew")
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
    except BaseException as error:
        status, ended = "failed", dict[str, object](error=str(error))
        facts = {"reason": f"{type(error).__name__}: {error}"}
        if isinstance(error, Stopped):
            status, ended = "stopped", {"signal": error.number}
            facts = {"reason": str(error), "resume": "--resume latest"}
        # On a full disk the error itself is what a person has to know.
        with contextlib.suppress(OSError):
            loop.log.write("end", status=status, step=loop.progress.step, **ended)
        with contextlib.suppress(OSError):
            loop.write_status(status, **facts)
        raise
    finally:
        loop.log.close()
