"""The commands `genrec prepare`, `genrec shard` and `genrec export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genrec_dist.cli.options import DataArgument, EngineOption, OverwriteOption, RayAddressOption
from genrec_dist.console import UsageError, say

if TYPE_CHECKING:
    from genrec_shards.dataset import Dataset

    from genrec_dist.baselines.leak_audit import Audit

# Modules are imported inside the commands: `genrec --help` must not wait for torch.


Text = str | None
_APPEND = "In place of SOURCE: what is to be added to --to, whose rows and codes stay."
_FORMAT = (
    "sequences: `user item item ...` a line, oldest first; interactions: a table (CSV, TSV, `::`, "
    "Parquet, RecBole's .inter) or JSON lines, or a folder of these; amazon (2014, 2018, 2023) and "
    "yelp: reviews in JSON lines; data: a data directory to be numbered anew; auto: by name and "
    "content."
)
_LEVELS = "Clusters at each level of collaborative, semantic and combined codes, as 64,64."
_VECTORS = "Collaborative codes of trained item vectors (safetensors), not of co-occurrence."
_ITEMS = "The items' text and attributes: a table of any kind that a log may be, or JSON lines."
_ITEM_COLUMN = (
    "META's column of item ids, where it has no usual name; its place, as 0, where META has no "
    "line of names."
)
_COLUMNS = (
    "Columns of interactions, where they have no usual names; places, as 0,1,3, where the file has "
    "no line of names."
)
_K_CORE = "Fewest rows of each user and item of a log that stay, 0: none; default: 5."
_MIN_LENGTH = "Fewest items of a user of a log; default: 3, by time 1 in the training period."
_SPLIT = (
    "What is held out: each user's last two items (default), or of a log what comes after dates."
)
_CUTOFF = "First dates of these periods of global-time, as 2014-01-01,2014-04-01."
_TIES = (
    "A log's rows of one user and time: in an order drawn from the seed (default), or as they come."
)
_EXPECT = (
    "The published set this is: its numbers of users and items must come out (paper, Table 2)."
)


def prepare(
    context: typer.Context,
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="The log, plain, gz or zip; or a folder.")
    ] = None,
    out_dir: Annotated[
        str | None,
        typer.Option("--out", help="Data directory to write; of --append default: DATA itself."),
    ] = None,
    append: Annotated[Path | None, typer.Option(metavar="NEW", help=_APPEND)] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DATA", help="With --append: the data directory.")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help=_FORMAT)] = "auto",
    numbering: Annotated[
        str,
        typer.Option(
            help="random, collaborative, semantic or combined (with --items), train-order or given."
        ),
    ] = "random",
    seed: Annotated[int, typer.Option(help="Seed of the numbering.")] = 0,
    overwrite: OverwriteOption = False,
    levels: Annotated[Text, typer.Option(help=_LEVELS)] = None,
    vectors: Annotated[Path | None, typer.Option(help=_VECTORS)] = None,
    vectors_trained_through: Annotated[
        Literal["n-2", "n-1"],
        typer.Option(help="What those vectors may have seen; n-1 has seen validation."),
    ] = "n-2",
    items: Annotated[Path | None, typer.Option(metavar="META", help=_ITEMS)] = None,
    item_column: Annotated[Text, typer.Option(help=_ITEM_COLUMN)] = None,
    text_columns: Annotated[
        Text, typer.Option(help="META's columns to read, as title,brand; default: all.")
    ] = None,
    title_column: Annotated[
        Text, typer.Option(help="META's column of titles, where it has no usual name.")
    ] = None,
    columns: Annotated[Text, typer.Option(metavar="USER,ITEM,TIME", help=_COLUMNS)] = None,
    time_unit: Annotated[
        Literal["auto", "s", "ms", "us"],
        typer.Option(help="Of a log's times that are numbers; auto: by their size."),
    ] = "auto",
    k_core: Annotated[int | None, typer.Option(help=_K_CORE)] = None,
    min_length: Annotated[int | None, typer.Option(help=_MIN_LENGTH)] = None,
    split: Annotated[
        Literal["leave-one-out", "global-time"] | None, typer.Option(help=_SPLIT)
    ] = None,
    cutoff: Annotated[Text, typer.Option(metavar="VALIDATION,TEST", help=_CUTOFF)] = None,
    ties: Annotated[Literal["shuffle", "keep"] | None, typer.Option(help=_TIES)] = None,
    since: Annotated[
        Text, typer.Option(help="First date of a log's rows that stay, as 2019-01-01.")
    ] = None,
    until: Annotated[
        Text, typer.Option(help="Last date of a log's rows that stay, as 2019-12-31.")
    ] = None,
    expect: Annotated[
        Literal["beauty", "sports", "toys", "yelp"] | None, typer.Option(help=_EXPECT)
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="At a line that cannot be read: end, or leave it out and count it."),
    ] = "stop",
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
) -> None:
    """Turn a log into sequences with leak-free codes, and audit it.

    With --append a log, or another source, is added to a data directory: docs/refresh.md.

    Example: genrec prepare Beauty.txt.gz --out data/beauty --numbering random
    """
    from genrec_shards.append import append as run_append
    from genrec_shards.cleaning.summary import append_summary, prepare_summary
    from genrec_shards.numbering.numbering import summary
    from genrec_shards.prepare import PrepareOptions
    from genrec_shards.prepare import prepare as run_prepare
    from genrec_shards.readers.read_log import LogOptions

    from genrec_dist.baselines.leak_audit import write_audit

    _check_prepare(context, source, out_dir, append, to)
    options = PrepareOptions(
        format=format_,  # type: ignore[arg-type]
        on_error=on_error,
        overwrite=overwrite,
        log=LogOptions(None if columns is None else tuple(columns.split(",")), time_unit),
        k_core=k_core,
        min_length=min_length,
        ties=ties,
        since=since,
        until=until,
        split=split,
        cutoff=cutoff,
        expect=expect,
        numbering=numbering,  # type: ignore[arg-type]
        seed=seed,
        levels=None if levels is None else _whole_numbers("--levels", levels),
        vectors=vectors,
        vectors_trained_through=vectors_trained_through,
        items=items,
        item_column=item_column,
        text_columns=None if text_columns is None else text_columns.split(","),
        title_column=title_column,
        engine=engine,
        ray_address=ray_address,
    )
    audits: list[Audit] = []

    def finish(dataset: Dataset, folder: Path) -> None:
        audits.append(write_audit(dataset, folder))

    if append is not None and to is not None:
        grown = run_append(append, to, out_dir, options, finish)
        for line in append_summary(grown):
            say(line)
        say(f"{grown.path}: {_counts(grown)}")
        _say_of_data(grown, *audits)
        say(f"shards hold the sequences they were made of; next: genrec shard {grown.path}")
        return
    assert source is not None
    assert out_dir is not None
    with _directory(out_dir, overwrite, "dataset.json") as folder:
        dataset = run_prepare(source, folder, options, finish)
    for line in prepare_summary(dataset):
        say(line)
    say(f"{out_dir}: {_counts(dataset)}, numbering {numbering}")
    for line in summary(dataset.numbering):
        say(line)
    _say_of_data(dataset, *audits)


def _say_of_data(dataset: Dataset, found: Audit) -> None:
    """How many items have a text, and what times and ids of the data mean for scores on it."""
    from genrec_shards.cleaning.summary import text_summary, tie_summary

    if (texts := text_summary(dataset)) is not None:
        say(texts)
    ties, many = tie_summary(dataset)
    say(ties, style="yellow" if many else "")
    say(found.sentence(), style="yellow" if found.leaks else "")


def _counts(dataset: Dataset) -> str:
    info = dataset.info
    return f"{info.users:,} users, {info.items:,} items, {info.interactions:,} interactions"


def _check_prepare(
    context: typer.Context,
    source: str | None,
    out_dir: str | None,
    append: Path | None,
    to: Path | None,
) -> None:
    """Either a source and where it goes, or what is added to which data."""
    from genrec_shards.append import SETTLED

    if append is None and to is not None:
        raise UsageError("--to DATA belongs to --append NEW")
    if append is None and source is None:
        raise UsageError("give SOURCE, or --append NEW --to DATA")
    if append is None and out_dir is None:
        raise UsageError("give --out, the data directory")
    if append is None:
        return
    if source is not None:
        raise UsageError(f"give SOURCE {source} or --append {append}, not both")
    if to is None:
        needed = "--to DATA, the data directory that it is added to"
        raise UsageError(f"--append {append} needs {needed}")
    for name in ("engine", *SETTLED):
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            reason = f"{to} has settled it"
            reason = "what is added is read by one machine" if name == "engine" else reason
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} with --append: {reason}, leave it out")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        form = "give whole numbers with commas between them, as 64,64"
        raise UsageError(f"{option} {text}: {form}") from None


def shard(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Directory of `genrec prepare`.")],
    out_dir: Annotated[
        str | None, typer.Option("--out", help="Shard directory; default: DATA/shards.")
    ] = None,
    users_per_shard: Annotated[int, typer.Option(help="Users a tar.")] = 8192,
    overwrite: OverwriteOption = False,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
) -> None:
    """Pack sequences into webdataset tars with a manifest.

    Example: genrec shard data/beauty
    """
    from genrec_shards.dataset import load_dataset
    from genrec_shards.storage.write import write_shards

    target = out_dir or f"{data.rstrip('/')}/shards"
    sizes: dict[str, Any] = {"users_per_shard": users_per_shard, "overwrite": overwrite}
    if engine == "ray":
        from genrec_shards.ray_engine.shard_tasks import write_shards_on_ray

        manifest = write_shards_on_ray(data, target, address=ray_address, **sizes)
    elif ray_address is not None:
        raise UsageError("--ray-address goes with --engine ray")
    else:
        manifest = write_shards(load_dataset(data), target, **sizes)
    size = sum(tar.bytes for tar in manifest.shards)
    say(f"{target}: {len(manifest.shards)} tars, {manifest.users:,} users, {size:,} bytes")


def export(
    data: DataArgument,
    to: Annotated[
        Literal["csv", "recbole", "rectools"],
        typer.Option(
            "--to",
            help="csv: user_id, item_id, position, timestamp; recbole: atomic benchmark files; "
            "rectools: user_id, item_id, weight, datetime.",
        ),
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", help="Directory to write; its name is RecBole's data set.")
    ],
    overwrite: OverwriteOption = False,
) -> None:
    """Write training part, validation and test as files, so that another system trains on the same
    split; `genrec score` reads its lists.

    Example: genrec export data/beauty --to csv --out beauty-split
    """
    from genrec_shards.dataset import load_dataset
    from genrec_shards.storage.export import export as run_export

    for name, rows in run_export(load_dataset(data), out_dir, to, overwrite=overwrite).items():
        say(f"{out_dir / name}: {rows:,} rows")


def _directory(out_dir: str, overwrite: bool, marker: str) -> Any:
    """Where a directory is to be made: its place, or for an address one on this machine, whose
    files go there when it is complete."""
    from contextlib import nullcontext

    from genrec_shards.storage.address import is_address

    if not is_address(out_dir) or out_dir.startswith("file:"):
        return nullcontext(out_dir)
    from genrec_shards.ray_engine.upload import uploaded_directory

    return uploaded_directory(out_dir, overwrite, marker)
