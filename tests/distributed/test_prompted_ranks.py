"""A model that reads titles on two ranks, under DDP and ZeRO: the steps of one process, its lists,
and checkpoints that fit any of them, with adapters too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from titled_data import RECIPE, titled_data
from zero_launch import launch

from genrec_dist.distributed.collectives import Ranks
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints

pytestmark = [pytest.mark.dist, pytest.mark.ranks]

LORA = ("lora.rank=4", "lora.alpha=8.0")
STAGES = (None, 1, 2, 3)
"""None: DDP."""


def some_steps(folder: Path, world: int, stage: int | None, *sets: str) -> dict[str, Any]:
    kind = "lora" if sets else "full"
    how = {"optimizer": "sgd", "rate": 0.05, "steps": 6, "lists": True}
    sets = (*sets, "precision=fp32", "optimizer.max_grad_norm=0.0", "micro_batch_tokens=300")
    job = {"name": f"{kind}-{stage}-{world}", "job": "steps", "stage": stage, **how}
    return {**job, "recipe": str(folder / "recipe.yaml"), "set": list(sets)}


def a_run(
    folder: Path, name: str, stage: int | None, *sets: str, resume: str | None = None
) -> dict[str, Any]:
    job = {"name": name, "stage": stage, "recipe": str(folder / "recipe.yaml"), "job": "train"}
    return {**job, "set": [f"run={folder / name}", *sets], "resume": resume}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompted")
    data = titled_data(folder)
    (folder / "recipe.yaml").write_text(RECIPE.format(data=data, run=folder / "unset"))
    both = [(stage, sets) for stage in STAGES for sets in ((), LORA)]
    jobs = [some_steps(folder, 2, stage, *sets) for stage, sets in both]
    jobs += [a_run(folder, "whole-3", 3, *LORA), a_run(folder, "whole-2", 2)]
    launch(jobs, folder, 2)
    for source, name in (("whole-3", "three-to-plain"), ("whole-2", "two-to-plain")):
        shutil.copytree(folder / source, folder / name)
        for path in list_checkpoints(folder / name)[1:]:
            shutil.rmtree(path)
        (folder / name / "events.jsonl").unlink()
    alone = [some_steps(folder, 1, None), some_steps(folder, 1, None, *LORA)]
    alone.append(a_run(folder, "three-to-plain", None, *LORA, resume="latest"))
    alone.append(a_run(folder, "two-to-plain", None, resume="latest"))
    launch(alone, folder, 1)
    return folder


def facts(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert not any(found["errors"]), found["errors"]
    return found


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_take_the_steps_of_one(folder: Path, stage: int | None, kind: str) -> None:
    ours, alone = facts(folder, f"{kind}-{stage}-2"), facts(folder, f"{kind}-None-1")
    assert (ours["processes"], ours["stage"]) == (2, stage)
    assert ours["digests"] == alone["digests"]
    assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    change, expected = (
        load_file(folder / f"{kind}-{s}.safetensors") for s in (f"{stage}-2", "None-1")
    )
    assert change.keys() == expected.keys()
    moved = {name for name, tensor in expected.items() if tensor.any()}
    assert moved == {name for name in expected if kind == "full" or ".lora_" in name}
    for name, tensor in expected.items():
        assert float((change[name] - tensor).norm()) <= 5e-4 * float(tensor.norm()), name
    assert ours["items"] == alone["items"]
    assert ours["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("whole", "resumed"), [("whole-3", "three-to-plain"), ("whole-2", "two-to-plain")]
)
def test_a_run_goes_on_with_another_number_of_ranks(folder: Path, whole: str, resumed: str) -> None:
    facts(folder, whole), facts(folder, resumed)
    ends = [
        Checkpoint(list_checkpoints(folder / run)[-1], {}, Ranks()).weights()
        for run in (whole, resumed)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(".lora_" in name for name in ends[0]) == (whole == "whole-3")
    for name, tensor in ends[0].items():
        difference = float((ends[1][name] - tensor).norm())
        assert difference <= 1e-3 * float(tensor.norm()) + 1e-6, name
    adapters = [
        folder / run / "best" / "adapter" / "adapter_model.safetensors" for run in (whole, resumed)
    ]
    assert [path.is_file() for path in adapters] == [whole == "whole-3"] * 2


def test_the_step_has_dummy_batches(folder: Path) -> None:
    """Or the case would not be tested."""
    assert any(facts(folder, f"full-{stage}-2")["idle"] > 0 for stage in (1, 2, 3))
