"""A trial where it runs: the same `train` as everyone's, resumed from its own checkpoint, reported
epoch by epoch."""

from __future__ import annotations

import dataclasses
import os
import shutil
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
from typing import Any

from genrec_shards.atomic import atomic_file
from genrec_shards.file_lock import hold

from genrec_dist.config.load import dump_recipe, recipe_from
from genrec_dist.config.recipe import Recipe
from genrec_dist.report.run_files import Journal, read_journal
from genrec_dist.training.checkpoint import list_checkpoints
from genrec_dist.training.run import train
from genrec_tuning.record import SWEEP_FILE, Epoch, Folder, Value
from genrec_tuning.run_sync import Mirror
from genrec_tuning.space import planned_epochs, recipe_of

__all__ = ["Job", "epochs_of", "recipe_of", "run_trial"]

METRIC = "best_NDCG@10"
"""What scheduler and searcher go by: the best validation so far, which is what `best/` holds."""
LOCK_SECONDS = 60
"""A worker of the data that outlives its killed trainer notices it within seconds."""
_REFUSALS = ("NotFinite", "ValueError", "DataError")
"""Errors that another attempt would meet again."""


@dataclass(frozen=True)
class Job:
    """What a worker is told of a trial; it travels as plain values."""

    id: str
    directory: str
    """The sweep's, or its address."""
    run: str
    """Relative to it."""
    recipe: dict[str, Any]
    """Resolved; its `run` is set here, by the place where the trial lies."""
    values: dict[str, Value]
    """What of it was sampled."""
    processes: int
    gpu: float
    cpu: float

    def resolved(self, run: Path) -> Recipe:
        return recipe_from({**self.recipe, "run": str(run)}, source=self.id)

    @property
    def local_run(self) -> Path:
        """The run directory itself, or this node's copy of one that lies at an address."""
        folder = Folder(self.directory)
        if folder.is_local:
            return Path(folder.place(self.run))
        name = sha256(self.directory.encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"genrec-tune-{os.getuid()}" / name / self.run


class Reports:
    """Tells of each epoch once an attempt, in order, and of none before it can be resumed from."""

    def __init__(
        self, run: Path, mirror: Mirror, tell: Callable[[dict[str, Any]], None], planned: int
    ):
        self.run, self.mirror, self.tell, self.planned = run, mirror, tell, planned
        self.told: list[Epoch] = []

    def catch_up(self) -> None:
        """Report what `events.jsonl` holds and was not reported yet: on a resume also what earlier
        attempts ran, since the last of it may never have arrived."""
        if not (self.run / "events.jsonl").is_file():
            return
        new = epochs_of(read_journal(self.run))[len(self.told) :]
        if new:
            self.mirror.push()
        for epoch in new:
            self.told.append(epoch)
            self.tell(self.as_result(epoch))

    def as_result(self, epoch: Epoch) -> dict[str, Any]:
        best = max(one.NDCG10 for one in self.told)
        return {**epoch.as_dict(), METRIC: best, "planned_epochs": self.planned}

    def finish(self) -> None:
        """The last epoch again, with the word that nothing follows."""
        self.catch_up()
        self.mirror.push()
        self.tell({**self.as_result(self.told[-1]), "finished": True})


def run_trial(config: dict[str, Any]) -> None:
    """Ray's function trainable. `config["job"]`: a `Job` as plain values.

    A loss that is no number and a recipe or data that do not fit end the trial with its reason and
    without a score; whatever else ends it is raised, and Ray starts it again."""
    from ray import tune

    job = Job(**config["job"])
    try:
        run_job(job, tune.report)
    except ValueError as error:
        tune.report({"failed": f"{type(error).__name__}: {error}"})


def run_job(job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    """Train a job's run to its end from where it stands, and tell of its epochs."""
    folder, run = Folder(job.directory), job.local_run
    if not folder.holds(SWEEP_FILE):
        raise ValueError(
            f"{job.directory} is not seen from {socket.gethostname()}: "
            "lay --out where all nodes see it, or give --storage an address"
        )
    recipe = job.resolved(run)
    mirror = Mirror(run, folder / job.run)
    with hold(
        run.parent / f".{run.name}.lock", "another process still trains this run", LOCK_SECONDS
    ) as lock:
        mirror.pull()
        resume = "latest" if list_checkpoints(run) else None
        if resume is None:  # whatever an attempt left before its first checkpoint
            shutil.rmtree(run, ignore_errors=True)
        reports = Reports(run, mirror, tell, planned_epochs(recipe))
        if job.processes > 1:
            train_on_ranks(job, recipe, resume, lock, reports.catch_up)
        else:
            train(recipe, resume, on_epoch=lambda _: reports.catch_up())
        reports.finish()


def epochs_of(journal: Journal) -> list[Epoch]:
    """Validations of a run that a checkpoint covers, whichever attempt made them; in order."""
    validations = journal.of("validation")
    if not validations:
        return []
    stage = validations[-1]["stage"]
    saved = max(
        [line["step"] for line in journal.of("checkpoint")] + _resumed_steps(journal), default=-1
    )
    steps = journal.stage("step", stage)
    worked = _worked_seconds(journal.events)
    found = {}
    for line in journal.stage("validation", stage):
        if line["step"] < saved:
            own = [step for step in steps if step["epoch"] == line["epoch"]]
            found[line["epoch"]] = Epoch(
                epoch=line["epoch"] + 1,
                step=line["step"],
                NDCG10=line["NDCG@10"],
                HR10=line["HR@10"],
                loss=line["loss"],
                train_loss=_mean([step["loss"] for step in own]),
                tokens_per_second=_mean([step["tokens_per_second"] for step in own]),
                seconds=round(worked[line["step"]], 3),
            )
    return [found[number] for number in sorted(found)]


def _resumed_steps(journal: Journal) -> list[int]:
    """Steps of checkpoints that were resumed from: killed between a checkpoint and its event, a run
    has no event of it."""
    paths = [line["resumed_from"] for line in journal.of("start") if line.get("resumed_from")]
    return [int(Path(path).name.removeprefix("step-")) for path in paths]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _worked_seconds(events: list[dict[str, Any]]) -> dict[int, float]:
    """Step of a validation -> seconds that its attempts had worked by then, without what lay
    between them."""
    before, started, last = 0.0, 0.0, 0.0
    found = {}
    for line in events:
        if line["event"] == "start":
            before, started = before + last - started, line["time"]
        last = line["time"]
        if line["event"] == "validation":
            found[line["step"]] = before + last - started
    return found


def train_on_ranks(
    job: Job, recipe: Recipe, resume: str | None, lock: int, on_news: Callable[[], None]
) -> None:
    """Train on `job.processes` ranks, each a process that dies with this one; `on_news` is called
    while they work.

    Raises ValueError for what the ranks refused, RuntimeError naming the rank and what it last said
    when one died."""
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    with atomic_file(run / "recipe.yaml") as temporary:
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "genrec_tuning.rank_process",
        str(os.getpid()),
        str(run / "recipe.yaml"),
    ]
    command += ["--resume", resume] if resume else []
    ranks: list[subprocess.Popen[bytes]] = []
    failed = None
    try:
        port = _free_port()
        for rank in range(job.processes):
            environment = _environment(job, rank, port)
            with (run / f"rank-{rank}.log").open("ab") as log:
                # The lock goes with them: a run is free when its last writer is gone.
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[lock],
                    )
                )
        while failed is None and any(process.poll() is None for process in ranks):
            on_news()
            time.sleep(0.2)
            failed = _first_to_blame([process.poll() for process in ranks])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if failed is not None:
        _raise_for(run, failed, ranks[failed].returncode)


