"""`state.json` of a checkpoint: how far the run is, what a resume must meet again, and the other
files. It is checked field by field when it is read, and by a sha256 of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast, get_origin, get_type_hints

from genrec_shards.readers.documents import read_object

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.training.setup import FRESH, TrainingSetup, changed_keys

FORMAT_VERSION = 3
WITHOUT_SHA256 = 2
"""The version before, which is read too."""
STATE_FILE = "state.json"
_FILE_NAME = re.compile(r"(rank|ids-user|ids-item)-\d{5}-of-\d{5}\.safetensors")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass
class Progress:
    """How far a run is. With weights, optimiser and average it is all that a resume needs: sample
    order, masks and dropout are functions of the step."""

    step: int = 0
    """Next global step."""
    best_step: int = -1
    best_ndcg: float = -1.0
    validations_without_gain: int = 0
    stage_ended_early: int = -1
    """Number of the stage that early stopping ended; -1 for none."""


class StateFile(TypedDict):
    """Another file of the checkpoint."""

    name: str
    bytes: int
    sha256: str


class PartialIdentity(TypedDict, total=False):
    """Hashes that some runs alone have."""

    titles: str
    """Of a run with a prompt."""
    backbone: str
    """Of the weights that adapters leave as they are."""
    item_text: str
    """Of the texts' vectors that are added to rows."""
    soft_targets: str


class Identity(PartialIdentity):
    """Hashes that a resumed run must have too."""

    sequences: str
    numbering: str
    recipe: str
    vocabulary: str
    origin: str


class CheckpointState(TypedDict):
    """`state.json`."""

    format_version: int
    progress: dict[str, Any]
    identity: dict[str, str]
    optimizer_step: int
    files: list[StateFile]
    sha256: str
    """Of the other fields as JSON with sorted keys and no white space."""


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def write_state(
    folder: Path,
    progress: Progress,
    identity: dict[str, str],
    optimizer_step: int,
    files: list[StateFile],
) -> None:
    """Write `state.json` into a checkpoint's folder."""
    state = CheckpointState(
        format_version=FORMAT_VERSION,
        progress=dataclasses.asdict(progress),
        identity=identity,
        optimizer_step=optimizer_step,
        files=files,
        sha256="",
    )
    state["sha256"] = _sha256_of(state)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def read_state(
    path: Path, identity: dict[str, str], setup: TrainingSetup | None = None
) -> CheckpointState:
    """`state.json` of a checkpoint.

    Args:
        path: the checkpoint's directory.
        identity: what it has to have; other keys are not compared.
        setup: of the run that goes on with it, where there is one.

    Raises:
        ValueError: one line that names the file and the field that is missing, unknown, of another
            type or out of its range; or what of the run differs.
    """
    file = path / STATE_FILE
    state = cast(CheckpointState, read_object(file, remedy="resume from an older checkpoint"))
    if problem := _problem_of(state, path):
        raise _damaged(file, problem)
    found = {"origin": FRESH, **state["identity"]}
    for key, value in identity.items():
        if found.get(key) == value:
            continue
        changes = [] if setup is None or key != "recipe" else _changes(path, setup.recipe)
        if changes:
            raise ValueError(
                f"{path}: trained with another recipe: {'; '.join(changes)}: set them back, or set "
                "another run directory"
            )
        raise ValueError(
            f"{path}: its {key} is not this run's: it was trained on other data or with another "
            "recipe: go on with those, or set another run directory"
        )
    if setup is not None:
        steps, stages = setup.stages[-1].end_step, len(setup.stages)
        step, ended = (state["progress"][key] for key in ("step", "stage_ended_early"))
        if step > steps:
            raise _damaged(file, f"progress.step is {step}, and the run has {steps} steps")
        if ended >= stages:
            raise _damaged(
                file, f"progress.stage_ended_early is {ended}, and the run has {stages} stages"
            )
    return state


def _damaged(file: Path, problem: str) -> ValueError:
    return ValueError(f"{file}: damaged ({problem}); resume from an older checkpoint")


