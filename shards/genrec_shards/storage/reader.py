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
from genrec_shards.sequences import flat_ranges
from genrec_shards.splits import Periods
from genrec_shards.storage.manifest import LENGTHS, PERIODS, Manifest, RecordEntry
from genrec_shards.storage.remote import Patience
from genrec_shards.storage.store import Traffic, open_store

# U users, R records, B users asked for.

_MEMBERS = ("users", "offsets", "items")

# The header of version 1.0 that numpy writes for an array of ours. Others go through np.load, whose
# parser of Python literals fails at times where several threads read ("AST constructor recursion
# depth mismatch", CPython 3.11).
_OURS = re.compile(
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
    """Random access to a shard directory, here or at an address; it can be pickled, and used after
    a fork.

    `path`: a directory, or `https://`, `s3://` or (on this machine) `http://` text. `verify`
    compares every tar of a directory with the manifest before the first record is read; records of
    an address are compared one by one as they come. Members are decoded here, by name and type, and
    nothing in them is ever run. `cache_records` decoded records are kept, the longest unused goes
    first. `cache_dir`, `cache_bytes`: the disk cache of remote records that all processes of a node
    share, see `NodeCache` for the defaults. `patience`: how long a server may fail."""

    def __init__(
        self,
        path: str | Path,
        verify: bool = True,
        cache_records: int = 256,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Raises DataError, one line naming the file, for whatever does not agree with the
        manifest.

        Raises ValueError for an address that is not allowed and for a cache directory that cannot
        be made."""
        self._store = open_store(path, cache_dir, cache_bytes, patience or Patience())
        self.manifest: Manifest = self._store.manifest
        self.lengths: np.ndarray = _lengths(
            self._store.lengths(), self._store.place(LENGTHS), self.manifest
        )  # int32[U]
        self.periods: Periods | None = _periods(
            self._store.periods(), self._store.place(PERIODS), self.lengths
        )
        if verify:
            self._store.verify()
        self._cache_records = max(cache_records, 1)
        self._places = [
            (s, r)
            for s, shard in enumerate(self.manifest.shards)
            for r in range(len(shard.records))
        ]
        self._open()

    @property
    def traffic(self) -> Traffic:
        """What this process's reader has asked of a server so far."""
        return self._store.traffic

    @property
    def num_records(self) -> int:
        return len(self._places)

    def record(self, index: int) -> Record:
        """Record number `index` of the directory. Raises DataError naming shard and record if it is
        damaged."""
        if not 0 <= index < len(self._places):
            raise ValueError(
                f"record {index} of {len(self._places)} in {self._store.address}: count from 0"
            )
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        record = self._read(index)
        with self._lock:
            self._cache[index] = record
            while len(self._cache) > self._cache_records:
                self._cache.popitem(last=False)
        return record

    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whole sequences of these users, in this order, repeats allowed.

        `user_rows`: int64[B]. Returns items int32[total] and offsets int64[B+1]. Each record is
        visited once."""
        user_rows = np.asarray(user_rows, dtype=np.int64)
        if len(user_rows) and not (user_rows.min() >= 0 and user_rows.max() < self.manifest.users):
            raise ValueError(
                f"user row outside 0..{self.manifest.users - 1} asked of {self._store.address}"
            )
        offsets = np.concatenate([[0], np.cumsum(self.lengths[user_rows], dtype=np.int64)])
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
            items[flat_ranges(offsets[places], lengths)] = record.items[
                flat_ranges(record.offsets[local], lengths)
            ]
        return items, offsets

    def close(self) -> None:
        """Close the tars; the next read opens them again."""
        self._store.close()

    def __getstate__(self) -> dict[str, object]:
        dropped = ("_cache", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        """What belongs to one process."""
        self._cache: OrderedDict[int, Record] = OrderedDict()
        self._lock = threading.Lock()

    def _fetch_ahead(self, indices: list[int]) -> dict[int, Record]:
        """The records that are not at hand, side by side; nothing where a store gains nothing by
        it."""
        with self._lock:
            missing = [index for index in indices if index not in self._cache]
        if self._store.at_once == 1 or len(missing) < 2:
            return {}
        # The first error cancels what has not begun, or each of the rest would be as patient.
        with ThreadPoolExecutor(self._store.at_once) as pool:
            return dict(zip(missing, pool.map(self.record, missing), strict=True))

    def _read(self, index: int) -> Record:
        shard_number, record_number = self._places[index]
        shard = self.manifest.shards[shard_number]
        entry = shard.records[record_number]
        place = f"{self._store.place(shard.name)}: record {index}"
        record = Record(
            entry.first_user,
            *_decoded(self._store.record(shard, entry, index), f"{index:08d}", place),
        )
        self._check(record, entry, place)
        return record

    def _check(self, record: Record, entry: RecordEntry, place: str) -> None:
        """Lengths must agree with lengths.npy, because gather() lays out its answer by them."""
        users = np.arange(entry.first_user, entry.first_user + entry.users)
        if not np.array_equal(record.users, users):
            raise DataError(f"{place}: holds other users than the manifest says: shard again")
        if len(record.offsets) != entry.users + 1 or record.offsets[0] != 0:
            raise DataError(f"{place}: offsets do not fit {entry.users} users: shard again")
        if not np.array_equal(np.diff(record.offsets), self.lengths[users]) or record.offsets[
            -1
        ] != len(record.items):
            raise DataError(f"{place}: lengths differ from lengths.npy: shard again")
        if len(record.items) and not (
            record.items.min() >= 0 and record.items.max() < self.manifest.items
        ):
            raise DataError(
                f"{place}: an item row is outside 0..{self.manifest.items - 1}: shard again"
            )


def _decoded(data: bytes, key: str, place: str) -> list[np.ndarray]:
    """The arrays users, offsets, items. Only these three members, as int32 arrays, are accepted."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {
                member.name: tar.extractfile(member).read() for member in tar if member.isreg()
            }  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise DataError(f"{place}: not a readable tar ({error}): shard again") from None
    expected = [f"{key}.{name}.npy" for name in _MEMBERS]
    if sorted(members) != sorted(expected):
        raise DataError(
            f"{place}: members {', '.join(sorted(members))}; expected {', '.join(expected)}: shard again"
        )
    return [_array(members[name], f"{place}: {name}") for name in expected]


def _array(data: bytes, place: str) -> np.ndarray:
    header = _OURS.match(data)
    if header is not None and len(data) - header.end() == 4 * int(header[1]):
        return np.frombuffer(data, "<i4", offset=header.end()).astype(np.int32)
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{place}: not a plain array ({str(error).splitlines()[0]}): shard again"
        ) from None
    if not isinstance(values, np.ndarray) or values.dtype != np.dtype("<i4") or values.ndim != 1:
        kind = f"{getattr(values, 'dtype', type(values).__name__)} of {getattr(values, 'ndim', 0)} dimensions"
        raise DataError(
            f"{place}: {kind}, expected little-endian int32 of one dimension: shard again"
        )
    return values.astype(np.int32, copy=False)


def _lengths(data: bytes, place: str, manifest: Manifest) -> np.ndarray:
    lengths = _array(data, place)
    if len(lengths) != manifest.users or lengths.sum(dtype=np.int64) != manifest.interactions:
        raise DataError(
            f"{place}: {lengths.sum(dtype=np.int64)} interactions of {len(lengths)} users, the manifest says "
            f"{manifest.interactions} of {manifest.users}: shard again"
        )
    return lengths


def _periods(data: bytes | None, place: str, lengths: np.ndarray) -> Periods | None:
    if data is None:
        return None
    values = _array(data, place)
    if len(values) == 2 * len(lengths) and (periods := Periods.of_flat(values)).fit(lengths):
        return periods
    raise DataError(f"{place}: no cuts of the sequences that lengths.npy tells of: shard again")
