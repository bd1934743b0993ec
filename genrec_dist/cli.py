"""The command line: `genrec COMMAND ...`, each command a thin door to a function."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from genrec_dist.bench.doors import bench
from genrec_dist.reproduce.door import reproduce

app = typer.Typer(
    name="genrec",
    help="Train GenRec, a generative sequential recommender: exact, honest, fast.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
# typer brings its own click or the real one, by its version: only these two bases are public in both.
UsageError: Any = typer.BadParameter.__base__
ClickException: Any = UsageError.__base__

Split = Literal["validation", "test"]
YesNo = Literal["auto", "yes", "no"]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `genrec train`.")]
DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="Directory of `genrec prepare`.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Data directory; default: the one the run was trained on.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
EngineOption = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="ray: on a cluster, to the same bytes: docs/data.md.")
]
RayAddressOption = Annotated[
    str | None, typer.Option("--ray-address", help="HOST:PORT of a running Ray cluster; default: this machine's cores.")
]
ExcludeOption = Annotated[
    YesNo, typer.Option("--exclude-history", help="Leave out items of the history; auto: where no target repeats.")
]


DecodeOption = Annotated[
    Literal["exact", "compact", "free", "all", "items", "hybrid"],
    typer.Option(
        "--decode",
        help="exact: the model's softmax; compact: over the items' tokens alone; free: no trie; all: every item scored; items: by "
        "the item head (model.item_loss); hybrid: by the decoder with the item head, the transition graph or both.",
    ),
]


def say(text: str, style: str = "") -> None:
    """A line as it is: a path is neither broken at the terminal's width nor taken for markup."""
    out.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


# Modules are imported inside the commands: `genrec --help` must not wait for torch.


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the demo run.")] = Path("runs/demo"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value of the demo recipe.")] = None,
) -> None:
    """The whole path on a synthetic catalogue whose ceiling is known.

    Example: genrec demo --out runs/demo
    """
    from genrec_dist.demo import run_demo

    run_demo(out_dir, overrides or [], out)


