"""Writes checkpoints in a thread, so that the training goes on meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path

import torch
from genrec_shards.atomic import atomic_directory, remove_directory
from torch import Tensor

from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.training.checkpoint import State, list_checkpoints
from genrec_dist.training.checkpoint_state import Progress, StateFile, write_state
from genrec_dist.training.saving.tensor_file import HostCopies, TensorFile, write_tensors

ABANDON_SECONDS = 10.0
"""How long a writing that is given up may take to notice it."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has its name."""

    path: Path
    step: int
    seconds: float
    """From the copy until it had its name."""


@dataclass(frozen=True)
class Copied:
    """What a checkpoint stores of this rank, as it was when it was copied."""

    files: list[TensorFile]
    progress: Progress
    identity: dict[str, str]
    optimizer_step: Tensor
    started: float
    """`time.monotonic`."""


class Abandoned(Exception):
    """The training has no more use for the checkpoint that was being written."""


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread, from a copy of what it stores.

    Each rank writes the segments of weights and moments that it owns, so nothing is gathered, and
    any number of ranks at any ZeRO stage can read them. The threads of the ranks meet by
    connections of their own: when all have their bytes on the disk, rank 0 gives the directory its
    name, and only then removes the oldest. If one rank cannot write, all threads end with an error,
    and nothing is left."""

    def __init__(self, recipe: Recipe):
        """Collective. All ranks see the recipe's run directory."""
        self.run, self.keep = Path(recipe.run), recipe.keep_checkpoints
        self._ranks = Ranks(own_group=True)
        self._copies = HostCopies()
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Saved] | None = None
        self._give_up = threading.Event()
        """Of the checkpoint that is being written."""

    @property
    def has_ended(self) -> bool:
        """Whether a checkpoint was begun whose writing has ended, well or not."""
        return self._writing is not None and self._writing.done()

    def start(self, state: State) -> None:
        """Copy what a checkpoint stores of this rank and have it written. All ranks start the same
        ones, each after `finish`."""
        assert self._writing is None, "one at a time"
        started = time.monotonic()
        files = _files_of(state, self._ranks)
        tensors = {
            f"{file.name} {name}": tensor for file in files for name, tensor in file.tensors.items()
        }
        moments = state.engine.optimizer.state.get(state.engine.masters[0], {})
        tensors["step"] = moments["step"] if "step" in moments else torch.zeros(())
        copies = self._copies.take(tensors)
        copied = Copied(
            files=[
                dataclasses.replace(
                    file, tensors={name: copies[f"{file.name} {name}"] for name in file.tensors}
                )
                for file in files
            ],
            progress=dataclasses.replace(state.progress),
            identity=state.identity,
            optimizer_step=copies["step"],
            started=started,
        )
        self._give_up = threading.Event()
        self._writing = self._threads.submit(self._write, copied, self._give_up)

    def finish(self) -> Saved | None:
        """Wait for the checkpoint that is being written; None where there is none.

        Raises:
            OSError, ValueError: it could not be written; the same on all ranks.
            RankGone: another rank is no longer there.
        """
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def abandon(self) -> None:
        """Give up the checkpoint that is being written, if it does not just get its name."""
        if self._writing is not None:
            self._give_up.set()
            wait_for([self._writing], timeout=ABANDON_SECONDS)
            self._writing = None

    def _write(self, copied: Copied, give_up: threading.Event) -> Saved:
        """What the thread does. Collective."""
        ranks = self._ranks
        path = self.run / "checkpoints" / f"step-{copied.progress.step:08d}"

        def check() -> None:
            if give_up.is_set():
                raise Abandoned(f"{path}: given up")

        self._copies.wait()
        with contextlib.ExitStack() as stack:

            def open_folder() -> str:
                if not ranks.is_main:
                    return ""
                return str(stack.enter_context(atomic_directory(path, overwrite=True)))

            folder = Path(ranks.broadcast_str(ranks.run_on_all(open_folder)))
            written = ranks.run_on_all(lambda: _write_files(folder, path, copied.files, check))
            files = ranks.all_gather_str(json.dumps(written))
            ranks.run_on_all(lambda: _write_facts(folder, copied, files) if ranks.is_main else None)
            ranks.run_on_all(check)
            ranks.run_on_all(stack.close)  # the directory gets its name
        seconds = time.monotonic() - copied.started
        ranks.run_on_all(lambda: self._remove_oldest() if ranks.is_main else None)
        return Saved(path, copied.progress.step, seconds)

    def _remove_oldest(self) -> None:
        for old in list_checkpoints(self.run)[: -self.keep]:
            remove_directory(old)


def _files_of(state: State, ranks: Ranks) -> list[TensorFile]:
    """What this rank stores; no file where other ranks hold all that this one holds."""
    engine, files = state.engine, state.tables.files()
    if not engine.segments:
        return files
    # Of each master: its values, the optimiser's moments, the running average.
    kinds = {"weight": engine.masters}
    for key in engine.optimizer.state.get(engine.masters[0], {}):
        if key != "step":
            kinds[key] = [engine.optimizer.state[master][key] for master in engine.masters]
    if state.average is not None:
        kinds["average"] = state.average.values
    held = sorted({segment.master for segment in engine.segments})
    tensors = {
        f"{kind}.{master}": values[master].detach().reshape(-1)
        for kind, values in kinds.items()
        for master in held
    }
    name = f"rank-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
    table = [dataclasses.astuple(segment) for segment in engine.segments]
    return [*files, TensorFile(name, tensors, {"fragments": json.dumps(table)})]


def _write_files(
    folder: Path, path: Path, files: list[TensorFile], check: Callable[[], None]
) -> list[StateFile]:
    """Write this rank's files into `folder`, which is to become `path`."""
    entries = []
    for file in files:
        try:
            size, sha256 = write_tensors(folder, file, check)
        except OSError as error:
            error.filename = str(path)  # of a full disk the system names no file
            raise
        entries.append(StateFile(name=file.name, bytes=size, sha256=sha256))
    return entries


def _write_facts(folder: Path, copied: Copied, files_of_ranks: list[str]) -> None:
    files: list[StateFile] = [file for entries in files_of_ranks for file in json.loads(entries)]
    for file in files:
        path = folder / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise ValueError(
                f"{path}: written by its rank, not seen by rank 0: the run has to lie where all "
                "nodes see it"
            )
    step = int(copied.optimizer_step)
    write_state(folder, copied.progress, copied.identity, step, files)
