"""Signals that ask a run to stop, and the exceptions with which it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to stop: a scheduler's, Ctrl-C, and that of a terminal that is closed."""


class Stopped(Exception):
    """A signal asked the run to stop; what it can be resumed from is written."""

    def __init__(
        self, number: int, saved: str = "checkpoint written", remedy: str = "--resume latest"
    ):
        super().__init__(f"stopped by {signal.Signals(number).name}, {saved}")
        self.number, self.remedy = number, remedy


class Terminated(BaseException):
    """SIGTERM or SIGHUP (`number`) reached a command that has nothing to save, or a second SIGINT
    one that is to end without it; temporary files are removed on the way out."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise Terminated. By default they end a process at once,
    and leave its temporary files."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {
        number: signal.signal(number, terminate)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if not _is_ignored(number)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class NotFinite(ValueError):
    """The loss became NaN or infinite."""


HAS_GONE = " has gone ("
"""In the message of `RankGone`, between the rank and the reason."""


class RankGone(ValueError):
    """Another rank is no longer there. The input is not to blame: another attempt may succeed."""

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0."""
        return str(self).startswith(f"rank 0{HAS_GONE}")


@contextlib.contextmanager
def speaking_last() -> Iterator[None]:
    """Context after which a rank that has lost another one takes no SIGTERM: the launcher sends it
    to all ranks when one is gone, and this one still has to say which."""
    try:
        yield
    except RankGone:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


class StopRequest:
    """Context that records the first of SIGTERM, SIGINT and SIGHUP in `number`, so that the run can
    save first; a SIGINT after it ends the run at once."""

    def __init__(self) -> None:
        self.number = 0
        self.on_first: Callable[[int], None] | None = None
        """Called once with the first signal, from another thread, as soon as it comes: the main
        thread learns of signals only between two operations, and a backward pass takes seconds."""
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def __enter__(self) -> StopRequest:
        try:
            self._before = {
                number: signal.signal(number, self._note)
                for number in STOPPING
                if not _is_ignored(number)
            }
        except ValueError:  # not in the main thread: the caller's process handles signals
            self._before = {}
            return self
        # Python's own handler, in C, writes the number of each signal into the pipe at once.
        self._pipe = reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        # With a rank gone, signals are still noted on the way to `speaking_last`.
        for number, handler in self._before.items() if not isinstance(error, RankGone) else ():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # ends the thread
            self._pipe = None

    def _watch(self, reader: int) -> None:
        """Call `on_first` at the first signal, until the other end of the pipe is closed."""
        is_first = True
        while numbers := os.read(reader, 64):
            number = next((number for number in numbers if number in STOPPING), 0)
            if number and is_first and self.on_first is not None:
                self.on_first(number)
            is_first = is_first and not number
        os.close(reader)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise Terminated(number)  # of a KeyboardInterrupt typer would say nothing
        self.number = self.number or number


def ignore_signals(_: int) -> None:
    """For workers that prepare batches: launchers and terminals signal the whole process group, but
    only the trainer ends its workers."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _is_ignored(number: int) -> bool:
    """Whether `nohup` has asked for a run that survives its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