@app.command()
def prepare(
    context: typer.Context,
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help="The log, gz or not; or a folder.")] = None,
    out_dir: Annotated[
        str | None, typer.Option("--out", help="Data directory to write; of --append default: DATA itself.")
    ] = None,
    append: Annotated[
        Path | None,
        typer.Option(metavar="NEW", help="In place of SOURCE: what is to be added to --to, whose rows and codes stay."),
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="DATA", help="With --append: the data directory.")] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="sequences: `user item item ...` a line, oldest first; interactions: CSV or Parquet, or a folder of either; "
            "amazon (2014, 2018, 2023) and yelp: reviews in JSON lines; data: a data directory to be numbered anew; auto: by "
            "name and first line.",
        ),
    ] = "auto",
    numbering: Annotated[
        str, typer.Option(help="random, collaborative, semantic (with --items), train-order or given.")
    ] = "random",
    seed: Annotated[int, typer.Option(help="Seed of the numbering.")] = 0,
    overwrite: OverwriteOption = False,
    levels: Annotated[
        str | None, typer.Option(help="Clusters at each level of collaborative and semantic codes, as 64,64.")
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(help="Collaborative codes of trained item vectors (safetensors), not of co-occurrence."),
    ] = None,
    vectors_trained_through: Annotated[
        Literal["n-2", "n-1"], typer.Option(help="What those vectors may have seen; n-1 has seen validation.")
    ] = "n-2",
    items: Annotated[
        Path | None, typer.Option(metavar="META", help="The items' text and attributes: CSV, Parquet or JSON lines.")
    ] = None,
    item_column: Annotated[
        str | None, typer.Option(help="META's column of item ids, where it has no usual name.")
    ] = None,
    text_columns: Annotated[
        str | None, typer.Option(help="META's columns to read, as title,brand; default: all.")
    ] = None,
    title_column: Annotated[
        str | None, typer.Option(help="META's column of titles, where it has no usual name.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="USER,ITEM,TIME", help="Columns of interactions, where they have no usual names."),
    ] = None,
    time_unit: Annotated[
        Literal["auto", "s", "ms", "us"], typer.Option(help="Of a log's times that are numbers; auto: by their size.")
    ] = "auto",
    k_core: Annotated[
        int | None, typer.Option(help="Fewest rows of each user and item of a log that stay, 0: none; default: 5.")
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Fewest items of a user of a log; default: 3, by time 1 in the training period.")
    ] = None,
    split: Annotated[
        Literal["leave-one-out", "global-time"] | None,
        typer.Option(
            help="What is held out: each user's last two items (default), or of a log what comes after dates."
        ),
    ] = None,
    cutoff: Annotated[
        str | None,
        typer.Option(
            metavar="VALIDATION,TEST", help="First dates of these periods of global-time, as 2014-01-01,2014-04-01."
        ),
    ] = None,
    ties: Annotated[
        Literal["shuffle", "keep"] | None,
        typer.Option(
            help="A log's rows of one user and time: in an order drawn from the seed (default), or as they come."
        ),
    ] = None,
    since: Annotated[str | None, typer.Option(help="First date of a log's rows that stay, as 2019-01-01.")] = None,
    until: Annotated[str | None, typer.Option(help="Last date of a log's rows that stay, as 2019-12-31.")] = None,
    expect: Annotated[
        Literal["beauty", "sports", "toys", "yelp"] | None,
        typer.Option(help="The published set this is: its numbers of users and items must come out (paper, Table 2)."),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="At a line that cannot be read: end, or leave it out and count it.")
    ] = "stop",
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
) -> None:
    """Turn a log into sequences with leak-free codes, and audit it.

    With --append a log, or another source, is added to a data directory: docs/refresh.md.

    Example: genrec prepare Beauty.txt.gz --out data/beauty --numbering random
    """
    from genrec_shards.append import append as run_append
    from genrec_shards.append import appended_told
    from genrec_shards.numbering import told
    from genrec_shards.prepare import cleaning_told
    from genrec_shards.prepare import prepare as run_prepare
    from genrec_shards.readers.logs import LogOptions

    from genrec_dist.audit import write_audit

    _check_prepare(context, source, out_dir, append, to)
    if append is not None and to is not None:
        grown = run_append(
            append, to, None if out_dir is None else Path(out_dir), format=format_,  # type: ignore[arg-type]
            overwrite=overwrite, k_core=k_core, min_length=min_length,
            since=since, until=until, on_error=on_error, items=items, item_column=item_column,
            text_columns=None if text_columns is None else text_columns.split(","), title_column=title_column,
            log=LogOptions(columns=None if columns is None else tuple(columns.split(",")), time_unit=time_unit),
        )  # fmt: skip
        write_audit(grown)
        for line in appended_told(grown):
            say(line)
        info = grown.info
        say(f"{grown.path}: {info.users:,} users, {info.items:,} items, {info.interactions:,} interactions")
        say(f"shards hold the sequences they were made of; next: genrec shard {grown.path}")
        return
    assert source is not None
    assert out_dir is not None
    with _directory(out_dir, overwrite, "dataset.json") as folder:
        dataset = run_prepare(
            source, folder, format=format_, numbering=numbering, seed=seed, overwrite=overwrite,  # type: ignore[arg-type]
            levels=None if levels is None else _whole_numbers("--levels", levels), vectors=vectors,
            vectors_trained_through=vectors_trained_through, items=items, item_column=item_column,
            text_columns=None if text_columns is None else text_columns.split(","), title_column=title_column,
            k_core=k_core, min_length=min_length, split=split, cutoff=cutoff, ties=ties, on_error=on_error,
            since=since, until=until, expect=expect, engine=engine, ray_address=ray_address,
            log=LogOptions(columns=None if columns is None else tuple(columns.split(",")), time_unit=time_unit),
        )  # fmt: skip
        found = write_audit(dataset)
    for line in cleaning_told(dataset):
        say(line)
    sequences = dataset.sequences
    say(
        f"{out_dir}: {sequences.num_users:,} users, {sequences.num_items:,} items, "
        f"{sequences.num_interactions:,} interactions, numbering {numbering}"
    )
    for line in told(dataset.numbering):
        say(line)
    if dataset.numbering.hierarchy is None:
        say(found.sentence(), style="yellow" if found.leaks else "")


