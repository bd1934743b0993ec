"""The commands `genrec serve` and `genrec push`: a run for others."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genrec_dist.cli.inference import load_recommender
from genrec_dist.cli.options import (
    AllowOption,
    BeamOption,
    BlockOption,
    DataOption,
    DecodeOption,
    ExcludeOption,
    RunArgument,
)
from genrec_dist.console import UsageError, say, working
from genrec_dist.serving.listen import listen

if TYPE_CHECKING:
    from genrec_dist.inference.recommend import Recommender

TOKEN = "GENREC_TOKEN"

# Modules are imported inside the command: `genrec --help` must not wait for torch.


def serve(
    run: RunArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; beyond this machine with GENREC_TOKEN alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0: a free one, which is printed.", min=0, max=65535)
    ] = 8000,
    beam: BeamOption = 20,
    decode: DecodeOption = None,
    exclude_history: ExcludeOption = "auto",
    allow: AllowOption = None,
    block: BlockOption = None,
    data: DataOption = None,
    max_k: Annotated[int, typer.Option(help="Longest list that may be wanted.", min=1)] = 100,
    max_body: Annotated[int, typer.Option(help="Largest request in KiB.", min=1)] = 1024,
    max_wait: Annotated[
        float,
        typer.Option(
            help="Seconds in which a request's head, then its body has to arrive.", min=0.1
        ),
    ] = 10,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait at once; more get a 503.", min=1)
    ] = 128,
    threads: Annotated[
        int, typer.Option(help="Of torch for each batch, on a CPU; 1 is fastest.", min=1)
    ] = 1,
) -> None:
    """Answer requests for lists at an HTTP address, in your own item ids: docs/serving.md.

    SIGTERM stops it once what it has taken is answered; SIGHUP loads the run's newest weights.
    GENREC_TOKEN in the environment is the bearer token that requests then need, and with which POST
    /reload does the same.

    Example: genrec serve runs/beauty --port 8000
    """
    from genrec_dist.config.paths import best_folder

    token = os.environ.get(TOKEN)
    if token is not None and not token.strip():
        raise UsageError(f"{TOKEN} is empty: give a token, or unset it")
    if token is None and not _is_loopback(host):
        raise UsageError(
            f"--host {host} is open to other machines: set {TOKEN}, or serve at 127.0.0.1"
        )
    best_folder(run)  # before torch is loaded
    listener = listen(host, port)
    with working():
        import torch

        from genrec_dist.inference.load import best_device
        from genrec_dist.serving.service import Service

        try:
            from genrec_dist.serving.app import Limits, make_app, run_server
        except ModuleNotFoundError as error:
            raise ValueError(
                f"serve: {error.name} is not installed: pip install 'genrec-dist[serve]'"
            ) from None

    device = best_device()
    if device.type == "cpu":
        torch.set_num_threads(threads)

    def load(path: Path) -> Recommender:
        options = {"beam": beam, "mode": decode, "data": data}
        return load_recommender(path, device, exclude_history, allow, block, **options)

    shown = f"[{host}]" if ":" in host else host
    at = f"http://{shown}:{listener.getsockname()[1]}"
    service = Service(run, load, queue)
    limits = Limits(max_k, max_body * 1024, max_wait)
    run_server(make_app(service, token=token, limits=limits, at=at), listener, limits)
    say(f"{service.model.run}: stopped")


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `genrec train`.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="owner/name, or owner/name@branch.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="Of the weights, as the hub names it, e.g. apache-2.0."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="What the data is, for the card.")] = None,
    dataset_license: Annotated[
        str | None, typer.Option(help="The licence of the data, for the card.")
    ] = None,
) -> None:
    """Upload a run to the Hugging Face Hub: weights, catalogue, recipe and a model card with its
    results, no data, user or path (docs/share.md).

    HF_TOKEN in the environment is the token; HF_ENDPOINT another server. An interrupted push, run
    again, sends what is missing.

    Example: genrec push runs/beauty --to me/beauty --dataset "Amazon Beauty" --license mit
    """
    from genrec_dist.config.hub import parse_hub_name
    from genrec_dist.config.paths import best_folder, recipe_of

    try:
        name = parse_hub_name(to)
    except ValueError as error:
        raise UsageError(f"--to {error}") from None
    best_folder(run)  # before torch is loaded
    with working():
        from genrec_dist.sharing.card import About
        from genrec_dist.sharing.push import push as run_push

    address = run_push(run, name, About(license_, dataset, dataset_license), private=private)
    recipe = recipe_of(run)
    # The graph of hybrid is made of the data, which do not go up.
    mode = " --decode exact" if recipe is not None and recipe.decode == "hybrid" else ""
    say(
        f"{run}: pushed: {address}; anyone who may read it: "
        f"genrec recommend {name} --history ...{mode}"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
