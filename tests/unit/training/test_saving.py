"""Checkpoints that are written while the training goes on: what they hold, when they come, and what
a kill, a signal or a full disk amid the writing leaves."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import forked
import pytest
import torch
from places import HELPERS
from run_events import events
from safetensors import safe_open
from safetensors.torch import load_file
from two_ranks import environment, start_each

from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import Stopped
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.loop import Loop
from genrec_dist.training.run import train
from genrec_dist.training.saving import tensor_file, writer
from genrec_dist.training.saving.tensor_file import HostCopies, TensorFile, write_tensors

PATIENCE = 300


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    """3 steps of pretraining, then 3 epochs of 3 steps; no checkpoint by time."""
    changes = ["finetune.epochs=3", "checkpoint_minutes=0", "keep_checkpoints=99"]
    return load_recipe(tiny_recipe, changes)


def steps_saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]


def weights(path: Path, kind: str = "weight") -> dict[str, torch.Tensor]:
    return Checkpoint(path, {}, Ranks()).weights(kind)


Before = Callable[[str, Callable[[], None]], None]
Hook = Callable[[Before], None]


@pytest.fixture
def before_each_chunk(monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Have a function called in the writing thread, before each chunk of a file, with the name of
    the checkpoint's temporary folder and the writer's own check."""

    def hook(before: Before) -> None:
        monkeypatch.setattr(tensor_file, "CHUNK", 4096)

        def write(folder: Path, file: TensorFile, check: Callable[[], None]) -> tuple[int, str]:
            def both() -> None:
                before(folder.name, check)
                check()

            return write_tensors(folder, file, both)

        monkeypatch.setattr(writer, "write_tensors", write)

    return hook


# The file


def test_a_file_is_what_safetensors_reads_and_its_hash_that_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", 100)
    tensors = {
        "weight.0": torch.randn(7, 11),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(5.0),
        "weight.1": torch.randn(500)[::2],
    }
    file = TensorFile("a.safetensors", tensors, {"fragments": "[1]"})
    size, digest = write_tensors(tmp_path, file, lambda: None)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert (size, digest) == (len(content), sha256(content).hexdigest())
    assert int.from_bytes(content[:8], "little") % 8 == 0
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"fragments": "[1]"}


def test_copies_do_not_follow_their_tensors_and_their_memory_is_used_again() -> None:
    copies, tensor = HostCopies(), torch.arange(4.0)
    first = copies.take({"a": tensor})["a"]
    tensor.add_(1)
    copies.wait()
    assert first.tolist() == [0, 1, 2, 3]
    second = copies.take({"a": tensor})["a"]
    assert second.tolist() == [1, 2, 3, 4]
    assert second.data_ptr() == first.data_ptr()


# While the training goes on


def test_steps_are_taken_meanwhile_and_do_not_reach_what_is_written(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, before_each_chunk: Hook
) -> None:
    """The checkpoint after two steps is held up until the third is over; that of the epoch, which
    comes then, waits for it."""
    may_write, held, order = threading.Event(), {}, []
    before_each_chunk(lambda folder, _: order.append(folder) if may_write.wait(60) else None)
    real_step, real_start = Loop.take_step, writer.CheckpointWriter.start

    def take_step(self: Loop, step: int, *rest: object) -> object:
        result = real_step(self, step, *rest)  # type: ignore[arg-type]
        order.append(step)
        if step == 2:
            assert steps_saved(Path(recipe.run)) == []
            may_write.set()
        return result

    def start(self: writer.CheckpointWriter, state: object) -> None:
        held[state.progress.step] = [master.detach().clone() for master in state.engine.masters]
        real_start(self, state)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "take_step", take_step)
    monkeypatch.setattr(writer.CheckpointWriter, "start", start)
    run = train(replace(recipe, checkpoint_every=2, pretrain=replace(recipe.pretrain, epochs=2)))
    assert 2 in held
    assert order.index(2) < next(i for i, one in enumerate(order) if isinstance(one, str))
    assert steps_saved(run) == sorted(held)
    for path in list_checkpoints(run):
        saved = weights(path)
        masters = held[int(path.name.removeprefix("step-"))]
        assert len(saved) == len(masters)
        for tensor, master in zip(saved.values(), masters, strict=True):
            assert torch.equal(tensor, master.reshape(-1)), path
    for event in events(run, "checkpoint"):
        assert event["path"] == f"checkpoints/step-{event['step']:08d}"
        assert event["seconds"] > 0


def test_an_epoch_is_reported_once_its_checkpoint_has_its_name(
    recipe: Recipe, before_each_chunk: Hook
) -> None:
    before_each_chunk(lambda *_: time.sleep(0.01))
    seen = []
    run = train(
        recipe,
        on_epoch=lambda report: seen.append((report.step + 1, steps_saved(Path(recipe.run)))),
    )
    assert [step for step, _ in seen] == steps_saved(run)[1:]
    assert all(saved[-1] == step for step, saved in seen)


