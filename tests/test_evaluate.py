"""Each user once, the same lists for any batch size and any number of ranks, and no file where a rank fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from genrec_shards.prepare import load_dataset, prepare
from two_ranks import environment, run_ranks

from genrec_dist import evaluate as evaluation
from genrec_dist.beam import TopItems
from genrec_dist.evaluate import Decoding, _assemble, check_numbering, evaluate, rank_users
from genrec_dist.run import LoadedRun, load_run, make_searcher

OUTPUTS = ("metrics-test.json", "top20-test.parquet")
FAILING_RANK = """
import os
import genrec_dist.evaluate as evaluation
from genrec_dist.cli import main

decode = evaluation._rank_chunk

def fail(*arguments):
    if os.environ["RANK"] == "1":
        raise ValueError("user row 7 is outside the table of 5 users: prepare and shard again")
    return decode(*arguments)

evaluation._rank_chunk = fail
main()
"""


@pytest.fixture(scope="module")
def loaded(tiny_run: Path) -> LoadedRun:
    """In float64, so that the order of lists does not hang on rounding."""
    run = load_run(tiny_run)
    model = run.model.double()
    return replace(run, model=model, searcher=make_searcher(model, run.words, "cpu"))  # type: ignore[arg-type]


def copy_of(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints", "tensorboard")))


def without_times(path: Path) -> dict:
    metrics = json.loads((path / "metrics-test.json").read_text())
    assert metrics.pop("seconds") > 0
    assert metrics.pop("users_per_second") > 0
    return metrics


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_lists_do_not_depend_on_the_batch_size(loaded: LoadedRun, tiny_data: Path, batch_size: int) -> None:
    sequences = load_dataset(tiny_data).sequences
    view = sequences.history_and_target("test")
    users = np.random.default_rng(0).permutation(sequences.num_users)
    expected = rank_users(loaded.searcher, loaded.layout, view, np.arange(120), Decoding(batch_size=32))
    done: list[int] = []
    found = rank_users(
        loaded.searcher, loaded.layout, view, users, Decoding(batch_size=batch_size), on_batch=done.append
    )
    assert (found.items == expected.items[users]).all()
    finite = np.isfinite(found.scores)
    np.testing.assert_allclose(found.scores[finite], expected.scores[users][finite], rtol=1e-6)
    assert sum(done) == sequences.num_users
    assert max(done) <= batch_size


def test_the_whole_history_is_left_out_also_where_the_input_is_cut(loaded: LoadedRun, tiny_data: Path) -> None:
    """The last user has all 64 items: her input holds some of them, her list the one that is left."""
    sequences = load_dataset(tiny_data).sequences
    view = sequences.history_and_target("test")
    lists = rank_users(loaded.searcher, loaded.layout, view, np.arange(120), Decoding())
    assert lists.items[119].tolist() == [view.targets[119], *[-1] * 19]
    for user in range(119):
        history = set(view.items[view.starts[user] : view.ends[user]].tolist())
        listed = lists.items[user].tolist()
        assert len(set(listed)) == 20
        assert min(listed) >= 0
        assert not history & set(listed)
    again = rank_users(loaded.searcher, loaded.layout, view, np.arange(120), Decoding(exclude_history=False))
    assert (again.items >= 0).all()
    assert any(set(again.items[u]) & set(view.items[view.starts[u] : view.ends[u]]) for u in range(119))


def test_ranks_share_the_batches_and_no_user_is_left_out(
    loaded: LoadedRun, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks one after another: what each would send adds up to what one finds."""
    view, users = load_dataset(tiny_data).sequences.history_and_target("test"), np.arange(120)
    decoding = Decoding(batch_size=25)
    alone = rank_users(loaded.searcher, loaded.layout, view, users, decoding)
    sent: list[tuple[np.ndarray, TopItems]] = []
    monkeypatch.setattr(evaluation, "_gather", lambda mine, world_size: sent.extend(mine))
    monkeypatch.setattr(evaluation, "_assemble", lambda *_: None)
    for rank in range(3):
        rank_users(loaded.searcher, loaded.layout, view, users, decoding, rank=rank, world_size=3)
    assert len(sent) == 5
    together = _assemble(sent, 120, 20)
    assert (together.items == alone.items).all()
    assert (together.scores == alone.scores).all()


