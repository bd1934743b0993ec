"""From a source to a data directory: read, cleaned, numbered; complete or not at all."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from genrec_shards.atomic import atomic_directory
from genrec_shards.cleaning.clean import Cleaning, CleanLog, Ties, clean
from genrec_shards.cleaning.published_sizes import check_expected, public_set
from genrec_shards.dataset import (
    FORMAT_VERSION,
    Dataset,
    DatasetInfo,
    Source,
    load_dataset,
    source_of,
    write_dataset,
)
from genrec_shards.errors import BadLines, DataError, OnError
from genrec_shards.numbering.item_text import Descriptions, read_descriptions
from genrec_shards.numbering.item_vectors import read_trained_vectors
from genrec_shards.numbering.numbering import DESCRIBED, NumberingName, number
from genrec_shards.readers.read_log import LOG_FORMATS, Format, LogOptions, read_log, source_files
from genrec_shards.readers.recognise import guess_format, read_as
from genrec_shards.readers.text_blocks import check_readable
from genrec_shards.sequences import read_sequences
from genrec_shards.splits import (
    GLOBAL_TIME,
    LEAVE_ONE_OUT,
    Cutoff,
    GlobalTime,
    Split,
    TrainedThrough,
    cutoff_of,
)
from genrec_shards.storage.address import is_address
from genrec_shards.timestamps import moment

Engine = Literal["local", "ray"]
_LOGS = ", ".join(LOG_FORMATS)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a source becomes a data directory."""

    format: Format = "auto"
    """`sequences`; a log (`interactions`, `amazon`, `yelp`); `data`, a data directory that is to be
    numbered anew: its sequences stay what they are, so its shards serve both. `auto`: by name and
    content."""
    on_error: OnError = "stop"
    """What happens at a line that cannot be read."""
    overwrite: bool = False
    """Whether an existing data directory is replaced."""
    log: LogOptions = field(default_factory=LogOptions)
    """How a log is read."""
    k_core: int | None = None
    """Of a log, as in `Cleaning`, and so are the next three; None: its default."""
    min_length: int | None = None
    ties: Ties | None = None
    since: str | None = None
    """First date of a log's rows that stay, ISO 8601."""
    until: str | None = None
    """Last date, or time, of a log's rows that stay."""
    split: str | None = None
    """`leave-one-out` (None) or, of a log, `global-time`: core, catalogue and numbering are then
    those of the training period. A data directory keeps its own."""
    cutoff: str | None = None
    """Of global-time, VALIDATION,TEST: the first dates of these periods."""
    expect: str | None = None
    """A published set (`published_sizes.py`) that names the dates, where none are given, and whose
    counts must come out."""
    numbering: NumberingName = "random"
    seed: int = 0
    """Of numbering and shuffled ties."""
    levels: Sequence[int] | None = None
    """As in `number`."""
    vectors: str | Path | None = None
    """File of `read_trained_vectors`, and what these have seen."""
    vectors_trained_through: TrainedThrough = "n-2"
    items: str | Path | None = None
    """Table of the items' texts and titles, and its columns, as in `read_descriptions`. They are
    kept, and `format="data"` finds them again."""
    item_column: str | None = None
    text_columns: Sequence[str] | None = None
    title_column: str | None = None
    engine: Engine = "local"
    """`ray` reads and cleans a log on a cluster, to the same bytes; its source may be an
    address."""
    ray_address: str | None = None
    """Of a running cluster; None: all cores of this machine."""

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ValueError(f"engine {self.engine!r}: choose local or ray")
        columns = (self.item_column, self.text_columns, self.title_column)
        if self.items is None and columns != (None, None, None):
            named = "a column of item ids, text or titles is named, and no table"
            raise ValueError(f"{named}: give --items META")

    def check(self, format: str, source: str | Path) -> None:
        """Raises ValueError for options that do not go with the format of a source."""
        if format not in ("sequences", "data", *LOG_FORMATS):
            formats = f"--format sequences, {_LOGS}, or data to number a data directory anew"
            raise ValueError(f"format {format!r} is not supported: use {formats}")
        if format in LOG_FORMATS:
            return
        if self.ties not in (None, "keep"):
            no_ties = f"the {format} format has no ties left to order: use --ties keep"
            raise ValueError(f"ties {self.ties!r}: {no_ties}")
        this = f"({_LOGS}), this is of the {format} format"
        if self.engine == "ray":
            raise ValueError(f"{source}: engine ray is for logs {this}: leave it out")
        of_logs = (self.k_core, self.min_length, self.since, self.until, self.log)
        if of_logs != (None, None, None, None, LogOptions()):
            names = "k_core, min_length, since, until, columns and time_unit"
            raise ValueError(f"{source}: {names} are a log's {this}: leave them out")

    def cutoff_for(self, format: str) -> Cutoff | None:
        """The dates of a split by time; None for leave-one-out, and for a data directory, which is
        split already. Raises ValueError for what does not go together."""
        if self.split not in (None, LEAVE_ONE_OUT, GLOBAL_TIME):
            raise ValueError(f"split {self.split!r}: choose {LEAVE_ONE_OUT} or {GLOBAL_TIME}")
        if format == "data" and (self.split, self.cutoff) != (None, None):
            remedy = "leave out --split and --cutoff, or prepare its log again"
            raise ValueError(f"a data directory keeps its split: {remedy}")
        if self.split != GLOBAL_TIME:
            if self.cutoff is not None:
                raise ValueError(
                    f"--cutoff {self.cutoff[:60]}: dates go with --split {GLOBAL_TIME}"
                )
            return None
        if format not in LOG_FORMATS:
            remedy = f"give a log, or use --split {LEAVE_ONE_OUT}"
            raise ValueError(f"split {GLOBAL_TIME}: the {format} format has no times: {remedy}")
        if self.cutoff is None:
            raise ValueError(
                f"split {GLOBAL_TIME} needs the first dates of the validation and the test period: "
                "give --cutoff VALIDATION,TEST, as 2014-01-01,2014-04-01"
            )
        return cutoff_of(self.cutoff)

    def cleaning(self, cutoff: Cutoff | None = None) -> Cleaning:
        """What becomes of a log. Raises ValueError for values that are none."""
        since, until = self.since, self.until
        if self.expect is not None and (since, until) == (None, None):
            published = public_set(self.expect)
            since, until = published.since, published.until
        return Cleaning(
            k_core=Cleaning.k_core if self.k_core is None else self.k_core,
            min_length=self.min_length,
            ties=self.ties or "shuffle",
            seed=self.seed,
            since=None if since is None else moment(since, "--since"),
            until=None if until is None else moment(until, "--until", end_of_day=True),
            cutoff=cutoff,
        )

    def descriptions(self, item_ids: Sequence[str]) -> Descriptions | None:
        """Texts and titles of these items; None where no table is given."""
        if self.items is None:
            return None
        return read_descriptions(
            self.items,
            item_ids,
            id_column=self.item_column,
            text_columns=self.text_columns,
            title_column=self.title_column,
        )


