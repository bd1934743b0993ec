"""A sweep from its first trial to its last, or from where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from genrec_shards.dataset import load_dataset
from genrec_shards.file_lock import hold
from genrec_shards.ray_engine.session import started
from genrec_shards.storage.reader import ShardReader

from genrec_dist.distributed.deadline import Deadline
from genrec_dist.distributed.signals import Stopped
from genrec_tuning.live_table import SweepTable
from genrec_tuning.record import (
    DONE,
    RUNS,
    SPACE_FILE,
    SWEEP_FILE,
    Folder,
    Recorder,
    Sweep,
    Trial,
    Value,
    read_sweep,
    trial_id,
)
from genrec_tuning.report.page import check_plotly, write_results
from genrec_tuning.space import Resources, Space, planned_epochs, points, recipe_of, refuse_changes
from genrec_tuning.trial import Job, ended_because

RAY_FILES = "ray"
"""Folder of Ray's own files; nothing of the sweep is in it."""
RAY_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The sweep handles signals, and trials stay in the driver's directory: paths mean the same.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A failed trial's last report has no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes: trials exchange a few numbers per epoch, data are in shards."""


def run_sweep(
    space: Space,
    out: str | Path,
    *,
    resume: bool = False,
    budget_hours: float | None = None,
    address: str | None = None,
    storage: str | None = None,
) -> Sweep:
    """Run the trials of a space, or those that are left of it. Nothing here looks at test.

    Args:
        space: what to search.
        out: the sweep's directory.
        resume: continue the sweep that is there.
        budget_hours: after so many, trials that run become `interrupted`.
        address: of a running Ray cluster; None: one on this machine, for the time of the sweep.
        storage: an address that fsspec knows; the sweep is there under the name of `out`, which
            then has Ray's own files alone.

    Returns:
        The sweep's record.

    Raises:
        ValueError: `out` holds a sweep already, the resumed sweep has another space, or all trials
            failed; one line.
        Stopped: a signal came; the record is written.
    """
    check_plotly()
    out, ending, began = Path(out), deadline(budget_hours), time.monotonic()
    folder = place_of(out, storage)
    if address is None:  # data that no trial could read are refused now
        recipe = space.recipe_of({}, "runs/trial")
        load_dataset(recipe.data)
        ShardReader(recipe.shards_dir, verify=False)
    with hold(out / ".lock", "another genrec tune works on this sweep"):
        recorder = Recorder(folder, _open(space, folder, resume))
        hours = recorder.sweep.hours
        recorder.put_facts(resumed=recorder.sweep.resumed + int(resume))
        done = {trial.id for trial in recorder.sweep.trials if trial.status in DONE}
        left = sum(trial_id(number) not in done for number in range(space.trials))

        def put(trial: Trial) -> None:
            recorder.put(trial)
            table.show(recorder.sweep)

        def tidy() -> None:
            kept = recorder.sweep.ranked[: space.keep]
            for trial in recorder.sweep.trials:  # of the others what is over takes room alone
                if trial.status in DONE and trial not in kept:
                    folder.remove(f"{trial.run}/checkpoints", f"{trial.run}/best")
            write_results(recorder.sweep, folder.address)

        with ending.stop, SweepTable() as table:
            recorder.interrupt("its driver was gone")
            try:
                if left:
                    with connected(address, space.resources):
                        _run(space, recorder, ending, (put, tidy), out / RAY_FILES, left)
            finally:
                recorder.interrupt(ended_because(ending) or "the sweep ended")
                table.show(recorder.sweep)
                recorder.put_facts(hours=hours + (time.monotonic() - began) / 3600)
                tidy()
    raise_if_ended(recorder.sweep, ending)
    return recorder.sweep


def deadline(budget_hours: float | None) -> Deadline:
    """When the trials have to end: after so many hours, if any, and at SIGTERM or SIGINT."""
    return Deadline(None if budget_hours is None else 60 * budget_hours)


def place_of(out: Path, storage: str | None) -> Folder:
    """The folder of a sweep, here or at an address."""
    return Folder(out.absolute()) if storage is None else Folder(storage) / out.absolute().name


def _open(space: Space, folder: Folder, resume: bool) -> Sweep:
    """The sweep's record: a new one, or what is there."""
    there = folder.holds(SWEEP_FILE)
    if there and not resume:
        raise ValueError(
            f"{folder.address}: a sweep is there already: "
            "continue it with --resume, or give another --out"
        )
    if resume and not there:
        raise ValueError(f"{folder.address}: no sweep is there: begin it without --resume")
    if there:
        sweep = read_sweep(folder.address)
        refuse_changes(sweep.space, json.loads(json.dumps(space.as_dict())), f"{space.name}.yaml")
        return dataclasses.replace(sweep, space=space.as_dict())
    folder.write(SPACE_FILE, yaml.safe_dump(space.as_dict(), sort_keys=False))
    return Sweep(space.name, space.as_dict(), started=time.time())


