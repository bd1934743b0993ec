"""Files and directories that are complete or absent: temporary name, fsync, rename."""

import contextlib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STALE_SECONDS = 24 * 3600
"""How long nothing touches the temporary directory of a process on another machine before it counts
as left over."""

_reading_umask = threading.Lock()


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`; what is written there becomes `path` when
    the block ends well.

    The parent directory is made if it is missing; an existing file is replaced in one step. When
    the block raises, the temporary file is removed and `path` stays as it was. The file gets the
    mode that `open` gives, whatever wrote it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path, "tmp")
    try:
        with system_errors(path):
            yield temporary
        temporary.chmod(_ordinary_mode())
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_target(error, temporary, path)
        raise
    _fsync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8, as `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Write a file of JSON, as `atomic_file`. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(
    path: str | Path, overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Yield a new temporary directory beside `path` that takes the name `path` when the block ends
    well. What a killed process left of the same `path` is removed first.

    Args:
        path: the final name; an empty directory may be there.
        overwrite: replace a full directory, which is moved aside and removed only after the new one
            has its name.
        marker: a file or folder that the replaced directory must hold, so that a slip of the pen
            cannot delete somebody's home.

    Raises:
        ValueError: `path` exists and may not be replaced; before the block runs.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{path} exists and is not a directory: choose another output")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            remedy = "choose another output, or overwrite it with --overwrite"
            raise ValueError(f"{path} exists: {remedy}")
        if marker is not None and not (path / marker).exists():
            reason = f"holds no {marker}, so it is not ours to overwrite"
            raise ValueError(f"{path} {reason}: choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    with contextlib.ExitStack() as held:
        temporary = _new_locked_directory(path, held)
        try:
            with system_errors(path):
                yield temporary
            mode = _ordinary_mode()
            for folder, _, names in os.walk(temporary):
                for name in names:
                    (Path(folder) / name).chmod(mode)
                for name in (*names, "."):
                    _fsync(Path(folder) / name)
            _take_name(temporary, path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            _name_target(error, temporary, path)
            raise


def remove_directory(path: Path) -> None:
    """Remove a directory that no longer bears its name while it is in parts, so that a kill leaves
    all of it or what counts as left over."""
    aside = _temporary_sibling(path, "tmp")
    os.rename(path, aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Context in which a full disk is an OSError that names `path`, also where a Rust library
    (safetensors, tokenizers) raises an exception of its own: those have the number in their text,
    as in "No space left on device (os error 28)"."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else 0
        if isinstance(error, OSError) or number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _ordinary_mode() -> int:
    """The mode that `open` gives a new file; safetensors gives 0600."""
    with _reading_umask:  # it is read by setting it, which two threads must not do at once
        umask = os.umask(0o077)
        os.umask(umask)
    return 0o666 & ~umask


def _new_locked_directory(path: Path, held: contextlib.ExitStack) -> Path:
    """A new directory beside `path`, locked for as long as this process lives and `held` is
    open."""
    while True:
        temporary = _temporary_sibling(path, "tmp")
        try:
            temporary.mkdir()
        except OSError as error:
            _name_target(error, temporary, path)
            raise
        # Until it is locked, another process may take it for one that is left over.
        with contextlib.suppress(FileNotFoundError):
            if held.enter_context(_locked(temporary)) is not False and temporary.exists():
                return temporary


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool | None]:
    """Whether the directory is now locked by us; None where its file system has no locks.

    The kernel releases a lock when its process ends, however it ends; a forked child that lives on
    keeps it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = False
        except OSError:
            found = None
        yield found
    finally:
        os.close(descriptor)


def _remove_left_over(path: Path) -> None:
    """Remove temporary directories of processes that are gone.

    Of this machine since it started: those without a lock. Of others, whose locks may not be seen
    here: those that nothing has touched for a day besides. A directory put aside (`.old`) stays: it
    can be the only copy there is."""
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+\.(?:([0-9a-f]{8})-)?[0-9a-f]{8}\.tmp")
    for folder in path.parent.iterdir():
        name = ours.fullmatch(folder.name)
        if name is None or folder.is_symlink() or not folder.is_dir():
            continue
        # Another process may do the same, and another user may own it.
        with contextlib.suppress(OSError), _locked(folder) as lock:
            if lock is False:
                continue
            if lock is None or name[1] != _machine():
                touched = max(one.stat().st_mtime for one in (folder, *folder.iterdir()))
                if time.time() - touched <= STALE_SECONDS:
                    continue
            shutil.rmtree(folder, ignore_errors=True)


def sweep_killed_writers(folder: Path, *patterns: str) -> None:
    """Remove what killed writers have left in a folder.

    A directory that was put aside gets its name back where no other one has taken it.

    Args:
        folder: need not be there.
        patterns: final names, as of `fnmatch`, that nobody writes without the lock that the caller
            holds. Of other names only what a process that is gone has left is removed; whether one
            of another machine is gone cannot be seen, so of those what nothing has touched for a
            day.
    """
    # Newest first: of two that were put aside the later one is the one to keep.
    found = sorted(folder.glob(".*"), key=_touched, reverse=True)
    for path in found:
        name = _HIDDEN.fullmatch(path.name)
        if name is None:
            continue
        if any(fnmatch.fnmatchcase(name["of"], each) for each in patterns):
            _clear_away(path, folder / name["of"], name["ending"])
        elif _is_gone(path, int(name["pid"]), name["machine"]):
            # Another process may do the same, and another user may own it.
            with contextlib.suppress(OSError):
                _clear_away(path, folder / name["of"], name["ending"])


def _clear_away(path: Path, final: Path, ending: str) -> None:
    if ending == "old" and not os.path.lexists(final):
        os.rename(path, final)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_gone(path: Path, pid: int, machine: str | None) -> bool:
    """Whether the process that has made a temporary file or directory has ended."""
    if machine != _machine():
        return time.time() - _touched(path) > STALE_SECONDS
    try:
        os.kill(pid, 0)  # asks alone
    except ProcessLookupError:
        if not path.is_dir():
            return True
        # A container has process numbers of its own, and sees the lock all the same.
        with contextlib.suppress(OSError), _locked(path) as lock:
            return lock is not False
    except OSError:  # another user's
        pass
    return False


def _touched(path: Path) -> float:
    """When a file or directory was last written; 0 where it is gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


_HIDDEN = re.compile(
    r"\.(?P<of>.+)\.(?P<pid>\d+)\.((?P<machine>[0-9a-f]{8})-)?[0-9a-f]{8}\.(?P<ending>tmp|old)"
)
"""A name of `_temporary_sibling`."""


@functools.cache
def _machine() -> str:
    """Eight letters of this machine since it started."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = platform.node()
    return hashlib.sha256(f"{platform.node()} {boot}".encode()).hexdigest()[:8]


def _take_name(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; two renames where a full directory is there, since POSIX has no
    swap of two names."""
    aside = _temporary_sibling(path, "old") if path.exists() else None
    if aside is not None:
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        if aside is not None:
            os.rename(aside, path)
        raise
    _fsync(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _name_target(error: BaseException, temporary: Path, path: Path) -> None:
    """Let an error of the system name the file that was to be written: a full disk names none,
    other errors the temporary one."""
    if not isinstance(error, OSError):
        return
    if not str(error.filename or temporary).startswith(str(temporary)):
        return
    if error.errno is None:
        # numpy's short writes: words alone, which str() would drop beside a file name.
        error.args = (f"{path}: {error}",)
    else:
        error.filename = str(path)


def _temporary_sibling(path: Path, ending: str) -> Path:
    """The leading dot hides it from globs, pid and machine name its owner, the random part keeps
    threads apart."""
    return path.parent / f".{path.name}.{os.getpid()}.{_machine()}-{uuid.uuid4().hex[:8]}.{ending}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
