"""A log becomes a data directory: the same as its sequences would, told, leak-free, complete or
absent."""

import hashlib
import json
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.errors import DataError
from genrec_shards.numbering.cooccurrence import training_counts
from genrec_shards.prepare import cleaning_told, prepare
from genrec_shards.readers.read_log import LogOptions
from genrec_shards.sequences import Sequences, sequences_from_ids, write_sequences
from genrec_shards.storage.write import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from genrec_dist.baselines.leak_audit import write_audit
from genrec_dist.cli.app import run_command


def beauty_like(num_users: int = 300, num_items: int = 120) -> Sequences:
    draw = random.Random(0)
    lengths = [3 + min(int(draw.expovariate(1 / 6)), 60) for _ in range(num_users)]
    ids = [str(1 + int(num_items * draw.random() ** 2)) for _ in range(sum(lengths))]
    return sequences_from_ids([str(n + 1) for n in range(num_users)], lengths, ids)


def rows_of(sequences: Sequences, start: int = 1_400_000_000) -> list[tuple[str, str, int]]:
    users = np.repeat(np.arange(sequences.num_users), sequences.lengths)
    return [
        (sequences.user_ids[user], sequences.item_ids[item], start + at)
        for at, (user, item) in enumerate(zip(users, sequences.items, strict=True))
    ]


def write_csv(rows, path):
    path.write_text(
        "user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    )
    return path


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_log_gives_what_its_sequences_give_to_the_last_byte_of_the_shards(tmp_path):
    sequences = beauty_like()
    write_sequences(sequences, tmp_path / "log.txt")
    rows = rows_of(sequences)
    random.Random(1).shuffle(rows)
    write_csv(rows, tmp_path / "log.csv")
    plain = prepare(tmp_path / "log.txt", tmp_path / "plain")
    log = prepare(tmp_path / "log.csv", tmp_path / "log", k_core=0)
    assert log.info.sequences_hash == plain.info.sequences_hash
    assert log.info.numbering_hash == plain.info.numbering_hash
    assert (log.info.ties, plain.info.ties, log.info.read) == ("shuffle", "keep", len(rows))
    for name in ("plain", "log"):
        write_shards(
            load_dataset(tmp_path / name),
            tmp_path / f"{name}-shards",
            users_per_shard=128,
            users_per_record=64,
        )
    assert files(tmp_path / "plain-shards") == files(tmp_path / "log-shards")


def test_what_a_log_leaves_is_as_documented_and_reads_back(tmp_path):
    rows = [*rows_of(beauty_like()), ("1", "rare", 1_400_000_000), ("1", "rare", 1_400_000_000)]
    made = prepare(write_csv(rows, tmp_path / "log.csv"), tmp_path / "data", seed=3)
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert set(info["dropped"]) == {
        *(
            "bad_lines",
            "outside_dates",
            "duplicates",
            "items_below_k_core",
            "users_below_k_core",
            "users_below_min_length",
        )
    }
    assert info["read"] == len(rows) == info["interactions"] + sum(info["dropped"].values())
    assert info["dropped"]["duplicates"] == 1
    digest = hashlib.sha256((tmp_path / "log.csv").read_bytes()).hexdigest()
    assert info["source"] == {"name": "log.csv", "sha256": digest}
    loaded = load_dataset(tmp_path / "data")
    assert loaded.info == made.info
    assert loaded.timestamps.tolist() == made.timestamps.tolist()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        *("dataset.json", "items.parquet", "sequences.parquet", "users.parquet")
    ]
    line = cleaning_told(made)[0]
    assert line.startswith(
        f"{len(rows):,} rows read, {info['interactions']:,} kept; left out: 1 duplicates, "
    )


def test_numbering_anew_keeps_times_and_what_was_dropped(tmp_path):
    made = prepare(write_csv(rows_of(beauty_like()), tmp_path / "log.csv"), tmp_path / "data")
    again = prepare(tmp_path / "data", tmp_path / "again", numbering="train-order")
    assert again.timestamps.tolist() == made.timestamps.tolist()
    assert (again.info.read, again.info.dropped, again.info.ties) == (
        made.info.read,
        made.info.dropped,
        "shuffle",
    )


