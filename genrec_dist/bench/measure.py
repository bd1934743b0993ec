"""What all benchmarks share: rivals timed in turn, claims, tables, a watched training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from genrec_shards.atomic import write_text
from genrec_shards.readers.documents import parse_object

from genrec_dist.evaluation.provenance import git_commit, hardware, versions

REPEATS = 5
"""How often each rival is timed, unless its sizes say otherwise."""


@dataclass(frozen=True)
class Claim:
    """One line of a table: ours beside a peer's, and the goal that was set beforehand."""

    id: str
    peer: str
    ours: float
    theirs: float
    unit: str
    """Of `ours` and `theirs`."""
    ratio: float
    goal: str
    """In words, as ">= 30x"."""
    holds: bool


Measured = tuple[list[Claim], dict[str, Any]]
"""Claims, and the single measurements they were made of."""


OnPart = Callable[[str, Mapping[str, Any]], None]
"""Is told the name and the figures of each part of a benchmark as soon as it is measured."""


def tell_nobody(name: str, figures: Mapping[str, Any]) -> None:
    """An `OnPart` for benchmarks that are read at their end."""


def make_claim(id: str, peer: str, ours: float, theirs: float, unit: str, goal: str) -> Claim:
    """The claim with its ratio and whether it holds.

    Args:
        goal: `<= 1.2x`, `>= 30x` or `> 1x`, words may follow; or `none`. The ratio is ours / theirs
            for an upper bound and for rates (a unit that ends in /s), otherwise theirs / ours, so
            that a lower bound always asks how many times better ours is.
    """
    upper_bound = goal.startswith("<")
    ratio = ours / theirs if upper_bound or unit.endswith("/s") else theirs / ours
    holds = True
    if goal != "none":
        sign, number = goal.split()[:2]
        bound = float(number.removesuffix("x"))
        holds = {"<=": ratio <= bound, ">=": ratio >= bound, ">": ratio > bound}[sign]
    return Claim(id, peer, ours, theirs, unit, ratio, goal, holds)


def processor_seconds() -> float:
    """Processor time of this process, per thread of torch: what a machine with other work on it
    can still be timed by."""
    return time.process_time() / torch.get_num_threads()


def in_turn(
    rivals: Mapping[str, Callable[[], object]],
    repeats: int = REPEATS,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds, by the clock, of each rival's `repeats` calls, after one untimed round unless
    `warm_up` is off.

    Rivals alternate, so that a slow minute of the machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(0 if warm_up else 1, repeats + 1):
        for name, run in rivals.items():
            start = clock()
            run()
            taken = clock() - start
            if turn:
                seconds[name].append(taken)
    return seconds


def each_in_turn(run: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], object]:
    """A function that calls `run` with the next of the inputs each time, round and round."""
    number = -1

    def step() -> object:
        nonlocal number
        number = (number + 1) % len(inputs)
        return run(inputs[number])

    return step


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(name: str, claims: list[Claim], **more: Any) -> dict[str, Any]:
    """What `--json` writes. `more`: measurements, spreads and sizes."""
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
    """Write `--json`'s file; a measurement that is no number is worth seeing too."""
    write_text(path, json.dumps(table, indent=1) + "\n")


def format_claims(claims: list[Claim]) -> str:
    """A plain table for the terminal."""
    rows: list[tuple[str, ...]] = [("claim", "peer", "ours", "theirs", "unit", "ratio", "goal", "")]
    for c in claims:
        figures = f"{c.ours:,.4g}", f"{c.theirs:,.4g}", c.unit, f"{c.ratio:.3g}"
        rows.append((c.id, c.peer, *figures, c.goal, "holds" if c.holds else "FAILS"))
    return format_columns(rows)


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines, their columns padded to the widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def read_events(path: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Events of this kind in an `events.jsonl` that may be missing or still being written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    events = [parse_object(line, str(path)) for line in lines if line.endswith("\n")]
    return [event for event in events if event.get("event") == kind]


def watch_training(
    recipe: str, settings: Mapping[str, object], num_steps: int
) -> list[dict[str, Any]]:
    """Step events of `genrec train RECIPE` in a process of its own, ended after `num_steps` steps.

    The first three steps are left out: they are start-up. `settings`: recipe keys; `run` has to be
    among them. Raises ValueError with the process's last words, if it logged fewer than five steps.
    """
    overrides = [f"--set={key}={value}" for key, value in {**settings, "log_every": 1}.items()]
    command = [sys.executable, "-m", "genrec_dist.cli", "train", recipe, *overrides]
    events = Path(str(settings["run"])) / "events.jsonl"
    training = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        # A process that cannot start ends by itself, with its reason.
        while training.poll() is None and len(read_events(events)) < num_steps:
            time.sleep(0.2)
        training.send_signal(signal.SIGTERM)
        _, errors = training.communicate(timeout=600)
    finally:
        training.kill()
    steps = read_events(events)[3:]
    if len(steps) < 2:
        raise ValueError(f"the watched training took too few steps: {errors.strip()[-500:]}")
    return steps
