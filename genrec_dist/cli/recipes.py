"""The commands `genrec recipes` and `genrec launch-file`: the files that come with the package."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from genrec_dist.console import UsageError, out, say, working


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes for the shell's completion; none where a path is begun, which the shell
    completes itself."""
    from genrec_dist.config.load import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_launch_file(incomplete: str) -> list[str]:
    """Launch files for the shell's completion."""
    from genrec_dist.config.shipped import shipped_files

    return [name for name in shipped_files(_launch_files()) if name.startswith(incomplete)]


def complete_space(incomplete: str) -> list[str]:
    """Shipped spaces for the shell's completion."""
    from genrec_dist.config.shipped import shipped_files, shipped_folder

    files = shipped_files(shipped_folder("genrec_tuning", "spaces"))
    return [name for name in (Path(file).stem for file in files) if name.startswith(incomplete)]


def recipes(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[show] RECIPE]",
            help="A shipped recipe's name, or a YAML file; default: list the shipped ones.",
            autocompletion=complete_recipe,
        ),
    ] = None,
) -> None:
    """List the shipped recipes; of one print every key with its meaning, as YAML to begin a recipe
    of your own with.

    Example: genrec recipes show best > mine.yaml
    """
    from genrec_dist.config.load import find_recipe, read_recipe, recipe_from, shipped_recipes
    from genrec_dist.config.meanings import annotated
    from genrec_dist.config.shipped import first_comment

    if not words:
        out.print(_listed((each, first_comment(find_recipe(each))) for each in shipped_recipes()))
        return
    if len(words) > 1 + (words[0] == "show"):
        raise UsageError(
            f"recipes {' '.join(words)}: give one recipe, as `genrec recipes show best`"
        )
    name = words[-1]
    values, path = read_recipe(name)
    # A file may leave to `genrec train` what is different for each run.
    values = {"data": "data/mine", "run": f"runs/{path.stem}", **values}
    typer.echo(annotated(recipe_from(values, source=str(path)), first_comment(path)), nl=False)


def launch_file(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="Its name, as gpu_node_8_zero2; default: list them.",
            autocompletion=complete_launch_file,
        ),
    ] = None,
) -> None:
    """Print a launch file: of accelerate, DeepSpeed, Slurm or Ray; without a name list them.

    Example: genrec launch-file gpu_node_8_zero2 > launch/gpu_node_8_zero2.yaml
    """
    from genrec_dist.config.shipped import find_shipped, first_comment, shipped_files

    folder = _launch_files()
    if name is None:
        out.print(_listed((each, first_comment(p)) for each, p in shipped_files(folder).items()))
    else:
        path = find_shipped(folder, name, "launch file")
        text = path.read_text(encoding="utf-8")
        typer.echo(text, nl=False)
        for other in _named_files(text, set(shipped_files(folder)) - {path.name}):
            command = f"genrec launch-file {other} > launch/{other}"
            typer.echo(f"{path.name} names launch/{other}: {command}", err=True)


def _named_files(text: str, names: set[str]) -> list[str]:
    """The launch files that a launch file names outside of its comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    words = "\n".join(lines).replace('"', " ").replace("}", " ").split()
    return sorted(name for name in names if any(word.endswith(f"launch/{name}") for word in words))


def _launch_files() -> Path:
    from genrec_dist.config.shipped import shipped_folder

    return shipped_folder("genrec_dist", "launch")


def _listed(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, text in rows:
        table.add_row(name, Text(_first_sentence(text)))
    return table


def _first_sentence(text: str) -> str:
    """Up to the first full stop or colon before a space."""
    for number, (sign, after) in enumerate(pairwise(text)):
        if sign in ".:" and after == " ":
            return text[: number + (sign == ".")]
    return text


def backbone(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A .gguf file, or smollm2 (docs/llama.md).")
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="A new directory for model.backbone.")],
) -> None:
    """Write a GGUF file's language model as a directory that a recipe's model.backbone takes.

    Example: genrec backbone smollm2 --out models/smollm2
    """
    with working():
        from genrec_dist.model.causal.gguf import convert_gguf

    parameters = convert_gguf(source, out_dir)
    say(f"{out_dir}: {parameters:,} parameters; next: set model.backbone to it (recipe llama)")
