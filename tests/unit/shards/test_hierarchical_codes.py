"""Hierarchical codes by the commands: what prepare keeps, prints and refuses, and how the words are
tokenized."""

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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text())


def collaborative(source: Path, out: Path, levels: tuple[int, ...] = (6, 4), **more: Any) -> Any:
    return prepare(source, out, numbering="collaborative", levels=levels, **more)


def table_of_texts(folder: Path, data: Path) -> Path:
    """Texts of three items in four."""
    path = folder / "meta.csv"
    lines = ["asin,title"]
    for row, item in enumerate(load_dataset(data).sequences.item_ids):
        if row % 4:
            lines.append(f"{item},thing number {row % 9} of kind {row % 5}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_hierarchy_is_kept_and_loads_back(log, tmp_path):
    written = collaborative(log, tmp_path / "data")
    assert info(tmp_path / "data")["hierarchy"] == {
        "made_from": "co-occurrence",
        "levels": [6, 4],
        "dims": 64,
        "window": 6,
        "file": None,
        "file_sha256": None,
        "trained_through": "n-2",
        "unseen": 0,
        "placed_at_random": 0,
    }
    loaded = load_dataset(tmp_path / "data")
    assert loaded.numbering == written.numbering
    assert loaded.info == written.info


def test_other_numberings_leave_the_file_without_hierarchy(data):
    fields = info(data)
    assert not {"hierarchy", "described_by"} & set(fields)
    assert fields["format_version"] == 1


def test_damaged_hierarchy_is_reported_in_one_line(log, tmp_path):
    folder = collaborative(log, tmp_path / "data").path
    (folder / "dataset.json").write_text(json.dumps(info(folder) | {"hierarchy": {"levels": [3]}}))
    with pytest.raises(ValueError, match=r"not a dataset\.json") as caught:
        load_dataset(folder)
    assert "\n" not in str(caught.value)


def test_data_is_numbered_anew_without_its_log_and_keeps_its_shards(log, data, tmp_path):
    anew = collaborative(data, tmp_path / "anew", format="data")
    assert digests(anew.path) == digests(collaborative(log, tmp_path / "direct").path)
    assert anew.info.sequences_hash == ShardReader(data / "shards").manifest.sequences_hash
    again = prepare(anew.path, tmp_path / "again", format="data")
    assert digests(again.path).items() <= digests(data).items()


def test_texts_are_kept_and_found_again(log, data, tmp_path):
    meta = table_of_texts(tmp_path, data)
    made = prepare(log, tmp_path / "made", numbering="semantic", items=meta)
    hierarchy = made.numbering.hierarchy
    assert (hierarchy.made_from, hierarchy.trained_through) == ("text", None)
    assert (hierarchy.placed_at_random, hierarchy.file_sha256) == (32, sha256(meta))
    kept = prepare(log, tmp_path / "kept", items=meta)  # random codes, texts beside them
    loaded = load_dataset(tmp_path / "kept")
    assert loaded.descriptions.texts == kept.descriptions.texts
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


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Runs `prepare`: what it prints, or with a code above 0 its one line of error."""

    def run(code: int, *arguments: Any) -> str:
        capfd.readouterr()
        assert run_command(["prepare", *map(str, arguments)]) == code
        captured = capfd.readouterr()
        if code == 0:
            return captured.out
        assert captured.out == ""
        assert captured.err.startswith("genrec: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


def test_prepare_says_what_codes_are_made_of_and_how_even_they_are(log, data, tmp_path, run):
    start = [log, "--numbering", "collaborative", "--levels", "6,4", "--out"]
    printed = run(0, *start, tmp_path / "one")
    made_from = "made from co-occurrence, trained through n-2; 0 collisions; 0 items unseen"
    assert made_from in printed
    assert "level 1: 6 beginnings of 20 to 22 items" in printed
    assert "level 3: 128 beginnings of 1 to 1 items (median 1), entropy share 1.0000" in printed
    assert json.loads((tmp_path / "one" / "audit.json").read_text())["leaks"] is False

    vectors = vectors_file(tmp_path / "v.safetensors", data)
    printed = run(0, *start, tmp_path / "two", "--vectors", vectors)
    assert "made from vectors (v.safetensors), trained through n-2" in printed
    assert info(tmp_path / "two")["hierarchy"]["file_sha256"] == sha256(vectors)

    vectors_file(vectors, data, "n-1")
    arguments = [*start, tmp_path / "three", "--vectors", vectors]
    assert "have seen the validation targets" in run(1, *arguments)
    run(0, *arguments, "--vectors-trained-through", "n-1")
    assert info(tmp_path / "three")["hierarchy"]["trained_through"] == "n-1"

    meta, of_data = table_of_texts(tmp_path, data), [data, "--format", "data"]
    arguments = [*of_data, "--numbering", "semantic", "--items", meta, "--out", tmp_path / "four"]
    printed = run(0, *arguments, "--text-columns", "title")
    assert "made from text (meta.csv); 0 collisions; 0 items unseen in training, 32 p" in printed


def test_refusals_are_one_line_and_leave_nothing(log, data, tmp_path, run):
    out, absent = tmp_path / "out", tmp_path / "absent.safetensors"
    start = [log, "--out", out]
    codes = [*start, "--numbering", "collaborative"]
    assert "as 64,64" in run(2, *codes, "--levels", "64;64")
    assert "levels 0: give" in run(1, *codes, "--levels", "0")
    assert "only collaborative, semantic and combined" in run(1, *start, "--levels", "8")
    assert "give --items META" in run(1, *start, "--numbering", "semantic")
    assert f"{absent}: no such file" in run(1, *codes, "--vectors", absent)
    over_itself = [data, "--format", "data", "--out", data, "--overwrite"]
    assert "choose another output" in run(1, *over_itself)
    nothing = [tmp_path, "--format", "data", "--out", out]
    assert "dataset.json: no such file" in run(1, *nothing)
    assert list(tmp_path.iterdir()) == []
    assert (data / "shards" / "manifest.json").exists()


def test_bytes_do_not_depend_on_threads_or_process(log, tmp_path):
    program = (
        "import sys; from genrec_shards.prepare import prepare; "
        "prepare(sys.argv[1], sys.argv[2], numbering='collaborative')"
    )
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED")
    expected = digests(prepare(log, tmp_path / "here", numbering="collaborative").path)
    for threads in ("1", "3"):
        limits = dict.fromkeys(names, threads) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program, str(log), str(tmp_path / threads)]
        subprocess.run(command, env=os.environ | limits, check=True, timeout=300)
        assert digests(tmp_path / threads) == expected


def test_large_vocabulary_makes_each_level_one_token_of_its_own(log, tmp_path):
    codes = collaborative(log, tmp_path / "data", (12, 4)).numbering
    tokenizer = train_tokenizer(codes.item_codes, 1024)
    words = build_words(tokenizer, codes.item_codes, codes.user_codes)
    tokens, offsets = words.tokens_of_items()
    assert (np.diff(offsets) == 3).all()
    levels = [set(level.tolist()) for level in tokens.reshape(-1, 3).T]
    assert len(set.union(*levels)) == sum(map(len, levels))
    numbers = {code.split("-")[2] for code in codes.item_codes}
    assert [len(level) for level in levels] == [12, 4, len(numbers)]
    first, *others = codes.item_codes[0].split("-")
    assert tokenizer.tokenize(f" item_{codes.item_codes[0]}")[1:] == [f"-{one}" for one in others]
    assert first.startswith("a")


def test_small_vocabulary_never_joins_two_levels(log, tmp_path):
    codes = collaborative(log, tmp_path / "data", (12, 4)).numbering.item_codes
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
