"""The data directory: sequences, catalogue and numbering in Parquet, with a hash of each."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.atomic import atomic_directory
from genrec_shards.descriptions import Descriptions, read_descriptions
from genrec_shards.numbering import Hierarchy, Numbering, NumberingName, number
from genrec_shards.sequences import DataError, Sequences, TrainedThrough, read_sequences
from genrec_shards.trained_vectors import read_trained_vectors

FORMAT_VERSION = 1
USERS_PER_ROW_GROUP = 65_536
Ties = Literal["keep"]


@dataclass(frozen=True)
class Source:
    """The file that a data directory was made from."""

    name: str
    """File name without its folder."""
    sha256: str


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
    """What was left out of the source, by reason; empty for the `sequences` format, which drops nothing."""
    hierarchy: Hierarchy | None = None
    """What `collaborative` and `semantic` codes were made of; not in the file of other numberings."""
    described_by: Source | None = None
    """The file of the items' texts; not in the file where there are none."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data directory in memory."""

    path: Path
    sequences: Sequences
    numbering: Numbering
    info: DatasetInfo
    descriptions: Descriptions | None = None
    """The items' texts, where `prepare` was given any."""


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "sequences",
    numbering: NumberingName = "random",
    seed: int = 0,
    ties: str = "keep",
    split: str = "leave-one-out",
    overwrite: bool = False,
    levels: Sequence[int] | None = None,
    vectors: str | Path | None = None,
    vectors_trained_through: TrainedThrough = "n-2",
    items: str | Path | None = None,
    item_column: str | None = None,
    text_columns: Sequence[str] | None = None,
) -> Dataset:
    """Read a log and write the data directory `out`, complete or not at all; the same input gives the same bytes.

    `format`: `sequences`, or `data`, a data directory that is to be numbered anew: its sequences stay what they are, so its
    shards serve both. `levels`, `vectors`: as in `number` and `read_trained_vectors`. `items`, `item_column`,
    `text_columns`: as in `read_descriptions`; the texts are kept, and `format="data"` finds them again.
    Raises DataError for what is wrong with a file, ValueError for a wrong argument or an `out` that exists.
    """
    _check_choices(format, ties, split)
    source, out = Path(source), Path(out)
    if format == "data" and out.resolve() == source.resolve():
        raise ValueError(f"{out} is the data that is to be numbered anew, with its shards: choose another output")
    if items is None and (item_column is not None or text_columns is not None):
        raise ValueError("a column of item ids or text is named, and no table: give --items META")
    sequences, origin, descriptions = _read(source, format)
    if items is not None:
        descriptions = read_descriptions(
            items, sequences.item_ids, id_column=item_column, text_columns=text_columns
        )  # fmt: skip
    codes = number(
        sequences,
        numbering,
        seed,
        levels=levels,
        vectors=None if vectors is None else read_trained_vectors(vectors, sequences, vectors_trained_through),
        descriptions=descriptions if numbering == "semantic" else None,
    )
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        source=origin,
        users=sequences.num_users,
        items=sequences.num_items,
        interactions=sequences.num_interactions,
        numbering=numbering,
        seed=seed,
        split=split,
        ties=ties,
        sequences_hash=sequences.sequences_hash(),
        numbering_hash=codes.numbering_hash(),
        dropped={},
        hierarchy=codes.hierarchy,
        described_by=None if descriptions is None else Source(descriptions.name, descriptions.sha256),
    )
    dataset = Dataset(out, sequences, codes, info, descriptions)
    with atomic_directory(out, overwrite, marker="dataset.json") as folder:
        _write(dataset, folder)
    return dataset


def load_dataset(path: str | Path) -> Dataset:
    """Read a data directory and check it against its own hashes.

    Raises DataError, one line with the file, for what is missing, damaged, changed by hand or of another version.
    """
    path = Path(path)
    info = _load_info(path / "dataset.json")
    users, items = _read_table(path / "users.parquet"), _read_table(path / "items.parquet")
    user_ids, user_codes = _strings(users, "id", path), _strings(users, "code", path)
    item_ids, item_codes = _strings(items, "id", path), _strings(items, "code", path)
    flat_items, offsets = _read_lists(path / "sequences.parquet")
    sequences = Sequences(flat_items, offsets, user_ids, item_ids)
    numbering = Numbering(info.numbering, info.seed, item_codes, user_codes, info.hierarchy)
    for name, found in (
        ("sequences_hash", sequences.sequences_hash()),
        ("numbering_hash", numbering.numbering_hash()),
    ):
        if found != getattr(info, name):
            expected = getattr(info, name)
            raise DataError(f"{path}: {name} is {found[:12]}, dataset.json says {expected[:12]}: prepare again")
    descriptions = None
    if info.described_by is not None:
        descriptions = Descriptions(_strings(items, "text", path), info.described_by.name, info.described_by.sha256)
    return Dataset(path, sequences, numbering, info, descriptions)


