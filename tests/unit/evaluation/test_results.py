"""The files of results: what is in them, what is refused, and that equal lists give equal bytes."""

import json
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.histories import sample_users
from genrec_shards.numbering.numbering import Hierarchy, number
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences
from genrec_shards.storage.write import write_shards
from result_files import write_results

from genrec_dist.baselines import registry as baseline
from genrec_dist.baselines.run import run_baseline
from genrec_dist.data.item_graph import KnnSettings
from genrec_dist.evaluation.metrics import (
    bootstrap_ci95,
    metrics_from_histogram,
    rank_histogram,
    target_ranks,
)
from genrec_dist.evaluation.protocol import Protocol
from genrec_dist.evaluation.results import ResultsWriter

FIELDS = {
    *(
        "system",
        "split",
        "users",
        "HR@1",
        "HR@5",
        "HR@10",
        "HR@20",
        "NDCG@5",
        "NDCG@10",
        "NDCG@20",
        "MRR@20",
    ),
    *("coverage@10", "coverage@20", "popularity@10", "gini@10", "breakdown", "top"),
    *(
        "invalid_rate",
        "duplicate_rate",
        "ci95",
        "protocol",
        "tied_targets",
        "beside",
        "users_per_second",
        "seconds",
        "recipe",
    ),
    *("git", "versions"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """50 users, 70 items named item-N, no repeats."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    histories = [rng.permutation(70)[: rng.integers(3, 9)] for _ in range(50)]
    lines = [
        " ".join([f"user-{user}", *(f"item-{item}" for item in past)])
        for user, past in enumerate(histories)
    ]
    (folder / "log.txt").write_text("\n".join(lines))
    return prepare(folder / "log.txt", folder / "prepared", numbering="random")


@pytest.fixture
def lists(dataset):
    codes = dataset.numbering.item_codes
    rule = baseline.fit("popularity", dataset.sequences, codes, "test", exclude_history=True)
    return rule(np.arange(50))


def write(out, dataset, lists, **changes):
    arguments = {
        "system": "genrec",
        "split": "test",
        "dataset": dataset,
        "user_rows": np.arange(50),
        "lists_UN": lists.items_UN,
        "scores_UN": lists.scores_UN,
        "protocol": Protocol.of(dataset, exclude_history=True, beam=20, decode="exact"),
        "seconds": 2.0,
        "recipe": {"width": 64},
    }
    return write_results(out, **{**arguments, **changes})


def test_metrics_file_says_how_many_targets_of_its_split_share_their_time(tmp_path, dataset, lists):
    sequences = dataset.sequences
    times = np.arange(sequences.num_interactions)
    last = sequences.offsets[1:] - 1
    times[last[:5]] = times[last[:5] - 1]  # five users' test and validation items
    times[last[5:8] - 1] = times[last[5:8] - 2]  # three others' validation items
    timed = replace(dataset, timestamps=times)
    shares = {}
    for split in ("test", "validation"):
        codes = dataset.numbering.item_codes
        rule = baseline.fit("popularity", sequences, codes, split, exclude_history=True)
        found = rule(np.arange(50))
        changes = {"split": split, "lists_UN": found.items_UN, "scores_UN": found.scores_UN}
        shares[split] = write(tmp_path / split, timed, lists, **changes)["tied_targets"]
    assert shares == {"test": 0.1, "validation": 0.16}


def test_metrics_file_holds_the_contract(tmp_path, dataset, lists):
    returned = write(tmp_path, dataset, lists)
    report = json.loads((tmp_path / "metrics-test.json").read_text())
    assert report == returned
    assert set(report) == FIELDS
    assert report["protocol"] == {
        **{
            "numbering": "random",
            "ties": "keep",
            "split": "leave-one-out",
            "trained_through": "n-2",
        },
        **{
            "exclude_history": True,
            "beam": 20,
            "decode": "exact",
            "users": "all",
            "item_weight": None,
            "graph": None,
        },
    }
    assert (report["system"], report["split"], report["users"]) == ("genrec", "test", 50)
    assert report["tied_targets"] is None  # the log has no times
    assert (report["users_per_second"], report["recipe"]) == (25.0, {"width": 64})
    assert {"python", "torch", "transformers", "genrec-dist"} <= set(report["versions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics-test.json",
        "top20-test.parquet",
    ]


def test_metrics_can_be_computed_again_from_the_lists(tmp_path, dataset, lists):
    report = write(tmp_path, dataset, lists)
    rows = pq.read_table(tmp_path / "top20-test.parquet").to_pylist()
    assert [row["user"] for row in rows] == [f"user-{user}" for user in range(50)]
    assert rows[0].keys() == {"user", "target", "items", "scores", "rank"}
    ranks = [
        row["items"].index(row["target"]) + 1 if row["target"] in row["items"] else 0
        for row in rows
    ]
    assert [row["rank"] for row in rows] == ranks
    hist = rank_histogram(np.array(ranks))
    assert hist[1:].sum() > 0
    for name, value in metrics_from_histogram(hist).items():
        assert report[name] == value
    assert report["ci95"] == bootstrap_ci95(hist)


def test_baselines_stand_beside_on_the_same_users(tmp_path, dataset):
    users = {"sample": 12, "seed": 3}
    rows = sample_users(50, **users)
    report = run_baseline("knn", dataset, "validation", tmp_path, users=users)
    protocol = Protocol.of(dataset, exclude_history=True, users=users)
    expected = baseline.reference_scores(dataset, "validation", protocol, rows)
    assert report["beside"] == expected
    assert report["users"] == 12
    assert report["protocol"]["users"] == users
    assert report["HR@20"] == report["beside"]["knn"]["HR@20"]


def test_lists_in_any_order_give_the_same_bytes(tmp_path, dataset, lists):
    write(tmp_path / "a", dataset, lists)
    order = np.random.default_rng(1).permutation(50)
    shuffled = {
        "user_rows": order,
        "lists_UN": lists.items_UN[order],
        "scores_UN": lists.scores_UN[order],
    }
    write(tmp_path / "b", dataset, lists, **shuffled)
    for name in ("top20-test.parquet", "metrics-test.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_row_groups_hold_the_same_rows(tmp_path, dataset, lists, monkeypatch):
    write(tmp_path / "one", dataset, lists)
    monkeypatch.setattr("genrec_dist.evaluation.results.USERS_PER_ROW_GROUP", 7)
    write(tmp_path / "many", dataset, lists)
    one, many = (pq.read_table(tmp_path / name / "top20-test.parquet") for name in ("one", "many"))
    assert one.to_pylist() == many.to_pylist()


def test_short_lists_are_shorter_in_the_file_and_texts_without_item_are_null(
    tmp_path, dataset, lists
):
    items_UN = lists.items_UN.copy()
    items_UN[0, 3:] = -1
    items_UN[1, 0] = -2
    report = write(tmp_path, dataset, lists, lists_UN=items_UN)
    rows = pq.read_table(tmp_path / "top20-test.parquet").to_pylist()
    ids = dataset.sequences.item_ids
    assert rows[0]["items"] == [ids[row] for row in items_UN[0, :3]]
    assert len(rows[0]["scores"]) == 3
    assert rows[1]["items"] == [None, *(ids[row] for row in items_UN[1, 1:])]
    assert report["invalid_rate"] == 1 / (50 * 20 - 17)


def cut_into(dataset, lists, out, edges):
    """The files of these lists, added in parts that end at the edges."""
    protocol = Protocol.of(dataset, exclude_history=True)
    options = {
        "system": "x",
        "split": "test",
        "dataset": dataset,
        "protocol": protocol,
        "recipe": None,
    }
    with ResultsWriter(out, **options, top=lists.items_UN.shape[1]) as writer:
        for first, last in zip([0, *edges], [*edges, len(lists.items_UN)], strict=True):
            rows = np.arange(first, last)
            writer.add(rows, lists.items_UN[first:last], lists.scores_UN[first:last])
        writer.finish(2.0, {})
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_bytes_do_not_depend_on_how_the_lists_were_cut(tmp_path, dataset, lists, monkeypatch):
    monkeypatch.setattr("genrec_dist.evaluation.results.USERS_PER_ROW_GROUP", 16)
    whole = cut_into(dataset, lists, tmp_path / "whole", [])
    for place, edges in enumerate(
        ([16, 32, 48], [1, 2, 3, 30], [0, 0, 17, 17, 49], list(range(1, 50)))
    ):
        assert cut_into(dataset, lists, tmp_path / str(place), edges) == whole
    file = pq.ParquetFile(tmp_path / "whole" / "top20-test.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [
        16,
        16,
        16,
        2,
    ]


def test_lists_longer_than_twenty_are_kept_whole_and_scored_at_twenty(tmp_path, dataset):
    targets = dataset.sequences.history_and_target("test").targets
    rule = baseline.popularity.fit(dataset.sequences, "test", exclude_history=True, top=30)
    longer = rule(np.arange(dataset.sequences.num_users))
    assert cut_into(dataset, longer, tmp_path, []).keys() == {
        "top30-test.parquet",
        "metrics-test.json",
    }
    rows = pq.read_table(tmp_path / "top30-test.parquet").to_pylist()
    ranks = target_ranks(longer.items_UN, targets)
    assert [len(row["items"]) for row in rows] == [30] * 50
    assert [row["rank"] for row in rows] == ranks.tolist()
    assert ((ranks > 20) & (ranks <= 30)).any()
    report = json.loads((tmp_path / "metrics-test.json").read_text())
    assert report["top"] == 30
    assert report["HR@20"] == ((ranks > 0) & (ranks <= 20)).mean()
    assert (
        report["coverage@20"]
        == len(np.unique(longer.items_UN[:, :20])) / dataset.sequences.num_items
    )


def test_leaving_without_finish_leaves_nothing_behind(tmp_path, dataset, lists):
    protocol = Protocol.of(dataset, exclude_history=True)
    options = {
        "system": "x",
        "split": "test",
        "dataset": dataset,
        "protocol": protocol,
        "recipe": None,
    }
    with ResultsWriter(tmp_path, **options) as writer:
        writer.add(np.arange(50), lists.items_UN, lists.scores_UN)
    assert not list(tmp_path.iterdir())
    with ResultsWriter(tmp_path, **options) as writer:
        writer.add(np.arange(30), lists.items_UN[:30], lists.scores_UN[:30])
        with pytest.raises(ValueError, match="user row 30 has no list"):
            writer.finish(1.0, {})
    assert not list(tmp_path.iterdir())


def test_users_are_checked_as_they_come(tmp_path, dataset, lists):
    def add(rows, users=None):
        protocol = Protocol.of(dataset, exclude_history=True, users=users or "all")
        options = {
            "system": "x",
            "split": "test",
            "dataset": dataset,
            "protocol": protocol,
            "recipe": None,
        }
        with ResultsWriter(tmp_path, **options) as writer:
            for part in rows:
                writer.add(np.array(part), lists.items_UN[part], lists.scores_UN[part])

    sampled = sample_users(50, 10, 0).tolist()
    assert sampled[0] > 0
    for message, rows, users in (
        ("user row 2 has no list", [[0, 1], [3, 4]], None),
        ("user row 1 comes twice", [[0, 1], [1, 2]], None),
        ("user row 1 comes twice", [[0, 1, 1]], None),
        ("user row 0 comes after row 2", [[0, 1, 2], [0]], None),
        ("user row 0 was not asked for", [[0]], {"sample": 10, "seed": 0}),
        (
            f"user row {sampled[1]} has no list",
            [sampled[:1], sampled[2:]],
            {"sample": 10, "seed": 0},
        ),
        ("user row 49 comes twice", [list(range(50)), [49]], None),
    ):
        with pytest.raises(ValueError, match=message):
            add(rows, users)
    protocol = Protocol.of(dataset, exclude_history=False)
    zeros = np.zeros((51, 20), np.int32)
    options = {
        "system": "x",
        "split": "test",
        "dataset": dataset,
        "protocol": protocol,
        "recipe": None,
    }
    with (
        ResultsWriter(tmp_path, **options) as writer,
        pytest.raises(ValueError, match="row 50 was not asked for"),
    ):
        writer.add(np.arange(51), zeros, zeros.astype(np.float32))
    assert not list(tmp_path.iterdir())


def test_shards_made_from_other_sequences_are_refused(tmp_path, dataset, lists):
    log = (dataset.path.parent / "log.txt").read_text()
    (tmp_path / "log.txt").write_text(log)
    here = prepare(tmp_path / "log.txt", tmp_path / "data", numbering="random")
    write_shards(here, here.path / "shards")
    write(tmp_path / "out", here, lists)
    manifest = here.path / "shards" / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good.replace(here.info.sequences_hash, "0" * 64))
    with pytest.raises(
        DataError, match=r"shards/manifest\.json: made from other sequences \(50 users\)"
    ):
        write(tmp_path / "again", here, lists)
    (tmp_path / "few.txt").write_text("\n".join(log.split("\n")[:20]))
    few = prepare(tmp_path / "few.txt", tmp_path / "few", numbering="random")
    (here.path / "shards").rename(few.path / "shards")
    (few.path / "shards" / "manifest.json").write_text(good)
    with pytest.raises(
        DataError, match=r"\(50 users\) than .*few holds \(20 users\): run `genrec shard` again"
    ):
        run_baseline("popularity", few, "test", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def synthetic_users(folder, num_users, num_items=50):
    rng = np.random.default_rng(0)
    offsets = np.arange(num_users + 1, dtype=np.int64) * 5
    items = rng.integers(0, num_items, 5 * num_users).astype(np.int32)
    names = [str(user) for user in range(num_users)], [str(item) for item in range(num_items)]
    sequences = Sequences(items, offsets, *names)
    (folder / "log.txt").write_text("u 1 2 3")
    info = prepare(folder / "log.txt", folder / f"data{num_users}", overwrite=True).info
    return Dataset(folder / f"data{num_users}", sequences, number(sequences, "random", 0), info)


def test_memory_does_not_grow_with_the_users(tmp_path, monkeypatch):
    """Windows of 256 users, 1,000 and 8,000 of them, baselines beside: the peak above the data set
    is one window's."""
    monkeypatch.setattr("genrec_dist.evaluation.results.USERS_PER_ROW_GROUP", 256)
    monkeypatch.setattr("genrec_shards.histories.WINDOW", 256)
    lists_UN = np.tile(np.arange(20, dtype=np.int32), (256, 1))
    scores_UN = np.tile(np.arange(20, 0, -1, dtype=np.float32), (256, 1))
    peaks = []
    for num_users in (1_000, 1_000, 8_000):  # the first one warms up
        dataset = synthetic_users(tmp_path, num_users)
        options = {"system": "x", "split": "test", "recipe": None, "dataset": dataset}
        tracemalloc.start()
        with ResultsWriter(
            tmp_path, **options, protocol=Protocol.of(dataset, exclude_history=False)
        ) as writer:
            for first in range(0, num_users, 256):
                rows = np.arange(first, min(num_users, first + 256))
                writer.add(rows, lists_UN[: len(rows)], scores_UN[: len(rows)])
            writer.finish(1.0, {})
        # What a row of a row group says of itself in the footer is a few hundred bytes; lists would
        # be 160 a user.
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes())
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1], peaks


