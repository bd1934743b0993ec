"""The command line: `genrec COMMAND ...`, each command a thin wrapper of a function."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from genrec_dist.cli.bench import bench
from genrec_dist.cli.data import export, prepare, shard
from genrec_dist.cli.inference import evaluate, recommend
from genrec_dist.cli.options import RecipeArgument
from genrec_dist.cli.recipes import backbone, complete_space, launch_file, recipes
from genrec_dist.cli.reproduce import reproduce
from genrec_dist.cli.scores import baseline, compare, report, score
from genrec_dist.cli.serve import push, serve
from genrec_dist.console import UsageError, exit_code_of, out, rank, say, shown, working, world_size
from genrec_dist.distributed.gpu import set_gpu_defaults
from genrec_dist.distributed.threads import set_thread_defaults

app = typer.Typer(
    name="genrec",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Modules are imported inside the commands: `genrec --help` must not wait for torch.


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"genrec-dist {version('genrec-dist')}")
        raise typer.Exit


@app.callback()
def genrec(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train GenRec, a generative sequential recommender: exact, honest, fast."""


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the demo run.")] = Path(
        "runs/demo"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value of the demo recipe.")
    ] = None,
) -> None:
    """The whole path on a synthetic catalogue whose ceiling is known.

    Example: genrec demo --out runs/demo
    """
    with working():
        from genrec_dist.cli.demo import run_demo

    run_demo(out_dir, overrides or [], out)


