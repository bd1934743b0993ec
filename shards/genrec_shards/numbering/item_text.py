"""What items are: their text and attributes, read from a table beside the log, and vectors of their
words."""

from __future__ import annotations

import ast
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.errors import DataError
from genrec_shards.numbering.truncated_eigen import factor_rows
from genrec_shards.storage.manifest import file_sha256

if TYPE_CHECKING:
    import scipy.sparse as sp

# N items, F features, D dims

ID_COLUMNS = ("item", "item_id", "id", "parent_asin", "asin", "business_id")
"""Where the item's id is looked for, in this order, unless a column is named."""
TITLE_COLUMNS = ("title", "name", "product_title", "movie_title", "item_name")
"""Where the item's title is looked for, unless a column is named."""
FEATURES = 1 << 18
"""Buckets that words are hashed into."""
_LONGEST_CELL = 1 << 24
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Descriptions:
    """Each item's text, '' where there is none."""

    texts: list[str]
    """Index = item row."""
    name: str
    """File name without its folder."""
    sha256: str
    titles: list[str] | None = None
    """What a person calls each item, '' where the file does not say; None where it has no
    titles."""


def read_descriptions(
    path: str | Path,
    item_ids: Sequence[str],
    *,
    id_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    title_column: str | None = None,
) -> Descriptions:
    """Texts of these items out of a table.

    A cell's text is what it says, of lists and objects what is in them. Items that the file lacks
    have the text ''; its other items are left out; where an id comes twice the first row counts.
    JSON lines may be Python's, as in Amazon's 2014 release; nothing is run.

    Args:
        path: CSV, Parquet or JSON lines (`.csv`, `.parquet`, `.jsonl`, `.json`; `.gz` too).
        item_ids: the catalogue by item row.
        id_column: None looks for one of ID_COLUMNS.
        text_columns: None takes every other column.
        title_column: None looks for one of TITLE_COLUMNS, and there need be none.

    Raises:
        DataError: one line with file, line and remedy.
    """
    path = Path(path)
    row_of = {item: row for row, item in enumerate(item_ids)}
    texts, titles = [""] * len(item_ids), [""] * len(item_ids)
    title_columns = TITLE_COLUMNS if title_column is None else (title_column,)
    found_columns: set[str] = set()
    try:
        for line, record in _records(path):
            found_columns |= record.keys()
            column = id_column or next((name for name in ID_COLUMNS if name in record), None)
            if column is None or column not in record:
                wanted = f"column {column}" if column else "column of item ids"
                complaint = f"no {wanted}, only {_listed(record)}"
                raise DataError(f"{path}:{line}: {complaint}: name one of these with --item-column")
            row = row_of.get(_text_of(record[column]))
            if row is None:
                continue
            names = text_columns
            if names is None:
                names = [name for name in record if name != column]
            words = [_text_of(record.get(name)) for name in names]
            texts[row] = texts[row] or " ".join(filter(None, words))
            title = next((name for name in title_columns if name in record), None)
            if title is not None:  # it is shown on a line of its own
                titles[row] = titles[row] or " ".join(_text_of(record[title]).split())
        digest = file_sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        state = "cut off" if isinstance(error, EOFError) else f"damaged ({error})"
        complaint = f"the gzip stream is {state}: download or copy the file again"
        raise DataError(f"{path}: {complaint}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        complaint = f"cannot be read ({error.strerror or error}): check the path and its rights"
        raise DataError(f"{path}: {complaint}") from None
    if not found_columns:
        raise DataError(f"{path}: empty: expected a record per item")
    named = [(name, "--text-columns") for name in text_columns or ()]
    named += [(name, "--title-column") for name in (title_column,) if name is not None]
    for name, option in named:
        if name not in found_columns:
            only = f"only {_listed(found_columns)}: check {option}"
            raise DataError(f"{path}: no column {name}, {only}")
    if not any(texts):
        complaint = f"describes none of the {len(item_ids)} items"
        raise DataError(f"{path}: {complaint}: check that its ids are those of the log")
    return Descriptions(texts, path.name, digest, titles if any(titles) else None)


def text_vectors(texts: Sequence[str], dims: int, seed: int) -> np.ndarray:
    """float64[N, D], D = min(dims, N): near each other where texts share rare words. Zeros for an
    item without a text.

    Words (of Unicode, in lower case) hashed into FEATURES buckets, (1 + log count) log((1 + N) / (1
    + texts with it)), rows of length 1, then the largest factors."""
    return factor_rows(word_weights(texts), dims, seed)


def word_weights(texts: Sequence[str]) -> sp.csr_matrix:
    """float64[N, F] of the buckets that are used: what `text_vectors` takes the factors of."""
    import scipy.sparse as sp

    # crc32, because Python's own hash of a string differs from process to process.
    buckets = [
        [zlib.crc32(word.encode()) % FEATURES for word in _WORD.findall(text.lower())]
        for text in texts
    ]
    rows = np.repeat(np.arange(len(texts)), [len(found) for found in buckets])
    columns = np.fromiter((bucket for found in buckets for bucket in found), np.int64, len(rows))
    counts_NF = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), FEATURES))
    counts_NF.sum_duplicates()
    # Most buckets stay empty; the factors need only the others.
    used = np.unique(counts_NF.indices)
    counts_NF = counts_NF[:, used]
    texts_with_F = np.bincount(counts_NF.indices, minlength=len(used))
    rarity_F = np.log((1 + len(texts)) / (1 + texts_with_F))
    counts_NF.data = (1 + np.log(counts_NF.data)) * rarity_F[counts_NF.indices]
    return unit_rows(counts_NF)