@pytest.mark.parametrize("places", [[0, 1, 1], [0, 1]])
def test_a_user_twice_or_never_is_an_error(places: list[int]) -> None:
    chunk = TopItems(np.zeros((len(places), 20), np.int32), np.zeros((len(places), 20), np.float32))
    with pytest.raises(RuntimeError, match="of 3 users were not ranked exactly once"):
        _assemble([(np.array(places), chunk)], 3, 20)


def test_evaluate_writes_every_user_once_in_order(loaded: LoadedRun, tiny_data: Path, tmp_path: Path) -> None:
    dataset = load_dataset(tiny_data)
    run = replace(loaded, path=tmp_path)
    metrics = evaluate(run, dataset, "test", decoding=Decoding(batch_size=50))
    assert metrics is not None
    table = pq.read_table(tmp_path / "top20-test.parquet")
    assert table.column("user").to_pylist() == dataset.sequences.user_ids
    view = dataset.sequences.history_and_target("test")
    assert table.column("target").to_pylist() == [dataset.sequences.item_ids[row] for row in view.targets]
    hits = [
        target in items[:10]
        for target, items in zip(table["target"].to_pylist(), table["items"].to_pylist(), strict=True)
    ]
    assert metrics["HR@10"] == pytest.approx(np.mean(hits))
    assert metrics["users"] == 120
    assert metrics["invalid_rate"] == metrics["duplicate_rate"] == 0
    assert metrics["protocol"]["beam"] == 20
    assert metrics["protocol"]["exclude_history"] is True
    assert set(metrics["beside"]) == {"counting", "popularity", "knn"}


def test_another_numbering_is_refused(loaded: LoadedRun, tiny_data: Path, tmp_path: Path) -> None:
    other = prepare(tiny_data.parent / "log.txt", tmp_path / "data", numbering="random", seed=1)
    with pytest.raises(ValueError, match=r"speaks numbering .* give --data the directory the run was trained on"):
        check_numbering(loaded, other)
    check_numbering(loaded, load_dataset(tiny_data))


@pytest.mark.parametrize(("old", "new", "kind"), [(" B", " C", "item"), ("user-", "person-", "user")])
def test_equal_codes_of_other_ids_are_refused(
    loaded: LoadedRun, tiny_data: Path, tmp_path: Path, old: str, new: str, kind: str
) -> None:
    """As many users and items and the same seed: the codes, and so their hash, are the same."""
    (tmp_path / "log.txt").write_text((tiny_data.parent / "log.txt").read_text().replace(old, new))
    other = prepare(tmp_path / "log.txt", tmp_path / "data", numbering="random")
    assert other.numbering.numbering_hash() == loaded.model.config.numbering_hash
    with pytest.raises(ValueError, match=f"knows {kind} .* give --data the directory the run was trained on"):
        check_numbering(loaded, other)


@pytest.mark.dist
def test_one_and_two_ranks_write_the_same_bytes(tiny_run: Path, tmp_path: Path) -> None:
    """Five batches, so that one rank has one more than the other."""
    one, two = copy_of(tiny_run, tmp_path / "1"), copy_of(tiny_run, tmp_path / "2")
    alone = [sys.executable, "-m", "genrec_dist.cli", "evaluate", str(one), "--batch-size", "25"]
    subprocess.run(alone, env=environment(), check=True, timeout=120, stdout=subprocess.DEVNULL)
    done = run_ranks(["-m", "genrec_dist.cli", "evaluate", two, "--batch-size", "25"], tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    assert str(two / "report.html") in done.stdout[0]
    assert done.stdout[1] == ""  # rank 0 alone speaks
    assert not list(two.glob(".*"))
    assert (one / "top20-test.parquet").read_bytes() == (two / "top20-test.parquet").read_bytes()
    assert without_times(one) == without_times(two)


@pytest.mark.dist
def test_a_rank_that_fails_stops_the_others_and_leaves_no_file(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    script = tmp_path / "failing.py"
    script.write_text(FAILING_RANK)
    start = time.monotonic()
    done = run_ranks([script, "evaluate", run, "--batch-size", "25"], tmp_path / "logs")
    assert time.monotonic() - start < 60  # not the half hour after which gloo gives up
    assert done.returncode != 0
    said = [line for line in done.stderr[1].splitlines() if line.startswith("genrec: ")]
    assert said == ["genrec: user row 7 is outside the table of 5 users: prepare and shard again"]
    assert not any("Traceback" in text for text in done.stderr), done.stderr
    assert sorted(path.name for path in run.iterdir()) == before
