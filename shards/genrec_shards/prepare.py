"""From a source to a data directory: read, cleaned, numbered; complete or not at all."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from genrec_shards.atomic import atomic_directory
from genrec_shards.cleaning.clean import Cleaning, CleanLog, Ties, clean, shortest
from genrec_shards.cleaning.published_sizes import check_expected, public_set
from genrec_shards.dataset import (
    FORMAT_VERSION,
    Appended,
    Dataset,
    DatasetInfo,
    Source,
    load_dataset,
    source_of,
    write_dataset,
)
from genrec_shards.errors import BadLines, OnError
from genrec_shards.numbering.item_text import Descriptions, read_descriptions
from genrec_shards.numbering.item_vectors import read_trained_vectors
from genrec_shards.numbering.numbering import NumberingName, number
from genrec_shards.readers.detect_format import LOG_FORMATS, Format, guess_format
from genrec_shards.readers.read_log import LogOptions, read_log, source_files
from genrec_shards.readers.text_blocks import readable
from genrec_shards.sequences import Sequences, read_sequences
from genrec_shards.splits import (
    GLOBAL_TIME,
    LEAVE_ONE_OUT,
    Cutoff,
    GlobalTime,
    Split,
    TrainedThrough,
    cutoff_of,
)
from genrec_shards.timestamps import moment

Engine = Literal["local", "ray"]
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
    split: str | None = None,
    cutoff: str | None = None,
    overwrite: bool = False,
    levels: Sequence[int] | None = None,
    vectors: str | Path | None = None,
    vectors_trained_through: TrainedThrough = "n-2",
    items: str | Path | None = None,
    item_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    title_column: str | None = None,
    k_core: int | None = None,
    min_length: int | None = None,
    on_error: OnError = "stop",
    log: LogOptions | None = None,
    since: str | None = None,
    until: str | None = None,
    expect: str | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
) -> Dataset:
    """Read a log and write the data directory `out`, complete or not at all; the same input gives
    the same bytes.

    `format`: `sequences`; a log (`interactions`, `amazon`, `yelp`: `readers/`), of which `log` says
    how to read it and `k_core` (default 5), `min_length`, `ties` (default shuffle), `since` and
    `until` (ISO 8601, both included) what becomes of it (`clean.py`); or `data`, a data directory
    that is to be numbered anew: its sequences stay what they are, so its shards serve both. `auto`
    tells them by name and content. `split`: `leave-one-out` (default) or, of a log, `global-time`
    with its `cutoff` VALIDATION,TEST, the first dates of these periods: core, catalogue and
    numbering are then those of the training period (`periods.py`); a data directory keeps its own.
    `min_length`: default 3, by time 1, counted in the training period. `expect`: a published set
    (`expected.py`) that names the dates, where none are given, and whose counts must come out.
    `on_error`: what a line that cannot be read does, `stop` or `skip`. `levels`, `vectors`: as in
    `number` and `read_trained_vectors`. `items`, `item_column`, `text_columns`, `title_column`: as
    in `read_descriptions`; texts and titles are kept, and `format="data"` finds them again.
    `engine`: `ray` reads and cleans a log on the cluster at `ray_address`, or by all cores of this
    machine, to the same bytes; its source may be an address (`ray_engine/`). Raises DataError for
    what is wrong with a file, ValueError for a wrong argument or an `out` that exists."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine {engine!r}: choose local or ray")
    if engine == "ray":
        from genrec_shards.ray_engine import entry as door

        out = door.place_of(out)
        if not isinstance(out, Path):
            raise ValueError(
                f"{out}: `prepare` makes a directory of this machine; `genrec prepare --out` uploads one"
            )
        place = door.place_of(source)
        door.check_source(place)
        format = door.format_of(place) if format == "auto" else format
    else:
        out, place = Path(out), Path(source)
        readable(place)
        format = guess_format(place) if format == "auto" else format
    _check_choices(format, ties)
    if format not in LOG_FORMATS and (engine, ray_address) != ("local", None):
        raise ValueError(
            f"engine ray is for logs ({', '.join(LOG_FORMATS)}), this is of the {format} format: leave it out"
        )
    if engine == "local" and ray_address is not None:
        raise ValueError(f"--ray-address {ray_address}: goes with --engine ray")
    source = Path(place)
    periods_from = _cutoff(format, split, cutoff)
    if format not in LOG_FORMATS and (k_core, min_length, since, until, log or LogOptions()) != (
        None, None, None, None, LogOptions()
    ):  # fmt: skip
        raise ValueError(
            f"k_core, min_length, since, until, columns and time_unit are a log's ({', '.join(LOG_FORMATS)}), this is "
            f"of the {format} format: leave them out"
        )
    if format == "data" and out.resolve() == source.resolve():
        raise ValueError(
            f"{out} is the data that is to be numbered anew, with its shards: choose another output"
        )
    if items is None and (item_column, text_columns, title_column) != (None, None, None):
        raise ValueError(
            "a column of item ids, text or titles is named, and no table: give --items META"
        )
    bad = BadLines(on_error)
    if expect is not None and format in LOG_FORMATS and (since, until) == (None, None):
        since, until = public_set(expect).since, public_set(expect).until
    cleaning = Cleaning(
        K_CORE if k_core is None else k_core,
        shortest(periods_from) if min_length is None else min_length,
        ties or "shuffle",
        seed,
        None if since is None else moment(since, "--since"),
        None if until is None else moment(until, "--until", end_of_day=True),
        periods_from,
    )
    # A log's rows wait beside the output for their users, so a place that cannot be written is told
    # before hours of reading.
    with atomic_directory(out, overwrite, marker="dataset.json") as folder:
        if engine == "ray":
            taken = _read_on_ray(
                place, format, bad, cleaning, log or LogOptions(), folder, ray_address
            )
        else:
            taken = _read(source, format, bad, cleaning, log or LogOptions(), folder)
        sequences, descriptions = taken.sequences, taken.descriptions
        if expect is not None:
            check_expected(expect, sequences, str(place))
        if items is not None:
            descriptions = read_descriptions(
                items, sequences.item_ids, id_column=item_column, text_columns=text_columns, title_column=title_column
            )  # fmt: skip
        codes = number(
            sequences,
            numbering,
            seed,
            levels=levels,
            vectors=None
            if vectors is None
            else read_trained_vectors(vectors, sequences, vectors_trained_through),
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
            split=LEAVE_ONE_OUT if taken.global_time is None else GLOBAL_TIME,
            ties=taken.ties,
            sequences_hash=sequences.sequences_hash(),
            numbering_hash=codes.numbering_hash(),
            dropped=taken.dropped,
            read=taken.num_read,
            expected=expect,
            hierarchy=codes.hierarchy,
            described_by=None
            if descriptions is None
            else Source(descriptions.name, descriptions.sha256),
            appended=taken.appended,
            global_time=taken.global_time,
        )
        dataset = Dataset(
            out, sequences, codes, info, descriptions, taken.timestamps, tuple(bad.told())
        )
        write_dataset(dataset, folder)
    return dataset


