"""Shards: the same bytes from the same sequences, little more than the raw numbers, readable by
plain webdataset."""

import hashlib
import io
import json
import os
import sys
import time

import numpy as np
import pytest
from genrec_shards.storage.write import write_shards
from shard_data import make_dataset


def digests(folder) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_two_writings_are_byte_equal(tmp_path):
    dataset = make_dataset(tmp_path)
    for name in ("a", "b"):
        write_shards(dataset, tmp_path / name, users_per_shard=64, users_per_record=16)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(digests(tmp_path / "a")) == [
        "lengths.npy",
        "manifest.json",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]


def test_the_manifest_is_as_documented(tmp_path):
    dataset = make_dataset(tmp_path)
    manifest = write_shards(dataset, tmp_path / "shards", users_per_shard=64, users_per_record=16)
    stored = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert set(stored) == {
        *(
            "format_version",
            "users",
            "items",
            "interactions",
            "sequences_hash",
            "users_per_record",
            "lengths_sha256",
        ),
        "shards",
    }
    assert stored["format_version"] == 2
    assert set(stored["shards"][0]) == {"name", "bytes", "sha256", "users", "records"}
    assert set(stored["shards"][0]["records"][0]) == {
        "offset",
        "bytes",
        "first_user",
        "users",
        "sha256",
    }
    assert [shard["users"] for shard in stored["shards"]] == [64, 64, 22]
    assert [
        record["first_user"] for shard in stored["shards"] for record in shard["records"]
    ] == list(range(0, 150, 16))
    assert stored["sequences_hash"] == dataset.info.sequences_hash
    assert (manifest.users, manifest.items, manifest.interactions) == (
        150,
        40,
        dataset.sequences.num_interactions,
    )
    for shard in stored["shards"]:
        data = (tmp_path / "shards" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        for record in shard["records"]:
            part = data[record["offset"] : record["offset"] + record["bytes"]]
            assert hashlib.sha256(part).hexdigest() == record["sha256"]
    assert (
        hashlib.sha256((tmp_path / "shards" / "lengths.npy").read_bytes()).hexdigest()
        == stored["lengths_sha256"]
    )
    lengths = np.load(tmp_path / "shards" / "lengths.npy", allow_pickle=False)
    assert lengths.dtype == np.dtype("<i4")
    assert np.array_equal(lengths, dataset.sequences.lengths)


def test_plain_webdataset_reads_every_record(tmp_path):
    import webdataset as wds

    sequences = (dataset := make_dataset(tmp_path)).sequences
    write_shards(dataset, tmp_path / "shards", users_per_shard=64, users_per_record=16)
    tars = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    users, items, keys = [], [], []
    for sample in wds.WebDataset(tars, shardshuffle=False):
        record = {
            name: np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False)
            for name in ("users", "offsets", "items")
        }
        assert all(values.dtype == np.dtype("<i4") for values in record.values())
        for place, user in enumerate(record["users"]):
            own = record["items"][record["offsets"][place] : record["offsets"][place + 1]]
            assert np.array_equal(
                own, sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
            )
        keys.append(sample["__key__"])
        users += record["users"].tolist()
        items += record["items"].tolist()
    assert keys == [f"{record:08d}" for record in range(10)]
    assert users == list(range(150))
    assert items == sequences.items.tolist()


def test_without_webdataset_the_tars_are_the_same_to_the_byte(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path)
    write_shards(dataset, tmp_path / "with", users_per_shard=64, users_per_record=16)
    monkeypatch.setitem(sys.modules, "webdataset", None)  # as if it were not installed
    write_shards(dataset, tmp_path / "without", users_per_shard=64, users_per_record=16)
    names = sorted(path.name for path in (tmp_path / "with").iterdir())
    assert len([name for name in names if name.endswith(".tar")]) == 3
    assert names == sorted(path.name for path in (tmp_path / "without").iterdir())
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_size_is_at_most_a_fifth_above_the_raw_numbers(tmp_path):
    dataset = make_dataset(tmp_path, num_users=22_000, num_items=12_000)
    manifest = write_shards(dataset, tmp_path / "shards")
    raw = 4 * (manifest.interactions + 2 * manifest.users)  # items, an offset and a user row each
    everything = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert sum(shard.bytes for shard in manifest.shards) <= 1.2 * raw
    assert everything <= 1.2 * raw


def test_wrong_sizes_and_existing_outputs_are_refused(tmp_path):
    dataset = make_dataset(tmp_path)
    for sizes in ((100, 16), (0, 16), (16, 0), (16, 32)):
        with pytest.raises(ValueError, match="multiple"):
            write_shards(
                dataset, tmp_path / "shards", users_per_shard=sizes[0], users_per_record=sizes[1]
            )
    assert not (tmp_path / "shards").exists()
    write_shards(dataset, tmp_path / "shards")
    with pytest.raises(ValueError, match="--overwrite"):
        write_shards(dataset, tmp_path / "shards")
    write_shards(
        dataset, tmp_path / "shards", users_per_shard=16, users_per_record=16, overwrite=True
    )
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 10
    with pytest.raises(ValueError, match="not ours"):
        write_shards(dataset, tmp_path / "data", overwrite=True)


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path):
    dataset = make_dataset(tmp_path)
    old, young, running, aside = (
        tmp_path / name
        for name in (
            ".shards.123.0123abcd.tmp",
            ".shards.124.0123abcd.tmp",
            ".shards.125.0123abcd.tmp",
            ".shards.126.0123abcd.old",
        )
    )
    foreign = tmp_path / ".shards-of-mine.123.0123abcd.tmp"
    yesterday = time.time() - 25 * 3600
    for folder in (old, young, running, aside, foreign):
        folder.mkdir()
        (folder / "shard-000000.tar").write_bytes(b"half")
    os.utime(running / "shard-000000.tar")  # its directory was last changed when this file was made
    for path in (
        old / "shard-000000.tar",
        old,
        running,
        aside / "shard-000000.tar",
        aside,
        foreign,
    ):
        os.utime(path, (yesterday, yesterday))
    os.utime(foreign / "shard-000000.tar", (yesterday, yesterday))
    write_shards(dataset, tmp_path / "shards")
    assert not old.exists()
    assert all(path.exists() for path in (young, running, aside, foreign))