def _first_to_blame(codes: list[int | None]) -> int | None:
    """The rank whose end ended the group: one that was killed before one that ended by itself
    because of it."""
    ended = [rank for rank, code in enumerate(codes) if code]
    return min(ended, key=lambda rank: (codes[rank] or 0) > 0, default=None)


def _raise_for(run: Path, rank: int, code: int) -> None:
    reason = read_journal(run).status.get("reason", "")
    if code == 1 and str(reason).split(":")[0] in _REFUSALS:
        raise ValueError(reason)
    lines = (
        (run / f"rank-{rank}.log")
        .read_text(encoding="utf-8", errors="replace")
        .strip()
        .splitlines()
    )
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    raise RuntimeError(f"rank {rank} ended by {how}: {lines[-1] if lines else 'it said nothing'}")


def _environment(job: Job, rank: int, port: int) -> dict[str, str]:
    ours = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.processes), "LOCAL_WORLD_SIZE": str(job.processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(max(1, int(job.cpu) // job.processes)),
    }  # fmt: skip
    if not job.gpu:
        ours["ACCELERATE_USE_CPU"] = "true"
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        ours["GLOO_SOCKET_IFNAME"] = "lo"  # the ranks of a trial are on one node
    return {**os.environ, **ours}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_config(job: Job) -> dict[str, Any]:
    """A trial's configuration for Ray."""
    return {"job": dataclasses.asdict(job)}
