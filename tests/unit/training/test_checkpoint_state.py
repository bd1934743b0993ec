"""What a resume refuses of a checkpoint's `state.json`, field by field, and of folders and recipes
that are not the run's."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file
from tiny import TINY_RECIPE

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.training.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from genrec_dist.training.checkpoint_state import _sha256_of, read_state
from genrec_dist.training.engine import Segment
from genrec_dist.training.run import train
from genrec_dist.training.setup import TrainingSetup, build_setup

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def stopped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after 3 and 6 steps. Copy it before writing into it."""
    folder = tmp_path_factory.mktemp("stopped")
    path = folder / "recipe.yaml"
    path.write_text(f"data: {tiny_data}\nrun: {folder / 'run'}\n{TINY_RECIPE}")
    return train(load_recipe(path))


@pytest.fixture(scope="module")
def setup(stopped: Path) -> TrainingSetup:
    """Of that run."""
    return build_setup(load_recipe(stopped / "recipe.yaml"))[0]


def copied(stopped: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    return replace(load_recipe(run / "recipe.yaml"), run=str(run)), list_checkpoints(run)[-1]


def of(*keys: str | int, value: object = ...) -> Change:
    """Sets a field of `state.json`, or removes it where there is no value."""

    def change(state: Any) -> None:
        *parents, last = keys
        for key in parents:
            state = state[key]
        if value is ...:
            del state[last]
        else:
            state[last] = value

    return change


FIELDS: list[tuple[Change, str]] = [
    # Missing.
    (of("format_version"), "format_version is missing"),
    (of("progress"), "progress is missing"),
    (of("identity"), "identity is missing"),
    (of("files"), "files is missing"),
    (of("optimizer_step"), "optimizer_step is missing"),
    (of("progress", "step"), "progress.step is missing"),
    (of("progress", "best_ndcg"), "progress.best_ndcg is missing"),
    (of("identity", "recipe"), "identity.recipe is missing"),
    (of("files", 0, "sha256"), "files[0].sha256 is missing"),
    # Unknown.
    (of("other", value=1), "other is unknown"),
    (of("x" * 99, value=1), "xxxxxxxxxxxx...xxxxxxxxxxxxx is unknown"),
    (of("progress", "more", value=5), "progress.more is unknown"),
    (of("identity", "weights", value="x"), "identity.weights is unknown"),
    (of("files", 0, "mode", value=1), "files[0].mode is unknown"),
    # Of another type.
    (of("format_version", value="3"), "format_version is '3', this version reads 2 and 3"),
    (of("format_version", value=9), "format_version is 9, this version reads 2 and 3"),
    (of("format_version", value=3.0), "format_version is 3.0, this version reads 2 and 3"),
    (of("progress", value=None), "progress is None"),
    (of("progress", value=[]), "progress is []"),
    (of("progress", "step", value="5"), "progress.step is '5'"),
    (of("progress", "step", value=6.0), "progress.step is 6.0"),
    (of("progress", "step", value=True), "progress.step is True"),
    (of("progress", "best_ndcg", value="high"), "progress.best_ndcg is 'high'"),
    (of("progress", "stage_ended_early", value=None), "progress.stage_ended_early is None"),
    (of("optimizer_step", value=True), "optimizer_step is True"),
    (of("identity", value="x"), "identity is 'x'"),
    (of("identity", "recipe", value=7), "identity.recipe is 7"),
    (of("files", value={}), "files is {}"),
    (of("files", 0, value="x"), "files[0] is 'x'"),
    (of("files", 0, "bytes", value="1"), "files[0].bytes is '1'"),
    # Out of its range.
    (of("progress", "step", value=-5), "progress.step is -5 in step-00000006"),
    (of("progress", "step", value=5), "progress.step is 5 in step-00000006"),
    (of("progress", "step", value=10**9), "progress.step is 1000000000 in step-00000006"),
    (of("progress", "best_step", value=6), "progress.best_step is 6"),
    (of("progress", "best_step", value=-2), "progress.best_step is -2"),
    (of("progress", "best_ndcg", value=7.5), "progress.best_ndcg is 7.5"),
    (of("progress", "validations_without_gain", value=-1),
     "progress.validations_without_gain is -1"),
    (of("progress", "stage_ended_early", value=-2), "progress.stage_ended_early is -2"),
    (of("progress", "stage_ended_early", value=7),
     "progress.stage_ended_early is 7, and the run has 2 stages"),
    (of("optimizer_step", value=-1), "optimizer_step is -1 after 6 steps"),
    (of("optimizer_step", value=7), "optimizer_step is 7 after 6 steps"),
    (of("files", value=[]), "files is []"),
    (of("files", 0, "name", value="../../../etc/passwd"),
     "files[0].name is '../../../etc/passwd'"),
    (of("files", 0, "bytes", value=-1), "files[0].bytes is -1"),
    (of("files", 0, "sha256", value="beef"), "files[0].sha256 is 'beef'"),
    (lambda state: state["files"].append(state["files"][0]),
     "files has rank-00000-of-00001.safetensors twice"),
]  # fmt: skip
"""A change, and what is said of it."""


def damage(path: Path, change: Change, sign: bool) -> None:
    state = json.loads((path / "state.json").read_text())
    change(state)
    if sign:
        state["sha256"] = _sha256_of(state)
    (path / "state.json").write_text(json.dumps(state))


def refusal(path: Path, problem: str) -> str:
    return f"{path}/state.json: damaged ({problem}); resume from an older checkpoint"


@pytest.mark.parametrize(("change", "problem"), FIELDS, ids=[problem for _, problem in FIELDS])
def test_a_field_of_a_state_that_cannot_be_is_named(
    stopped: Path, setup: TrainingSetup, tmp_path: Path, change: Change, problem: str
) -> None:
    """Also where its sha256 was made anew."""
    _, path = copied(stopped, tmp_path)
    damage(path, change, sign=True)
    with pytest.raises(ValueError) as caught:
        read_state(path, setup.identity, setup)
    assert str(caught.value) == refusal(path, problem)


@pytest.mark.parametrize(
    "change",
    [
        of("progress", "best_ndcg", value=0.001),
        of("progress", "best_step", value=1),
        of("progress", "validations_without_gain", value=1),
        of("progress", "stage_ended_early", value=0),
        of("optimizer_step", value=4),
        of("files", 0, "bytes", value=12),
        of("sha256", value="0" * 64),
    ],
)
def test_a_value_that_could_be_is_held_by_the_sha256(
    stopped: Path, setup: TrainingSetup, tmp_path: Path, change: Change
) -> None:
    _, path = copied(stopped, tmp_path)
    assert read_state(path, setup.identity, setup)["progress"]["step"] == 6
    damage(path, change, sign=False)
    with pytest.raises(ValueError) as caught:
        read_state(path, setup.identity, setup)
    problem = "sha256 is not that of the other fields: one of them was changed"
    assert str(caught.value) == refusal(path, problem)
    damage(path, of("sha256"), sign=False)
    with pytest.raises(ValueError) as caught:
        read_state(path, setup.identity, setup)
    assert str(caught.value) == refusal(path, "sha256 is missing")


def test_a_state_of_the_version_before_is_read_and_its_fields_are_checked(tmp_path: Path) -> None:
    old = ROOT / "tests" / "fixtures" / "old_run" / "run" / "checkpoints" / "step-00000005"
    path = shutil.copytree(old, tmp_path / "step-00000005")
    state = read_state(path, {"origin": "fresh"})
    assert "sha256" not in state
    damage(path, of("identity", "origin"), sign=False)  # the first versions had none
    read_state(path, {"origin": "fresh"})
    damage(path, of("progress", "step", value=-5), sign=False)
    with pytest.raises(ValueError) as caught:
        read_state(path, {})
    assert str(caught.value) == refusal(path, "progress.step is -5 in step-00000005")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value: column 1"),
        (b"\0" * 40, "Expecting value: column 1"),
        (b"\xff\xfe", "not UTF-8: byte 0xff"),
        (b"[1, 2]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b'{"progress": {"best_ndcg": NaN}}', "NaN is no number"),
        (b"[" * 200_000, "nested more than 100 deep"),
    ],
    ids=["empty", "zeros", "binary", "a list", "a number", "no number", "deep"],
)  # fmt: skip
def test_a_state_that_is_no_object_is_one_line(
    stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, problem: str
) -> None:
    recipe, path = copied(stopped, tmp_path)
    (path / "state.json").write_bytes(content)
    command = ["train", f"{recipe.run}/recipe.yaml", "--set", f"run={recipe.run}"]
    assert run_command([*command, "--resume", "latest"]) == 1
    expected = f"{path}/state.json: not JSON ({problem}): resume from an older checkpoint"
    assert capfd.readouterr().err.splitlines()[-1] == f"genrec: {expected}"


