"""What the attacks work on: logs of every format, data, shards, runs, and what comes of them
undisturbed."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

import forked
import yaml
from attacks import Box, NotHeld, content
from logs import WRITERS, messy_rows, parquet_of
from tiny import TINY_RECIPE, tiny_log
from two_ranks import environment

from genrec_dist.config.recipe import MOVES_NO_GRADIENT, Recipe

RECIPES = ("dense", "outside")
"""Both with a running average; of the second the id tables are outside the model."""
REQUESTS = "requests.jsonl"


def make_world(folder: Path) -> Path:
    """Make all that the attacks copy, by the real commands, and return its folder."""
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "log.txt").write_text(tiny_log(), encoding="utf-8")
    genrec("prepare", folder / "log.txt", "--out", folder / "data")
    genrec("shard", folder / "data")
    for name in RECIPES:
        values = yaml.safe_load(TINY_RECIPE)
        values |= {"data": str(folder / "data"), "run": str(folder / name), "checkpoint_every": 2}
        values["finetune"]["epochs"] = 2
        tables = "row-adagrad" if name == "outside" else "dense"
        values["optimizer"] = {"ema_decay": 0.8, "id_tables": tables}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        genrec("train", folder / f"{name}.yaml")
    genrec("evaluate", folder / "dense")
    genrec("baseline", "knn", folder / "data", "--out", folder / "knn")
    words = tiny_log().split("\n")[3].split()
    lines = [{"history": words[1:4]}, {"history": words[2:6], "block": words[1:2]}]
    (folder / REQUESTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = messy_rows(seed=5, num_rows=300)
    for name, write in WRITERS.items():
        (folder / "logs" / name).mkdir(parents=True)
        write(rows, folder / "logs" / name)
    for name in ("sequences", "parquet"):
        (folder / "logs" / name).mkdir()
    (folder / "logs" / "sequences" / "log.txt").write_text(tiny_log(), encoding="utf-8")
    parquet_of(rows, folder / "logs" / "parquet" / "log.parquet")
    return folder


def genrec(*arguments: object) -> None:
    """Run a command that succeeds."""
    done = forked.run(["-m", "genrec_dist.cli", *map(str, arguments)], environment(), 300)
    if done.returncode:
        raise RuntimeError(f"genrec {arguments}: {done.stderr}")


def bits(run: Path) -> dict[str, object]:
    """Weights, moments, average and progress of a run's last checkpoint, and its `best/`."""
    states = (run / "checkpoints").glob("step-*/state.json")
    last = max((state.parent for state in states), default=None)
    if last is None:
        raise NotHeld(f"{run.name} has no checkpoint at its end")
    found = content(run / "best") | {f"{last.name}/{k}": v for k, v in content(last).items()}
    state = json.loads((last / "state.json").read_text())
    found[f"{last.name}/state.json"] = {key: state[key] for key in ("progress", "optimizer_step")}
    return found


@cache
def undisturbed(world: Path, name: str) -> dict[str, object]:
    """`bits` of a recipe's run that nothing has disturbed."""
    return bits(world / name)


_results: dict[tuple[Path, str], dict[str, object]] = {}


def result(world: Path, *arguments: str) -> dict[str, object]:
    """`Box.outcome` of a command where nothing disturbs it."""
    key = (world, " ".join(arguments))
    if key not in _results:
        with tempfile.TemporaryDirectory(dir=world.parent) as folder:
            box = Box(world, Path(folder), random.Random(0))
            ended = box.run(*arguments)
            if ended.code:
                raise RuntimeError(f"{arguments}: {ended.err}")
            _results[key] = box.outcome(ended)
    return _results[key]


def recipe_keys() -> list[str]:
    """Dotted keys of the tiny recipe that change its result."""
    found = []
    for key, value in asdict(Recipe(data="data", run="run")).items():
        inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        found += [name for name in inner if key not in (*MOVES_NO_GRADIENT, "auto_keys")]
    return sorted(found)
