"""Hierarchical codes through the doors: what prepare keeps of them, says of them and refuses, and
how words are cut."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import make_process
from safetensors.numpy import save_file

from genrec_dist.cli.app import run_command
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.txt"
    write_sequences(make_process(128, 16, seed=2).sample(400, 5, 12), path)
    return path


@pytest.fixture(scope="module")
def data(log: Path) -> Path:
    """Sharded, with random codes."""
    dataset = prepare(log, log.parent / "data")
    write_shards(dataset, dataset.path / "shards")
    return dataset.path


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text())


def refused(capfd: pytest.CaptureFixture[str], code: int, arguments: list[Any]) -> str:
    capfd.readouterr()
    assert run_command([str(argument) for argument in arguments]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("genrec: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def table(folder: Path, items: list[str]) -> Path:
    path = folder / "meta.csv"
    lines = [
        f"{item},thing number {row % 9} of kind {row % 5}"
        for row, item in enumerate(items)
        if row % 4
    ]
    path.write_text("\n".join(["asin,title", *lines]) + "\n")
    return path


def test_what_codes_were_made_of_is_kept_and_loads_back(log, tmp_path):
    written = prepare(log, tmp_path / "data", numbering="collaborative", levels=[6, 4])
    assert info(tmp_path / "data")["hierarchy"] == {
        "made_from": "co-occurrence", "levels": [6, 4], "dims": 64, "window": 6, "file": None, "file_sha256": None,
        "trained_through": "n-2", "unseen": 0, "placed_at_random": 0,
    }  # fmt: skip
    loaded = load_dataset(tmp_path / "data")
    assert loaded.numbering == written.numbering
    assert loaded.info == written.info


def test_other_numberings_leave_the_files_of_before(log, tmp_path):
    fields = info(prepare(log, tmp_path / "data").path)
    assert "hierarchy" not in fields
    assert "described_by" not in fields
    assert fields["format_version"] == 1


def test_a_damaged_hierarchy_is_told_in_one_line(log, tmp_path):
    folder = prepare(log, tmp_path / "data", numbering="collaborative").path
    (folder / "dataset.json").write_text(json.dumps(info(folder) | {"hierarchy": {"levels": [3]}}))
    with pytest.raises(ValueError, match=r"not a dataset\.json") as caught:
        load_dataset(folder)
    assert "\n" not in str(caught.value)


def test_data_is_numbered_anew_without_its_log_and_keeps_its_shards(log, data, tmp_path):
    anew = prepare(data, tmp_path / "anew", format="data", numbering="collaborative", levels=[6, 4])
    direct = prepare(log, tmp_path / "direct", numbering="collaborative", levels=[6, 4])
    assert digests(anew.path) == digests(direct.path)
    assert anew.info.sequences_hash == ShardReader(data / "shards").manifest.sequences_hash
    again = prepare(anew.path, tmp_path / "again", format="data")
    assert digests(again.path).items() <= digests(data).items()


def test_texts_are_kept_and_found_again(log, data, tmp_path):
    items = load_dataset(data).sequences.item_ids
    meta = table(tmp_path, items)
    made = prepare(log, tmp_path / "made", numbering="semantic", items=meta)
    assert made.numbering.hierarchy is not None
    assert made.numbering.hierarchy.placed_at_random == 32
    assert (made.numbering.hierarchy.made_from, made.numbering.hierarchy.trained_through) == (
        "text",
        None,
    )
    assert made.numbering.hierarchy.file_sha256 == hashlib.sha256(meta.read_bytes()).hexdigest()
    kept = prepare(log, tmp_path / "kept", items=meta)  # random codes, texts beside them
    loaded = load_dataset(tmp_path / "kept")
    assert loaded.descriptions is not None
    assert loaded.descriptions.texts == kept.descriptions.texts  # type: ignore[union-attr]
    assert loaded.descriptions.texts[1] == "thing number 1 of kind 1"
    meta.unlink()
    anew = prepare(tmp_path / "kept", tmp_path / "anew", format="data", numbering="semantic")
    assert digests(anew.path) == digests(made.path)


def vectors_file(path: Path, data: Path, trained_through: str = "n-2") -> Path:
    sequences = load_dataset(data).sequences
    values = np.random.default_rng(0).normal(size=(sequences.num_items, 8)).astype(np.float32)
    metadata = {"sequences_hash": sequences.sequences_hash(), "trained_through": trained_through}
    save_file({"items": values}, path, metadata=metadata)
    return path


def test_prepare_says_what_codes_are_made_of_and_how_even_they_are(log, data, tmp_path, capfd):
    command = ["prepare", str(log), "--numbering", "collaborative", "--levels", "6,4", "--out"]
    assert run_command([*command, str(tmp_path / "one")]) == 0
    said = capfd.readouterr().out
    assert (
        "made from co-occurrence, trained through n-2; 0 collisions; 0 items unseen in training"
        in said
    )
    assert "level 1: 6 beginnings of 20 to 22 items" in said
    assert "level 3: 128 beginnings of 1 to 1 items (median 1), entropy share 1.0000" in said
    assert json.loads((tmp_path / "one" / "audit.json").read_text())["leaks"] is False
    vectors = vectors_file(tmp_path / "v.safetensors", data)
    assert run_command([*command, str(tmp_path / "two"), "--vectors", str(vectors)]) == 0
    assert "made from vectors (v.safetensors), trained through n-2" in capfd.readouterr().out
    assert (
        info(tmp_path / "two")["hierarchy"]["file_sha256"]
        == hashlib.sha256(vectors.read_bytes()).hexdigest()
    )
    vectors_file(vectors, data, "n-1")
    arguments = [*command, tmp_path / "three", "--vectors", vectors]
    assert "have seen the validation targets" in refused(capfd, 1, arguments)
    assert run_command([*map(str, arguments), "--vectors-trained-through", "n-1"]) == 0
    assert info(tmp_path / "three")["hierarchy"]["trained_through"] == "n-1"
    meta = table(tmp_path, load_dataset(data).sequences.item_ids)
    arguments = [
        "prepare",
        data,
        "--format",
        "data",
        "--numbering",
        "semantic",
        "--items",
        meta,
        "--out",
        tmp_path / "four",
    ]
    assert run_command([str(argument) for argument in [*arguments, "--text-columns", "title"]]) == 0
    assert (
        "made from text (meta.csv); 0 collisions; 0 items unseen in training, 32 placed at random"
        in (capfd.readouterr().out)
    )


def test_refusals_are_one_line_and_leave_nothing(log, data, tmp_path, capfd):
    out = tmp_path / "out"
    start = ["prepare", log, "--out", out]
    assert "as 64,64" in refused(
        capfd, 2, [*start, "--numbering", "collaborative", "--levels", "64;64"]
    )
    assert "levels 0: give" in refused(
        capfd, 1, [*start, "--numbering", "collaborative", "--levels", "0"]
    )
    assert "only collaborative and semantic" in refused(capfd, 1, [*start, "--levels", "8"])
    assert "give --items META" in refused(capfd, 1, [*start, "--numbering", "semantic"])
    absent = tmp_path / "absent.safetensors"
    assert f"{absent}: no such file" in refused(
        capfd, 1, [*start, "--numbering", "collaborative", "--vectors", absent]
    )
    assert "choose another output" in refused(
        capfd, 1, ["prepare", data, "--format", "data", "--out", data, "--overwrite"]
    )
    assert "dataset.json: no such file" in refused(
        capfd, 1, ["prepare", tmp_path, "--format", "data", "--out", out]
    )
    assert list(tmp_path.iterdir()) == []
    assert (data / "shards" / "manifest.json").exists()


def test_the_bytes_do_not_depend_on_threads_or_process(log, tmp_path):
    found = set()
    for threads in ("1", "3"):
        limits = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads
        )
        environment = {
            **os.environ,
            **limits,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": threads,
        }
        program = (
            "import sys; from genrec_shards.prepare import prepare; "
            "prepare(sys.argv[1], sys.argv[2], numbering='collaborative')"
        )
        out = tmp_path / threads
        subprocess.run(
            [sys.executable, "-c", program, str(log), str(out)],
            env=environment,
            check=True,
            timeout=300,
        )
        found.add(json.dumps(digests(out)))
    assert len(found) == 1
    assert digests(prepare(log, tmp_path / "here", numbering="collaborative").path) == json.loads(
        found.pop()
    )


def test_a_large_vocabulary_makes_each_level_one_token_of_its_own(log, tmp_path):
    dataset = prepare(log, tmp_path / "data", numbering="collaborative", levels=[12, 4])
    codes = dataset.numbering
    tokenizer = train_tokenizer(codes.item_codes, 1024)
    words = build_words(tokenizer, codes.item_codes, codes.user_codes)
    tokens, offsets = words.tokens_of_items()
    assert (np.diff(offsets) == 3).all()
    levels = tokens.reshape(-1, 3)
    spoken = [set(level.tolist()) for level in levels.T]
    assert not (spoken[0] & spoken[1])
    assert not (spoken[0] & spoken[2])
    assert not (spoken[1] & spoken[2])
    assert [len(level) for level in spoken] == [
        12,
        4,
        len({code.split("-")[2] for code in codes.item_codes}),
    ]
    assert tokenizer.tokenize(f" item_{codes.item_codes[0]}")[1:] == [
        f"-{part}" for part in codes.item_codes[0].split("-")[1:]
    ]


def test_a_small_vocabulary_never_joins_two_levels(log, tmp_path):
    codes = prepare(
        log, tmp_path / "data", numbering="collaborative", levels=[12, 4]
    ).numbering.item_codes
    tokenizer = train_tokenizer(codes, 290)
    for code in codes:
        pieces = tokenizer.tokenize(f" item_{code}")
        assert all("-" not in piece[1:] for piece in pieces)
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids(pieces)) == f" item_{code}"


@pytest.mark.parametrize(
    "code", ["-", "--", "a-", "-a", "a--b", "a-b-c", "550e8400-e29b-41d4", "x-é-7"]
)
def test_ids_that_hold_the_separator_come_back(code):
    tokenizer = train_tokenizer([code, "a1-b2", "12"], 300)
    for text in (f" item_{code}", f" user_{code}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.encode(f" item_12{text}", add_special_tokens=False)[-len(ids) :] == ids