def _check_prepare(
    context: typer.Context, source: str | None, out_dir: str | None, append: Path | None, to: Path | None
) -> None:
    """Either a source and where it goes, or what is added to which data."""
    if append is None:
        if to is not None:
            raise UsageError("--to DATA belongs to --append NEW")
        if source is None or out_dir is None:
            raise UsageError(
                "give SOURCE, or --append NEW --to DATA" if source is None else "give --out, the data directory"
            )
        return
    if source is not None:
        raise UsageError(f"give SOURCE {source} or --append {append}, not both")
    if to is None:
        raise UsageError(f"--append {append} needs --to DATA, the data directory that it is added to")
    if getattr(context.get_parameter_source("engine"), "name", "") == "COMMANDLINE":
        raise UsageError("--engine with --append: what is added is read by one machine, leave it out")
    settled = ("numbering", "seed", "levels", "vectors", "vectors_trained_through", "ties", "expect", "split", "cutoff")
    for name in settled:
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')} with --append: {to} has settled it, leave it out")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: give whole numbers with commas between them, as 64,64") from None


@app.command()
def shard(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Directory of `genrec prepare`.")],
    out_dir: Annotated[str | None, typer.Option("--out", help="Shard directory; default: DATA/shards.")] = None,
    users_per_shard: Annotated[int, typer.Option(help="Users a tar.")] = 8192,
    overwrite: OverwriteOption = False,
    engine: EngineOption = "local",
    ray_address: RayAddressOption = None,
) -> None:
    """Pack sequences into webdataset tars with a manifest.

    Example: genrec shard data/beauty
    """
    from genrec_shards.dataset import load_dataset
    from genrec_shards.write import write_shards

    target = out_dir or f"{data.rstrip('/')}/shards"
    if engine == "ray":
        from genrec_shards.ray_engine.tars import write_shards_on_ray

        manifest = write_shards_on_ray(
            data, target, users_per_shard=users_per_shard, overwrite=overwrite, address=ray_address
        )
    elif ray_address is not None:
        raise UsageError("--ray-address goes with --engine ray")
    else:
        manifest = write_shards(load_dataset(data), target, users_per_shard=users_per_shard, overwrite=overwrite)
    size = sum(tar.bytes for tar in manifest.shards)
    say(f"{target}: {len(manifest.shards)} tars, {manifest.users:,} users, {size:,} bytes")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, repeatable.")] = None,
    begin_from: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Begin with this run's weights: --set begin_from=RUN (docs/refresh.md)."
        ),
    ] = None,
    resume: Annotated[str | None, typer.Option(help="latest, or a checkpoint directory.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    profile: Annotated[
        int, typer.Option(help="Record so many steps into RUN/trace-rank-R.json.gz, for ui.perfetto.dev.", min=0)
    ] = 0,
) -> None:
    """Pretrain and finetune by a recipe; under accelerate launch or torchrun on several processes.

    Example: genrec train tiny --set data=data/beauty --set run=runs/beauty
    """
    from genrec_dist.recipe import load_recipe
    from genrec_dist.report import write_report
    from genrec_dist.train import train as run_train
    from genrec_dist.workshop import describe

    resolved = load_recipe(recipe, overrides)
    if begin_from is not None:
        resolved = dataclasses.replace(resolved, begin_from=str(begin_from))
    if dry_run:
        out.print_json(data=describe(resolved))
        return
    path = run_train(resolved, resume, trace_steps=profile)
    if _rank() == 0:
        write_report(path)
        say(f"{path}: finished; next: genrec evaluate {path} --split test")


