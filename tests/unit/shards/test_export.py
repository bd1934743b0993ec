"""The split as files: the same rows and order as the data directory, complete or absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from genrec_shards.splits import NO_TARGET
from genrec_shards.storage import export as export_module
from genrec_shards.storage.export import export
from logs import DATES, dated_rows, messy_rows, write_csv

from genrec_dist.cli.app import run_command

BY_TIME = {"split": "global-time", "cutoff": DATES, "k_core": 2}


def prepared(folder: Path, **options: Any) -> Dataset:
    rows = dated_rows() if options else messy_rows(0)
    return prepare(write_csv(folder / "log.csv", rows), folder / "data", **options)


def lists_of(frame: pl.DataFrame, users: Sequence[str]) -> list[list[str]]:
    """Items of each user, in the order of the file."""
    found = {user: [] for user in users}
    for user, item in frame.select(frame.columns[:2]).iter_rows():
        found[user].append(item)
    return list(found.values())


def read(path: Path, **options: Any) -> pl.DataFrame:
    return pl.read_csv(path, infer_schema=False, **options)


@pytest.mark.parametrize("options", [{}, BY_TIME], ids=["leave-one-out", "global-time"])
def test_the_files_hold_what_the_split_says(options: dict[str, Any], tmp_path: Path) -> None:
    dataset = prepared(tmp_path, **options)
    export(dataset, tmp_path / "split", "csv")
    frames = [read(tmp_path / "split" / f"{n}.csv") for n in ("train", "validation", "test")]
    sequences = dataset.sequences
    train, validation, test = (lists_of(frame, sequences.user_ids) for frame in frames)
    histories = {}
    for split in ("validation", "test"):
        view = sequences.history_and_target(split)  # type: ignore[arg-type]
        histories[split] = [
            [sequences.item_ids[item] for item in sequences.items[start:end]]
            for start, end in zip(view.starts, view.ends, strict=True)
        ]
        targets = [[sequences.item_ids[t]] if t != NO_TARGET else [] for t in view.targets]
        found = test if split == "test" else [items[:1] for items in validation]
        assert found == targets
    assert train == histories["validation"]
    joined = [first + then for first, then in zip(train, validation, strict=True)]
    assert joined == histories["test"]
    # Place and time are those of the whole sequence.
    assert dataset.timestamps is not None
    offsets = dict(zip(sequences.user_ids, sequences.offsets, strict=False))
    for user, item, position, time in pl.concat(frames).iter_rows():
        at = offsets[user] + int(position) - 1
        assert sequences.item_ids[sequences.items[at]] == item
        assert float(time) * 1e6 == dataset.timestamps[at]


def test_the_other_forms_hold_the_same_rows(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    for form in ("csv", "rectools", "recbole"):
        export(dataset, tmp_path / form, form)  # type: ignore[arg-type]
    for name, short in (("train", "train"), ("validation", "valid"), ("test", "test")):
        ours = read(tmp_path / "csv" / f"{name}.csv")
        theirs = read(tmp_path / "rectools" / f"{name}.csv")
        assert theirs.columns == ["user_id", "item_id", "weight", "datetime"]
        assert theirs["weight"].unique().to_list() == ["1"]
        times = theirs["datetime"].str.to_datetime(time_unit="us").cast(pl.Int64)
        assert times.equals((ours["timestamp"].cast(pl.Float64) * 1e6).cast(pl.Int64))
        atomic = read(tmp_path / "recbole" / f"recbole.{short}.inter", separator="\t")
        assert atomic.columns == [
            *("user_id:token", "item_id:token", "timestamp:float", "position:float")
        ]
        for frame in (theirs, atomic):
            assert (
                frame.select(frame.columns[:2]).rows() == ours.select("user_id", "item_id").rows()
            )
        assert (
            atomic.select(atomic.columns[2:]).rows() == ours.select("timestamp", "position").rows()
        )
    whole = read(tmp_path / "recbole" / "recbole.inter", separator="\t")
    assert whole["item_id:token"].to_list() == [
        dataset.sequences.item_ids[item] for item in dataset.sequences.items
    ]


def test_without_times_the_order_is_the_time(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("u1 a b c d\nu2 d c a\n")
    dataset = prepare(tmp_path / "log.txt", tmp_path / "data")
    for form in ("csv", "rectools", "recbole"):
        export(dataset, tmp_path / form, form)  # type: ignore[arg-type]
    train = "user_id,item_id,position\nu1,a,1\nu1,b,2\nu2,d,1\n"
    assert (tmp_path / "csv" / "train.csv").read_text() == train
    assert (tmp_path / "rectools" / "test.csv").read_text() == (
        "user_id,item_id,weight,datetime\n"
        "u1,d,1,2000-01-01T00:00:03.000000\nu2,a,1,2000-01-01T00:00:02.000000\n"
    )
    assert (tmp_path / "recbole" / "recbole.valid.inter").read_text().splitlines() == [
        "user_id:token\titem_id:token\ttimestamp:float\tposition:float",
        *("u1\tc\t3\t3", "u2\tc\t2\t2"),
    ]


def test_the_bytes_do_not_depend_on_the_windows_of_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = prepared(tmp_path)
    export(dataset, tmp_path / "a", "csv")
    windows = export_module.windows
    monkeypatch.setattr(export_module, "windows", lambda users: windows(users, 7))
    export(dataset, tmp_path / "b", "csv")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_export_is_complete_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = prepared(tmp_path)
    command = ["export", str(dataset.path), "--to", "csv", "--out", str(tmp_path / "split")]
    assert run_command(command) == 0
    said = capfd.readouterr().out
    info = json.loads((tmp_path / "split" / "export.json").read_text())
    assert info["sequences_hash"] == dataset.info.sequences_hash
    assert (info["to"], info["split"]) == ("csv", "leave-one-out")
    for name, rows in info["rows"].items():
        assert f"{tmp_path / 'split' / name}: {rows:,} rows" in said
        assert len(read(tmp_path / "split" / name)) == rows
    content = (tmp_path / "split" / "train.csv").read_bytes()
    assert run_command(command) == 1
    assert "exists" in capfd.readouterr().err

    def full(*_: Any) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "flat_ranges", full)
    assert run_command([*command, "--overwrite"]) == 1
    assert "make room" in capfd.readouterr().err
    assert (tmp_path / "split" / "train.csv").read_bytes() == content
    assert run_command([*command[:-1], str(tmp_path / "new")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log.csv", "split"]
    # Another directory is not ours to replace.
    assert run_command([*command[:-1], str(dataset.path), "--overwrite"]) == 1
    assert "choose another output" in capfd.readouterr().err
