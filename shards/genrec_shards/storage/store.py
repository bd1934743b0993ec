"""Where the bytes of shards come from: a directory of this machine, or an address with the node's
cache before it."""

import hashlib
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from genrec_shards.errors import DataError
from genrec_shards.storage.disk_cache import NodeCache
from genrec_shards.storage.manifest import (
    LENGTHS,
    MANIFEST,
    PERIODS,
    Manifest,
    RecordEntry,
    ShardEntry,
    load_manifest,
    parse_manifest,
    verify_manifest,
)
from genrec_shards.storage.remote import Patience, RemoteFiles, is_address


@dataclass(frozen=True)
class Traffic:
    """What one process has asked of a server and of the node's cache; nothing where the shards are
    local."""

    requests: int = 0
    """Failed ones too."""
    bytes_fetched: int = 0
    """From the server, those of answers that were of no use too."""
    bytes_used: int = 0
    """Of records and lengths, wherever they came from."""
    cache_hits: int = 0


class LocalStore:
    """A shard directory. Nothing is opened before the first read; it can be pickled and used after
    a fork."""

    at_once = 1

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)
        self.manifest = load_manifest(path)
        self.traffic = Traffic()
        self._open()

    def place(self, name: str) -> str:
        return str(self.path / name)

    def lengths(self) -> bytes:
        """`lengths.npy`."""
        return self._whole(LENGTHS, self.manifest.lengths_sha256)

    def periods(self) -> bytes | None:
        """`periods.npy`; None under leave-one-out."""
        expected = self.manifest.periods_sha256
        return None if expected is None else self._whole(PERIODS, expected)

    def _whole(self, name: str, expected: str) -> bytes:
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}): copy it or shard again"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise DataError(
                f"{path}: sha256 {found[:12]}, expected {expected[:12]}: copy it or shard again"
            )
        return data

    def verify(self) -> None:
        """Read every tar and compare it with the manifest."""
        verify_manifest(self.path, self.manifest)

    def record(self, shard: ShardEntry, entry: RecordEntry, index: int) -> bytes:
        """The bytes of one record's members."""
        place = f"{self.place(shard.name)}: record {index}"
        with self._lock:
            if shard.name not in self._descriptors:
                try:
                    self._descriptors[shard.name] = os.open(self.path / shard.name, os.O_RDONLY)
                except OSError as error:
                    raise DataError(
                        f"{place}: cannot be opened ({error.strerror}): copy it or shard again"
                    ) from None
        # pread has no file position, so a forked child and its parent may share the descriptor.
        data = os.pread(self._descriptors[shard.name], entry.bytes, entry.offset)
        if len(data) != entry.bytes:
            raise DataError(
                f"{place}: {len(data)} bytes, expected {entry.bytes}: the tar is cut off, shard again"
            )
        return data

    def close(self) -> None:
        """Close the tars; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_descriptors", "_lock")
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()


class RemoteStore:
    """Shards at an address. Single records are asked for: the plan takes them from all tars in an
    order of its own."""

    at_once = 8
    """Requests side by side: a round trip is most of what a record costs."""

    def __init__(self, address: str, cache: NodeCache, patience: Patience) -> None:
        self.files = RemoteFiles(address, patience)
        self.address, self.cache = self.files.address, cache
        self.traffic = Traffic()
        self._lock = threading.Lock()
        data = self.files.fetch(MANIFEST, self.place(MANIFEST), count=self._count_request)
        self.manifest: Manifest = parse_manifest(data, self.place(MANIFEST))
        # Two addresses of the same shards share what is cached.
        self._set = hashlib.sha256(data).hexdigest()[:32]

    def place(self, name: str) -> str:
        return f"{self.address}/{name}"

    def lengths(self) -> bytes:
        """`lengths.npy`."""
        return self._cached(
            LENGTHS, LENGTHS, None, self.manifest.lengths_sha256, self.place(LENGTHS)
        )

    def periods(self) -> bytes | None:
        """`periods.npy`; None under leave-one-out."""
        expected = self.manifest.periods_sha256
        return (
            None
            if expected is None
            else self._cached(PERIODS, PERIODS, None, expected, self.place(PERIODS))
        )

    def verify(self) -> None:
        """Nothing: each record is compared with the manifest when it comes."""

    def record(self, shard: ShardEntry, entry: RecordEntry, index: int) -> bytes:
        """The bytes of one record's members, from the node's cache or else from the server."""
        place = f"{self.place(shard.name)}: record {index}"
        part = entry.offset, entry.offset + entry.bytes
        return self._cached(f"record-{index:08d}", shard.name, part, entry.sha256, place)

    def close(self) -> None:
        """Nothing: connections belong to the process and serve its other readers."""

    def _cached(
        self, key: str, name: str, part: tuple[int, int] | None, sha256: str, place: str
    ) -> bytes:
        def fetch() -> bytes:
            return self.files.fetch(
                name, place, part=part, sha256=sha256, count=self._count_request
            )

        data, was_cached = self.cache.get(
            f"{self._set}/{key}", sha256, fetch, self.files.patience.deadline
        )
        self._count(cache_hits=int(was_cached), bytes_used=len(data))
        return data

    def _count_request(self, size: int) -> None:
        self._count(requests=1, bytes_fetched=size)

    def _count(self, **more: int) -> None:
        with self._lock:
            counts = {name: getattr(self.traffic, name) + number for name, number in more.items()}
            self.traffic = replace(self.traffic, **counts)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def open_store(
    path: str | Path, cache_dir: str | Path | None, cache_bytes: int | None, patience: Patience
) -> LocalStore | RemoteStore:
    """The store of a directory or address. Raises ValueError or DataError, one line, for one that
    cannot be had."""
    if is_address(path):
        return RemoteStore(str(path), NodeCache(cache_dir, cache_bytes), patience)
    return LocalStore(Path(path))
