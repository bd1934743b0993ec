"""How a run is asked to stop, and how it says that it did."""

from __future__ import annotations

import signal


class Stopped(Exception):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}, checkpoint written")
        self.number = number


class NotFinite(ValueError):
    """The loss became NaN or infinite."""
