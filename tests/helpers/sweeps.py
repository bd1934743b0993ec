"""Small sweeps over the tiny data, run by the real command in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genrec_tuning.record import Sweep, read_sweep
from tiny import TINY_RECIPE
from two_ranks import environment

TUNE = [sys.executable, "-m", "genrec_dist.cli", "tune"]


def write_space(folder: Path, data: Path, text: str, recipe: str = "") -> Path:
    """A space over the tiny recipe, in `folder`; `recipe`: more lines of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(
        f"data: {data}\nrun: run\n{TINY_RECIPE}{recipe}", encoding="utf-8"
    )
    path = folder / "space.yaml"
    path.write_text(f"base: base.yaml\n{text}", encoding="utf-8")
    return path


def start(*arguments: str | Path, **more: str) -> subprocess.Popen[str]:
    """`genrec tune ...`, in a session of its own so that a test can see what it leaves; `more`: of
    its environment."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*TUNE, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(**more), start_new_session=True, **pipes)


def run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess([], process.returncode, output, errors)


def wait_for(
    process: subprocess.Popen[str], there: Callable[[], Any], what: str, seconds: float = 240
) -> Any:
    """What `there` gives once it gives something. Fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert process.poll() is None, f"{what}: the command ended: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return found


def record(out: Path) -> Sweep | None:
    """The record, or None before there is one."""
    return read_sweep(out) if (out / "sweep.json").is_file() else None


def pid_of(run: Path) -> int:
    """Of the process that trains a run."""
    return int(json.loads((run / "status.json").read_text())["pid"])


def processes(*words: str) -> list[int]:
    """Processes of this machine whose command line holds all the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and all(word in command for word in words):
            found.append(int(path.name))
    return found


def parent_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def has_torch(pid: int) -> bool:
    """Whether a process has torch's libraries loaded."""
    return "libtorch" in (Path("/proc") / str(pid) / "maps").read_text()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def gone(there: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether nothing is there within `seconds`."""
    deadline = time.monotonic() + seconds
    while there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
