"""A split by time: the core, histories and targets of a ten-line reference, and nothing derived
that a held-out row moves."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from dated_log import DATES, NUM_ITEMS, Row, write_log
from genrec_shards.cleaning import buckets as buckets_module
from genrec_shards.cleaning.clean import Cleaning, CleanLog, clean
from genrec_shards.dataset import load_dataset
from genrec_shards.errors import DataError
from genrec_shards.histories import training_counts
from genrec_shards.numbering.cooccurrence import neighbour_vectors, training_items
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.item_vectors import TrainedVectors
from genrec_shards.numbering.numbering import NumberingName, number
from genrec_shards.prepare import cleaning_told, prepare
from genrec_shards.sequences import Sequences
from genrec_shards.splits import NO_TARGET, Cutoff, Periods, Split, cutoff_of
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import Plan
from genrec_shards.storage.write import write_shards
from genrec_shards.timestamps import moment
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from genrec_dist.baselines import registry as baseline
from genrec_dist.baselines.leak_audit import audit
from genrec_dist.baselines.sasrec_model import SasrecSettings
from genrec_dist.baselines.sasrec_train import TrainingParts
from genrec_dist.data.item_graph import KnnSettings, neighbour_weights
from genrec_dist.data.tokenizer import train_tokenizer

CUTOFF = Cutoff(10, 20)
"""Times of these tests are 0 to 29."""


def cleaned(rows: list[Row], tmp_path_factory: pytest.TempPathFactory, **options: Any) -> CleanLog:
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64}
    frames = [
        pl.DataFrame(rows[first : first + 9], schema=schema, orient="row")
        for first in range(0, len(rows), 9)
    ]
    cleaning = Cleaning(**{"cutoff": CUTOFF, "min_length": 1, **options})
    return clean(frames, cleaning, tmp_path_factory.mktemp("rows"), "log.csv")


def core_of(rows: set[Row], k: int, min_length: int) -> set[Row]:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = {row for row in rows if users[row[0]] >= max(k, min_length) and items[row[1]] >= k}
        if kept == rows:
            return rows
        rows = kept


@dataclass
class Expected:
    """The plain way, user by user; items of one time are in no order here."""

    dropped: dict[str, int]
    users_without_history: int
    rows: dict[str, list[tuple[int, str]]]

    @classmethod
    def of(cls, log: list[Row], k: int, min_length: int) -> Expected:
        once = set(log)
        core = core_of({row for row in once if row[2] < 10}, k, min_length)
        users, items = {row[0] for row in core}, {row[1] for row in core}
        held_out = {row for row in once if row[2] >= 10}
        strangers = {row for row in held_out if row[0] not in users}
        unknown = {row for row in held_out - strangers if row[1] not in items}
        kept = core | (held_out - strangers - unknown)
        dropped = {
            "rows_of_users_without_history": len(strangers),
            "rows_of_items_outside_the_catalogue": len(unknown),
            "duplicates": len(log) - len(once),
        }
        rows = {
            user: sorted((time, item) for who, item, time in kept if who == user)
            for user in sorted(users)
        }
        return cls(dropped, len({row[0] for row in strangers}), rows)

    def asked(self, user: str, split: Split) -> tuple[int, int]:
        """How many items the history has, and how many the period that asks."""
        first, end = (10, 20) if split == "validation" else (20, 99)
        times = [time for time, _ in self.rows[user]]
        return sum(time < first for time in times), sum(first <= time < end for time in times)


logs = st.lists(
    st.tuples(
        st.sampled_from([f"u{n}" for n in range(7)]), st.sampled_from("abcdef"), st.integers(0, 29)
    ),
    min_size=20,
    max_size=150,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=logs, k=st.integers(0, 4), min_length=st.integers(1, 5), ties=st.sampled_from(["shuffle", "keep"]),
    size=st.sampled_from([1, 3, 100]),
)  # fmt: skip
def test_core_histories_and_targets_are_those_of_the_plain_way(
    tmp_path_factory, rows, k, min_length, ties, size
):
    wanted = Expected.of(rows, k, min_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets_module, "USERS_A_BUCKET", size)
        asked = {
            split: [u for u in wanted.rows if wanted.asked(u, split)[1]]
            for split in ("validation", "test")
        }
        if not all(asked.values()):
            with pytest.raises(
                DataError,
                match=r"no user is left|none of .* users of the training period has a row in",
            ):
                cleaned(rows, tmp_path_factory, k_core=k, min_length=min_length, ties=ties)
            return
        found = cleaned(rows, tmp_path_factory, k_core=k, min_length=min_length, ties=ties)
    sequences = found.sequences
    assert sequences.user_ids == list(wanted.rows)
    assert sequences.item_ids == sorted(
        {item for seen in wanted.rows.values() for time, item in seen if time < 10}
    )
    assert {key: found.dropped[key] for key in wanted.dropped} == wanted.dropped
    assert sum(found.dropped.values()) + sequences.num_interactions == found.num_read == len(rows)
    assert found.users_without_history == wanted.users_without_history
    for split in ("validation", "test"):
        view = sequences.history_and_target(split)
        assert [sequences.user_ids[user] for user in view.users] == asked[split]
        for user, name in enumerate(sequences.user_ids):
            length, _ = wanted.asked(name, split)
            assert view.ends[user] - view.starts[user] == length
            places = range(sequences.offsets[user], sequences.offsets[user + 1])
            told = [
                (int(found.timestamps[place]), sequences.item_ids[sequences.items[place]])
                for place in places
            ]
            assert sorted(told) == wanted.rows[name]
            assert [time for time, _ in told] == [time for time, _ in wanted.rows[name]]
            target = NO_TARGET if name not in asked[split] else sequences.items[view.ends[user]]
            assert view.targets[user] == target
            chosen = sequences.history_and_target(split, np.array([user]))
            assert (chosen.starts[0], chosen.ends[0], chosen.targets[0]) == (
                view.starts[user],
                view.ends[user],
                target,
            )
    for through, first in (("n-2", 10), ("n-1", 20)):
        parts = sequences.training_ends(through) - sequences.offsets[:-1]
        assert parts.tolist() == [
            sum(time < first for time, _ in seen) for seen in wanted.rows.values()
        ]


@st.composite
def log_and_changed_log(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Two logs that differ only in held-out rows: items of the catalogue, strangers' too, any
    number of them."""
    users, items = [f"u{n}" for n in range(8)], [f"i{n:02}" for n in range(draw(st.integers(3, 9)))]
    training = [(user, item, time) for user, item, time in draw(st.lists(
        st.tuples(st.sampled_from(users[:6]), st.sampled_from(items), st.integers(0, 9)), min_size=15, max_size=60
    ))]  # fmt: skip
    # Everyone's training period is enough for the core, and somebody is asked in each period.
    training += [(user, items[place], place) for user in users[:4] for place in range(3)]
    # u6 and u7 have no training row: nothing of theirs may count.
    held_out = st.lists(
        st.tuples(st.sampled_from(users), st.sampled_from(items), st.integers(10, 29)), max_size=40
    )
    asked = [("u0", items[0], 12), ("u1", items[1], 23)]
    before, after = draw(held_out) + asked, draw(held_out) + asked
    return training + before, draw(st.permutations(training + after))


