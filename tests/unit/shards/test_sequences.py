"""Reading and writing the `sequences` format, its errors, leave-one-out and the hash."""

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.cleaning.summary import prepare_summary
from genrec_shards.errors import BadLines, DataError
from genrec_shards.prepare import prepare
from genrec_shards.readers import text_blocks
from genrec_shards.sequences import (
    flat_ranges,
    read_sequences,
    sequences_from_ids,
    sort_ids,
    write_sequences,
)

TEXT = "u2 10 9 100\nu1 9 10 9 7\n"
PACKED = gzip.compress(TEXT.encode() * 50)


def read_text(tmp_path: Path, content: bytes | str, name: str = "log.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_sequences(path)


def test_rows_follow_sorted_ids_and_users_follow_the_file(tmp_path):
    sequences = read_text(tmp_path, TEXT)
    assert sequences.item_ids == ["7", "9", "10", "100"]
    assert sequences.user_ids == ["u2", "u1"]
    assert (sequences.items.dtype, sequences.offsets.dtype) == (np.int32, np.int64)
    assert sequences.items.tolist() == [2, 1, 3, 1, 2, 1, 0]
    assert sequences.offsets.tolist() == [0, 3, 7]
    assert (sequences.num_users, sequences.num_items, sequences.num_interactions) == (2, 4, 7)
    assert sequences.lengths.tolist() == [3, 4]


def test_sort_ids_is_numeric_only_if_all_are_whole_numbers():
    for ids in (
        ["007", "7", "9", "10"],
        ["10", "9", "x"],
        ["3", "2" * 5000, "1" * 5001],
        ["10", "9", "²"],
    ):
        assert sort_ids(set(ids)) == ids


def test_ways_to_write_the_format_read_alike(tmp_path):
    messy = "\ufeff" + TEXT.replace("\n", "\r\n\r\n  \n").replace(" ", " \t ")
    hashes = {
        read_text(tmp_path, content, name).sequences_hash()
        for content, name in (
            (TEXT, "log.txt"),
            (gzip.compress(TEXT.encode()), "named_plain.txt"),
            (TEXT, "named.gz"),
            (messy, "log.txt"),
        )
    }
    assert len(hashes) == 1


def test_splits_and_training_ends(tmp_path):
    sequences = read_text(tmp_path, TEXT)
    for split, ends, targets in (
        ("validation", [1, 5], ["9", "9"]),
        ("test", [2, 6], ["100", "7"]),
    ):
        view = sequences.history_and_target(split)  # type: ignore[arg-type]
        assert (view.starts.tolist(), view.ends.tolist()) == ([0, 3], ends)
        assert [sequences.item_ids[row] for row in view.targets] == targets
        assert np.shares_memory(view.items, sequences.items)
    assert sequences.training_ends().tolist() == [1, 5]
    assert sequences.training_ends("n-1").tolist() == [2, 6]
    with pytest.raises(ValueError, match="choose n-2 or n-1"):
        sequences.training_ends("n")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose validation or test"):
        sequences.history_and_target("train")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"u1 1 2 3\n\nu2 1 2\n", r"log.txt:3: user 'u2' has 2 items, at least 3"),
        (b"u1 1 2 3\nu2\n", r"log.txt:2: user 'u2' has 0 items"),
        (b"u1 1 2 3\nu2 1 2 3\nu1 4 5 6\n", r"log.txt:3: user 'u1' came before in line 1"),
        (b"u1 1 2\nu2 1\x00 2 3\n", r"log.txt:2: binary"),
        (b"u1 1 2 3\nu2 \xe9t\xe9 2 3\n", r"log.txt:2: not UTF-8 \(byte 0xe9\)"),
        (PACKED[:-9], "cut off"),
        (PACKED[:-8] + b"12345678", "damaged"),
        (b"PK\x03\x04\x14\x00\x00\x00", "the zip cannot be read"),
        (b"\x7fELF\x02\x01\x01\x00", "binary"),
    ],
)
def test_bad_files_give_one_line_with_place_and_remedy(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_text(tmp_path, content)
    assert str(tmp_path / "log.txt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ":" in str(caught.value).removeprefix(str(tmp_path))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_sequences(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_sequences(tmp_path)


def test_strange_ids_survive_a_round_trip(tmp_path):
    ids = [
        "x" * 10_000,
        "1" * 10_000,
        "a.b",
        '"q"',
        "été",
        "日本",
        "no\u00a0break",
        "\u2028",
        "%,;",
    ]
    sequences = sequences_from_ids(["u.1", "ü"], [4, 5], ids)
    for name in ("out.txt", "out.txt.gz"):
        write_sequences(sequences, tmp_path / name)
        again = read_sequences(tmp_path / name)
        assert again.sequences_hash() == sequences.sequences_hash()
        assert (again.user_ids, again.item_ids) == (sequences.user_ids, sequences.item_ids)
    # No time stamp: the same bytes tomorrow.
    assert (tmp_path / "out.txt.gz").read_bytes()[4:8] == bytes(4)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("unfit", ["", "a b", "a\n", " a", "\t"])
def test_ids_that_the_format_cannot_carry_are_refused(tmp_path, unfit):
    with pytest.raises(DataError, match="item id"):
        write_sequences(sequences_from_ids(["u"], [3], ["1", unfit, "2"]), tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_hash_sees_every_part():
    hashes = {
        sequences_from_ids(users, lengths, list(ids)).sequences_hash()
        for users, lengths, ids in [
            (["u", "v"], [3, 4], "abcabca"),
            (["u", "v"], [4, 3], "abcabca"),
            (["u", "w"], [3, 4], "abcabca"),
            (["u", "v"], [3, 4], "abdabda"),
            (["u", "v"], [3, 4], "abcacba"),
            (["uv", ""], [3, 4], "abcabca"),
        ]
    }
    assert len(hashes) == 6


@pytest.mark.data
@pytest.mark.skipif("GENREC_DATA" not in os.environ, reason="GENREC_DATA is not set")
def test_beauty_and_sports_match_the_papers_table_2(tmp_path):
    for name, file, interactions in (
        ("beauty", "Beauty.txt.gz", 198_502),
        ("sports", "Sports_and_Outdoors.txt.gz", 296_337),
    ):
        path = Path(os.environ["GENREC_DATA"]) / file
        started = time.perf_counter()
        read_sequences(path)
        assert time.perf_counter() - started < 2
        made = prepare(path, tmp_path / name, expect=name)
        assert (made.info.interactions, made.info.expected) == (interactions, name)
        found = f"{made.info.users:,} users and {made.info.items:,} items"
        assert prepare_summary(made)[1:] == [f"{found}, as the paper's Table 2 has of {name}"]


def test_flat_ranges_lays_slices_end_to_end():
    indices = flat_ranges(np.array([5, 0, 9, 2]), np.array([2, 0, 3, 1]))
    assert indices.tolist() == [5, 6, 9, 10, 11, 2]
    assert flat_ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


# VmHWM: what `getrusage` says has the test's own process in it, whose child this is.
PEAK = """
import re, sys
from genrec_shards.errors import DataError
from genrec_shards.prepare import prepare
try:
    prepare(sys.argv[1], sys.argv[1] + ".data", format="sequences")
except DataError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"x" * 1024, "1: a line of more than 64 MiB"),
        (b"u1 1 2 3\n" * 1024, "2: user 'u1' came before in line 1"),
    ],
)
def test_a_gzip_bomb_is_unpacked_block_by_block(tmp_path, line, message):
    # 640 MiB, of which no more than a line or a block is held.
    packed = gzip.compress(line * ((16 << 20) // len(line)), 1)
    (tmp_path / "bomb.gz").write_bytes(packed * 40)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "bomb.gz")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said, peak = done.stdout.splitlines()
    assert f"bomb.gz:{message}" in said
    assert int(peak) < 300


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_line_without_end_is_an_error_with_its_number(tmp_path, monkeypatch, pack, on_error):
    monkeypatch.setattr(text_blocks, "LONGEST_LINE", 3 << 20)
    path = tmp_path / "log.txt"
    path.write_bytes(pack(b"u1 1 2 3\nu2 " + b"77 " * 1_048_000))
    assert read_sequences(path).num_interactions == 3 + 1_048_000
    path.write_bytes(pack(b"u1 1 2 3\n\nu2 " + b"77 " * (1 << 20) + b"77\nu3 1 2 3\n"))
    with pytest.raises(DataError, match=r"log\.txt:3: a line of more than 3 MiB"):
        read_sequences(path, BadLines(on_error))


def test_blocks_of_a_long_text_read_as_the_whole(tmp_path, monkeypatch):
    text = "".join(
        f"u{n} {' '.join(str((n * k) % 97) for k in range(3, 20))}\r\n" for n in range(300)
    )
    (tmp_path / "log.txt").write_text("\ufeff" + text)
    whole = read_sequences(tmp_path / "log.txt")
    lines = [line.split() for line in text.splitlines()]
    again = sequences_from_ids(
        [line[0] for line in lines], [17] * 300, [item for line in lines for item in line[1:]]
    )
    assert whole.sequences_hash() == again.sequences_hash()
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 100)
    assert read_sequences(tmp_path / "log.txt").sequences_hash() == whole.sequences_hash()
    (tmp_path / "log.txt").write_text(text + "u7 1 2 3\n")
    with pytest.raises(DataError, match=r"log\.txt:301: user 'u7' came before in line 8"):
        read_sequences(tmp_path / "log.txt")
