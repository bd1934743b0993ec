"""A source becomes a data directory: documented, reproducible, leak-free, complete or absent;
damage is reported in one line."""

import hashlib
import json
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards import dataset as dataset_module
from genrec_shards.cleaning.summary import prepare_summary
from genrec_shards.dataset import load_dataset
from genrec_shards.errors import DataError
from genrec_shards.numbering.cooccurrence import training_counts
from genrec_shards.prepare import prepare
from genrec_shards.readers.read_log import LogOptions
from genrec_shards.sequences import Sequences, sequences_from_ids, write_sequences
from genrec_shards.storage.write import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import START, Row, csv_of, files, write_csv

from genrec_dist.baselines.leak_audit import write_audit
from genrec_dist.cli.app import run_command

TEXT = "u2 10 9 100\nu1 9 10 9 7\nu3 7 7 9 10 8\n"
FILES = ["dataset.json", "items.parquet", "sequences.parquet", "users.parquet"]


@pytest.fixture
def sequences_file(tmp_path):
    (tmp_path / "log.txt").write_text(TEXT)
    return tmp_path / "log.txt"


def beauty_like(num_users: int = 20, num_items: int = 10) -> Sequences:
    draw = random.Random(0)
    lengths = [3 + min(int(draw.expovariate(1 / 6)), 60) for _ in range(num_users)]
    ids = [str(1 + int(num_items * draw.random() ** 2)) for _ in range(sum(lengths))]
    return sequences_from_ids([str(n + 1) for n in range(num_users)], lengths, ids)


def rows_of(sequences: Sequences) -> list[Row]:
    users = np.repeat(np.arange(sequences.num_users), sequences.lengths)
    return [
        (sequences.user_ids[user], sequences.item_ids[item], START + at)
        for at, (user, item) in enumerate(zip(users, sequences.items, strict=True))
    ]


@pytest.fixture
def log(tmp_path):
    return write_csv(tmp_path / "log.csv", rows_of(beauty_like()))


def test_files_and_columns_are_as_documented(sequences_file, tmp_path):
    folder = prepare(sequences_file, tmp_path / "data", numbering="given").path
    assert list(files(folder)) == FILES
    lists = pq.read_table(folder / "sequences.parquet")
    assert str(lists.schema.field("user").type) == "int32"
    assert str(lists.schema.field("items").type).startswith("list<")
    assert lists.to_pylist()[0] == {"user": 0, "items": [3, 2, 4]}
    items = pq.read_table(folder / "items.parquet").to_pylist()
    assert items[0] == {"item": 0, "id": "7", "code": "7"}
    users = pq.read_table(folder / "users.parquet").to_pylist()
    assert [row["id"] for row in users] == ["u2", "u1", "u3"]
    info = json.loads((folder / "dataset.json").read_text())
    fields = "format_version source users items interactions numbering seed split ties"
    hashes = {"sequences_hash", "numbering_hash"}
    assert set(info) == {*fields.split(), *hashes, "dropped", "read_as"}
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert info["source"] == {"name": "log.txt", "sha256": digest}
    assert (info["users"], info["items"], info["interactions"], info["dropped"]) == (3, 5, 12, {})


def test_what_a_log_leaves_is_as_documented_and_reads_back(tmp_path):
    rows = [*rows_of(beauty_like(300, 120)), *[("1", "rare", START)] * 2]
    made = prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", seed=3)
    assert list(files(tmp_path / "data")) == FILES
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert list(info["dropped"]) == [
        *("bad_lines", "outside_dates", "duplicates"),
        *("items_below_k_core", "users_below_k_core", "users_below_min_length"),
    ]
    assert info["read"] == len(rows) == info["interactions"] + sum(info["dropped"].values())
    assert info["dropped"]["duplicates"] == 1
    digest = hashlib.sha256(csv_of(rows)).hexdigest()
    assert info["source"] == {"name": "log.csv", "sha256": digest}
    loaded = load_dataset(tmp_path / "data")
    assert loaded.info == made.info
    assert loaded.timestamps.tolist() == made.timestamps.tolist()
    dates = "(from 2014-05-13 to 2014-05-13)"
    kept = f"{len(rows):,} rows read, {info['interactions']:,} kept {dates}; left out: 1 row there "
    assert prepare_summary(made)[1].startswith(kept)
    again = prepare(tmp_path / "data", tmp_path / "again", numbering="train-order")
    assert again.timestamps.tolist() == made.timestamps.tolist()
    for field in ("read", "dropped", "ties", "source", "cleaned", "read_as"):
        assert getattr(again.info, field) == getattr(made.info, field)