@app.command()
def evaluate(
    run: RunArgument,
    split: Annotated[Split, typer.Option(help="Which items are the targets.")] = "test",
    beam: Annotated[int, typer.Option(help="Width of the beam; one narrower than the lists is widened.", min=1)] = 20,
    top: Annotated[int, typer.Option(help="Length of the lists; metrics need 20.")] = 20,
    decode: DecodeOption = "exact",
    item_weight: Annotated[
        float | None,
        typer.Option(help="Of the item head in hybrid; default: as --tune-weights chose, else 1.", min=0.0),
    ] = None,
    graph_weight: Annotated[
        float | None, typer.Option(help="Of the transition graph in hybrid; default: as chosen, else 0.", min=0.0)
    ] = None,
    graph_settings: Annotated[
        list[str] | None,
        typer.Option("--graph-set", help="epsilon=value of the mixture, or key=value of the graph's kNN; repeatable."),
    ] = None,
    tune_weights: Annotated[
        bool,
        typer.Option("--tune-weights", help="Choose hybrid's weights on validation, into RUN/hybrid.json; no lists."),
    ] = False,
    exclude_history: ExcludeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Users decoded at once.", min=1)] = 512,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Directory for metrics and lists, if not RUN: another --decode stands beside."),
    ] = None,
    data: DataOption = None,
) -> None:
    """Decode every user once, score, and set the baselines beside it; under accelerate launch or torchrun on several processes.

    Weights of --decode hybrid are chosen once on validation (--tune-weights) and then used for test.

    Example: genrec evaluate runs/beauty --split test
    """
    from genrec_shards.dataset import load_dataset

    from genrec_dist.evaluate import Decoding, mixed_decoding, tune_mixture
    from genrec_dist.evaluate import evaluate as run_evaluate
    from genrec_dist.metrics import TOP
    from genrec_dist.ranks import Ranks
    from genrec_dist.recipe import load_recipe
    from genrec_dist.report import write_report
    from genrec_dist.results import format_table
    from genrec_dist.run import load_run

    if top < TOP:
        raise UsageError(f"--top {top}: metrics look at {TOP} places, give --top {TOP} or more")
    if tune_weights and (decode != "hybrid" or split != "validation"):
        raise UsageError("--tune-weights goes with --decode hybrid --split validation")
    if tune_weights and out_dir is not None:
        raise UsageError("--tune-weights writes RUN/hybrid.json and no lists: leave out --out")
    if decode != "hybrid" and (graph_weight is not None or graph_settings):
        raise UsageError(f"--decode {decode} has no graph: --graph-weight and --graph-set go with --decode hybrid")
    recipe = load_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None
    dataset = load_dataset(data or _data_of(run))
    with _processes() as device:
        loaded = load_run(run, device)
        decoding = Decoding(
            beam=beam,
            top=top,
            mode=decode,
            batch_size=batch_size,
            exclude_history=_exclude(exclude_history, loaded.model.config.exclude_history),
        )
        if decode == "hybrid":
            decoding = mixed_decoding(
                loaded, dataset, decoding, recipe.trained_through if recipe else "n-2",
                item_weight=item_weight, graph_weight=graph_weight, overrides=graph_settings, anew=tune_weights,
            )  # fmt: skip
        num_users = len(dataset.sequences.history_and_target(split).users)
        if tune_weights:
            with _progress("weights", num_users) as advance:
                choice = tune_mixture(
                    loaded, dataset, decoding=decoding, trained_through=recipe.trained_through if recipe else "n-2",
                    ranks=Ranks(), on_batch=advance,
                )  # fmt: skip
            if _rank() == 0:
                say(choice.told())
            return
        with _progress(f"evaluate {split}", num_users) as advance:
            metrics = run_evaluate(
                loaded,
                dataset,
                split,
                decoding=decoding,
                trained_through=recipe.trained_through if recipe else "n-2",
                recipe=recipe.as_dict() if recipe else None,
                ranks=Ranks(),
                on_batch=advance,
                out_dir=out_dir,
            )
    if metrics is not None:
        out.print(format_table([metrics]))
        say(str(write_report(out_dir or run)))