Finish = Callable[[Dataset, Path], object]
"""Adds files of its own to a data directory: called with the data set and the folder that its files
are in, before that bears the directory's name."""


def prepare(
    source: str | Path,
    out: str | Path,
    options: PrepareOptions | None = None,
    finish: Finish | None = None,
    **fields: Any,
) -> Dataset:
    """Read a source and write a data directory, complete or not at all; the same input gives the
    same bytes.

    Args:
        source: file or folder; with the Ray engine also an address.
        out: the data directory.
        options: None: the defaults.
        finish: adds to what the directory holds.
        fields: fields of `options` by name, in place of those in it.

    Raises:
        DataError: something is wrong with a file.
        ValueError: a wrong option, or `out` exists.
    """
    options = dataclasses.replace(options or PrepareOptions(), **fields)
    format = options.format
    place: str | Path = Path(source)
    if options.engine == "ray":
        from genrec_shards.ray_engine.sources import check_source, format_of, place_of

        out, place = place_of(out), place_of(source)
        if not isinstance(out, Path):
            uploads = "`genrec prepare --out` uploads one"
            raise ValueError(f"{out}: `prepare` makes a directory of this machine; {uploads}")
        check_source(place)
        format = format_of(place, options.log.columns) if format == "auto" else format
    else:
        out = Path(out)
        if is_address(source) and not Path(source).exists():
            reason = "an address, and only --engine ray reads those"
            raise DataError(f"{source}: {reason}: download it, or give --engine ray")
        check_readable(Path(source))
        if format == "auto":
            format = guess_format(Path(source), options.log.columns)
    options.check(format, source)
    if options.engine == "local" and options.ray_address is not None:
        raise ValueError(f"--ray-address {options.ray_address}: goes with --engine ray")
    cleaning = options.cleaning(options.cutoff_for(format))
    if format == "data" and out.resolve() == Path(place).resolve():
        same = "is the data that is to be numbered anew, with its shards"
        raise ValueError(f"{out} {same}: choose another output")
    bad = BadLines(options.on_error)
    # A log's rows wait beside the output for their users, so that a place that cannot be written is
    # reported before hours of reading.
    with atomic_directory(out, options.overwrite, marker="dataset.json") as folder:
        if format == "data":
            old = load_dataset(place)
            sequences, timestamps, descriptions = old.sequences, old.timestamps, old.descriptions
            kept = {name: getattr(old.info, name) for name in _OF_SEQUENCES}
        elif format == "sequences":
            sequences, timestamps, descriptions = read_sequences(place, bad), None, None
            dropped = {"bad_lines": bad.count} if bad.count else {}
            kept = {
                "source": source_of(Path(place), [Path(place)]),
                "ties": "keep",
                "dropped": dropped,
                "read_as": read_as(Path(place), format),
            }
            kept |= {"split": LEAVE_ONE_OUT}
        else:
            log, origin, words = _clean_log(place, format, bad, cleaning, options, folder)
            sequences, timestamps, descriptions = log.sequences, log.timestamps, None
            kept = {
                "source": origin,
                "split": LEAVE_ONE_OUT if cleaning.cutoff is None else GLOBAL_TIME,
                "ties": cleaning.ties,
                "dropped": {"bad_lines": bad.count} | log.dropped,
                "read": log.num_read + bad.count,
                "global_time": _global_time(cleaning.cutoff, log),
                "cleaned": log.cleaned,
                "read_as": words,
            }
        if options.expect is not None:
            check_expected(options.expect, sequences, str(place))
        descriptions = options.descriptions(sequences.item_ids) or descriptions
        vectors, through = options.vectors, options.vectors_trained_through
        codes = number(
            sequences,
            options.numbering,
            options.seed,
            levels=options.levels,
            vectors=None if vectors is None else read_trained_vectors(vectors, sequences, through),
            descriptions=descriptions if options.numbering in DESCRIBED else None,
        )
        info = DatasetInfo(
            format_version=FORMAT_VERSION,
            users=sequences.num_users,
            items=sequences.num_items,
            interactions=sequences.num_interactions,
            numbering=options.numbering,
            seed=options.seed,
            sequences_hash=sequences.sequences_hash(),
            numbering_hash=codes.numbering_hash(),
            expected=options.expect,
            hierarchy=codes.hierarchy,
            described_by=source_of_texts(descriptions),
            items_with_text=None if descriptions is None else descriptions.num_described,
            **kept,
        )
        bad_lines = tuple(bad.summary())
        dataset = Dataset(out, sequences, codes, info, descriptions, timestamps, bad_lines)
        write_dataset(dataset, folder)
        if finish is not None:
            finish(dataset, folder)
    return dataset