@pytest.mark.parametrize("numbering", ["given", "random", "train-order"])
def test_round_trip(sequences_file, tmp_path, numbering, monkeypatch):
    monkeypatch.setattr(dataset_module, "USERS_PER_ROW_GROUP", 2)  # more than one row group
    written = prepare(sequences_file, tmp_path / "data", numbering=numbering, seed=5)
    loaded = load_dataset(tmp_path / "data")
    for field, kind in (("items", np.int32), ("offsets", np.int64)):
        found = getattr(loaded.sequences, field)
        assert np.array_equal(found, getattr(written.sequences, field))
        assert found.dtype == kind
    assert loaded.numbering == written.numbering
    assert (loaded.info, loaded.path) == (written.info, written.path)


def test_the_same_source_gives_the_same_bytes_and_a_log_those_of_its_sequences(tmp_path):
    """To the last byte of the shards; another seed changes codes alone."""
    sequences = beauty_like(300, 120)
    write_sequences(sequences, tmp_path / "log.txt")
    rows = rows_of(sequences)
    random.Random(1).shuffle(rows)
    write_csv(tmp_path / "log.csv", rows)
    plain = prepare(tmp_path / "log.txt", tmp_path / "plain")
    log = prepare(tmp_path / "log.csv", tmp_path / "log", k_core=0)
    assert log.info.sequences_hash == plain.info.sequences_hash
    assert log.info.numbering_hash == plain.info.numbering_hash
    assert (log.info.ties, plain.info.ties, log.info.read) == ("shuffle", "keep", len(rows))
    for name in ("plain", "log"):
        sizes = {"users_per_shard": 128, "users_per_record": 64}
        write_shards(load_dataset(tmp_path / name), tmp_path / f"{name}-shards", **sizes)
    assert files(tmp_path / "plain-shards") == files(tmp_path / "log-shards")
    first = files(tmp_path / "plain")
    assert files(prepare(tmp_path / "log.txt", tmp_path / "again").path) == first
    other = files(prepare(tmp_path / "log.txt", tmp_path / "other", seed=1).path)
    changed = {name for name in FILES if other[name] != first[name]}
    assert changed == {"dataset.json", "items.parquet", "users.parquet"}


def test_formats_are_told_by_name_and_content(tmp_path):
    (tmp_path / "folder").mkdir()
    write_csv(tmp_path / "folder" / "part.csv", rows_of(beauty_like()))
    write_sequences(beauty_like(), tmp_path / "log.dat.gz")
    hashes = {
        prepare(tmp_path / "folder", tmp_path / "a", k_core=0).info.sequences_hash,
        prepare(tmp_path / "log.dat.gz", tmp_path / "b").info.sequences_hash,
        prepare(tmp_path / "a", tmp_path / "c").info.sequences_hash,
        prepare(tmp_path / "folder" / "part.csv", tmp_path / "d", k_core=0).info.sequences_hash,
    }
    assert len(hashes) == 1


def test_ties_are_audited(tmp_path):
    rows = [(f"u{n}", f"i{m}", START + (m if n else 0)) for n in range(4) for m in range(5)]
    log = write_csv(tmp_path / "log.csv", rows)
    found = write_audit(prepare(log, tmp_path / "data", k_core=0))
    assert (found.tied_users, found.tied_held_out) == (0.25, 0.25)


def test_dates_leave_out_what_is_not_between_them(tmp_path):
    first = ["2018-12-31T23:59:59", "2019-01-01T00:00:00", "2019-06-01T00:00:00"]
    days = [*first, "2019-12-31T00:00:00", "2019-12-31T00:00:01", "2020-01-01T00:00:00"]
    rows = [(f"u{n}", "i", day) for n in range(3) for day in days]
    log = write_csv(tmp_path / "log.csv", rows)
    made = prepare(log, tmp_path / "data", since="2019-01-01", until="2019-12-31", k_core=0)
    assert (made.info.interactions, made.info.dropped["outside_dates"]) == (12, 6)
    with pytest.raises(DataError, match=r"3 users and 1 items, the paper's Table 2 has 30,431 and"):
        prepare(log, tmp_path / "yelp", expect="yelp", k_core=0)
    with pytest.raises(ValueError, match="--since soon: give a date"):
        prepare(log, tmp_path / "yelp", since="soon")
    assert not (tmp_path / "yelp").exists()


