"""Starts real gloo ranks on this machine and gives back what each of them said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from forked import Started


@dataclass(frozen=True)
class Ranks:
    returncode: int
    """torchrun's own: 1 whatever a rank returned."""
    stdout: list[str]
    """Index = rank."""
    stderr: list[str]
    launcher: str
    """What torchrun itself wrote on standard error."""


def environment(**more: str) -> dict[str, str]:
    """This process's environment, for a child on one thread of a CPU that takes itself for no
    rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return (
        kept
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        | more
    )


def deepspeed_environment(**more: str) -> dict[str, str]:
    """As `environment`, for ranks on a CPU under DeepSpeed: accelerate's CPU switch would turn it
    off without a word."""
    kept = environment(DS_ACCELERATOR="cpu", **more)
    del kept["ACCELERATE_USE_CPU"]
    return kept


def run_ranks(
    arguments: list[str | Path],
    logs: Path,
    num_ranks: int = 2,
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> Ranks:
    """Run a script (`[path, argument, ...]`) or a module (`["-m", name, argument, ...]`) on
    `num_ranks` ranks.

    `env`: the ranks' whole environment, default `environment()`. `logs`: a directory for their
    outputs. A run that outlives `timeout` seconds is killed and fails the test."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
        "--log_dir", str(logs), "--redirects", "3", *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=env or environment(), capture_output=True, text=True, timeout=timeout
    )
    outputs = {
        stream: [_text(logs, f"{rank}/{stream}.log") for rank in range(num_ranks)]
        for stream in ("stdout", "stderr")
    }
    return Ranks(done.returncode, outputs["stdout"], outputs["stderr"], done.stderr)


def start_each(
    arguments: list[str | Path],
    logs: Path,
    num_ranks: int = 2,
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Each rank started by itself as srun does: no agent ends the others when one is gone. Index =
    rank.

    What a launcher has no part in is tested by these: forked, they are there at once.
    """
    logs.mkdir(parents=True, exist_ok=True)
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    meeting["LOCAL_WORLD_SIZE"] = meeting["WORLD_SIZE"]
    started: list[Started] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(num_ranks):
            own = (env or environment()) | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(Started(arguments, logs / f"{rank}.out", logs / f"{rank}.err", own))
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()


def free_port() -> int:
    """A port of this machine that nobody holds just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _text(logs: Path, name: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(logs.glob(f"**/{name}")))
