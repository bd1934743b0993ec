"""What items are: their text and attributes, read from a table beside the log, and vectors of their
words."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec_shards.errors import DataError
from genrec_shards.numbering.truncated_eigen import factor_rows
from genrec_shards.readers.columns import COLUMNS, first_of
from genrec_shards.readers.records import read_records
from genrec_shards.storage.manifest import file_sha256

if TYPE_CHECKING:
    import scipy.sparse as sp

# N items, F features, D dims

ID_COLUMNS = ("item", "item_id", "id", *COLUMNS["items"][2:])
"""Where the item's id is looked for, in this order, unless a column is named; compared with
`plain_name`, and so are titles."""
TITLE_COLUMNS = ("title", "name", "product_title", "movie_title", "item_name")
"""Where the item's title is looked for, unless a column is named."""
FEATURES = 1 << 18
"""Buckets that words are hashed into."""
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

    @property
    def num_described(self) -> int:
        """Items that have a text."""
        return sum(map(bool, self.texts))

    @cached_property
    def texts_hash(self) -> str:
        """sha256 of the texts in the order of the rows: what is made of them depends on no more."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


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
        path: what `read_records` reads.
        item_ids: the catalogue by item row.
        id_column: None looks for one of ID_COLUMNS. A whole number is a place from 0, and then the
            other columns are places too, of a text without a line of names.
        text_columns: None takes every other column.
        title_column: None looks for one of TITLE_COLUMNS, and there need be none.

    Raises:
        DataError: one line with file, line and remedy.
    """
    path = Path(path)
    row_of = {item: row for row, item in enumerate(item_ids)}
    texts, titles = [""] * len(item_ids), [""] * len(item_ids)
    found_columns: set[str] = set()
    named: tuple[str, ...] = ()
    column = title = None
    for line, record in read_records(path, by_place=id_column is not None and id_column.isdigit()):
        if named != tuple(record):
            named = tuple(record)
            found_columns |= record.keys()
            column = id_column if id_column is not None else first_of(ID_COLUMNS, named)
            title = title_column if title_column is not None else first_of(TITLE_COLUMNS, named)
        if column is None or column not in record:
            wanted = f"column {column}" if column else "column of item ids"
            complaint = f"no {wanted}, only {_listed(record)}"
            remedy = "name one of these with --item-column, or give its place, as --item-column 0"
            raise DataError(f"{path}:{line}: {complaint}: {remedy}")
        row = row_of.get(_text_of(record[column]))
        if row is None:
            continue
        names = (
            [name for name in record if name != column] if text_columns is None else text_columns
        )
        words = [_text_of(record.get(name)) for name in names]
        texts[row] = texts[row] or " ".join(filter(None, words))
        if title is not None and title in record:  # it is shown on a line of its own
            titles[row] = titles[row] or " ".join(_text_of(record[title]).split())
    if not found_columns:
        raise DataError(f"{path}: empty: expected a record per item")
    required = [(name, "--text-columns") for name in text_columns or ()]
    required += [(name, "--title-column") for name in (title_column,) if name is not None]
    for name, option in required:
        if name not in found_columns:
            only = f"only {_listed(found_columns)}: check {option}"
            raise DataError(f"{path}: no column {name}, {only}")
    if not any(texts):
        complaint = f"describes none of the {len(item_ids)} items"
        remedy = "check that its ids are those of the log, or name them with --item-column"
        raise DataError(f"{path}: {complaint}: {remedy}")
    return Descriptions(texts, path.name, file_sha256(path), titles if any(titles) else None)


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
