"""Attacks on training: kills, signals, full disks, damaged checkpoints, two processes, ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from attacks import Box, Ended, NotHeld, content, kind, left_over, must_equal
from hostile import damaged, damaged_json, damaged_lines
from two_ranks import free_port
from world import RECIPES, bits, undisturbed

SIGNALS = [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


class Run:
    """A run of one of the recipes in an attack's own folder."""

    def __init__(self, box: Box, name: str = "", place: Path | None = None):
        self.box, self.name = box, name or box.dice.choice(RECIPES)
        self.path = (place or box.folder) / "run"
        box.note(f"recipe {self.name}")

    def arguments(self, *more: object) -> list[object]:
        return ["train", self.box.world / f"{self.name}.yaml", "--run", self.path, *more]

    def train(self, *more: object, **order: object) -> Ended:
        return self.box.run(*self.arguments(*more), **order)

    def copied(self) -> Path:
        """The run finished, copied here; returns its last checkpoint."""
        shutil.copytree(self.box.world / self.name, self.path)
        return self.last()

    def last(self) -> Path:
        return max((self.path / "checkpoints").glob("step-*"))

    def must_be_whole(self) -> None:
        """Raise NotHeld where something half-written has a final name."""
        for path in self.path.glob("checkpoints/step-*"):
            try:
                files = json.loads((path / "state.json").read_text())["files"]
                torn = [f["name"] for f in files if (path / f["name"]).stat().st_size != f["bytes"]]
            except (OSError, ValueError, KeyError) as error:
                raise NotHeld(f"{path.name} has its final name and is not whole: {error}") from None
            if torn:
                raise NotHeld(f"{path.name} has its final name and {torn} are torn")
        expected = set(content(self.box.world / self.name / "best"))
        if (self.path / "best").exists() and set(content(self.path / "best")) != expected:
            raise NotHeld("best/ has its final name and is not whole")
        for name in ("status.json", "recipe.yaml", "audit.json"):
            if (self.path / name).exists() and not (self.path / name).read_bytes():
                raise NotHeld(f"{name} is empty")

    def must_finish(self) -> None:
        """Go on with the run; raise NotHeld unless it comes to the undisturbed end."""
        self.must_be_whole()
        ended = self.train("--resume", "latest")
        if ended.code and "start without --resume" in ended.told:
            ended = self.train()
        ended.must_end(0)
        self.must_be_finished()

    def must_be_finished(self) -> None:
        """Raise NotHeld unless the run has come to the undisturbed end."""
        must_equal(bits(self.path), undisturbed(self.box.world, self.name), "resumed")
        status = json.loads((self.path / "status.json").read_text())["status"]
        if status != "finished":
            raise NotHeld(f"finished, but status.json says {status}")
        if found := left_over(self.path):
            raise NotHeld(f"left over: {', '.join(found)}")


@cache
def undisturbed_run(world: Path, name: str) -> tuple[int, float]:
    """How many file operations an undisturbed run makes, and its seconds."""
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        box = Box(world, Path(folder), random.Random(0))
        began = time.monotonic()
        Run(box, name).train(at=10**9).must_end(0)
        return box.operations(), time.monotonic() - began


@kind("training", 90)
def kill(box: Box) -> None:
    """A signal at any file operation, perhaps another while it is resumed; then resumed."""
    run = Run(box)
    most, _ = undisturbed_run(box.world, run.name)
    for more in ([], ["--resume", "latest"])[: box.dice.choice([1, 1, 2])]:
        at, number = box.dice.randint(1, most), box.dice.choice(SIGNALS)
        box.note(f"{number.name} at file operation {at} of {most}")
        ended = run.train(*more, at=at, signal=int(number))
        if ended.code and "start without --resume" in ended.told:
            break
        # Before and after the training itself a signal ends the process as it ends any.
        ended.must_end(-number, 0, *([] if number == signal.SIGKILL else [128 + number]))
        run.must_be_whole()
    run.must_finish()