def cleaning_told(dataset: Dataset) -> list[str]:
    """Lines for a person: what was left out of a log and why, and the first lines that could not be
    read."""
    info, lines = dataset.info, []
    if info.read is not None:
        parts = [
            f"{count:,} {reason.replace('_', ' ')}"
            for reason, count in info.dropped.items()
            if count
        ]
        out = f"; left out: {', '.join(parts)}" if parts else ", none left out"
        later = sum(entry.interactions for entry in info.appended or ())
        lines.append(f"{info.read:,} rows read, {info.interactions - later:,} kept{out}")
    if info.global_time is not None:
        lines.append(info.global_time.told())
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
    appended: tuple[Appended, ...] | None = None
    global_time: GlobalTime | None = None


def _read(
    source: Path, format: Format, bad: BadLines, cleaning: Cleaning, log: LogOptions, folder: Path
) -> _Taken:
    """`folder`: where a log's rows may lie meanwhile; it is empty again afterwards."""
    if format == "data":
        data = load_dataset(source)
        return _Taken(
            data.sequences, data.info.source, data.descriptions, data.timestamps, data.info.ties, data.info.dropped, data.info.read,
            data.info.appended, data.info.global_time,
        )  # fmt: skip
    if format == "sequences":
        sequences = read_sequences(source, bad)
        dropped = {"bad_lines": bad.count} if bad.count else {}
        return _Taken(sequences, source_of(source, [source]), None, None, "keep", dropped, None)
    waiting = folder / "rows"
    waiting.mkdir()
    found = clean(read_log(source, format, bad, log), cleaning, waiting, str(source))
    shutil.rmtree(waiting)
    return _of_log(found, source_of(source, source_files(source, format)), bad, cleaning)


