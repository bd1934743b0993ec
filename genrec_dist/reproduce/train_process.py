"""One training in a process of its own, started or resumed, and stopped at a checkpoint when the
time is over; and what its run directory says of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from genrec_shards.readers.documents import read_object

from genrec_dist.config.load import dump_recipe, recipe_from
from genrec_dist.config.recipe import Recipe
from genrec_dist.console import exit_code_of
from genrec_dist.distributed.deadline import Deadline
from genrec_dist.evaluation.metrics import as_written
from genrec_dist.report.run_files import read_run_files
from genrec_dist.training.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from genrec_dist.training.progress import EpochReport

PRELOADED = ["genrec_dist.training.run", "genrec_dist.report.run_report"]
"""Imported once, by the server that trainings are forked from."""
_starting = threading.Lock()


def is_finished(run: Path) -> bool:
    """Whether this run has come to its end, with a model to decode with."""
    return _status(run).get("status") == "finished" and (run / "best" / "config.json").is_file()


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return bool(list_checkpoints(run))


def train_run(recipe: Recipe, ending: Deadline, say: Callable[[str], None]) -> None:
    """Train a recipe's run to its end, from its last checkpoint where it has one.

    Accelerate keeps one state per process and refuses a second precision, so each training is a
    process. It is forked from a server that has the libraries loaded, saves and ends when this
    process is gone, and prints to `RUN.log`.

    Args:
        recipe: With the run directory.
        ending: The training is stopped at a checkpoint when it is due.
        say: Called with a line per validated epoch.

    Raises:
        Stopped, OutOfTime: From `Deadline.check`, once the training has saved.
        ValueError: The training's own last line where it failed.
    """
    run = Path(recipe.run)
    code = work_in_process(_train_in_child, (run, dump_recipe(recipe)), _log_of(run), ending, say)
    if is_finished(run):
        return
    ending.check()
    reason = last_line(_log_of(run))
    raise ValueError(f"{run}: the training ended with exit code {code}: {reason}")


def work_in_process(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    ending: Deadline,
    say: Callable[[str], None],
) -> int:
    """Have a process do something; returns its exit code.

    Args:
        target: Called there with `arguments`, and with a function that sends a line to `say`.
        arguments: What can be sent to a process.
        log: Gets what it prints.
        ending: When it is due, the process gets SIGTERM, and is waited for.
        say: Called here with each line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    with _starting:  # several threads may start their first process at once
        context.set_forkserver_preload(PRELOADED)
        reports, reports_end = context.Pipe(duplex=False)
        sent = (target, arguments, log, dict(os.environ), reports_end)
        process = context.Process(target=_in_child, args=sent)
        process.start()
    reports_end.close()
    try:
        while process.exitcode is None:
            process.join(0.2)
            with contextlib.suppress(EOFError):  # the training has closed its end
                while reports.poll():
                    say(reports.recv())
            if ending.is_due:
                process.terminate()
                process.join()
    finally:
        if process.exitcode is None:
            process.terminate()
            process.join()
    return process.exitcode


def last_line(log: Path) -> str:
    """The last line that a process has printed, why it failed where it did."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return last.strip().removeprefix("genrec: ")


def _in_child(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    environment: dict[str, str],
    reports: Connection,
) -> None:
    """What the forked process does."""
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # its own children start as anybody's do
    threading.Thread(target=_stop_with_parent, daemon=True).start()

    def send(text: str) -> None:
        with contextlib.suppress(OSError):  # the reader is gone: _stop_with_parent acts
            reports.send(text)

    code = exit_code_of(lambda: target(*arguments, send))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train_in_child(run: Path, recipe_text: str, send: Callable[[str], None]) -> None:
    """What `genrec train RECIPE --resume latest` does."""
    from genrec_dist.report.run_report import write_report
    from genrec_dist.training.run import train

    def report(epoch: EpochReport) -> None:
        score = as_written(epoch.scores["NDCG@10"])
        send(f"epoch {epoch.epoch} of {epoch.epochs}: validation NDCG@10 {score}")

    resume = "latest" if (run / "events.jsonl").is_file() else None
    recipe = recipe_from(yaml.safe_load(recipe_text), source=str(run))
    write_report(train(recipe, resume, on_epoch=report))


def _stop_with_parent() -> None:
    """Ask this process to save and end when the one that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def worked_seconds(run: Path) -> float:
    """Seconds that all attempts at this run worked, without the time between them."""
    worked = read_run_files(run).worked()
    return worked[-1][1] if worked else 0.0


def validated(run: Path) -> list[dict[str, Any]]:
    """The validations of a run's last stage, by step; of one that a resumed run did twice, the
    second."""
    files = read_run_files(run)
    found = files.of("validation")
    return files.stage("validation", found[-1]["stage"]) if found else []


def best_epoch(run: Path) -> int:
    """The epoch of the last stage that `best/` holds, counted from 1. Raises ValueError for a run
    that has not come to its end."""
    if not is_finished(run):
        raise ValueError(f"{run}: not trained to its end yet, so its best epoch is not known")
    step = _status(run)["best_step"]
    return next(line["epoch"] + 1 for line in validated(run) if line["step"] == step)


def _status(run: Path) -> dict[str, Any]:
    try:
        return read_object(run / "status.json")
    except (OSError, ValueError):
        return {}
