"""Launch files tried out: what a run says of its start, and a SLURM cluster of stand-ins for its
two commands."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from places import ROOT
from two_ranks import deepspeed_environment

LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent

SRUN = """#!/usr/bin/env bash
# Every node's task on this machine; a signal goes on to all of them, as srun's does.
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
  wait "$task"; last=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task"; last=$?; done
  if [ $last -gt $code ]; then code=$last; fi
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\nanother\\n'; exit; fi
echo "$@" >> scontrol.calls
"""


def started(run: Path) -> dict[str, object]:
    """The run's first event, after its status was seen to be `finished`."""
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    first: dict[str, object] = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    return first


class Cluster:
    """A folder to submit jobs from, with a launch/ of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(LAUNCH, folder / "launch")
        (folder / "bin").mkdir()
        self.jobs: list[subprocess.Popen[str]] = []
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            self.stub(name, text)

    def stub(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def submit(
        self, file: str, *arguments: str | Path, nodes: int, gpus: int, **more: str
    ) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(gpus),
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        env = deepspeed_environment(
            PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}:{BIN}", **slurm | more
        )
        command = ["bash", f"launch/slurm/{file}", *map(str, arguments)]
        pipe = subprocess.PIPE
        job = subprocess.Popen(
            command,
            env=env,
            cwd=self.folder,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(job)
        return job

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@contextlib.contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        for (
            job
        ) in cluster.jobs:  # a test that failed leaves no trainer behind that waits for a signal
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait(timeout=30)


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=400)
    return job.returncode, output


def until(path: Path, job: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)


def job_of_a_free_port() -> str:
    """A job number whose rendezvous port nobody holds."""
    for number in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", 20_000 + number))
            except OSError:
                continue
            return str(number)
    raise AssertionError("no free port")