def unit_rows(matrix_NF: sp.csr_matrix) -> sp.csr_matrix:
    """Rows of length 1; rows of zeros stay."""
    import scipy.sparse as sp

    lengths_N = np.sqrt(np.asarray(matrix_NF.multiply(matrix_NF).sum(axis=1)).ravel())
    factors_N = np.divide(1, lengths_N, out=np.zeros_like(lengths_N), where=lengths_N > 0)
    return (sp.diags(factors_N) @ matrix_NF).tocsr()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:12]) or "none"


def _text_of(value: Any) -> str:
    """What a cell says; of lists and objects what is in them, in their order. No recursion: a line
    may be nested deeply."""
    words, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += reversed(part.values())
        elif isinstance(part, list | tuple):
            waiting += reversed(part)
        elif isinstance(part, set):
            waiting += sorted(map(str, part), reverse=True)
        elif part is not None:
            words.append(str(part).strip())
    # JSON can spell half a surrogate pair, which is no text.
    return " ".join(filter(None, words)).encode(errors="replace").decode()


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) one after another; the line of a Parquet file is its row, from 1."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        return _parquet_records(path)
    if kind == "csv":
        return _csv_records(path)
    if kind in ("jsonl", "json", "ndjson"):
        return _json_records(path)
    kinds = "neither .csv, .parquet, .jsonl nor .json (or one of these with .gz)"
    raise DataError(f"{path}: {kinds}: rename or convert it")


def _parquet_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(8192):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # Arrow reports damage as an OSError too, of several lines; and Python has no date for some
        # of Arrow's.
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not readable as Parquet ({reason}): save it again") from None


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _opened(path) as file:
            reader = csv.DictReader(file, strict=True, restval="")
            for record in reader:
                if None in record:
                    complaint = "more cells than the first line has columns: mend the line"
                    raise DataError(f"{path}:{reader.line_num}: {complaint}")
                yield reader.line_num, record
    except csv.Error as error:
        complaint = f"not readable as CSV ({error}): mend the line"
        raise DataError(f"{path}:{reader.line_num}: {complaint}") from None
    finally:
        csv.field_size_limit(before)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                try:
                    record = ast.literal_eval(line.strip())
                except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                    record = None
            if not isinstance(record, dict):
                complaint = "not an object in JSON: expected one item per line; mend the line"
                raise DataError(f"{path}:{number}: {complaint}")
            yield number, record


def _opened(path: Path) -> Any:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
