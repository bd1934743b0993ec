"""A lock file that is released when its holder ends, so that two processes never write one
directory."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

LOCK_FILE = ".lock"
"""Name of the lock file of a directory."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems without locks answer."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@contextlib.contextmanager
def hold(path: Path, who: str, wait: float = 0.0) -> Iterator[int]:
    """Hold the lock file `path` and yield its descriptor; a program that is started with the
    descriptor (`pass_fds`) holds the lock too, a forked worker does not.

    The system releases the lock when the last process that has the file open is gone, killed or
    not. What a killed process leaves of the file blocks nobody. On a file system without locks
    nobody is refused.

    Args:
        path: the lock file; it and its directory are created, and at the end removed: the
            directory where it was made here and is empty.
        who: who may hold it, for the message.
        wait: seconds to wait for another holder to end.

    Raises:
        ValueError: another process still holds the lock after `wait` seconds; names its process,
            host and since when, as far as it has written them.
        OSError: the lock file cannot be made; names the directory.
    """
    deadline = time.monotonic() + wait
    is_new = not path.parent.exists()
    while (lock := _locked(path)) is None:
        if time.monotonic() >= deadline:
            raise ValueError(f"{path}: {who}{_holder(path)}: wait for its end, or end it")
        time.sleep(0.1)
    _held.add(lock)
    try:
        yield lock
    finally:
        if lock in _held:  # not in a forked child
            # Removed while it is held: whoever has opened it meanwhile sees that it is gone.
            with contextlib.suppress(OSError):
                path.unlink()
                if is_new:
                    path.parent.rmdir()
            _held.discard(lock)
            os.close(lock)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock, with the holder's name in the file; None where another
    process holds it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # its last holder has removed the directory
            continue
        except OSError as error:
            error.filename = str(path.parent)
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                break
        os.close(lock)  # its last holder has removed the file
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    name = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(lock, 0)
        os.write(lock, name.encode())
    return lock


def _holder(path: Path) -> str:
    """` (process P on HOST since TIME)`, or "" where the file does not say."""
    time.sleep(0.05)  # it writes its name after it has the lock
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    name = "".join(letter for letter in text[:200] if letter.isprintable())
    return f" ({name})" if name else ""


def _release_in_child() -> None:
    """A forked worker that outlives its killed parent would hold the lock for it."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
