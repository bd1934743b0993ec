"""The finals of a sweep: its best trials with fresh seeds to the last epoch, a winner by
validation, and then, once, test."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean

from genrec_shards.dataset import load_dataset
from genrec_shards.file_lock import hold
from genrec_shards.readers.documents import read_object

from genrec_dist.distributed.deadline import Deadline
from genrec_dist.evaluation.compare import compare
from genrec_dist.evaluation.metrics import METRICS
from genrec_tuning.live_table import SweepTable
from genrec_tuning.record import FINALS, Final, Recorder, Status, Sweep, Trial, read_sweep
from genrec_tuning.report.page import check_plotly, write_results
from genrec_tuning.run_sync import pull, push
from genrec_tuning.space import Resources
from genrec_tuning.sweep import RAY_FILES, connected, deadline, job_of, place_of, raise_if_ended
from genrec_tuning.trial import Job

FINALISTS = 3
SEEDS = (1, 2, 3)
"""Added to the recipe's: the seed that chose the finalists flatters them."""
BASE = "base"
OVER: frozenset[Status] = frozenset(("finished", "failed"))


def finish_sweep(
    out: str | Path,
    *,
    against_base: bool = False,
    budget_hours: float | None = None,
    address: str | None = None,
    storage: str | None = None,
) -> Sweep:
    """Rerun the best three trials with three fresh seeds, without a scheduler; the highest mean
    NDCG@10 on validation wins, and the winner's runs alone are evaluated on test, once. Another
    call continues what was interrupted.

    Args:
        out: the sweep's directory.
        against_base: run the base recipe with the same seeds too, evaluate it on test with the
            winner, and compare them, paired.
        budget_hours: runs that are not over after so many are interrupted.
        address: of a running Ray cluster; None: one on this machine.
        storage: as for the sweep.

    Returns:
        The sweep's record with its finals.

    Raises:
        ValueError: no trial has a score, or the sweep was evaluated on test already.
        Stopped: a signal came; the record is written.
    """
    check_plotly()
    out, ending = Path(out), deadline(budget_hours)
    folder = place_of(out, storage)
    with hold(out / ".lock", "another genrec tune works on this sweep"):
        recorder = Recorder(folder, read_sweep(folder.address))
        recorder.put_finals(finals=enter(recorder.sweep, against_base))
        _refuse_second_look(recorder.sweep)
        with ending.stop:
            _run(recorder, ending, out / RAY_FILES, address)
        write_results(recorder.sweep, folder.address)
        raise_if_ended(recorder.sweep, ending)
        if all(final.status in OVER for final in recorder.sweep.finals):
            if recorder.sweep.winner is None:
                recorder.put_finals(winner=winner_of(recorder.sweep))
            _look_at_test(recorder)
            write_results(recorder.sweep, folder.address)
    return recorder.sweep


def enter(sweep: Sweep, against_base: bool) -> tuple[Final, ...]:
    """The finals as they are, or new ones; with `against_base` the base recipe joins them."""
    systems = list(dict.fromkeys(final.system for final in sweep.finals))
    systems = systems or [trial.id for trial in sweep.ranked[:FINALISTS]]
    if not systems:
        raise ValueError(
            f"{sweep.name}: no trial has come to its end with a score: nothing can be in the finals"
        )
    if against_base and BASE not in systems:
        systems.append(BASE)
    known = {(final.system, final.seed): final for final in sweep.finals}
    seeds = [int(sweep.space["recipe"]["seed"]) + more for more in SEEDS]
    return tuple(
        known.get((system, seed))
        or Final(system, seed, f"{FINALS}/{system}/seed-{seed}", "interrupted")
        for system in systems
        for seed in seeds
    )


def _refuse_second_look(sweep: Sweep) -> None:
    chosen = [final for final in sweep.finals if final.system in (sweep.winner, BASE)]
    if sweep.winner is None or any(f.test is None and f.status != "failed" for f in chosen):
        return
    scores = [f.test["NDCG@10"] for f in chosen if f.system == sweep.winner and f.test]
    raise ValueError(
        f"{sweep.name}: {sweep.winner} was evaluated on test already "
        f"(mean NDCG@10 {fmean(scores):.4f}): a sweep looks at test once; "
        "its figures are in finals.json and report.html"
    )


def winner_of(sweep: Sweep) -> str:
    """The finalist of the highest mean over all seeds; one of which a seed failed cannot win, for
    it is no recipe to recommend. Raises ValueError where none can."""
    means: dict[str, float] = {}
    for system in dict.fromkeys(final.system for final in sweep.finals if final.system != BASE):
        runs = [final for final in sweep.finals if final.system == system]
        scores = [final.NDCG10 for final in runs if final.status == "finished"]
        if len(scores) == len(SEEDS):
            means[system] = fmean(score for score in scores if score is not None)
    if not means:
        raise ValueError(
            f"{sweep.name}: no finalist came to its end with all seeds: "
            "see events.jsonl of its runs"
        )
    return max(means, key=lambda system: means[system])


