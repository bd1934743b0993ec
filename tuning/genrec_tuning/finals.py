"""The finals of a sweep: its best trials and fresh seeds to the last epoch, a winner by validation,
and then, once, test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from genrec_shards.dataset import load_dataset
from genrec_shards.file_lock import hold

from genrec_dist.evaluation.compare import METRICS, compare
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import best_device, load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_tuning.export import write_results
from genrec_tuning.live_table import SweepTable
from genrec_tuning.ray_driver import connected
from genrec_tuning.record import FINALS, Final, Recorder, Status, Sweep, Trial, Value, read_sweep
from genrec_tuning.run_sync import Mirror
from genrec_tuning.space import Resources, recipe_of
from genrec_tuning.sweep import RAY_FILES, close, job_of, place_of, remove
from genrec_tuning.trial import Job
from genrec_tuning.trial_states import Ending, Watch

FINALISTS = 3
SEEDS = (1, 2, 3)
"""Added to the recipe's: the seed that chose the finalists flatters them."""
BASE = "base"


def finish_sweep(
    out: str | Path,
    *,
    against_base: bool = False,
    budget_hours: float | None = None,
    address: str | None = None,
    storage: str | None = None,
) -> Sweep:
    """Rerun the best three trials with three fresh seeds, without a scheduler; the highest mean
    NDCG@10 on validation wins, and the winner's runs alone are evaluated on test, once.

    `against_base`: the base recipe with the same seeds too, evaluated on test with the winner and
    compared with it, paired. What was interrupted is gone on with by another call. Raises
    ValueError where no trial has a score and where test was looked at already, Stopped after a
    signal."""
    out, ending = Path(out), Ending(budget_hours)
    folder = place_of(out, storage)
    with hold(out / ".lock", "another genrec tune works on this sweep"):
        recorder = Recorder(folder, read_sweep(folder.address))
        recorder.put_finals(finals=entered(recorder.sweep, against_base))
        _refuse_second_look(recorder.sweep)
        with ending.stop:
            _run(recorder, ending, out / RAY_FILES, address)
        write_results(recorder.sweep, folder.address)
        close(recorder.sweep, ending)
        if all(final.status in ("finished", "failed") for final in recorder.sweep.finals):
            if recorder.sweep.winner is None:
                recorder.put_finals(winner=winner_of(recorder.sweep))
            _look_at_test(recorder)
            write_results(recorder.sweep, folder.address)
    return recorder.sweep


def entered(sweep: Sweep, against_base: bool) -> tuple[Final, ...]:
    """The finals as they are, or new ones; the base recipe joins when it is asked for."""
    systems = list(dict.fromkeys(final.system for final in sweep.finals)) or _best(sweep)
    if against_base and BASE not in systems:
        systems.append(BASE)
    known = {(final.system, final.seed): final for final in sweep.finals}
    first = int(sweep.space["recipe"]["seed"])
    return tuple(
        known.get((system, first + more))
        or Final(system, first + more, f"{FINALS}/{system}/seed-{first + more}", "interrupted")
        for system in systems
        for more in SEEDS
    )


def outcome(sweep: Sweep) -> str:
    """What the finals came to; a line each."""
    if sweep.winner is None:
        left = sum(final.status not in ("finished", "failed") for final in sweep.finals)
        return f"{left} runs of the finals are left: go on with --finish"
    lines = []
    for system in dict.fromkeys(final.system for final in sweep.finals if final.test):
        tests = [
            final.test["NDCG@10"] for final in sweep.finals if final.system == system and final.test
        ]
        name = "the base recipe" if system == BASE else f"{system}, the winner"
        lines.append(f"{name}: test NDCG@10 {fmean(tests):.4f}, the mean of {len(tests)} seeds")
    return "\n".join([*lines, str(sweep.comparison["verdict"])] if sweep.comparison else lines)


def _best(sweep: Sweep) -> list[str]:
    scored = [
        trial
        for trial in sweep.trials
        if trial.status in ("finished", "stopped") and trial.best_NDCG10 is not None
    ]
    if not scored:
        raise ValueError(
            f"{sweep.name}: no trial has come to its end with a score: nothing can be in the finals"
        )
    return [
        trial.id
        for trial in sorted(scored, key=lambda trial: (-(trial.best_NDCG10 or 0.0), trial.id))[
            :FINALISTS
        ]
    ]


def _refuse_second_look(sweep: Sweep) -> None:
    wanted = [final for final in sweep.finals if final.system in (sweep.winner, BASE)]
    if sweep.winner is not None and all(
        final.test is not None or final.status == "failed" for final in wanted
    ):
        scores = [
            final.test["NDCG@10"] for final in wanted if final.system == sweep.winner and final.test
        ]
        raise ValueError(
            f"{sweep.name}: {sweep.winner} was evaluated on test already (mean NDCG@10 {fmean(scores):.4f}): "
            "a sweep looks at test once; its figures are in finals.json and report.html"
        )