def _read(source: Path, format: str) -> tuple[Sequences, Source, Descriptions | None]:
    if format == "data":
        data = load_dataset(source)
        return data.sequences, data.info.source, data.descriptions
    return read_sequences(source), Source(source.name, _sha256(source)), None


def _check_choices(format: str, ties: str, split: str) -> None:
    if format not in ("sequences", "data"):
        raise ValueError(
            f"format {format!r} is not supported yet: use --format sequences, or data to number a data directory anew"
        )
    if ties != "keep":
        raise ValueError(f"ties {ties!r}: the sequences format has no timestamps to find ties by: use --ties keep")
    if split != "leave-one-out":
        raise ValueError(f"split {split!r} is not supported yet: use --split leave-one-out; others come later")


def _write(dataset: Dataset, folder: Path) -> None:
    sequences, numbering = dataset.sequences, dataset.numbering
    _write_lists(sequences, folder / "sequences.parquet")
    for kind, ids, codes in (
        ("item", sequences.item_ids, numbering.item_codes),
        ("user", sequences.user_ids, numbering.user_codes),
    ):
        rows = pa.array(np.arange(len(ids), dtype=np.int32))
        table = pa.table({kind: rows, "id": pa.array(ids, pa.string()), "code": pa.array(codes, pa.string())})
        if kind == "item" and dataset.descriptions is not None:
            table = table.append_column("text", pa.array(dataset.descriptions.texts, pa.string()))
        pq.write_table(table, folder / f"{kind}s.parquet", compression="zstd")
    fields = {key: value for key, value in dataclasses.asdict(dataset.info).items() if value is not None}
    info = json.dumps(fields, indent=2, ensure_ascii=False)
    (folder / "dataset.json").write_text(info + "\n", encoding="utf-8")


def _write_lists(sequences: Sequences, path: Path) -> None:
    """One row group a few thousand users: list offsets are 32 bits wide, the whole log need not be."""
    schema = pa.schema([("user", pa.int32()), ("items", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, sequences.num_users, USERS_PER_ROW_GROUP):
            offsets = sequences.offsets[first : first + USERS_PER_ROW_GROUP + 1]
            users = np.arange(first, first + len(offsets) - 1, dtype=np.int32)
            items = sequences.items[offsets[0] : offsets[-1]]
            lists = pa.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), items)
            writer.write_table(pa.table([pa.array(users), lists], schema=schema))


def _read_lists(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Items int32[total] and offsets int64[U+1]."""
    column = _column(_read_table(path), "items", path)
    if column.type != pa.list_(pa.int32()):
        raise DataError(f"{path}: column items is {column.type}, expected list<int32>: prepare again")
    chunks = column.chunks
    items = np.concatenate([np.zeros(0, np.int32), *(chunk.flatten().to_numpy() for chunk in chunks)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(chunk.value_lengths().to_numpy() for chunk in chunks)])
    return items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _strings(table: Any, name: str, path: Path) -> list[str]:
    column = _column(table, name, path)
    if column.type != pa.string() or column.null_count:
        raise DataError(f"{path}: column {name} is {column.type}, expected string without gaps: prepare again")
    return column.to_pylist()


def _column(table: Any, name: str, path: Path) -> Any:
    if name not in table.column_names:
        raise DataError(f"{path}: no column {name}, only {', '.join(table.column_names)}: prepare again")
    return table.column(name)


def _read_table(path: Path) -> Any:
    try:
        # A plain file, not a data set: pq.read_table would walk into folders and open remote addresses.
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: prepare again") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]}): prepare again") from None


def _load_info(path: Path) -> DatasetInfo:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version {version}, this program reads {FORMAT_VERSION}: prepare again")
        return DatasetInfo(**fields | _parts(fields))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: give a data directory made by `genrec prepare`") from None
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a dataset.json of this program ({error}): prepare again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path and its rights") from None


def _parts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are objects of their own; a file that lacks the later ones is an older one."""
    parts: dict[str, Any] = {"source": Source(**fields["source"])}
    if "hierarchy" in fields:
        parts["hierarchy"] = Hierarchy(**fields["hierarchy"] | {"levels": tuple(fields["hierarchy"]["levels"])})
    if "described_by" in fields:
        parts["described_by"] = Source(**fields["described_by"])
    return parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
