"""A sweep from its first trial to its last, or from where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from genrec_shards.dataset import load_dataset
from genrec_shards.file_lock import hold
from genrec_shards.storage.reader import ShardReader

from genrec_dist.distributed.signals import Stopped
from genrec_tuning.export import write_results
from genrec_tuning.live_table import SweepTable
from genrec_tuning.ray_driver import connected
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
    best_trial,
    read_sweep,
    trial_id,
)
from genrec_tuning.space import Resources, Space, planned_epochs, points, refuse_changes
from genrec_tuning.trial import Job, as_config
from genrec_tuning.trial_states import Ending, Watch

RAY_FILES = "ray"
"""Folder of Ray's own files, in which nothing of the sweep lies."""


def run_sweep(
    space: Space,
    out: str | Path,
    *,
    resume: bool = False,
    budget_hours: float | None = None,
    address: str | None = None,
    storage: str | None = None,
) -> Sweep:
    """Run the trials of a space, or those that are left of it, and give the sweep's record. Nothing
    here looks at test.

    `out`: a directory; with `storage`, an address that fsspec knows, the sweep lies there under the
    directory's name and `out` holds Ray's own files alone. `address`: of a running Ray cluster. A
    trial whose process dies is started again from its own checkpoint; when `budget_hours` are over,
    trials that run become `interrupted`, and `resume` goes on with them.

    Raises ValueError, one line, for an `out` that is taken, for a resume of what is another space,
    and where all trials failed; Stopped after a signal, when the record is written."""
    out, ending = Path(out), Ending(budget_hours)
    folder = place_of(out, storage)
    if address is None:
        check_data(space)
    with hold(out / ".lock", "another genrec tune works on this sweep"):
        recorder = Recorder(folder, _opened(space, folder, resume))
        hours, resumed = recorder.sweep.hours, recorder.sweep.resumed
        recorder.put_facts(resumed=resumed + int(resume))
        with ending.stop, SweepTable() as table:

            def note(trial: Trial) -> None:
                recorder.put(trial)
                table.show(recorder.sweep)

            def tidy() -> None:
                drop_weights(folder, recorder.sweep, space.keep)
                write_results(recorder.sweep, folder.address)

            watch = Watch({trial.id: trial for trial in recorder.sweep.trials}, ending, note, tidy)
            watch.interrupt("its driver was gone")
            try:
                _run(space, watch, recorder.sweep, folder, out / RAY_FILES, address)
            finally:
                watch.interrupt(ending.reason or "the sweep ended")
                recorder.put_facts(hours=hours + ending.hours)
                tidy()
    close(recorder.sweep, ending)
    return recorder.sweep


def check_data(space: Space) -> None:
    """Raise DataError or ValueError, one line naming the file, for data that no trial could
    read."""
    recipe = space.recipe_of({}, "runs/trial")
    load_dataset(recipe.data)
    ShardReader(recipe.shards_dir, verify=False)


def place_of(out: Path, storage: str | None) -> Folder:
    """Where a sweep lies."""
    return Folder(out.absolute()) if storage is None else Folder(storage) / out.absolute().name


def _opened(space: Space, folder: Folder, resume: bool) -> Sweep:
    """The sweep's record: a new one, or what is there."""
    there = folder.holds(SWEEP_FILE)
    if there and not resume:
        raise ValueError(
            f"{folder.address}: a sweep is there already: continue it with --resume, or give another --out"
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
    space: Space, watch: Watch, sweep: Sweep, folder: Folder, ray_files: Path, address: str | None
) -> None:
    """Let Ray run what is left of a sweep's trials."""
    done = {trial.id for trial in sweep.trials if trial.status in DONE}
    left = sum(trial_id(number) not in done for number in range(space.trials))
    if not left:
        return
    with connected(address, space.resources):
        # They import Ray, which reads its environment then.
        from ray.tune import TuneConfig

        from genrec_tuning.ray_driver import run_trials
        from genrec_tuning.search import Search, scheduler_of

        config = TuneConfig(
            num_samples=left,
            search_alg=Search(space, sweep, Configure(space, folder.address)),
            scheduler=scheduler_of(space, sweep, _longest(space)),
        )
        run_trials(watch, config, {}, space.resources, space.retries, ray_files)


@dataclass(frozen=True)
class Configure:
    """Makes a trial's configuration for Ray of its number and values."""

    space: Space
    directory: str

    def __call__(self, number: int, values: dict[str, Value]) -> dict[str, Any]:
        run = f"{RUNS}/{trial_id(number)}"
        recipe = self.space.recipe_of(values, run).as_dict()
        return as_config(
            job_of(trial_id(number), self.directory, run, recipe, values, self.space.resources)
        )


def job_of(
    id_: str,
    directory: str,
    run: str,
    recipe: dict[str, Any],
    values: dict[str, Value],
    resources: Resources,
) -> Job:
    return Job(
        id=id_, directory=directory, run=run, recipe=recipe, values=values,
        processes=resources.processes, gpu=resources.gpu, cpu=resources.cpu,
    )  # fmt: skip


def _longest(space: Space) -> int:
    """Most epochs that a trial of the space has."""
    return max(
        planned_epochs(space.recipe_of(values, "runs/trial")) for values in points(space.space)
    )


def drop_weights(folder: Folder, sweep: Sweep, keep: int) -> None:
    """Remove checkpoints and `best/` of trials that are over, but for the best `keep` by
    validation."""
    over = [trial for trial in sweep.trials if trial.status in DONE]
    scored = [trial for trial in over if trial.status != "failed" and trial.best_NDCG10 is not None]
    kept = sorted(scored, key=lambda trial: (-(trial.best_NDCG10 or 0.0), trial.id))[:keep]
    for trial in over:
        if trial not in kept:
            remove(folder, f"{trial.run}/checkpoints", f"{trial.run}/best")


def remove(folder: Folder, *names: str) -> None:
    """Folders in the sweep's, as far as they are there."""
    for name in names:
        if folder.is_local:
            shutil.rmtree(folder.place(name), ignore_errors=True)
        elif folder.holds(name):
            folder.files.rm(folder.place(name), recursive=True)


def close(sweep: Sweep, ending: Ending) -> None:
    """Raise Stopped after a signal, and ValueError where no trial came to a score."""
    if ending.stop.number:
        raise Stopped(ending.stop.number, "what the trials had saved is kept", "--resume")
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if failed and len(failed) == len(sweep.trials):
        raise ValueError(
            f"all {len(failed)} trials failed; the first, {failed[0].id}: {failed[0].reason}"
        )


def told(sweep: Sweep, out: str) -> str:
    """What a sweep came to, and what to do next; a line each."""
    left = [trial for trial in sweep.trials if trial.status not in DONE]
    best = best_trial(sweep)
    lines = []
    if best is not None:
        lines.append(
            f"{best.id} is the best of {len(sweep.trials)} trials: validation NDCG@10 {best.best_NDCG10:.4f}"
        )
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    if failed:
        lines.append(f"{len(failed)} trials failed; the first, {failed[0].id}: {failed[0].reason}")
    if left:
        lines.append(f"{len(left)} trials were interrupted ({left[0].reason}): go on with --resume")
    elif best is not None:
        lines.append(f"next: genrec tune --finish --out {out}")
    return "\n".join(lines)
