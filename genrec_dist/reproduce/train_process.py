"""One training in a process of its own, begun or gone on with, and stopped at a checkpoint when
time is over."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from genrec_shards.atomic import atomic_file
from genrec_shards.file_lock import hold

from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.config.recipe import MOVES_NO_GRADIENT, Recipe
from genrec_dist.console import exit_code_of
from genrec_dist.distributed.deadline import Deadline
from genrec_dist.evaluation.metrics import as_written
from genrec_dist.report.run_files import read_journal
from genrec_dist.training.checkpoint import list_checkpoints

LOADED = ["genrec_dist.training.run", "genrec_dist.report.run_report"]
"""By the server. Not the command line: started as a module it would be there twice."""


def is_finished(run: Path) -> bool:
    """Has this run come to its end, with a model to decode with?"""
    return _status(run).get("status") == "finished" and (run / "best" / "config.json").is_file()


def is_begun(run: Path) -> bool:
    """Is there a checkpoint to go on from?"""
    return bool(list_checkpoints(run))


def check_same(run: Path, asked: Recipe) -> None:
    """Raise ValueError where the run that is there was not trained by the recipe that is asked
    for."""
    if not (run / "recipe.yaml").is_file() or not (is_begun(run) or is_finished(run)):
        return
    theirs, ours = _flat(load_recipe(run / "recipe.yaml").as_dict()), _flat(asked.as_dict())
    for key, value in ours.items():
        if key not in MOVES_NO_GRADIENT and theirs.get(key) != value:
            raise ValueError(
                f"{run} was trained with {key} {theirs.get(key)}, not {value}: choose another --out, or remove that run"
            )


def train_run(recipe: Recipe, ending: Deadline, say: Callable[[str], None]) -> None:
    """Train a recipe's run to its end, from its last checkpoint where it has one. What it says goes
    to `RUN.log` beside it.

    Accelerate keeps one state a process and refuses a second precision, so each training is a
    process; it is forked off a server that has the libraries loaded, and it saves and ends when
    this one is gone. Raises what `Deadline.check` raises once the run has saved, ValueError with the
    run's own last line where it failed."""
    run = Path(recipe.run)
    check_same(run, recipe)
    run.parent.mkdir(parents=True, exist_ok=True)
    news = _News(run / "events.jsonl")
    process = _start(run, dump_recipe(recipe))
    try:
        while process.exitcode is None:
            process.join(0.2)
            for line in news.validations():
                say(
                    f"{_epoch(line)}: NDCG@10 {as_written(line['NDCG@10'])} on {line['users']:,} validation users"
                )
            if ending.is_due:
                process.terminate()
                process.join()
    finally:
        if process.exitcode is None:
            process.terminate()
            process.join()
    if is_finished(run):
        return
    ending.check()
    raise ValueError(
        f"{run}: the training ended with exit code {process.exitcode}: {_last_line(_log_of(run))}"
    )


def worked_seconds(run: Path) -> float:
    """Seconds that all attempts at this run worked, without what lay between them."""
    total, started, last = 0.0, None, 0.0
    for line in read_journal(run).events:
        if line["event"] == "start":
            total += last - started if started is not None else 0.0
            started = line["time"]
        last = line["time"]
    return total + (last - started if started is not None else 0.0)


def validated(run: Path) -> list[dict[str, Any]]:
    """The validations of a run's last stage, by step; a resumed run's second telling of one
    counts."""
    journal = read_journal(run)
    told = journal.of("validation")
    return journal.stage("validation", told[-1]["stage"]) if told else []


def best_epoch(run: Path) -> int:
    """The epoch of the last stage that `best/` holds, counted from 1. Raises ValueError for a run
    that has not come to its end."""
    if not is_finished(run):
        raise ValueError(f"{run}: not trained to its end yet, so its best epoch is not known")
    step = _status(run)["best_step"]
    return next(line["epoch"] + 1 for line in validated(run) if line["step"] == step)


def _start(run: Path, recipe: str) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=_become, args=(str(run), recipe, dict(os.environ)))
    process.start()
    return process


def _become(run: str, recipe: str, environment: dict[str, str]) -> None:
    """`genrec train`, in the process that was forked for it."""
    folder = Path(run)
    log = os.open(_log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # its own children start as anybody's do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from genrec_dist.report.run_report import write_report
    from genrec_dist.training.run import train

    try:
        with hold(folder.parent / f".{folder.name}.lock", "another process still trains this run"):
            resume = "latest" if is_begun(folder) else None
            if not resume:  # whatever an attempt left before its first checkpoint
                shutil.rmtree(folder, ignore_errors=True)
            with atomic_file(folder / "recipe.yaml") as temporary:
                temporary.write_text(recipe, encoding="utf-8")
            code = exit_code_of(
                lambda: write_report(train(load_recipe(folder / "recipe.yaml"), resume))
            )
    except ValueError as error:
        print(f"genrec: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """Ask this process to save and end when the one that started it is gone, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


class _News:
    """New validations in a growing `events.jsonl`."""

    def __init__(self, path: Path):
        self.path = path
        self.place = path.stat().st_size if path.is_file() else 0

    def validations(self) -> list[dict[str, Any]]:
        if not self.path.is_file() or self.path.stat().st_size <= self.place:
            return []
        with self.path.open("rb") as file:
            file.seek(self.place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        lines = [
            json.loads(line)
            for line in whole.splitlines()
            if line.startswith(b"{") and line.endswith(b"}")
        ]
        return [line for line in lines if line["event"] == "validation"]


def _epoch(line: dict[str, Any]) -> str:
    return f"{line['stage']} epoch {line['epoch'] + 1}"


def _status(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_line(path: Path) -> str:
    lines = (
        path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if path.is_file()
        else []
    )
    return lines[-1].removeprefix("genrec: ") if lines else "it said nothing"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; tuples as YAML has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