def _read_on_ray(
    place: str | Path,
    format: Format,
    bad: BadLines,
    cleaning: Cleaning,
    log: LogOptions,
    folder: Path,
    address: str | None,
) -> _Taken:
    from genrec_shards.ray_engine import entry as door

    waiting = folder / "rows"
    waiting.mkdir()
    found, origin = door.clean_on_ray(place, format, bad, cleaning, log, waiting, address)
    # Sequences and times are mapped, and last as long as they are held.
    shutil.rmtree(waiting)
    return _of_log(found, origin, bad, cleaning)


def _of_log(found: CleanLog, origin: Source, bad: BadLines, cleaning: Cleaning) -> _Taken:
    dropped = {"bad_lines": bad.count} | found.dropped
    return _Taken(
        found.sequences, origin, None, found.timestamps, cleaning.ties, dropped, found.num_read + bad.count,
        global_time=_global_time(cleaning.cutoff, found),
    )  # fmt: skip


def _global_time(cutoff: Cutoff | None, found: CleanLog) -> GlobalTime | None:
    if cutoff is None:
        return None
    validation, test = (found.sequences.history_and_target(split) for split in get_args(Split))
    return GlobalTime(
        str(cutoff), len(validation.users), len(test.users), found.users_without_history
    )


def _check_choices(format: str, ties: str | None) -> None:
    if format not in ("sequences", "data", *LOG_FORMATS):
        raise ValueError(
            f"format {format!r} is not supported: use --format sequences, {', '.join(LOG_FORMATS)}, or data to number a "
            "data directory anew"
        )
    if format not in LOG_FORMATS and ties not in (None, "keep"):
        raise ValueError(
            f"ties {ties!r}: the {format} format has no ties left to order: use --ties keep"
        )


def _cutoff(format: str, split: str | None, cutoff: str | None) -> Cutoff | None:
    """The dates of a split by time; None for leave-one-out, and for a data directory, which is cut
    already."""
    if split not in (None, LEAVE_ONE_OUT, GLOBAL_TIME):
        raise ValueError(f"split {split!r}: choose {LEAVE_ONE_OUT} or {GLOBAL_TIME}")
    if format == "data" and (split, cutoff) != (None, None):
        raise ValueError(
            "a data directory keeps its split: leave out --split and --cutoff, or prepare its log again"
        )
    if split != GLOBAL_TIME:
        if cutoff is not None:
            raise ValueError(f"--cutoff {cutoff[:60]}: dates go with --split {GLOBAL_TIME}")
        return None
    if format not in LOG_FORMATS:
        raise ValueError(
            f"split {GLOBAL_TIME}: the {format} format has no times: give a log, or use --split {LEAVE_ONE_OUT}"
        )
    if cutoff is None:
        raise ValueError(
            f"split {GLOBAL_TIME} needs the first dates of the validation and the test period: give --cutoff VALIDATION,TEST, "
            "as 2014-01-01,2014-04-01"
        )
    return cutoff_of(cutoff)