@kind("training", 25)
def kill_at_a_moment(box: Box) -> None:
    """SIGKILL at any moment, up to three times; then resumed."""
    run, resume = Run(box), []
    for _ in range(box.dice.randint(1, 3)):
        moment = box.dice.random() * undisturbed_run(box.world, run.name)[1]
        box.note(f"SIGKILL after {moment:.2f} s")
        process = box.start(*run.arguments(*resume))
        time.sleep(moment)
        process.kill()
        run.must_be_whole()
        resume = ["--resume", "latest"] if (run.path / "events.jsonl").exists() else []
    run.must_finish()


@kind("training", 25)
def kill_amid_a_write(box: Box) -> None:
    """Killed by the kernel within the write that passes a size; then resumed."""
    run = Run(box)
    size = int(2 ** box.dice.uniform(10, 19))
    box.note(f"killed amid the write that passes {size} bytes")
    ended = run.train(file_limit=size, signal=int(signal.SIGXFSZ))
    ended.must_end(-signal.SIGXFSZ, 0, 1)
    run.must_finish()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of its own of so many bytes; None where none may be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@kind("training", 35)
def full_disk(box: Box) -> None:
    """A file system of any size, or where none may be mounted a limit of files; then room."""
    size = int(2 ** box.dice.uniform(12, 21))
    with small_disk(box.folder, size) as disk:
        limit = None if disk and box.dice.random() < 0.5 else size // 4
        run = Run(box, place=None if limit else disk)
        box.note(f"files of at most {limit} bytes" if limit else f"a disk of {size} bytes")
        ended = run.train(file_limit=limit)
        if ended.refused(run.path) and not any(
            words in ended.told for words in ("make room", "raise the limit")
        ):
            raise NotHeld(f"names no remedy: {ended.told[:200]}")
        run.must_be_whole()
        if left_over(run.path):
            raise NotHeld(f"left over: {left_over(run.path)}")
        if not limit:
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        if (run.path / "events.jsonl").exists():
            run.must_finish()
        else:
            run.train().must_end(0)
            run.must_be_finished()


@kind("training", 50)
def checkpoint(box: Box) -> None:
    """A file of the last checkpoint damaged, missing or another's; then resumed."""
    run = Run(box)
    last = run.copied()
    target = box.dice.choice(sorted(last.iterdir()))
    how = box.dice.randrange(6)
    if how == 0:
        target.unlink()
        box.note(f"{target.name} removed")
    elif how == 1:
        older = min((run.path / "checkpoints").glob("step-*")) / target.name
        target.write_bytes(older.read_bytes())
        box.note(f"{target.name} of an older checkpoint")
    else:
        box.damage(target, damaged)
    ended = run.train("--resume", "latest")
    if not ended.refused(last.name):
        run.must_be_finished()
    elif box.dice.random() < 0.3:
        # The older one is whole.
        run.train("--resume", min((run.path / "checkpoints").glob("step-*"))).must_end(0)
        run.must_be_finished()


@kind("training", 50)
def state(box: Box) -> None:
    """`state.json` with another value, key or shape; then resumed."""
    run = Run(box)
    last = run.copied()
    box.damage(last / "state.json", damaged_json)
    ended = run.train("--resume", "latest")
    if not ended.refused(last.name):
        run.must_be_finished()


@kind("training", 30)
def run_files(box: Box) -> None:
    """Another file of the run directory damaged, missing, or a foreign one there; then resumed."""
    run = Run(box)
    last = run.copied()
    names = ["events.jsonl", "status.json", "recipe.yaml", "audit.json", "foreign", "half"]
    name = box.dice.choice(names)
    if name == "foreign":
        foreign = box.dice.choice(["step-foo", "step-99999999", "step-", "x", ".step-1.1.x.tmp"])
        (run.path / "checkpoints" / foreign).mkdir()
        box.note(f"a folder checkpoints/{foreign}")
    elif name == "half":
        # Stopped before its end: the last checkpoint gone, and with it a part of the log.
        for path in sorted(last.iterdir()):
            path.unlink()
        last.rmdir()
        box.damage(run.path / "events.jsonl", damaged)
    elif box.dice.random() < 0.2:
        (run.path / name).unlink()
        box.note(f"{name} removed")
    else:
        box.damage(run.path / name, damaged_lines if name == "events.jsonl" else damaged)
    ended = run.train("--resume", "latest")
    if not ended.refused(run.path):
        must_equal(bits(run.path), undisturbed(box.world, run.name), "resumed")