def _problem_of(state: CheckpointState, path: Path) -> str:
    """What is wrong with a `state.json`, whatever the run; "" for nothing."""
    hints = get_type_hints(CheckpointState)
    if "format_version" in state:
        version = state["format_version"]
        if not isinstance(version, int) or version not in (WITHOUT_SHA256, FORMAT_VERSION):
            return (
                f"format_version is {reprlib.repr(version)}, this version reads {WITHOUT_SHA256} "
                f"and {FORMAT_VERSION}"
            )
        if version == WITHOUT_SHA256:
            del hints["sha256"]
    if problem := _problem_of_fields(state, hints):
        return problem
    # Checkpoints of the first versions have no origin.
    identity = {"origin": FRESH, **state["identity"]}
    optional = PartialIdentity.__optional_keys__
    problem = _problem_of_fields(identity, get_type_hints(Identity), "identity.", optional)
    progress_hints = get_type_hints(Progress)
    problem = problem or _problem_of_fields(state["progress"], progress_hints, "progress.")
    for number, entry in enumerate(state["files"]):
        problem = problem or _problem_of_file(entry, f"files[{number}].")
    problem = problem or _problem_of_values(state, step_of(path))
    if not problem and "sha256" in hints and state["sha256"] != _sha256_of(state):
        problem = "sha256 is not that of the other fields: one of them was changed"
    return problem


def _problem_of_fields(
    value: Any, hints: dict[str, Any], name: str = "", optional: Collection[str] = ()
) -> str:
    """Which field of a JSON object is missing, unknown or of another type; "" where all fit."""
    if not isinstance(value, dict):
        return f"{name.rstrip('.') or 'it'} is {reprlib.repr(value)}"
    for key in (*(key for key in hints if key not in optional), *value):
        if key not in value:
            return f"{name}{key} is missing"
        if key not in hints:
            return f"{name}{reprlib.repr(key)[1:-1]} is unknown"
        expected = get_origin(hints[key]) or hints[key]
        accepted = (int, float) if expected is float else expected
        if not isinstance(value[key], accepted) or isinstance(value[key], bool):
            return f"{name}{key} is {reprlib.repr(value[key])}"
    return ""


def _problem_of_file(entry: Any, name: str) -> str:
    problem = _problem_of_fields(entry, get_type_hints(StateFile), name)
    if problem:
        return problem
    fits = {
        "name": _FILE_NAME.fullmatch(entry["name"]),
        "bytes": entry["bytes"] > 0,
        "sha256": _SHA256.fullmatch(entry["sha256"]),
    }
    wrong = next((key for key in fits if not fits[key]), "")
    return wrong and f"{name}{wrong} is {reprlib.repr(entry[wrong])}"


def _problem_of_values(state: CheckpointState, named: int | None) -> str:
    """Which value no run can have; `named`: the step in the directory's name."""
    progress = Progress(**state["progress"])
    step, best = progress.step, progress.best_ndcg
    if step < 0 or named not in (None, step):
        return f"progress.step is {step}" + ("" if named is None else f" in step-{named:08d}")
    fits = {
        "best_step": -1 <= progress.best_step < max(step, 1),
        "best_ndcg": best == -1 or 0 <= best <= 1,
        "validations_without_gain": 0 <= progress.validations_without_gain <= step,
        "stage_ended_early": progress.stage_ended_early >= -1,
    }
    if wrong := next((key for key in fits if not fits[key]), ""):
        return f"progress.{wrong} is {state['progress'][wrong]}"
    if not 0 <= state["optimizer_step"] <= step:
        return f"optimizer_step is {state['optimizer_step']} after {step} steps"
    names = [file["name"] for file in state["files"]]
    twice = next((name for name in names if names.count(name) > 1), "")
    return "files is []" if not names else twice and f"files has {twice} twice"


def _sha256_of(state: CheckpointState) -> str:
    others = {key: value for key, value in state.items() if key != "sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _changes(path: Path, recipe: Recipe) -> list[str]:
    """The keys in which the recipe beside a checkpoint's run differs from this one; none where that
    cannot be told."""
    try:
        before = load_recipe(path.parent.parent / "recipe.yaml")
    except (OSError, ValueError):
        return []
    return changed_keys(before, recipe)
