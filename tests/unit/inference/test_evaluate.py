"""Each user once, the same lists for any batch size and any number of ranks, and no file where a
rank fails."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluate_rank import WAYS, every_way
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.sequences import SplitView
from places import HELPERS, ROOT
from two_ranks import deepspeed_environment, environment, run_ranks, start_each

from genrec_dist.cli.app import run_command
from genrec_dist.decoding.searcher import Mode
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.watch import VALIDATED, VALIDATING
from genrec_dist.evaluation.metrics import rank_histogram, target_ranks
from genrec_dist.inference import validation
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import LoadedRun, load_run
from genrec_dist.inference.rank_users import Decoding, Window, cut_batches, rank_windows
from genrec_dist.inference.validation import history_loss, target_histogram, validation_scores

SCRIPT = HELPERS / "evaluate_rank.py"
SPOILED = """
import os, resource, signal, sys, time
import genrec_dist.inference.rank_users as ranking
from genrec_dist.cli.app import main

who, how = int(sys.argv.pop(1)), sys.argv.pop(1)
decode, decoded = ranking.rank_batch, 0

def spoiled(*arguments):
    global decoded
    decoded += 1
    if decoded == 2 and how == "decoding":
        raise ValueError("user row 7 is outside the table of 5 users: prepare and shard again")
    if decoded == 2 and how in ("killed", "killed-while-others-decode"):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*arguments)

def slow(*arguments):
    global decoded
    decoded += 1
    if decoded == 2:
        time.sleep(60)
    return decode(*arguments)

if os.environ["RANK"] == str(who):
    ranking.rank_batch = spoiled
    if how == "full-disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
elif how == "killed-while-others-decode":
    ranking.rank_batch = slow
