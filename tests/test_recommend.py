"""Own ids in, own ids out: single requests, files, unknown users and items, all users."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.prepare import Dataset, load_dataset, prepare
from hypothesis import given
from hypothesis import strategies as st

from genrec_dist import recommend as recommendation
from genrec_dist.evaluate import Decoding
from genrec_dist.recommend import Recommendation, Recommender, Request, read_requests, recommend_all, user_request
from genrec_dist.run import load_run, make_searcher


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    """In float64, so that the order of lists does not hang on rounding."""
    run = load_run(tiny_run)
    model = run.model.double()
    searcher = make_searcher(model, run.words, "cpu")  # type: ignore[arg-type]
    return Recommender(replace(run, model=model, searcher=searcher))


@pytest.fixture(scope="module")
def dataset(tiny_data: Path) -> Dataset:
    return load_dataset(tiny_data)


def history_of(dataset: Dataset, user: int) -> list[str]:
    first, last = dataset.sequences.offsets[user : user + 2]
    return [dataset.sequences.item_ids[row] for row in dataset.sequences.items[first:last]]


def test_a_history_gives_twenty_other_items_in_own_ids(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    (answer,) = recommender.recommend([history])
    assert len(set(answer.items)) == 20
    assert set(answer.items) <= set(dataset.sequences.item_ids) - set(history)
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert answer.user is None
    assert answer.unknown_items == []


def test_the_model_reads_the_history_and_its_order(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    answers = recommender.recommend([history, history[::-1], history_of(dataset, 4)])
    assert answers[0].scores != answers[1].scores
    assert answers[0].items != answers[2].items


def test_a_known_user_is_seen_and_an_unknown_one_is_as_none(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    known, unknown, nobody = recommender.recommend(
        [Request(history, "user-3"), Request(history, "a stranger"), Request(history)]
    )
    assert known.scores != nobody.scores
    assert (unknown.items, unknown.scores) == (nobody.items, nobody.scores)
    assert unknown.user == "a stranger"


def test_an_unknown_item_is_named_and_skipped(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    with_it, without = recommender.recommend([["nothing we sell", *history, "Ω"], history])
    assert with_it.unknown_items == ["nothing we sell", "Ω"]
    assert (with_it.items, with_it.scores) == (without.items, without.scores)


def test_an_empty_history_works(recommender: Recommender) -> None:
    nothing, only_unknown = recommender.recommend([[], ["nothing we sell"]])
    assert len(nothing.items) == 20
    assert nothing.items == only_unknown.items


def test_no_request_no_answer(recommender: Recommender) -> None:
    assert recommender.recommend([]) == []


def test_the_same_answer_alone_and_in_a_batch(
    recommender: Recommender, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [history_of(dataset, user) for user in (0, 5, 119, 17, 30)] + [[]]
    together = recommender.recommend(requests)
    monkeypatch.setattr(recommendation, "REQUESTS_AT_ONCE", 2)
    in_parts = recommender.recommend(requests)
    for number, request in enumerate(requests):
        (alone,) = recommender.recommend([request])
        assert alone.items == together[number].items == in_parts[number].items
        assert alone.scores == pytest.approx(together[number].scores, rel=1e-6)


def test_lists_are_as_long_as_asked_for_or_as_there_are_items(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    assert [len(recommender.recommend([history], k=k)[0].items) for k in (1, 5, 50)] == [
        1,
        5,
        min(50, 64 - len(history)),
    ]
    assert recommender.recommend([history_of(dataset, 119)])[0].items == []  # she has all items
    repeated = Recommender(recommender.run, exclude_history=False).recommend([history_of(dataset, 119)])
    assert len(repeated[0].items) == 20


def test_a_users_request_is_her_whole_sequence(recommender: Recommender, dataset: Dataset) -> None:
    assert user_request(dataset, recommender.run, "user-3") == Request(history_of(dataset, 3), "user-3")
    with pytest.raises(ValueError, match=r"user 'a stranger' is not in .*; give her items with --history"):
        user_request(dataset, recommender.run, "a stranger")


def test_a_user_of_other_data_is_refused(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    log = dataset.path.parent / "log.txt"
    other = prepare(log, tmp_path / "data", numbering="random", seed=1)
    with pytest.raises(ValueError, match="give --data the directory the run was trained on"):
        user_request(other, recommender.run, "user-3")
    with pytest.raises(ValueError, match="give --data the directory the run was trained on"):
        recommend_all(recommender.run, other, tmp_path / "out", Decoding())
    assert not (tmp_path / "out").exists()


@given(st.text(), st.lists(st.text()), st.lists(st.floats(-100, 0)))
def test_an_answer_is_one_line_of_json(user: str, ids: list[str], scores: list[float]) -> None:
    line = Recommendation(user, ids, scores, ids).as_json()
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["items"] == ids
    assert fields["user"] == user
    assert fields.get("unknown_items", []) == ids
    assert fields["scores"] == pytest.approx(scores, abs=1e-6)


def test_requests_are_read_from_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(
        '\ufeff{"history": ["a", 7]}\n\n{"history": [], "user": "u"}\r\n{"history": ["x\u2028y"], "user": 5}'.encode()
    )
    assert list(read_requests(file)) == [Request(["a", "7"]), Request([], "u"), Request(["x\u2028y"], "5")]


@pytest.mark.parametrize(
    "line", ["not json", "[1, 2]", '{"user": "u"}', '{"history": "a,b"}', '{"history": [["a"]]}', '{"history": [null]}',
             '{"history": [1.5]}', '{"history": [true]}', '{"history": [], "user": {}}', '{"history": ["a"]'],
)  # fmt: skip
def test_a_bad_request_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"history": ["a"]}\n\n' + line + "\n")
    with pytest.raises(ValueError) as refusal:
        list(read_requests(file))
    assert str(refusal.value).startswith(f"{file}:3: ")
    assert "write" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(ValueError, match=str(tmp_path)):
            list(read_requests(tmp_path / name))


def test_all_users_get_one_row_each(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    path = recommend_all(recommender.run, dataset, tmp_path, Decoding(top=10, batch_size=50))
    assert path == tmp_path / "top10.parquet"
    table = pq.read_table(path)
    assert table.column("user").to_pylist() == dataset.sequences.user_ids
    assert table.schema.field("items").type == pa.list_(pa.string())
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    lists = table.column("items").to_pylist()
    assert [len(row) for row in lists] == [10] * 119 + [0]
    assert list(map(len, table.column("scores").to_pylist())) == list(map(len, lists))
    # The same as asking for one user after her whole sequence.
    (answer,) = recommender.recommend([user_request(dataset, recommender.run, "user-17")], k=10)
    assert lists[17] == answer.items


def test_one_table_also_where_nobody_has_anything_left(
    recommender: Recommender, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of empty lists keep their types."""
    rank_users = recommendation.rank_users

    def empty(*arguments: object, **options: object) -> object:
        lists = rank_users(*arguments, **options)  # type: ignore[arg-type]
        lists.items[:] = -1
        return lists

    monkeypatch.setattr(recommendation, "rank_users", empty)
    path = recommend_all(recommender.run, dataset, tmp_path, Decoding())
    assert pq.read_table(path).schema.field("items").type == pa.list_(pa.string())
