"""`python ARGUMENTS` in a process of its own that has the libraries loaded already: forked off a
server that did so once.

Loading torch, transformers and accelerate takes seconds of a core a process, more than most tests
do with it. What is forked here is as much a process as any: its own environment, working directory,
standard streams, signals and exit code. It shares with its siblings what a fresh interpreter draws
anew, the seed of hashes alone; tests of launchers and of the installed command start those. What a
library reads of the environment while it is loaded, as Triton its interpreter's switch, has to be
the same for all."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

# None of these starts a thread of Python's; pyarrow's allocator has one, and knows of forks.
# Saving a model imports DeepSpeed where it is installed, and pyarrow pandas: each training would
# load them anew, which takes five times as long as what it learns.
LOADED = [
    "genrec_dist.cli.app",
    "genrec_dist.training.run",
    "genrec_dist.inference.export_lists",
    "genrec_dist.inference.recommend",
    "genrec_dist.report.run_report",
    "deepspeed",
    "pandas",
    "polars",
    "pydantic.type_adapter",
    "scipy.sparse",
    "transformers.models.bart.modeling_bart",
    "typer._adapters",
]
_CONTEXT = multiprocessing.get_context("forkserver")


class Started:
    """A process under way; its outputs are files."""

    def __init__(self, arguments: Sequence[str | Path], out: Path, err: Path, env: dict[str, str]):
        """`arguments`: `[path, argument, ...]` or `["-m", name, argument, ...]`; `env`: the whole
        environment."""
        load(env)
        self.arguments, self.out, self.err = list(map(str, arguments)), out, err
        self._process = _CONTEXT.Process(
            target=_become, args=(self.arguments, str(out), str(err), env)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Raises TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(
                self.arguments, timeout, self.out.read_bytes(), self.err.read_bytes()
            )
        return subprocess.CompletedProcess(
            self.arguments, code, self.out.read_text(), self.err.read_text()
        )

    def kill(self) -> None:
        """Also where it has ended already."""
        self._process.kill()
        self._process.join()


def run(
    arguments: Sequence[str | Path], env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, outputs captured."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        process = Started(arguments, Path(folder, "out"), Path(folder, "err"), env)
        try:
            return process.wait(timeout)
        finally:
            process.kill()


def load(env: dict[str, str]) -> None:
    """See that the server is there, with as many threads as `env` says; it is this process's only
    one for multiprocessing too."""
    before = dict(os.environ)
    _CONTEXT.set_forkserver_preload(LOADED)
    os.environ["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed would look for a GPU, and none could fork
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _become(arguments: list[str], out: str, err: str, env: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR may be another one
    multiprocessing.set_start_method(None, force=True)  # its own children start as anybody's do
    if arguments[0] == "-m":
        name, sys.argv = arguments[1], arguments[1:]
        sys.modules.pop(name, None)  # or runpy would warn that it is there twice
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
