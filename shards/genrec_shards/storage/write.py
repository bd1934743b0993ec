"""Shards: sequences packed into webdataset tars, byte for byte the same from the same input.

The tars are to the byte what `webdataset.TarWriter` makes of the records, without needing it."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from genrec_shards.atomic import atomic_directory
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import Sequences
from genrec_shards.storage.manifest import (
    FORMAT_VERSION,
    LENGTHS,
    MANIFEST,
    PERIODS,
    Manifest,
    RecordEntry,
    ShardEntry,
    file_sha256,
    write_manifest,
)

# Time and owner are fixed, or the same sequences would give other bytes tomorrow.
_OWNER, _MODE = "genrec", 0o444


def write_shards(
    dataset: Dataset,
    out: str | Path,
    *,
    users_per_shard: int = 8192,
    users_per_record: int = 1024,
    overwrite: bool = False,
) -> Manifest:
    """Write `shard-000000.tar` ..., `lengths.npy` and `manifest.json` into `out`, complete or not
    at all.

    Of a split by time also `periods.npy`. The tars hold whole sequences.

    Args:
        dataset: what to write.
        out: a directory that does not exist yet, or is empty.
        users_per_shard: a multiple of `users_per_record`, since the record of a user is found by
            division.
        users_per_record: users whose sequences are read together.
        overwrite: replace shards in `out`.

    Raises:
        ValueError: the sizes do not fit together, or `out` exists.
    """
    check_sizes(users_per_shard, users_per_record)
    sequences = dataset.sequences
    with atomic_directory(out, overwrite, marker=MANIFEST) as folder:
        shards: list[ShardEntry] = []
        for first_user in range(0, sequences.num_users, users_per_shard):
            end_user = min(first_user + users_per_shard, sequences.num_users)
            path = folder / f"shard-{len(shards):06d}.tar"
            shards.append(write_shard(sequences, path, first_user, end_user, users_per_record))
        return finish_shards(folder, dataset, shards, users_per_record)


def check_sizes(users_per_shard: int, users_per_record: int) -> None:
    """Raises ValueError for sizes by which a user's record cannot be found."""
    if users_per_record < 1 or users_per_shard < 1 or users_per_shard % users_per_record:
        wrong = f"users_per_shard {users_per_shard} is no multiple of users_per_record"
        example = max(users_per_record, 1) * 8
        raise ValueError(f"{wrong} {users_per_record}: choose for example {example}")


def finish_shards(
    folder: Path, dataset: Dataset, shards: list[ShardEntry], users_per_record: int
) -> Manifest:
    """Write lengths, periods and manifest beside the tars."""
    sequences = dataset.sequences
    lengths = _npy(sequences.lengths)
    (folder / LENGTHS).write_bytes(lengths)
    periods = None if sequences.periods is None else _npy(sequences.periods.flat())
    if periods is not None:
        (folder / PERIODS).write_bytes(periods)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        users=sequences.num_users,
        items=sequences.num_items,
        interactions=sequences.num_interactions,
        sequences_hash=dataset.info.sequences_hash,
        users_per_record=users_per_record,
        lengths_sha256=hashlib.sha256(lengths).hexdigest(),
        shards=tuple(shards),
        periods_sha256=None if periods is None else hashlib.sha256(periods).hexdigest(),
    )
    write_manifest(manifest, folder)
    return manifest


def write_shard(
    sequences: Sequences,
    path: Path,
    first_user: int,
    end_user: int,
    users_per_record: int,
    base: int = 0,
) -> ShardEntry:
    """Write the tar of users first_user..end_user-1. `base`: row of the sequences' first user."""
    records = []
    with path.open("wb+") as file:
        # Closed before its file also where a disk is full, or it would complain when it is
        # collected.
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for start in range(first_user, end_user, users_per_record):
                end = min(start + users_per_record, end_user)
                offsets = sequences.offsets[start - base : end - base + 1]
                members = {
                    "items": sequences.items[offsets[0] : offsets[-1]],
                    "offsets": offsets - offsets[0],
                    "users": np.arange(start, end),
                }
                at = tar.offset
                for name, values in members.items():
                    data = _npy(values)
                    member = tarfile.TarInfo(f"{start // users_per_record:08d}.{name}.npy")
                    member.size, member.mode = len(data), _MODE
                    member.uname = member.gname = _OWNER
                    tar.addfile(member, io.BytesIO(data))
                records.append((at, tar.offset - at, start, end - start))
        entries = []
        for at, size, start, num_users in records:
            file.seek(at)
            sha256 = hashlib.sha256(file.read(size)).hexdigest()
            entry = RecordEntry(
                offset=at, bytes=size, first_user=start, users=num_users, sha256=sha256
            )
            entries.append(entry)
    return ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        users=end_user - first_user,
        records=tuple(entries),
    )


def _npy(values: np.ndarray) -> bytes:
    assert len(values) == 0 or values.max() < 1 << 31
    buffer = io.BytesIO()
    np.save(buffer, values.astype("<i4"), allow_pickle=False)
    return buffer.getvalue()
