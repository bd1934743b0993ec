"""Shards written by tasks: each tar by one of them, from sequences that no process holds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.atomic import atomic_directory
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.errors import DataError
from genrec_shards.ray_engine.sources import LogFile, place_of
from genrec_shards.ray_engine.tasks import Tasks, connected
from genrec_shards.ray_engine.upload import claim, send, writable
from genrec_shards.sequences import Sequences
from genrec_shards.storage.manifest import MANIFEST, Manifest, ShardEntry
from genrec_shards.storage.remote import RemoteFiles, RetryPolicy, is_address
from genrec_shards.storage.write import check_sizes, finish_shards, write_shard

TARS_A_CORE = 4
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
        if isinstance(target, Path):
            dataset = _loaded(source, Path(scratch))
            with (
                connected(address) as tasks,
                atomic_directory(target, overwrite, marker=MANIFEST) as folder,
            ):
                entries = _tars(
                    dataset.sequences,
                    str(folder.resolve()),
                    users_per_shard,
                    users_per_record,
                    tasks,
                )
                for left in folder.glob(".*"):  # of a worker that was lost
                    shutil.rmtree(left, ignore_errors=True)
                return finish_shards(folder, dataset, entries, users_per_record)
        files = writable(target)
        taken = claim(files, overwrite, MANIFEST)
        dataset = _loaded(source, Path(scratch))
        with connected(address) as tasks:
            if taken:
                files.remove(MANIFEST)
            entries = _tars(
                dataset.sequences, files.address, users_per_shard, users_per_record, tasks
            )
        made = Path(scratch) / "made"
        made.mkdir()
        manifest = finish_shards(made, dataset, entries, users_per_record)
        send(files, made, MANIFEST)
        return manifest


def _loaded(source: str | Path, scratch: Path) -> Dataset:
    """A data directory, checked; its sequences are mapped and not read into memory."""
    if isinstance(source, Path):
        file = LogFile(str(source / "sequences.parquet"), 0)
        return load_dataset(source, lambda: _mapped_lists(file, scratch))
    files = RemoteFiles(source, RetryPolicy())
    for name in ("dataset.json", "users.parquet", "items.parquet"):
        (scratch / name).write_bytes(
            files.fetch(name, f"{files.address}/{name}", count=lambda size: None)
        )
    place = f"{files.address}/sequences.parquet"
    file = LogFile(place, files.size("sequences.parquet", place))
    return load_dataset(scratch, lambda: _mapped_lists(file, scratch))


def _mapped_lists(file: LogFile, scratch: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """As `load_dataset` reads them, a row group at a time."""
    lengths = [np.zeros(1, np.int64)]
    kinds = {"items": (pa.int32(), "<i4"), "times": (pa.int64(), "<i8")}
    try:
        with file.open() as raw, pq.ParquetFile(raw) as table:
            held = [name for name in kinds if name in table.schema_arrow.names]
            for name in held:
                if table.schema_arrow.field(name).type != pa.list_(kinds[name][0]):
                    raise DataError(
                        f"{file.place}: column {name} is no list<{kinds[name][0]}>: prepare again"
                    )
            if "items" not in held:
                raise DataError(f"{file.place}: no column items: prepare again")
            for number in range(table.num_row_groups):
                group = table.read_row_group(number, held)
                for name in held:
                    chunks = group.column(name).chunks
                    with (scratch / name).open("ab") as to:
                        for chunk in chunks:
                            to.write(
                                chunk.flatten().to_numpy().astype(kinds[name][1], copy=False).data
                            )
                    if name == "items":
                        lengths += [chunk.value_lengths().to_numpy() for chunk in chunks]
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.place}: not readable as Parquet ({str(error).splitlines()[0]}): prepare again"
        ) from None
    flat = {name: np.asarray(np.memmap(scratch / name, kinds[name][1], "r")) for name in held}
    offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    if any(len(values) != offsets[-1] for values in flat.values()):
        raise DataError(f"{file.place}: times and items differ in number: prepare again")
    return flat["items"], offsets, flat.get("times")


def _tars(
    sequences: Sequences, target: str, users_per_shard: int, users_per_record: int, tasks: Tasks
) -> list[ShardEntry]:
    entries: list[ShardEntry] = []
    waiting: list[Any] = []
    for number, (first, end) in enumerate(_ranges(sequences.num_users, users_per_shard)):
        offsets = sequences.offsets[first : end + 1]
        items = sequences.items[offsets[0] : offsets[-1]]
        name = f"shard-{number:06d}.tar"
        waiting.append(
            tasks.start(
                write_tar, target, name, items, offsets - offsets[0], first, users_per_record
            )
        )
        if len(waiting) >= TARS_A_CORE * tasks.num_cpus:
            entries.append(tasks.get(waiting.pop(0)))
    return entries + [tasks.get(reference) for reference in waiting]


def _ranges(num_users: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, num_users)) for first in range(0, num_users, size))


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
    part = Sequences(items, offsets, [], [])
    end_user = first_user + len(offsets) - 1
    if is_address(target):
        with tempfile.TemporaryDirectory(prefix="genrec-") as scratch:
            entry = write_shard(
                part, Path(scratch) / name, first_user, end_user, users_per_record, first_user
            )
            writable(target).put(name, Path(scratch) / name)
            return entry
    folder = Path(target)
    if not folder.is_dir():
        raise DataError(
            f"{folder.parent}: not seen by a node of the cluster: choose an output on a path that all nodes share, or s3://"
        )
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        entry = write_shard(
            part, Path(scratch) / name, first_user, end_user, users_per_record, first_user
        )
        os.replace(Path(scratch) / name, folder / name)
    return entry
