"""A lock file that is released when its holder ends, so that two processes never write one
directory."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hold(path: Path, who: str, wait: float = 0.0) -> Iterator[int]:
    """Hold the lock file `path` and yield its descriptor; a child that inherits the descriptor
    holds the lock too.

    The system releases the lock when the last process that has the file open is gone, killed or
    not.

    Args:
        path: the lock file; it and its directory are created.
        who: who may hold it, for the message.
        wait: seconds to wait for another holder to end.

    Raises:
        ValueError: another process still holds the lock after `wait` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ValueError(f"{path}: {who}: wait for its end, or end it") from None
            time.sleep(0.1)
        yield file.fileno()
