"""Files and directories that are complete or absent: temporary name, fsync, rename."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`; what is written there becomes `path` when the block ends well.

    The parent directory is made if it is missing; an existing file is replaced in one step. When the block raises,
    the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path, "tmp")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_place(error, temporary, path)
        raise
    _fsync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield a new temporary directory beside `path` that takes the name `path` when the block ends well.

    `overwrite=False` refuses a `path` that exists (an empty directory is fine). With `overwrite=True` the old directory
    is moved aside and removed only after the new one bears the name; `marker` names a file or folder it must hold, so
    that a slip of the pen cannot delete somebody's home. Raises ValueError for both refusals, before the block runs.
    """
    path = Path(path)
    _refuse_existing(path, overwrite, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path, "tmp")
    try:
        temporary.mkdir()
        yield temporary
        _fsync_tree(temporary)
        _take_name(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name_place(error, temporary, path)
        raise


def _refuse_existing(path: Path, overwrite: bool, marker: str | None) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ValueError(f"{path} exists and is not a directory: choose another output")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{path} exists: choose another output, or overwrite it with --overwrite")
    if marker is not None and not (path / marker).exists():
        raise ValueError(f"{path} holds no {marker}, so it is not ours to overwrite: choose another output")


def _take_name(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; two renames where a full directory stood, since POSIX has no swap of two names."""
    if not path.exists():
        os.rename(temporary, path)
        _fsync(path.parent)
        return
    aside = _temporary_sibling(path, "old")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _name_place(error: BaseException, temporary: Path, path: Path) -> None:
    """Let an error of the system name what was to be written: a full disk names no file, others the temporary one."""
    if not isinstance(error, OSError) or not str(error.filename or temporary).startswith(str(temporary)):
        return
    if error.errno is None:  # numpy's short writes: words alone, which str() would drop beside a file name
        error.args = (f"{path}: {error}",)
    else:
        error.filename = str(path)


def _temporary_sibling(path: Path, ending: str) -> Path:
    """The leading dot hides it from globs, the pid tells whose it is, the random part keeps threads apart."""
    return path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.{ending}"


def _fsync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _fsync(Path(folder) / name)
        _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