@pytest.mark.parametrize("numbering", ["random", "train-order", "collaborative"])
@settings(max_examples=10, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0, 39), st.integers(0, 11), min_size=1, max_size=40),
    both=st.booleans(),
)
def test_held_out_interactions_change_nothing_that_is_derived(
    tmp_path_factory, numbering, changes, both
):
    """Another item in the place of held-out ones, the catalogue and the users fixed: codes and
    popularity stay."""
    folder = tmp_path_factory.mktemp("leak")
    rows = [
        (f"u{n:02d}", f"i{(n * n + 5 * m) % 12}", START + 100 * m + n)
        for n in range(40)
        for m in range(5 + n % 3)
    ]
    changed = list(rows)
    for user, item in changes.items():
        own = [at for at, row in enumerate(rows) if row[0] == f"u{user:02d}"]
        for at in own[-2:] if both else own[-1:]:
            changed[at] = (rows[at][0], f"i{item}", rows[at][2])
    made = [
        prepare(write_csv(folder / f"{n}.csv", log), folder / str(n), numbering=numbering, k_core=0)
        for n, log in enumerate((rows, changed))
    ]
    assert made[0].sequences.item_ids == made[1].sequences.item_ids
    for name in ("items.parquet", "users.parquet"):
        assert (folder / "0" / name).read_bytes() == (folder / "1" / name).read_bytes()
    counts = [training_counts(data.sequences).tolist() for data in made]
    assert counts[0] == counts[1]


def test_strange_ids_come_back_as_they_were(tmp_path):
    ids = ["a b", 'say "x"', "it's", "a.b", "x" * 10_000, "\u65e5\u672c", "e\u0301", "\U0001f642"]
    ids += ["007", "7", "new\nline", " edge "]
    rows = [(user, item, START + n) for user in ids for n, item in enumerate(ids)]
    prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "data")
    loaded = load_dataset(tmp_path / "data").sequences
    assert loaded.user_ids == loaded.item_ids == sorted(ids)
    assert [loaded.item_ids[row] for row in loaded.items[: len(ids)]] == ids


