"""`genrec reproduce` of a tiny set: its files, its commands, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny import TINY_RECIPE, tiny_log
from titled_data import RECIPE as TITLED_RECIPE
from titled_data import titled_data
from two_ranks import environment

from genrec_dist.cli.app import run_command

SETTINGS = "--sasrec d_model=8 --sasrec epochs=2 --sasrec validation_users=50 --knn window=4"
SETTINGS += (
    " --set auto:finetune.epochs=1 --set auto:model.d_model=8 --set auto:validation.users=50"
)
RULES = ["popularity", "counting", "repeat", "knn"]
SEEDED = ["sasrec", "sasrec+knn", "best", "hybrid", "auto-decoder", "auto", "items"]
LEAK_FREE = [*RULES, *SEEDED]
OWN = ["own", "own-without-pretraining", "own-without-pretraining-equal-compute"]
PAPER = ["counting", *OWN]


def write_folder(place: Path) -> Path:
    """The file, a recipe with an item head and no pretraining, and one that pretrains."""
    forked.load(environment())  # of which the trainings are forked, too
    # Whole numbers, which the counting rule needs under `given`.
    (place / "log.txt").write_text(tiny_log().replace(" B", " "), encoding="utf-8")
    where = "data: data\nrun: run\ncheckpoint_every: 1\n"
    (place / "own.yaml").write_text(where + TINY_RECIPE, encoding="utf-8")
    head = TINY_RECIPE.replace("init_std", "item_loss: 1.0, init_std")
    head = head.replace("pretrain: {epochs: 1", "pretrain: {epochs: 0")
    assert head.count("item_loss") == head.count("epochs: 0") == 1
    (place / "head.yaml").write_text(where + head, encoding="utf-8")
    return place


def command(folder: Path, out: Path, *more: object) -> list[str]:
    words = ["--data", folder / "log.txt", "--out", out, "--recipe", folder / "head.yaml"]
    words += ["--paper-recipe", folder / "own.yaml", "--any-size", *more]
    return ["reproduce", "beauty", *map(str, words)]


def leak_free(folder: Path, out: Path, rows: list[str] = LEAK_FREE, *more: object) -> list[str]:
    words = ["--protocol", "leak-free", "--seeds", 2, "--systems", ",".join(rows)]
    return command(folder, out, *words, *SETTINGS.split(), *more)


def paper(folder: Path, out: Path, rows: list[str] = PAPER, *more: object) -> list[str]:
    words = ["--protocol", "paper", "--seeds", 1, "--systems", ",".join(rows)]
    return command(folder, out, *words, *more)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int = 1) -> str:
    """The one line on standard error."""
    capfd.readouterr()
    assert run_command(arguments) == code
    line = capfd.readouterr().err
    assert line.startswith("genrec: ")
    assert line.count("\n") == 1
    return line


def write_titled(place: Path) -> Path:
    """A folder with log.txt, items.csv and, as `backbone`, a small language model."""
    data, recipe = titled_data(place), place / "recipe.yaml"
    recipe.write_text(TITLED_RECIPE.format(data=data, run=place / "run"), encoding="utf-8")
    words = ["-m", "genrec_dist.cli", "train", recipe, "--set", "finetune.epochs=1"]
    assert forked.run(words, environment(), timeout=120).returncode == 0
    return (place / "run" / "best").rename(place / "backbone").parent
