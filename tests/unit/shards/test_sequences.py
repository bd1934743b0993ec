"""Reading and writing the `sequences` format, its errors, the split and the hash."""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.errors import DataError
from genrec_shards.sequences import (
    flat_ranges,
    read_sequences,
    sequences_from_ids,
    sort_ids,
    write_sequences,
)

TEXT = "u2 10 9 100\nu1 9 10 9 7\n"


def read_text(tmp_path: Path, content: bytes | str, name: str = "log.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_sequences(path)


def test_rows_follow_sorted_ids_and_users_follow_the_file(tmp_path):
    sequences = read_text(tmp_path, TEXT)
    assert sequences.item_ids == ["7", "9", "10", "100"]
    assert sequences.user_ids == ["u2", "u1"]
    assert sequences.items.dtype == np.int32
    assert sequences.items.tolist() == [2, 1, 3, 1, 2, 1, 0]
    assert sequences.offsets.dtype == np.int64
    assert sequences.offsets.tolist() == [0, 3, 7]
    assert (sequences.num_users, sequences.num_items, sequences.num_interactions) == (2, 4, 7)
    assert sequences.lengths.tolist() == [3, 4]


def test_ids_sort_by_number_only_if_all_are_whole_numbers():
    assert sort_ids({"10", "9", "007", "7"}) == ["007", "7", "9", "10"]
    assert sort_ids({"10", "9", "x"}) == ["10", "9", "x"]
    assert sort_ids({"2" * 5000, "1" * 5001, "3"}) == ["3", "2" * 5000, "1" * 5001]
    assert sort_ids({"²", "10", "9"}) == ["10", "9", "²"]


def test_plain_gz_by_content_crlf_tabs_blank_lines_and_bom_read_alike(tmp_path):
    wanted = read_text(tmp_path, TEXT).sequences_hash()
    assert (
        read_text(tmp_path, gzip.compress(TEXT.encode()), "named_plain.txt").sequences_hash()
        == wanted
    )
    assert read_text(tmp_path, TEXT, "named.gz").sequences_hash() == wanted
    messy = "\ufeff" + TEXT.replace("\n", "\r\n\r\n  \n").replace(" ", " \t ")
    assert read_text(tmp_path, messy).sequences_hash() == wanted


def test_splits_and_training_ends(tmp_path):
    sequences = read_text(tmp_path, TEXT)
    validation, test = (
        sequences.history_and_target("validation"),
        sequences.history_and_target("test"),
    )
    assert validation.starts.tolist() == [0, 3]
    assert validation.ends.tolist() == [1, 5]
    assert [sequences.item_ids[row] for row in validation.targets] == ["9", "9"]
    assert test.ends.tolist() == [2, 6]
    assert [sequences.item_ids[row] for row in test.targets] == ["100", "7"]
    assert np.shares_memory(test.items, sequences.items)
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
        (b"u1 1 2 3\nu2 1\x00 2 3\n", r"log.txt:2: binary"),
        (b"u1 1 2 3\nu2 \xe9t\xe9 2 3\n", r"log.txt:2: not UTF-8 \(byte 0xe9\)"),
        (gzip.compress(TEXT.encode() * 50)[:-9], "cut off"),
        (gzip.compress(TEXT.encode())[:-8] + b"12345678", "damaged"),
        (b"PK\x03\x04\x14\x00\x00\x00", "binary"),
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
    assert (tmp_path / "out.txt.gz").read_bytes()[4:8] == bytes(
        4
    )  # no time stamp: the same bytes tomorrow
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("unfit", ["", "a b", "a\n", " a", "\t"])
def test_ids_that_the_format_cannot_carry_are_refused(tmp_path, unfit):
    with pytest.raises(DataError, match="item id"):
        write_sequences(sequences_from_ids(["u"], [3], ["1", unfit, "2"]), tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_hash_sees_every_part():
    hashes = {
        sequences_from_ids(users, lengths, ids).sequences_hash()
        for users, lengths, ids in [
            (["u", "v"], [3, 4], list("abcabca")),
            (["u", "v"], [4, 3], list("abcabca")),
            (["u", "w"], [3, 4], list("abcabca")),
            (["u", "v"], [3, 4], list("abdabda")),
            (["u", "v"], [3, 4], list("abcacba")),
            (["uv", ""], [3, 4], list("abcabca")),
        ]
    }
    assert len(hashes) == 6


@pytest.mark.data
@pytest.mark.skipif("GENREC_DATA" not in os.environ, reason="GENREC_DATA is not set")
def test_beauty_and_sports_match_the_papers_table_2():
    folder = Path(os.environ["GENREC_DATA"])
    started = time.perf_counter()
    beauty = read_sequences(folder / "Beauty.txt.gz")
    assert time.perf_counter() - started < 2
    assert (beauty.num_users, beauty.num_items, beauty.num_interactions) == (
        22_363,
        12_101,
        198_502,
    )
    sports = read_sequences(folder / "Sports_and_Outdoors.txt.gz")
    assert (sports.num_users, sports.num_items, sports.num_interactions) == (
        35_598,
        18_357,
        296_337,
    )


def test_flat_ranges_lay_stretches_end_to_end():
    indices = flat_ranges(np.array([5, 0, 9, 2]), np.array([2, 0, 3, 1]))
    assert indices.tolist() == [5, 6, 9, 10, 11, 2]
    assert flat_ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
