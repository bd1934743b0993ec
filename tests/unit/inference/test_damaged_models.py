"""A saved model whose files are damaged, incomplete or hostile: refused in one line that names the
file and what is wrong, however it is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genrec_dist import api
from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.config.model_manifest import MANIFEST, write_model_manifest
from genrec_dist.decoding.trie import TRIE_FILE
from genrec_dist.inference.load import load_model, load_run
from genrec_dist.training.setup import build_setup

ITEM_IDS = "item_embedding.weight"
WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("checkpoints", "tensorboard")
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=ignored)


def sign_anew(best: Path) -> None:
    """A manifest of the files as they are now, so that what comes after it is reached."""
    names = json.loads((best / MANIFEST).read_text())["sha256"]
    write_model_manifest(best, [name for name in names if (best / name).is_file()])


def change_weights(run: Path, change: Callable[[Tensors], object]) -> None:
    weights = load_file(run / "best" / WEIGHTS)
    change(weights)
    save_file(weights, run / "best" / WEIGHTS)
    sign_anew(run / "best")


def change_config(run: Path, **changes: object) -> None:
    path = run / "best" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    sign_anew(run / "best")


def refusal(load: Callable[[], object]) -> str:
    """The error's message: one line."""
    with pytest.raises(ValueError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_value(name: str, value: float) -> Callable[[Tensors], object]:
    def change(weights: Tensors) -> None:
        weights[name].view(-1)[3] = value

    return change


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no item ids": (lambda weights: weights.pop(ITEM_IDS), f"tensor {ITEM_IDS} is missing"),
    "no tokens": (
        lambda weights: weights.pop("model.shared.weight"),
        "tensor model.shared.weight is missing",
    ),
    "not a number": (
        set_value("model.decoder.layers.0.fc1.weight", float("nan")),
        "tensor model.decoder.layers.0.fc1.weight holds numbers that are not finite",
    ),
    "infinite": (
        set_value(ITEM_IDS, float("-inf")),
        f"tensor {ITEM_IDS} holds numbers that are not finite",
    ),
    "foreign": (
        lambda weights: weights.update({"adapter.weight": torch.zeros(2)}),
        "tensor adapter.weight is none of the model's",
    ),
    "another shape": (
        lambda weights: weights.update({ITEM_IDS: weights[ITEM_IDS][:-1].clone()}),
        f"tensor {ITEM_IDS} has the shape [",
    ),
}


