"""The data directory: sequences, catalogue and numbering in Parquet, with a hash of each, checked
when read."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.cleaning.left_out import Cleaned
from genrec_shards.errors import DataError
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.numbering import Hierarchy, Numbering, NumberingName
from genrec_shards.readers.documents import read_object
from genrec_shards.sequences import Sequences
from genrec_shards.splits import GlobalTime, cutoff_of
from genrec_shards.storage.address import is_address
from genrec_shards.storage.manifest import file_sha256

Lists = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Items int32[total], offsets int64[U+1] and, where there are any, timestamps int64[total]."""
FORMAT_VERSION = 1
USERS_PER_ROW_GROUP = 65_536


@dataclass(frozen=True)
class Source:
    """The file or folder that a data directory was made from."""

    name: str
    """File name without its folder."""
    sha256: str
    """Of a folder: of the lines `sha256  name` of its files, by name."""


@dataclass(frozen=True)
class Appended:
    """What one `prepare --append` has added (`append.py`)."""

    source: Source
    interactions: int
    users: int
    """New ones."""
    items: int
    dropped: dict[str, int]
    """What was left out, by reason, as in `DatasetInfo.dropped`."""
    read: int | None = None
    """Rows, where they have times: `interactions` and `dropped` add up to it."""
    k_core: int | None = None
    """Fewest rows of a new item of a log."""
    min_length: int | None = None
    """Fewest rows of a new user of a log."""
    described_by: Source | None = None
    """The file of new items' texts."""
    read_as: str | None = None
    """As in `DatasetInfo`."""


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`; a field that is None is not in the file."""

    format_version: int
    source: Source
    users: int
    items: int
    interactions: int
    numbering: NumberingName
    seed: int
    split: str
    ties: str
    sequences_hash: str
    numbering_hash: str
    dropped: dict[str, int]
    """What was left out of the source, by reason: rows of a log, lines of the `sequences` format
    (none unless told to skip)."""
    read: int | None = None
    """Rows of the log: `interactions` and `dropped` add up to it; None for the `sequences`
    format."""
    expected: str | None = None
    """The published set whose counts the sequences were found to have, where one was named."""
    hierarchy: Hierarchy | None = None
    """What `collaborative` and `semantic` codes were made of."""
    described_by: Source | None = None
    """The file of the items' texts."""
    items_with_text: int | None = None
    """How many items have one; None where no file was given, and of an earlier version."""
    appended: tuple[Appended, ...] | None = None
    """What came later, oldest first: `read` and `dropped` are without it, all other numbers with
    it."""
    global_time: GlobalTime | None = None
    """The dates of a split by time and what they leave."""
    cleaned: Cleaned | None = None
    """Of a log, the rules of cleaning and whom they left out; None of one that an earlier version
    prepared."""
    read_as: str | None = None
    """What the source was recognised as, in words; None as above."""

    @property
    def split_name(self) -> str:
        """The split, by time with its dates: what two results must share."""
        return self.split if self.global_time is None else f"{self.split} {self.global_time.cutoff}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data directory in memory."""

    path: Path
    sequences: Sequences
    numbering: Numbering
    info: DatasetInfo
    descriptions: Descriptions | None = None
    """The items' texts, where `prepare` was given any."""
    timestamps: np.ndarray | None = None
    """int64, microseconds since 1970 of each of the sequences' items; None where the source has
    none."""
    bad_lines: tuple[str, ...] = ()
    """What `prepare` has to say of lines that could not be read; not in any file."""


def load_dataset(path: str | Path, lists: Callable[[], Lists] | None = None) -> Dataset:
    """Read a data directory and check it against its own hashes.

    Args:
        path: the directory.
        lists: reads `sequences.parquet`, where it is elsewhere.

    Raises:
        DataError: one line with the file, for what is missing, damaged, changed by hand or of
            another version.
    """
    path = Path(path)
    info = load_info(path / "dataset.json")
    users, items = _Table(path / "users.parquet"), _Table(path / "items.parquet")
    flat_items, offsets, timestamps = (lists or _Table(path / "sequences.parquet").lists)()
    periods = None
    if info.global_time is not None:
        # Where the dates cut each user; the hash of the sequences covers it.
        place = path / "sequences.parquet"
        if timestamps is None:
            needs = "no column times, which a split by time needs"
            raise DataError(f"{place}: {needs}: prepare again")
        if len(offsets) < 2 or (np.diff(offsets) == 0).any():
            raise DataError(f"{place}: a user without items: prepare again")
        try:
            periods = cutoff_of(info.global_time.cutoff).periods(timestamps, offsets)
        except ValueError as error:
            raise DataError(f"{path / 'dataset.json'}: {error}: prepare again") from None
    sequences = Sequences(flat_items, offsets, users.strings("id"), items.strings("id"), periods)
    codes = items.strings("code"), users.strings("code")
    numbering = Numbering(info.numbering, info.seed, *codes, info.hierarchy)
    hashes = {
        "sequences_hash": sequences.sequences_hash(),
        "numbering_hash": numbering.numbering_hash(),
    }
    for name, found in hashes.items():
        expected = getattr(info, name)
        if found != expected:
            mismatch = f"{name} is {found[:12]}, dataset.json says {expected[:12]}"
            raise DataError(f"{path}: {mismatch}: prepare again")
    descriptions, described_by = None, info.described_by
    if described_by is not None:
        titles = items.strings("title") if "title" in items.table.column_names else None
        name, sha256 = described_by.name, described_by.sha256
        descriptions = Descriptions(items.strings("text"), name, sha256, titles)
    return Dataset(path, sequences, numbering, info, descriptions, timestamps)


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """Write all files into an empty folder; `prepare` gives it its name when it is complete."""
    sequences, numbering, descriptions = dataset.sequences, dataset.numbering, dataset.descriptions
    _write_lists(sequences, dataset.timestamps, folder / "sequences.parquet")
    for kind, ids, codes in (
        ("item", sequences.item_ids, numbering.item_codes),
        ("user", sequences.user_ids, numbering.user_codes),
    ):
        columns: dict[str, Any] = {kind: pa.array(np.arange(len(ids), dtype=np.int32))}
        texts = {"id": ids, "code": codes}
        if kind == "item" and descriptions is not None:
            texts["text"] = descriptions.texts
            if descriptions.titles is not None:
                texts["title"] = descriptions.titles
        columns |= {name: pa.array(values, pa.string()) for name, values in texts.items()}
        pq.write_table(pa.table(columns), folder / f"{kind}s.parquet", compression="zstd")
    fields = dataclasses.asdict(dataset.info)
    fields = {key: value for key, value in fields.items() if value is not None}
    info = json.dumps(fields, indent=2, ensure_ascii=False)
    (folder / "dataset.json").write_text(info + "\n", encoding="utf-8")


def _write_lists(sequences: Sequences, timestamps: np.ndarray | None, path: Path) -> None:
    """One row group per few thousand users: list offsets are 32 bits wide, the whole log need not
    be."""
    fields = [("user", pa.int32()), ("items", pa.list_(pa.int32()))]
    arrays = [sequences.items]
    if timestamps is not None:
        fields.append(("times", pa.list_(pa.int64())))
        arrays.append(timestamps)
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, sequences.num_users, USERS_PER_ROW_GROUP):
            offsets = sequences.offsets[first : first + USERS_PER_ROW_GROUP + 1]
            local = (offsets - offsets[0]).astype(np.int32)
            columns = [pa.array(np.arange(first, first + len(offsets) - 1, dtype=np.int32))]
            for values in arrays:
                part = values[offsets[0] : offsets[-1]]
                columns.append(pa.ListArray.from_arrays(local, part))
            writer.write_table(pa.table(columns, schema=schema))


class _Table:
    """A Parquet file and its columns. Everything raises DataError, one line with the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A plain file, not a data set: pq.read_table would walk into folders and open remote
            # addresses.
            with pq.ParquetFile(path) as file:
                self.table = file.read()
        except FileNotFoundError:
            raise DataError(f"{path}: no such file: prepare again") from None
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: not readable as Parquet ({reason}): prepare again") from None

    def strings(self, name: str) -> list[str]:
        column = self._column(name, pa.string(), "string without gaps")
        if column.null_count:
            raise self._wrong_type(name, column, "string without gaps")
        texts: list[str] = column.to_pylist()
        return texts

    def lists(self) -> Lists:
        """The columns of `sequences.parquet`."""
        chunks = self._column("items", pa.list_(pa.int32()), "list<int32>").chunks
        items = _joined([chunk.flatten() for chunk in chunks], np.int32)
        lengths = _joined([chunk.value_lengths() for chunk in chunks], np.int64)
        timestamps = None
        if "times" in self.table.column_names:
            chunks = self._column("times", pa.list_(pa.int64()), "list<int64>").chunks
            timestamps = _joined([chunk.flatten() for chunk in chunks], np.int64)
            if len(timestamps) != len(items):
                complaint = f"{len(timestamps)} times of {len(items)} items"
                raise DataError(f"{self.path}: {complaint}: prepare again")
        return items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), timestamps

    def _column(self, name: str, kind: Any, expected: str) -> Any:
        names = self.table.column_names
        if name not in names:
            only = f"only {', '.join(names)}"
            raise DataError(f"{self.path}: no column {name}, {only}: prepare again")
        column = self.table.column(name)
        if column.type != kind:
            raise self._wrong_type(name, column, expected)
        return column

    def _wrong_type(self, name: str, column: Any, expected: str) -> DataError:
        found = f"column {name} is {column.type}, expected {expected}"
        return DataError(f"{self.path}: {found}: prepare again")


def _joined(arrays: list[Any], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.to_numpy() for array in arrays)])


def load_info(path: Path) -> DatasetInfo:
    """Read and check `dataset.json`. Raises DataError where it is missing, damaged or of another
    version."""
    try:
        fields = read_object(path, "a dataset.json of this program", "prepare again")
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            complaint = f"format_version {version}, this program reads {FORMAT_VERSION}"
            raise DataError(f"{path}: {complaint}: prepare again")
        # The fields that are objects of their own; a file that lacks the later ones is an older
        # one.
        fields["source"] = Source(**fields["source"])
        if "hierarchy" in fields:
            levels = tuple(fields["hierarchy"]["levels"])
            fields["hierarchy"] = Hierarchy(**fields["hierarchy"] | {"levels": levels})
        if "described_by" in fields:
            fields["described_by"] = Source(**fields["described_by"])
        for key, kind in (("global_time", GlobalTime), ("cleaned", Cleaned)):
            if key in fields:
                fields[key] = kind(**fields[key])
        if "appended" in fields:
            for entry in fields["appended"]:
                for key in ("source", "described_by"):
                    if entry.get(key) is not None:
                        entry[key] = Source(**entry[key])
            fields["appended"] = tuple(Appended(**entry) for entry in fields["appended"])
        return DatasetInfo(**fields)
    except FileNotFoundError:
        remedy = "give a data directory made by `genrec prepare`"
        if is_address(path):
            remedy = "a data directory has to be on this machine, only shards may be at an address"
        raise DataError(f"{path}: no such file: {remedy}") from None
    except NotADirectoryError:
        remedy = "give a data directory made by `genrec prepare`"
        raise DataError(f"{path.parent}: a file: {remedy}") from None
    except (KeyError, TypeError, AttributeError) as error:
        complaint = f"not a dataset.json of this program ({error})"
        raise DataError(f"{path}: {complaint}: prepare again") from None
    except OSError as error:
        complaint = f"cannot be read ({error.strerror}): check the path and its rights"
        raise DataError(f"{path}: {complaint}") from None


def source_of(path: Path, files: Sequence[Path]) -> Source:
    """What a directory was made from. `files`: the path itself, or what was read of the folder."""
    is_folder = list(files) != [path]
    name = path.resolve().name if is_folder else path.name
    return source_named(name, [(file.name, file_sha256(file)) for file in files], is_folder)


def source_named(name: str, hashes: Sequence[tuple[str, str]], is_folder: bool) -> Source:
    """The same from the files' (name, sha256)."""
    if not is_folder:
        return Source(name, hashes[0][1])
    lines = "".join(f"{sha256}  {file}\n" for file, sha256 in hashes)
    return Source(name, hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest())
