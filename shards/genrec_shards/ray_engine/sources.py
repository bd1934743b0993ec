"""A log's files on a path that all nodes see or behind an address, each opened where it is read."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from genrec_shards.errors import DataError
from genrec_shards.readers.detect_format import Format, guess_by_name, guess_format
from genrec_shards.readers.read_log import endings_of, source_files
from genrec_shards.readers.text_blocks import readable
from genrec_shards.storage.remote import RemoteFiles, RetryPolicy, is_address

BYTES_A_REQUEST = 8 << 20
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
            return io.BufferedReader(_Remote(self.place, self.size), BYTES_A_REQUEST)
        try:
            return Path(self.place).open("rb")
        except FileNotFoundError:
            raise DataError(
                f"{self.place}: not seen by a node of the cluster: put it on a path that all nodes share, or behind an address"
            ) from None
        except OSError as error:
            raise DataError(
                f"{self.place}: cannot be read ({error.strerror}): check the path and its rights"
            ) from None


class _Remote(io.RawIOBase):
    """A file behind an address, read in parts, as patiently as shards are."""

    def __init__(self, address: str, size: int) -> None:
        folder, _, self.base = address.rpartition("/")
        self.files, self.address, self.size, self.at = (
            RemoteFiles(folder, RetryPolicy()),
            address,
            size,
            0,
        )

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
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        data = self.files.fetch(
            self.base, self.address, part=(self.at, end), count=lambda size: None
        )
        buffer[: len(data)] = data
        self.at = end
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
        readable(source)
    else:
        RemoteFiles(source, RetryPolicy())


def format_of(source: str | Path) -> Format:
    """As `guess_format`, behind an address too."""
    if isinstance(source, Path):
        return guess_format(source)
    file = log_files_of(source, None)[0]
    return guess_by_name(file.name, lambda: file.open().readline())


def log_files_of(source: str | Path, format: str | None) -> list[LogFile]:
    """The files of a log, as `source_files`. `format`: None where it is still to be guessed."""
    if isinstance(source, Path):
        return [
            LogFile(str(file), file.stat().st_size)
            for file in source_files(source, format or "interactions")
        ]
    folder, _, name = source.rstrip("/").rpartition("/")
    if source.startswith("s3:"):
        found = RemoteFiles(source, RetryPolicy()).listed()
        endings = endings_of(format)
        # An object has no entries below it.
        chosen = [
            LogFile(f"{source.rstrip('/')}/{entry}", size)
            for entry, size in sorted(found)
            if entry.lower().removesuffix(".gz").rpartition(".")[2] in endings
            and not entry.startswith((".", "_"))
        ]
        if found and not chosen:
            raise DataError(
                f"{source}: no file that ends in .{', .'.join(endings)}: check the path"
            )
        if chosen:
            return chosen
    return [LogFile(source, RemoteFiles(folder, RetryPolicy()).size(name, source))]