def jobs_of(sweep: Sweep, directory: str) -> dict[str, Job]:
    """Name of each final, `t0003/seed-1` -> the job that runs it."""
    jobs = {}
    for final in sweep.finals:
        trial = sweep.trial(final.system)
        values = {**(trial.values if trial else {}), "seed": final.seed}
        jobs[final.name] = Job(**job_of(final.name, final.run, values, sweep.space, directory))
    return jobs


def _run(recorder: Recorder, ending: Deadline, ray_files: Path, address: str | None) -> None:
    """Let Ray run what is left of the finals."""
    sweep = recorder.sweep
    jobs = jobs_of(sweep, recorder.folder.address)
    left = [dataclasses.asdict(jobs[f.name]) for f in sweep.finals if f.status not in OVER]
    if not left:
        return
    shown = Sweep(f"{sweep.name}: finals", {"trials": len(jobs)}, started=sweep.started)

    def put(trial: Trial) -> None:
        nonlocal shown
        shown = shown.with_trial(trial)
        table.show(shown)
        status = "interrupted" if trial.status == "stopped" else trial.status
        score = trial.best.NDCG10 if trial.best else None
        update({trial.id: {"status": status, "NDCG10": score}})

    def update(changes: dict[str, dict]) -> None:
        finals = recorder.sweep.finals
        recorder.put_finals(
            finals=tuple(dataclasses.replace(f, **changes.get(f.name, {})) for f in finals)
        )

    resources = Resources(**sweep.space["resources_per_trial"])
    with SweepTable() as table:
        try:
            with connected(address, resources):
                from ray import tune

                from genrec_tuning.ray_driver import TrialStates, run_trials

                config, grid = tune.TuneConfig(num_samples=1), {"job": tune.grid_search(left)}
                states, retries = TrialStates((), ending, put), int(sweep.space["retries"])
                run_trials(states, config, grid, resources, retries, ray_files)
        finally:
            running = [f.name for f in recorder.sweep.finals if f.status == "running"]
            update({name: {"status": "interrupted"} for name in running})


def _look_at_test(recorder: Recorder) -> None:
    """Evaluate the winner's runs and the base's on test, each that was not yet; who won is written
    down before."""
    jobs = jobs_of(recorder.sweep, recorder.folder.address)
    winner = str(recorder.sweep.winner)
    chosen = [final for final in recorder.sweep.finals if final.system in (winner, BASE)]
    for final in chosen:
        job = jobs[final.name]
        pull(job.local_run, job.remote_run)
        if final.test is None and final.status == "finished":
            tested = dataclasses.replace(final, test=_test(job))
            push(job.local_run, job.remote_run)
            finals = recorder.sweep.finals
            recorder.put_finals(finals=tuple(tested if f == final else f for f in finals))
    base = [final for final in chosen if final.system == BASE]
    if base and all(final.status == "finished" for final in base):
        folders = {final.system: jobs[final.name].local_run.parent for final in chosen}
        found = compare(folders[winner], folders[BASE], split="test")
        recorder.put_finals(comparison=json.loads(json.dumps(found.as_dict())))
    for final in recorder.sweep.finals:
        recorder.folder.remove(f"{final.run}/checkpoints")
        if final.system not in (winner, BASE):
            recorder.folder.remove(f"{final.run}/best")


def _test(job: Job) -> dict[str, float]:
    """HR and NDCG on test of a finished run; read where an evaluation came to its end before."""
    written = job.local_run / "metrics-test.json"
    if not written.is_file():
        # Here: the finals are run by Ray, and this process has to do with a model only at the end.
        from genrec_dist.inference.evaluate import evaluate
        from genrec_dist.inference.load import best_device, load_run
        from genrec_dist.inference.rank_users import Decoding

        recipe = job.resolved(job.local_run)
        run = load_run(job.local_run, best_device(), light=True)
        evaluate(
            run,
            load_dataset(recipe.data),
            "test",
            decoding=Decoding(
                beam=recipe.validation.beam, exclude_history=run.model.config.exclude_history
            ),
            trained_through=recipe.trained_through,
            recipe=recipe.as_dict(),
        )
    metrics = read_object(written)
    return {name: float(metrics[name]) for name in METRICS}


def finals_summary(sweep: Sweep) -> str:
    """What the finals came to; one fact per line."""
    if sweep.winner is None:
        left = sum(final.status not in OVER for final in sweep.finals)
        return f"{left} runs of the finals are left: go on with --finish"
    lines = []
    for system in dict.fromkeys(final.system for final in sweep.finals if final.test):
        tests = [f.test["NDCG@10"] for f in sweep.finals if f.system == system and f.test]
        name = "the base recipe" if system == BASE else f"{system}, the winner"
        lines.append(f"{name}: test NDCG@10 {fmean(tests):.4f}, the mean of {len(tests)} seeds")
    return "\n".join([*lines, *([str(sweep.comparison["verdict"])] if sweep.comparison else [])])
