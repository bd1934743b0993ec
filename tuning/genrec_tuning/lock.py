"""A lock that its holder's death opens: two processes never write one run."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hold(path: Path, wait: float, who: str) -> Iterator[int]:
    """Hold the lock file `path` and give its descriptor; a child that inherits it holds the lock too.

    Raises OSError naming `who` where another process still has it after `wait` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        _take(file.fileno(), time.monotonic() + wait, f"{path}: {who}")
        yield file.fileno()


def _take(descriptor: int, deadline: float, message: str) -> None:
    while True:
        try:
            # The system opens it when the last process that has the file is gone, killed or not.
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(message) from None
        time.sleep(0.1)
