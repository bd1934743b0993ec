"""What a run directory tells about its run: recipe, events, status, audit and metrics, as far as
they are there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from genrec_shards.readers.documents import parse_object, parse_yaml
from genrec_shards.splits import Split

METRICS_OBJECTS = ("beside", "breakdown", "ci95", "protocol", "training", "versions", "recipe")
"""Fields of a metrics file that hold fields themselves."""


@dataclass
class RunFiles:
    """What a run directory holds; whatever is missing is empty."""

    path: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    metrics: dict[Split, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line.get("event") == event]

    def stage(self, event: str, stage: str) -> list[dict[str, Any]]:
        """Events of a stage by step. A resumed run writes some steps twice: the later ones are the
        ones it kept."""
        found = {
            line["step"]: line
            for line in self.of(event)
            if line.get("stage") == stage and is_number(line.get("step"))
        }
        return [found[step] for step in sorted(found)]

    def worked(self) -> list[tuple[dict[str, Any], float]]:
        """Each event that has a time, and the seconds that the run had worked by then, without the
        time between two attempts."""
        found, before, seconds = list[tuple[dict[str, Any], float]](), None, 0.0
        for event in self.events:
            now = event.get("time")
            if is_number(now):
                if before is not None and event.get("event") != "start":
                    seconds += max(now - before, 0.0)
                before = now
                found.append((event, seconds))
        return found


def read_run_files(path: Path) -> RunFiles:
    """Read whatever is there; what cannot be read goes to `notes`.

    Raises ValueError for a directory that no command of ours wrote.
    """
    wanted = [
        "recipe.yaml",
        "events.jsonl",
        "status.json",
        "metrics-validation.json",
        "metrics-test.json",
    ]
    if not any((path / name).is_file() for name in wanted):
        raise ValueError(
            f"{path}: none of {', '.join(wanted)} is in it: give a directory of genrec train or "
            "genrec baseline"
        )
    run = RunFiles(path)
    if (path / "recipe.yaml").is_file():
        run.recipe_text = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        run.recipe = _read_yaml(run.recipe_text, run.notes)
    run.events = _read_events(path / "events.jsonl", run.notes)
    run.status = _read_object(path / "status.json", run.notes)
    run.audit = _read_object(path / "audit.json", run.notes)
    if not run.audit and run.recipe.get("data"):
        run.audit = _read_object(Path(str(run.recipe["data"])) / "audit.json", run.notes)
    splits: tuple[Split, ...] = ("test", "validation")
    for split in splits:
        if found := _read_object(path / f"metrics-{split}.json", run.notes):
            run.metrics[split] = found
    _keep_objects("recipe.yaml", run.recipe, ("pretrain", "finetune"), run.notes)
    for event in run.events:
        _keep_objects("events.jsonl", event, ("beside", "peak", "versions"), run.notes)
    for split, found in run.metrics.items():
        name = f"metrics-{split}.json"
        _keep_objects(name, found, METRICS_OBJECTS, run.notes)
        beside = found.get("beside") or {}
        _keep_objects(f"{name}: beside", beside, tuple(beside), run.notes)
    return run


def _keep_objects(
    name: str, values: dict[str, Any], keys: tuple[str, ...], notes: list[str]
) -> None:
    """Remove the values of these keys that are no objects, and note it; readers of them look
    inside."""
    for key in keys:
        if values.get(key) is not None and not isinstance(values[key], dict):
            notes.append(f"{name}: {key} is no object")
            del values[key]


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number: what a chart or a table can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_events(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """All lines that are JSON objects; a killed run can leave its last line torn, which is counted,
    not hidden."""
    if not path.is_file():
        return []
    events, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            events.append(parse_object(line, path.name))
        except ValueError:
            torn += 1
    if torn:
        notes.append(f"events.jsonl: {torn} torn line{'s' if torn > 1 else ''} skipped")
    return events


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_object(path.read_bytes(), path.name)
    except (OSError, ValueError) as error:
        notes.append(str(error))
        return {}


def _read_yaml(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        found = parse_yaml(text, "recipe.yaml")
    except ValueError as error:
        notes.append(str(error))
        return {}
    return found if isinstance(found, dict) else {}