main()
"""
"""`genrec evaluate` of which one rank has something happen to it in its second batch, or a disk
with room for 2,048 bytes."""


def copy_of(run: Path, target: Path) -> Path:
    return Path(
        shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    )


def without_times(path: Path) -> dict:
    metrics = json.loads((path / "metrics-test.json").read_text())
    assert metrics.pop("seconds") > 0
    assert metrics.pop("users_per_second") > 0
    metrics.pop("git")  # somebody may commit while the tests run
    return metrics


def rank_users(
    loaded: LoadedRun,
    view: SplitView,
    users: np.ndarray,
    decoding: Decoding = Decoding(),
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Window]:
    ranks = options.pop("ranks", None) or Ranks()
    searcher, layout = loaded.searcher, loaded.layout
    return list(rank_windows(searcher, layout, view, users, decoding, ranks, on_batch, **options))


@pytest.fixture(scope="module")
def view(dataset: Dataset) -> SplitView:
    return dataset.sequences.history_and_target("test")


@pytest.mark.parametrize(("batch_size", "num_users"), [(1, 12), (7, 120), (1000, 120)])
def test_rank_windows_does_not_depend_on_the_batch_size(
    loaded: LoadedRun, view: SplitView, batch_size: int, num_users: int
) -> None:
    users = np.random.default_rng(0).permutation(120)[:num_users]
    (expected,) = rank_users(loaded, view, np.arange(120), Decoding(batch_size=32))
    done: list[int] = []
    (found,) = rank_users(loaded, view, users, Decoding(batch_size=batch_size), done.append)
    assert (found.items == expected.items[users]).all()
    finite = np.isfinite(found.scores)
    np.testing.assert_allclose(found.scores[finite], expected.scores[users][finite], rtol=1e-6)
    assert sum(done) == num_users
    assert max(done) <= batch_size


def test_rank_windows_excludes_the_whole_history_also_where_the_input_is_cut(
    loaded: LoadedRun, view: SplitView
) -> None:
    """The last user has all 64 items: the input holds some of them, the list the one that is
    left."""
    (lists,) = rank_users(loaded, view, np.arange(120))
    assert lists.items[119].tolist() == [view.targets[119], *[-1] * 19]
    histories = [set(view.items[view.starts[u] : view.ends[u]].tolist()) for u in range(120)]
    for user in range(119):
        listed = lists.items[user].tolist()
        assert len(set(listed)) == 20
        assert min(listed) >= 0
        assert not histories[user] & set(listed)
    (again,) = rank_users(loaded, view, np.arange(120), Decoding(exclude_history=False))
    assert (again.items >= 0).all()
    assert any(set(again.items[user].tolist()) & histories[user] for user in range(119))


def test_rank_windows_keeps_the_order_and_no_window_is_larger(
    loaded: LoadedRun, view: SplitView
) -> None:
    users = np.random.default_rng(0).permutation(120)[:100]
    windows = rank_users(loaded, view, users, Decoding(batch_size=16), window=30)
    assert [len(window.user_rows) for window in windows] == [30, 30, 30, 10]
    assert np.concatenate([window.user_rows for window in windows]).tolist() == users.tolist()
    types = {(window.items.dtype.name, window.scores.dtype.name) for window in windows}
    assert types == {("int32", "float32")}
    (whole,) = rank_users(loaded, view, users)
    assert (np.concatenate([window.items for window in windows]) == whole.items).all()


def test_cut_batches_puts_like_lengths_together_and_everybody_in_one() -> None:
    lengths = np.array([5, 1, 9, 1, 5, 2, 7])
    batches = cut_batches(lengths, 3)
    assert [lengths[batch].tolist() for batch in batches] == [[1, 1, 2], [5, 5, 7], [9]]
    in_order = [1, 3, 5, 0, 4, 6, 2]  # equal lengths in the users' order
    assert np.concatenate(batches).tolist() == in_order


class Forgetful(Ranks):
    """As if parcels on their way had been lost, or had come twice: what no check of sizes could
    tell."""

    def __init__(self, times: list[int]):
        super().__init__()
        self.times = iter(times)

    def gather(self, mine: torch.Tensor, error: Exception | None = None) -> list[torch.Tensor]:
        return super().gather(mine, error) * next(self.times)


@pytest.mark.parametrize("times", [[1, 0, 1], [1, 1, 2]])
def test_rank_windows_refuses_lists_that_come_twice_or_never(
    loaded: LoadedRun, view: SplitView, times: list[int]
) -> None:
    with pytest.raises(RuntimeError, match="15 of 45 users were not ranked exactly once"):
        rank_users(loaded, view, np.arange(45), Decoding(batch_size=15), ranks=Forgetful(times))


def test_rank_windows_refuses_a_user_who_is_requested_twice(
    loaded: LoadedRun, view: SplitView
) -> None:
    with pytest.raises(RuntimeError, match="2 of 4 users were not ranked exactly once"):
        rank_users(loaded, view, np.array([3, 4, 5, 3]), window=2)


def test_target_histogram_is_that_of_the_lists(loaded: LoadedRun, dataset: Dataset) -> None:
    view, users = dataset.sequences.history_and_target("validation"), np.arange(5, 115)
    (lists,) = rank_users(loaded, view, users)
    expected = rank_histogram(target_ranks(lists.items, view.targets[users]))
    counts = target_histogram(
        loaded.searcher, loaded.layout, view, users, Decoding(batch_size=32), Ranks()
    )
    assert counts.tolist() == expected.tolist()
    assert counts.sum() == 110


def test_history_loss_does_not_depend_on_the_batches(loaded: LoadedRun, dataset: Dataset) -> None:
    view, users = dataset.sequences.history_and_target("validation"), np.arange(40)
    losses = [
        history_loss(loaded.model, loaded.layout, view, users, Ranks(), batch_size=size)
        for size in (250, 30, 1)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert 0 < losses[0] < 10


def test_a_validation_says_at_each_batch_what_it_does(
    loaded: LoadedRun, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a rank which hangs in one is known to be behind those that wait for it."""
    view, users = dataset.sequences.history_and_target("validation"), np.arange(40)
    monkeypatch.setattr(validation, "LOSS_USERS", 20)
    done: list[str] = []
    validation_scores(
        loaded.model,
        loaded.searcher,
        loaded.layout,
        view,
        users,
        Decoding(batch_size=10),
        Ranks(),
        on_progress=done.append,
    )
    assert done == [VALIDATING, VALIDATED, *[VALIDATING] * 4, VALIDATED]


def test_evaluate_writes_every_user_once_in_order(
    loaded: LoadedRun, dataset: Dataset, view: SplitView, tmp_path: Path
) -> None:
    run = replace(loaded, path=tmp_path)
    metrics = evaluate(run, dataset, "test", decoding=Decoding(batch_size=50))
    assert metrics is not None
    table = pq.read_table(tmp_path / "top20-test.parquet").to_pydict()
    assert table["user"] == dataset.sequences.user_ids
    assert table["target"] == [dataset.sequences.item_ids[row] for row in view.targets]
    listed = zip(table["target"], table["items"], strict=True)
    assert metrics["HR@10"] == pytest.approx(np.mean([t in items[:10] for t, items in listed]))
    assert metrics["users"] == 120
    assert metrics["invalid_rate"] == metrics["duplicate_rate"] == 0
    assert metrics["protocol"]["beam"] == 20
    assert metrics["protocol"]["exclude_history"] is True
    assert set(metrics["beside"]) == {"counting", "popularity", "knn"}


