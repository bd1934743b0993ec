"""Shards written by tasks: each tar by one of them, from sequences that no process holds."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.atomic import atomic_directory
from genrec_shards.dataset import Dataset, Lists, load_dataset
from genrec_shards.errors import DataError
from genrec_shards.ray_engine.sources import LogFile, place_of
from genrec_shards.ray_engine.tasks import connected
from genrec_shards.ray_engine.upload import is_taken, send, writable
from genrec_shards.sequences import Sequences
from genrec_shards.storage.address import is_address
from genrec_shards.storage.manifest import MANIFEST, Manifest, ShardEntry
from genrec_shards.storage.remote import RemoteFiles, RetryPolicy
from genrec_shards.storage.write import check_sizes, finish_shards, write_shard

TARS_PER_CORE = 4
"""On their way at once: what is sent ahead waits in Ray's store."""


def write_shards_on_ray(
    data: str | Path,
    out: str | Path,
    *,
    users_per_shard: int = 8192,
    users_per_record: int = 1024,
    overwrite: bool = False,
    address: str | None = None,
) -> Manifest:
    """As `write_shards`, to the byte, of the data directory at a path or address, into a path that
    all nodes see or to s3.

    This process holds ids, and the sequences in mapped files. On s3 there is no rename: the
    manifest is written last and makes the directory complete. `address`: of the cluster, None for
    one of our own. Raises ValueError and DataError, one line."""
    check_sizes(users_per_shard, users_per_record)
    source, target = place_of(data), place_of(out)
    with tempfile.TemporaryDirectory(prefix="genrec-") as scratch:
        files = None if isinstance(target, Path) else writable(target)
        taken = files is not None and is_taken(files, overwrite, MANIFEST)
        dataset = _load_mapped(source, Path(scratch))
        made = Path(scratch) / "made" if files is not None else target
        with (
            connected(address) as tasks,
            atomic_directory(made, overwrite, marker=MANIFEST) as folder,
        ):
            if files is not None and taken:
                files.remove(MANIFEST)
            place = str(folder.resolve()) if files is None else files.address
            entries: list[ShardEntry] = []
            waiting: list[Any] = []
            for first in range(0, dataset.sequences.num_users, users_per_shard):
                end = min(first + users_per_shard, dataset.sequences.num_users)
                offsets = dataset.sequences.offsets[first : end + 1]
                items = dataset.sequences.items[offsets[0] : offsets[-1]]
                name = f"shard-{first // users_per_shard:06d}.tar"
                held = items, offsets - offsets[0], first
                waiting.append(tasks.start(write_tar, place, name, *held, users_per_record))
                if len(waiting) >= TARS_PER_CORE * tasks.num_cpus:
                    entries.append(tasks.get(waiting.pop(0)))
            entries += [tasks.get(reference) for reference in waiting]
            for left in folder.glob(".*"):  # of a worker that was lost
                shutil.rmtree(left, ignore_errors=True)
            manifest = finish_shards(folder, dataset, entries, users_per_record)
        if files is not None:
            send(files, Path(made), MANIFEST)
        return manifest


def _load_mapped(source: str | Path, scratch: Path) -> Dataset:
    """The data directory, checked; its sequences are in mapped files under `scratch`."""
    if isinstance(source, Path):
        file = LogFile(str(source / "sequences.parquet"), 0)
        return load_dataset(source, lambda: _mapped_lists(file, scratch))
    files = RemoteFiles(source, RetryPolicy())
    for name in ("dataset.json", "users.parquet", "items.parquet"):
        place = f"{files.address}/{name}"
        (scratch / name).write_bytes(files.fetch(name, place, count=lambda size: None))
    place = f"{files.address}/sequences.parquet"
    file = LogFile(place, files.size("sequences.parquet", place))
    return load_dataset(scratch, lambda: _mapped_lists(file, scratch))


def _mapped_lists(file: LogFile, scratch: Path) -> Lists:
    """As `load_dataset` reads them, a row group at a time."""
    lengths = [np.zeros(1, np.int64)]
    kinds = {"items": (pa.int32(), "<i4"), "times": (pa.int64(), "<i8")}
    try:
        with file.open() as raw, pq.ParquetFile(raw) as table:
            held = [name for name in kinds if name in table.schema_arrow.names]
            for name in held:
                kind = pa.list_(kinds[name][0])
                if table.schema_arrow.field(name).type != kind:
                    raise DataError(f"{file.place}: column {name} is no {kind}: prepare again")
            if "items" not in held:
                raise DataError(f"{file.place}: no column items: prepare again")
            for number in range(table.num_row_groups):
                group = table.read_row_group(number, held)
                for name in held:
                    with (scratch / name).open("ab") as to:
                        for chunk in group.column(name).chunks:
                            values = chunk.flatten().to_numpy()
                            to.write(values.astype(kinds[name][1], copy=False).data)
                            if name == "items":
                                lengths.append(chunk.value_lengths().to_numpy())
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{file.place}: not readable as Parquet ({reason}): prepare again"
        ) from None
    flat = {name: np.asarray(np.memmap(scratch / name, kinds[name][1], "r")) for name in held}
    offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    if any(len(values) != offsets[-1] for values in flat.values()):
        raise DataError(f"{file.place}: times and items differ in number: prepare again")
    return flat["items"], offsets, flat.get("times")


def write_tar(
    target: str,
    name: str,
    items: np.ndarray,
    offsets: np.ndarray,
    first_user: int,
    users_per_record: int,
) -> ShardEntry:
    """Write one tar into a folder or to an address. A task that is done again puts the same in its
    place."""
    part, end_user = Sequences(items, offsets, [], []), first_user + len(offsets) - 1
    folder = None if is_address(target) else Path(target)
    if folder is not None and not folder.is_dir():
        remedy = "choose an output on a path that all nodes share, or s3://"
        raise DataError(f"{folder.parent}: not seen by a node of the cluster: {remedy}")
    with tempfile.TemporaryDirectory(prefix=".genrec-", dir=folder) as scratch:
        path = Path(scratch) / name
        entry = write_shard(part, path, first_user, end_user, users_per_record, first_user)
        if folder is None:
            writable(target).put(name, path)
        else:
            os.replace(path, folder / name)
    return entry