def train(
    recipe: RecipeArgument,
    data: Annotated[
        str | None, typer.Option("--data", help="Data directory: short for --set data=DIR.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Run directory: short for --set run=DIR.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value, repeatable.")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Begin with this run's weights, also hf://owner/name: --set init_from=RUN "
            "(docs/refresh.md).",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="latest, a checkpoint directory, or auto: the latest where the run has begun."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    profile: Annotated[
        int,
        typer.Option(
            help="Record so many steps into RUN/trace-rank-R.json.gz, for ui.perfetto.dev.", min=0
        ),
    ] = 0,
) -> None:
    """Pretrain and finetune by a recipe; under accelerate launch or torchrun on several processes.

    Example: genrec train auto --data data/mine --run runs/mine
    """
    from genrec_dist.config.load import load_recipe

    # What can be wrong with names, keys and paths is found before torch is loaded.
    resolved = load_recipe(recipe, [*(overrides or []), *_paths(overrides, data=data, run=run)])
    if init_from is not None:
        resolved = dataclasses.replace(resolved, init_from=init_from)
    from genrec_shards.file_lock import LOCK_FILE

    from genrec_dist.config.paths import check_paths, check_run_is_new

    check_paths(resolved)
    if resume == "auto":  # a launcher that starts the ranks again gives them the same command
        resume = "latest" if (Path(resolved.run) / "events.jsonl").is_file() else None
    # A run that another process trains is not to be continued: its lock tells who that is.
    if resume is None and not dry_run and not (Path(resolved.run) / LOCK_FILE).exists():
        check_run_is_new(Path(resolved.run))
    with working():
        from genrec_dist.data.fit_recipe import as_text, resolve_recipe
        from genrec_dist.report.advice import advice
        from genrec_dist.report.run_files import read_run_files
        from genrec_dist.report.run_report import write_report
        from genrec_dist.training.run import train as run_train
        from genrec_dist.training.setup import describe

    resolved, fitted = resolve_recipe(resolved, Path(resolved.run) if resume else None)
    if fitted and rank() == 0:
        say(as_text(fitted))
    if dry_run:
        out.print_json(data=describe(resolved))
        return
    path = run_train(resolved, resume, trace_steps=profile)
    if rank() == 0:
        write_report(path)
        for line in advice(read_run_files(path)):
            say(line)
        say(f"{path}: finished; next: genrec evaluate {path} --split test")


def _paths(overrides: list[str] | None, **paths: str | None) -> list[str]:
    """`--data DIR` and `--run DIR` as `--set` has them.

    Raises a usage error where both are given.
    """
    for key in paths:
        if paths[key] is not None and any(each.startswith(f"{key}=") for each in overrides or []):
            raise UsageError(f"--{key} and --set {key}=... are the same: give one")
    # JSON is YAML: a directory named 2026 stays a text.
    return [f"{key}={json.dumps(path)}" for key, path in paths.items() if path is not None]


def plan(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="dotted.key=value, repeatable.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs the run is spread over.", min=1)] = 1,
    memory: Annotated[
        float | None, typer.Option(help="GiB of one GPU; default: those of --card, or 24.")
    ] = None,
    users: Annotated[
        int | None, typer.Option(help="Users, in place of the recipe's data; with --items.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="Items, in place of the recipe's data; with --users.")
    ] = None,
    launch: Annotated[
        Path, typer.Option(help="Directory of zero0.json ...: their buckets count.")
    ] = Path("launch"),
    card: Annotated[
        str | None,
        typer.Option(help="Gives time and memory: 'RTX 3090' and the like; CPU: measured now."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s a GPU really reaches, for the time.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write it all to this file.")
    ] = None,
) -> None:
    """Bytes a GPU under DDP and ZeRO 0 to 3, the largest micro-batch that fits, the time, and what
    to take.

    Example: genrec plan paper-base --gpus 1 --memory 24 --users 22363 --items 12101
    """
    from genrec_dist.config.load import load_recipe

    resolved = load_recipe(recipe, overrides)
    with working():
        from genrec_dist.estimate.forecast import forecast
        from genrec_dist.estimate.forecast_table import render, write_json

    found = forecast(
        resolved, gpus=gpus, memory_gib=memory, users=users, items=items,
        zero_files=launch if launch.is_dir() else None, card=card, tflops=tflops,
    )  # fmt: skip
    if json_ is not None:
        write_json(found, json_)
    out.print(render(found, out.width))


def tune(
    space: Annotated[
        str | None,
        typer.Argument(
            metavar="SPACE",
            help="A space file, or a shipped one's name; --finish needs none.",
            autocompletion=complete_space,
        ),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the sweep.")] = Path(
        "runs/sweep"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep that is there.")
    ] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="The finals of a sweep, and its only look at test.")
    ] = False,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="With --finish: the base recipe too.")
    ] = False,
    budget_hours: Annotated[
        float | None, typer.Option(help="End in good order after so many hours.", min=0)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster; default: one on this machine.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="An address that fsspec knows; the sweep lies there.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="In place of the space file's.", min=1)] = None,
) -> None:
    """Search a space of recipes by validation; with --finish rerun its best three with three seeds
    and look at test once.

    Example: genrec tune beauty --out runs/beauty-sweep
    """
    with working("loading Ray"):
        from genrec_tuning.finals import finals_summary, finish_sweep
        from genrec_tuning.space import load_space
        from genrec_tuning.sweep import run_sweep, sweep_summary

    if finish:
        ended = finish_sweep(
            out_dir,
            against_base=against_base,
            budget_hours=budget_hours,
            address=address,
            storage=storage,
        )
        say(finals_summary(ended))
        return
    if space is None or against_base:
        raise UsageError(
            "give a space file" if space is None else "--against-base belongs to --finish"
        )
    found = load_space(space, trials)
    sweep = run_sweep(
        found, out_dir, resume=resume, budget_hours=budget_hours, address=address, storage=storage
    )
    say("\n".join(map(shown, sweep_summary(sweep, str(out_dir)).splitlines())))


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What is installed, what works, what is missing and how to get it.

    Example: genrec doctor
    """
    from genrec_dist.cli import doctor as examination

    findings = examination.examine()
    if as_json:
        typer.echo(examination.as_json(findings))
    else:
        out.print(examination.render(findings))
    if not examination.healthy(findings):
        raise typer.Exit(1)


# In the order of the help.
for command in (
    demo, prepare, shard, export, recipes, train, evaluate, recommend, serve, push, baseline, score,
    compare, report, plan, tune, doctor, reproduce, launch_file, backbone,
):  # fmt: skip
    app.command()(command)
app.add_typer(
    bench,
    name="bench",
    short_help="Measure a claim beside a named peer, the two in turn.",
    help="Measure a claim beside a named peer, the two in turn.\n\n"
    "Example: genrec bench stream --json stream.json",
)


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code (`console.exit_code_of`)."""
    return exit_code_of(
        lambda: app(arguments or ["--help"], prog_name="genrec", standalone_mode=False), arguments
    )


def main() -> None:
    set_thread_defaults()
    set_gpu_defaults()
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # the tokenizer runs once, before workers fork
    code = run_command(sys.argv[1:])
    if code and (world_size() > 1 or sys.argv[1:2] == ["train"]):
        # A process group that waits for its peers would keep this rank, and with it the others,
        # from ending. And who has stopped a training would wait for torch to be taken apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