def test_ties_are_audited(tmp_path):
    rows = [(f"u{n}", f"i{m}", 1_400_000_000 + (m if n else 0)) for n in range(4) for m in range(5)]
    found = write_audit(prepare(write_csv(rows, tmp_path / "log.csv"), tmp_path / "data", k_core=0))
    assert (found.tied_users, found.tied_held_out) == (0.25, 0.25)


def test_formats_are_told_by_name_and_content(tmp_path):
    sequences = beauty_like(20, 10)
    (tmp_path / "folder").mkdir()
    write_csv(rows_of(sequences), tmp_path / "folder" / "part.csv")
    write_sequences(sequences, tmp_path / "log.dat.gz")
    hashes = {
        prepare(tmp_path / "folder", tmp_path / "a", k_core=0).info.sequences_hash,
        prepare(tmp_path / "log.dat.gz", tmp_path / "b").info.sequences_hash,
        prepare(tmp_path / "a", tmp_path / "c").info.sequences_hash,
        prepare(tmp_path / "folder" / "part.csv", tmp_path / "d", k_core=0).info.sequences_hash,
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("numbering", ["random", "train-order", "collaborative"])
@settings(max_examples=15, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0, 39), st.integers(0, 11), min_size=1, max_size=40),
    which=st.booleans(),
)
def test_held_out_interactions_change_nothing_that_is_derived(
    tmp_path_factory, numbering, changes, which
):
    """Another item in the place of held-out ones, the catalogue and the users fixed: codes and
    popularity stay."""
    folder = tmp_path_factory.mktemp("leak")
    rows = [
        (f"u{n:02d}", f"i{(n * n + 5 * m) % 12}", 1_400_000_000 + 100 * m + n)
        for n in range(40)
        for m in range(5 + n % 3)
    ]
    changed = list(rows)
    for user, item in changes.items():
        own = [at for at, row in enumerate(rows) if row[0] == f"u{user:02d}"]
        for at in own[-2:] if which else own[-1:]:
            changed[at] = (rows[at][0], f"i{item}", rows[at][2])
    made = [
        prepare(write_csv(log, folder / f"{n}.csv"), folder / str(n), numbering=numbering, k_core=0)
        for n, log in enumerate((rows, changed))
    ]
    assert made[0].sequences.item_ids == made[1].sequences.item_ids
    for name in ("items.parquet", "users.parquet"):
        assert (folder / "0" / name).read_bytes() == (folder / "1" / name).read_bytes()
    counts = [training_counts(data.sequences).tolist() for data in made]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log": LogOptions(columns=("a", "b"))}, "give three names"),
        ({"log": LogOptions(time_unit="h")}, "choose auto, s, ms or us"),
        ({"ties": "mix"}, "choose shuffle or keep"),
        ({"k_core": 99}, "lower --k-core 99"),
    ],
)
def test_what_fails_leaves_nothing(tmp_path, options, message):
    log = write_csv(rows_of(beauty_like(20, 10)), tmp_path / "log.csv")
    with pytest.raises(ValueError, match=message):
        prepare(log, tmp_path / "data", **options)
    assert list(tmp_path.iterdir()) == [log]


def test_skipped_lines_are_counted_shown_and_part_of_the_sum(tmp_path, capfd):
    log = write_csv(rows_of(beauty_like(20, 10)), tmp_path / "log.csv")
    log.write_text(log.read_text() + "u1,i1,never\n" * 12)
    command = ["prepare", str(log), "--out", str(tmp_path / "data"), "--k-core", "0"]
    assert run_command(command) == 1
    assert "never" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [log]
    assert run_command([*command, "--on-error", "skip"]) == 0
    said = capfd.readouterr().out
    assert "12 bad lines" in said
    assert said.count("never") == 10
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert info["dropped"]["bad_lines"] == 12
    assert info["read"] == info["interactions"] + sum(info["dropped"].values())