def derived(found: CleanLog, name: str, seed: int) -> dict[str, Any]:
    """Everything that a training through n-2 is made of."""
    sequences = found.sequences
    dice = np.random.default_rng([5, sequences.num_items])
    more: dict[str, Any] = {}
    if name == "vectors":
        more["vectors"] = TrainedVectors(
            dice.normal(size=(sequences.num_items, 4)), "v", "0" * 64, "n-2"
        )
    if name == "semantic":
        texts = [
            " ".join(dice.choice(["red", "blue", "soap", "comb"], 2)) for _ in sequences.item_ids
        ]
        more["descriptions"] = Descriptions(texts, "meta.csv", "0" * 64)
    kind: NumberingName = "collaborative" if name == "vectors" else name  # type: ignore[assignment]
    codes = number(sequences, kind, seed, **more)
    plans = [
        Plan(
            sequences.lengths, 4, space=space, batch_size=1000, seed=seed, periods=sequences.periods
        )
        for space in ("user", "last", "every-prefix")
    ]
    batches = TrainingParts(sequences, SasrecSettings(), "n-2").batches(1)
    return {
        "users": sequences.user_ids,
        "items": sequences.item_ids,
        "codes": (codes.item_codes, codes.user_codes, codes.numbering_hash(), codes.hierarchy),
        "vocabulary": train_tokenizer(codes.item_codes, 300, 1).get_vocab(),
        "training parts": [part.tolist() for part in training_items(sequences)],
        "popularity": training_counts(sequences, "n-2").tolist(),
        "neighbours": neighbour_weights(sequences, "test", "n-2", KnnSettings())
        .toarray()
        .tobytes(),
        "vectors": neighbour_vectors(sequences, 4, seed).tobytes(),
        "samples": [
            [
                getattr(plan.step(0, 0), field).tolist()
                for field in plan.step(0, 0).__dataclass_fields__
            ]
            for plan in plans
        ],
        "sasrec": [(packed.items_n.tolist(), labels.tolist()) for packed, labels in batches],
    }