def winner_of(sweep: Sweep) -> str:
    """The finalist of the highest mean over all seeds. One of which a seed failed cannot win: it is
    no recipe to recommend."""
    means: dict[str, float] = {}
    for system in dict.fromkeys(final.system for final in sweep.finals if final.system != BASE):
        scores = [
            final.NDCG10
            for final in sweep.finals
            if final.system == system and final.status == "finished"
        ]
        if len(scores) == len(SEEDS):
            means[system] = fmean(score for score in scores if score is not None)
    if not means:
        raise ValueError(
            f"{sweep.name}: no finalist came to its end with all seeds: see events.jsonl of its runs"
        )
    return max(means, key=lambda system: means[system])


def values_of(sweep: Sweep, final: Final) -> dict[str, Value]:
    """What a final sets of the base recipe, its seed included."""
    trial = sweep.trial(final.system)
    return {**(trial.values if trial else {}), "seed": final.seed}


def jobs_of(sweep: Sweep, directory: str) -> dict[str, Job]:
    """Name of the final, `t0003/seed-1` -> what runs it."""
    resources = Resources(**sweep.space["resources_per_trial"])
    jobs = {}
    for final in sweep.finals:
        values = values_of(sweep, final)
        recipe = recipe_of(sweep.space, values, final.run).as_dict()
        name = _name(final)
        jobs[name] = job_of(name, directory, final.run, recipe, values, resources)
    return jobs


def _name(final: Final) -> str:
    return f"{final.system}/seed-{final.seed}"


def _run(recorder: Recorder, ending: Ending, ray_files: Path, address: str | None) -> None:
    sweep, directory = recorder.sweep, recorder.folder.address
    jobs = jobs_of(sweep, directory)
    left = [
        dataclasses.asdict(jobs[_name(final)])
        for final in sweep.finals
        if final.status not in ("finished", "failed")
    ]
    if not left:
        return
    shown = Sweep(f"{sweep.name}: finals", {"trials": len(sweep.finals)}, started=sweep.started)
    with SweepTable() as table:

        def note(trial: Trial) -> None:
            nonlocal shown
            shown = shown.with_trial(trial)
            table.show(shown)
            recorder.put_finals(
                finals=tuple(_noted(final, trial) for final in recorder.sweep.finals)
            )

        watch = Watch({}, ending, note, lambda: None)
        resources = Resources(**sweep.space["resources_per_trial"])
        try:
            with connected(address, resources):
                from ray import tune

                from genrec_tuning.ray_driver import run_trials

                config, grid = tune.TuneConfig(num_samples=1), {"job": tune.grid_search(left)}
                run_trials(watch, config, grid, resources, int(sweep.space["retries"]), ray_files)
        finally:
            watch.interrupt(ending.reason or "the finals ended")


def _noted(final: Final, trial: Trial) -> Final:
    if trial.id != _name(final):
        return final
    status: Status = "interrupted" if trial.status == "stopped" else trial.status
    return dataclasses.replace(final, status=status, NDCG10=trial.best_NDCG10)


def _look_at_test(recorder: Recorder) -> None:
    """Evaluate the winner's runs, and the base's, each that was not yet; the winner is written down
    before."""
    jobs = jobs_of(recorder.sweep, recorder.folder.address)
    chosen = [
        final for final in recorder.sweep.finals if final.system in (recorder.sweep.winner, BASE)
    ]
    for final in chosen:
        job = jobs[_name(final)]
        mirror = Mirror(job.local_run, recorder.folder / final.run)
        mirror.pull()
        if final.test is None and final.status == "finished":
            tested = dataclasses.replace(final, test=_tested(job))
            mirror.push()
            recorder.put_finals(
                finals=tuple(tested if one == final else one for one in recorder.sweep.finals)
            )
    finals = recorder.sweep.finals
    folders = {final.system: jobs[_name(final)].local_run.parent for final in finals}
    if BASE in folders and all(
        final.status == "finished" for final in finals if final.system == BASE
    ):
        found = compare(folders[str(recorder.sweep.winner)], folders[BASE], split="test")
        recorder.put_finals(comparison=json.loads(json.dumps(found.as_dict())))
    for final in finals:
        losers = (
            []
            if final in chosen or final.system in (recorder.sweep.winner, BASE)
            else [f"{final.run}/best"]
        )
        remove(recorder.folder, f"{final.run}/checkpoints", *losers)


def _tested(job: Job) -> dict[str, float]:
    """HR and NDCG on test of a finished run; read where an evaluation had come to its end."""
    written = job.local_run / "metrics-test.json"
    metrics = (
        json.loads(written.read_text(encoding="utf-8")) if written.is_file() else _evaluated(job)
    )
    return {name: float(metrics[name]) for name in METRICS}


def _evaluated(job: Job) -> Mapping[str, Any]:
    recipe = job.resolved(job.local_run)
    run = load_run(job.local_run, best_device())
    metrics = evaluate(
        run,
        load_dataset(recipe.data),
        "test",
        decoding=Decoding(
            beam=recipe.validation.beam, exclude_history=run.model.config.exclude_history
        ),
        trained_through=recipe.trained_through,
        recipe=recipe.as_dict(),
    )
    assert metrics is not None  # one process
    return metrics
