"""A T5 on two ranks, under DDP and ZeRO: the steps of one process, its lists, and checkpoints that
fit any of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import TINY_RECIPE
from zero_launch import launch

from genrec_dist.distributed.collectives import Ranks
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints

pytestmark = [pytest.mark.dist, pytest.mark.ranks]

STAGES = (None, 1, 2, 3)
"""None: DDP."""
# Dropout differs by rank. `eps`: AdamW would blow rounding up where gradients are almost zero.
SETS = (
    "model.dropout=0",
    "model.architecture=t5",
    "precision=fp32",
    "checkpoint_every=3",
    "optimizer.eps=1e-4",
)


def some_steps(folder: Path, world: int, stage: int | None) -> dict[str, Any]:
    how = {"optimizer": "sgd", "rate": 0.02, "steps": 6, "lists": True}
    sets = [*SETS, "optimizer.max_grad_norm=0.0", "micro_batch_tokens=300", "model.item_loss=0.5"]
    job = {"name": f"steps-{stage}-{world}", "job": "steps", "stage": stage, **how}
    return {**job, "recipe": str(folder / "recipe.yaml"), "set": sets}


def a_run(folder: Path, name: str, stage: int | None, resume: str | None = None) -> dict[str, Any]:
    sets = [*SETS, f"run={folder / name}", "keep_checkpoints=99"]
    job = {"name": name, "stage": stage, "recipe": str(folder / "recipe.yaml"), "job": "train"}
    return {**job, "set": sets, "resume": resume}


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    (folder / "recipe.yaml").write_text(f"data: {tiny_data}\nrun: unset\n{TINY_RECIPE}")
    launch(
        [*(some_steps(folder, 2, stage) for stage in STAGES), a_run(folder, "three", 3)], folder, 2
    )
    shutil.copytree(folder / "three", folder / "plain")
    for path in list_checkpoints(folder / "plain")[1:]:
        shutil.rmtree(path)
    (folder / "plain" / "events.jsonl").unlink()
    launch([some_steps(folder, 1, None), a_run(folder, "plain", None, "latest")], folder, 1)
    return folder


def facts(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert not any(found["errors"]), found["errors"]
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_take_the_steps_of_one(folder: Path, stage: int | None) -> None:
    ours, alone = facts(folder, f"steps-{stage}-2"), facts(folder, "steps-None-1")
    assert (ours["processes"], ours["stage"]) == (2, stage)
    assert ours["digests"] == alone["digests"]
    assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    change, expected = (
        load_file(folder / f"steps-{name}.safetensors") for name in (f"{stage}-2", "None-1")
    )
    assert change.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.any(), name
        assert float((change[name] - tensor).norm()) <= 5e-4 * float(tensor.norm()), name
    assert ours["items"] == alone["items"]
    assert ours["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)


def test_a_run_goes_on_with_another_number_of_ranks(folder: Path) -> None:
    facts(folder, "three"), facts(folder, "plain")
    ends = [
        Checkpoint(list_checkpoints(folder / run)[-1], {}, Ranks()).weights()
        for run in ("three", "plain")
    ]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        difference = float((ends[1][name] - tensor).norm())
        assert difference <= 1e-3 * float(tensor.norm()) + 1e-6, name
