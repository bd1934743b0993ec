"""A split by time: nothing derived moves with a held-out row, and files, rules and audit keep to
the dates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from genrec_shards.cleaning.clean import Cleaning, CleanLog, clean
from genrec_shards.cleaning.summary import prepare_summary
from genrec_shards.dataset import load_dataset
from genrec_shards.errors import DataError
from genrec_shards.histories import training_counts
from genrec_shards.numbering.cooccurrence import neighbour_vectors, training_items
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.item_vectors import TrainedVectors
from genrec_shards.numbering.numbering import Numbering, NumberingName, number
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences
from genrec_shards.splits import Cutoff, Periods, cutoff_of
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import SampleOrder
from genrec_shards.storage.write import write_shards
from genrec_shards.timestamps import moment
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from logs import DATES, Row, dated_rows, files, write_csv

from genrec_dist.baselines import registry as baseline
from genrec_dist.baselines.leak_audit import audit
from genrec_dist.baselines.sasrec.model import SasrecSettings
from genrec_dist.baselines.sasrec.train import TrainingParts
from genrec_dist.data.item_graph import KnnSettings, neighbour_weights
from genrec_dist.data.tokenizer import train_tokenizer

PHASES = [Phase.generate]


def cleaned(rows: list[Row], tmp_path_factory: pytest.TempPathFactory, **options: Any) -> CleanLog:
    """Times are 0 to 29."""
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    cleaning = Cleaning(**{"cutoff": Cutoff(10, 20)} | options)
    return clean([frame], cleaning, tmp_path_factory.mktemp("rows"), "log.csv")


@st.composite
def log_and_changed_log(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Two logs that differ only in held-out rows: items of the catalogue, strangers' too, any
    number of them."""
    users, items = [f"u{n}" for n in range(8)], [f"i{n:02}" for n in range(draw(st.integers(3, 9)))]
    row = st.tuples(st.sampled_from(users[:6]), st.sampled_from(items), st.integers(0, 9))
    training = draw(st.lists(row, min_size=15, max_size=60))
    # Everyone's training period is enough for the core, and somebody has a target in each period.
    training += [(user, items[place], place) for user in users[:4] for place in range(3)]
    # u6 and u7 have no training row: nothing of theirs may count.
    held_out = st.lists(
        st.tuples(st.sampled_from(users), st.sampled_from(items), st.integers(10, 29)), max_size=40
    )
    targets = [("u0", items[0], 12), ("u1", items[1], 23)]
    before, after = draw(held_out) + targets, draw(held_out) + targets
    return training + before, draw(st.permutations(training + after))


def derived(found: CleanLog, name: str, seed: int) -> dict[str, Any]:
    """Everything that a training through n-2 is made of."""
    sequences = found.sequences
    dice = np.random.default_rng([5, sequences.num_items])
    more: dict[str, Any] = {}
    if name == "vectors":
        vectors = dice.normal(size=(sequences.num_items, 4))
        more["vectors"] = TrainedVectors(vectors, "v", "0" * 64, "n-2")
    if name in ("semantic", "combined"):
        words = ["red", "blue", "soap", "comb"]
        texts = [" ".join(dice.choice(words, 2)) for _ in sequences.item_ids]
        more["descriptions"] = Descriptions(texts, "meta.csv", "0" * 64)
    kind: NumberingName = "collaborative" if name == "vectors" else name  # type: ignore[assignment]
    codes = number(sequences, kind, seed, **more)
    sizes = {"batch_size": 1000, "seed": seed, "periods": sequences.periods}
    steps = [
        SampleOrder(sequences.lengths, 4, space=space, **sizes).step(0, 0)
        for space in ("user", "last", "every-prefix")
    ]
    batches = TrainingParts(sequences, SasrecSettings(), "n-2").batches(1)
    graph = neighbour_weights(sequences, "test", "n-2", KnnSettings())
    return {
        "users": sequences.user_ids,
        "items": sequences.item_ids,
        "codes": (codes.item_codes, codes.user_codes, codes.numbering_hash(), codes.hierarchy),
        "vocabulary": train_tokenizer(codes.item_codes, 300, 1).get_vocab(),
        "training parts": [part.tolist() for part in training_items(sequences)],
        "popularity": training_counts(sequences, "n-2").tolist(),
        "neighbours": graph.toarray().tobytes(),
        "vectors": neighbour_vectors(sequences, 4, seed).tobytes(),
        "samples": [
            [getattr(step, field).tolist() for field in step.__dataclass_fields__] for step in steps
        ],
        "sasrec": [(packed.items_n.tolist(), labels.tolist()) for packed, labels, _ in batches],
    }


LEAK_FREE = ["given", "random", "train-order", "collaborative", "vectors", "semantic", "combined"]


@settings(max_examples=25, deadline=None)
@given(logs=log_and_changed_log(), k=st.integers(0, 3))
@pytest.mark.parametrize("name", LEAK_FREE)
def test_nothing_derived_moves_when_a_held_out_row_changes(tmp_path_factory, name, logs, k):
    before, after = (derived(cleaned(log, tmp_path_factory, k_core=k), name, 1) for log in logs)
    assert before == after


