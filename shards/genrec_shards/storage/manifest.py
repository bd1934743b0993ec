"""The manifest of a shard directory: what each tar holds, where each record begins, and sha256 of
all of it."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec_shards.errors import DataError
from genrec_shards.readers.documents import parse_object

FORMAT_VERSION = 2
MANIFEST, LENGTHS, PERIODS = "manifest.json", "lengths.npy", "periods.npy"
_HASHES = {"sequences_hash", "lengths_sha256", "periods_sha256"}
_SHA256 = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RecordEntry:
    """Where one record's members are in its tar: one contiguous read."""

    offset: int
    """Bytes from the beginning of the tar to the first member's header."""
    bytes: int
    first_user: int
    users: int
    sha256: str
    """Of these bytes: a record that comes over a network, or out of a cache, is checked by
    itself."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar."""

    name: str
    bytes: int
    sha256: str
    users: int
    records: tuple[RecordEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. Record r is the users from r * users_per_record on, in all
    shards together."""

    format_version: int
    users: int
    items: int
    interactions: int
    sequences_hash: str
    users_per_record: int
    lengths_sha256: str
    """Of `lengths.npy`."""
    shards: tuple[ShardEntry, ...]
    periods_sha256: str | None = None
    """Of `periods.npy`; None, and not in the file, under leave-one-out."""

    @property
    def num_records(self) -> int:
        return sum(len(shard.records) for shard in self.shards)


def write_manifest(manifest: Manifest, directory: str | Path) -> None:
    """Write `manifest.json` into a directory that still has its temporary name."""
    fields = dataclasses.asdict(manifest)
    fields = {key: value for key, value in fields.items() if value is not None}
    text = json.dumps(fields, indent=1)
    (Path(directory) / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load_manifest(directory: str | Path) -> Manifest:
    """Read and check `manifest.json`. Raises DataError for one that is missing, damaged or of
    another version."""
    path = Path(directory) / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        folder = path.parent.parent
        way = "give a directory made by `genrec shard`"
        if path.parent.name == "shards" and (folder / "dataset.json").is_file():
            way = f"run `genrec shard {folder}`"
        raise DataError(f"{path}: no such file: {way}") from None
    except OSError as error:
        complaint = f"cannot be read ({error.strerror}): check the path and its rights"
        raise DataError(f"{path}: {complaint}") from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, place: str) -> Manifest:
    """The manifest in these bytes, checked. Raises DataError naming `place`, the file or address
    they came from."""
    try:
        fields = parse_object(data, place, "a manifest of this program", "shard again")
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            versions = f"format_version {version}, this program reads {FORMAT_VERSION}"
            raise DataError(f"{place}: {versions}: shard again")
        manifest = Manifest(**{**fields, "shards": tuple(map(_shard_entry, fields["shards"]))})
        for name in ("users", "items", "interactions", "users_per_record"):
            _check_count(name, fields[name], least=1)
        for name in _HASHES & fields.keys():
            _check_hash(name, fields[name])
        # Records must tile the users, because a user's record is found by division.
        next_user, complaint = 0, None
        for shard in manifest.shards:
            for record in shard.records:
                expected = min(manifest.users_per_record, manifest.users - next_user)
                if (record.first_user, record.users) != (next_user, expected):
                    complaint = complaint or f"the record at user {next_user} does not follow on"
                next_user += record.users
            if sum(record.users for record in shard.records) != shard.users:
                complaint = complaint or f"{shard.name} does not hold its {shard.users} users"
        if complaint is None and next_user != manifest.users:
            complaint = f"records of {next_user} users, {manifest.users} expected"
        if complaint is not None:
            raise DataError(f"{place}: {complaint}: shard again")
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: not a manifest of this program ({error}): shard again") from None
    return manifest


def _check_count(name: str, value: object, least: int = 0) -> None:
    if type(value) is not int or not least <= value < 1 << 62:
        raise TypeError(f"{name} is {value!r:.40}, no whole number")


def _check_hash(name: str, value: object) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise TypeError(f"{name} is {value!r:.40}, no sha256")


def verify_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Check each tar's size and sha256; sizes first, since they cost nothing.

    A tar cut between two members reads without an error and without its end: only the manifest can
    tell. Raises DataError naming the tar."""
    paths = [Path(directory) / shard.name for shard in manifest.shards]
    for path, shard in zip(paths, manifest.shards, strict=True):
        if not path.is_file():
            raise DataError(f"{path}: no such shard: copy it again or shard again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(f"{path}: {size} bytes, expected {shard.bytes}: copy it or shard again")
    for path, shard in zip(paths, manifest.shards, strict=True):
        found = file_sha256(path)
        if found != shard.sha256:
            complaint = f"sha256 {found[:12]}, expected {shard.sha256[:12]}"
            raise DataError(f"{path}: {complaint}: copy it or shard again")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_entry(fields: dict[str, Any]) -> ShardEntry:
    name = fields["name"]
    # It becomes a file's name here and a part of an address elsewhere.
    if not _NAME.fullmatch(name):
        complaint = f"shard name {name!r} in the manifest leads out of its directory"
        raise DataError(f"{complaint}: shard again")
    records = tuple(RecordEntry(**record) for record in fields["records"])
    shard = ShardEntry(**{**fields, "records": records})
    _check_count(f"{name}: bytes", shard.bytes)
    _check_hash(f"{name}: sha256", shard.sha256)
    for record in shard.records:
        for key in ("offset", "bytes", "first_user", "users"):
            _check_count(f"{name}: {key}", getattr(record, key))
        _check_hash(f"{name}: sha256", record.sha256)
        if record.offset + record.bytes > shard.bytes:
            complaint = "the manifest has a record behind the end of its tar"
            raise DataError(f"{name}: {complaint}: shard again")
    return shard
