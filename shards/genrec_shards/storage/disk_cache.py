"""Records that the processes of a node share on its disk: a bounded number of bytes, the longest
unused goes first."""

import contextlib
import fcntl
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from genrec_shards.atomic import atomic_file

DEFAULT_BYTES = 20 << 30
# Eviction makes room for more than the one record, since it looks at every file.
_FILL_AFTER_EVICTION = 0.9
# Files whose locks stand for a record each; two records may share one, which costs a wait and
# nothing else.
_NUM_TURNS = 64
_POLL_SECONDS = 0.01


class NodeCache:
    """Files of known sha256 under one directory, for any number of processes at once.

    A process may be killed at any moment: files come by rename, locks are the kernel's and go with
    their holder, the count of bytes is raised before a file is written, and what is read is
    believed only if its sha256 agrees."""

    def __init__(self, directory: str | Path | None = None, max_bytes: int | None = None) -> None:
        """By default GENREC_CACHE (`~/.cache/genrec`) and GENREC_CACHE_BYTES (20 GiB); 0 bytes:
        nothing is kept.

        Raises ValueError naming the directory where it cannot be made, or the variable that is no
        number."""
        self.directory = Path(directory) if directory is not None else _default_directory()
        self.max_bytes = _default_bytes() if max_bytes is None else max_bytes
        if self.max_bytes < 0:
            raise ValueError(f"a cache of {self.max_bytes} bytes: give 0 to keep nothing")
        if self.max_bytes == 0:
            return
        try:
            (self.directory / "locks").mkdir(parents=True, exist_ok=True)
            (self.directory / "files").mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.directory}: the cache of remote shards cannot be made ({error.strerror}): "
                "set GENREC_CACHE to a directory on this node's disk, or GENREC_CACHE_BYTES=0"
            ) from None

    def get(
        self, key: str, sha256: str, fetch: Callable[[], bytes], patience: float
    ) -> tuple[bytes, bool]:
        """(the bytes, whether they were here). `fetch` brings what is missing; its sha256 is the
        caller's to check.

        `key`: `set/name`, a relative path. Of several processes that miss the same key one fetches
        and the others wait for it, `patience` seconds at most: then they fetch for themselves."""
        if self.max_bytes == 0:
            return fetch(), False
        path = self.directory / "files" / key
        data = _whole(path, sha256)
        if data is not None:
            return data, True
        with self._locked(
            f"turn-{int(hashlib.sha256(key.encode()).hexdigest(), 16) % _NUM_TURNS:02d}", patience
        ):
            data = _whole(path, sha256)
            if data is not None:
                return data, True
            data = fetch()
            try:
                self._keep(path, data, patience)
            except OSError as error:
                # A disk that is full or gone must not end a training that needs no disk.
                warnings.warn(
                    f"{self.directory}: shards are not cached ({error.strerror})", stacklevel=2
                )
        return data, False

    def num_bytes(self) -> int:
        """What lies in the cache now, by looking."""
        return sum(size for _, size, _ in self._files())

    def _keep(self, path: Path, data: bytes, patience: float) -> None:
        """Write a file if it fits. Writers hold the gate together; who must evict holds it alone,
        so that nobody writes."""
        if len(data) > self.max_bytes:
            return
        with self._locked("gate", patience, shared=True) as open_:
            if open_ and self._reserve(len(data), patience):
                _write(path, data)
                return
        with self._locked("gate", patience) as open_:
            if not open_:
                return
            if not self._reserve(len(data), patience):
                self._evict(len(data))
            _write(path, data)

    def _reserve(self, size: int, patience: float) -> bool:
        """Count `size` bytes more unless that is too much. A count that is unreadable is too much:
        looking will mend it."""
        with self._locked("account", patience) as open_:
            used = self._account()
            if not open_ or used is None or used + size > self.max_bytes:
                return False
            self._set_account(used + size)
            return True

    def _evict(self, size: int) -> None:
        """Let the longest unused go until `size` more bytes fit. The gate is held alone, so a
        temporary file is a dead one's."""
        room = min(int(self.max_bytes * _FILL_AFTER_EVICTION), self.max_bytes - size)
        # Temporary ones first, then by time of last use.
        files = sorted(
            (not path.name.endswith(".tmp"), used_at, size, path)
            for used_at, size, path in self._files()
        )
        used = sum(file_size for _, _, file_size, _ in files)
        for is_complete, _, file_size, path in files:
            if is_complete and used <= room:
                break
            path.unlink(missing_ok=True)
            used -= file_size
        self._set_account(used + size)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every file."""
        for folder, _, names in os.walk(self.directory / "files"):
            for path in (Path(folder) / name for name in names):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path

    def _account(self) -> int | None:
        try:
            return int((self.directory / "account").read_bytes())
        except (OSError, ValueError):
            return None

    def _set_account(self, used: int) -> None:
        # Twenty digits in one write, in place: a kill leaves the old count or the new one.
        descriptor = os.open(self.directory / "account", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, b"%020d" % used, 0)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self, name: str, patience: float, shared: bool = False) -> Iterator[bool]:
        """Hold a lock of the node; False after `patience` seconds without it (a stopped process can
        hold one for ever)."""
        deadline = time.monotonic() + patience
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        descriptor = self._lock_file(name)
        held = False
        try:
            while descriptor is not None and not held and time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, mode)
                    held = True
                except BlockingIOError:
                    time.sleep(_POLL_SECONDS)
            yield held
        finally:
            if descriptor is not None:
                # Said aloud, since a child forked meanwhile has a copy of the descriptor.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _lock_file(self, name: str) -> int | None:
        """A descriptor, or None where there can be none any more: somebody may clear the directory
        at any time."""
        with contextlib.suppress(OSError):
            path = self.directory / "locks" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        return None


def _whole(path: Path, sha256: str) -> bytes | None:
    """The file's bytes if they are what they must be; then it counts as used now."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        return None
    with contextlib.suppress(OSError):  # evicted in this moment
        os.utime(path)
    return data


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def _default_directory() -> Path:
    if os.environ.get("GENREC_CACHE"):
        return Path(os.environ["GENREC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genrec"


def _default_bytes() -> int:
    text = os.environ.get("GENREC_CACHE_BYTES") or str(DEFAULT_BYTES)
    if not text.isascii() or not text.isdigit():
        raise ValueError(
            f"GENREC_CACHE_BYTES is {text!r}: give a whole number of bytes, 0 to keep nothing"
        )
    return int(text)
