"""How a run is asked to stop, and how it says that it did."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """A signal asked the run to stop; what it can go on from is written."""

    def __init__(
        self, number: int, saved: str = "checkpoint written", remedy: str = "--resume latest"
    ):
        super().__init__(f"stopped by {signal.Signals(number).name}, {saved}")
        self.number, self.remedy = number, remedy


class Terminated(BaseException):
    """SIGTERM reached a command that has nothing to save: it tidies up on its way out."""


def terminate(number: int, frame: FrameType | None) -> None:
    """A signal handler. Left to itself SIGTERM ends a process at once, and what it was writing
    stays behind."""
    raise Terminated


class NotFinite(ValueError):
    """The loss became NaN or infinite."""


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered, so that the run can save first; a second SIGINT
    ends at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            self._before = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def ignore_signals(_: int) -> None:
    """For workers that prepare batches: launchers and terminals signal the whole group, the trainer
    alone ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
