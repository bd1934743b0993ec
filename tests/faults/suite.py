"""The fault suite: which attacks a seed makes, many of them at once, and what they found."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import on_data
import on_models
import on_options
import on_training
from attacks import KINDS, Box, NotHeld, Result

MODULES = (on_training, on_data, on_models, on_options)
"""They enter their kinds of attacks when they are imported."""


def attacks(number: int, seed: int) -> list[str]:
    """Names of so many attacks, each kind with its share of them, in an order drawn by the
    seed."""
    total = sum(kind.share for kind in KINDS.values())
    ends, names, share = 0, [], 0
    for kind in KINDS.values():
        share += kind.share
        begins, ends = ends, round(number * share / total)
        names += [f"{kind.name}:{n}" for n in range(ends - begins)]
    random.Random(seed).shuffle(names)
    return names


def attempt(world: Path, name: str, seed: int) -> Result:
    """Make one attack, in a folder of its own that is removed afterwards."""
    kind_name, _, number = name.partition(":")
    folder = Path(tempfile.mkdtemp(prefix="attack-", dir=world.parent))
    folder.chmod(0o755)
    box = Box(world, folder, random.Random(f"{seed} {kind_name} {int(number)}"))
    began, reason = time.monotonic(), ""
    try:
        KINDS[kind_name].attack(box)
        if list(folder.rglob("canary")):
            raise NotHeld("foreign code ran")
    except NotHeld as error:
        reason = " ".join(str(error).split())
    except Exception:
        reason = "the attack itself failed: " + traceback.format_exc(limit=-3)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(name, reason, "; ".join(box.notes), time.monotonic() - began)


def attempts(
    names: Iterable[str], world: Path, seed: int, processes: int, seconds: float, least: int
) -> Iterator[Result]:
    """The results of attacks, as they come; none but the first `least` is begun after so many
    seconds."""
    end = time.monotonic() + seconds
    in_time = (
        name for number, name in enumerate(names) if number < least or time.monotonic() < end
    )
    if processes == 1:
        yield from (attempt(world, name, seed) for name in in_time)
        return
    # Not by fork: each process has its own server of processes.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting: set[Future[Result]] = set()
        while True:
            room = processes - len(waiting)
            waiting |= {pool.submit(attempt, world, name, seed) for name in islice(in_time, room)}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def table(results: list[Result]) -> str:
    """Attacks tried and held, by group and in all."""
    lines = [f"{'group':<10} {'tried':>6} {'held':>6} {'not held':>9}"]
    groups = sorted({result.group for result in results})
    for group in [*groups, "all"]:
        own = [result for result in results if group in (result.group, "all")]
        held = sum(not result.reason for result in own)
        lines.append(f"{group:<10} {len(own):>6} {held:>6} {len(own) - held:>9}")
    return "\n".join(lines)


def not_held(results: list[Result], seed: int) -> str:
    """What was not held, and how to repeat it."""
    lines = []
    for result in sorted(results, key=lambda result: result.name):
        if result.reason:
            repeat = f"make faults SEED={seed} ONLY={result.name}"
            lines += [f"{result.name}: {result.reason}", f"    {result.notes}", f"    {repeat}"]
    return "\n".join(lines)
