"""What the finished rows hold: means over seeds, and how each run came about; merged into a file
row by row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec_shards.atomic import write_json
from genrec_shards.readers.documents import parse_object, read_object

from genrec_dist.evaluation.metrics import METRICS
from genrec_dist.reproduce.steps import Step, read_metrics
from genrec_dist.reproduce.systems import (
    Options,
    ProtocolName,
    System,
    label_of,
    without_directory,
)
from genrec_dist.reproduce.train_process import best_epoch, validated, worked_seconds

STEPS = "steps.jsonl"
Quality = dict[str, dict[str, dict[str, Any]]]
"""Data set -> protocol -> system -> its metrics, or how its runs came about."""


@dataclass(frozen=True)
class Row:
    """A system of which every run is evaluated."""

    system: System
    runs: list[Path]
    metrics: list[dict[str, Any]]
    """Of each run's evaluation."""

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
        scores = {}
        for name in METRICS:
            values = [float(metrics[name]) for metrics in self.metrics]
            low, high = zip(*(metrics["ci95"][name] for metrics in self.metrics), strict=True)
            scores[name] = {
                "mean": round(statistics.fmean(values), 6),
                "std": round(statistics.stdev(values), 6) if len(values) > 1 else None,
                "ci95": [round(statistics.fmean(bounds), 6) for bounds in (low, high)],
            }
        return scores


def rows_of(options: Options, protocol: ProtocolName, systems: list[System]) -> list[Row]:
    """The systems all of whose runs are evaluated; half a row would be a choice among its seeds."""
    rows = []
    for system in systems:
        runs = options.runs(protocol, system)
        metrics = [found for run in runs if (found := read_metrics(run)) is not None]
        if len(metrics) == len(runs):
            rows.append(Row(system, runs, metrics))
    return rows


def origin_of(row: Row, options: Options) -> dict[str, Any]:
    """How a row came about: command, settings, protocol, and of each run its seconds, machine and
    commit."""
    system = row.system
    settings = list(map(without_directory, system.settings))
    origin: dict[str, Any] = {"command": options.command, "kind": "baseline"}
    if system.kind in ("recipe", "ranked"):
        origin["kind"] = "recipe"
    if system.kind in ("sasrec+knn", "ranked") and system.of is not None:
        origin["of"] = system.of.name
    elif system.kind == "recipe":
        origin |= {"recipe": label_of(system.recipe), "settings": settings}
        origin["equal_compute"] = system.equal_compute
    else:
        origin["settings"] = settings
    runs = []
    for seed, (run, metrics) in enumerate(zip(row.runs, row.metrics, strict=True)):
        runs.append(
            {
                "seed": None if system.kind == "rule" else seed,
                "test": {name: metrics[name] for name in METRICS},
                **(_training(run) if system.kind == "recipe" else {}),
                "decode_seconds": round(metrics["seconds"], 1),
                "users_per_second": metrics.get("users_per_second"),
                "git": metrics.get("git"),
                "versions": metrics.get("versions"),
                **_step_of(options, run),
            }
        )
    return {**origin, "users": row.metrics[0]["users"], "protocol": row.fields, "runs": runs}


def _training(run: Path) -> dict[str, Any]:
    found = validated(run)
    if not found:  # a backbone as it is
        return {"train_seconds": 0.0, "epochs": 0}
    best = best_epoch(run)
    of_best = [line for line in found if line["epoch"] + 1 == best]
    return {
        "train_seconds": round(worked_seconds(run), 1),
        "best_epoch": best,
        "epochs": found[-1]["epoch"] + 1,
        "validation": {name: line[name] for line in of_best for name in METRICS},
        "validation_users": found[-1]["users"],
    }


def note_step(options: Options, step: Step, seconds: float, hardware: dict[str, Any]) -> None:
    """Append what a finished step took, and on what machine."""
    run = None if step.listed is None else str(step.listed.relative_to(options.out))
    line = {"step": step.name, "run": run, "seconds": round(seconds, 1), "hardware": hardware}
    with (options.out / STEPS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _step_of(options: Options, run: Path) -> dict[str, Any]:
    """Seconds of the step that made a run's lists, with what it learned for them, and the
    machine."""
    path, found = options.out / STEPS, {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = parse_object(text, str(path))
        except ValueError:  # torn by a kill
            continue
        if line.get("run") == str(run.relative_to(options.out)):
            found = {"step_seconds": line["seconds"], "hardware": line["hardware"]}
    return found


def merge(path: Path, dataset: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """Put {protocol: {system: ...}} into a file beside what it holds, atomically. Raises ValueError
    where the file holds something else; it is not changed then."""
    whole = read_quality(path)
    for protocol, systems in rows.items():
        whole.setdefault(dataset, {}).setdefault(protocol, {}).update(systems)
    write_json(path, whole)


def runs_file(path: Path) -> Path:
    """Beside quality.json: quality-runs.json."""
    return path.with_name(f"{path.stem}-runs{path.suffix}")


def read_quality(path: Path) -> Quality:
    """What such a file holds, empty where there is none. Raises ValueError where the file holds
    something else."""
    if not path.is_file():
        return {}
    expected, remedy = "a table {dataset: {protocol: {system: ...}}}", "choose another file"
    found: Quality = read_object(path, expected, remedy)
    for protocols in found.values():
        tables = protocols.values() if isinstance(protocols, dict) else [protocols]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError(f"{path}: not {expected}: {remedy}")
    return found