LEAK_FREE = ["given", "random", "train-order", "collaborative", "vectors", "semantic"]


@settings(max_examples=60, deadline=None)
@given(logs=log_and_changed_log(), k=st.integers(0, 3))
@pytest.mark.parametrize("name", LEAK_FREE)
def test_nothing_derived_moves_when_a_held_out_row_changes(tmp_path_factory, name, logs, k):
    before, after = (derived(cleaned(log, tmp_path_factory, k_core=k), name, 1) for log in logs)
    assert before == after


def test_the_property_sees_a_core_that_counts_held_out_rows(tmp_path_factory):
    """Leave-one-out counts all rows of the log: the same property fails of it."""

    @settings(
        max_examples=200, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(logs=log_and_changed_log())
    def leaks(logs):
        before, after = (
            cleaned(log, tmp_path_factory, k_core=3, cutoff=None, min_length=3).sequences.user_ids
            for log in logs
        )
        assert before == after

    with pytest.raises(AssertionError):
        leaks()


# Files.

META = "item,title\n" + "".join(
    f"i{n:02},{'red soap' if n % 2 else 'blue comb'} {n}\n" for n in range(NUM_ITEMS)
)


def prepared(
    folder: Path, numbering: NumberingName = "random", held_out_seed: int = 0, **options: Any
) -> Path:
    """A data directory with shards of 8 users a record."""
    folder.mkdir(parents=True)
    write_log(folder / "log.csv", held_out_seed=held_out_seed)
    (folder / "meta.csv").write_text(META, encoding="utf-8")
    dates = {"split": "global-time", "cutoff": DATES} | options
    texts = {"items": folder / "meta.csv"} if numbering == "semantic" else {}
    dataset = prepare(
        folder / "log.csv", folder / "data", numbering=numbering, k_core=3, **dates, **texts
    )
    write_shards(dataset, folder / "data" / "shards", users_per_shard=16, users_per_record=8)
    return folder / "data"


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
        assert reader.periods is not None
        ends = offsets[:-1] + reader.periods.lengths("n-2")
        parts.append([items[start:end].tolist() for start, end in zip(offsets, ends, strict=False)])
    assert parts[0] == parts[1]
    infos = [json.loads((path / "dataset.json").read_text()) for path in (one, two)]
    assert infos[0]["numbering_hash"] == infos[1]["numbering_hash"]
    assert infos[0]["dropped"]["users_below_k_core"] == infos[1]["dropped"]["users_below_k_core"]


def test_a_data_directory_says_its_dates_and_is_checked_against_them(tmp_path):
    path = prepared(tmp_path / "a")
    dataset, info = load_dataset(path), json.loads((path / "dataset.json").read_text())
    view = {split: dataset.sequences.history_and_target(split) for split in ("validation", "test")}
    assert info["split"] == "global-time"
    assert info["global_time"]["cutoff"] == DATES
    assert (
        info["global_time"]["validation_targets"]
        == len(view["validation"].users)
        < dataset.sequences.num_users
    )
    assert (
        info["global_time"]["test_targets"] == len(view["test"].users) < dataset.sequences.num_users
    )
    assert info["global_time"]["users_without_history"] >= 4  # u36 to u39 come in July
    assert info["interactions"] + sum(info["dropped"].values()) == info["read"]
    assert (
        f"tested from there on: {len(view['validation'].users)} users" in cleaning_told(dataset)[1]
    )
    assert dataset.info.split_name == f"global-time {DATES}"
    assert dataset.sequences.periods is not None
    loaded = [dataset.sequences.periods.training_U, dataset.sequences.periods.known_U]
    first = [moment(date, "") for date in DATES.split(",")]
    table = pq.read_table(path / "sequences.parquet").column("times").to_pylist()
    assert [part.tolist() for part in loaded] == [
        [sum(time < date for time in seen) for seen in table] for date in first
    ]

    # The hash covers the cut: other dates that part rows otherwise are told, and so are other
    # times.
    info["global_time"]["cutoff"] = "2014-07-01,2014-11-15"
    (path / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(DataError, match=r"sequences_hash is .* dataset.json says"):
        load_dataset(path)
    info["global_time"]["cutoff"] = "2014-07-01"
    (path / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset\.json: --cutoff 2014-07-01: .*: prepare again"):
        load_dataset(path)


def test_times_that_are_missing_are_told(tmp_path):
    path = prepared(tmp_path / "a")
    table = pq.read_table(path / "sequences.parquet").drop_columns(["times"])
    pq.write_table(table, path / "sequences.parquet")
    with pytest.raises(DataError, match=r"no column times, which a split by time needs"):
        load_dataset(path)


def test_a_new_numbering_keeps_the_split_and_the_shards(tmp_path):
    path = prepared(tmp_path / "a")
    anew = prepare(path, tmp_path / "anew", numbering="train-order", format="data")
    assert anew.info.split_name == f"global-time {DATES}"
    assert anew.info.sequences_hash == ShardReader(path / "shards").manifest.sequences_hash
    assert load_dataset(tmp_path / "anew").sequences.history_and_target("test").users.tolist()
    with pytest.raises(ValueError, match="a data directory keeps its split"):
        prepare(path, tmp_path / "other", format="data", split="leave-one-out")


def test_shards_tell_where_training_ends(tmp_path):
    path = prepared(tmp_path / "a")
    reader, sequences = ShardReader(path / "shards"), load_dataset(path).sequences
    assert reader.periods is not None
    assert sequences.periods is not None
    for through in ("n-2", "n-1"):
        assert np.array_equal(reader.periods.lengths(through), sequences.periods.lengths(through))
        plan = Plan(
            reader.lengths, 8, space="every-prefix", batch_size=10**6, seed=0, trained_through=through,
            periods=reader.periods,
        )  # fmt: skip
        step = plan.step(0, 0)
        ends = sequences.training_ends(through)[step.user_rows] - sequences.offsets[step.user_rows]
        assert np.array_equal(step.training_lengths, ends)
        assert (step.target_positions < ends).all()
        assert len(step) == (sequences.periods.lengths(through) - 1).sum()
        assert len(np.unique(step.sample_ids)) == len(step)
    assert "periods.npy" not in {
        file.name for file in prepared(tmp_path / "b", split=None, cutoff=None).rglob("*")
    }
    for change, told in (
        (lambda data: data[:-8] + b"\x7f" * 8, "sha256"),
        (None, "cannot be read"),
    ):
        file = path / "shards" / "periods.npy"
        file.write_bytes(change(file.read_bytes())) if change else file.unlink()
        with pytest.raises(DataError, match=rf"periods\.npy: {told}"):
            ShardReader(path / "shards")


def test_shards_of_another_cut_are_refused(tmp_path):
    one, two = prepared(tmp_path / "a"), prepared(tmp_path / "b", cutoff="2014-07-01,2014-11-01")
    assert (one / "users.parquet").read_bytes() == (two / "users.parquet").read_bytes()
    assert load_dataset(one).info.sequences_hash != load_dataset(two).info.sequences_hash


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"split": "global-time"},
            "needs the first dates of the validation and the test period: give --cutoff",
        ),
        ({"cutoff": DATES}, "dates go with --split global-time"),
        ({"split": "by-user"}, "choose leave-one-out or global-time"),
        ({"split": "global-time", "cutoff": "2014-07-01"}, "as 2014-01-01,2014-04-01"),
        ({"split": "global-time", "cutoff": "2014-07-01,soon"}, "--cutoff soon: give a date as"),
        (
            {"split": "global-time", "cutoff": "2014-07-01,2014-07-01"},
            "give the earlier date first",
        ),
        (
            {"split": "global-time", "cutoff": DATES, "min_length": 0},
            "at least 1 are needed .in the training period",
        ),
        (
            {"split": "global-time", "cutoff": "2013-01-01,2014-01-01"},
            "or give later dates than --cutoff 2013-01-01,2014",
        ),
        (
            {"split": "global-time", "cutoff": "2014-07-01,2015-02-01"},
            "has a row in the test period: give other dates",
        ),
        (
            {"split": "global-time", "cutoff": "2014-07-01,2014-07-01T00:00:01"},
            "has a row in the validation period",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, options, told):
    write_log(tmp_path / "log.csv")
    with pytest.raises(ValueError, match=told):
        prepare(tmp_path / "log.csv", tmp_path / "data", k_core=3, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_sequences_without_times_cannot_be_cut_by_time(tmp_path):
    (tmp_path / "log.txt").write_text("u a b c\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the sequences format has no times"):
        prepare(tmp_path / "log.txt", tmp_path / "data", split="global-time", cutoff=DATES)


def test_equal_moments_are_told_alike():
    assert (
        str(cutoff_of("2014-07-01T00:00:00,2014-10-01T12:30:00+02:00"))
        == "2014-07-01,2014-10-01T10:30:00Z"
    )
    assert cutoff_of(str(cutoff_of("1969-12-31T23:59:59.5,2014-01-01"))) == Cutoff(
        -500_000, moment("2014-01-01", "")
    )


# Rules and audit.


def two_users() -> Sequences:
    """Items 0..5; u0 is asked in both periods, u1 in test alone, u2 nowhere."""
    items = [0, 1, 2, 3, 1, 4, 5, 3, 2, 0]
    periods = Periods(np.array([2, 2, 2]), np.array([3, 2, 2]))
    offsets = np.array([0, 5, 8, 10])
    return Sequences(
        np.array(items, np.int32), offsets, ["u0", "u1", "u2"], list("abcdef"), periods
    )


def test_rules_take_each_user_with_a_target_once():
    sequences = two_users()
    for split, users, targets in (("validation", [0], [2]), ("test", [0, 1], [3, 3])):
        view = sequences.history_and_target(split)
        assert (view.users.tolist(), view.targets[view.users].tolist()) == (users, targets)
        for name in ("popularity", "counting", "repeat", "knn"):
            codes = [str(n) for n in range(6)]
            assert len(
                baseline.recommend(name, sequences, codes, split, exclude_history=False).items_UN
            ) == len(users)
    assert training_counts(sequences, "n-2").tolist() == [2, 1, 1, 0, 1, 1]
    assert training_counts(sequences, "n-1").tolist() == [2, 1, 2, 0, 1, 1]


def test_the_audit_counts_those_who_are_asked():
    sequences = two_users()
    found = audit(sequences, list("012345"), np.array([1, 1, 12, 22, 23, 1, 2, 25, 3, 3]))
    assert found.users == 3
    assert found.repeated_targets == {"validation": 0.0, "test": 0.0}
    assert found.unseen_targets == {
        "validation": 0.0,
        "test": 1.0,
    }  # item d is in no training period
    assert (found.tied_users, found.tied_held_out) == (pytest.approx(2 / 3), 0.0)
    assert found.counting is not None
    assert found.counting["validation"]["HR@1"] == 1.0  # 0 1 -> 2
    assert found.counting["test"]["HR@1"] == 0.5  # 0 1 2 -> 3; 4 5 -> 3