def test_latest_is_the_newest_by_number_and_a_torn_one_is_none(tmp_path: Path) -> None:
    for name in ("step-9", "step-00000010", "step-00000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").touch()
    (tmp_path / "checkpoints" / "step-00000011").mkdir()
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert found.name == "step-00000010"


def test_any_slice_is_read_whatever_ranks_wrote_it(tmp_path: Path) -> None:
    """Parameters a and b as ZeRO-1 on two ranks has them: one after another, cut in the middle."""
    flat = torch.arange(20.0)
    whole = {"a": flat[:12], "b": flat[12:]}
    segments = [[Segment("a", 0, 0, 0, 10)], [Segment("a", 10, 0, 0, 2), Segment("b", 0, 0, 2, 8)]]
    names = [f"rank-{rank:05d}-of-00002.safetensors" for rank in range(2)]
    for rank, name in enumerate(names):
        fragments = json.dumps([astuple(segment) for segment in segments[rank]])
        tensors = {"weight.0": flat[10 * rank :][:10].clone()}
        save_file(tensors, tmp_path / name, {"fragments": fragments})
    checkpoint = Checkpoint.__new__(Checkpoint)  # of files alone: state.json is not read here
    checkpoint.path, checkpoint.facts = tmp_path, {"files": [{"name": name} for name in names]}
    checkpoint.stored = checkpoint._index()
    for name, values in whole.items():
        for start, end in itertools.combinations(range(len(values) + 1), 2):
            found = checkpoint.read("weight", name, start, end - start)
            assert torch.equal(found, values[start:end]), (name, start, end)
    with pytest.raises(ValueError, match="2 of 3 values of b"):
        checkpoint.read("weight", "b", 6, 3)


