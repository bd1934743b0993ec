"""One training run, from its recipe to its finished directory."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from genrec_shards.atomic import atomic_file, sweep_killed_writers, write_text
from genrec_shards.file_lock import LOCK_FILE, hold
from genrec_shards.histories import exclude_history_default, sample_users

from genrec_dist.baselines.registry import reference_scores
from genrec_dist.config.load import dump_recipe
from genrec_dist.config.native_precision import slow_precision
from genrec_dist.config.paths import check_run_is_new, training_state
from genrec_dist.config.recipe import Recipe
from genrec_dist.console import say
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.decoding.trie import build_trie
from genrec_dist.distributed.accelerator import deterministic_algorithms, make_accelerator
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.gpu import unusable_gpu
from genrec_dist.distributed.signals import RankGone, Stopped, speaking_last
from genrec_dist.estimate.hardware import device_name
from genrec_dist.evaluation.protocol import Protocol
from genrec_dist.inference.load import load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.tune_mixture import tune_mixture
from genrec_dist.inference.validation import PROMPTS_AT_ONCE
from genrec_dist.model.causal.kinds import AnyModel
from genrec_dist.report.run_report import write_report
from genrec_dist.tracking.event_log import write_status
from genrec_dist.training.checkpoint import Checkpoint, find_checkpoint, save_best
from genrec_dist.training.loop import Loop
from genrec_dist.training.progress import EpochReport
from genrec_dist.training.setup import TrainingSetup, build_setup
from genrec_dist.training.step.micro_batches import Devices, settle_micro_batches


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
        ValueError: for input that does not fit, and where another process trains this run.
        RankGone: naming a rank that was lost.
        NotFinite: naming the step whose loss or gradient is not finite.
        Stopped: after a signal, once the checkpoint is written.
    """
    run = Path(recipe.run)
    recipe = resolve_recipe(recipe, run if resume else None)[0]
    with deterministic_algorithms(recipe.deterministic):
        accelerator = make_accelerator(recipe)
        for problem in (unusable_gpu(), slow_precision(recipe)):
            if problem and accelerator.is_main_process:
                say(problem)
        ranks = Ranks()
        with contextlib.ExitStack() as held, speaking_last(), ranks.naming_the_gone():
            claim = _claimed(run, resume)
            ranks.run_on_all(lambda: held.enter_context(claim) if ranks.is_main else None)
            _train(recipe, resume, accelerator, ranks, on_epoch, trace_steps)
    return run


@contextlib.contextmanager
def _claimed(run: Path, resume: str | None) -> Iterator[None]:
    """Hold the lock of a run directory, and remove what killed writers left in it. Raises
    ValueError where another process holds it, there is a run where a new one is to begin, or none
    where one is to be resumed."""
    if resume is not None:  # before the lock, which a run that begins just now may want
        find_checkpoint(run, resume)
    with hold(run / LOCK_FILE, "another process trains this run"):
        if resume is None:
            check_run_is_new(run)
        sweep_killed_writers(run, "best", "status.json", "recipe.yaml", "audit.json")
        sweep_killed_writers(run / "checkpoints", "step-*")
        yield


def _train(
    recipe: Recipe,
    resume: str | None,
    accelerator: Accelerator,
    ranks: Ranks,
    on_epoch: Callable[[EpochReport], None] | None,
    trace_steps: int,
) -> None:
    """Train in a run directory that rank 0 holds."""
    run = Path(recipe.run)
    setup, model = ranks.run_on_all(lambda: build_setup(recipe))
    devices = Devices.of(accelerator, ranks)
    recipe, why = ranks.run_on_all(
        lambda: settle_micro_batches(recipe, setup.dataset, setup.words, model, devices)
    )
    setup = dataclasses.replace(setup, recipe=recipe)
    if why and ranks.is_main:
        say(f"chosen for {device_name(accelerator.device)}: {why}")
    model.config.exclude_history = exclude_history_default(setup.dataset.sequences)
    if not setup.stages:
        ranks.run_on_all(lambda: _save_untrained(setup, model) if ranks.is_main else None)
        return
    checkpoint = None
    if resume:
        # Only one rank looks for the latest: a directory may appear on other nodes a moment later.
        found = ranks.run_on_all(lambda: find_checkpoint(run, resume) if ranks.is_main else None)
        if path := ranks.broadcast_str(str(found or "")):
            checkpoint = Checkpoint(Path(path), setup.identity, ranks, setup)
            checkpoint.fill_model(model)
        elif ranks.is_main:
            say(f"{run}: it ended before its first checkpoint, so it starts anew")
    with _memory_in_one_line(recipe):
        loop = Loop(setup, model, accelerator, ranks)
    if checkpoint is not None:
        loop.progress = checkpoint.restore(loop.state())
    if accelerator.is_main_process:
        _write_origin(setup)
    with contextlib.closing(loop.log):
        # A launcher signals the others when a rank is gone: not amid the writing of the status.
        with loop.stop, _status_of(loop), ranks.naming_the_gone(), _memory_in_one_line(recipe):
            loop.start(str(checkpoint.path) if checkpoint else None)
            loop.run(on_epoch, trace_steps)
        # The run is finished: what stops this does not make it a failed one.
        if recipe.trained_through == "n-2" and loop.progress.best_ndcg >= 0:
            _judge(loop)
        if loop.log.trackers is not None and loop.log.trackers.names:
            loop.log.trackers.finish(write_report(run))