@app.command()
def recommend(
    run: RunArgument,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first, separated by commas.")] = None,
    user: Annotated[str | None, typer.Option(help="A user's id; with --history: whose history it is.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='JSON lines {"history": [...], "user": ..., "block": [...]}.')
    ] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="All users of the data; needs --out.")] = False,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Directory for --all-users.")] = None,
    top: Annotated[int, typer.Option(help="Length of the lists.", min=1)] = 20,
    beam: Annotated[int, typer.Option(help="Width of the beam; one narrower than the lists is widened.", min=1)] = 20,
    decode: DecodeOption = "exact",
    exclude_history: ExcludeOption = "auto",
    allow: Annotated[Path | None, typer.Option(help="File of item ids, one a line: list these alone.")] = None,
    block: Annotated[Path | None, typer.Option(help="File of item ids, one a line: never list these.")] = None,
    titles: Annotated[
        bool, typer.Option("--titles", help="Lists to be read, with the titles of `prepare --items`, for JSON lines.")
    ] = False,
    data: DataOption = None,
) -> None:
    """What will this user take next? JSON lines in your own item ids.

    Scores are natural log-probabilities of the items' texts under the softmax of --decode; equal ones are listed by fewer
    sub-words, then smaller token ids. Under --decode free, texts that are no item are left out and counted.

    Example: genrec recommend runs/beauty --history 83,104,105
    """
    from genrec_shards.dataset import load_dataset

    from genrec_dist.all_users import recommend_all
    from genrec_dist.choice import read_ids
    from genrec_dist.ranks import Ranks
    from genrec_dist.recommend import Recommender, Request, read_requests, user_request
    from genrec_dist.titles import Titles

    if sum([history is not None or user is not None, file is not None, all_users]) != 1:
        raise UsageError("give one of --history/--user, --file, --all-users")
    if all_users and out_dir is None:
        raise UsageError("--all-users needs --out DIR")
    if all_users and titles:
        raise UsageError("--titles is for lists that are read: of --all-users join the lists with DATA/items.parquet")
    with _processes() as device:
        recommender = Recommender.load(
            run, device, beam=beam, mode=decode,
            exclude_history=None if exclude_history == "auto" else exclude_history == "yes",
            allow=None if allow is None else read_ids(allow), block=None if block is None else read_ids(block),
        )  # fmt: skip
        if _rank() == 0:
            _tell_unknown(allow, recommender.choice.unknown_allow)
            _tell_unknown(block, recommender.choice.unknown_block)
        if all_users:
            assert out_dir is not None
            dataset = load_dataset(data or _data_of(run))
            with _progress("recommend", dataset.sequences.num_users) as advance:
                path = recommend_all(recommender, dataset, out_dir, top=top, ranks=Ranks(), on_batch=advance)
            if path is not None:
                num_items = len(recommender.choice.rows)
                say(f"{path}: {dataset.sequences.num_users:,} users, {num_items:,} items to choose from")
            return
        if file is not None:
            requests = list(read_requests(file))
        elif history is not None:
            requests = [Request([item.strip() for item in history.split(",") if item.strip()], user)]
        else:
            assert user is not None
            requests = [user_request(load_dataset(data or _data_of(run)), recommender.run, user)]
        called = Titles(load_dataset(data or _data_of(run))) if titles else None
        for request, answer in zip(requests, recommender.answers(requests, k=top), strict=True):
            if answer.unknown_items:
                typer.echo(f"not in the catalogue, skipped: {', '.join(answer.unknown_items)}", err=True)
            typer.echo(answer.as_json() if called is None else called.page(request, answer))


def _tell_unknown(file: Path | None, ids: list[str]) -> None:
    from genrec_dist.choice import name_some

    if ids:
        typer.echo(f"{file}: {len(ids):,} ids are not in the catalogue, skipped: {name_some(ids)}", err=True)


