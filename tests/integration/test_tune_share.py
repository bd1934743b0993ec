"""Trials that share a GPU by parts of it: as many side by side as fit, with the results of a training
by itself."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import sweeps
from genrec_tuning.record import read_sweep
from run_events import events
from two_ranks import environment

pytestmark = [pytest.mark.ranks, pytest.mark.dist]

# A trial takes longer than the start of another process, so that two can be seen to overlap.
SPACE = """
set: {finetune.epochs: 100}
trials: 3
search: random
scheduler: none
seed: 2
resources_per_trial: {cpu: 0.25, gpu: 0.5}
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
"""
# Ray counts what it is told is there, if the tests' empty CUDA_VISIBLE_DEVICES does not say
# otherwise; the trials find no GPU and train on the CPU.
ONE_GPU = {
    "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 1, "GPU": 1}),
    "CUDA_VISIBLE_DEVICES": "0",
}


def validations(run: Path) -> list[tuple[int, float, float]]:
    return [(one["epoch"], one["NDCG@10"], one["loss"]) for one in events(run, "validation")]


def test_as_many_trials_as_fit_a_gpu_run_side_by_side_and_score_what_they_score_alone(
    tiny_data: Path, tmp_path: Path
) -> None:
    space, out = sweeps.write_space(tmp_path, tiny_data, SPACE), tmp_path / "out"
    process = sweeps.start(space, "--out", out, **ONE_GPU)
    try:
        _, errors = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    runs = [out / trial.run for trial in read_sweep(out).trials]
    assert len(runs) == 3

    spans = [(events(run, "start")[0]["time"], events(run, "end")[-1]["time"]) for run in runs]
    side_by_side = [sum(begin <= start < end for begin, end in spans) for start, _ in spans]
    assert max(side_by_side) == 2

    run, alone = runs[1], tmp_path / "alone"
    arguments = ["-m", "genrec_dist.cli", "train", run / "recipe.yaml", "--run", alone]
    trained = forked.run(arguments, environment(), timeout=240)
    assert trained.returncode == 0, trained.stderr
    assert validations(alone) == validations(run) != []
