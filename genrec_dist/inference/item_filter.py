"""Which items may be listed: ids to allow and ids to block."""

# I items of the catalogue

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_dist.inference.load import Catalogue


@dataclass(frozen=True)
class ItemFilter:
    allowed_I: np.ndarray
    """bool, by item row."""
    unknown_allow: list[str]
    """Ids to allow that the catalogue lacks."""
    unknown_block: list[str]
    """Ids to block that the catalogue lacks."""

    @property
    def rows(self) -> np.ndarray:
        """int64, the rows that may be listed, ascending."""
        return np.flatnonzero(self.allowed_I)

    @property
    def is_all(self) -> bool:
        return bool(self.allowed_I.all())


def filter_items(
    catalogue: Catalogue, allow: Iterable[str] | None = None, block: Iterable[str] | None = None
) -> ItemFilter:
    """The items of `allow` (None: all of them) without those of `block`. Raises ValueError where
    that leaves none."""
    allow_rows, unknown_allow = find_rows(catalogue, () if allow is None else allow)
    block_rows, unknown_block = find_rows(catalogue, () if block is None else block)
    allowed_I = np.full(len(catalogue.item_ids), allow is None)
    allowed_I[allow_rows] = True
    allowed_I[block_rows] = False
    if not allowed_I.any():
        requested = "all items" if allow is None else f"{len(allow_rows):,} known ids"
        unknown = f" ({name_some(unknown_allow)}: not in the catalogue)" if unknown_allow else ""
        raise ValueError(
            f"no item is left to list: {requested} allowed{unknown}, {len(block_rows):,} blocked; "
            "allow more or block fewer"
        )
    return ItemFilter(allowed_I, unknown_allow, unknown_block)


def find_rows(catalogue: Catalogue, ids: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """(int32 rows of the ids that the catalogue has, the other ids), in order. Raises ValueError
    for what is no list of ids."""
    if isinstance(ids, str | Mapping) or not isinstance(ids, Iterable):
        raise ValueError(f"{ids!r} is not a list of ids: write ids as a list of strings")
    known, unknown = [], []
    for id_ in ids:
        if not isinstance(id_, str):
            raise ValueError(f"{id_!r} is not an id: write ids as strings")
        row = catalogue.item_row.get(id_)
        if row is None:
            unknown.append(id_)
        else:
            known.append(row)
    return np.array(known, np.int32), unknown


def name_some(ids: Sequence[str], most: int = 3) -> str:
    """The first ids, and how many follow."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most:,} more" if len(ids) > most else "")


def read_text(path: str | Path, content: str) -> str:
    """The text of a UTF-8 file of `content`, as which the message names what to give. Raises
    ValueError naming the file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read as text ({error}): give {content} in UTF-8"
        ) from None


def read_ids(path: str | Path) -> list[str]:
    """One id per line, without blank lines and the spaces around an id. Raises ValueError naming
    the file if it has no id or is no text."""
    lines = read_text(path, "one item id a line").split("\n")
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise ValueError(f"{path}: no id in it: give one item id a line")
    return ids
