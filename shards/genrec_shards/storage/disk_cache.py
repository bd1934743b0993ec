"""Records that the processes of a node share on its disk: a bounded number of bytes, least recently
used out first.

fsspec's `filecache` keeps whole tars, checks no sha256 and knows no bound that processes share, so
this cache is our own."""

import contextlib
import fcntl
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

DEFAULT_BYTES = 20 << 30
# Eviction makes room for more than the one record, since it looks at every file.
_FILL_AFTER_EVICTION = 0.9
# Locks of records, by hash; two records may share one, which costs a wait and nothing else.
_NUM_FETCH_LOCKS = 64
_POLL_SECONDS = 0.01
# A stopped process may hold the writers' lock for ever: who waits longer than this keeps nothing.
_LONGEST_WRITE = 10.0


class NodeCache:
    """Files of known sha256 under one directory, for any number of processes at once.

    A process may be killed at any moment: files come by rename, locks are the kernel's and end with
    their holder, the count of bytes is raised before a file is written, and what is read is
    believed only if its sha256 agrees."""

    def __init__(self, directory: str | Path | None = None, max_bytes: int | None = None) -> None:
        """Make the directory.

        Args:
            directory: None: GENREC_CACHE, by default `~/.cache/genrec`.
            max_bytes: 0 keeps nothing; None: GENREC_CACHE_BYTES, by default 20 GiB.

        Raises:
            ValueError: the directory cannot be made, or the variable is no number.
        """
        if directory is None:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            directory = os.environ.get("GENREC_CACHE") or Path(home) / "genrec"
        if max_bytes is None:
            text = os.environ.get("GENREC_CACHE_BYTES") or str(DEFAULT_BYTES)
            if not text.isascii() or not text.isdigit():
                remedy = "give a whole number of bytes, 0 to keep nothing"
                raise ValueError(f"GENREC_CACHE_BYTES is {text!r}: {remedy}")
            max_bytes = int(text)
        self.directory, self.max_bytes = Path(directory), max_bytes
        if max_bytes < 0:
            raise ValueError(f"a cache of {max_bytes} bytes: give 0 to keep nothing")
        if max_bytes == 0:
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
        self, key: str, sha256: str, fetch: Callable[[], bytes], timeout: float
    ) -> tuple[bytes, bool]:
        """The bytes, and whether they were cached.

        Of several processes that miss the same key one fetches and the others wait for it.

        Args:
            key: `set/name`, a relative path.
            sha256: of the bytes, in hex; a file with another one counts as missing.
            fetch: gets what is missing and checks it.
            timeout: seconds to wait for another process, then this one fetches for itself.
        """
        if self.max_bytes == 0:
            return fetch(), False
        path = self.directory / "files" / key
        data = _read_intact(path, sha256)
        if data is not None:
            return data, True
        number = int(hashlib.sha256(key.encode()).hexdigest(), 16) % _NUM_FETCH_LOCKS
        with self._locked(f"turn-{number:02d}", timeout):
            data = _read_intact(path, sha256)
            if data is not None:
                return data, True
            data = fetch()
            try:
                self._keep(path, data, timeout)
            except OSError as error:
                # A disk that is full or gone must not end a training that needs no disk.
                complaint = f"{self.directory}: shards are not cached ({error.strerror})"
                warnings.warn(complaint, stacklevel=2)
        return data, False

    def num_bytes(self) -> int:
        """Bytes of all files now, by looking."""
        return sum(size for _, size, _ in self._files())

    def _keep(self, path: Path, data: bytes, timeout: float) -> None:
        """Write a file if it fits. One process writes at a time, so a temporary file that is there
        is a killed process's."""
        if len(data) > self.max_bytes:
            return
        with self._locked("gate", min(timeout, _LONGEST_WRITE)) as held:
            if not held:
                return
            account = self.directory / "account"
            try:
                used = int(account.read_bytes())
            except (OSError, ValueError):
                used = self.max_bytes  # looking at the files will mend it
            if used + len(data) > self.max_bytes:
                used = self._evict(len(data))
            # Twenty digits in one write, in place: a kill leaves the old count or the new one.
            descriptor = os.open(account, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, b"%020d" % (used + len(data)), 0)
            finally:
                os.close(descriptor)
            temporary = path.with_name(f".{path.name}.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                # Without fsync: what a power cut leaves torn has another sha256.
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _evict(self, size: int) -> int:
        """Remove the least recently used files until `size` more bytes fit; the bytes that stay."""
        room = min(int(self.max_bytes * _FILL_AFTER_EVICTION), self.max_bytes - size)
        # Temporary ones first, then by time of last use.
        files = sorted(
            (not path.name.endswith(".tmp"), used_at, file_size, path)
            for used_at, file_size, path in self._files()
        )
        used = sum(file_size for _, _, file_size, _ in files)
        for is_complete, _, file_size, path in files:
            if is_complete and used <= room:
                break
            path.unlink(missing_ok=True)
            used -= file_size
        return used

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every file."""
        for folder, _, names in os.walk(self.directory / "files"):
            for path in (Path(folder) / name for name in names):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path

    @contextlib.contextmanager
    def _locked(self, name: str, timeout: float) -> Iterator[bool]:
        """Hold a lock of the node. Yields False after `timeout` seconds without it, since a stopped
        process can hold one for ever, and where the directory cannot be made again."""
        deadline, held, descriptor = time.monotonic() + timeout, False, None
        path = self.directory / "locks" / name
        with contextlib.suppress(OSError):  # somebody may clear the directory at any time
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while descriptor is not None and not held and time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                except BlockingIOError:
                    time.sleep(_POLL_SECONDS)
            yield held
        finally:
            if descriptor is not None:
                # Explicit, since a child forked meanwhile has a copy of the descriptor.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)


def _read_intact(path: Path, sha256: str) -> bytes | None:
    """The file's bytes if their sha256 is this one, and None otherwise; then it was used now."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        return None
    with contextlib.suppress(OSError):  # evicted in this moment
        os.utime(path)
    return data
