"""The data directory: what is in it, that it is reproducible, and that damage is told in one
line."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards import dataset as dataset_module
from genrec_shards.dataset import load_dataset
from genrec_shards.errors import DataError
from genrec_shards.prepare import prepare

TEXT = "u2 10 9 100\nu1 9 10 9 7\nu3 7 7 9 10 8\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(TEXT)
    return path


def digests(folder) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_files_and_columns_are_as_documented(log, tmp_path):
    dataset = prepare(log, tmp_path / "data", numbering="given")
    assert sorted(p.name for p in dataset.path.iterdir()) == [
        "dataset.json",
        "items.parquet",
        "sequences.parquet",
        "users.parquet",
    ]
    lists = pq.read_table(dataset.path / "sequences.parquet")
    assert str(lists.schema.field("user").type) == "int32"
    assert str(lists.schema.field("items").type).startswith("list<")
    assert lists.to_pylist()[0] == {"user": 0, "items": [3, 2, 4]}
    items = pq.read_table(dataset.path / "items.parquet").to_pylist()
    assert items[0] == {"item": 0, "id": "7", "code": "7"}
    users = pq.read_table(dataset.path / "users.parquet").to_pylist()
    assert [row["id"] for row in users] == ["u2", "u1", "u3"]
    info = json.loads((dataset.path / "dataset.json").read_text())
    assert set(info) == {
        *(
            "format_version",
            "source",
            "users",
            "items",
            "interactions",
            "numbering",
            "seed",
            "split",
            "ties",
        ),
        *("sequences_hash", "numbering_hash", "dropped"),
    }
    assert info["source"] == {
        "name": "log.txt",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
    }
    assert (info["users"], info["items"], info["interactions"], info["dropped"]) == (3, 5, 12, {})


@pytest.mark.parametrize("numbering", ["given", "random", "train-order"])
def test_round_trip(log, tmp_path, numbering, monkeypatch):
    monkeypatch.setattr(dataset_module, "USERS_PER_ROW_GROUP", 2)  # more than one row group
    written = prepare(log, tmp_path / "data", numbering=numbering, seed=5)
    loaded = load_dataset(tmp_path / "data")
    assert np.array_equal(loaded.sequences.items, written.sequences.items)
    assert loaded.sequences.items.dtype == np.int32
    assert np.array_equal(loaded.sequences.offsets, written.sequences.offsets)
    assert loaded.sequences.offsets.dtype == np.int64
    assert loaded.numbering == written.numbering
    assert loaded.info == written.info
    assert loaded.path == written.path


def test_the_same_log_gives_the_same_bytes(log, tmp_path):
    first, second = prepare(log, tmp_path / "a").path, prepare(log, tmp_path / "b").path
    other = prepare(log, tmp_path / "c", seed=1).path
    assert digests(first) == digests(second)
    changed = {name for name, digest in digests(other).items() if digest != digests(first)[name]}
    assert changed == {"dataset.json", "items.parquet", "users.parquet"}


def test_an_existing_output_is_refused_without_overwrite(log, tmp_path):
    prepare(log, tmp_path / "data", seed=0)
    before = digests(tmp_path / "data")
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(log, tmp_path / "data", seed=1)
    assert digests(tmp_path / "data") == before
    prepare(log, tmp_path / "data", seed=1, overwrite=True)
    assert load_dataset(tmp_path / "data").info.seed == 1
    with pytest.raises(ValueError, match="not ours"):
        prepare(log, tmp_path, overwrite=True)
    assert log.exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "magic"}, "--format sequences"),
        ({"k_core": 5}, "are a log's"),
        ({"since": "2019-01-01"}, "are a log's"),
        ({"expect": "books"}, "choose one of beauty"),
        ({"expect": "beauty"}, "docs/data.md, or leave out --expect"),
        ({"on_error": "pass"}, "choose stop or skip"),
        ({"min_length": 2}, "are a log's"),
        ({"ties": "shuffle"}, "--ties keep"),
        ({"split": "global-time"}, "--split leave-one-out"),
        ({"numbering": "magic"}, "choose one of"),
        ({"numbering": "semantic"}, "give --items META"),
        ({"item_column": "asin"}, "give --items META"),
    ],
)
def test_wrong_choices_leave_nothing(log, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(log, tmp_path / "data", **wrong)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [log]


def test_a_bad_log_leaves_nothing(tmp_path):
    (tmp_path / "log.txt").write_text("u1 1 2\n")
    with pytest.raises(DataError):
        prepare(tmp_path / "log.txt", tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


def damage_json(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_codes(folder):
    table = pq.read_table(folder / "items.parquet")
    codes = table.column("code").to_pylist()
    pq.write_table(table.set_column(2, "code", [codes[1:] + codes[:1]]), folder / "items.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "dataset.json: no such file"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not a dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "not a dataset.json"),
        (lambda folder: damage_json(folder, format_version=99), "format_version 99"),
        (lambda folder: damage_json(folder, surprise=1), "surprise"),
        (lambda folder: damage_json(folder, sequences_hash="0" * 64), "sequences_hash"),
        (swap_codes, "numbering_hash"),
        (lambda folder: (folder / "users.parquet").unlink(), "users.parquet: no such file"),
        (
            lambda folder: (folder / "items.parquet").write_bytes(b"PAR1"),
            "items.parquet: not readable as Parquet",
        ),
        (
            lambda folder: shutil.copy(folder / "users.parquet", folder / "sequences.parquet"),
            "no column items",
        ),
    ],
)
def test_damage_is_told_in_one_line(log, tmp_path, damage, message):
    folder = prepare(log, tmp_path / "data").path
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
