"""Reading shards: every record and user exact, damage told by name, nothing in a member ever
run."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.prepare import prepare
from genrec_shards.sequences import sequences_from_ids, write_sequences
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.write import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_damage import Canary, change_manifest, npy, replace_record

NUM_USERS = 150


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("read")
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 20, NUM_USERS)
    ids = [str(item) for item in rng.integers(0, 60, lengths.sum())]
    write_sequences(
        sequences_from_ids([f"u{u}" for u in range(NUM_USERS)], lengths, ids), folder / "log.txt"
    )
    dataset = prepare(folder / "log.txt", folder / "data")
    write_shards(dataset, folder / "shards", users_per_shard=64, users_per_record=16)
    return dataset


@pytest.fixture
def shards(made, tmp_path):
    """A copy of the shards that a test may damage."""
    write_shards(made, tmp_path / "shards", users_per_shard=64, users_per_record=16)
    return tmp_path / "shards"


def sequence_of(dataset: Dataset, user: int) -> list[int]:
    offsets = dataset.sequences.offsets
    return dataset.sequences.items[offsets[user] : offsets[user + 1]].tolist()


def check_gather(reader: ShardReader, dataset: Dataset, users) -> None:
    items, offsets = reader.gather(np.array(users, dtype=np.int64))
    assert (items.dtype, offsets.dtype) == (np.int32, np.int64)
    assert len(offsets) == len(users) + 1
    for place, user in enumerate(users):
        assert items[offsets[place] : offsets[place + 1]].tolist() == sequence_of(dataset, user)


def test_records_tile_the_users(made):
    reader = ShardReader(made.path.parent / "shards")
    assert reader.num_records == 10
    users = []
    for index in range(reader.num_records):
        record = reader.record(index)
        assert record.first_user == record.users[0]
        assert {record.users.dtype, record.offsets.dtype, record.items.dtype} == {
            np.dtype(np.int32)
        }
        users += record.users.tolist()
        for place, user in enumerate(record.users):
            own = record.items[record.offsets[place] : record.offsets[place + 1]]
            assert own.tolist() == sequence_of(made, user)
    assert users == list(range(NUM_USERS))
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=f"record {wrong} of 10"):
            reader.record(wrong)


@given(st.lists(st.integers(0, NUM_USERS - 1), max_size=60))
@settings(max_examples=60, deadline=None)
def test_gather_gives_any_users_in_any_order(made, users):
    for cache_records in (1, 256):
        check_gather(
            ShardReader(made.path.parent / "shards", verify=False, cache_records=cache_records),
            made,
            users,
        )


def test_gather_refuses_users_that_do_not_exist(made):
    reader = ShardReader(made.path.parent / "shards")
    for wrong in (-1, NUM_USERS):
        with pytest.raises(ValueError, match=r"outside 0\.\.149"):
            reader.gather(np.array([0, wrong]))


def test_the_cache_keeps_to_its_size(made):
    reader = ShardReader(made.path.parent / "shards", cache_records=2)
    first = reader.record(0)
    assert reader.record(0) is first
    reader.record(1), reader.record(0), reader.record(2)
    assert reader.record(0) is first  # 1 was the longest unused
    assert len(reader._cache) == 2


def gathered_elsewhere(reader: ShardReader, users: list[int], queue) -> None:
    queue.put(reader.gather(np.array(users))[0].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_used_reader_works_in_another_process(made, method):
    reader, users = ShardReader(made.path.parent / "shards"), [3, 149, 70]
    reader.gather(np.array([0, 100]))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=gathered_elsewhere, args=(reader, users, queue))
    process.start()
    assert queue.get(timeout=60) == [item for user in users for item in sequence_of(made, user)]
    process.join()
    copy = pickle.loads(pickle.dumps(reader))
    assert not {"_cache", "_lock"} & set(reader.__getstate__())  # handles mean nothing elsewhere
    check_gather(copy, made, users)


def test_threads_may_share_a_reader(made):
    reader, failures = ShardReader(made.path.parent / "shards", cache_records=2), []

    def work(seed: int) -> None:
        try:
            for users in np.random.default_rng(seed).integers(0, NUM_USERS, (40, 8)).tolist():
                check_gather(reader, made, users)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []


def test_reading_needs_no_webdataset(made):
    program = (
        "import sys; sys.modules['webdataset'] = None\n"
        "from genrec_shards.storage.reader import ShardReader; import genrec_shards.storage.write\n"
        "import genrec_shards.storage.sample_order\n"
        "print(ShardReader(sys.argv[1]).record(0).first_user)"
    )
    command = [sys.executable, "-c", program, str(made.path.parent / "shards")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0\n"


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: os.truncate(s / "shard-000001.tar", 512 * 8),
            "shard-000001.tar: 4096 bytes, expected",
        ),
        (
            lambda s: flip(s / "shard-000002.tar", 3),
            "shard-000002.tar: sha256 .* expected .* shard again",
        ),
        (lambda s: flip(s / "shard-000000.tar", 5000), "shard-000000.tar: sha256"),
        (lambda s: (s / "shard-000001.tar").unlink(), "shard-000001.tar: no such shard"),
        (lambda s: (s / "manifest.json").unlink(), "manifest.json: no such file"),
        (lambda s: (s / "manifest.json").write_text("{"), "not a manifest"),
        (lambda s: (s / "manifest.json").write_text("[1]"), "not a manifest"),
        (
            lambda s: change_manifest(s, lambda m: m.update(format_version=1)),
            "format_version 1, .* 2: shard again",
        ),
        (
            lambda s: change_manifest(s, lambda m: m.update(interactions=7)),
            "lengths.npy: .* interactions of 150 users",
        ),
        (
            lambda s: change_manifest(s, lambda m: m["shards"][0]["records"][0].update(offset=-1)),
            "no whole number",
        ),
        (
            lambda s: change_manifest(s, lambda m: m["shards"][0]["records"][0].update(bytes="9")),
            "no whole number",
        ),
        (
            lambda s: change_manifest(
                s, lambda m: m["shards"][0]["records"][3].update(offset=10**9)
            ),
            "behind the end",
        ),
        (lambda s: change_manifest(s, lambda m: m.update(users=151)), "expected|follow"),
        (
            lambda s: change_manifest(s, lambda m: m["shards"].pop()),
            "records of 128 users, 150 expected",
        ),
        (
            lambda s: change_manifest(s, lambda m: m["shards"][0].update(users=63)),
            "does not hold its 63 users",
        ),
        (lambda s: change_manifest(s, lambda m: m["shards"][0]["records"].reverse()), "follow"),
        (
            lambda s: change_manifest(s, lambda m: m["shards"][0].update(name="../data/x.tar")),
            "leads out",
        ),
        *(
            (
                lambda s, name=name: change_manifest(s, lambda m: m["shards"][0].update(name=name)),
                "leads out",
            )
            for name in (
                "..",
                "",
                "a/b.tar",
                "pipe:touch canary",
                "%2e%2e%2fx.tar",
                "x.tar?versionId=1",
            )
        ),
        (lambda s: flip(s / "lengths.npy", 200), "lengths.npy: sha256 .* expected .* shard again"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("00000000.users.npy"), "members"),
        (lambda m: m.update({"00000001.users.npy": m.pop("00000000.users.npy")}), "members"),
        (lambda m: m.update({"00000000.items.npy": b""}), "not a plain array"),
        (
            lambda m: m.update({"00000000.items.npy": m["00000000.items.npy"][:-4]}),
            "not a plain array",
        ),
        (
            lambda m: m.update({"00000000.items.npy": npy(np.zeros(5, np.int64))}),
            "int64 of 1 dimensions",
        ),
        (
            lambda m: m.update({"00000000.items.npy": npy(np.zeros((5, 1), np.int32))}),
            "of 2 dimensions",
        ),
        (lambda m: m.update({"00000000.items.npy": npy(np.zeros(5, np.int32))}), "lengths differ"),
        (
            lambda m: m.update({"00000000.users.npy": npy(np.arange(1, 17, dtype=np.int32))}),
            "other users",
        ),
        (
            lambda m: m.update({"00000000.offsets.npy": npy(np.arange(16, dtype=np.int32))}),
            "offsets do not fit",
        ),
        (
            lambda m: m.update({"00000000.offsets.npy": npy(np.arange(17, dtype=np.int32))}),
            "lengths differ",
        ),
    ],
)
def test_a_record_that_is_not_ours_is_named(shards, change, message):
    replace_record(shards, change)
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(shards).gather(np.array([0]))
    assert "shard-000000.tar: record 0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ShardReader(shards).record(1).first_user == 16


@pytest.mark.parametrize("row", [-1, -(2**31), 60])
def test_items_outside_the_catalogue_are_refused(shards, row):
    def change(members):
        items = np.load(io.BytesIO(members["00000000.items.npy"]))
        items[3] = row
        members["00000000.items.npy"] = npy(items)

    replace_record(shards, change)
    with pytest.raises(DataError, match=r"an item row is outside 0\.\.59"):
        ShardReader(shards).record(0)


def test_our_arrays_are_read_without_a_parser_that_threads_may_not_share(shards, monkeypatch):
    expected, _ = ShardReader(shards).gather(np.arange(40))

    def refuse(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr("ast.literal_eval", refuse)
    items, offsets = ShardReader(shards).gather(np.arange(40))
    assert items.dtype == np.int32
    assert items.flags.writeable
    assert np.array_equal(items, expected)
    assert len(items) == offsets[-1]


def test_without_verify_a_cut_tar_still_raises(shards):
    os.truncate(shards / "shard-000000.tar", 700)
    with pytest.raises(DataError, match=r"shard-000000.tar: record 0: 700 bytes, expected"):
        ShardReader(shards, verify=False).record(0)