def test_a_foreign_folder_among_checkpoints_is_named(stopped: Path, tmp_path: Path) -> None:
    recipe, path = copied(stopped, tmp_path)
    foreign = path.with_name("step-before-the-change")
    shutil.copytree(path, foreign)
    assert list_checkpoints(Path(recipe.run))[-1] == path
    with pytest.raises(ValueError, match=f"^{foreign}: not a checkpoint's name"):
        train(recipe, resume="latest")
    train(recipe, resume=str(foreign))


def test_a_changed_recipe_is_refused_with_the_keys(stopped: Path, tmp_path: Path) -> None:
    recipe, path = copied(stopped, tmp_path)
    other = replace(
        recipe,
        seed=3,
        micro_batch_tokens=77,
        model=replace(recipe.model, dropout=0.3),
        finetune=replace(recipe.finetune, mask=replace(recipe.finetune.mask, k=7)),
    )
    with pytest.raises(ValueError, match="another recipe") as caught:
        train(other, resume="latest")
    assert str(caught.value) == (
        f"{path}: trained with another recipe: seed is 3 and was 0; model.dropout is 0.3 and was "
        "0.1; finetune.mask.k is 7 and was 4: set them back, or set another run directory"
    )
    (Path(recipe.run) / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match=r"not this run's.*set another run directory$"):
        train(other, resume="latest")