@app.command()
def baseline(
    name: Annotated[
        Literal["popularity", "counting", "repeat", "knn", "sasrec", "sasrec+knn"],
        typer.Argument(help="Which rule, SASRec, or SASRec mixed with kNN, hybrid's control."),
    ],
    data: DataArgument,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for metrics and lists.")],
    split: Annotated[Split, typer.Option(help="Which items are the targets.")] = "test",
    trained_through: Annotated[Literal["n-2", "n-1"], typer.Option(help="Last position it may learn.")] = "n-2",
    exclude_history: ExcludeOption = "auto",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of knn or sasrec; of sasrec+knn also with knn. or sasrec. before it."),
    ] = None,
) -> None:
    """The same metrics from the same evaluator for a rule that learns little or nothing, or for SASRec, trained into DIR.

    Example: genrec baseline knn data/beauty --out runs/beauty-knn
    """
    from genrec_shards.dataset import load_dataset

    from genrec_dist.audit import exclude_history_default
    from genrec_dist.results import format_table, run_baseline

    if overrides and name not in ("knn", "sasrec", "sasrec+knn"):
        raise UsageError(f"--set {overrides[0]}: {name} has nothing to set, only knn, sasrec and sasrec+knn have")
    dataset = load_dataset(data)
    excluded = _exclude(exclude_history, exclude_history_default(dataset.sequences))
    metrics = run_baseline(
        name, dataset, split, out_dir, trained_through=trained_through, exclude_history=excluded,
        settings=overrides, on_epoch=lambda epoch: say(str(epoch)),
    )  # fmt: skip
    out.print(format_table([metrics]))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run or a baseline's output; or a folder of seeds.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="What it is compared with.")],
    split: Annotated[Split, typer.Option(help="Whose lists.")] = "test",
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.", min=100)] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write it all to this file.")] = None,
) -> None:
    """Is one better than the other? Paired bootstrap over users, and over seeds where there are several.

    Example: genrec compare runs/beauty runs/beauty-knn
    """
    from genrec_dist.compare import compare as run_compare
    from genrec_dist.compare import conclusion, render, write_json

    found = run_compare(run_a, run_b, split=split, resamples=resamples, seed=seed)
    if json_path is not None:
        write_json(found, json_path)
    out.print(render(found))
    say(conclusion(found))


@app.command()
def report(run: RunArgument) -> None:
    """Write `report.html` of a run; it opens without a network.

    Example: genrec report runs/beauty
    """
    from genrec_dist.report import write_report

    if not run.is_dir():
        raise ValueError(f"{run}: no such run directory")
    say(str(write_report(run)))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, repeatable.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs the run is spread over.", min=1)] = 1,
    memory: Annotated[float, typer.Option(help="GiB of one GPU.")] = 24.0,
    users: Annotated[int | None, typer.Option(help="Users, in place of the recipe's data; with --items.")] = None,
    items: Annotated[int | None, typer.Option(help="Items, in place of the recipe's data; with --users.")] = None,
    launch: Annotated[Path, typer.Option(help="Directory of zero0.json ...: their buckets count.")] = Path("launch"),
    card: Annotated[str | None, typer.Option(help="Its published peak gives the time, e.g. 'RTX 3090'.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s a GPU really reaches, for the time.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write it all to this file.")] = None,
) -> None:
    """Bytes a GPU under DDP and ZeRO 0 to 3, the largest micro-batch that fits, the time, and what to take.

    Example: genrec plan paper-base --gpus 1 --memory 24 --users 22363 --items 12101
    """
    from genrec_dist import forecast
    from genrec_dist.recipe import load_recipe

    found = forecast.forecast(
        load_recipe(recipe, overrides), gpus=gpus, memory_gib=memory, users=users, items=items,
        zero_files=launch if launch.is_dir() else None, card=card, tflops=tflops,
    )  # fmt: skip
    if json_ is not None:
        forecast.write_json(found, json_)
    out.print(forecast.render(found))


@app.command()
def tune(
    space: Annotated[str | None, typer.Argument(metavar="SPACE", help="A space file; --finish needs none.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the sweep.")] = Path("runs/sweep"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that is there.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="The finals of a sweep, and its only look at test.")] = False,
    against_base: Annotated[bool, typer.Option("--against-base", help="With --finish: the base recipe too.")] = False,
    budget_hours: Annotated[float | None, typer.Option(help="End in good order after so many hours.", min=0)] = None,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; default: one on this machine.")] = None,
    storage: Annotated[str | None, typer.Option(help="An address that fsspec knows; the sweep lies there.")] = None,
    trials: Annotated[int | None, typer.Option(help="In place of the space file's.", min=1)] = None,
) -> None:
    """Search a space of recipes by validation; with --finish rerun its best three with three seeds and look at test once.

    Example: genrec tune tuning/spaces/beauty.yaml --out runs/beauty-sweep
    """
    from genrec_tuning.finish import finish_sweep, outcome
    from genrec_tuning.space import load_space
    from genrec_tuning.sweep import run_sweep, told

    if finish:
        ended = finish_sweep(
            out_dir, against_base=against_base, budget_hours=budget_hours, address=address, storage=storage
        )
        say(outcome(ended))
        return
    if space is None or against_base:
        raise UsageError("give a space file" if space is None else "--against-base belongs to --finish")
    found = load_space(space, trials)
    sweep = run_sweep(found, out_dir, resume=resume, budget_hours=budget_hours, address=address, storage=storage)
    say(told(sweep, str(out_dir)))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """What is installed, what works, what is missing and how to get it.

    Example: genrec doctor
    """
    from genrec_dist import doctor as examination

    findings = examination.examine()
    if as_json:
        typer.echo(examination.as_json(findings))
    else:
        out.print(examination.render(findings))
    if not examination.healthy(findings):
        raise typer.Exit(1)


