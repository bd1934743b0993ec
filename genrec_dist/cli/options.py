"""What the commands share: options of one meaning, the way to say a line, and who this process is
among several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from genrec_dist.cli.recipes import complete_recipe

Split = Literal["validation", "test"]
YesNo = Literal["auto", "yes", "no"]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="auto, which fits a log of your own; another shipped recipe (genrec recipes); or "
        "a YAML file.",
        autocompletion=complete_recipe,
    ),
]


def _local_run(context: typer.Context, run: Path) -> Path:
    """The directory of RUN; one on the hub is downloaded."""
    from genrec_dist.config.hub import run_folder

    return run if context.resilient_parsing else run_folder(run)


RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run directory of `genrec train`, hf://owner/name or hf://owner/name@revision "
        "(docs/share.md).",
        callback=_local_run,
    ),
]
DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="Directory of `genrec prepare`.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Data directory; default: the one the run was trained on."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
EngineOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="ray: on a cluster, to the same bytes: docs/data.md."),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="HOST:PORT of a running Ray cluster; default: this machine's cores."
    ),
]
ExcludeOption = Annotated[
    YesNo,
    typer.Option(
        "--exclude-history", help="Leave out items of the history; auto: where no target repeats."
    ),
]


DecodeOption = Annotated[
    Literal["exact", "compact", "free", "all", "items", "hybrid"] | None,
    typer.Option(
        "--decode",
        help="exact: the model's softmax; compact: over the items' tokens alone; free: no trie; "
        "all: every item scored; items: by the item head (model.item_loss); hybrid: by the decoder "
        "with the item head, the transition graph, the items' texts and the repeat model; default: "
        "as the run's recipe says (decode).",
    ),
]
BeamOption = Annotated[
    int, typer.Option(help="Width of the beam; one narrower than the lists is widened.", min=1)
]
AllowOption = Annotated[
    Path | None, typer.Option(help="File of item ids, one a line: list these alone.")
]
BlockOption = Annotated[
    Path | None, typer.Option(help="File of item ids, one a line: never list these.")
]


def exclude(choice: YesNo, default: bool) -> bool:
    return default if choice == "auto" else choice == "yes"
