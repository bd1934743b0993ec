"""When a command has to end: after a budget of minutes, or a signal."""

from __future__ import annotations

import time

from genrec_dist.distributed.signals import Stopped, StopRequest

REMEDY = "the same command"


class OutOfTime(Exception):
    """The budget is used up; finished work and checkpoints stay."""


class Deadline:
    """A time limit and the signals SIGTERM and SIGINT, checked between two pieces of work."""

    def __init__(self, minutes: float | None = None):
        """`minutes` from now; None: no limit."""
        self.minutes = minutes
        self.stop = StopRequest()
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def is_due(self) -> bool:
        """Whether the work has to end now."""
        return bool(self.stop.number) or (self._end is not None and time.monotonic() >= self._end)

    def check(self) -> None:
        """Do nothing before the deadline.

        Raises:
            Stopped: after a signal.
            OutOfTime: when the minutes are over.
        """
        if self.stop.number:
            raise Stopped(self.stop.number, "what is finished or in a checkpoint stays", REMEDY)
        if self.is_due:
            raise OutOfTime(f"{self.minutes:g} minutes are over")
