"""A log's files on a path that all nodes see or behind an address, each opened where it is read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from genrec_shards.errors import DataError
from genrec_shards.readers.read_log import Format, log_names, source_files
from genrec_shards.readers.recognise import guess_format, guess_of_file
from genrec_shards.readers.text_blocks import check_readable, unreadable
from genrec_shards.storage.address import is_address
from genrec_shards.storage.remote import RemoteFiles, RetryPolicy

BYTES_PER_REQUEST = 8 << 20
"""Read at once behind an address."""


@dataclass(frozen=True)
class LogFile:
    """One file of a log."""

    place: str
    """Path or address, as messages name it."""
    size: int
    """Bytes."""

    @property
    def name(self) -> str:
        return self.place.rstrip("/").rpartition("/")[2]

    def open(self) -> BinaryIO:
        """Raises DataError where this node does not see the path."""
        if is_address(self.place):
            return io.BufferedReader(_RemoteFile(self.place, self.size), BYTES_PER_REQUEST)
        try:
            return Path(self.place).open("rb")
        except FileNotFoundError:
            remedy = "put it on a path that all nodes share, or behind an address"
            not_seen = "not seen by a node of the cluster"
            raise DataError(f"{self.place}: {not_seen}: {remedy}") from None
        except OSError as error:
            raise unreadable(self.place, error) from None


class _RemoteFile(io.RawIOBase):
    """A file behind an address, read in parts, with the retries that shards have."""

    def __init__(self, address: str, size: int) -> None:
        folder, _, self.base = address.rpartition("/")
        self.files, self.address = RemoteFiles(folder, RetryPolicy()), address
        self.size, self.at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        part = self.at, min(self.at + len(buffer), self.size)
        if part[1] <= part[0]:
            return 0
        data = self.files.fetch(self.base, self.address, part=part, count=lambda size: None)
        buffer[: len(data)] = data
        self.at = part[1]
        return len(data)


def place_of(source: str | Path) -> str | Path:
    """An address, or a path: of `file://` too. Raises ValueError for `file://` of another
    machine."""
    if not str(source).startswith("file:"):
        return str(source) if is_address(source) else Path(source)
    parts = urlsplit(str(source))
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(f"{source}: write file:///PATH, or the path alone")
    return Path(unquote(parts.path))


def check_source(source: str | Path) -> None:
    """Raises ValueError or DataError, one line, for a path that cannot be read or an address that
    is not allowed."""
    if isinstance(source, Path):
        check_readable(source)
    else:
        RemoteFiles(source, RetryPolicy())


def format_of(source: str | Path, columns: Sequence[str] | None = None) -> Format:
    """As `guess_format`, behind an address too."""
    if isinstance(source, Path):
        return guess_format(source, columns)
    file = log_files_of(source, None)[0]
    return guess_of_file(file.place, file.open, columns)


def log_files_of(source: str | Path, format: str | None) -> list[LogFile]:
    """The files of a log, as `source_files`. `format`: None where it is still to be guessed."""
    if isinstance(source, Path):
        files = source_files(source, format or "interactions")
        return [LogFile(str(file), file.stat().st_size) for file in files]
    folder, _, name = source.rstrip("/").rpartition("/")
    is_s3 = source.startswith("s3:")
    # An object has no entries below it.
    if is_s3 and (sizes := dict(RemoteFiles(source, RetryPolicy()).listed())):
        names = log_names(sizes, format, source)
        return [LogFile(f"{source.rstrip('/')}/{name}", sizes[name]) for name in names]
    return [LogFile(source, RemoteFiles(folder, RetryPolicy()).size(name, source))]
