"""The command `genrec reproduce`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec_dist.console import working


def reproduce(
    name: Annotated[
        Literal["beauty", "sports", "toys", "yelp"],
        typer.Argument(metavar="SET", help="beauty, sports, toys or yelp."),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="Its file, `user item item ...` per line, gz or not.")
    ],
    items: Annotated[
        Path | None,
        typer.Option(
            "--items", help="Table of the items' texts: the rows that read them, leak-free."
        ),
    ] = None,
    llama: Annotated[
        str | None,
        typer.Option(
            "--llama",
            help="With --items: directory or hub name of a causal language model, for the rows "
            "llama and llama-untrained.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Directory of it all; default: runs/reproduce-SET, with --items SET-text."
        ),
    ] = None,
    protocol: Annotated[
        Literal["leak-free", "paper", "both"], typer.Option(help="Which tables.")
    ] = "both",
    systems: Annotated[
        str | None, typer.Option(help="Rows to make, as best,knn; default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Of each recipe and of SASRec: 0, 1, ...", min=1)] = 3,
    recipe: Annotated[str, typer.Option(help="The recipe of the row best.")] = "best",
    paper_recipe: Annotated[
        str | None,
        typer.Option(
            help="Of the paper's model; default: paper-base on a GPU, paper-tiny on a CPU."
        ),
    ] = None,
    hybrid: Annotated[
        str | None,
        typer.Option(help="The recipe of the rows hybrid and items; default: that of best."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="dotted.key=value of all recipes, or RECIPE:dotted.key=value of one."
        ),
    ] = None,
    sasrec: Annotated[
        list[str] | None, typer.Option("--sasrec", help="key=value of SASRec, repeatable.")
    ] = None,
    knn: Annotated[
        list[str] | None, typer.Option("--knn", help="key=value of the row knn, repeatable.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Also rows trained through t_n-1, leak-free.")
    ] = False,
    readings: Annotated[
        Literal["n-2", "n-1", "both"],
        typer.Option(
            help="Paper's protocol: is t_n-1 a target of the paper's model's training (n-1)?"
        ),
    ] = "n-2",
    switches: Annotated[
        bool,
        typer.Option(
            "--switches", help="Paper's protocol: the published code's departures, one at a time."
        ),
    ] = False,
    any_size: Annotated[
        bool,
        typer.Option(
            "--any-size", help="Go on where FILE has not the users and items of the paper's."
        ),
    ] = False,
    parallel: Annotated[
        int,
        typer.Option(
            help="Steps side by side, each a process: small runs that share a card.", min=1
        ),
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop in good order after so many; the same command goes on.", min=0),
    ] = None,
    publish: Annotated[
        Path | None, typer.Option(help="Also merge the rows into this file.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="The steps and what is there of them; nothing is done."),
    ] = False,
) -> None:
    """From a file to the tables of both protocols, leak-free and the paper's; interrupted, the same
    command goes on.

    Example: genrec reproduce beauty --data Beauty.txt.gz --seeds 3
    """
    from rich.console import Console

    with working():
        from genrec_dist.reproduce import runner
        from genrec_dist.reproduce.systems import Options, without_directory

    words: list[object] = [name, "--data", data, "--protocol", protocol]
    words += ["--seeds", seeds, "--readings", readings, "--recipe", recipe]
    given: list[tuple[str, list[str]]] = [
        ("--items", [str(items)] if items else []),
        ("--llama", [llama] if llama else []),
        ("--paper-recipe", [paper_recipe] if paper_recipe else []),
        ("--hybrid", [hybrid] if hybrid else []),
        ("--systems", [systems] if systems else []),
        ("--set", overrides or []),
        ("--sasrec", sasrec or []),
        ("--knn", knn or []),
    ]
    words += [word for flag, values in given for value in values for word in (flag, value)]
    on_or_off = (("--refit", refit), ("--switches", switches), ("--any-size", any_size))
    words += [flag for flag, on in on_or_off if on]
    rows = None
    if systems is not None:
        rows = [part.strip() for part in systems.split(",") if part.strip()]
    options = Options(
        name=name,
        data=data,
        items=items,
        llama=llama,
        out=out_dir or Path("runs") / f"reproduce-{name}{'-text' if items else ''}",
        command=shlex.join(["genrec", "reproduce", *map(without_directory, words)]),
        protocols=_protocols(protocol, items),
        systems=rows,
        seeds=seeds,
        recipe=recipe,
        paper_recipe=paper_recipe or "",
        hybrid_recipe=hybrid,
        overrides=tuple(overrides or ()),
        sasrec=tuple(sasrec or ()),
        knn=tuple(knn or ()),
        refit=refit,
        readings=("n-2", "n-1") if readings == "both" else (readings,),
        switches=switches,
        any_size=any_size,
        minutes=minutes,
        parallel=parallel,
        publish=publish,
    )
    if llama is not None and items is None:
        raise ValueError("--llama: the titles that it reads are needed: give --items as well")
    console = Console()
    if dry_run:
        work = runner.plan(options)
        for note in work.notes:
            console.print(note, style="yellow", highlight=False, soft_wrap=True, markup=False)
        console.print(runner.render_plan(work))
    else:
        runner.reproduce(options, console)


def _protocols(
    chosen: Literal["leak-free", "paper", "both"], items: Path | None
) -> tuple[Literal["leak-free", "paper"], ...]:
    """The protocols of the tables: the paper's has no texts."""
    if items is not None and chosen == "paper":
        raise ValueError("--items: the paper's protocol has no texts: leave out one of the two")
    if items is not None:
        return ("leak-free",)
    return ("leak-free", "paper") if chosen == "both" else (chosen,)