def test_the_property_sees_a_core_that_counts_held_out_rows(tmp_path_factory):
    """Leave-one-out counts all rows of the log: the same property fails of it."""

    @settings(max_examples=200, deadline=None, database=None, derandomize=True, phases=PHASES)
    @given(logs=log_and_changed_log())
    def leaks(logs):
        before, after = (
            cleaned(log, tmp_path_factory, k_core=3, cutoff=None).sequences.user_ids for log in logs
        )
        assert before == after

    with pytest.raises(AssertionError):
        leaks()


# Files

META = "item,title\n" + "".join(
    f"i{n:02},{'red soap' if n % 2 else 'blue comb'} {n}\n" for n in range(12)
)


def prepared(
    folder: Path, numbering: NumberingName = "random", held_out_seed: int = 0, **options: Any
) -> Path:
    """A data directory with shards of 8 users per record."""
    folder.mkdir(parents=True)
    log = write_csv(folder / "log.csv", dated_rows(held_out_seed))
    (folder / "meta.csv").write_text(META, encoding="utf-8")
    options = {"split": "global-time", "cutoff": DATES, "k_core": 3} | options
    options |= {"items": folder / "meta.csv"} if numbering == "semantic" else {}
    dataset = prepare(log, folder / "data", numbering=numbering, **options)
    write_shards(dataset, folder / "data" / "shards", users_per_shard=16, users_per_record=8)
    return folder / "data"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return prepared(tmp_path_factory.mktemp("by-time") / "a")