def test_test_is_not_looked_at_before_the_training_is_over(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    step = json.loads((run / "best" / "step.json").read_text())["step"]
    for status in ("running", "stopped", "failed"):
        (run / "status.json").write_text(json.dumps({"status": status}))
        assert run_command(["evaluate", str(run)]) == 1
        assert f"the training's status is '{status}'" in capsys.readouterr().err
        assert not (run / "metrics-test.json").exists()
    assert run_command(["evaluate", str(run), "--split", "validation"]) == 0
    assert run_command(["evaluate", str(run), "--force"]) == 0
    metrics = json.loads((run / "metrics-test.json").read_text())
    assert metrics["training"] == {"status": "failed", "step": step}


@pytest.mark.parametrize("mode", ["compact", "free", "all"])
def test_evaluate_names_the_mode_in_the_protocol(
    loaded: LoadedRun, dataset: Dataset, tmp_path: Path, mode: Mode
) -> None:
    run, decoding = replace(loaded, path=tmp_path), Decoding(mode=mode, top=25, batch_size=50)
    metrics = evaluate(run, dataset, "validation", decoding=decoding)
    assert metrics is not None
    assert metrics["protocol"]["decode"] == mode
    assert (metrics["invalid_rate"] > 0) == (mode == "free")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics-validation.json", "top25-validation.parquet"}


class Overfull:
    """A device whose memory is full."""

    device = torch.device("cpu")

    def search(self, *_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_evaluate_that_fails_names_the_way_out_and_leaves_no_file(
    loaded: LoadedRun, dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = replace(loaded, path=tmp_path)
    with pytest.raises(ValueError, match="metrics need 20"):
        evaluate(run, dataset, "test", decoding=Decoding(top=10))
    full = replace(run, searcher=Overfull())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"32 users at once, beam 20, do not fit .* lower --batch-size"
    ):
        evaluate(full, dataset, "test", decoding=Decoding(batch_size=32))
    assert not list(tmp_path.iterdir())
    assert run_command(["evaluate", str(loaded.path), "--top", "10"]) == 2
    message = capfd.readouterr().err
    assert message.startswith("genrec: --top 10: metrics look at 20 places, give --top 20 or more")
    assert message.count("\n") == 1


@pytest.mark.dist
def test_one_and_two_ranks_write_the_same_bytes(tiny_run: Path, tmp_path: Path) -> None:
    """Five batches, so that one rank has one more than the other."""
    one, two = copy_of(tiny_run, tmp_path / "1"), copy_of(tiny_run, tmp_path / "2")
    command = ["-m", "genrec_dist.cli", "evaluate", "--batch-size", "25"]
    alone = forked.run([*command, one], environment(), timeout=120)
    assert alone.returncode == 0, alone
    done = start_each([*command, two], tmp_path / "logs")
    assert not any(rank.returncode for rank in done), done
    assert str(two / "report.html") in done[0].stdout
    assert done[1].stdout == ""  # rank 0 alone prints
    assert not list(two.glob(".*"))
    assert (one / "top20-test.parquet").read_bytes() == (two / "top20-test.parquet").read_bytes()
    assert without_times(one) == without_times(two)


@pytest.fixture(scope="module")
def alone(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes, every way."""
    out = tmp_path_factory.mktemp("alone")
    every_way(load_run(tiny_run), load_dataset(tiny_data), out, Ranks())
    return out


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.ranks
def test_any_number_of_ranks_writes_the_same_bytes(
    alone: Path, tiny_run: Path, tiny_data: Path, tmp_path: Path, num_ranks: int
) -> None:
    done = start_each(
        [SCRIPT, tiny_run, tiny_data, tmp_path / "out"], tmp_path / "logs", num_ranks, timeout=300
    )
    assert [rank.returncode for rank in done] == [0] * num_ranks, done
    out = tmp_path / "out"
    for name, (decoding, _) in WAYS.items():
        lists = f"top{decoding.top}-test.parquet"
        assert sorted(path.name for path in (out / name).iterdir()) == ["metrics-test.json", lists]
        assert (out / name / lists).read_bytes() == (alone / name / lists).read_bytes()
        assert without_times(out / name) == without_times(alone / name)
    unlike = [(out / f"unlike-{rank}.txt").read_text() for rank in range(num_ranks)]
    assert all("not the data or the options of rank 0" in text for text in unlike)
    assert unlike[0].startswith("rank 1: ")
    assert not (out / "unlike").exists() or not list((out / "unlike").iterdir())
    expected = (alone / "validation-0.json").read_text()
    assert [(out / f"validation-{rank}.json").read_text() for rank in range(num_ranks)] == [
        expected
    ] * num_ranks


@pytest.mark.dist
@pytest.mark.ranks
def test_under_the_launcher_of_zero_3_the_bytes_are_the_same(
    tiny_run: Path, tmp_path: Path
) -> None:
    """Whoever trained with a launch file evaluates with it."""
    one, two = copy_of(tiny_run, tmp_path / "1"), copy_of(tiny_run, tmp_path / "2")
    command = ["-m", "genrec_dist.cli", "evaluate", "--batch-size", "25"]
    alone = forked.run([*command, one], environment(), timeout=120)
    assert alone.returncode == 0, alone
    launch = ROOT / "launch"
    files = [
        "--config_file",
        launch / "cpu_two_ranks_zero.yaml",
        "--deepspeed_config_file",
        launch / "zero3.json",
    ]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    accelerate = [Path(sys.executable).parent / "accelerate", "launch", *files]
    done = subprocess.run(
        [*accelerate, "--main_process_port", port, *command, two],
        env=deepspeed_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    assert (one / "top20-test.parquet").read_bytes() == (two / "top20-test.parquet").read_bytes()
    assert without_times(one) == without_times(two)


def spoiled(
    run: Path, folder: Path, who: int, how: str, launcher: bool = False
) -> tuple[list[str], list[str]]:
    """(what each rank says in lines of its own, new files in the run directory) of three ranks one
    of which is spoiled."""
    copy = copy_of(run, folder / "run")
    before = {path.name for path in copy.iterdir()}
    (folder / "spoiled.py").write_text(SPOILED)
    command = [folder / "spoiled.py", str(who), how, "evaluate", copy, "--batch-size", "10"]
    # Far below the half hour after which gloo gives up.
    if launcher:
        done = run_ranks(command, folder / "logs", 3, timeout=300)
        assert done.returncode != 0
        said = done.stderr
    else:
        each = start_each(command, folder / "logs", 3, timeout=300)
        assert [rank.returncode for rank in each] == [
            -signal.SIGKILL if rank == who and how == "killed" else 1 for rank in range(3)
        ]
        said = [rank.stderr for rank in each]
    assert not any("Traceback" in text for text in said), said
    lines = [
        "\n".join(line for line in text.splitlines() if line.startswith("genrec: "))
        for text in said
    ]
    return lines, sorted({path.name for path in copy.iterdir()} - before)


REASON = "user row 7 is outside the table of 5 users: prepare and shard again"


@pytest.mark.dist
def test_a_rank_that_fails_stops_the_others_and_leaves_no_file(
    tiny_run: Path, tmp_path: Path
) -> None:
    said, new = spoiled(tiny_run, tmp_path, who=1, how="decoding")
    assert said == [f"genrec: rank 1: {REASON}", f"genrec: {REASON}", f"genrec: rank 1: {REASON}"]
    assert not new


@pytest.mark.dist
@pytest.mark.ranks
def test_a_full_disk_of_rank_0_stops_the_others_and_leaves_no_file(
    tiny_run: Path, tmp_path: Path
) -> None:
    said, new = spoiled(tiny_run, tmp_path, who=0, how="full-disk")
    assert "top20-test.parquet: file too large: raise the limit (ulimit -f)" in said[0]
    assert said[1] == said[2]
    assert said[1].startswith("genrec: rank 0: ")
    assert "File too large" in said[1]
    assert not new


@pytest.mark.dist
@pytest.mark.ranks
@pytest.mark.parametrize("who", [1, 0])
def test_a_killed_rank_is_named_and_leaves_no_result(
    tiny_run: Path, tmp_path: Path, who: int
) -> None:
    said, new = spoiled(tiny_run, tmp_path, who=who, how="killed")
    assert said[who] == ""
    others = [said[rank] for rank in range(3) if rank != who]
    assert all(text.startswith(f"genrec: rank {who} has gone (") for text in others)
    # After rank 0 nobody is left to remove its temporary files, hidden and under no final name.
    assert all(name.startswith(".") for name in new) if who == 0 else not new
    if who == 1:
        assert said[2] == said[0]


@pytest.mark.dist
@pytest.mark.ranks
def test_a_launcher_that_ends_the_others_makes_them_tidy_up(tiny_run: Path, tmp_path: Path) -> None:
    """torchrun sends SIGTERM, which would end rank 0 at once and leave its half-written files."""
    said, new = spoiled(tiny_run, tmp_path, who=1, how="killed-while-others-decode", launcher=True)
    assert said == ["genrec: ended by SIGTERM", "", "genrec: ended by SIGTERM"]
    assert not new
