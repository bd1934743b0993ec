"""The record of a sweep: written whole, read back equal, here and at an address, and never guessed
at when it is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from genrec_tuning.record import Epoch, Final, Folder, Recorder, Sweep, Trial, read_sweep, trial_id
from genrec_tuning.run_sync import Mirror
from genrec_tuning.trial import _first_to_blame, _raise_for


def an_epoch(number: int, ndcg: float) -> Epoch:
    return Epoch(number, 10 * number, ndcg, ndcg + 0.01, 2.5, 2.75, 1234.5, 3.5 * number)


def a_trial(number: int, **changes: object) -> Trial:
    values = {
        "finetune.learning_rate": 1e-3,
        "pretrain.mask.strategy": "last-biased",
        "pretrain.mask.p": 0.25,
    }
    facts: dict = {
        "id": trial_id(number), "values": values, "seed": 0, "status": "running", "attempts": 1,
        "planned_epochs": 6, "run": f"runs/{trial_id(number)}",
    }  # fmt: skip
    return Trial(**{**facts, **changes})


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
    assert _first_to_blame(codes) == blamed


def record(address: str) -> Recorder:
    recorder = Recorder(Folder(address), Sweep("beauty", {"trials": 2}))
    recorder.put_facts(started=1.7e9, hours=0.5, resumed=1)
    recorder.put(a_trial(1, status="failed", reason="the loss is nan at step 3"))
    recorder.put(
        a_trial(0)
        .with_epoch(an_epoch(1, 0.02))
        .with_epoch(an_epoch(2, 0.04))
        .with_epoch(an_epoch(3, 0.04))
    )
    return recorder


@pytest.mark.parametrize("kind", ["directory", "file", "memory"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: str) -> None:
    address = {
        "directory": str(tmp_path / "a b"),
        "file": f"file://{tmp_path}/s",
        "memory": f"memory://{tmp_path}/s",
    }[kind]
    recorder = record(address)
    found = read_sweep(address)
    assert found == recorder.sweep
    assert [trial.id for trial in found.trials] == ["t0000", "t0001"]
    first = found.trials[0]
    assert (first.best_NDCG10, first.best_epoch, first.number) == (0.04, 2, 0)
    assert found.trials[1].best_NDCG10 is None
    final = Final("t0000", 1, "finals/t0000/seed-1", "finished", 0.05, {"NDCG@10": 0.03})
    recorder.put_finals(finals=(final,), winner="t0000", comparison={"verdict": "A is better"})
    assert read_sweep(address) == recorder.sweep
    assert read_sweep(address).finals == (final,)


def test_keys_are_those_of_the_other_files(tmp_path: Path) -> None:
    record(str(tmp_path))
    written = json.loads((tmp_path / "trials" / "t0000.json").read_text())
    assert written["epochs"][0].keys() == {
        "epoch", "step", "NDCG@10", "HR@10", "loss", "train_loss", "tokens_per_second", "seconds",
    }  # fmt: skip
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_an_epoch_that_comes_again_changes_nothing() -> None:
    trial = (
        a_trial(0)
        .with_epoch(an_epoch(2, 0.04))
        .with_epoch(an_epoch(1, 0.02))
        .with_epoch(an_epoch(2, 0.5))
    )
    assert [(epoch.epoch, epoch.NDCG10) for epoch in trial.epochs] == [(1, 0.02), (2, 0.04)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "trials/t0000.json",
            '{"id": "t00',
            r"trials/t0000\.json: damaged .*; remove it to run this trial anew",
        ),
        (
            "trials/t0000.json",
            '{"id": "t0000", "epochs": []}',
            r"trials/t0000\.json: damaged .*; remove it",
        ),
        ("trials/t0000.json", "[]", r"t0000\.json: not a JSON object"),
        ("sweep.json", '{"format_version": 9}', r"sweep\.json: format 9, this version reads 1"),
        ("sweep.json", '{"name": "x"}', r"sweep\.json: 'space' is missing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    record(str(tmp_path))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sweep(tmp_path)


def test_another_trials_file_is_refused(tmp_path: Path) -> None:
    record(str(tmp_path))
    (tmp_path / "trials" / "t0007.json").write_bytes(
        (tmp_path / "trials" / "t0000.json").read_bytes()
    )
    with pytest.raises(ValueError, match=r"t0007\.json: it is about trial t0000"):
        read_sweep(tmp_path)


def test_a_directory_without_a_sweep_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sweep\.json in it: is it a directory of genrec tune"):
        read_sweep(tmp_path)
    with pytest.raises(ValueError, match="nosuch"):
        read_sweep("nosuch://bucket/sweep")


def test_the_record_is_read_without_ray_and_optuna() -> None:
    code = "import sys; sys.modules.update(ray=None, optuna=None); import genrec_tuning.record"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        ("NotFinite: the loss is nan at step 3: nothing was saved since", ValueError),
        ("ValueError: model.d_model 10 is no multiple of model.heads 4", ValueError),
        (
            "RankGone: rank 1 has gone (Connection reset by peer): its own message says why",
            RuntimeError,
        ),
        ("RuntimeError: [enforce fail at pair.cc] connection closed", RuntimeError),
    ],
)
def test_what_a_rank_died_of_decides_whether_the_trial_is_tried_again(
    tmp_path: Path, reason: str, raised: type[Exception]
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"status": "failed", "reason": reason}))
    (tmp_path / "rank-0.log").write_text("genrec: its last words\n")
    with pytest.raises(raised) as caught:
        _raise_for(tmp_path, 0, 1)
    assert type(caught.value) is raised


def test_a_checkpoint_that_the_events_do_not_speak_of_is_left(tmp_path: Path) -> None:
    """Killed between the two, a trial would go on from a checkpoint whose epochs stand in no
    record."""
    there, here = tmp_path / "there", tmp_path / "here"
    for step in ("step-1", "step-2"):
        (there / "checkpoints" / step).mkdir(parents=True)
        (there / "checkpoints" / step / "state.json").write_text("{}")
    Mirror(here, Folder(str(there))).pull()
    assert not here.exists()
    event = {"event": "checkpoint", "step": 1, "path": "checkpoints/step-1"}
    (there / "events.jsonl").write_text(json.dumps(event) + "\n")
    Mirror(here, Folder(str(there))).pull()
    assert {str(path.relative_to(here)) for path in here.rglob("*.json*")} == {
        "events.jsonl",
        "checkpoints/step-1/state.json",
    }
