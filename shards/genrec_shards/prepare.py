"""The data directory: sequences, catalogue and numbering in Parquet, with a hash of each."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_shards.atomic import atomic_directory
from genrec_shards.bad_lines import BadLines, OnError
from genrec_shards.clean import Cleaning, Ties, clean
from genrec_shards.descriptions import Descriptions, read_descriptions
from genrec_shards.expected import check_expected, public_set
from genrec_shards.numbering import Hierarchy, Numbering, NumberingName, number
from genrec_shards.readers.blocks import readable
from genrec_shards.readers.guess import LOG_FORMATS, Format, guess_format
from genrec_shards.readers.logs import LogOptions, read_log, source_files
from genrec_shards.readers.times import moment
from genrec_shards.sequences import MINIMUM_LENGTH, DataError, Sequences, TrainedThrough, read_sequences
from genrec_shards.trained_vectors import read_trained_vectors

FORMAT_VERSION = 1
USERS_PER_ROW_GROUP = 65_536
K_CORE = 5
"""Of a log, unless another is named."""


@dataclass(frozen=True)
class Source:
    """The file or folder that a data directory was made from."""

    name: str
    """File name without its folder."""
    sha256: str
    """Of a folder: of the lines `sha256  name` of its files, by name."""


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
    """What was left out of the source, by reason: rows of a log, lines of the `sequences` format (none unless told to skip)."""
    read: int | None = None
    """Rows of the log: `interactions` and `dropped` add up to it; not in the file of the `sequences` format."""
    expected: str | None = None
    """The published set whose counts the sequences were found to have; not in the file where none was named."""
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
    timestamps: np.ndarray | None = None
    """int64, microseconds since 1970 of each of the sequences' items; None where the source has none."""
    bad_lines: tuple[str, ...] = ()
    """What `prepare` has to say of lines that could not be read; not in any file."""


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    format: Format = "auto",
    numbering: NumberingName = "random",
    seed: int = 0,
    ties: Ties | None = None,
    split: str = "leave-one-out",
    overwrite: bool = False,
    levels: Sequence[int] | None = None,
    vectors: str | Path | None = None,
    vectors_trained_through: TrainedThrough = "n-2",
    items: str | Path | None = None,
    item_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    k_core: int | None = None,
    min_length: int = MINIMUM_LENGTH,
    on_error: OnError = "stop",
    log: LogOptions | None = None,
    since: str | None = None,
    until: str | None = None,
    expect: str | None = None,
) -> Dataset:
    """Read a log and write the data directory `out`, complete or not at all; the same input gives the same bytes.

    `format`: `sequences`; a log (`interactions`, `amazon`, `yelp`: `readers/`), of which `log` says how to read it and
    `k_core` (default 5), `min_length`, `ties` (default shuffle), `since` and `until` (ISO 8601, both included) what becomes of
    it (`clean.py`); or `data`, a data
    directory that is to be numbered anew: its sequences stay what they are, so its shards serve both. `auto` tells them
    by name and content. `expect`: a published set (`expected.py`) that names the dates, where none are given, and whose
    counts must come out. `on_error`: what a line that cannot be read does, `stop` or `skip`. `levels`, `vectors`: as in
    `number` and `read_trained_vectors`. `items`, `item_column`, `text_columns`: as in `read_descriptions`; the texts are
    kept, and `format="data"` finds them again. Raises DataError for what is wrong with a file, ValueError for a wrong
    argument or an `out` that exists.
    """
    source, out = Path(source), Path(out)
    readable(source)
    format = guess_format(source) if format == "auto" else format
    _check_choices(format, ties, split)
    if format not in LOG_FORMATS and (k_core, min_length, since, until, log or LogOptions()) != (
        None, MINIMUM_LENGTH, None, None, LogOptions()
    ):  # fmt: skip
        raise ValueError(
            f"k_core, min_length, since, until, columns and time_unit are a log's ({', '.join(LOG_FORMATS)}), this is "
            f"of the {format} format: leave them out"
        )
    if format == "data" and out.resolve() == source.resolve():
        raise ValueError(f"{out} is the data that is to be numbered anew, with its shards: choose another output")
    if items is None and (item_column is not None or text_columns is not None):
        raise ValueError("a column of item ids or text is named, and no table: give --items META")
    bad = BadLines(on_error)
    if expect is not None and format in LOG_FORMATS and (since, until) == (None, None):
        since, until = public_set(expect).since, public_set(expect).until
    cleaning = Cleaning(
        K_CORE if k_core is None else k_core,
        min_length,
        ties or "shuffle",
        seed,
        None if since is None else moment(since, "--since"),
        None if until is None else moment(until, "--until", end_of_day=True),
    )
    # A log's rows wait beside the output for their users, so a place that cannot be written is told before hours of reading.
    with atomic_directory(out, overwrite, marker="dataset.json") as folder:
        taken = _read(source, format, bad, cleaning, log or LogOptions(), folder)
        sequences, descriptions = taken.sequences, taken.descriptions
        if expect is not None:
            check_expected(expect, sequences, str(source))
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
            source=taken.source,
            users=sequences.num_users,
            items=sequences.num_items,
            interactions=sequences.num_interactions,
            numbering=numbering,
            seed=seed,
            split=split,
            ties=taken.ties,
            sequences_hash=sequences.sequences_hash(),
            numbering_hash=codes.numbering_hash(),
            dropped=taken.dropped,
            read=taken.num_read,
            expected=expect,
            hierarchy=codes.hierarchy,
            described_by=None if descriptions is None else Source(descriptions.name, descriptions.sha256),
        )
        dataset = Dataset(out, sequences, codes, info, descriptions, taken.timestamps, tuple(bad.told()))
        _write(dataset, folder)
    return dataset