@pytest.mark.parametrize(
    "numbering", ["random", "train-order", "collaborative", "semantic", "given"]
)
def test_no_byte_of_catalogue_codes_and_training_parts_moves_when_held_out_rows_change(
    tmp_path, numbering
):
    one, two = (prepared(tmp_path / f"{seed}", numbering, seed) for seed in (0, 1))
    for name in ("items.parquet", "users.parquet"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    readers = [ShardReader(path / "shards") for path in (one, two)]
    assert readers[0].manifest.interactions != readers[1].manifest.interactions
    parts = []
    for reader in readers:
        items, offsets = reader.gather(np.arange(reader.manifest.users))
        ends = offsets[:-1] + reader.periods.lengths("n-2")
        parts.append([items[start:end].tolist() for start, end in zip(offsets, ends, strict=False)])
    assert parts[0] == parts[1]
    infos = [json.loads((path / "dataset.json").read_text()) for path in (one, two)]
    assert infos[0]["numbering_hash"] == infos[1]["numbering_hash"]
    assert infos[0]["dropped"]["users_below_k_core"] == infos[1]["dropped"]["users_below_k_core"]


def test_a_data_directory_says_its_dates_and_is_checked_against_them(tmp_path):
    path = prepared(tmp_path / "a")
    dataset, info = load_dataset(path), json.loads((path / "dataset.json").read_text())
    sequences, found = dataset.sequences, info["global_time"]
    assert (info["split"], found["cutoff"]) == ("global-time", DATES)
    for split in ("validation", "test"):
        targets = len(sequences.history_and_target(split).users)
        assert found[f"{split}_targets"] == targets < sequences.num_users
    assert found["users_without_history"] >= 4  # u36 to u39 come in July
    assert list(info["dropped"])[-2:] == [
        *("rows_of_users_without_history", "rows_of_items_outside_the_catalogue")
    ]
    assert info["interactions"] + sum(info["dropped"].values()) == info["read"]
    assert (
        f"tested from there on: {found['validation_targets']} users" in prepare_summary(dataset)[2]
    )
    assert dataset.info.split_name == f"global-time {DATES}"
    table = pq.read_table(path / "sequences.parquet")
    for part, date in zip(("training_U", "known_U"), DATES.split(","), strict=True):
        times = table.column("times").to_pylist()
        before = [sum(time < moment(date, "") for time in seen) for seen in times]
        assert getattr(sequences.periods, part).tolist() == before

    # The hash covers the periods: other dates are noticed, and so are other times.
    for cutoff, message in (
        ("2014-07-01,2014-11-15", r"sequences_hash is .* dataset.json says"),
        ("2014-07-01", r"dataset\.json: --cutoff 2014-07-01: .*: prepare again"),
    ):
        changed = info | {"global_time": found | {"cutoff": cutoff}}
        (path / "dataset.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_dataset(path)
    (path / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    pq.write_table(table.drop_columns(["times"]), path / "sequences.parquet")
    with pytest.raises(DataError, match=r"no column times, which a split by time needs"):
        load_dataset(path)


def test_a_new_numbering_keeps_the_split_and_the_shards(shared, tmp_path):
    anew = prepare(shared, tmp_path / "anew", numbering="train-order", format="data")
    assert anew.info.split_name == f"global-time {DATES}"
    assert anew.info.sequences_hash == ShardReader(shared / "shards").manifest.sequences_hash
    assert load_dataset(tmp_path / "anew").sequences.history_and_target("test").users.tolist()
    with pytest.raises(ValueError, match="a data directory keeps its split"):
        prepare(shared, tmp_path / "other", format="data", split="leave-one-out")


def test_shards_say_where_training_ends(tmp_path):
    path = prepared(tmp_path / "a")
    reader, sequences = ShardReader(path / "shards"), load_dataset(path).sequences
    for through in ("n-2", "n-1"):
        lengths = sequences.periods.lengths(through)
        assert np.array_equal(reader.periods.lengths(through), lengths)
        options = {"trained_through": through, "periods": reader.periods}
        sizes = {"space": "every-prefix", "batch_size": 10**6, "seed": 0}
        step = SampleOrder(reader.lengths, 8, **sizes, **options).step(0, 0)
        ends = sequences.training_ends(through)[step.user_rows] - sequences.offsets[step.user_rows]
        assert np.array_equal(step.training_lengths, ends)
        assert (step.target_positions < ends).all()
        assert len(step) == (lengths - 1).sum() == len(np.unique(step.sample_ids))
    assert "shards/periods.npy" not in files(prepared(tmp_path / "b", split=None, cutoff=None))
    file = path / "shards" / "periods.npy"
    file.write_bytes(file.read_bytes()[:-8] + b"\x7f" * 8)
    with pytest.raises(DataError, match=r"periods\.npy: sha256"):
        ShardReader(path / "shards")
    file.unlink()
    with pytest.raises(DataError, match=r"periods\.npy: cannot be read"):
        ShardReader(path / "shards")


def test_another_cutoff_gives_another_hash(shared, tmp_path):
    other = prepared(tmp_path / "b", cutoff="2014-07-01,2014-11-01")
    assert (shared / "users.parquet").read_bytes() == (other / "users.parquet").read_bytes()
    hashes = {load_dataset(path).info.sequences_hash for path in (shared, other)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("split", "cutoff", "message"),
    [
        ("global-time", None, "needs the first dates of the validation and the test period: give"),
        (None, DATES, "dates go with --split global-time"),
        ("by-user", None, "choose leave-one-out or global-time"),
        ("global-time", "2014-07-01", "as 2014-01-01,2014-04-01"),
        ("global-time", "2014-07-01,soon", "--cutoff soon: give a date as"),
        ("global-time", "2014-07-01,2014-07-01", "give the earlier date first"),
        ("global-time", "2013-01-01,2014-01-01", "or give later dates than --cutoff 2013-01-01"),
        ("global-time", "2014-07-01,2015-02-01", "in the test period: give other dates"),
        ("global-time", "2014-07-01,2014-07-01T00:00:01", "has a row in the validation period"),
    ],
)
def test_dates_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, split, cutoff, message):
    log = write_csv(tmp_path / "log.csv", dated_rows())
    with pytest.raises(ValueError, match=message):
        prepare(log, tmp_path / "data", k_core=3, split=split, cutoff=cutoff)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_equal_moments_have_equal_texts():
    cutoff = cutoff_of("2014-07-01T00:00:00,2014-10-01T12:30:00+02:00")
    assert str(cutoff) == "2014-07-01,2014-10-01T10:30:00Z"
    early = Cutoff(-500_000, moment("2014-01-01", ""))
    assert cutoff_of(str(cutoff_of("1969-12-31T23:59:59.5,2014-01-01"))) == early


# Rules and audit


def two_users() -> Sequences:
    """Items 0..5; u0 has a target in both periods, u1 in test alone, u2 in none."""
    items = np.array([0, 1, 2, 3, 1, 4, 5, 3, 2, 0], np.int32)
    periods = Periods(np.array([2, 2, 2]), np.array([3, 2, 2]))
    offsets = np.array([0, 5, 8, 10])
    return Sequences(items, offsets, ["u0", "u1", "u2"], list("abcdef"), periods)


def test_rules_take_each_user_with_a_target_once():
    sequences, codes = two_users(), [str(n) for n in range(6)]
    for split, users, targets in (("validation", [0], [2]), ("test", [0, 1], [3, 3])):
        view = sequences.history_and_target(split)
        assert (view.users.tolist(), view.targets[view.users].tolist()) == (users, targets)
        for name in ("popularity", "counting", "repeat", "knn"):
            rule = baseline.fit(name, sequences, codes, split, exclude_history=False)
            assert len(rule(view.users).items_UN) == len(users)
    assert training_counts(sequences, "n-2").tolist() == [2, 1, 1, 0, 1, 1]
    assert training_counts(sequences, "n-1").tolist() == [2, 1, 2, 0, 1, 1]


def test_the_audit_counts_users_with_a_target():
    numbering = Numbering("random", 0, list("012345"), list("abc"))
    found = audit(two_users(), numbering, np.array([1, 1, 12, 22, 23, 1, 2, 25, 3, 3]))
    assert found.users == 3
    assert found.repeated_targets == {"validation": 0.0, "test": 0.0}
    # Item d is in no training period.
    assert found.unseen_targets == {"validation": 0.0, "test": 1.0}
    assert (found.tied_users, found.tied_held_out) == (pytest.approx(2 / 3), 0.0)
    assert found.counting["validation"]["HR@1"] == 1.0  # 0 1 -> 2
    assert found.counting["test"]["HR@1"] == 0.5  # 0 1 2 -> 3; 4 5 -> 3