# When they come


def test_minutes_bring_checkpoints_and_steps_do_by_their_own_key(recipe: Recipe) -> None:
    ends = [3, 6, 9, 12]
    found = {}
    for minutes, every in ((0.0, 0), (1e-9, 0), (1000.0, 5)):
        run = f"{recipe.run}-{minutes}"
        train(replace(recipe, run=run, checkpoint_minutes=minutes, checkpoint_every=every))
        found[minutes] = steps_saved(Path(run))
    assert found == {0.0: ends, 1e-9: list(range(1, 13)), 1000.0: sorted([*ends, 5, 10])}


# Accidents


@pytest.mark.dist
def test_a_kill_amid_the_writing_leaves_the_older_checkpoint_and_a_resume_of_the_same_bits(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(recipe, checkpoint_every=2)
    unbroken = train(replace(recipe, run=str(tmp_path / "unbroken")))
    path = tmp_path / "killed.yaml"
    path.write_text(dump_recipe(recipe))
    arguments = [HELPERS / "saving_rank.py", "kill", "0", path]
    done = forked.run(arguments, environment(), timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = Path(recipe.run)
    (left_over,) = (run / "checkpoints").glob(".*")
    (torn,) = left_over.iterdir()
    assert torn.stat().st_size > 0
    (kept,) = list_checkpoints(run)
    size = (kept / torn.name).stat().st_size
    assert torn.stat().st_size < size
    weights(kept)  # checks the hashes
    train(recipe, resume="latest")
    assert events(run, "start")[1]["resumed_from"] == str(kept)
    assert not list((run / "checkpoints").glob(".*"))
    assert steps_saved(run) == steps_saved(unbroken)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        expected, found = (weights(list_checkpoints(place)[-1], kind) for place in (unbroken, run))
        assert all(torch.equal(expected[name], found[name]) for name in expected), kind


def test_a_signal_gives_up_what_is_being_written_for_the_last_checkpoint(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, before_each_chunk: Hook
) -> None:
    """The writing of the checkpoint after two steps would never end; a signal comes in the third."""

    def hold_up(folder: str, check: Callable[[], None]) -> None:
        while folder.startswith(".step-00000002"):
            check()
            time.sleep(0.01)

    before_each_chunk(hold_up)
    real = Loop.take_step

    def take_step(self: Loop, step: int, *rest: object) -> object:
        result = real(self, step, *rest)  # type: ignore[arg-type]
        if step == 2:
            self.stop.number = signal.SIGTERM
        return result

    monkeypatch.setattr(Loop, "take_step", take_step)
    with pytest.raises(Stopped, match="SIGTERM"):
        train(
            replace(
                recipe,
                checkpoint_every=2,
                pretrain=replace(recipe.pretrain, epochs=0),
                finetune=replace(recipe.finetune, batch_size=12),
            )
        )
    run = Path(recipe.run)
    assert steps_saved(run) == [3]
    weights(list_checkpoints(run)[0])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"


@pytest.mark.ranks
@pytest.mark.dist
def test_a_rank_without_room_ends_all_in_one_line_each(recipe: Recipe, tmp_path: Path) -> None:
    """Rank 1 writes its rows of the id tables; its thread's error reaches rank 0's through
    connections that no step uses."""
    outside = replace(recipe.optimizer, id_tables="row-adagrad")
    path = tmp_path / "full.yaml"
    path.write_text(dump_recipe(replace(recipe, optimizer=outside, checkpoint_every=1)))
    arguments = [HELPERS / "saving_rank.py", "full", "1", path]
    done = start_each(arguments, tmp_path / "logs", timeout=PATIENCE)
    assert [process.returncode for process in done] == [1, 1]
    checkpoints = Path(recipe.run) / "checkpoints"
    for rank, process in enumerate(done):
        assert "Traceback" not in process.stderr
        last = process.stderr.rstrip().splitlines()[-1]
        assert f"{checkpoints}/step-00000002" in last, rank
        assert "o space left on device" in last, rank
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    Checkpoint(checkpoints / "step-00000001", {}, Ranks())


@pytest.mark.ranks
@pytest.mark.dist
def test_ranks_agree_on_the_moment_though_their_clocks_do_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    """Rank 1's clock says at every step that a checkpoint is due; rank 0's decides."""
    outside = replace(recipe.optimizer, id_tables="row-adagrad")
    path = tmp_path / "clocks.yaml"
    path.write_text(dump_recipe(replace(recipe, optimizer=outside, checkpoint_minutes=1000.0)))
    arguments = [HELPERS / "saving_rank.py", "clock", "1", path]
    done = start_each(arguments, tmp_path / "logs", timeout=PATIENCE)
    assert [process.returncode for process in done] == [0, 0], done
    found = list_checkpoints(Path(recipe.run))
    assert steps_saved(Path(recipe.run)) == [3, 6, 9, 12]
    assert len(list(found[-1].glob("ids-item-*"))) == 2
