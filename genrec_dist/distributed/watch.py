"""What each rank of a run is doing, in a file, and the name of a rank that takes no step any more.

A rank that is killed is named at once by its closed connection (`collectives.Ranks`). One that
hangs, in a read of a dead file system or in a device's driver, keeps its connections, and the
others wait."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "ranks"
"""Of the run directory: `rank-R.json` of each rank."""
SECONDS_VARIABLE = "GENREC_STUCK_SECONDS"
"""How long no step may end before the run does; unset or 0: for ever. The launch files set it."""
VALIDATING, VALIDATED = "validating", "waiting for the other ranks to validate"
_IN_ORDER = (
    "waiting for a batch",
    "waiting for the other ranks",
    "computing",
    VALIDATING,
    VALIDATED,
)
"""What a rank does with a step, in this order."""


class RankWatch:
    """Context in which a thread writes once a second what this rank does, and ends the process in
    one line when it has done that for too long. From `beat` to `pause` alone: writing `best/` and
    the end of a run may take as long as they do, and the others wait for that."""

    def __init__(
        self,
        run: Path,
        rank: int,
        size: int,
        on_stuck: Callable[[str], None],
        environ: Mapping[str, str] = os.environ,
    ):
        """
        Args:
            run: the run directory, which all ranks see.
            rank: this one.
            size: how many there are; of a process alone nothing is written.
            on_stuck: called with the reason, in another thread, before this process ends.
            environ: with the seconds, and whether NCCL's flight recorder is on.
        """
        self.run, self.rank, self.size, self.environ = run, rank, size, environ
        self.on_stuck = on_stuck
        self.seconds = float(environ.get(SECONDS_VARIABLE) or 0)
        self._now: tuple[int, str, float] = (-1, "starting", time.time())
        self._ended = threading.Event()

    def beat(self, step: int, doing: str) -> None:
        """This rank begins to do this with the global step `step`."""
        self._now = (step, doing, time.time())

    def pause(self, step: int, doing: str) -> None:
        """What follows is not watched."""
        self._now = (step, doing, 0.0)

    def __enter__(self) -> RankWatch:
        if self.size > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while True:
            step, doing, since = self._now
            with contextlib.suppress(OSError):  # the training itself says that a disk is full
                self._write(step, doing, since)
            late = time.time() - self.seconds
            if (
                self.seconds
                and 0 < since < late
                and (stuck := stuck_ranks(self.run, self.size, late))
            ):
                self._end(stuck)
            if self._ended.wait(1.0):
                return

    def _write(self, step: int, doing: str, since: float) -> None:
        path = self.run / FOLDER / f"rank-{self.rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"step": step, "doing": doing, "since": since, "time": time.time()}
        facts |= {"pid": os.getpid(), "host": socket.gethostname()}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        temporary.replace(path)

    def _end(self, stuck: str) -> None:
        """Say which rank is stuck, and end this process; a launcher ends the others."""
        line = f"no step for {self.seconds:g} s: {stuck}{self._dump()}"
        sys.stderr.write(f"genrec: {line}\n")
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            self.on_stuck(line)
        os._exit(1)

    def _dump(self) -> str:
        """Where NCCL's flight recorder, if it is on, leaves what each rank had begun."""
        names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
        if not any(int(self.environ.get(name) or 0) for name in names):
            return ""
        files = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
        given = [self.environ[name] for name in files if self.environ.get(name)]
        prefix = given[0] if given else "/tmp/nccl_trace_rank_"
        return f"; NCCL's flight recorder is on, its dump is {prefix}{self.rank} on each host"


def stuck_ranks(run: Path, size: int, late: float) -> str:
    """Which ranks are the furthest back, with their last step, by the files of all ranks.

    An example: rank 1 is computing step 7, ranks 0 and 2 are waiting for the other ranks at step 8.
    Rank 1 is named.

    Args:
        run: the run directory.
        size: how many ranks there are.
        late: a rank is stuck that has done the same since before this time, and so is one that has
            written nothing since, whatever it wrote.

    Returns:
        One line; empty where one of those behind has begun something since, as the next batch of
        its validation, or does what may take long, as rank 0 when it writes `best/`.
    """
    found: dict[int, dict[str, Any]] = {}
    for rank in range(size):
        with contextlib.suppress(OSError, ValueError):
            text = (run / FOLDER / f"rank-{rank:05d}.json").read_text(encoding="utf-8")
            found[rank] = json.loads(text)
    missing = [str(rank) for rank in range(size) if rank not in found]
    if missing:
        return f"rank {', '.join(missing)} has not begun its first step"

    def place(rank: int) -> tuple[int, int]:
        doing = found[rank]["doing"]
        within = _IN_ORDER.index(doing) if doing in _IN_ORDER else len(_IN_ORDER)
        return found[rank]["step"], within

    last = min(map(place, found))
    behind = [rank for rank in found if place(rank) == last]
    if not all(0 < found[rank]["since"] < late or found[rank]["time"] < late for rank in behind):
        return ""
    named = "; ".join(
        f"rank {rank} is stuck {found[rank]['doing']} at step {found[rank]['step']} (process "
        f"{found[rank]['pid']} on {found[rank]['host']})"
        for rank in behind
    )
    others = size - len(behind)
    return named + (f"; {others} further on" if others else "; no rank is further on")
