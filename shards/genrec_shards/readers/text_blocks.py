"""Text files as blocks of whole lines, plain or gzipped, so that no file has to fit into memory."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from genrec_shards.errors import DataError
from genrec_shards.sequences import BYTE_ORDER_MARK, GZIP_MAGIC

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 26
"""Bytes without an end of line that are no longer taken for a line of a log."""


@dataclass(frozen=True)
class Block:
    """Whole lines, each with its end but perhaps the file's last."""

    first_line: int
    """Number of its first line in the file, from 1."""
    data: bytes

    @property
    def num_lines(self) -> int:
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))


def blocks(path: Path) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES, one after another; gzip is told by the content, a byte-order
    mark is left out.

    Raises DataError, one line, for a file that is missing, cannot be read, is a damaged gzip or has
    a line without end."""
    return whole_lines(str(path), _pieces(path))


def whole_lines(
    path: str, pieces: Iterator[bytes], line: int = 1, start: bool = True
) -> Iterator[Block]:
    """Blocks of a text that comes in pieces. `line`: number of the first one; `start`: is it the
    file's first?"""
    rest = b""
    for data in pieces:
        if start:
            data, start = data.removeprefix(BYTE_ORDER_MARK), False
        whole, end, tail = data.rpartition(b"\n")
        if not end:
            rest += data
            if len(rest) > LONGEST_LINE:
                raise DataError(
                    f"{path}:{line}: a line of more than {LONGEST_LINE >> 20} MiB: this is no log of interactions, check the path"
                )
            continue
        block = Block(line, rest + whole + end)
        rest = tail
        line += block.num_lines
        yield block
    if rest:
        yield Block(line, rest)


def readable(path: Path) -> None:
    """Raises DataError, one line, for a path that is missing or cannot be read."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"{path}: cannot be read ({reason}): check the path and its rights"
        ) from None


def _pieces(path: Path) -> Iterator[bytes]:
    readable(path)
    try:
        with path.open("rb") as raw:
            yield from unpacked(str(path), raw)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}): check the path and its rights"
        ) from None


def unpacked(path: str, raw: BinaryIO) -> Iterator[bytes]:
    """Pieces of BLOCK_BYTES of an open file, plain or gzipped. Raises DataError for a damaged
    gzip."""
    packed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    raw.seek(0)
    file = gzip.GzipFile(fileobj=raw) if packed else raw
    try:
        while data := file.read(BLOCK_BYTES):
            yield data
    except EOFError:
        raise DataError(
            f"{path}: the gzip stream is cut off: download or copy the file again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip stream is damaged ({error}): download or copy the file again"
        ) from None
