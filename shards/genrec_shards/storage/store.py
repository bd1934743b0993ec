"""Where the bytes of shards come from: a directory of this machine, or an address with the node's
cache before it."""

import hashlib
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from genrec_shards.errors import DataError
from genrec_shards.storage.address import is_address
from genrec_shards.storage.disk_cache import NodeCache
from genrec_shards.storage.manifest import (
    MANIFEST,
    Manifest,
    RecordEntry,
    ShardEntry,
    load_manifest,
    parse_manifest,
    verify_manifest,
)
from genrec_shards.storage.remote import RemoteFiles, RetryPolicy


@dataclass(frozen=True)
class FetchStats:
    """Requests of one process to a server and to the node's cache; all 0 for local shards."""

    requests: int = 0
    """Failed ones too."""
    bytes_fetched: int = 0
    """From the server, those of useless answers too."""
    bytes_used: int = 0
    """Of records and lengths, from the server or the cache."""
    cache_hits: int = 0


class LocalStore:
    """A shard directory. It keeps no file open, so it can be pickled and used after a fork."""

    reads_at_once = 1
    fetch_stats = FetchStats()

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        self.manifest = load_manifest(path)

    def place(self, name: str) -> str:
        """A file as messages name it."""
        return str(self.path / name)

    def file(self, name: str, sha256: str) -> bytes:
        """The bytes of `lengths.npy` or `periods.npy`. Raises DataError for another sha256."""
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            complaint = f"cannot be read ({error.strerror})"
        else:
            found = hashlib.sha256(data).hexdigest()
            if found == sha256:
                return data
            complaint = f"sha256 {found[:12]}, expected {sha256[:12]}"
        raise DataError(f"{self.place(name)}: {complaint}: copy it or shard again")

    def verify(self) -> None:
        """Read every tar and compare it with the manifest. Raises DataError naming the tar."""
        verify_manifest(self.path, self.manifest)

    def record(self, shard: ShardEntry, entry: RecordEntry, place: str) -> bytes:
        """The bytes of one record's members. Raises DataError naming `place`."""
        try:
            with (self.path / shard.name).open("rb", buffering=0) as file:
                file.seek(entry.offset)
                data = file.read(entry.bytes)
        except OSError as error:
            complaint = f"cannot be opened ({error.strerror}): copy it or shard again"
            raise DataError(f"{place}: {complaint}") from None
        if len(data) != entry.bytes:
            complaint = f"{len(data)} bytes, expected {entry.bytes}: the tar is cut off"
            raise DataError(f"{place}: {complaint}, shard again")
        return data


class RemoteStore:
    """Shards at an address. Single records are requested, since the order of samples takes them
    from all tars."""

    reads_at_once = 8
    """Requests side by side: a round trip is most of what a record costs."""

    def __init__(self, address: str, cache: NodeCache, retry: RetryPolicy) -> None:
        self.files = RemoteFiles(address, retry)
        self.address, self.cache = self.files.address, cache
        self.fetch_stats = FetchStats()
        self._lock = threading.Lock()
        data = self.files.fetch(MANIFEST, self.place(MANIFEST), count=self._count_request)
        self.manifest: Manifest = parse_manifest(data, self.place(MANIFEST))
        # Two addresses of the same shards share what is cached.
        self._cache_set = hashlib.sha256(data).hexdigest()[:32]

    def place(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self.address}/{name}"

    def file(self, name: str, sha256: str) -> bytes:
        """The bytes of `lengths.npy` or `periods.npy`. Raises DataError for another sha256."""
        return self._cached(name, name, None, sha256, self.place(name))

    def verify(self) -> None:
        """Nothing: each record is compared with the manifest when it comes."""

    def record(self, shard: ShardEntry, entry: RecordEntry, place: str) -> bytes:
        """The bytes of one record's members, from the node's cache or else from the server. Raises
        DataError naming `place`."""
        index = entry.first_user // self.manifest.users_per_record
        part = entry.offset, entry.offset + entry.bytes
        return self._cached(f"record-{index:08d}", shard.name, part, entry.sha256, place)

    def _cached(
        self, key: str, name: str, part: tuple[int, int] | None, sha256: str, place: str
    ) -> bytes:
        def fetch() -> bytes:
            count = self._count_request
            return self.files.fetch(name, place, part=part, sha256=sha256, count=count)

        key, timeout = f"{self._cache_set}/{key}", self.files.retry.deadline
        data, was_cached = self.cache.get(key, sha256, fetch, timeout)
        self._count(cache_hits=int(was_cached), bytes_used=len(data))
        return data

    def _count_request(self, size: int) -> None:
        self._count(requests=1, bytes_fetched=size)

    def _count(self, **more: int) -> None:
        with self._lock:
            stats = self.fetch_stats
            counts = {name: getattr(stats, name) + number for name, number in more.items()}
            self.fetch_stats = replace(stats, **counts)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def open_store(
    path: str | Path, cache_dir: str | Path | None, cache_bytes: int | None, retry: RetryPolicy
) -> LocalStore | RemoteStore:
    """The store of a directory or address. Raises ValueError or DataError, one line, for one that
    cannot be opened."""
    if is_address(path):
        return RemoteStore(str(path), NodeCache(cache_dir, cache_bytes), retry)
    return LocalStore(Path(path))
