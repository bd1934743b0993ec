"""Text files as blocks of whole lines, plain, gzipped or zipped, so that no file has to fit into
memory."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from genrec_shards.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGIC = b"PK\x03\x04"
_NOT_READ = {
    b"BZh91AY": ("bzip2", "unpack it"),
    b"\xfd7zXZ": ("xz", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it"),
    b"7z\xbc\xaf": ("7z", "unpack it"),
    b"Rar!\x1a": ("rar", "unpack it"),
    b"PAR1\x15": ("Parquet", "let its name end in .parquet"),
}
"""First bytes of files that are no text -> what they are, and the way out."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 26
"""Bytes without an end of line that are no longer taken for a line of a log."""
MOST_TIMES = 100
"""How many times its own size a packed log may unpack to; logs unpack to 3 to 20 times theirs."""
ALWAYS_UNPACKED = 1 << 28
"""Bytes that any packed log may unpack to."""


@dataclass(frozen=True)
class Block:
    """Whole lines, each with its end but perhaps the file's last."""

    first_line: int
    """Number of its first line in the file, from 1."""
    data: bytes


def blocks(path: Path) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES, one after another, without a byte-order mark; the content tells
    whether it is gzip or zip. Raises DataError where the file is missing, cannot be read, is a
    damaged gzip or has a line without end."""
    check_readable(path)
    try:
        with path.open("rb") as raw:
            yield from whole_lines(str(path), unpacked(str(path), raw))
    except OSError as error:
        raise unreadable(path, error) from None


def whole_lines(
    path: str, pieces: Iterator[bytes], line: int = 1, start: bool = True
) -> Iterator[Block]:
    """Blocks of a text that comes in pieces.

    Args:
        path: the file, as messages name it.
        pieces: bytes, cut anywhere.
        line: number of the first line.
        start: whether the first piece is the beginning of the file.
    """
    parts: list[bytes] = []  # of a line whose end has not come yet
    size = 0
    for data in pieces:
        if start:
            data, start = data.removeprefix(BYTE_ORDER_MARK), False
        whole, end, tail = data.rpartition(b"\n")
        first = data.find(b"\n") if end else len(data)
        if size + first > LONGEST_LINE:
            limit = f"a line of more than {LONGEST_LINE >> 20} MiB"
            raise DataError(
                f"{path}:{line}: {limit}: this is no log of interactions, check the path"
            )
        if end:
            block = Block(line, b"".join([*parts, whole, end]))
            parts, size = [], 0
            line += block.data.count(b"\n")
            yield block
        parts.append(tail)
        size += len(tail)
    if size:
        yield Block(line, b"".join(parts))


def find_fault(data: bytes) -> tuple[int, str] | None:
    """(position, reason) of the first byte by which this is no UTF-8 text; None where it is."""
    if (position := data.find(b"\0")) >= 0:
        return position, "binary (a zero byte)"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start, f"not UTF-8 (byte 0x{data[error.start]:02x})"
    return None


def check_readable(path: Path) -> None:
    """Raises DataError, one line, for a path that is missing or cannot be read."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: Exception) -> DataError:
    """What to raise for a file that the system does not read."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason}): check the path and its rights")


def is_packed(beginning: bytes) -> bool:
    """Whether a file that begins so, with at least four bytes, cannot be entered half-way."""
    return beginning.startswith((GZIP_MAGIC, _ZIP_MAGIC))


def unpacked(path: str, raw: BinaryIO) -> Iterator[bytes]:
    """Pieces of BLOCK_BYTES of an open file: plain, gzipped, or the one file of a zip. Raises
    DataError where it is damaged, packed otherwise, a zip of several files, or unpacks to more than
    ALWAYS_UNPACKED bytes and MOST_TIMES its size: a small file would be read for hours."""
    most = max(ALWAYS_UNPACKED, MOST_TIMES * raw.seek(0, io.SEEK_END))
    raw.seek(0)
    beginning = raw.read(8)
    raw.seek(0)
    for magic, (kind, remedy) in _NOT_READ.items():
        if beginning.startswith(magic):
            raise DataError(f"{path}: {kind} is not read as text: {remedy}")
    name = "gzip stream"
    file: IO[bytes] | gzip.GzipFile = raw
    if beginning.startswith(_ZIP_MAGIC):
        name, file = "zip", _zipped_file(path, raw)
    elif beginning.startswith(GZIP_MAGIC):
        file = gzip.GzipFile(fileobj=raw)
    size = 0
    try:
        while data := file.read(BLOCK_BYTES):
            size += len(data)
            if size > most and file is not raw:
                limit = f"more than {most >> 20:,} MiB, over {MOST_TIMES} times its size"
                remedy = "where it is a log, unpack it and give what comes of it"
                raise DataError(f"{path}: unpacks to {limit}: {remedy}")
            yield data
    except EOFError:
        fault = f"the {name} is cut off"
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        fault = f"the {name} is damaged ({error})"
    else:
        return
    raise DataError(f"{path}: {fault}: download or copy the file again")


def _zipped_file(path: str, raw: BinaryIO) -> IO[bytes]:
    """The one file of a zip, to be read."""
    try:
        archive = zipfile.ZipFile(raw)
        files = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        # What a Mac puts beside each file is none of the user's.
        files = [file for file in files if not file.startswith("__MACOSX/")]
        if "[Content_Types].xml" in files:
            raise DataError(f"{path}: a spreadsheet or document: save it as CSV")
        if len(files) != 1:
            few = ", ".join(file if file.isprintable() else repr(file) for file in files[:4])
            named = f"a zip of {len(files)} files ({few}{', ...' * (len(files) > 4)})"
            raise DataError(f"{path}: {named}: unpack it and give the one that is meant")
        return archive.open(files[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{path}: the zip cannot be read ({reason}): unpack it yourself") from None