def without(lists, user):
    return (
        np.delete(np.arange(50), user),
        np.delete(lists.items_UN, user, 0),
        np.delete(lists.scores_UN, user, 0),
    )


def test_each_user_must_stand_exactly_once(tmp_path, dataset, lists):
    rows, items_UN, scores_UN = without(lists, 4)
    few = {"user_rows": rows, "lists_UN": items_UN, "scores_UN": scores_UN}
    with pytest.raises(ValueError, match="user row 4 has no list"):
        write(tmp_path, dataset, lists, **few)
    twice = np.arange(50)
    twice[4] = 9
    with pytest.raises(ValueError, match="user row 4 has no list"):
        write(tmp_path, dataset, lists, user_rows=twice)
    twice = np.array([*range(50), 9])
    more = {"lists_UN": lists.items_UN[twice], "scores_UN": lists.scores_UN[twice]}
    with pytest.raises(ValueError, match="user row 9 comes twice"):
        write(tmp_path, dataset, lists, user_rows=twice, **more)
    sampled = Protocol.of(dataset, exclude_history=True, users={"sample": 10, "seed": 0})
    with pytest.raises(ValueError, match="was not asked for"):
        write(tmp_path, dataset, lists, protocol=sampled)
    assert not list(tmp_path.iterdir())