def cleaning_told(dataset: Dataset) -> list[str]:
    """Lines for a person: what was left out of a log and why, and the first lines that could not be read."""
    info, lines = dataset.info, []
    if info.read is not None:
        parts = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in info.dropped.items() if count]
        out = f"; left out: {', '.join(parts)}" if parts else ", none left out"
        lines.append(f"{info.read:,} rows read, {info.interactions:,} kept{out}")
    if info.expected is not None:
        lines.append(check_expected(info.expected, dataset.sequences, info.source.name))
    return [*lines, *dataset.bad_lines]


def load_dataset(path: str | Path) -> Dataset:
    """Read a data directory and check it against its own hashes.

    Raises DataError, one line with the file, for what is missing, damaged, changed by hand or of another version.
    """
    path = Path(path)
    info = _load_info(path / "dataset.json")
    users, items = _read_table(path / "users.parquet"), _read_table(path / "items.parquet")
    user_ids, user_codes = _strings(users, "id", path), _strings(users, "code", path)
    item_ids, item_codes = _strings(items, "id", path), _strings(items, "code", path)
    flat_items, offsets, timestamps = _read_lists(path / "sequences.parquet")
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
    return Dataset(path, sequences, numbering, info, descriptions, timestamps)


@dataclass(frozen=True, eq=False)
class _Taken:
    """What was read of a source."""

    sequences: Sequences
    source: Source
    descriptions: Descriptions | None
    timestamps: np.ndarray | None
    ties: str
    dropped: dict[str, int]
    num_read: int | None


def _read(source: Path, format: Format, bad: BadLines, cleaning: Cleaning, log: LogOptions, folder: Path) -> _Taken:
    """`folder`: where a log's rows may lie meanwhile; it is empty again afterwards."""
    if format == "data":
        data = load_dataset(source)
        return _Taken(
            data.sequences, data.info.source, data.descriptions, data.timestamps, data.info.ties, data.info.dropped, data.info.read
        )  # fmt: skip
    if format == "sequences":
        sequences = read_sequences(source, bad)
        dropped = {"bad_lines": bad.count} if bad.count else {}
        return _Taken(sequences, _source(source, [source]), None, None, "keep", dropped, None)
    waiting = folder / "rows"
    waiting.mkdir()
    found = clean(read_log(source, format, bad, log), cleaning, waiting, str(source))
    shutil.rmtree(waiting)
    origin = _source(source, source_files(source, format))
    dropped = {"bad_lines": bad.count} | found.dropped
    return _Taken(
        found.sequences, origin, None, found.timestamps, cleaning.ties, dropped, found.num_read + bad.count
    )  # fmt: skip


def _check_choices(format: str, ties: str | None, split: str) -> None:
    if format not in ("sequences", "data", *LOG_FORMATS):
        raise ValueError(
            f"format {format!r} is not supported: use --format sequences, {', '.join(LOG_FORMATS)}, or data to number a "
            "data directory anew"
        )
    if format not in LOG_FORMATS and ties not in (None, "keep"):
        raise ValueError(f"ties {ties!r}: the {format} format has no ties left to order: use --ties keep")
    if split != "leave-one-out":
        raise ValueError(f"split {split!r} is not supported yet: use --split leave-one-out; others come later")


def _write(dataset: Dataset, folder: Path) -> None:
    sequences, numbering = dataset.sequences, dataset.numbering
    _write_lists(sequences, dataset.timestamps, folder / "sequences.parquet")
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


def _write_lists(sequences: Sequences, timestamps: np.ndarray | None, path: Path) -> None:
    """One row group a few thousand users: list offsets are 32 bits wide, the whole log need not be."""
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
                    columns.append(pa.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), held))
            writer.write_table(pa.table(columns, schema=schema))


def _read_lists(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Items int32[total], offsets int64[U+1] and, where there are any, timestamps int64[total]."""
    table = _read_table(path)
    chunks = _lists(table, "items", pa.int32(), path)
    items = np.concatenate([np.zeros(0, np.int32), *(chunk.flatten().to_numpy() for chunk in chunks)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(chunk.value_lengths().to_numpy() for chunk in chunks)])
    timestamps = None
    if "times" in table.column_names:
        chunks = _lists(table, "times", pa.int64(), path)
        timestamps = np.concatenate([np.zeros(0, np.int64), *(chunk.flatten().to_numpy() for chunk in chunks)])
        if len(timestamps) != len(items):
            raise DataError(f"{path}: {len(timestamps)} times of {len(items)} items: prepare again")
    return items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), timestamps


def _lists(table: Any, name: str, kind: Any, path: Path) -> Any:
    """The chunks of a column of lists."""
    column = _column(table, name, path)
    if column.type != pa.list_(kind):
        raise DataError(f"{path}: column {name} is {column.type}, expected list<{kind}>: prepare again")
    return column.chunks


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


def _source(path: Path, files: Sequence[Path]) -> Source:
    """`files`: the path itself, or what was read of the folder."""
    if list(files) == [path]:
        return Source(path.name, _sha256(path))
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    return Source(path.resolve().name, hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
