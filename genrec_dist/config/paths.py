"""Whether the paths of a recipe or a run lead somewhere, told without loading torch."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from genrec_shards.dataset import load_info
from genrec_shards.readers.documents import read_object
from genrec_shards.storage.address import is_address
from genrec_shards.storage.manifest import load_manifest

from genrec_dist.config.recipe import Recipe


def check_paths(recipe: Recipe) -> None:
    """Refuse a recipe whose data, shards or origin are missing.

    Raises:
        ValueError: naming the path and the way out. Shards at an address are not looked at.
    """
    load_info(Path(recipe.data) / "dataset.json")
    if not is_address(recipe.shards_dir):
        load_manifest(recipe.shards_dir)
    if recipe.init_from is not None:
        origin_folder(recipe.init_from)


def check_run_is_new(run: Path) -> None:
    """Refuse a run directory that holds a run, and a file in its place.

    Raises:
        ValueError, FileExistsError: naming it, and how to continue it.
    """
    if run.exists() and not run.is_dir():
        raise FileExistsError(errno.EEXIST, "", str(run))
    if (run / "events.jsonl").exists():
        raise ValueError(
            f"{run}: a run is there already: continue it with --resume latest, or set another run "
            "directory"
        )


def origin_folder(path: str) -> Path:
    """The directory of the model that `init_from` names: `best/` of a run, or the path itself.

    Raises:
        ValueError: there is no model in it.
    """
    run = Path(path)
    folder = run / "best" if (run / "best").is_dir() else run
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"init_from {path}: neither a run with best/ in it nor a model's directory: give a run "
            "of `genrec train` that has finished an epoch of finetuning"
        )
    return folder


def best_folder(run: Path) -> Path:
    """`best/` of a run directory.

    Raises:
        ValueError: there is none, with the run's status.
    """
    if not (run / "best" / "config.json").is_file():
        status = training_state(run)["status"]
        reason = f"the run's status is {status!r}; it has not finished an epoch of finetuning yet"
        if status is None:
            reason = "is it a directory of `genrec train`?"
        raise ValueError(f"{run}: no best/ in it: {reason}")
    return run / "best"


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
    """Refuse a run that may still change.

    Raises:
        ValueError: Naming its status and the way out.
    """
    status = training_state(run)["status"]
    if status not in (None, "finished"):
        raise ValueError(
            f"{run}: the training's status is {status!r}, so that a look at test would come before "
            "its end: go on with `genrec train ... --resume latest` first, give --split "
            "validation, or look all the same with --force"
        )