def test_sequences_skip_bad_lines_too(tmp_path):
    (tmp_path / "log.txt").write_bytes(
        b"u1 1 2 3\nu2 1 2\nu1 4 5 6\nu3 \xff 1 2 3\nu4 1\x002 3 4\nu5 3 2 1\n"
    )
    with pytest.raises(DataError, match=r"log.txt:5: binary"):
        prepare(tmp_path / "log.txt", tmp_path / "data")
    made = prepare(tmp_path / "log.txt", tmp_path / "data", on_error="skip")
    assert made.sequences.user_ids == ["u1", "u5"]
    assert made.info.dropped == {"bad_lines": 4}
    assert [line.split(": ")[0].rpartition(":")[2] for line in made.bad_lines[1:]] == [
        "2",
        "3",
        "4",
        "5",
    ]
    assert replace(made, bad_lines=()).info == load_dataset(tmp_path / "data").info


def in_a_process(*command, **options) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "genrec_dist.cli", *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT, **options)


@pytest.mark.parametrize("size", [20, 5_000, 30_000])
def test_a_full_disk_is_told_wherever_it_fills(tmp_path, size):
    """While rows wait for their users, while they are sorted, while Parquet is written: never half
    a data directory."""
    log = write_csv(rows_of(beauty_like(400)), tmp_path / "log.csv")
    limit = (resource.RLIMIT_FSIZE, (size, size))
    done = in_a_process(
        "prepare", log, "--out", tmp_path / "data", preexec_fn=lambda: resource.setrlimit(*limit)
    )
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"{tmp_path / 'data'}" in done.stderr
    assert "make room or choose another output" in done.stderr
    assert list(tmp_path.iterdir()) == [log]


def test_outputs_that_cannot_be(tmp_path, capfd):
    log = write_csv(rows_of(beauty_like(20, 10)), tmp_path / "log.csv")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "diary.txt").write_text("dear")
    for out, options, said in (
        (Path("/proc/genrec"), [], "/proc/genrec"),
        (log / "inside", [], "choose another output" if log.is_dir() else str(log)),
        (taken, [], "--overwrite"),
        (taken, ["--overwrite"], "not ours"),
    ):
        assert run_command(["prepare", str(log), "--out", str(out), *options]) == 1
        told = capfd.readouterr().err
        assert said in told
        assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "taken"]
    assert [path.name for path in taken.iterdir()] == ["diary.txt"]


def test_an_output_is_replaced_only_by_a_complete_one(tmp_path, capfd):
    log = write_csv(rows_of(beauty_like(20, 10)), tmp_path / "log.csv")
    command = ["prepare", str(log), "--out", str(tmp_path / "data"), "--overwrite", "--k-core", "0"]
    assert run_command(command) == 0
    before = files(tmp_path / "data")
    log.write_text(log.read_text() + "broken\n")
    assert run_command(command) == 1
    assert f"{log}:" in capfd.readouterr().err
    assert files(tmp_path / "data") == before


def test_strange_ids_come_back_as_they_were(tmp_path):
    ids = [
        "a b",
        'say "x"',
        "it's",
        "a.b",
        "x" * 10_000,
        "\u65e5\u672c",
        "e\u0301",
        "\U0001f642",
        "007",
        "7",
        "new\nline",
        " edge ",
    ]
    quoted = ['"' + name.replace('"', '""') + '"' for name in ids]
    lines = [
        f"{user},{item},{1_400_000_000 + n}\n" for user in quoted for n, item in enumerate(quoted)
    ]
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "".join(lines))
    prepare(tmp_path / "log.csv", tmp_path / "data")
    loaded = load_dataset(tmp_path / "data")
    assert loaded.sequences.user_ids == loaded.sequences.item_ids == sorted(ids)
    assert [loaded.sequences.item_ids[row] for row in loaded.sequences.items[: len(ids)]] == ids