def _write_origin(setup: TrainingSetup) -> None:
    """Write the recipe, and the data's audit where it has one, into the run directory."""
    setup.run.mkdir(parents=True, exist_ok=True)
    write_text(setup.run / "recipe.yaml", dump_recipe(setup.recipe))
    audit = setup.dataset.path / "audit.json"
    if audit.is_file():
        with atomic_file(setup.run / "audit.json") as temporary:
            temporary.write_bytes(audit.read_bytes())


def _save_untrained(setup: TrainingSetup, model: AnyModel) -> None:
    """Make the run directory of a backbone as it is, for its lists."""
    _write_origin(setup)
    save_best(setup, model, build_trie(*setup.words.tokens_of_items()), step=0)
    write_status(setup.run, "finished", step=0, of=0, seconds=0.0)
    say(f"{setup.run}: no epochs, best/ holds the backbone as it is")


def _judge(loop: Loop) -> None:
    """Where lists are made by `hybrid`, choose its weights; then log what the run reached on
    validation beside rules that learn nothing. Collective."""
    setup, recipe = loop.setup, loop.setup.recipe
    users_U = setup.dataset.sequences.history_and_target("validation").users
    ndcg = loop.progress.best_ndcg
    if recipe.decode == "hybrid":
        ndcg = _choose_mixture(loop)
    else:
        users_U = users_U[sample_users(len(users_U), recipe.validation.users, recipe.seed)]
    if not loop.ranks.is_main:
        return
    exclude_history = exclude_history_default(setup.dataset.sequences)
    protocol = Protocol.of(setup.dataset, exclude_history=exclude_history)
    names = ("popularity", "knn") if exclude_history else ("popularity", "repeat", "knn")
    found = reference_scores(setup.dataset, "validation", protocol, users_U, names)
    scores = {name: metrics["NDCG@10"] for name, metrics in found.items() if metrics}
    loop.log.write(
        "judgement", users=len(users_U), decode=recipe.decode, **{"NDCG@10": ndcg}, beside=scores
    )


def _choose_mixture(loop: Loop) -> float:
    """Choose the weights of `hybrid` for the best weights of the run, write them beside it, and
    return their NDCG@10 on validation."""
    setup = loop.setup
    if loop.ranks.is_main:
        say(f"{setup.run}: choosing the weights of hybrid on validation")
    best = loop.ranks.run_on_all(lambda: load_run(setup.run, loop.accelerator.device))
    start = time.perf_counter()
    choice = tune_mixture(
        best,
        setup.dataset,
        decoding=Decoding(
            beam=setup.recipe.validation.beam,
            mode="hybrid",
            batch_size=PROMPTS_AT_ONCE if setup.recipe.prompt.template else 512,
            exclude_history=best.model.config.exclude_history,
        ),
        tune_graph=True,
        text=setup.recipe.text,
        ranks=loop.ranks,
    )
    if loop.ranks.is_main:
        say(str(choice))
    loop.log.write(
        "mixture",
        seconds=time.perf_counter() - start,
        tried=len(choice.table) + len(choice.text_table),
        users=choice.users,
        **choice.validation,
    )
    return choice.validation["NDCG@10"]


@contextlib.contextmanager
def _memory_in_one_line(recipe: Recipe) -> Iterator[None]:
    """Raise ValueError with the way out where a device's memory does not hold what is asked of
    it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory ({str(error).partition('. ')[0]}): lower micro_batch_tokens, now "
            f"{recipe.micro_batch_tokens}, or set activation_checkpointing true; --resume latest "
            "goes on from the last checkpoint, and genrec plan says what fits"
        ) from None


@contextlib.contextmanager
def _status_of(loop: Loop) -> Iterator[None]:
    """Record in the event log and in `status.json` how a run ended."""
    try:
        yield
    except BaseException as error:
        loop.stop.on_first = None  # no further step is taken, whatever signal comes
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
        if isinstance(error, RankGone) and error.is_main:
            _write_status_of_main(loop, status, **facts)
        raise


def _write_status_of_main(loop: Loop, status: str, **facts: object) -> None:
    """Write how the run ended in place of rank 0, which has gone without a word."""
    run = loop.setup.run
    # Its lock has gone with it. Where another process has taken that, the run is that one's.
    with contextlib.suppress(OSError, ValueError), hold(run / LOCK_FILE, "taken", wait=1.0):
        if training_state(run)["status"] == "running":
            write_status(run, status, step=loop.progress.step, of=loop.end_step, **facts)
