"""Shards: the same bytes from the same sequences, little more than the raw numbers, readable by
plain webdataset."""

import hashlib
import io
import json

import numpy as np
import pytest
import webdataset
from genrec_shards.storage.write import write_shards
from shard_data import make_dataset, sequence_of, shard


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_manifest_is_as_documented(tmp_path):
    dataset = make_dataset(tmp_path)
    sequences = dataset.sequences
    manifest = write_shards(dataset, tmp_path / "shards", users_per_shard=64, users_per_record=16)
    files = contents(tmp_path / "shards")
    tars = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert list(files) == ["lengths.npy", "manifest.json", *tars]
    stored = json.loads(files["manifest.json"])
    shards = stored["shards"]
    totals = {"format_version": 2, "users": 150, "items": 40, "users_per_record": 16}
    totals |= {
        "interactions": sequences.num_interactions,
        "sequences_hash": dataset.info.sequences_hash,
        "lengths_sha256": sha256(files["lengths.npy"]),
    }
    assert stored == totals | {"shards": shards}
    assert all(getattr(manifest, name) == value for name, value in totals.items())
    assert set(shards[0]) == {"name", "bytes", "sha256", "users", "records"}
    assert set(shards[0]["records"][0]) == {"offset", "bytes", "first_user", "users", "sha256"}
    assert [one["users"] for one in shards] == [64, 64, 22]
    first_users = [record["first_user"] for one in shards for record in one["records"]]
    assert first_users == list(range(0, 150, 16))
    for one in shards:
        data = files[one["name"]]
        assert (len(data), sha256(data)) == (one["bytes"], one["sha256"])
        for record in one["records"]:
            part = data[record["offset"] : record["offset"] + record["bytes"]]
            assert sha256(part) == record["sha256"]
    lengths = np.load(io.BytesIO(files["lengths.npy"]), allow_pickle=False)
    assert lengths.dtype == np.dtype("<i4")
    assert np.array_equal(lengths, sequences.lengths)


def test_plain_webdataset_reads_every_record_and_writes_the_same_bytes(tmp_path):
    dataset = make_dataset(tmp_path)
    tars = sorted(shard(dataset, tmp_path / "shards").glob("*.tar"))
    users, items, keys = [], [], []
    for tar in tars:
        buffer = io.BytesIO()
        owner = {"user": "genrec", "group": "genrec", "mode": 0o444}
        writer = webdataset.TarWriter(buffer, encoder=False, mtime=0, compress=False, **owner)
        for sample in webdataset.WebDataset([str(tar)], shardshuffle=False):
            members = {name: sample[name] for name in ("items.npy", "offsets.npy", "users.npy")}
            writer.write({"__key__": sample["__key__"], **members})
            record = {
                name.removesuffix(".npy"): np.load(io.BytesIO(data), allow_pickle=False)
                for name, data in members.items()
            }
            assert all(values.dtype == np.dtype("<i4") for values in record.values())
            for place, user in enumerate(record["users"]):
                own = record["items"][record["offsets"][place] : record["offsets"][place + 1]]
                assert own.tolist() == sequence_of(dataset, user)
            keys.append(sample["__key__"])
            users += record["users"].tolist()
            items += record["items"].tolist()
        writer.close()
        assert buffer.getvalue() == tar.read_bytes()
    assert len(tars) == 3
    assert keys == [f"{record:08d}" for record in range(10)]
    assert users == list(range(150))
    assert items == dataset.sequences.items.tolist()


def test_size_is_at_most_a_fifth_above_the_raw_numbers(tmp_path):
    manifest = write_shards(make_dataset(tmp_path, 22_000, 12_000), tmp_path / "shards")
    raw = 4 * (manifest.interactions + 2 * manifest.users)  # items, an offset and a user row each
    assert sum(one.bytes for one in manifest.shards) <= 1.2 * raw
    assert sum(map(len, contents(tmp_path / "shards").values())) <= 1.2 * raw


def test_wrong_sizes_and_existing_outputs_are_refused(tmp_path):
    dataset, out = make_dataset(tmp_path), tmp_path / "shards"
    for per_shard, per_record in ((100, 16), (0, 16), (16, 0), (16, 32)):
        with pytest.raises(ValueError, match="multiple"):
            write_shards(dataset, out, users_per_shard=per_shard, users_per_record=per_record)
    assert not out.exists()
    write_shards(dataset, out)
    with pytest.raises(ValueError, match="--overwrite"):
        write_shards(dataset, out)
    write_shards(dataset, out, users_per_shard=16, users_per_record=16, overwrite=True)
    assert len(list(out.glob("*.tar"))) == 10
    with pytest.raises(ValueError, match="not ours"):
        write_shards(dataset, tmp_path / "data", overwrite=True)
