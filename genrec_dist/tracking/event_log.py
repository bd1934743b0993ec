"""The events of a run, in `events.jsonl`, TensorBoard and its trackers, and its `status.json`."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genrec_shards.atomic import write_text
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from genrec_dist.config.recipe import Recipe
from genrec_dist.tracking.trackers import Trackers


class EventLog:
    """Appends one JSON object per line; numbers of steps and validations also go to TensorBoard,
    and with the final judgement to the run's trackers. `active=False` (other ranks) writes nothing.

    Nothing is buffered, so that a full disk is an error of the event that met it. For the same
    reason TensorBoard's records are written here: its own writer has a thread, which prints a
    traceback."""

    def __init__(
        self,
        run: Path,
        active: bool = True,
        *,
        tensorboard: bool = True,
        trackers: Trackers | None = None,
    ):
        """Raises OSError, naming the file."""
        self.active, self.trackers = active, trackers
        if not active:
            return
        self.file = _Appended(run / "events.jsonl")
        self.board: RecordWriter | None = None
        if not tensorboard:
            return
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest}"
        self.board_file = _Appended(run / "tensorboard" / name)
        self.board = RecordWriter(self.board_file)
        self.board.write(Event(wall_time=seconds, file_version="brain.Event:2").SerializeToString())

    def write(self, event: str, **fields: Any) -> None:
        """Append an event, with the time. Raises OSError, naming the file."""
        if not self.active:
            return
        now = time.time()
        line = {"time": round(now, 3), "event": event, **fields}
        self.file.write((json.dumps(line, allow_nan=False, default=str) + "\n").encode())
        if self.trackers is not None and event in ("step", "validation", "judgement"):
            self.trackers.log(event, fields)
        if self.board is not None and event in ("step", "validation"):
            for name, value in fields.items():
                if isinstance(value, float):
                    summary = scalar(f"{event}/{name}", value)
                    record = Event(wall_time=now, step=fields["step"], summary=summary)
                    self.board.write(record.SerializeToString())

    def close(self) -> None:
        """Close the files, and the trackers that were not finished, as those of a failed run."""
        if not self.active:
            return
        self.file.close()
        if self.board is not None:
            self.board_file.close()
        if self.trackers is not None:
            self.trackers.finish(None, failed=True)


def log_of(recipe: Recipe, is_main: bool, warn: Callable[[str], None]) -> EventLog:
    """The log of a run with what its recipe names as `tracker`; `warn` as of `Trackers`. Raises
    OSError, naming the file."""
    run, names = Path(recipe.run), recipe.tracker
    trackers = Trackers(names, run, recipe.as_dict(), warn) if is_main else None
    return EventLog(run, is_main, tensorboard="tensorboard" in names, trackers=trackers)


def write_status(run: Path, status: str, **facts: object) -> None:
    """Write `status.json`: how a run ended, whatever its launcher returned."""
    text = json.dumps({"status": status, "pid": os.getpid(), **facts}, indent=1)
    path = run / "status.json"
    try:
        write_text(path, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.is_file():
            raise
        # There is no room for a second file. The block of the first one is there: one write of at
        # least its length, all of it or nothing, needs no other.
        with path.open("r+b", buffering=0) as file:
            file.write(text.encode().ljust(path.stat().st_size))


class _Appended:
    """A file that is only added to: what is written is in it, or OSError names it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("a+b", buffering=0)
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self.write(b"\n")  # the last line was torn by a kill or a full disk

    def write(self, data: bytes) -> None:
        """Add all of `data`."""
        try:
            while data:  # of the last bytes on a disk a part is taken; the rest says why not
                data = data[self.file.write(data) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        self.file.close()
