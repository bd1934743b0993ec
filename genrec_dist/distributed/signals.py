"""Signals that ask a run to stop, and the exceptions with which it ends."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A signal asked the run to stop; what it can be resumed from is written."""

    def __init__(
        self, number: int, saved: str = "checkpoint written", remedy: str = "--resume latest"
    ):
        super().__init__(f"stopped by {signal.Signals(number).name}, {saved}")
        self.number, self.remedy = number, remedy


class Terminated(BaseException):
    """SIGTERM reached a command that has nothing to save; temporary files are removed on the way
    out."""


def terminate(number: int, frame: FrameType | None) -> None:
    """A signal handler that raises Terminated. By default SIGTERM ends a process at once, and
    leaves its temporary files."""
    raise Terminated


class NotFinite(ValueError):
    """The loss became NaN or infinite."""


class StopRequest:
    """Context that records SIGTERM and SIGINT in `number`, so that the run can save first; a second
    SIGINT ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        except ValueError:  # not in the main thread: the caller's process handles signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def ignore_signals(_: int) -> None:
    """For workers that prepare batches: launchers and terminals signal the whole process group, but
    only the trainer ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