def _data_of(run: Path) -> Path:
    from genrec_dist.recipe import load_recipe

    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: no recipe.yaml in it; is it a directory of `genrec train`?")
    return Path(load_recipe(run / "recipe.yaml").data)


def _exclude(choice: YesNo, default: bool) -> bool:
    return default if choice == "auto" else choice == "yes"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class _processes:
    """The device of this process; under a launcher also the process group, which is left in good order at the end.

    Only decoding happens within, so neither accelerate nor DeepSpeed is asked, whatever the launcher has set for them.
    """

    def __enter__(self) -> Any:
        from genrec_dist.evaluate import best_device
        from genrec_dist.ranks import join
        from genrec_dist.stop import terminate

        # A launcher sends it to all ranks when one is gone.
        self.before = signal.signal(signal.SIGTERM, terminate)
        if _world_size() > 1:
            join()
        return best_device()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from genrec_dist.ranks import leave

        signal.signal(signal.SIGTERM, self.before)
        if _world_size() > 1 and error is None:
            leave()


app.command()(reproduce)
app.add_typer(
    bench,
    name="bench",
    short_help="Measure a claim beside a named peer, the two in turn.",
    help="Measure a claim beside a named peer, the two in turn.\n\nExample: genrec bench stream --json stream.json",
)


def _directory(out_dir: str, overwrite: bool, marker: str) -> Any:
    """Where a directory is to be made: there, or here for an address, where it goes when it is complete."""
    from contextlib import nullcontext

    from genrec_shards.remote import is_address

    if not is_address(out_dir) or out_dir.startswith("file:"):
        return nullcontext(out_dir)
    from genrec_shards.ray_engine.upload import uploaded_directory

    return uploaded_directory(out_dir, overwrite, marker)


class _progress:
    """A bar on standard error of rank 0, so that standard output holds results alone."""

    def __init__(self, what: str, total: int):
        console = Console(stderr=True)
        self.bar = Progress(console=console, disable=_rank() != 0 or not console.is_terminal)
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda users: self.bar.advance(self.task, users)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.bar.stop()


def run_command(arguments: list[str]) -> int:
    """Run one command and give its exit code: 0 ok, 1 failure, 2 usage, 130 and 143 after signals."""
    from genrec_dist.stop import Stopped, Terminated

    try:
        # A typer.Exit comes back as its code, everything else that ends well as None.
        code = app(arguments or ["--help"], prog_name="genrec", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except ClickException as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "genrec"
        typer.echo(f"genrec: {_one_line(error.format_message())}; see {where} --help", err=True)
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except Terminated:
        typer.echo("genrec: ended by SIGTERM", err=True)
        return 128 + signal.SIGTERM
    except Stopped as stop:
        typer.echo(f"genrec: {stop}; continue with {stop.remedy}", err=True)
        return 128 + stop.number
    except (ValueError, OSError) as error:
        typer.echo(f"genrec: {_one_line(_told(error))}", err=True)
        return 1


def _told(error: ValueError | OSError) -> str:
    """An error's own words; those of the operating system with the file and a way out."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno is None:  # numpy says in words how much of an array it could not write
        return f"{error}: make room or choose another output"
    reason = os.strerror(error.errno).lower()
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{place}{reason}: make room or choose another output"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}{reason}: change its rights or choose another place"
    return f"{place}{reason}: check the path"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer runs once, before workers fork
    code = run_command(sys.argv[1:])
    if code and _world_size() > 1:
        # A process group that waits for its peers would keep this rank, and with it the others, from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()