def test_lists_that_contradict_the_protocol_are_refused(tmp_path, dataset, lists):
    sequences = dataset.sequences
    items_UN = lists.items_UN.copy()
    items_UN[6, 19] = sequences.items[sequences.offsets[6]]
    with pytest.raises(ValueError, match=r"'user-6' has item .* of her history listed"):
        write(tmp_path, dataset, lists, lists_UN=items_UN)
    kept = Protocol.of(dataset, exclude_history=False)
    write(tmp_path / "kept", dataset, lists, lists_UN=items_UN, protocol=kept)
    with pytest.raises(ValueError, match="n-1 has seen the validation targets"):
        write(
            tmp_path,
            dataset,
            lists,
            split="validation",
            protocol=replace(kept, trained_through="n-1"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_malformed_lists_are_refused(tmp_path, dataset, lists):
    with pytest.raises(ValueError, match=r"scores \(50, 10\), expected \(50, 20\)"):
        write(tmp_path, dataset, lists, scores_UN=lists.scores_UN[:, :10])
    with pytest.raises(ValueError, match="lists of 10 items: metrics need 20"):
        write(
            tmp_path,
            dataset,
            lists,
            lists_UN=lists.items_UN[:, :10],
            scores_UN=lists.scores_UN[:, :10],
        )
    gap_UN = lists.items_UN.copy()
    gap_UN[2, 5] = -1
    with pytest.raises(ValueError, match="empty place before a filled one"):
        write(tmp_path, dataset, lists, lists_UN=gap_UN)
    scores_UN = lists.scores_UN.copy()
    scores_UN[3, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path, dataset, lists, scores_UN=scores_UN)


def test_a_failure_leaves_neither_file(tmp_path, dataset, lists, monkeypatch):
    def torn(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("genrec_dist.evaluation.results.pq.ParquetWriter.write_table", torn)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, dataset, lists)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "told"), [("popularity", True), ("knn", True), ("counting", True), ("repeat", None)]
)
def test_protocol_of_a_baseline_says_what_it_does(tmp_path, dataset, name, told):
    report = run_baseline(name, dataset, "test", tmp_path)
    assert report["system"] == name
    assert report["protocol"]["exclude_history"] is told
    assert (report["protocol"]["beam"], report["protocol"]["decode"]) == (None, None)
    assert report["recipe"] == (asdict(KnnSettings()) if name == "knn" else None)
    assert report["duplicate_rate"] == report["invalid_rate"] == 0.0
    kept = run_baseline(name, dataset, "test", tmp_path, exclude_history=False)["protocol"][
        "exclude_history"
    ]
    assert kept is {"counting": True, "repeat": None}.get(name, False)
    if name != "repeat":
        assert report["HR@10"] == report["beside"][name]["HR@10"]


