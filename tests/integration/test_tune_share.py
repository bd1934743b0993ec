"""Trials that share a GPU by parts of it: side by side, with the results of one after the other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sweeps
from genrec_tuning.record import read_sweep
from run_events import events

pytestmark = [pytest.mark.ranks, pytest.mark.dist]

# A trial takes longer than the start of another process, so that two can be seen to overlap.
SPACE = """
set: {finetune.epochs: 100}
trials: 2
search: random
scheduler: none
seed: 2
resources_per_trial: {cpu: %g, gpu: %g}
space:
  finetune.learning_rate: {loguniform: [1.0e-3, 1.0e-2]}
"""
# Ray counts what it is told is there, if the tests' empty CUDA_VISIBLE_DEVICES does not say
# otherwise; the trials find no GPU and train on the CPU.
ONE_GPU = {
    "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 1, "GPU": 1}),
    "CUDA_VISIBLE_DEVICES": "0",
}


def swept(folder: Path, data: Path, cpu: float, gpu: float) -> tuple[dict[str, Any], bool]:
    """Each trial's values and validations, and whether any two trained at the same time."""
    space, out = sweeps.write_space(folder, data, SPACE % (cpu, gpu)), folder / "out"
    process = sweeps.start(space, "--out", out, **ONE_GPU)
    try:
        _, errors = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    found, spans = {}, []
    for trial in read_sweep(out).trials:
        run = out / trial.run
        lines = [(one["epoch"], one["NDCG@10"], one["loss"]) for one in events(run, "validation")]
        found[trial.id] = (trial.values, lines)
        spans.append((events(run, "start")[0]["time"], events(run, "end")[-1]["time"]))
    return found, any(later[0] < earlier[1] for earlier, later in pairwise(sorted(spans)))


def test_trials_that_share_a_gpu_run_side_by_side_and_score_what_they_score_alone(
    tiny_data: Path, tmp_path: Path
) -> None:
    shared, at_once = swept(tmp_path / "shared", tiny_data, 0.25, 0.125)
    assert at_once
    alone, at_once = swept(tmp_path / "alone", tiny_data, 1, 1)
    assert not at_once
    assert len(shared) == 2
    assert shared == alone
