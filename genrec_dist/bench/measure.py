"""How a claim is measured: rivals take turns in one process, medians are compared, and the table
says on what."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec_shards.atomic import atomic_file

from genrec_dist.evaluation.provenance import git_commit, hardware, versions

REPEATS = 5


@dataclass(frozen=True)
class Claim:
    """One line of a table: ours beside a peer's, and what was promised."""

    id: str
    peer: str
    ours: float
    theirs: float
    unit: str
    """Of `ours` and `theirs`."""
    ratio: float
    """How the goal reads it: theirs / ours for times and bytes that should be small, ours / theirs
    for rates."""
    goal: str
    """In words, as ">= 30x"."""
    holds: bool


def in_turn(
    rivals: Mapping[str, Callable[[], object]], repeats: int = REPEATS, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each rival, `repeats` of each, taken in turn so that a slow minute meets all of
    them, behind a round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(0 if warm_up else 1, repeats + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if turn:
                seconds[name].append(taken)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(name: str, claims: list[Claim], **more: Any) -> dict[str, Any]:
    """What `--json` writes; `more` holds single measurements, spreads and sizes."""
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "claims": [dataclasses.asdict(claim) for claim in claims],
        **more,
        "hardware": hardware(),
        "versions": versions(),
        "git": git_commit(),
    }


def write_table(table: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def format_claims(claims: list[Claim]) -> str:
    """A plain table for the terminal."""
    rows = [("claim", "peer", "ours", "theirs", "unit", "ratio", "goal", "")]
    rows += [
        (
            c.id,
            c.peer,
            f"{c.ours:,.4g}",
            f"{c.theirs:,.4g}",
            c.unit,
            f"{c.ratio:.3g}",
            c.goal,
            "holds" if c.holds else "FAILS",
        )
        for c in claims
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
