"""The record of a sweep: written whole, read back equal, here and at an address, and never guessed
at when it is damaged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import forked
import pytest
from genrec_shards.file_lock import LOCK_FILE, hold
from genrec_tuning.record import Final, Folder, Recorder, Sweep, Trial, read_sweep, show_value
from genrec_tuning.run_sync import pull, push
from genrec_tuning.trial import first_failed, rank_error
from made_sweeps import SPACE, epoch, trial
from two_ranks import environment


def record(address: str) -> Recorder:
    recorder = Recorder(Folder(address), Sweep("beauty", {"trials": 2}))
    recorder.put_facts(started=1.7e9, hours=0.5, resumed=1)
    recorder.put(trial(1, [], "failed", reason="the loss is nan at step 3"))
    recorder.put(trial(0, [0.02, 0.04, 0.04], values={"pretrain.mask.p": 0.25}))
    return recorder


@pytest.mark.parametrize("kind", ["", "file://", "memory://"])
def test_read_sweep_gives_what_was_written(tmp_path: Path, kind: str) -> None:
    address = f"{kind}{tmp_path}/a b"
    recorder = record(address)
    found = read_sweep(address)
    assert found == recorder.sweep
    assert [one.id for one in found.trials] == ["t0000", "t0001"]
    best = found.trials[0].best
    assert best is not None
    assert (best.NDCG10, best.epoch, found.trials[0].number) == (0.04, 2, 0)
    assert found.trials[1].best is None
    final = Final("t0000", 1, "finals/t0000/seed-1", "finished", 0.05, {"NDCG@10": 0.03})
    recorder.put_finals(finals=(final,), winner="t0000", comparison={"verdict": "A is better"})
    assert read_sweep(address) == recorder.sweep
    assert read_sweep(address).finals == (final,)
    recorder.put(trial(2, [0.1], "running"))
    recorder.interrupt("stopped by SIGTERM")
    states = [(one.status, one.reason) for one in read_sweep(address).trials]
    assert states[0] == ("finished", None)
    assert states[2] == ("interrupted", "stopped by SIGTERM")
    (recorder.folder / "trials").remove("x")
    recorder.folder.remove("trials")
    assert read_sweep(address).trials == ()


def test_trial_files_keep_their_keys(tmp_path: Path) -> None:
    record(str(tmp_path))
    written = json.loads((tmp_path / "trials" / "t0000.json").read_text())
    assert list(written) == [
        "id", "values", "seed", "status", "reason", "attempts", "epochs", "planned_epochs", "run",
    ]  # fmt: skip
    assert list(written["epochs"][0]) == [
        "epoch", "step", "NDCG@10", "HR@10", "loss", "train_loss", "tokens_per_second", "seconds",
    ]  # fmt: skip
    facts = json.loads((tmp_path / "sweep.json").read_text())
    assert list(facts) == ["format_version", "name", "started", "hours", "resumed", "space"]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_an_epoch_that_comes_again_changes_nothing() -> None:
    one = trial(0, []).with_epoch(epoch(2, 0.04)).with_epoch(epoch(1, 0.02))
    one = one.with_epoch(epoch(2, 0.5))
    assert [(each.epoch, each.NDCG10) for each in one.epochs] == [(1, 0.02), (2, 0.04)]


def test_the_best_trial_has_the_highest_score_of_those_that_ended() -> None:
    nan = Trial("t0009", {}, 0, "finished", epochs=(epoch(1, math.nan),))
    ended = trial(0, [0.1]), trial(1, [0.3, 0.2], "stopped"), trial(2, [0.3])
    left = trial(3, [0.9], "running"), trial(4, [0.9], "failed"), trial(5, [0.9], "interrupted")
    sweep = Sweep("s", SPACE, (*reversed(ended), *left, nan))
    assert [one.id for one in sweep.ranked] == ["t0001", "t0002", "t0000"]  # of equals the first
    assert sweep.best == ended[1]
    assert Sweep("s", SPACE, (*left, nan)).best is None


def test_show_value_writes_as_a_recipe_does() -> None:
    values = [3e-4, 1.234e-5, 0.05, 12, 1e6, True, None, "a b", 0.0, 250.0, -2e-3, math.inf]
    assert " | ".join(map(show_value, values)) == (
        "3e-4 | 1.23e-5 | 0.05 | 12 | 1e6 | true | null | a b | 0 | 250 | -2e-3 | inf"
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trials/t0000.json", '{"id": "t00', r"t0000\.json: not a record .*: remove it to run this trial"),
        ("trials/t0000.json", '{"id": "t0000", "epochs": []}', r"t0000\.json: damaged .*; remove it"),
        ("trials/t0000.json", "[]", r"t0000\.json: not a record of a sweep \(not a JSON object\): remove it"),
        ("trials/t0007.json", None, r"t0007\.json: it is about trial t0000"),
        ("sweep.json", '{"format_version": 9}', r"sweep\.json: format 9, this version reads 1"),
        ("sweep.json", '{"name": "x"}', r"sweep\.json: damaged \('space' is missing\)"),
        ("finals.json", '{"finals": 3}', r"finals\.json: damaged"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    record(str(tmp_path))
    (tmp_path / name).write_text(text or (tmp_path / "trials" / "t0000.json").read_text())
    with pytest.raises(ValueError, match=message):
        read_sweep(tmp_path)


def test_a_directory_without_a_sweep_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sweep\.json in it: is it a directory of genrec tune"):
        read_sweep(tmp_path)
    with pytest.raises(ValueError, match="nosuch"):
        read_sweep("nosuch://bucket/sweep")


def test_a_sweep_is_read_and_shown_without_ray_and_optuna(tmp_path: Path) -> None:
    """`sweep` and `finals` import Ray when they need it, in the environment that they have set."""
    names = ("record", "space", "trial", "run_sync", "export", "live_table", "report")
    modules = ", ".join(f"genrec_tuning.{name}" for name in (*names, "sweep", "finals"))
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.modules.update(ray=None, optuna=None); import {modules}")
    done = forked.run([script], environment(), timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ([None, None], None),
        ([0, None], None),
        ([1, -9], 1),
        ([-9, 1], 0),
        ([None, 1], 1),
        ([1, 1], 0),
    ],
)
def test_a_killed_rank_is_blamed_before_those_that_end_because_of_it(
    codes: list[int | None], blamed: int | None
) -> None:
    assert first_failed(codes) == blamed


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        ("NotFinite: the loss is nan at step 3: nothing was saved since", ValueError),
        ("ValueError: model.d_model 10 is no multiple of model.heads 4", ValueError),
        ("RankGone: rank 1 has gone (Connection reset by peer)", RuntimeError),
        ("RuntimeError: [enforce fail at pair.cc] connection closed", RuntimeError),
    ],
)
def test_what_a_rank_died_of_decides_whether_the_trial_is_tried_again(
    tmp_path: Path, reason: str, raised: type[Exception]
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"status": "failed", "reason": reason}))
    (tmp_path / "rank-0.log").write_text("genrec: its last words\n")
    assert type(rank_error(tmp_path, 0, 1)) is raised
    killed = rank_error(tmp_path, 0, -9)
    assert str(killed) == "rank 0 ended by SIGKILL: genrec: its last words"


def test_a_run_is_sent_in_an_order_in_which_it_can_be_resumed_at_any_time(tmp_path: Path) -> None:
    """Killed between a checkpoint and its event, a trial would continue from a checkpoint whose
    epochs are in no record: such a checkpoint is left."""
    here, there, other = tmp_path / "here", Folder(f"memory://{tmp_path}/run"), tmp_path / "other"
    sent: list[str] = []
    put_file = type(there.files).put_file

    def note(self: object, local: str, remote: str, **more: object) -> None:
        sent.append(Path(local).name)
        put_file(self, local, remote, **more)

    for step in ("step-1", "step-2"):
        (here / "checkpoints" / step).mkdir(parents=True)
        for name in ("state.json", "weights", ".half"):
            (here / "checkpoints" / step / name).write_text("{}")
    event = {"event": "checkpoint", "step": 1, "path": "checkpoints/step-1"}
    (here / "events.jsonl").write_text(json.dumps(event) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(there.files), "put_file", note)
        push(here, there)
        assert sent == ["weights", "weights", "state.json", "state.json", "events.jsonl"]
        push(here, there)
        assert sent[5:] == ["events.jsonl"]  # files of a checkpoint never change
    pull(other, there)
    assert sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()) == [
        "checkpoints/step-1/state.json", "checkpoints/step-1/weights", "events.jsonl",
    ]  # fmt: skip
    (here / "checkpoints" / "step-1" / "weights").unlink()
    push(here, there)
    assert not there.holds("checkpoints/step-1/weights")
    there.files.rm_file(there.place("events.jsonl"))
    pull(tmp_path / "none", there)
    assert not (tmp_path / "none").exists()


def test_a_run_that_is_trained_here_is_not_replaced_and_a_torn_copy_is(tmp_path: Path) -> None:
    here, there, other = tmp_path / "here", Folder(f"memory://{tmp_path}/run"), tmp_path / "other"
    (here / "checkpoints" / "step-2").mkdir(parents=True)
    (here / "checkpoints" / "step-2" / "state.json").write_text("{}")
    (here / "events.jsonl").write_text('{"event": "checkpoint", "path": "checkpoints/step-2"}\n')
    push(here, there)
    older = other / "checkpoints" / "step-1" / "state.json"
    older.parent.mkdir(parents=True)
    older.write_text("{}")
    (other / "events.jsonl").write_text("")
    with (
        hold(other / LOCK_FILE, "x"),
        pytest.raises(
            ValueError, match=r"\.lock: another process trains this run \(process \d+ on"
        ),
    ):
        pull(other, there)
    assert older.is_file()
    pull(other, there)
    names = ["checkpoints/step-2/state.json", "events.jsonl"]
    assert sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file()) == names
    (other / "events.jsonl").unlink()  # as a copy that was killed leaves it
    pull(other, there)
    assert (other / "events.jsonl").read_text() == (here / "events.jsonl").read_text()


def test_a_checkpoint_that_is_removed_while_a_run_is_sent_is_left_out(tmp_path: Path) -> None:
    """As ranks do that train on: the oldest goes when a new one is there."""
    here, there = tmp_path / "here", Folder("memory://a-run-that-goes-on")
    for step in ("step-1", "step-2"):
        (here / "checkpoints" / step).mkdir(parents=True)
        for name in ("state.json", "weights"):
            (here / "checkpoints" / step / name).write_text("{}")
    (here / "best.txt").write_text("sent first")
    (here / "events.jsonl").write_text("{}\n")
    put_file = type(there.files).put_file

    def remove_the_oldest(self: object, local: str, remote: str, **more: object) -> None:
        shutil.rmtree(here / "checkpoints" / "step-1", ignore_errors=True)
        put_file(self, local, remote, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(there.files), "put_file", remove_the_oldest)
        push(here, there)
    for name in ("best.txt", "checkpoints/step-2/state.json", "events.jsonl"):
        assert there.holds(name)
    assert not there.holds("checkpoints/step-1/weights")