def _run(
    space: Space,
    recorder: Recorder,
    ending: Deadline,
    callbacks: tuple[Callable[[Trial], None], Callable[[], None]],
    ray_files: Path,
    left: int,
) -> None:
    """Let Ray run what is left of a sweep's trials."""
    from ray.tune import TuneConfig

    from genrec_tuning.ray_driver import TrialStates, run_trials
    from genrec_tuning.search import Search, scheduler_of

    sweep, address = recorder.sweep, recorder.folder.address

    def configure(number: int, values: dict[str, Value]) -> dict[str, Any]:
        id_ = trial_id(number)
        return {"job": job_of(id_, f"{RUNS}/{id_}", values, space.as_dict(), address)}

    longest = max(
        planned_epochs(space.recipe_of(values, "runs/trial")) for values in points(space.space)
    )
    config = TuneConfig(
        num_samples=left,
        search_alg=Search(space, sweep, configure),
        scheduler=scheduler_of(space, sweep, longest),
    )
    states = TrialStates(sweep.trials, ending, *callbacks)
    run_trials(states, config, {}, space.resources, space.retries, ray_files)


def job_of(
    id_: str, run: str, values: Mapping[str, Value], space: Mapping[str, Any], directory: str
) -> dict[str, Any]:
    """A `Job` as plain values.

    Args:
        id_: of the trial.
        run: its run directory, relative to the sweep's.
        values: what it sets of the base recipe.
        space: `Space.as_dict()`, which is `Sweep.space` too.
        directory: the sweep's, or its address.
    """
    recipe = recipe_of(space, values, run).as_dict()
    resources = dict(space["resources_per_trial"])
    return dataclasses.asdict(Job(id_, directory, run, recipe, dict(values), resources))


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[None]:
    """Ray while the block runs.

    Args:
        address: of a running cluster; None: one of our own, on loopback, that ends with the block.
        resources: that one node has to have.

    Raises:
        ValueError: the cluster cannot be reached, or no node has room for a trial.
    """
    with started(
        address, "--address", object_store_bytes=OBJECT_STORE_BYTES, settings=RAY_SETTINGS
    ) as ray:
        check_fits(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield


def check_fits(resources: Resources, nodes: list[dict[str, float]]) -> None:
    """Raise ValueError naming what no node has: Ray would wait for a node that never comes."""
    sizes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    if not any(cpu >= resources.cpu and gpu >= resources.gpu for cpu, gpu in sizes):
        have = "; ".join(f"cpu {cpu:g}, gpu {gpu:g}" for cpu, gpu in sizes)
        raise ValueError(
            f"resources_per_trial: cpu {resources.cpu:g}, gpu {resources.gpu:g}: no node has that "
            f"much (there are: {have}); a trial runs on one node"
        )


def raise_if_ended(sweep: Sweep, ending: Deadline) -> None:
    """Raise Stopped after a signal, and ValueError where all trials failed."""
    if ending.stop.number:
        raise Stopped(ending.stop.number, "what the trials had saved is kept", "--resume")
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if failed and len(failed) == len(sweep.trials):
        raise ValueError(
            f"all {len(failed)} trials failed; the first, {failed[0].id}: {failed[0].reason}"
        )


def sweep_summary(sweep: Sweep, out: str) -> str:
    """What a sweep came to, and what to do next; one fact per line."""
    lines = []
    if (best := sweep.best) and best.best:
        count, score = len(sweep.trials), best.best.NDCG10
        lines.append(f"{best.id} is the best of {count} trials: validation NDCG@10 {score:.4f}")
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if failed:
        lines.append(f"{len(failed)} trials failed; the first, {failed[0].id}: {failed[0].reason}")
    left = [trial for trial in sweep.trials if trial.status not in DONE]
    if left:
        lines.append(f"{len(left)} trials were interrupted ({left[0].reason}): go on with --resume")
    elif best:
        lines.append(f"next: genrec tune --finish --out {out}")
    return "\n".join(lines)
