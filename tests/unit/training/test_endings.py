"""How a training ends: by a signal, on a full disk, before its first checkpoint; and what can go on
afterwards."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import NotFinite, Stopped
from genrec_dist.tracking.event_log import EventLog, write_status
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.loop import Loop
from genrec_dist.training.progress import EpochReport
from genrec_dist.training.run import train


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    """3 steps of pretraining, then 3 epochs of 3 steps."""
    return load_recipe(tiny_recipe, ["finetune.epochs=3", "checkpoint_every=2"])


def status(recipe: Recipe) -> dict:
    return json.loads((Path(recipe.run) / "status.json").read_text())


def events(recipe: Recipe) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.run) / "events.jsonl").open()]


def raise_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Have these signals come while a step is taken."""
    real = Loop.take_step

    def take_step(self: Loop, at: int, *rest: object) -> object:
        result = real(self, at, *rest)  # type: ignore[arg-type]
        for number in numbers if at == step else ():
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(Loop, "take_step", take_step)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_a_signal_no_further_step_is_taken(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    monkeypatch.setattr("signal.SIG_IGN", object())  # as in a terminal: SIGHUP is not ignored
    raise_in_step(monkeypatch, 4, number)
    with pytest.raises(Stopped, match=number.name):
        train(replace(recipe, checkpoint_every=1000))
    assert [event["step"] for event in events(recipe) if event["event"] == "step"][-1] == 4
    assert (status(recipe)["status"], status(recipe)["step"]) == ("stopped", 5)
    assert list_checkpoints(Path(recipe.run))[-1].name == "step-00000005"
    again = "; again: end without one" * (number == signal.SIGINT)
    assert f"stopping after this step, then a checkpoint{again}\n" in capfd.readouterr().err


def test_a_second_interrupt_ends_without_a_checkpoint_and_the_command_is_told(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(tiny_recipe)
    with monkeypatch.context() as patch:
        raise_in_step(patch, 1, signal.SIGINT, signal.SIGINT)
        assert run_command(["train", str(tiny_recipe)]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "genrec: ended by SIGINT"
    assert status(recipe)["status"] == "failed"
    assert list_checkpoints(Path(recipe.run)) == []
    # It is no dead end: the same command with --resume latest starts anew.
    raise_in_step(monkeypatch, 1, signal.SIGINT)
    assert run_command(["train", str(tiny_recipe), "--resume", "latest"]) == 130
    found = capfd.readouterr()
    assert found.err.splitlines()[-1] == (
        "genrec: stopped by SIGINT, checkpoint written; continue with: "
        f"genrec train {tiny_recipe} --resume latest"
    )
    assert "it ended before its first checkpoint, so it starts anew" in found.out


def test_a_run_that_failed_before_its_first_checkpoint_is_gone_on_with(
    recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = replace(
        recipe,
        checkpoint_every=1000,
        pretrain=replace(recipe.pretrain, learning_rate=1e30),
        optimizer=replace(recipe.optimizer, max_grad_norm=0.0),
    )
    with pytest.raises(NotFinite):
        train(wild)
    with pytest.raises(ValueError, match="continue it with --resume latest"):
        train(recipe)
    train(recipe, resume="latest")
    assert f"{recipe.run}: it ended before its first checkpoint" in capfd.readouterr().out
    assert status(recipe)["status"] == "finished"
    assert [event["resumed_from"] for event in events(recipe) if event["event"] == "start"] == [
        None,
        None,
    ]


# Full disks


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may become larger: writes fail as on a full disk, with another
    number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones_whole(recipe: Recipe) -> None:
    held: list[list[Path]] = []

    with contextlib.ExitStack() as stack:

        def fill(report: EpochReport) -> None:
            held.append(list_checkpoints(Path(recipe.run)))
            size = next(held[0][-1].glob("rank-*")).stat().st_size
            stack.enter_context(file_limit(size - 1))

        with pytest.raises(OSError, match="File too large") as caught:
            train(recipe, on_epoch=fill)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == f"{recipe.run}/checkpoints/step-00000008"
    # The thread's error is met before the next step that is taken, or the one after it.
    assert status(recipe)["status"] == "failed"
    assert status(recipe)["step"] in (8, 9)
    assert sorted((Path(recipe.run) / "checkpoints").iterdir()) == held[0]
    for path in held[0]:
        Checkpoint(path, {}, Ranks())
    train(recipe, resume="latest")
    assert status(recipe)["status"] == "finished"


def test_a_best_that_cannot_be_written_is_one_line(
    tiny_recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tiny_recipe), "--set", "checkpoint_every=1000"]
    with file_limit(20_000):
        assert run_command([*command, "--set", "pretrain.epochs=0"]) == 1
    recipe = load_recipe(tiny_recipe)
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"genrec: {recipe.run}/best: file too large: raise the limit (ulimit -f) or choose another "
        "output"
    )
    assert status(recipe)["status"] == "failed"
    assert not (Path(recipe.run) / "best").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Use up the disk but for `leave` bytes."""
    with (disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    size = (disk / "filling").stat().st_size
    os.truncate(disk / "filling", size - leave)


@pytest.mark.parametrize("leave", [0, 40_000])
def test_a_disk_that_fills_up_while_training_is_one_line(
    tiny_recipe: Path, small_disk: Path, capfd: pytest.CaptureFixture[str], leave: int
) -> None:
    """Whatever comes to write first: an event, a checkpoint, `best/`."""
    run = small_disk / "run"
    real = Loop.take_step

    def take_step(self: Loop, at: int, *rest: object) -> object:
        if at == 3:
            self.checkpoints.finish()  # the pretraining's checkpoint is there
            fill(small_disk, leave)
        return real(self, at, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "take_step", take_step)
        assert run_command(["train", str(tiny_recipe), "--set", f"run={run}"]) == 1
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith(f"genrec: {run}/")
    assert told.splitlines()[-1].endswith(
        "no space left on device: make room or choose another output"
    )
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    (kept,) = list_checkpoints(run)
    Checkpoint(kept, {}, Ranks())
    (small_disk / "filling").unlink()
    assert (
        run_command(["train", str(tiny_recipe), "--set", f"run={run}", "--resume", "latest"]) == 0
    )


def test_a_status_has_room_on_a_full_disk_where_one_is_there(small_disk: Path) -> None:
    write_status(small_disk, "running", reason="of many words " * 20)
    fill(small_disk)
    write_status(small_disk, "failed", step=7)
    found = json.loads((small_disk / "status.json").read_text())
    assert (found["status"], found["step"]) == ("failed", 7)
    (small_disk / "status.json").unlink()
    fill(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_status(small_disk, "failed")
    assert caught.value.filename == str(small_disk / "status.json")


def test_an_event_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    log = EventLog(tmp_path)
    with pytest.raises(OSError, match="No space left") as caught:
        log.write("start")
    assert caught.value.filename == str(tmp_path / "events.jsonl")
    log.close()


def test_an_event_after_a_torn_line_is_a_line_and_tensorboard_reads_the_numbers(
    tmp_path: Path,
) -> None:
    log = EventLog(tmp_path)
    log.write("step", step=3, loss=2.5, stage="finetune")
    log.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ev')
    log = EventLog(tmp_path)
    log.write("validation", step=4, loss=1.5)
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [line.startswith('{"time": 1, "ev') for line in lines] == [False, True, False]
    assert json.loads(lines[2])["step"] == 4
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in board.Scalars("step/loss")] == [(3, 2.5)]
    assert [(one.step, one.value) for one in board.Scalars("validation/loss")] == [(4, 1.5)]


# best/


def test_a_model_without_user_ids_names_no_user_and_files_have_ordinary_modes(
    recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0o027)
    try:
        run = train(replace(recipe, model=replace(recipe.model, user_ids=False)))
    finally:
        os.umask(before)
    best = run / "best"
    users = pq.read_table(Path(recipe.data) / "users.parquet").column("id").to_pylist()
    for path in best.iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
        assert not any(user.encode() in path.read_bytes() for user in users), path
    for path in list_checkpoints(run)[-1].iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
    command = ["recommend", str(run), "--user", users[3]]
    assert run_command(command) == 0
    answer = capfd.readouterr().out.splitlines()[-1]
    assert json.loads(answer)["user"] == users[3]
    assert run_command(["recommend", str(run), "--user", "nobody"]) == 1
    assert "user 'nobody' is not in" in capfd.readouterr().err
    # As runs of earlier versions were written.
    shutil.copy(Path(recipe.data) / "users.parquet", best / "users.parquet")
    assert run_command(command) == 0
    assert capfd.readouterr().out.splitlines()[-1] == answer
