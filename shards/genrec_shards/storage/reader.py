"""Reading shards: any record in one read, any users' sequences in any order."""

import hashlib
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
from genrec_shards.readers.frames import listed
from genrec_shards.sequences import Sequences, flat_ranges, offsets_of
from genrec_shards.splits import Periods
from genrec_shards.storage.manifest import LENGTHS, PERIODS, Manifest, RecordEntry
from genrec_shards.storage.remote import RetryPolicy
from genrec_shards.storage.store import FetchStats, open_store

# U users, R records, B users requested.

_MEMBERS = ("users", "offsets", "items")

# The header of version 1.0 that numpy writes for an array of ours; others are refused. np.load asks
# for the memory that a header promises, and its parser of Python literals fails where several
# threads read ("AST constructor recursion depth mismatch", CPython 3.11).
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<i4', 'fortran_order': False, "
    rb"'shape': \(([0-9]{1,18}),\), \} *\n",
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
        self._item_hashes: list[bytes] | None = None
        self.__setstate__({})

    def expect(self, sequences: Sequences, data: str) -> None:
        """Accept from now on only records that hold the items of these sequences, each checked when
        it is read. The manifest alone does not bind them: whoever writes it anew can leave the hash
        of the sequences as it was.

        Args:
            sequences: of the data directory.
            data: that directory, as messages name it.

        Raises:
            DataError: manifest, lengths or periods are those of others.
        """
        ours, theirs = (
            np.zeros(0) if periods is None else periods.flat()
            for periods in (sequences.periods, self.periods)
        )
        if (
            self.manifest.sequences_hash != sequences.sequences_hash()
            or self.manifest.items != sequences.num_items
            or not np.array_equal(self.lengths, sequences.lengths)
            or not np.array_equal(ours, theirs)
        ):
            raise DataError(
                f"{self._store.address}: made from other sequences than {data}: run "
                "`genrec shard` again"
            )
        firsts = [entry.first_user for _, entry in self._entries]
        bounds = sequences.offsets[[*firsts, sequences.num_users]].tolist()
        self._item_hashes = [_hash_of(sequences.items[a:b]) for a, b in pairwise(bounds)]

    @property
    def fetch_stats(self) -> FetchStats:
        """Requests of this process's reader to a server so far."""
        return self._store.fetch_stats

    @property
    def num_records(self) -> int:
        return len(self._entries)

    def place(self, index: int) -> str:
        """A record as messages name it: its tar and its number."""
        return f"{self._store.place(self._entries[index][0].name)}: record {index}"

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
        place = self.place(index)
        data = self._store.record(shard, entry, place)
        users, offsets, items = _decoded(data, f"{index:08d}", place)
        record = Record(entry.first_user, users=users, offsets=offsets, items=items)
        self._check(record, entry, place)
        if self._item_hashes is not None and _hash_of(items) != self._item_hashes[index]:
            raise DataError(f"{place}: holds other items than the data: run `genrec shard` again")
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


def _hash_of(items: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(items, "<i4").data).digest()


def _decoded(data: bytes, key: str, place: str) -> list[np.ndarray]:
    """The arrays users, offsets, items. Only these three members, as int32 arrays, are accepted."""
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                # A sparse file says how many zeros it stands for.
                if member.isreg() and not member.issparse():
                    file = tar.extractfile(member)
                    members[member.name] = b"" if file is None else file.read()
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{place}: not a readable tar ({error}): shard again") from None
    expected = [f"{key}.{name}.npy" for name in _MEMBERS]
    if sorted(members) != sorted(expected):
        found = f"members {listed(sorted(members), 4)}; expected {', '.join(expected)}"
        raise DataError(f"{place}: {found}: shard again")
    return [_array(members[name], f"{place}: {name}") for name in expected]


def _array(data: bytes, place: str) -> np.ndarray:
    header = _HEADER.match(data)
    if header is None or len(data) - header.end() != 4 * int(header[1]):
        found = f"{len(data)} bytes that begin with {data[:90]!r}"
        expected = "little-endian int32 of one dimension, as numpy saves them"
        raise DataError(f"{place}: not a plain array ({found}), expected {expected}: shard again")
    return np.frombuffer(data, "<i4", offset=header.end()).astype(np.int32)


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