def test_sampled_users_are_a_function_of_the_seed():
    assert np.array_equal(sample_users(1000, 50, 1), sample_users(1000, 50, 1))
    assert not np.array_equal(sample_users(1000, 50, 1), sample_users(1000, 50, 2))
    assert len(set(sample_users(1000, 50, 1).tolist())) == 50
    assert sample_users(1000, 5, 0).tolist() == [
        236,
        345,
        416,
        774,
        952,
    ]  # elsewhere and in years to come
    assert np.array_equal(sample_users(10, 0, 1), np.arange(10))


def test_codes_that_saw_validation_are_refused_there_and_not_on_test(tmp_path, dataset):
    seen = Hierarchy(
        "vectors",
        (4, 4),
        dims=8,
        window=None,
        file="v",
        file_sha256="0",
        trained_through="n-1",
        unseen=0,
        placed_at_random=0,
    )
    info = replace(dataset.info, numbering="collaborative", hierarchy=seen)
    codes = replace(dataset, info=info)
    with pytest.raises(ValueError, match="n-1"):
        run_baseline("popularity", codes, "validation", tmp_path)
    assert not list(tmp_path.iterdir())
    told = run_baseline("popularity", codes, "test", tmp_path)["protocol"]["numbering"]
    assert told == "collaborative: vectors through n-1"
