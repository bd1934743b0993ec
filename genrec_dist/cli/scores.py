"""The commands `genrec baseline`, `genrec score`, `genrec compare` and `genrec report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec_dist.cli.options import DataArgument, ExcludeOption, Split, exclude
from genrec_dist.console import UsageError, out, say, working

# Modules are imported inside the commands: `genrec --help` must not wait for torch.


def baseline(
    name: Annotated[
        Literal[
            "popularity",
            "counting",
            "repeat",
            "knn",
            "sasrec",
            "bsarec",
            "sasrec+knn",
            "graph+text",
            "sasrec+graph+text",
        ],
        typer.Argument(
            help="A rule, SASRec, BSARec, or a control of hybrid: a mixture of kNN's graph, the "
            "items' texts and SASRec."
        ),
    ],
    data: DataArgument,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for metrics and lists.")],
    split: Annotated[Split, typer.Option(help="Which items are the targets.")] = "test",
    trained_through: Annotated[
        Literal["n-2", "n-1"], typer.Option(help="Last position it may learn.")
    ] = "n-2",
    exclude_history: ExcludeOption = "auto",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value of knn, sasrec or bsarec; of a mixture with knn. or sasrec. before it.",
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose knn's settings on validation first.")
    ] = False,
) -> None:
    """The same metrics from the same evaluator for a rule that learns little or nothing, or for
    SASRec or BSARec, trained into DIR.

    Example: genrec baseline knn data/beauty --out runs/beauty-knn
    """
    with working():
        from genrec_shards.dataset import load_dataset
        from genrec_shards.histories import exclude_history_default

        from genrec_dist.baselines.run import run_baseline
        from genrec_dist.baselines.tune_knn import tune_knn
        from genrec_dist.evaluation.table import format_table

    if overrides and name in ("popularity", "counting", "repeat"):
        raise UsageError(
            f"--set {overrides[0]}: {name} has nothing to set, only knn, sasrec, bsarec and "
            "mixtures have"
        )
    if tune and (overrides or name != "knn"):
        raise UsageError("--tune chooses the settings of knn: leave out --set and other names")
    dataset = load_dataset(data)
    excluded = exclude(exclude_history, exclude_history_default(dataset.sequences))
    if tune:
        found = tune_knn(
            dataset.sequences, exclude_history=excluded, trained_through=trained_through
        )
        overrides = [f"{key}={value}" for key, value in dataclasses.asdict(found.settings).items()]
        say(str(found))
    metrics = run_baseline(
        name, dataset, split, out_dir, trained_through=trained_through, exclude_history=excluded,
        settings=overrides, on_epoch=lambda epoch: say(str(epoch)),
    )  # fmt: skip
    out.print(format_table([metrics]))


def score(
    lists: Annotated[
        Path,
        typer.Argument(
            metavar="LISTS",
            help="Any system's lists in the log's own ids: Parquet, JSON lines or CSV with user, "
            "item and rank (or score), or a list per row in items.",
        ),
    ],
    data: Annotated[Path, typer.Option("--data", help="Directory of `genrec prepare`.")],
    split: Annotated[Split, typer.Option(help="Which items are the targets.")] = "test",
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Directory for metrics and lists, for `compare`; default: show only."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the system; default: LISTS without its ending.")
    ] = None,
    trained_through: Annotated[
        Literal["n-2", "n-1"], typer.Option(help="Last position the system has learned from.")
    ] = "n-2",
    exclude_history: ExcludeOption = "auto",
    seed: Annotated[
        int | None, typer.Option(help="Of its training, for `compare` over seeds.")
    ] = None,
) -> None:
    """The same metrics, intervals and baselines beside them for the lists of any other system.

    Example: genrec score peer.csv --data data/beauty --out runs/beauty-peer
    """
    from contextlib import nullcontext
    from tempfile import TemporaryDirectory

    with working():
        from genrec_shards.dataset import load_dataset

        from genrec_dist.baselines.run import score_lists
        from genrec_dist.evaluation.table import format_table

    dataset = load_dataset(data)
    excluded = None if exclude_history == "auto" else exclude_history == "yes"
    with TemporaryDirectory() if out_dir is None else nullcontext(out_dir) as folder:
        metrics, given = score_lists(
            lists, dataset, split, folder, system=name, trained_through=trained_through,
            exclude_history=excluded, seed=seed,
        )  # fmt: skip
    for note in given.notes(split):
        say(note, style="yellow")
    out.print(format_table([metrics]))


def compare(
    run_a: Annotated[
        Path,
        typer.Argument(metavar="RUN_A", help="A run or a baseline's output; or a folder of seeds."),
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="What it is compared with.")],
    split: Annotated[Split, typer.Option(help="Whose lists.")] = "test",
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.", min=100)] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write it all to this file.")
    ] = None,
) -> None:
    """Is one better than the other? Paired bootstrap over users, and over seeds where there are
    several.

    Example: genrec compare runs/beauty runs/beauty-knn
    """
    from genrec_shards.atomic import write_json

    from genrec_dist.evaluation.compare import compare as run_compare
    from genrec_dist.evaluation.compare import conclusion, render

    found = run_compare(run_a, run_b, split=split, resamples=resamples, seed=seed)
    if json_path is not None:
        write_json(json_path, found.as_dict())
    out.print(render(found))
    say(conclusion(found))


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="A run; with --compare several, or folders of seeds."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Data directory, for histories and titles; default: the one the run names.",
        ),
    ] = None,
    side_by_side: Annotated[
        bool,
        typer.Option(
            "--compare", help="One page of several runs, the others compared with the first."
        ),
    ] = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="With --compare: the page; default: compare.html.")
    ] = None,
    split: Annotated[Split, typer.Option(help="With --compare: whose lists.")] = "test",
) -> None:
    """Write `report.html` of a run, or with --compare one page of several; both open without a
    network.

    Example: genrec report --compare runs/beauty runs/beauty-knn --out beauty.html
    """
    for run in runs:
        if not run.is_dir():
            what = "a file" if run.is_file() else "no such directory"
            raise ValueError(
                f"{run}: {what}: give the directory of a run, as of genrec train or genrec baseline"
            )
    if side_by_side:
        from genrec_dist.report.compare_page import write_comparison

        if data is not None:
            raise UsageError("--compare looks at lists alone: leave out --data")
        if len(runs) < 2:
            raise UsageError("--compare takes two runs or more")
        say(str(write_comparison(runs, out_file or Path("compare.html"), split=split)))
        return
    from genrec_dist.report.run_report import write_report

    if len(runs) > 1:
        raise UsageError(f"{len(runs)} runs: --compare sets them side by side")
    if out_file is not None:
        raise UsageError("--out goes with --compare: the report of a run is RUN/report.html")
    say(str(write_report(runs[0], data)))
