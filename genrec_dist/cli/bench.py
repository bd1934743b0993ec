"""The commands of `genrec bench`: each measures a claim beside a named peer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genrec_dist.cli.options import DataOption as RunDataOption
from genrec_dist.cli.options import RunArgument
from genrec_dist.config.paths import data_of

if TYPE_CHECKING:
    from genrec_dist.bench.measure import Measured

bench = typer.Typer(no_args_is_help=True)
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the table, with hardware and versions.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Directory of `genrec prepare`; default: synthetic, Beauty's size."
    ),
]


@bench.command("rows")
def bench_rows(json_path: JsonOption = None) -> None:
    """Id tables of 10^5 to 10^7 rows, beside SparseAdam and dense AdamW, on one thread; bytes on
    the wire of two ranks.

    Example: genrec bench rows --json rows.json
    """
    _announce()
    from genrec_dist.bench.rows import bench_rows as run_bench

    _show(run_bench(), json_path)


@bench.command("stream")
def bench_stream(data: DataOption = None, json_path: JsonOption = None) -> None:
    """Decode speed and bytes beside one JSON per sample; a late resume; waiting in a tiny run;
    bytes over a network.

    Example: genrec bench stream --data data/beauty --json stream.json
    """
    _announce()
    from genrec_dist.bench.stream import bench_stream as run_bench

    _show(run_bench(data), json_path)


@bench.command("beam")
def bench_beam(
    data: DataOption = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="A run trained on --data: also evaluating it beside an epoch."),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Decoding beside Hugging Face's `generate`, lists compared, at two model shapes; the trie of
    10^6 items.

    Example: genrec bench beam --data data/beauty --run runs/tiny --json beam.json
    """
    _announce()
    from genrec_dist.bench.beam import bench_beam as run_bench
    from genrec_dist.bench.beam import format_curves

    _show(run_bench(data, run), json_path, format_curves)


@bench.command("titles")
def bench_titles(
    data: DataOption = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="A run with a prompt; default: random weights, recipe llama."),
    ] = None,
    users: Annotated[int, typer.Option(help="How many are decoded.", min=1)] = 200,
    rounds: Annotated[int, typer.Option(help="How often each is timed.", min=1)] = 5,
    clock: Annotated[
        Literal["wall", "processor"],
        typer.Option(help="Seconds that pass, or the processor's where other work shares it."),
    ] = "wall",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="dotted.key=value of the recipe llama, such as model.backbone=DIR."
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Decoding titles beside Hugging Face's `generate` under a constraint, lists compared.

    Example: genrec bench titles --json titles.json
    """
    _announce()
    from genrec_dist.bench.titles import Sizes
    from genrec_dist.bench.titles import bench_titles as run_bench

    sizes = Sizes(users=users, repeats=rounds, clock=clock)
    _show(run_bench(data, run, sizes, overrides or []), json_path)


@bench.command("latency")
def bench_latency(
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Run directory; default: random weights in the shape of tiny."),
    ] = None,
    data: DataOption = None,
    json_path: JsonOption = None,
) -> None:
    """p50, p95 and p99 of one caller and of 8 at once, one history per call, beside a lock around
    each call.

    Example: genrec bench latency --run runs/beauty --data data/beauty --json latency.json
    """
    _announce()
    from genrec_dist.bench.latency import bench_latency as run_bench
    from genrec_dist.bench.latency import format_latencies

    _show(run_bench(run, data), json_path, format_latencies)


@bench.command("serve")
def bench_serve(run: RunArgument, data: RunDataOption = None, json_path: JsonOption = None) -> None:
    """p50, p95, p99 and requests per second of `genrec serve` at 1, 8 and 64 callers, beside
    Hugging Face's `generate` behind the same server, and beside the same calls in process.

    Example: genrec bench serve runs/beauty --json serve.json
    """
    _announce()
    from genrec_dist.bench.latency import bench_serve as run_bench
    from genrec_dist.bench.latency import format_latencies

    _show(run_bench(run, data or data_of(run)), json_path, format_latencies)


@bench.command("kernels")
def bench_kernels(data: DataOption = None, json_path: JsonOption = None) -> None:
    """The embedding sum and its gradients beside eager torch, torch.compile and atomics; on a CPU
    its plain-torch twin.

    Example: genrec bench kernels --data data/beauty --json kernels.json
    """
    _announce()
    from genrec_dist.bench.kernels import bench_kernels as run_bench
    from genrec_dist.bench.kernels import format_shares

    _show(run_bench(data), json_path, format_shares)


@bench.command("train")
def bench_train(data: DataOption = None, json_path: JsonOption = None) -> None:
    """Training steps beside Hugging Face's Trainer, default and tuned, and the published collate; a
    quarter of an hour.

    Example: genrec bench train --data data/beauty --json train.json
    """
    _announce()
    from genrec_dist.bench.train import bench_train as run_bench
    from genrec_dist.bench.train import format_rivals

    _show(run_bench(data), json_path, format_rivals)


@bench.command("plan")
def bench_plan(data: DataOption = None, json_path: JsonOption = None) -> None:
    """Steps of three models beside what `genrec plan` foretells of them; some minutes.

    Example: genrec bench plan --data data/beauty --json plan.json
    """
    _announce()
    from genrec_dist.bench.plan import bench_plan as run_bench
    from genrec_dist.bench.plan import format_plan

    _show(run_bench(data), json_path, format_plan)


def _announce() -> None:
    """A sign of life on a terminal; nothing that moves, which would take time from what is
    measured."""
    if sys.stderr.isatty():
        typer.echo("measuring, which takes minutes", err=True)


def _show(
    measured: Measured,
    json_path: Path | None,
    details: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Print the claims, before them what `details` makes of their table, and write the table."""
    from genrec_dist.bench.measure import format_claims, write_table

    claims, table = measured
    if details is not None:
        typer.echo(details(table))
    typer.echo(format_claims(claims))
    if json_path is not None:
        write_table(table, json_path)