@pytest.mark.parametrize("light", [True, False], ids=["light", "whole"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_are_not_the_models_are_refused(run: Path, damage: str, light: bool) -> None:
    change, message = DAMAGE[damage]
    change_weights(run, change)
    found = refusal(lambda: load_run(run, light=light))
    assert found.startswith(f"{run / 'best' / WEIGHTS}: {message}"), found


def test_no_command_and_no_function_takes_weights_that_are_not_there(
    run: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_weights(run, lambda weights: weights.pop(ITEM_IDS))
    message = f"{run / 'best' / WEIGHTS}: tensor {ITEM_IDS} is missing"
    for arguments in (
        ["recommend", str(run), "--history", "B3"],
        ["evaluate", str(run), "--out", str(tmp_path / "lists")],
    ):
        capfd.readouterr()
        assert run_command(arguments) == 1
        line = capfd.readouterr().err
        assert line.startswith(f"genrec: {message}"), line
        assert line.count("\n") == 1
    assert message in refusal(lambda: api.evaluate(run, data=tiny_data, device="cpu"))
    recipe = replace(load_recipe(run / "recipe.yaml"), run=str(tmp_path / "next"))
    assert message in refusal(lambda: build_setup(replace(recipe, init_from=str(run))))
    assert not (tmp_path / "lists").exists()
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("light", [True, False], ids=["light", "whole"])
def test_large_finite_weights_whose_sum_overflows_are_taken(run: Path, light: bool) -> None:
    def change(weights: Tensors) -> None:
        weights[ITEM_IDS].view(-1)[5:9] = 3e38

    change_weights(run, change)
    load_run(run, light=light)


@pytest.mark.parametrize("light", [True, False], ids=["light", "whole"])
def test_a_pickle_in_place_of_the_weights_is_never_read(run: Path, light: bool) -> None:
    best = run / "best"
    torch.save(load_file(best / WEIGHTS), best / "pytorch_model.bin")
    (best / WEIGHTS).unlink()
    message = f"{best / WEIGHTS}: no such file, and {MANIFEST} names it"
    assert message in refusal(lambda: load_run(run, light=light))
    (best / MANIFEST).unlink()
    assert f"{best / WEIGHTS}: no such file" in refusal(lambda: load_run(run, light=light))


def test_the_manifest_has_the_hash_of_each_file_but_the_trie(tiny_run: Path) -> None:
    best = tiny_run / "best"
    fields = json.loads((best / MANIFEST).read_text())
    assert fields["format_version"] == 1
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in best.iterdir()
        if path.name not in (MANIFEST, TRIE_FILE)
    }
    assert fields["sha256"] == hashes
    assert {"config.json", WEIGHTS, "items.parquet", "tokenizer.json"} <= hashes.keys()


@pytest.mark.parametrize("light", [True, False], ids=["light", "whole"])
def test_one_wrong_bit_in_any_file_is_refused(run: Path, light: bool) -> None:
    best = run / "best"
    for name in json.loads((best / MANIFEST).read_text())["sha256"]:
        path, whole = best / name, (best / name).read_bytes()
        changed = bytearray(whole)
        changed[-len(whole) // 4] ^= 1
        path.write_bytes(changed)
        message = refusal(lambda: load_model(best, light=light))
        assert message.startswith(f"{path}: damaged or changed (its sha256 "), message
        path.unlink()
        missing = f"{path}: no such file, and {MANIFEST} names it"
        assert missing in refusal(lambda: load_model(best, light=light))
        path.write_bytes(whole)
    load_model(best, light=light)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "not readable"),
        ("{}", "not readable"),
        ('{"format_version": 2, "sha256": {}}', "format 2, this version reads 1"),
    ],
)
def test_a_manifest_that_is_none_is_refused(run: Path, text: str, message: str) -> None:
    path = run / "best" / MANIFEST
    path.write_text(text)
    assert refusal(lambda: load_run(run)).startswith(f"{path}: {message}")


def test_half_a_catalogue_is_refused_also_of_a_run_without_a_manifest(run: Path) -> None:
    """As after following the advice to delete a trie that does not fit."""
    best = run / "best"
    table = pq.read_table(best / "items.parquet")
    pq.write_table(table.slice(0, table.num_rows // 2), best / "items.parquet")
    (best / TRIE_FILE).unlink()
    message = f"{best / 'items.parquet'}: damaged or changed"
    assert message in refusal(lambda: load_run(run, light=True))
    (best / MANIFEST).unlink()  # a run of an earlier version
    rows = f"{best / 'items.parquet'}: {table.num_rows // 2} rows, and the model has "
    assert f"{rows}{table.num_rows}" in refusal(lambda: load_run(run, light=True))


@pytest.mark.parametrize("light", [True, False], ids=["light", "whole"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", 10**9),
        ("decoder_start_token_id", -7),
        ("pad_token_id", None),
        ("num_masks", 10**9),
        ("encoder_layers", 10**6),
        ("d_model", 10**9),
        ("encoder_unit", "foo"),
        ("certain_tokens", ["given"]),
        ("model_type", "bert"),
        ("exclude_history", "no"),
        ("_attn_implementation", "kernels-community/flash-attn"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(
    run: Path, key: str, value: object, light: bool
) -> None:
    change_config(run, **{key: value})
    message = refusal(lambda: load_run(run, light=light))
    assert message.startswith(f"{run / 'best' / 'config.json'}: {key} is {value!r}: it has to be ")


@pytest.mark.parametrize("light", [True, False], ids=["light", "whole"])
@pytest.mark.parametrize("key", ["vocab_size", "num_items", "max_position_embeddings"])
def test_sizes_that_the_weights_do_not_have_ask_for_no_memory(
    run: Path, key: str, light: bool
) -> None:
    """Sizes that some model may have, of tensors that would fill any machine."""
    change_config(run, **{key: 2**20 if key == "max_position_embeddings" else 2**31 - 1})
    message = refusal(lambda: load_run(run, light=light))
    assert message.startswith(f"{run / 'best' / WEIGHTS}: tensor ")
    assert " has the shape [" in message