@kind("training", 10)
def read_only(box: Box) -> None:
    """A place that may not be written; then written by who may."""
    run = Run(box)
    resume: list[object] = []
    if box.dice.random() < 0.5:
        run.copied()
        last = run.last()
        for path in sorted(last.iterdir()):
            path.unlink()
        last.rmdir()
        resume = ["--resume", "latest"]
    closed = run.path if run.path.exists() else box.folder
    if box.dice.random() < 0.5 and closed == run.path:
        closed = run.path / box.dice.choice(["checkpoints", "best", "tensorboard"])
    box.note(f"{closed.relative_to(box.folder)} may not be written")
    inside = [] if closed == box.folder else [run.path, *run.path.rglob("*")]
    for path in [box.folder, *inside]:
        os.chmod(path, 0o777 if path.is_dir() else 0o666)
    closed.chmod(0o555)
    process = box.start(*run.arguments(*resume), nobody=True)
    closed.chmod(0o555)
    if os.getuid() == 0:
        os.chown(closed, 0, 0)
    ended = box.end(process)
    closed.chmod(0o777)
    if ended.refused(run.path):
        if "rights" not in ended.told:
            raise NotHeld(f"names no remedy: {ended.told[:200]}")
        if left_over(run.path):
            raise NotHeld(f"left over: {left_over(run.path)}")
        run.train(*(resume if run.path.exists() else [])).must_end(0)
    must_equal(bits(run.path), undisturbed(box.world, run.name), "written later")


@kind("training", 25)
def two_at_once(box: Box) -> None:
    """Two processes in one run directory: one trains, the other is refused, nothing is mixed."""
    run = Run(box)
    gap = box.dice.choice([0, 0.05, 0.2, 0.5, 0.8]) * undisturbed_run(box.world, run.name)[1]
    second = box.dice.choice([[], ["--resume", "latest"]])
    box.note(f"two processes, {gap:.2f} s apart, the second with {second}")
    processes = [box.start(*run.arguments())]
    time.sleep(gap)
    processes.append(box.start(*run.arguments(*second)))
    ends = [box.end(process) for process in processes]
    if all(ended.refused(run.path) for ended in ends):
        raise NotHeld(f"both are refused: {ends[0].told} {ends[1].told}")
    for ended in ends:
        if ended.code and any(word in ended.told for word in ("no such file", "make room")):
            raise NotHeld(f"an unclear message: {ended.told[:200]}")
    run.must_be_finished()
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    starts = sum(event["event"] == "start" for event in events)
    if starts != sum(ended.code == 0 for ended in ends):
        raise NotHeld(f"{starts} starts in events.jsonl, exit codes {[e.code for e in ends]}")


@kind("training", 6)
def rank(box: Box) -> None:
    """One of two ranks killed: the other ends in one line; one process goes on with the run."""
    run = Run(box, "dense")
    at = box.dice.uniform(0.3, 1.5) * undisturbed_run(box.world, run.name)[1]
    gone = box.dice.randrange(2)
    box.note(f"rank {gone} of 2 killed after {at:.2f} s")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        box.start(*run.arguments(), env=meeting | {"RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(2)
    ]
    time.sleep(at)
    ranks[gone].kill()
    ended = box.end(ranks[1 - gone])
    if ended.refused() and f"rank {gone}" not in ended.told:
        raise NotHeld(f"does not name the rank that is gone: {ended.told[:200]}")
    run.must_be_whole()
    resume = ["--resume", "latest"] if (run.path / "events.jsonl").exists() else []
    run.train(*resume).must_end(0)
    status = json.loads((run.path / "status.json").read_text())["status"]
    if status != "finished" or left_over(run.path):
        raise NotHeld(f"status.json says {status}; left over: {left_over(run.path)}")
