"""From a source to a data directory: read, cleaned, numbered; complete or not at all."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_shards.atomic import atomic_directory
from genrec_shards.bad_lines import BadLines, OnError
from genrec_shards.clean import Cleaning, Ties, clean
from genrec_shards.dataset import FORMAT_VERSION, Dataset, DatasetInfo, Source, load_dataset, source_of, write_dataset
from genrec_shards.descriptions import Descriptions, read_descriptions
from genrec_shards.expected import check_expected, public_set
from genrec_shards.numbering import NumberingName, number
from genrec_shards.readers.blocks import readable
from genrec_shards.readers.guess import LOG_FORMATS, Format, guess_format
from genrec_shards.readers.logs import LogOptions, read_log, source_files
from genrec_shards.readers.times import moment
from genrec_shards.sequences import MINIMUM_LENGTH, Sequences, TrainedThrough, read_sequences
from genrec_shards.trained_vectors import read_trained_vectors

K_CORE = 5
"""Of a log, unless another is named."""


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
    title_column: str | None = None,
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
    `number` and `read_trained_vectors`. `items`, `item_column`, `text_columns`, `title_column`: as in `read_descriptions`;
    texts and titles are kept, and `format="data"` finds them again. Raises DataError for what is wrong with a file,
    ValueError for a wrong argument or an `out` that exists.
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
    if items is None and (item_column, text_columns, title_column) != (None, None, None):
        raise ValueError("a column of item ids, text or titles is named, and no table: give --items META")
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
                items, sequences.item_ids, id_column=item_column, text_columns=text_columns, title_column=title_column
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
        write_dataset(dataset, folder)
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
        return _Taken(sequences, source_of(source, [source]), None, None, "keep", dropped, None)
    waiting = folder / "rows"
    waiting.mkdir()
    found = clean(read_log(source, format, bad, log), cleaning, waiting, str(source))
    shutil.rmtree(waiting)
    origin = source_of(source, source_files(source, format))
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
