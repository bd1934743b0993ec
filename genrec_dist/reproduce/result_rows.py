"""What the finished rows hold: means over seeds, and beside them how each run came about; merged
into a file row by row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec_shards.atomic import atomic_file

from genrec_dist.reproduce.layout import Place, read_metrics
from genrec_dist.reproduce.published import METRICS
from genrec_dist.reproduce.systems import (
    Decoded,
    Mixed,
    ProtocolName,
    Rule,
    Sasrec,
    System,
    Trained,
    label_of,
)
from genrec_dist.reproduce.train_process import best_epoch, validated, worked_seconds

STEPS = "steps.jsonl"
Quality = dict[str, dict[str, dict[str, Any]]]
"""Dataset -> protocol -> system -> its metrics, or how its runs came about."""


@dataclass(frozen=True)
class Row:
    """A system of which every run is evaluated."""

    protocol: ProtocolName
    system: System
    folder: Path
    runs: list[Path]
    metrics: list[dict[str, Any]]
    """What each run's evaluation left."""

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def fields(self) -> dict[str, Any]:
        """The protocol that all its runs share."""
        found: dict[str, Any] = self.metrics[0]["protocol"]
        return found

    def scores(self) -> dict[str, dict[str, Any]]:
        """{metric: {mean, std, ci95}}: over seeds; std is null for one run, ci95 the mean of the
        runs' intervals over users."""
        return {name: self._score(name) for name in METRICS}

    def _score(self, name: str) -> dict[str, Any]:
        values = [float(metrics[name]) for metrics in self.metrics]
        bounds = [
            statistics.fmean(metrics["ci95"][name][end] for metrics in self.metrics)
            for end in (0, 1)
        ]
        return {
            "mean": round(statistics.fmean(values), 6),
            "std": round(statistics.stdev(values), 6) if len(values) > 1 else None,
            "ci95": [round(bound, 6) for bound in bounds],
        }


def rows_of(place: Place, protocol: ProtocolName, systems: list[System]) -> list[Row]:
    """The systems all of whose runs are there; half a row would be a choice among its seeds."""
    rows = []
    for system in systems:
        runs = place.runs(protocol, system)
        metrics = [read_metrics(run) for run in runs]
        if all(metrics):
            found = [one for one in metrics if one is not None]
            rows.append(Row(protocol, system, place.folder(protocol, system), runs, found))
    return rows


def told_of(row: Row, place: Place, command: str) -> dict[str, Any]:
    """How a row came about: command, recipe, protocol, and of each run its seconds, machine and
    commit."""
    system = row.system
    trained = isinstance(system, Trained)
    return {
        "command": command,
        **_what(system),
        "users": row.metrics[0]["users"],
        "protocol": row.fields,
        "runs": [
            {
                "seed": None if isinstance(system, Rule) else seed,
                "test": {name: metrics[name] for name in METRICS},
                **(_training(run) if trained else {}),
                "decode_seconds": round(metrics["seconds"], 1),
                "users_per_second": metrics.get("users_per_second"),
                "git": metrics.get("git"),
                "versions": metrics.get("versions"),
                **_worked(place, run),
            }
            for seed, (run, metrics) in enumerate(zip(row.runs, row.metrics, strict=True))
        ],
    }


def _what(system: System) -> dict[str, Any]:
    """Of which kind a system is, and what was set."""
    if isinstance(system, Trained):
        found: dict[str, Any] = {
            "recipe": label_of(system.recipe),
            "settings": list(system.overrides),
        }
        return {"kind": "recipe", **found, "equal_compute": system.equal_compute}
    if isinstance(system, Decoded | Mixed):
        return {
            "kind": "recipe" if isinstance(system, Decoded) else "baseline",
            "of": system.of.name,
        }
    return {
        "kind": "baseline",
        "settings": list(system.settings) if isinstance(system, Sasrec) else [],
    }


def _training(run: Path) -> dict[str, Any]:
    found = validated(run)
    best = best_epoch(run)
    return {
        "train_seconds": round(worked_seconds(run), 1),
        "best_epoch": best,
        "epochs": found[-1]["epoch"] + 1,
        "validation": {
            name: line[name] for line in found if line["epoch"] + 1 == best for name in METRICS
        },
        "validation_users": found[-1]["users"],
    }


def note_step(
    place: Place, name: str, run: Path | None, seconds: float, hardware: dict[str, Any]
) -> None:
    """Append what a finished step took, and on what."""
    where = None if run is None else str(run.relative_to(place.out))
    line = {"step": name, "run": where, "seconds": round(seconds, 1), "hardware": hardware}
    with (place.out / STEPS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _worked(place: Place, run: Path) -> dict[str, Any]:
    """Seconds of the step that made a run's lists, with what it learned for them, and the
    machine."""
    path, found = place.out / STEPS, {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # torn by a kill
            continue
        if line["run"] == str(run.relative_to(place.out)):
            found = {"step_seconds": line["seconds"], "hardware": line["hardware"]}
    return found


def merge(path: Path, dataset: str, rows: Mapping[str, dict[str, Any]]) -> Quality:
    """Put {protocol: {system: ...}} into a file beside what it holds, in one step, and give all of
    it.

    Raises ValueError, and changes nothing, where the file holds something else.
    """
    whole = _read(path)
    for protocol, systems in rows.items():
        whole.setdefault(dataset, {}).setdefault(protocol, {}).update(systems)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return whole


def check_mergeable(path: Path) -> None:
    """Raise ValueError where `merge` would."""
    _read(path)


def runs_file(path: Path) -> Path:
    """Beside quality.json: quality-runs.json."""
    return path.with_name(f"{path.stem}-runs{path.suffix}")


def _read(path: Path) -> Quality:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fits = all(
            isinstance(systems, dict)
            for protocols in found.values()
            for systems in protocols.values()
        )
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path}: not a table {{dataset: {{protocol: {{system: ...}}}}}}: choose another file"
        )
    return dict(found)
