"""Reading shards: every record and user exact, damage reported by name, nothing in a member ever
run."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.storage.reader import ShardReader
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_damage import Canary, change_manifest, npy, replace_record
from shard_data import NUM_RECORDS, NUM_USERS, check_gather, make_dataset, sequence_of, shard


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("read")
    dataset = make_dataset(folder)
    shard(dataset, folder / "shards")
    return dataset


@pytest.fixture
def shards(made, tmp_path):
    """A copy of the shards that a test may damage."""
    return shard(made, tmp_path / "shards")


def open_reader(made: Dataset, **options) -> ShardReader:
    return ShardReader(made.path.parent / "shards", **options)


def test_records_tile_the_users(made):
    reader = open_reader(made)
    assert reader.num_records == NUM_RECORDS
    users = []
    for index in range(reader.num_records):
        record = reader.record(index)
        assert record.first_user == record.users[0]
        assert all(
            array.dtype == np.int32 for array in (record.users, record.offsets, record.items)
        )
        users += record.users.tolist()
        for place, user in enumerate(record.users):
            own = record.items[record.offsets[place] : record.offsets[place + 1]]
            assert own.tolist() == sequence_of(made, user)
    assert users == list(range(NUM_USERS))
    for wrong in (-1, NUM_RECORDS):
        with pytest.raises(ValueError, match=f"record {wrong} of {NUM_RECORDS}"):
            reader.record(wrong)


@given(st.lists(st.integers(0, NUM_USERS - 1), max_size=60))
@settings(max_examples=60, deadline=None)
def test_gather_gives_any_users_in_any_order(made, users):
    for cache_records in (1, 256):
        check_gather(open_reader(made, verify=False, cache_records=cache_records), made, users)


@pytest.mark.parametrize("wrong", [-1, NUM_USERS])
def test_gather_refuses_users_that_do_not_exist(made, wrong):
    with pytest.raises(ValueError, match=r"outside 0\.\.149"):
        open_reader(made).gather(np.array([0, wrong]))


def test_reader_keeps_the_most_recently_used_records(made):
    reader = open_reader(made, cache_records=2)
    first = reader.record(0)
    assert reader.record(0) is first
    reader.record(1), reader.record(0), reader.record(2)
    assert reader.record(0) is first  # record 1 was the least recently used
    assert len(reader._cache) == 2
    assert len(pickle.loads(pickle.dumps(reader))._cache) == 0


def test_reading_and_writing_need_neither_webdataset_nor_packages_for_addresses(made):
    program = (
        "import sys\n"
        "for name in ('webdataset', 'fsspec', 'aiohttp', 's3fs'): sys.modules[name] = None\n"
        "from genrec_shards.storage.reader import ShardReader; import genrec_shards.storage.write\n"
        "import genrec_shards.storage.sample_order\n"
        "print(ShardReader(sys.argv[1]).record(0).first_user)"
    )
    command = [sys.executable, "-c", program, str(made.path.parent / "shards")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0\n"


def flip(name: str, position: int):
    def damage(shards):
        data = bytearray((shards / name).read_bytes())
        data[position] ^= 1
        (shards / name).write_bytes(data)

    return damage


def manifest(change):
    return lambda shards: change_manifest(shards, change)


def first_shard(**fields):
    return manifest(lambda m: m["shards"][0].update(fields))


def record(number: int, **fields):
    return manifest(lambda m: m["shards"][0]["records"][number].update(fields))


OUTSIDE = ("../data/x.tar", "..", "", "a/b.tar", "pipe:touch canary", "%2e%2e%2fx.tar", "x.tar?v=1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: os.truncate(s / "shard-000001.tar", 4096), "1.tar: 4096 bytes, expected"),
        (flip("shard-000002.tar", 3), "shard-000002.tar: sha256 .* expected .* shard again"),
        (flip("shard-000000.tar", 5000), "shard-000000.tar: sha256"),
        (lambda s: (s / "shard-000001.tar").unlink(), "shard-000001.tar: no such shard"),
        (lambda s: (s / "manifest.json").unlink(), "manifest.json: no such file"),
        (lambda s: (s / "manifest.json").write_text("{"), "not a manifest"),
        (lambda s: (s / "manifest.json").write_text("[1]"), "not a manifest"),
        (manifest(lambda m: m.update(format_version=1)), "format_version 1, .* 2: shard again"),
        (manifest(lambda m: m.update(interactions=7)), "lengths.npy: .* of 150 users"),
        (record(0, offset=-1), "no whole number"),
        (record(0, bytes="9"), "no whole number"),
        (record(3, offset=10**9), "behind the end"),
        *((manifest(lambda m, v=v: m.update(items=v)), "items is") for v in ("x", None, -1, 1.5)),
        *(
            (manifest(lambda m, v=v: m.update(users_per_record=v)), "per_record is")
            for v in (0, [])
        ),
        (manifest(lambda m: m.update(lengths_sha256=None)), "lengths_sha256 is None, no sha256"),
        (manifest(lambda m: m.update(sequences_hash=7)), "sequences_hash is 7, no sha256"),
        (record(0, sha256=None), "sha256 is None"),
        (lambda s: (s / "manifest.json").write_text("[" * 200_000), "not a manifest .* deep"),
        (manifest(lambda m: m.update(users=151)), "expected|follow"),
        (manifest(lambda m: m["shards"].pop()), "records of 128 users, 150 expected"),
        (first_shard(users=63), "does not hold its 63 users"),
        (manifest(lambda m: m["shards"][0]["records"].reverse()), "follow"),
        *((first_shard(name=name), "leads out") for name in OUTSIDE),
        (flip("lengths.npy", 200), "lengths.npy: sha256 .* expected .* shard again"),
        (lambda s: (s / "lengths.npy").unlink(), "lengths.npy: cannot be read"),
    ],
)
def test_damage_is_found_before_the_first_record(shards, damage, message):
    damage(shards)
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(shards)
    assert str(shards) in str(caught.value) or message in ("leads out", "behind the end")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("member", ["items.npy", "raw items.npy", "extra.pyd", "items.pkl"])
def test_pickled_members_are_refused_and_never_run(shards, tmp_path, member):
    canary = Canary(tmp_path / "canary")

    def change(members):
        if member == "items.npy":
            members["00000000.items.npy"] = npy(np.array([canary], dtype=object), allow_pickle=True)
        elif member == "items.pkl":
            del members["00000000.items.npy"]
        members.setdefault("00000000." + member.removeprefix("raw "), pickle.dumps(canary))
        if member.startswith("raw"):
            members["00000000.items.npy"] = pickle.dumps(canary)

    replace_record(shards, change)
    with pytest.raises(DataError, match=r"shard-000000\.tar: record 0"):
        ShardReader(shards).record(0)
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary))
    assert canary.path.exists()  # the canary does sing when it is let out


def array(name: str, values) -> dict[str, bytes]:
    return {f"00000000.{name}.npy": npy(values)}


def items_with(row: int):
    def change(members):
        items = np.load(io.BytesIO(members["00000000.items.npy"]))
        items[3] = row
        members["00000000.items.npy"] = npy(items)

    return change


ITEMS, USERS = "00000000.items.npy", "00000000.users.npy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(USERS), "members"),
        (lambda m: m.update({"00000001.users.npy": m.pop(USERS)}), "members"),
        (lambda m: m.update({ITEMS: b""}), "not a plain array"),
        (lambda m: m.update({ITEMS: m[ITEMS][:-4]}), "not a plain array"),
        (lambda m: m.update(array("items", np.zeros(5, np.int64))), "not a plain array .*'<i8'"),
        (
            lambda m: m.update(array("items", np.zeros((5, 1), np.int32))),
            r"not a plain array .*\(5, 1\)",
        ),
        (lambda m: m.update(array("items", np.zeros(5, np.int32))), "lengths differ"),
        (lambda m: m.update(array("users", np.arange(1, 17, dtype=np.int32))), "other users"),
        (lambda m: m.update(array("offsets", np.arange(16, dtype=np.int32))), "offsets do not fit"),
        (lambda m: m.update(array("offsets", np.arange(17, dtype=np.int32))), "lengths differ"),
        *((items_with(row), r"an item row is outside 0\.\.39") for row in (-1, -(2**31), 40)),
    ],
)
def test_damaged_record_is_named(shards, change, message):
    replace_record(shards, change)
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(shards).gather(np.array([0]))
    assert "shard-000000.tar: record 0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ShardReader(shards).record(1).first_user == 16


def header(text: str, data: bytes = bytes(64)) -> bytes:
    """The bytes of an array with any header."""
    line = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + data


SHAPE = "{'descr': '<i4', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    "bomb",
    [
        header(SHAPE % 10**11),
        header(SHAPE % 10**15),
        header(SHAPE % -1),
        header(SHAPE % ("9" * 60)),
        header(SHAPE.replace("<i4", "|V1000000000") % 16),
        header("(" * 1000),
        header("[" * 90),
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{'descr': '<i4'",
    ],
)
def test_a_header_is_refused_before_memory_is_asked_for(shards, monkeypatch, bomb):
    def refuse(*_, **__):
        raise MemoryError

    replace_record(shards, lambda members: members.update({ITEMS: bomb}))
    for name in ("load", "empty", "fromfile", "zeros"):
        monkeypatch.setattr(np, name, refuse)
    with pytest.raises(DataError, match=r"record 0: 00000000\.items\.npy: not a plain array") as e:
        ShardReader(shards).record(0)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 600


def test_a_sparse_member_is_not_unfolded(shards):
    name, zeros = "00000000.items.npy", 1 << 50
    sparse = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(zeros),
        "GNU.sparse.name": name,
    }
    replace_record(shards, lambda members: None, headers={name: sparse})
    with pytest.raises(DataError, match=r"shard-000000\.tar: record 0: "):
        ShardReader(shards).record(0)


def test_our_arrays_are_read_without_a_parser_that_threads_may_not_share(made, monkeypatch):
    def refuse(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr("ast.literal_eval", refuse)
    reader = open_reader(made)
    check_gather(reader, made, list(range(40)))
    assert reader.gather(np.arange(40))[0].flags.writeable


def test_without_verify_a_cut_tar_still_raises(shards):
    os.truncate(shards / "shard-000000.tar", 700)
    with pytest.raises(DataError, match=r"shard-000000.tar: record 0: 700 bytes, expected"):
        ShardReader(shards, verify=False).record(0)
