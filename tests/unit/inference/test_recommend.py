"""Own ids in, own ids out: single requests and files, unknown users and items, chosen items, modes,
many threads."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from background import PATIENCE, spawn
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.decoding.searcher import Mode, TopItems
from genrec_dist.inference import recommend as recommend_module
from genrec_dist.inference.item_filter import ItemFilter, filter_items, name_some, read_ids
from genrec_dist.inference.recommend import (
    Recommendation,
    Recommender,
    Request,
    Shown,
    read_requests,
    user_request,
)


def history_of(dataset: Dataset, user: int) -> list[str]:
    first, last = dataset.sequences.offsets[user : user + 2]
    return [dataset.sequences.item_ids[row] for row in dataset.sequences.items[first:last]]


def test_recommend_gives_twenty_other_items_in_own_ids(
    recommender: Recommender, dataset: Dataset
) -> None:
    """For the history and its order."""
    history = history_of(dataset, 3)
    requests = [history, history[::-1], history_of(dataset, 4)]
    answer, backwards, other = recommender.recommend(requests)
    assert len(set(answer.items)) == 20
    assert set(answer.items) <= set(dataset.sequences.item_ids) - set(history)
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert (answer.user, answer.unknown_items) == (None, [])
    assert answer.scores != backwards.scores
    assert answer.items != other.items
    assert recommender.recommend([]) == []


def test_recommend_sees_a_known_user_and_an_unknown_one_is_as_none(
    recommender: Recommender, dataset: Dataset
) -> None:
    history = history_of(dataset, 3)
    known, unknown, nobody = recommender.recommend(
        [Request(history, "user-3"), Request(history, "a stranger"), Request(history)]
    )
    assert known.scores != nobody.scores
    assert (unknown.items, unknown.scores) == (nobody.items, nobody.scores)
    assert unknown.user == "a stranger"


def test_recommend_names_and_skips_unknown_items(
    recommender: Recommender, dataset: Dataset
) -> None:
    history = history_of(dataset, 3)
    with_it, without, empty, only_unknown = recommender.recommend(
        [["nothing we sell", *history, "Ω"], history, [], ["nothing we sell"]]
    )
    assert with_it.unknown_items == ["nothing we sell", "Ω"]
    assert (with_it.items, with_it.scores) == (without.items, without.scores)
    assert len(empty.items) == 20
    assert empty.items == only_unknown.items


def test_recommend_answers_the_same_alone_and_in_a_batch(
    recommender: Recommender, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [history_of(dataset, user) for user in (0, 5, 119, 17, 30)] + [[]]
    together = recommender.recommend(requests)
    monkeypatch.setattr(recommend_module, "REQUESTS_AT_ONCE", 2)
    in_parts = recommender.recommend(requests)
    for number, request in enumerate(requests):
        (alone,) = recommender.recommend([request])
        assert alone.items == together[number].items == in_parts[number].items
        assert alone.scores == pytest.approx(together[number].scores, rel=1e-6)


def test_lists_are_as_long_as_k_or_as_there_are_items(
    recommender: Recommender, dataset: Dataset
) -> None:
    history, everything = history_of(dataset, 3), history_of(dataset, 119)
    lengths = [len(recommender.recommend([history], k=k)[0].items) for k in (1, 5, 50)]
    assert lengths == [1, 5, min(50, 64 - len(history))]
    assert recommender.recommend([everything])[0].items == []
    repeating = Recommender(recommender.run, exclude_history=False)
    assert len(repeating.recommend([everything])[0].items) == 20


def test_user_request_is_the_whole_sequence_of_a_user_of_the_runs_data(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    expected = Request(history_of(dataset, 3), "user-3")
    assert user_request(dataset, recommender.run, "user-3") == expected
    with pytest.raises(
        ValueError, match=r"user 'a stranger' is not in .*; give their items with --history"
    ):
        user_request(dataset, recommender.run, "a stranger")
    log = dataset.path.parent / "log.txt"
    other = prepare(log, tmp_path / "data", numbering="random", seed=1)
    with pytest.raises(ValueError, match="give --data the directory the run was trained on"):
        user_request(other, recommender.run, "user-3")


texts = st.text("aZ0 ,\"'\\/\n\r\t\x00\x85\u2028\u2029éΩ😀")


@settings(max_examples=60, deadline=None)
@given(texts, st.lists(texts), st.lists(st.floats(-100, 0)))
def test_as_json_is_one_line(user: str, ids: list[str], scores: list[float]) -> None:
    line = Recommendation(user, ids, scores, ids).as_json()
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["items"] == ids
    assert fields["user"] == user
    assert fields.get("unknown_items", []) == ids
    assert fields["scores"] == pytest.approx(scores, abs=1e-6)


def test_read_requests_reads_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(
        '\ufeff{"history": ["a", 7], "block": ["b", 8]}\n\n{"history": [], "user": "u"}\r\n'
        '{"history": ["x\u2028y"], "user": 5}'.encode()
    )
    assert list(read_requests(file)) == [
        Request(["a", "7"], None, ["b", "8"]),
        Request([], "u", []),
        Request(["x\u2028y"], "5", []),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"user": "u"}',
        '{"history": "a,b"}',
        '{"history": [["a"]]}',
        '{"history": [null]}',
        '{"history": [1.5]}',
        '{"history": [true]}',
        '{"history": [], "block": "a"}',
        '{"history": [], "block": [null]}',
        '{"history": [], "user": {}}',
        '{"history": ["a"]',
    ],
)
def test_read_requests_names_a_bad_one_by_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"history": ["a"]}\n\n' + line + "\n")
    with pytest.raises(ValueError) as refusal:
        list(read_requests(file))
    assert str(refusal.value).startswith(f"{file}:3: ")
    assert "write" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("requests", "k", "words"),
    [
        ("abc", 20, "'abc' is not a list of requests"),
        (Request([]), 20, "is not a list of requests"),
        (["abc"], 20, "'abc' is not a list of ids: write ids as a list of strings"),
        ([7], 20, "7 is not a list of ids"),
        ([{"history": ["a"]}], 20, "{'history': ['a']} is not a history: write a list of item ids"),
        ([Request({"a": 1})], 20, "{'a': 1} is not a history"),  # type: ignore[arg-type]
        ([{"a", "b"}], 20, " is not a history: write a list of item ids, oldest first"),
        ([{f"item {n}": n for n in range(10**5)}], 20, "...} is not a history"),
        ({"a": ["b"]}, 20, "{'a': ['b']} is not a list of requests"),
        ([Request([], None, {"a": 1})], 20, "{'a': 1} is not a list of ids"),  # type: ignore[arg-type]
        ([[7]], 20, "7 is not an id: write ids as strings"),
        ([[None]], 20, "None is not an id"),
        ([Request([], 7)], 20, "7 is not a user's id"),  # type: ignore[arg-type]
        ([Request([], None, "abc")], 20, "'abc' is not a list of ids"),
        ([[]], 0, "k is 0: give a whole number of at least 1"),
        ([[]], 2.5, "k is 2.5"),
        ([[]], True, "k is True"),
    ],
)
def test_recommend_names_what_is_no_request(
    recommender: Recommender, requests: Any, k: Any, words: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        recommender.recommend(requests, k)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_recommender_refuses_an_unknown_mode_and_no_beam(recommender: Recommender) -> None:
    with pytest.raises(
        ValueError, match="decode mode 'fast': choose one of exact, compact, free, all"
    ):
        Recommender(recommender.run, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beam 0: give"):
        Recommender(recommender.run, beam=0)


# Which items may be listed


@pytest.mark.parametrize("mode", ["exact", "compact", "all"])
def test_recommender_lists_what_is_allowed_and_not_blocked(
    recommender: Recommender, dataset: Dataset, mode: Mode
) -> None:
    """The rest of the whole list, in its order and with its scores."""
    ids, histories = (
        dataset.sequences.item_ids,
        [history_of(dataset, 3), [], history_of(dataset, 17)],
    )
    whole = Recommender(recommender.run, mode=mode).recommend(histories, k=64)
    allow, block = ids[5:40], ids[30:64:2]
    for options in ({"allow": allow}, {"block": block}, {"allow": allow, "block": block}):
        may = set(options.get("allow", ids)) - set(options.get("block", ()))
        answers = Recommender(recommender.run, mode=mode, **options).recommend(histories, k=64)  # type: ignore[arg-type]
        for answer, every in zip(answers, whole, strict=True):
            kept = [place for place, item in enumerate(every.items) if item in may]
            assert 10 < len(kept) < 64
            assert answer.items == [every.items[place] for place in kept]
            assert answer.scores == pytest.approx([every.scores[place] for place in kept], rel=1e-6)
    short = Recommender(recommender.run, mode=mode, allow=allow).recommend(histories, k=7)
    assert [len(answer.items) for answer in short] == [7, 7, 7]


def test_a_request_blocks_for_itself_alone(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    (every,) = recommender.recommend([history], k=50)
    block = [*every.items[:5], "nothing we sell"]
    answers = recommender.recommend(
        [Request(history), Request(history, block=block), Request(history)]
    )
    assert answers[0].items == answers[2].items == every.items[:20]
    assert answers[1].items == every.items[5:25]
    also_history = Recommender(recommender.run, exclude_history=False).recommend(
        [Request(history, block=history)], 50
    )
    assert also_history[0].items == every.items


def test_filter_items_names_ids_that_the_catalogue_lacks(
    recommender: Recommender, dataset: Dataset
) -> None:
    ids = dataset.sequences.item_ids
    chosen = Recommender(
        recommender.run, allow=["x", *ids[:9], "y", ids[0]], block=["z", ids[4]]
    ).item_filter
    assert chosen.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert (chosen.unknown_allow, chosen.unknown_block) == (["x", "y"], ["z"])
    assert name_some(list("abc")) == "a, b, c"
    assert name_some(list("abcde")) == "a, b, c and 2 more"


@pytest.mark.parametrize("which", ["unknown", "none", "both", "all"])
def test_filter_items_refuses_to_leave_no_item(recommender: Recommender, which: str) -> None:
    catalogue = recommender.run.catalogue
    allow, block = {
        "unknown": (["x", "y", "x2", "x3"], None),
        "none": ([], None),
        "both": (catalogue.item_ids[:3], catalogue.item_ids[:4]),
        "all": (None, catalogue.item_ids),
    }[which]
    with pytest.raises(
        ValueError, match=r"no item is left to list: .*; allow more or block fewer"
    ) as refusal:
        filter_items(catalogue, allow, block)
    assert "\n" not in str(refusal.value)
    assert ("x, y, x2 and 1 more" in str(refusal.value)) == (which == "unknown")
    with pytest.raises(ValueError, match="'abc' is not a list of ids"):
        filter_items(catalogue, allow="abc")


def test_data_that_are_not_here_are_named_with_the_way_out(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    recipe = load_recipe(run / "recipe.yaml", ["data=elsewhere/mine", "decode=hybrid"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    for words in (["evaluate", str(run)], ["recommend", str(run), "--history", "a"]):
        assert run_command(words) == 1
        line = f"{run}: its data directory elsewhere/mine is not here: give --data DIR, or, to list"
        assert line in capfd.readouterr().err


def test_read_ids_reads_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes("\ufeffa\r\n\n  b c \n7\n\n".encode())
    assert read_ids(tmp_path / "ids") == ["a", "b c", "7"]
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(ValueError, match=str(tmp_path)):
            list(read_requests(tmp_path / name))
    for name in ("empty", "binary", "absent", "."):
        with pytest.raises(ValueError, match=str(tmp_path)):
            read_ids(tmp_path / name)


def test_recommend_command_takes_files_of_items_and_a_mode(
    tiny_run: Path, recommender: Recommender, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ids = recommender.run.catalogue.item_ids
    allow, block = tmp_path / "allow", tmp_path / "block"
    allow.write_text("\n".join([*ids[:9], "x", "", "y", "z", "w"]))
    block.write_text(ids[4])
    chosen = ["--allow", str(allow), "--block", str(block)]

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        assert run_command(["recommend", str(tiny_run), *words]) == code
        return tuple(capfd.readouterr())

    out, err = run("--history", "", *chosen, "--decode", "all", "--beam", "3")
    assert set(json.loads(out)["items"]) == {*ids[:4], *ids[5:9]}
    assert err == f"{allow}: 4 ids are not in the catalogue, skipped: x, y, z and 1 more\n"
    out, _ = run("--all-users", "--out", str(tmp_path), *chosen, "--top", "4")
    assert out == f"{tmp_path / 'top4.parquet'}: 120 users, 8 items to choose from\n"
    out, _ = run("--history", "", "--decode", "free", "--top", "30")
    answer = json.loads(out)
    assert len(answer["items"]) + answer["invalid"] + answer["duplicates"] == 30
    block.write_text("\n".join(ids))
    _, err = run("--history", "", *chosen, code=1)
    assert "genrec: no item is left to list: 9 known ids allowed" in err


# Modes


def test_all_finds_what_a_wide_beam_finds(recommender: Recommender, dataset: Dataset) -> None:
    history = history_of(dataset, 3)
    (wide,) = Recommender(recommender.run, beam=200).recommend([history])
    (every,) = Recommender(recommender.run, mode="all").recommend([history])
    assert wide.items == every.items
    assert wide.scores == pytest.approx(every.scores, rel=1e-6)
    assert wide.invalid is wide.duplicates is None
    assert "invalid" not in wide.as_json()


def test_free_leaves_out_what_is_no_item_and_counts_it(
    recommender: Recommender, dataset: Dataset
) -> None:
    history = history_of(dataset, 3)
    freely = Recommender(recommender.run, mode="free", exclude_history=False)
    answers = freely.recommend([history, []], k=30)
    for answer in answers:
        assert answer.invalid is not None
        assert answer.duplicates is not None
        assert (
            len(set(answer.items)) == len(answer.items) == 30 - answer.invalid - answer.duplicates
        )
        assert json.loads(answer.as_json())["invalid"] == answer.invalid
    assert sum(answer.invalid or 0 for answer in answers) > 0
    seen = [item for answer in answers for item in answer.items]
    assert seen
    # Neither a blocked item nor one of the history, and no other in its place.
    blocking = Recommender(recommender.run, mode="free", exclude_history=True, block=seen[:1])
    for answer, before in zip(blocking.recommend([history, []], k=30), answers, strict=True):
        assert answer.items == [
            item
            for item in before.items
            if item != seen[0] and (before is answers[1] or item not in history)
        ]


def test_shown_leaves_out_invalid_double_and_forbidden_items() -> None:
    items = np.array([[3, -2, 3, 0, -2], [1, 2, 1, 1, -1], [-1, -1, -1, -1, -1]], np.int32)
    item_filter = ItemFilter(np.array([False, True, True, True]), [], [])
    shown = Shown.of(TopItems(items, np.zeros(items.shape, np.float32)), item_filter, "free")
    assert shown.keep_BN.tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [False] * 5,
    ]
    assert shown.invalid_B is not None
    assert shown.duplicates_B is not None
    assert (shown.invalid_B.tolist(), shown.duplicates_B.tolist()) == ([2, 0, 0], [1, 2, 0])


# Many threads


class Watched:
    """A recommender whose decoding is counted and can be held."""

    def __init__(self, run: Any, monkeypatch: pytest.MonkeyPatch, **options: Any):
        self.recommender = Recommender(run, **options)
        self.sizes: list[int] = []
        self.begun, self.held = threading.Event(), threading.Event()
        self.held.set()
        search = self.recommender.searcher.search

        def watched(encoder: Any, **options: Any) -> TopItems:
            self.sizes.append(len(encoder.input_ids))
            self.begun.set()
            assert self.held.wait(PATIENCE)
            return search(encoder, **options)

        monkeypatch.setattr(self.recommender.searcher, "search", watched)

    def with_all_waiting(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """Results or errors: the first call is decoded, and held, until all the others wait."""
        self.held.clear()
        futures = [spawn(calls[0])]
        assert self.begun.wait(PATIENCE)
        gate = threading.Barrier(len(calls) - 1)

        def with_the_others(call: Callable[[], Any]) -> Any:
            gate.wait(PATIENCE)
            return call()

        futures += [spawn(with_the_others, call) for call in calls[1:]]
        while (
            len(self.recommender._batcher._waiting) + sum(future.done() for future in futures)
            < len(calls) - 1
        ):
            time.sleep(0.001)
        self.held.set()
        return [future.exception(PATIENCE) or future.result() for future in futures]


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Callers that each bring their own pool of torch's threads would wait for one another most of
    the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_torch_thread")
def test_answers_of_many_threads_are_those_given_alone(
    recommender: Recommender, dataset: Dataset
) -> None:
    """8 threads, 160 calls of several lengths and sizes, some of them wrong."""
    histories = [history_of(dataset, user) for user in range(60)] + [[]]
    alone = [recommender.recommend([history], 50)[0] for history in histories]
    narrow = [recommender.recommend([history], 20)[0] for history in histories]

    def one_thread(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(20):
            if dice.random() < 0.1:
                with pytest.raises(ValueError, match="is not an id"):
                    recommender.recommend([[f"{seed}", 7]])  # type: ignore[list-item]
            k, places = (
                dice.choice([1, 5, 20, 50]),
                dice.choices(range(len(histories)), k=dice.choice([1, 1, 1, 3])),
            )
            answers = recommender.recommend([histories[place] for place in places], k)
            for place, answer in zip(places, answers, strict=True):
                expected = (alone if k == 50 else narrow)[place]
                assert answer.items == expected.items[:k]
                assert answer.scores == pytest.approx(expected.scores[:k], rel=1e-6)

    for future in [spawn(one_thread, seed) for seed in range(8)]:
        future.result(PATIENCE)


@pytest.mark.parametrize(
    ("mode", "lengths", "batches"),
    [
        ("exact", [20, 20, 5, 30, 1, 20, 30, 7], [2, 5]),
        ("all", [20, 5, 20, 30, 5], [4]),
        ("free", [20, 5, 20, 30, 5], [1, 1, 2]),
    ],
)
def test_calls_that_wait_share_a_batch_if_they_take_one_beam(
    recommender: Recommender,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
    lengths: list[int],
    batches: list[int],
) -> None:
    """`all` has no beam; in `free` a longer list does not begin with a shorter one."""
    calls = [(history_of(dataset, user), k) for user, k in enumerate(lengths)]
    alone = Recommender(recommender.run, mode=mode)
    expected = [alone.recommend([history], k)[0].items for history, k in calls]
    watched = Watched(recommender.run, monkeypatch, mode=mode)
    ask = watched.recommender.recommend
    found = watched.with_all_waiting(
        [lambda h=history, k=k: ask([h], k)[0].items for history, k in calls]  # type: ignore[misc]
    )
    assert found == expected
    assert watched.sizes[0] == 1
    assert sorted(watched.sizes[1:]) == batches


def test_an_error_in_a_request_reaches_its_own_caller_alone(
    recommender: Recommender, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = history_of(dataset, 3)
    watched = Watched(recommender.run, monkeypatch)
    ask = watched.recommender.recommend
    good, bad = lambda: ask([history])[0].items, lambda: ask([history, [7]])  # type: ignore[list-item]
    first, *shared, refused = watched.with_all_waiting([good, good, good, bad])
    assert first == shared[0] == shared[1] == recommender.recommend([history])[0].items
    assert isinstance(refused, ValueError)
    assert watched.sizes == [1, 2, 1]  # the last one is this test's own question