_OF_SEQUENCES = (
    *("source", "split", "ties", "dropped", "read", "appended", "global_time", "cleaned"),
    "read_as",
)
"""Fields of `DatasetInfo` that a new numbering keeps."""


def _clean_log(
    place: str | Path,
    format: Format,
    bad: BadLines,
    cleaning: Cleaning,
    options: PrepareOptions,
    folder: Path,
) -> tuple[CleanLog, Source, str]:
    """A log, where it came from and what it was read as. `folder`: where its rows are meanwhile; it
    is empty again afterwards."""
    waiting = folder / "rows"
    waiting.mkdir()
    if options.engine == "ray":
        from genrec_shards.ray_engine.clean_log import clean_on_ray

        address = options.ray_address
        found = clean_on_ray(place, format, bad, cleaning, options.log, waiting, address)
        # Sequences and times are mapped, and last as long as they are held.
    else:
        path = Path(place)
        log = clean(read_log(path, format, bad, options.log), cleaning, waiting, str(path))
        words = read_as(path, format, options.log.columns)
        found = log, source_of(path, source_files(path, format)), words
    shutil.rmtree(waiting)
    return found


def _global_time(cutoff: Cutoff | None, log: CleanLog) -> GlobalTime | None:
    if cutoff is None:
        return None
    validation, test = (log.sequences.history_and_target(split) for split in get_args(Split))
    return GlobalTime(
        cutoff=str(cutoff),
        validation_targets=len(validation.users),
        test_targets=len(test.users),
        users_without_history=log.users_without_history,
    )


def source_of_texts(descriptions: Descriptions | None) -> Source | None:
    """The file that texts were read from."""
    return None if descriptions is None else Source(descriptions.name, descriptions.sha256)