# What goes wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "magic"}, "--format sequences"),
        ({"k_core": 5}, "are a log's"),
        ({"since": "2019-01-01"}, "are a log's"),
        ({"min_length": 2}, "are a log's"),
        ({"ties": "shuffle"}, "--ties keep"),
        ({"expect": "books"}, "choose one of beauty"),
        ({"expect": "beauty"}, "3 users and 5 items, the .* docs/data.md, or leave out --expect"),
        ({"on_error": "pass"}, "choose stop or skip"),
        ({"split": "global-time"}, "the sequences format has no times: .* --split leave-one-out"),
        ({"numbering": "magic"}, "choose one of"),
        ({"numbering": "semantic"}, "give --items META"),
        ({"item_column": "asin"}, "give --items META"),
        ({"engine": "spark"}, "choose local or ray"),
    ],
)
def test_wrong_options_leave_nothing(sequences_file, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare(sequences_file, tmp_path / "data", **wrong)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [sequences_file]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"log": LogOptions(columns=("a", "b"))}, "or the places of three, as 0,1,3"),
        ({"log": LogOptions(time_unit="h")}, "choose auto, s, ms or us"),  # type: ignore[arg-type]
        ({"log": LogOptions(("a", "b", "c")), "format": "amazon"}, "names of their own"),
        ({"ties": "mix"}, "choose shuffle or keep"),
        ({"k_core": 99}, "lower --k-core 99"),
        ({"since": "2090-01-01"}, "mend --since and --until$"),
    ],
)
def test_wrong_options_of_a_log_leave_nothing(log, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        prepare(log, tmp_path / "data", **wrong)
    assert list(tmp_path.iterdir()) == [log]


def test_skipped_lines_are_counted_shown_and_part_of_the_sum(log, tmp_path, capfd):
    log.write_text(log.read_text() + "u1,i1,never\n" * 12)
    command = ["prepare", str(log), "--out", str(tmp_path / "data"), "--k-core", "0"]
    assert run_command(command) == 1
    assert "never" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [log]
    assert run_command([*command, "--on-error", "skip"]) == 0
    said = capfd.readouterr().out
    assert "12 lines that could not be read" in said
    assert said.count("never") == 10
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert info["dropped"]["bad_lines"] == 12
    assert info["read"] == info["interactions"] + sum(info["dropped"].values())


def test_sequences_skip_bad_lines_too(tmp_path):
    lines = b"u1 1 2 3\nu2 1 2\nu1 4 5 6\nu3 \xff 1 2 3\nu4 1\x002 3 4\nu5 3 2 1\n"
    (tmp_path / "log.txt").write_bytes(lines)
    with pytest.raises(DataError, match=r"log.txt:5: binary"):
        prepare(tmp_path / "log.txt", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    made = prepare(tmp_path / "log.txt", tmp_path / "data", on_error="skip")
    assert made.sequences.user_ids == ["u1", "u5"]
    assert made.info.dropped == {"bad_lines": 4}
    numbers = [line.split(": ")[0].rpartition(":")[2] for line in made.bad_lines[1:]]
    assert numbers == ["2", "3", "4", "5"]
    assert replace(made, bad_lines=()).info == load_dataset(tmp_path / "data").info


@pytest.mark.parametrize("size", [20, 5_000, 30_000])
def test_a_file_that_may_not_grow_is_reported_wherever_it_is(tmp_path, size, capsys):
    """While rows wait for their users, while they are sorted, while Parquet is written: never half
    a data directory."""
    log = write_csv(tmp_path / "log.csv", rows_of(beauty_like(400, 120)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code = run_command(["prepare", str(log), "--out", str(tmp_path / "data")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (1, 1), said
    assert f"{tmp_path / 'data'}" in said
    assert "file too large: raise the limit (ulimit -f) or choose another output" in said
    assert list(tmp_path.iterdir()) == [log]


def test_outputs_that_cannot_be(log, tmp_path, capfd):
    (taken := tmp_path / "taken").mkdir()
    (taken / "diary.txt").write_text("dear")
    for out, options, said in (
        (Path("/proc/genrec"), [], "/proc/genrec"),
        (log / "inside", [], str(log)),
        (taken, [], "--overwrite"),
        (taken, ["--overwrite"], "not ours"),
    ):
        assert run_command(["prepare", str(log), "--out", str(out), *options]) == 1
        found = capfd.readouterr().err
        assert said in found
        assert found.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "taken"]
    assert [path.name for path in taken.iterdir()] == ["diary.txt"]


def test_an_output_is_replaced_on_demand_and_only_by_a_complete_one(log, tmp_path, capfd):
    data = tmp_path / "data"
    prepare(log, data, k_core=0)
    before = files(data)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(log, data, seed=1, k_core=0)
    good = log.read_text()
    log.write_text(good + "broken\n")
    command = ["prepare", str(log), "--out", str(data), "--overwrite", "--k-core", "0", "--seed=1"]
    assert run_command(command) == 1
    assert f"{log}:" in capfd.readouterr().err
    assert files(data) == before
    log.write_text(good)
    assert run_command(command) == 0
    assert load_dataset(data).info.seed == 1
    with pytest.raises(ValueError, match="numbered anew, with its shards: choose another output"):
        prepare(data, data, overwrite=True)


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
        (lambda at: shutil.rmtree(at), "dataset.json: no such file"),
        (lambda at: (at / "dataset.json").write_text("{"), "not a dataset.json"),
        (lambda at: (at / "dataset.json").write_text("[]"), "not a dataset.json"),
        (lambda at: damage_json(at, format_version=99), "format_version 99"),
        (lambda at: damage_json(at, surprise=1), "surprise"),
        (lambda at: damage_json(at, sequences_hash="0" * 64), "sequences_hash"),
        (swap_codes, "numbering_hash"),
        (lambda at: (at / "users.parquet").unlink(), "users.parquet: no such file"),
        (lambda at: (at / "items.parquet").write_bytes(b"PAR1"), "not readable as Parquet"),
        (lambda at: shutil.copy(at / "users.parquet", at / "sequences.parquet"), "no column items"),
    ],
)
def test_damage_is_reported_in_one_line(sequences_file, tmp_path, damage, message):
    folder = prepare(sequences_file, tmp_path / "data").path
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
