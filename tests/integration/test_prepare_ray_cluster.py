"""The same on a real cluster of two nodes: to the byte, also when a worker is killed in the middle,
and absent when all fails."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from logs import SMALL, WRITERS, files, messy_rows, write_csv
from places import HELPERS, ROOT

pytestmark = pytest.mark.dist

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HELPERS), str(ROOT / "shards"), str(ROOT)]),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class EndedError(Exception):
    """The process has ended in place of an answer."""


class Process:
    """One of the two processes: it answers a line, and ends with its standard input."""

    def __init__(self, *command: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, *command], env=ENVIRONMENT, **pipes)
        self.waiting = b""

    def line(self, seconds: float = 300) -> str:
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self.waiting:
            left = max(until - time.monotonic(), 0)
            ready, _, _ = select.select([self.process.stdout], [], [], left)
            assert ready, "no answer"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise EndedError
            self.waiting += data
        line, _, self.waiting = self.waiting.partition(b"\n")
        return line.decode()

    def answer(self) -> str:
        """The next line that is one: Ray tells of a lost worker between them."""
        while not (line := self.line()).startswith(("done", "failed: ")):
            pass
        return line

    def ask(self, name: str, *arguments: object, **options: object) -> None:
        assert self.process.stdin is not None
        job = [name, [str(value) for value in arguments], options]
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Process]:
    """Its first line is the address."""
    process = Process(str(HELPERS / "two_nodes.py"), "1")
    yield process
    process.end()


@pytest.fixture(scope="module")
def driver(cluster: Process) -> Iterator[Process]:
    sizes = [SMALL.block, SMALL.span, SMALL.bucket, SMALL.most]
    process = Process(str(HELPERS / "ray_driver.py"), cluster.line(), json.dumps(sizes))
    assert process.line() == "connected"
    yield process
    process.end()


def below(cluster: Process) -> Iterator[tuple[int, str]]:
    """(pid, name) of the cluster's own processes; a worker's name says what it does."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            pid = int(entry.name)
            with contextlib.suppress(OSError, IndexError):
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[pid] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
    for pid, name in names.items():
        above = parents[pid]
        while above in parents and above != cluster.process.pid:
            above = parents[above]
        if above == cluster.process.pid:
            yield pid, name


def working(cluster: Process, task: str, seconds: float = 200) -> int:
    """The worker that is at this task, as soon as there is one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for pid, name in below(cluster):
            if name == f"ray::{task}":
                return pid
        time.sleep(0.002)
    raise AssertionError(f"no worker was at {task}")


@pytest.mark.ranks
@pytest.mark.parametrize("write", WRITERS)
def test_two_nodes_give_what_one_process_gives(tmp_path, driver, write):
    source, format = WRITERS[write](messy_rows(8, 2500), tmp_path)
    more = {"format": format, "k_core": 4, "numbering": "train-order"}
    prepare(source, tmp_path / "local", **more)
    driver.ask("prepare", source, tmp_path / "ray", engine="ray", **more)
    assert driver.answer() == "done"
    assert files(tmp_path / "local") == files(tmp_path / "ray")
    sizes = {"users_per_shard": 32, "users_per_record": 16}
    write_shards(load_dataset(tmp_path / "local"), tmp_path / "shards", **sizes)
    driver.ask("shard", tmp_path / "ray", tmp_path / "ray-shards", **sizes)
    assert driver.answer() == "done"
    assert files(tmp_path / "shards") == files(tmp_path / "ray-shards")
    made = {"local", "ray", "shards", "ray-shards", source.name}
    assert {path.name for path in tmp_path.iterdir()} == made


@pytest.mark.ranks
def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path, cluster, driver):
    source, _ = WRITERS["folder"](messy_rows(9, 40_000), tmp_path)
    prepare(source, tmp_path / "local")
    driver.ask("prepare", source, tmp_path / "ray", engine="ray")
    os.kill(working(cluster, "read_spans"), signal.SIGKILL)
    assert driver.answer() == "done"
    assert files(tmp_path / "local") == files(tmp_path / "ray")


@pytest.mark.ranks
def test_a_bad_line_ends_it_with_its_number_and_nothing_is_left(tmp_path, driver):
    rows = [*messy_rows(1), ("U1", "I1", -5), *messy_rows(2)]
    source = write_csv(tmp_path / "log.csv", rows)
    driver.ask("prepare", source, tmp_path / "ray", engine="ray")
    assert driver.answer().startswith(f"failed: {source}:1577: time -5 is negative")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.slow
def test_a_cluster_that_dies_leaves_nothing_under_a_final_name(tmp_path, cluster, driver):
    """The last test of the module, and a minute and more: Ray waits for its head to come back."""
    source, _ = WRITERS["folder"](messy_rows(9, 40_000), tmp_path)
    driver.ask("prepare", source, tmp_path / "ray", engine="ray")
    working(cluster, "read_spans")
    for pid, _ in list(below(cluster)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(EndedError):  # Ray ends a process whose cluster is gone
        assert driver.answer().startswith("failed: Ray: ")
    driver.end()
    assert not (tmp_path / "ray").exists()
    prepare(source, tmp_path / "ray", k_core=2)
    assert {path.name for path in tmp_path.iterdir()} == {"log", "ray"}
