"""Recipes and a run directory of the release before keys were renamed: still read, evaluated to the
same lists, resumed and started from. The files in `fixtures/old_run` were written by that
release."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from genrec_shards.dataset import load_dataset
from places import ROOT
from safetensors.torch import load_file

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import RENAMED_KEYS, load_recipe, recipe_from
from genrec_dist.config.recipe import CPU_MICRO_BATCH
from genrec_dist.inference.load import load_run
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

OLD = ROOT / "tests" / "fixtures" / "old_run"
CHANGED = {"begin_from": "a", "recompute": True, "tokens.certain": "given",
           "optimizer.clip": 0.25, "optimizer.average": 0.5}  # fmt: skip

SINCE = {"demo": ["pretrain.epochs=8", "finetune.epochs=3"]}
"""What shipped recipes say otherwise today."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run and its data; its recipe names them relative to here."""
    for name in ("data", "run"):
        shutil.copytree(OLD / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("path", sorted((OLD / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_old_recipe_loads_to_the_shipped_one(path: Path) -> None:
    shipped = load_recipe(path.stem)
    # `precision: auto` came later; it is bf16 wherever the old recipe was fast.
    old = load_recipe(path, SINCE.get(path.stem))
    assert shipped.precision in (old.precision, "auto")
    # `micro_batch_tokens: auto` came later; on a CPU it is the number that stood there.
    assert shipped.auto_keys in ((), ("micro_batch_tokens",))
    assert CPU_MICRO_BATCH == 6144
    assert old == replace(shipped, precision=old.precision, auto_keys=())


def values_of(key: str, value: object) -> dict[str, object]:
    *parents, last = key.split(".")
    return {parents[0]: {last: value}} if parents else {last: value}


@pytest.mark.parametrize(("old_key", "value"), CHANGED.items())
def test_an_old_key_is_read_and_both_names_are_refused(old_key: str, value: object) -> None:
    new_key = RENAMED_KEYS[old_key]
    smallest = {"data": "d", "run": "r", "finetune": {"epochs": 1}}
    wanted = recipe_from({**smallest, **values_of(new_key, value)})
    assert wanted != recipe_from(dict(smallest))
    text = f"{old_key}={yaml.safe_dump(value).splitlines()[0]}"
    assert recipe_from({**smallest, **values_of(old_key, value)}) == wanted
    assert recipe_from(dict(smallest), [text]) == wanted
    assert recipe_from({**smallest, **values_of(new_key, None)}, [text]) == wanted
    section, _, name = old_key.rpartition(".")
    if section:
        assert recipe_from(dict(smallest), [f"{section}={{{name}: {value}}}"]) == wanted
    both = values_of(old_key, value)
    if section:
        both[section] |= values_of(new_key, value)[section]  # type: ignore[operator]
    else:
        both |= values_of(new_key, value)
    with pytest.raises(ValueError, match=f"^file: {old_key} is the old name of {new_key}: "):
        recipe_from({**smallest, **both}, source="file")
    with pytest.raises(ValueError, match=f"^--set {old_key}: the old name of {new_key}, "):
        recipe_from(dict(smallest), [f"{new_key}=1", text])


def test_an_old_run_is_evaluated_to_the_same_lists(old: Path) -> None:
    before = pq.read_table(old / "top20-test.parquet")
    (old / "top20-test.parquet").unlink()
    assert run_command(["evaluate", "run", "--split", "test"]) == 0
    assert pq.read_table(old / "top20-test.parquet").drop("scores").equals(before.drop("scores"))


def test_an_old_run_is_resumed_to_the_same_weights(old: Path) -> None:
    last = old / "checkpoints" / "step-00000005"
    file = last / "rank-00000-of-00001.safetensors"
    before, best = load_file(file), load_file(old / "best" / "model.safetensors")
    shutil.rmtree(last)
    train(load_recipe(old / "recipe.yaml"), resume="latest")
    after = load_file(file)
    again = load_file(old / "best" / "model.safetensors")
    assert (before.keys(), best.keys()) == (after.keys(), again.keys())
    # Attention does not change when all scores of a query move alike, so the gradient of a key's
    # bias is rounding alone, which AdamW makes steps of: they differ between processors.
    names = [name for name, _ in load_run(old).model.named_parameters()]
    key_biases = {name for name in best if name.endswith("k_proj.bias")}
    assert len(key_biases) == 3
    for name, values in best.items():
        if name not in key_biases:
            torch.testing.assert_close(again[name], values, rtol=1e-4, atol=1e-6)
    differ = {
        name
        for name, values in before.items()
        if not torch.allclose(after[name], values, rtol=1e-4, atol=1e-6)
    }
    kinds = {name.split(".")[0] for name in before}
    assert differ <= {f"{kind}.{names.index(name)}" for kind in kinds for name in key_biases}


def test_a_run_starts_from_an_old_one(old: Path) -> None:
    recipe = load_recipe(old / "recipe.yaml")
    _, model = build_setup(replace(recipe, run="next", init_from=str(old)))
    for name, values in load_run(old).model.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], values), name
    assert load_dataset("data").sequences.num_items == 20
