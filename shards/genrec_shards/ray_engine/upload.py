"""A directory behind an address: its files come one by one, and the one that makes it complete
comes last."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from genrec_shards.storage.remote import RemoteFiles, RetryPolicy


@contextlib.contextmanager
def uploaded_directory(address: str, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield a path of this machine where a directory is to be made; when the block ends well, its
    files go to the address.

    There is no rename there, so `marker` makes the directory complete: it is the first file that an
    overwriting run removes and the last that it writes. Raises ValueError, before the block runs,
    for an address that is not s3 or is taken."""
    files = writable(address)
    taken = is_taken(files, overwrite, marker)
    with tempfile.TemporaryDirectory(prefix="genrec-") as scratch:
        made = Path(scratch) / "made"
        yield made
        if taken:
            files.remove(marker)
        send(files, made, marker)


def writable(address: str) -> RemoteFiles:
    """Raises ValueError for an address that cannot be written to."""
    files = RemoteFiles(address, RetryPolicy())
    if files.scheme != "s3":
        remedy = "choose a path, or an address of s3://"
        raise ValueError(f"{files.address}: cannot be written to: {remedy}")
    return files


def is_taken(files: RemoteFiles, overwrite: bool, marker: str) -> bool:
    """Whether there is a directory to be overwritten. Raises ValueError for one that must not
    be."""
    names = [name for name, _ in files.listed()]
    if names and not overwrite:
        remedy = "choose another output, or overwrite it with --overwrite"
        raise ValueError(f"{files.address} exists: {remedy}")
    if names and marker not in names:
        not_ours = f"holds no {marker}, so it is not ours to overwrite"
        raise ValueError(f"{files.address} {not_ours}: choose another output")
    return bool(names)


def send(files: RemoteFiles, folder: Path, marker: str) -> None:
    """Write the folder's files, the marker last."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == marker, path.name)):
        files.put(path.name, path)
