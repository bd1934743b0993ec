"""A trial where it runs: the same `train` as everywhere, resumed from its own checkpoint, reported
epoch by epoch."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from genrec_shards.atomic import write_text
from genrec_shards.file_lock import hold

from genrec_dist.config.load import dump_recipe, recipe_from
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.distributed.deadline import Deadline
from genrec_dist.report.run_files import RunFiles, read_run_files
from genrec_tuning.record import SWEEP_FILE, Epoch, Folder, Value
from genrec_tuning.run_sync import pull, push
from genrec_tuning.space import Resources, planned_epochs

METRIC = "best_NDCG@10"
"""The score for scheduler and search: the best validation so far, which is what `best/` holds."""
LOCK_SECONDS = 60
"""A worker of the data that outlives its killed trainer notices it within seconds."""
_REFUSALS = ("NotFinite", "ValueError", "DataError")
"""Errors that another attempt would meet again."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to run a trial; Ray sends it as plain values."""

    id: str
    directory: str
    """The sweep's, or its address."""
    run: str
    """Relative to it."""
    recipe: dict[str, Any]
    """Resolved; its `run` is set on the node that trains."""
    values: dict[str, Value]
    """The sampled ones."""
    resources: dict[str, Any]
    """See `Resources`."""

    def resolved(self, run: Path) -> Recipe:
        """The trial's recipe for a run directory."""
        return recipe_from({**self.recipe, "run": str(run)}, source=self.id)

    @property
    def remote_run(self) -> Folder:
        return Folder(self.directory) / self.run

    @property
    def local_run(self) -> Path:
        """The run directory itself, or this node's copy of one at an address."""
        folder = Folder(self.directory)
        if folder.is_local:
            return Path(folder.place(self.run))
        name = sha256(self.directory.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"genrec-tune-{os.getuid()}" / name / self.run


def ended_because(ending: Deadline) -> str | None:
    """Why all trials have to end, or None while they may run."""
    if ending.stop.number:
        return f"stopped by {signal.Signals(ending.stop.number).name}"
    if ending.is_due:
        return f"the budget of {(ending.minutes or 0) / 60:g} hours was used up"
    return None


def run_trial(config: dict[str, Any]) -> None:
    """Ray's function trainable. `config["job"]`: a `Job` as plain values.

    A loss that is no number, and a recipe or data that do not fit, end the trial with a reason and
    without a score. Other errors are raised, and Ray starts the trial again."""
    from ray import tune

    # What the trial before left in this process; one that was stopped lets go of it only now.
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        run_job(Job(**config["job"]), tune.report)
    except ValueError as error:
        tune.report({"failed": f"{type(error).__name__}: {error}"})


def run_job(job: Job, report: Callable[[dict[str, Any]], None]) -> None:
    """Train a job's run to its end from its last checkpoint.

    Args:
        job: the trial.
        report: gets each epoch once per attempt, in order, when it can be resumed from; at the end
            the last one again with `finished`.

    Raises:
        ValueError: another attempt would fail as well.
        RuntimeError: a rank of the trial died.
    """
    folder, run = Folder(job.directory), job.local_run
    if not folder.holds(SWEEP_FILE):
        raise ValueError(
            f"{job.directory} is not seen from {socket.gethostname()}: "
            "lay --out where all nodes see it, or give --storage an address"
        )
    recipe = job.resolved(run)
    reported: list[Epoch] = []

    def as_result(epoch: Epoch) -> dict[str, Any]:
        best = max(one.NDCG10 for one in reported)
        return {**epoch.as_dict(), METRIC: best, "planned_epochs": planned_epochs(recipe)}

    def report_new() -> None:
        # Epochs of earlier attempts are reported too: their last report may never have arrived.
        if not (run / "events.jsonl").is_file():
            return
        new = epochs_of(read_run_files(run))[len(reported) :]
        if new:
            push(run, job.remote_run)
        for epoch in new:
            reported.append(epoch)
            report(as_result(epoch))

    lock_file = run.parent / f".{run.name}.lock"
    with hold(lock_file, "another process still trains this run", LOCK_SECONDS) as lock:
        pull(run, job.remote_run, LOCK_SECONDS)
        resume = "latest" if (run / "events.jsonl").is_file() else None
        if job.resources["processes"] > 1:
            train_on_ranks(Resources(**job.resources), recipe, resume, lock, report_new)
        else:
            # Here, since this file is imported by the driver too, and by a trial that only watches
            # its ranks: without torch and transformers they start seconds sooner.
            from genrec_dist.training.run import train

            train(recipe, resume, on_epoch=lambda _: report_new())
        report_new()
        push(run, job.remote_run)
        report({**as_result(reported[-1]), "finished": True})


def epochs_of(files: RunFiles) -> list[Epoch]:
    """Validations of a run's last stage that a checkpoint covers, in order, whichever attempt made
    them."""
    validations = files.of("validation")
    if not validations:
        return []
    stage = validations[-1]["stage"]
    saved = [line["step"] for line in files.of("checkpoint")]
    # Killed between a checkpoint and its event, a run has only the event of its resume.
    resumed = [line["resumed_from"] for line in files.of("start") if line.get("resumed_from")]
    saved += [int(Path(path).name.removeprefix("step-")) for path in resumed]
    # By the step of a validation.
    seconds = {line.get("step"): at for line, at in files.worked() if line["event"] == "validation"}
    found = {}
    steps = files.stage("step", stage)
    for line in files.stage("validation", stage):
        if line["step"] >= max(saved, default=-1):
            continue
        own = [step for step in steps if step["epoch"] == line["epoch"]]
        found[line["epoch"]] = Epoch(
            epoch=line["epoch"] + 1,
            step=line["step"],
            NDCG10=line["NDCG@10"],
            HR10=line["HR@10"],
            loss=line["loss"],
            train_loss=fmean([step["loss"] for step in own] or [0.0]),
            tokens_per_second=fmean([step["tokens_per_second"] for step in own] or [0.0]),
            seconds=round(seconds[line["step"]], 3),
        )
    return [found[number] for number in sorted(found)]


def train_on_ranks(
    resources: Resources,
    recipe: Recipe,
    resume: str | None,
    lock: int,
    on_poll: Callable[[], None],
) -> None:
    """Train on several ranks, each a process that ends with this one.

    Args:
        resources: of the trial.
        recipe: its `run` is the run directory.
        resume: of `train`.
        lock: descriptor of the run's lock file. The ranks inherit it: a run is free when its last
            writer has ended.
        on_poll: is called while they work.

    Raises:
        ValueError: the ranks refused the recipe, the data or a loss that is no number.
        RuntimeError: a rank died; names it and its last words.
    """
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "recipe.yaml", dump_recipe(resolve_recipe(recipe, run)[0]))
    command = [sys.executable, "-m", "genrec_tuning.rank_process", str(os.getpid())]
    command += [str(run / "recipe.yaml"), *(["--resume", resume] if resume else [])]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks: list[subprocess.Popen[bytes]] = []
    failed = None
    try:
        for rank in range(resources.processes):
            env = _rank_environment(resources, rank, port)
            with (run / f"rank-{rank}.log").open("ab") as log:
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    pass_fds=[lock],
                )  # fmt: skip
                ranks.append(process)
        while failed is None and any(process.poll() is None for process in ranks):
            on_poll()
            time.sleep(0.2)
            failed = first_failed([process.poll() for process in ranks])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if failed is not None:
        raise rank_error(run, failed, ranks[failed].returncode)


def first_failed(codes: list[int | None]) -> int | None:
    """The rank whose end ended the group: one that was killed before one that ended by itself
    because of it."""
    ended = [rank for rank, code in enumerate(codes) if code]
    return min(ended, key=lambda rank: (codes[rank] or 0) > 0, default=None)


def rank_error(run: Path, rank: int, code: int) -> Exception:
    """ValueError for what another attempt would meet again, else RuntimeError."""
    reason = str(read_run_files(run).status.get("reason", ""))
    if code == 1 and reason.split(":")[0] in _REFUSALS:
        return ValueError(reason)
    text = (run / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace").strip()
    last = text.splitlines()[-1] if text else "it said nothing"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return RuntimeError(f"rank {rank} ended by {how}: {last}")


def _rank_environment(resources: Resources, rank: int, port: int) -> dict[str, str]:
    count = resources.processes
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    env |= {"OMP_NUM_THREADS": str(max(1, int(resources.cpu) // count))}
    env |= {"TOKENIZERS_PARALLELISM": "false"}
    if not resources.gpu:
        env["ACCELERATE_USE_CPU"] = "true"
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks of a trial are on one node
    return env
