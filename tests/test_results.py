"""The files of results: what is in them, what is refused, and that equal lists give equal bytes."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.prepare import prepare
from rich.console import Console

from genrec_dist import baseline
from genrec_dist.metrics import bootstrap_ci95, metrics_from_histogram, rank_histogram
from genrec_dist.results import Protocol, format_table, run_baseline, sample_users, write_results

FIELDS = {
    *("system", "split", "users", "HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR@20"),
    *("invalid_rate", "duplicate_rate", "ci95", "protocol", "beside", "users_per_second", "seconds", "recipe"),
    *("git", "versions"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """50 users, 70 items named item-N, no repeats."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    histories = [rng.permutation(70)[: rng.integers(3, 9)] for _ in range(50)]
    lines = [" ".join([f"user-{user}", *(f"item-{item}" for item in past)]) for user, past in enumerate(histories)]
    (folder / "log.txt").write_text("\n".join(lines))
    return prepare(folder / "log.txt", folder / "prepared", numbering="random")


@pytest.fixture
def lists(dataset):
    return baseline.recommend(
        "popularity", dataset.sequences, dataset.numbering.item_codes, "test", exclude_history=True
    )


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


def test_metrics_file_holds_the_contract(tmp_path, dataset, lists):
    returned = write(tmp_path, dataset, lists)
    report = json.loads((tmp_path / "metrics-test.json").read_text())
    assert report == returned
    assert set(report) == FIELDS
    assert report["protocol"] == {
        **{"numbering": "random", "ties": "keep", "split": "leave-one-out", "trained_through": "n-2"},
        **{"exclude_history": True, "beam": 20, "decode": "exact", "users": "all"},
    }
    assert (report["system"], report["split"], report["users"]) == ("genrec", "test", 50)
    assert (report["users_per_second"], report["recipe"]) == (25.0, {"width": 64})
    assert {"python", "torch", "transformers", "genrec-dist"} <= set(report["versions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics-test.json", "top20-test.parquet"]


def test_metrics_can_be_computed_again_from_the_lists(tmp_path, dataset, lists):
    report = write(tmp_path, dataset, lists)
    rows = pq.read_table(tmp_path / "top20-test.parquet").to_pylist()
    assert [row["user"] for row in rows] == [f"user-{user}" for user in range(50)]
    assert rows[0].keys() == {"user", "target", "items", "scores"}
    ranks = [row["items"].index(row["target"]) + 1 if row["target"] in row["items"] else 0 for row in rows]
    hist = rank_histogram(np.array(ranks))
    assert hist[1:].sum() > 0
    for name, value in metrics_from_histogram(hist).items():
        assert report[name] == value
    assert report["ci95"] == bootstrap_ci95(hist)


def test_baselines_stand_beside_on_the_same_users(tmp_path, dataset):
    users = {"sample": 12, "seed": 3}
    rows = sample_users(50, **users)
    report = run_baseline("knn", dataset, "validation", tmp_path, users=users)
    codes = dataset.numbering.item_codes
    expected = baseline.beside(dataset.sequences, codes, "validation", exclude_history=True, users=rows)
    assert report["beside"] == expected
    assert report["users"] == 12
    assert report["protocol"]["users"] == users
    assert report["HR@20"] == report["beside"]["knn"]["HR@20"]


def test_lists_in_any_order_give_the_same_bytes(tmp_path, dataset, lists):
    write(tmp_path / "a", dataset, lists)
    order = np.random.default_rng(1).permutation(50)
    shuffled = {"user_rows": order, "lists_UN": lists.items_UN[order], "scores_UN": lists.scores_UN[order]}
    write(tmp_path / "b", dataset, lists, **shuffled)
    for name in ("top20-test.parquet", "metrics-test.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_row_groups_hold_the_same_rows(tmp_path, dataset, lists, monkeypatch):
    write(tmp_path / "one", dataset, lists)
    monkeypatch.setattr("genrec_dist.results.USERS_PER_ROW_GROUP", 7)
    write(tmp_path / "many", dataset, lists)
    one, many = (pq.read_table(tmp_path / name / "top20-test.parquet") for name in ("one", "many"))
    assert one.to_pylist() == many.to_pylist()


def test_short_lists_are_shorter_in_the_file_and_texts_without_item_are_null(tmp_path, dataset, lists):
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


def without(lists, user):
    return np.delete(np.arange(50), user), np.delete(lists.items_UN, user, 0), np.delete(lists.scores_UN, user, 0)


def test_each_user_must_stand_exactly_once(tmp_path, dataset, lists):
    rows, items_UN, scores_UN = without(lists, 4)
    few = {"user_rows": rows, "lists_UN": items_UN, "scores_UN": scores_UN}
    with pytest.raises(ValueError, match="user row 4 has no list"):
        write(tmp_path, dataset, lists, **few)
    twice = np.arange(50)
    twice[4] = 9
    with pytest.raises(ValueError, match="user row 9 comes twice"):
        write(tmp_path, dataset, lists, user_rows=twice)
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
        write(tmp_path, dataset, lists, split="validation", protocol=replace(kept, trained_through="n-1"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_malformed_lists_are_refused(tmp_path, dataset, lists):
    with pytest.raises(ValueError, match=r"\(50, 10\)"):
        write(tmp_path, dataset, lists, lists_UN=lists.items_UN[:, :10], scores_UN=lists.scores_UN[:, :10])
    gap_UN = lists.items_UN.copy()
    gap_UN[2, 5] = -1
    with pytest.raises(ValueError, match="empty place before a filled one"):
        write(tmp_path, dataset, lists, lists_UN=gap_UN)
    scores_UN = lists.scores_UN.copy()
    scores_UN[3, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path, dataset, lists, scores_UN=scores_UN)


def test_a_failure_leaves_neither_file(tmp_path, dataset, lists, monkeypatch):
    def torn(path, *rest):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("genrec_dist.results._write_lists", torn)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, dataset, lists)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "told"), [("popularity", True), ("knn", True), ("counting", True), ("repeat", None)])
def test_protocol_of_a_baseline_says_what_it_does(tmp_path, dataset, name, told):
    report = run_baseline(name, dataset, "test", tmp_path)
    assert report["system"] == name
    assert report["protocol"]["exclude_history"] is told
    assert (report["protocol"]["beam"], report["protocol"]["decode"], report["recipe"]) == (None, None, None)
    assert report["duplicate_rate"] == report["invalid_rate"] == 0.0
    kept = run_baseline(name, dataset, "test", tmp_path, exclude_history=False)["protocol"]["exclude_history"]
    assert kept is {"counting": True, "repeat": None}.get(name, False)
    if name != "repeat":
        assert report["HR@10"] == report["beside"][name]["HR@10"]


def test_sampled_users_are_a_function_of_the_seed():
    assert np.array_equal(sample_users(1000, 50, 1), sample_users(1000, 50, 1))
    assert not np.array_equal(sample_users(1000, 50, 1), sample_users(1000, 50, 2))
    assert len(set(sample_users(1000, 50, 1).tolist())) == 50
    assert sample_users(1000, 5, 0).tolist() == [236, 345, 416, 774, 952]  # elsewhere and in years to come
    assert np.array_equal(sample_users(10, 0, 1), np.arange(10))


def test_table_shows_each_system_once_in_the_fields_notation():
    knn = {"HR@5": 0.0566, "NDCG@5": 0.0421, "HR@10": 0.0789, "NDCG@10": 0.0493}
    ours = {"system": "genrec", "HR@5": 0.0601, "beside": {"counting": None, "knn": knn}}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(format_table([ours, {"system": "knn", **knn}]))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["genrec", ".0601", "–", "–", "–"],
        ["knn", ".0566", ".0421", ".0789", ".0493"],
    ]
