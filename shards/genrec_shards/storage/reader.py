"""Reading shards: any record in one read, any users' sequences in any order."""

import io
import re
import tarfile
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from genrec_shards.errors import DataError
from genrec_shards.sequences import flat_ranges, offsets_of
from genrec_shards.splits import Periods
from genrec_shards.storage.manifest import LENGTHS, PERIODS, Manifest, RecordEntry
from genrec_shards.storage.remote import RetryPolicy
from genrec_shards.storage.store import FetchStats, open_store

# U users, R records, B users requested.

_MEMBERS = ("users", "offsets", "items")

# The header of version 1.0 that numpy writes for an array of ours. Others go through np.load, whose
# parser of Python literals fails at times where several threads read ("AST constructor recursion
# depth mismatch", CPython 3.11).
_OUR_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<i4', 'fortran_order': False, 'shape': \((\d+),\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class Record:
    """The sequences of a few consecutive users."""

    first_user: int
    users: np.ndarray
    """int32[u], user rows."""
    offsets: np.ndarray
    """int32[u+1], into `items`."""
    items: np.ndarray
    """int32[total], item rows, oldest first."""


class ShardReader:
    """Random access to a shard directory, local or at an address; it can be pickled, and used after
    a fork.

    Members are decoded here, by name and type, and nothing in them is ever run."""

    def __init__(
        self,
        path: str | Path,
        verify: bool = True,
        cache_records: int = 256,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Read manifest and lengths, and check them.

        Args:
            path: a directory, or `https://`, `s3://` or (on this machine) `http://` text.
            verify: compare every tar of a directory with the manifest before the first record is
                read; records of an address are compared one by one as they come.
            cache_records: decoded records kept in memory, least recently used out first.
            cache_dir, cache_bytes: the disk cache of remote records that all processes of a node
                share, see `NodeCache` for the defaults.
            retry: how long a server may fail.

        Raises:
            DataError: something does not agree with the manifest; one line naming the file.
            ValueError: the address is not allowed, or the cache's directory cannot be made.
        """
        self._store = store = open_store(path, cache_dir, cache_bytes, retry or RetryPolicy())
        self.manifest: Manifest = store.manifest
        lengths = store.file(LENGTHS, self.manifest.lengths_sha256)
        self.lengths: np.ndarray = _lengths(lengths, store.place(LENGTHS), self.manifest)
        """int32[U], items per user."""
        self.periods: Periods | None = None
        if self.manifest.periods_sha256 is not None:
            periods = store.file(PERIODS, self.manifest.periods_sha256)
            self.periods = _periods(periods, store.place(PERIODS), self.lengths)
        if verify:
            store.verify()
        self._cache_records = max(cache_records, 1)
        self._entries = [
            (shard, entry) for shard in self.manifest.shards for entry in shard.records
        ]
        self.__setstate__({})

    @property
    def fetch_stats(self) -> FetchStats:
        """Requests of this process's reader to a server so far."""
        return self._store.fetch_stats

    @property
    def num_records(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        """Record number `index` of the directory. Raises DataError naming shard and record if it is
        damaged."""
        if not 0 <= index < len(self._entries):
            complaint = f"record {index} of {len(self._entries)} in {self._store.address}"
            raise ValueError(f"{complaint}: count from 0")
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        shard, entry = self._entries[index]
        place = f"{self._store.place(shard.name)}: record {index}"
        data = self._store.record(shard, entry, place)
        users, offsets, items = _decoded(data, f"{index:08d}", place)
        record = Record(entry.first_user, users=users, offsets=offsets, items=items)
        self._check(record, entry, place)
        with self._lock:
            self._cache[index] = record
            while len(self._cache) > self._cache_records:
                self._cache.popitem(last=False)
        return record

    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whole sequences of these users, in this order; each record is visited once.

        Args:
            user_rows: int64[B], repeats allowed.

        Returns:
            items int32[total] and offsets int64[B+1].
        """
        user_rows = np.asarray(user_rows, dtype=np.int64)
        if len(user_rows) and not (user_rows.min() >= 0 and user_rows.max() < self.manifest.users):
            limits = f"0..{self.manifest.users - 1}"
            raise ValueError(f"user row outside {limits} requested of {self._store.address}")
        offsets = offsets_of(self.lengths[user_rows])
        items = np.empty(offsets[-1], dtype=np.int32)
        record_of = user_rows // self.manifest.users_per_record
        by_record = np.argsort(record_of, kind="stable")
        bounds = np.flatnonzero(np.diff(record_of[by_record], prepend=-1, append=-1))
        ahead = self._fetch_ahead(record_of[by_record[bounds[:-1]]].tolist())
        for start, end in pairwise(bounds.tolist()):
            places = by_record[start:end]
            index = int(record_of[places[0]])
            record = ahead.get(index) or self.record(index)
            local = user_rows[places] - record.first_user
            lengths = self.lengths[user_rows[places]]
            source = flat_ranges(record.offsets[local], lengths)
            items[flat_ranges(offsets[places], lengths)] = record.items[source]
        return items, offsets

    def __getstate__(self) -> dict[str, object]:
        dropped = ("_cache", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._cache: OrderedDict[int, Record] = OrderedDict()
        self._lock = threading.Lock()

    def _fetch_ahead(self, indices: list[int]) -> dict[int, Record]:
        """The records that are not cached, read side by side; empty where that gains nothing."""
        with self._lock:
            missing = [index for index in indices if index not in self._cache]
        if self._store.reads_at_once == 1 or len(missing) < 2:
            return {}
        # The first error cancels what has not begun, or each of the rest would retry as long.
        with ThreadPoolExecutor(self._store.reads_at_once) as pool:
            return dict(zip(missing, pool.map(self.record, missing), strict=True))

    def _check(self, record: Record, entry: RecordEntry, place: str) -> None:
        """Raise DataError unless the record is what manifest and lengths.npy say: gather() lays out
        its answer by these."""
        users = np.arange(entry.first_user, entry.first_user + entry.users)
        offsets, items = record.offsets, record.items
        complaint = None
        if not np.array_equal(record.users, users):
            complaint = "holds other users than the manifest says"
        elif len(offsets) != entry.users + 1 or offsets[0] != 0:
            complaint = f"offsets do not fit {entry.users} users"
        elif not np.array_equal(np.diff(offsets), self.lengths[users]) or offsets[-1] != len(items):
            complaint = "lengths differ from lengths.npy"
        elif len(items) and not (items.min() >= 0 and items.max() < self.manifest.items):
            complaint = f"an item row is outside 0..{self.manifest.items - 1}"
        if complaint is not None:
            raise DataError(f"{place}: {complaint}: shard again")


def _decoded(data: bytes, key: str, place: str) -> list[np.ndarray]:
    """The arrays users, offsets, items. Only these three members, as int32 arrays, are accepted."""
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if file is not None:
                    members[member.name] = file.read()
    except tarfile.TarError as error:
        raise DataError(f"{place}: not a readable tar ({error}): shard again") from None
    expected = [f"{key}.{name}.npy" for name in _MEMBERS]
    if sorted(members) != sorted(expected):
        found = f"members {', '.join(sorted(members))}; expected {', '.join(expected)}"
        raise DataError(f"{place}: {found}: shard again")
    return [_array(members[name], f"{place}: {name}") for name in expected]


def _array(data: bytes, place: str) -> np.ndarray:
    header = _OUR_HEADER.match(data)
    if header is not None and len(data) - header.end() == 4 * int(header[1]):
        return np.frombuffer(data, "<i4", offset=header.end()).astype(np.int32)
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{place}: not a plain array ({reason}): shard again") from None
    if not isinstance(values, np.ndarray) or values.dtype != np.dtype("<i4") or values.ndim != 1:
        kind, ndim = getattr(values, "dtype", type(values).__name__), getattr(values, "ndim", 0)
        found = f"{kind} of {ndim} dimensions, expected little-endian int32 of one dimension"
        raise DataError(f"{place}: {found}: shard again")
    return values.astype(np.int32, copy=False)


def _lengths(data: bytes, place: str, manifest: Manifest) -> np.ndarray:
    lengths = _array(data, place)
    interactions = lengths.sum(dtype=np.int64)
    if len(lengths) != manifest.users or interactions != manifest.interactions:
        found = f"{interactions} interactions of {len(lengths)} users"
        expected = f"the manifest says {manifest.interactions} of {manifest.users}"
        raise DataError(f"{place}: {found}, {expected}: shard again")
    return lengths


def _periods(data: bytes, place: str, lengths: np.ndarray) -> Periods:
    values = _array(data, place)
    if len(values) == 2 * len(lengths) and (periods := Periods.of_flat(values)).fit(lengths):
        return periods
    raise DataError(f"{place}: its periods do not fit the lengths in lengths.npy: shard again")
