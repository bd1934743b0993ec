"""The data directory: sequences, catalogue and numbering in Parquet, with a hash of each; written
whole, read checked."""

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

from genrec_shards.errors import DataError
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.numbering import Hierarchy, Numbering, NumberingName
from genrec_shards.sequences import Sequences
from genrec_shards.splits import GlobalTime, Periods, cutoff_of

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


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` holds."""

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
    """Rows of the log: `interactions` and `dropped` add up to it; not in the file of the
    `sequences` format."""
    expected: str | None = None
    """The published set whose counts the sequences were found to have; not in the file where none
    was named."""
    hierarchy: Hierarchy | None = None
    """What `collaborative` and `semantic` codes were made of; not in the file of other
    numberings."""
    described_by: Source | None = None
    """The file of the items' texts; not in the file where there are none."""
    appended: tuple[Appended, ...] | None = None
    """What came later, oldest first: `read` and `dropped` are without it, all other numbers with
    it."""
    global_time: GlobalTime | None = None
    """The dates of a split by time and what they leave; not in the file of leave-one-out."""

    @property
    def split_told(self) -> str:
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
    """Read a data directory and check it against its own hashes. `lists`: reads
    `sequences.parquet`, where it lies elsewhere.

    Raises DataError, one line with the file, for what is missing, damaged, changed by hand or of
    another version."""
    path = Path(path)
    info = _load_info(path / "dataset.json")
    users, items = _read_table(path / "users.parquet"), _read_table(path / "items.parquet")
    user_ids, user_codes = _strings(users, "id", path), _strings(users, "code", path)
    item_ids, item_codes = _strings(items, "id", path), _strings(items, "code", path)
    flat_items, offsets, timestamps = (
        _read_lists(path / "sequences.parquet") if lists is None else lists()
    )
    periods = (
        None if info.global_time is None else _periods(info.global_time, offsets, timestamps, path)
    )
    sequences = Sequences(flat_items, offsets, user_ids, item_ids, periods)
    numbering = Numbering(info.numbering, info.seed, item_codes, user_codes, info.hierarchy)
    for name, found in (
        ("sequences_hash", sequences.sequences_hash()),
        ("numbering_hash", numbering.numbering_hash()),
    ):
        if found != getattr(info, name):
            expected = getattr(info, name)
            raise DataError(
                f"{path}: {name} is {found[:12]}, dataset.json says {expected[:12]}: prepare again"
            )
    descriptions = None
    if info.described_by is not None:
        titles = _strings(items, "title", path) if "title" in items.column_names else None
        texts = _strings(items, "text", path)
        descriptions = Descriptions(texts, info.described_by.name, info.described_by.sha256, titles)
    return Dataset(path, sequences, numbering, info, descriptions, timestamps)


def _periods(
    told: GlobalTime, offsets: np.ndarray, timestamps: np.ndarray | None, path: Path
) -> Periods:
    """Where the dates cut each user; the hash of the sequences covers it."""
    if timestamps is None:
        raise DataError(
            f"{path / 'sequences.parquet'}: no column times, which a split by time needs: prepare again"
        )
    if len(offsets) < 2 or (np.diff(offsets) == 0).any():
        raise DataError(f"{path / 'sequences.parquet'}: a user without items: prepare again")
    try:
        return cutoff_of(told.cutoff).periods(timestamps, offsets)
    except ValueError as error:
        raise DataError(f"{path / 'dataset.json'}: {error}: prepare again") from None


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """Write all files into an empty folder; `prepare` gives it its name when it is complete."""
    sequences, numbering = dataset.sequences, dataset.numbering
    _write_lists(sequences, dataset.timestamps, folder / "sequences.parquet")
    for kind, ids, codes in (
        ("item", sequences.item_ids, numbering.item_codes),
        ("user", sequences.user_ids, numbering.user_codes),
    ):
        rows = pa.array(np.arange(len(ids), dtype=np.int32))
        table = pa.table(
            {kind: rows, "id": pa.array(ids, pa.string()), "code": pa.array(codes, pa.string())}
        )
        if kind == "item" and dataset.descriptions is not None:
            table = table.append_column("text", pa.array(dataset.descriptions.texts, pa.string()))
            if dataset.descriptions.titles is not None:
                table = table.append_column(
                    "title", pa.array(dataset.descriptions.titles, pa.string())
                )
        pq.write_table(table, folder / f"{kind}s.parquet", compression="zstd")
    fields = {
        key: value for key, value in dataclasses.asdict(dataset.info).items() if value is not None
    }
    info = json.dumps(fields, indent=2, ensure_ascii=False)
    (folder / "dataset.json").write_text(info + "\n", encoding="utf-8")


def _write_lists(sequences: Sequences, timestamps: np.ndarray | None, path: Path) -> None:
    """One row group a few thousand users: list offsets are 32 bits wide, the whole log need not
    be."""
    fields = [("user", pa.int32()), ("items", pa.list_(pa.int32()))]
    if timestamps is not None:
        fields.append(("times", pa.list_(pa.int64())))
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, sequences.num_users, USERS_PER_ROW_GROUP):
            offsets = sequences.offsets[first : first + USERS_PER_ROW_GROUP + 1]
            columns = [pa.array(np.arange(first, first + len(offsets) - 1, dtype=np.int32))]
            for values in (sequences.items, timestamps):
                if values is not None:
                    held = values[offsets[0] : offsets[-1]]
                    columns.append(
                        pa.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), held)
                    )
            writer.write_table(pa.table(columns, schema=schema))


def _read_lists(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Items int32[total], offsets int64[U+1] and, where there are any, timestamps int64[total]."""
    table = _read_table(path)
    chunks = _lists(table, "items", pa.int32(), path)
    items = np.concatenate(
        [np.zeros(0, np.int32), *(chunk.flatten().to_numpy() for chunk in chunks)]
    )
    lengths = np.concatenate(
        [np.zeros(0, np.int64), *(chunk.value_lengths().to_numpy() for chunk in chunks)]
    )
    timestamps = None
    if "times" in table.column_names:
        chunks = _lists(table, "times", pa.int64(), path)
        timestamps = np.concatenate(
            [np.zeros(0, np.int64), *(chunk.flatten().to_numpy() for chunk in chunks)]
        )
        if len(timestamps) != len(items):
            raise DataError(f"{path}: {len(timestamps)} times of {len(items)} items: prepare again")
    return items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), timestamps


def _lists(table: Any, name: str, kind: Any, path: Path) -> Any:
    """The chunks of a column of lists."""
    column = _column(table, name, path)
    if column.type != pa.list_(kind):
        raise DataError(
            f"{path}: column {name} is {column.type}, expected list<{kind}>: prepare again"
        )
    return column.chunks


def _strings(table: Any, name: str, path: Path) -> list[str]:
    column = _column(table, name, path)
    if column.type != pa.string() or column.null_count:
        raise DataError(
            f"{path}: column {name} is {column.type}, expected string without gaps: prepare again"
        )
    return column.to_pylist()


def _column(table: Any, name: str, path: Path) -> Any:
    if name not in table.column_names:
        raise DataError(
            f"{path}: no column {name}, only {', '.join(table.column_names)}: prepare again"
        )
    return table.column(name)


def _read_table(path: Path) -> Any:
    try:
        # A plain file, not a data set: pq.read_table would walk into folders and open remote
        # addresses.
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: prepare again") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not readable as Parquet ({str(error).splitlines()[0]}): prepare again"
        ) from None


def _load_info(path: Path) -> DatasetInfo:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version {version}, this program reads {FORMAT_VERSION}: prepare again"
            )
        return DatasetInfo(**fields | _parts(fields))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file: give a data directory made by `genrec prepare`"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a dataset.json of this program ({error}): prepare again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): check the path and its rights"
        ) from None


def _parts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are objects of their own; a file that lacks the later ones is an older
    one."""
    parts: dict[str, Any] = {"source": Source(**fields["source"])}
    if "hierarchy" in fields:
        parts["hierarchy"] = Hierarchy(
            **fields["hierarchy"] | {"levels": tuple(fields["hierarchy"]["levels"])}
        )
    if "described_by" in fields:
        parts["described_by"] = Source(**fields["described_by"])
    if "appended" in fields:
        parts["appended"] = tuple(_appended(entry) for entry in fields["appended"])
    if "global_time" in fields:
        parts["global_time"] = GlobalTime(**fields["global_time"])
    return parts


def _appended(entry: dict[str, Any]) -> Appended:
    sources = {
        key: Source(**entry[key])
        for key in ("source", "described_by")
        if entry.get(key) is not None
    }
    return Appended(**entry | sources)


def source_of(path: Path, files: Sequence[Path]) -> Source:
    """What a directory was made from. `files`: the path itself, or what was read of the folder."""
    is_folder = list(files) != [path]
    return source_named(
        path.resolve().name if is_folder else path.name,
        [(file.name, _sha256(file)) for file in files],
        is_folder,
    )


def source_named(name: str, hashes: Sequence[tuple[str, str]], is_folder: bool) -> Source:
    """The same from the files' (name, sha256)."""
    if not is_folder:
        return Source(name, hashes[0][1])
    lines = "".join(f"{sha256}  {file}\n" for file, sha256 in hashes)
    return Source(name, hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
