"""Whether the paths of a recipe or a run lead somewhere, told without loading torch."""

from __future__ import annotations

import errno
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from genrec_shards.dataset import load_info
from genrec_shards.readers.documents import read_object
from genrec_shards.storage.address import is_address
from genrec_shards.storage.manifest import load_manifest

from genrec_dist.config.hub import run_folder
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe


def check_paths(recipe: Recipe) -> None:
    """Refuse a recipe whose data, shards or origin are missing, or a tracker's library. Raises
    ValueError naming the path and the way out. Shards at an address are not looked at."""
    load_info(Path(recipe.data) / "dataset.json")
    if not is_address(recipe.shards_dir):
        load_manifest(recipe.shards_dir)
    if recipe.init_from is not None:
        origin_folder(recipe.init_from)
    for name in recipe.tracker:
        if name != "none" and find_spec(name) is None:
            package = name if name == "trackio" else "'genrec-dist[track]'"
            raise ValueError(f"tracker {name}: it is not installed: pip install {package}")


def check_run_is_new(run: Path) -> None:
    """Refuse a run directory that holds a run, and a file in its place. Raises ValueError,
    FileExistsError naming it, and how to continue it."""
    if run.exists() and not run.is_dir():
        raise FileExistsError(errno.EEXIST, "", str(run))
    if (run / "events.jsonl").exists():
        raise ValueError(
            f"{run}: a run is there already: continue it with --resume latest, or set another run "
            "directory"
        )


def origin_folder(path: str) -> Path:
    """The directory of the model that `init_from` names: `best/` of a run, or the path itself; a
    run on the hub is downloaded. Raises ValueError where there is no model in it."""
    run = run_folder(path)
    folder = run / "best" if (run / "best").is_dir() else run
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"init_from {path}: neither a run with best/ in it nor a model's directory: give a run "
            "of `genrec train` that has finished an epoch of finetuning"
        )
    return folder


def best_folder(run: Path) -> Path:
    """`best/` of a run directory, or the directory itself where it is a pushed run's. Raises
    ValueError where there is none, with the run's status."""
    if is_pushed(run):
        return run
    if not (run / "best" / "config.json").is_file():
        status = training_state(run)["status"]
        reason = f"the run's status is {status!r}; it has not finished an epoch of finetuning yet"
        if status is None:
            reason = "is it a directory of `genrec train`?"
        raise ValueError(f"{run}: no best/ in it: {reason}")
    return run / "best"


def is_pushed(run: Path) -> bool:
    """Whether a directory is a copy of what `genrec push` uploads: a model with its recipe beside
    it, and without results."""
    return (run / "config.json").is_file() and (run / "recipe.yaml").is_file()


def check_writable(run: Path) -> None:
    """Refuse to write results into a copy of a pushed run. Raises ValueError naming the way out."""
    if is_pushed(run):
        raise ValueError(
            f"{run}: a copy of a pushed run, which keeps no results: give another directory for "
            "them (--out)"
        )


def recipe_of(run: Path) -> Recipe | None:
    """The recipe of a run directory, where there is one."""
    path = run / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def required_recipe(run: Path) -> Recipe:
    """The recipe of a run directory. Raises ValueError where there is none."""
    recipe = recipe_of(run)
    if recipe is None:
        raise ValueError(f"{run}: no recipe.yaml in it; is it a directory of `genrec train`?")
    return recipe


def data_of(run: Path) -> Path:
    """The data directory that a run was trained on. Raises ValueError where there is no recipe that
    names it, where it is not there, or the run was pushed without it."""
    recipe = required_recipe(run)
    if not recipe.data:
        raise ValueError(
            f"{run}: pushed without its data: give --data DIR, or, to list by the model alone, "
            "--decode exact"
        )
    if not Path(recipe.data).is_dir():
        raise ValueError(
            f"{run}: its data directory {recipe.data} is not here: give --data DIR, or, to list by "
            "the model alone, --decode exact"
        )
    return Path(recipe.data)


def training_state(run: Path) -> dict[str, Any]:
    """`status` of a run's training (running, stopped, failed, finished) and `step` of the weights
    in its `best/`; None for what no file tells."""
    found = {}
    for key, name in (("status", "status.json"), ("step", "best/step.json")):
        try:
            found[key] = read_object(run / name).get(key)
        except (OSError, ValueError):
            found[key] = None
    return found


def check_training_is_over(run: Path) -> None:
    """Refuse a run that may still change. Raises ValueError naming its status and the way out."""
    status = training_state(run)["status"]
    if status not in (None, "finished"):
        raise ValueError(
            f"{run}: the training's status is {status!r}, so that a look at test would come before "
            "its end: go on with `genrec train ... --resume latest` first, give --split "
            "validation, or look all the same with --force"
        )
