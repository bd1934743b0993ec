"""The steps of launch/gpu_check.sh: each measures within its budget and leaves a dated table; the
last one sums up."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrec_dist.bench.measure import Claim, format_claims, median, table, write_table
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.evaluation.provenance import git_commit, hardware, versions

# What is measured is imported by the step that measures it: each is a process of its own, and its
# seconds count.

COMMIT = "GENREC_COMMIT"
"""The environment variable that names the commit where the checkout came without its history."""
MAY_BE_MISSING = (
    "polars",
    "webdataset",
    "pydantic",
    "deepspeed",
    "ray",
    "hypothesis",
    "pytest",
    "triton",
)
SMALL_MODEL = (
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=16",
    "tokens.vocab_size=300",
    "finetune.batch_size=64",
)
GIB = 2**30

Measured = tuple[list[Claim], dict[str, Any]]


def measure_kernels(small: bool) -> Measured:
    from genrec_dist.bench import kernels

    if not small:
        return kernels.bench_kernels(sizes=kernels.Sizes(seconds=90))
    steps = (kernels.StepShape("tiny", SMALL_MODEL),)
    shapes = (kernels.Shape(16, torch.float32),)
    return kernels.bench_kernels(
        sizes=kernels.Sizes(
            tokens=(300,), shapes=shapes, users=200, items=60, repeats=2, growth=(1000, 4000), growth_dim=8,
            growth_tokens=400, growth_rows=100, steps=steps, step_repeats=2,
        )
    )  # fmt: skip


def measure_beam(small: bool) -> Measured:
    from genrec_dist.bench import beam

    if not small:
        first, second = beam.ON_GPU
        shapes = (replace(first, batches=(1, 32, 128, 512)), replace(second, batches=(1, 32, 128)))
        return beam.bench_beam(sizes=beam.Sizes(shapes=shapes, repeats=3))
    tiny = beam.Shape("tiny", 32, 1, 2, 64, (1, 3), 3, 1, 2, 60)
    return beam.bench_beam(
        sizes=beam.Sizes((tiny,), items=60, users=200, beam=4, repeats=2, trie_items=500)
    )


def measure_latency(small: bool) -> Measured:
    from genrec_dist.bench import latency

    sizes = latency.Sizes(calls=96, rounds=3, threads=(1,))
    if small:
        sizes = latency.Sizes(users=100, items=50, callers=2, calls=8, rounds=2, threads=(1,))
    return latency.bench_latency(sizes=sizes)


def changes_to_tiny(name: str) -> tuple[str, ...]:
    """What is trained for an epoch of synthetic data of Beauty's size, a few hundred steps: changes
    to the recipe `tiny`."""
    from genrec_dist.bench.kernels import BASE_SHAPE

    shape, _, packing = name.partition("-")
    changes = (f"packing={packing or 'padded'}",)
    if shape == "tiny":
        return (*changes, "validation.users=200")
    large = (
        "micro_batch_tokens=16384",
        "finetune.batch_size=128",
        "finetune.targets=last",
        "validation.users=64",
    )
    return (*changes, *large, *BASE_SHAPE)


def measure_training(name: str, small: bool) -> Measured:
    """`genrec train` for an epoch: tokens a second, and the peak of memory beside what `genrec
    plan` foretold."""
    from genrec_shards.storage.write import write_shards

    from genrec_dist.bench.stream import make_data
    from genrec_dist.training.run import train

    with tempfile.TemporaryDirectory(prefix="genrec-check-") as temporary:
        folder = Path(temporary)
        users, items = (200, 60) if small else (22_363, 12_101)
        dataset = make_data(folder / "made", users, items)
        write_shards(dataset, folder / "shards")
        where = (
            f"data={dataset.path}",
            f"shards={folder / 'shards'}",
            f"run={folder / 'run'}",
            "finetune.epochs=1",
        )
        shape = (
            (*changes_to_tiny(name), "model.max_tokens=64", *SMALL_MODEL)
            if small
            else changes_to_tiny(name)
        )
        recipe = load_recipe("tiny", [*where, f"log_every={2 if small else 10}", *shape])
        card = (
            torch.cuda.get_device_properties(0).total_memory
            if torch.cuda.is_available()
            else 24 * GIB
        )
        foretold = foretold_bytes(recipe, card / GIB)
        train(recipe)
        text = (folder / "run" / "events.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    # The first fifth is start-up: caches, compiled kernels, the allocator.
    settled = steps[len(steps) // 5 :]
    # On a CPU nobody counts what tensors hold at their most.
    measured = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return [] if measured is None else [memory_claim(name, measured, foretold)], {
        "tokens a second": median([step["tokens_per_second"] for step in settled]),
        "samples a second": median([step["samples_per_second"] for step in settled]),
        "padding share": float(np.mean([step["padding_share"] for step in settled])),
        "share waiting for data": float(np.mean([step["data_wait_share"] for step in settled])),
        # Where the device's peak is known.
        "MFU": median([step["mfu"] for step in settled]) if "mfu" in settled[0] else None,
        "TFLOP/s": median([step["tflops_per_second"] for step in settled])
        if "tflops_per_second" in settled[0]
        else None,
        "steps": steps[-1]["step"] + 1,
        "parameters": next(event["parameters"] for event in events if event["event"] == "start"),
        "last loss": steps[-1]["loss"],
        "precision": recipe.precision,
        "changes to the recipe tiny": shape,
        "memory": {"max_memory_allocated": measured, "foretold": foretold, "of the card": card},
    }


def foretold_bytes(recipe: Recipe, memory_gib: float) -> int:
    """What `genrec plan` says one process holds at its most, for this recipe's data."""
    from genrec_dist.estimate.forecast import forecast

    plan = forecast(recipe, memory_gib=memory_gib)
    return next(fit.peak for fit in plan.fits if fit.method == "ddp")


def memory_claim(name: str, measured: int, foretold: int) -> Claim:
    ratio = foretold / measured
    return Claim(
        id=f"peak memory, {name}", peer="genrec plan", ours=measured / GIB, theirs=foretold / GIB, unit="GiB",
        ratio=ratio, goal="0.8x to 1.25x", holds=0.8 <= ratio <= 1.25,
    )  # fmt: skip


MEASURED: dict[str, Callable[[bool], Measured]] = {
    "kernels": measure_kernels,
    "beam": measure_beam,
    "latency": measure_latency,
    "train-tiny": partial(measure_training, "tiny"),
    "train-tiny-packed": partial(measure_training, "tiny-packed"),
    "train-base": partial(measure_training, "base"),
    "train-base-packed": partial(measure_training, "base-packed"),
}


def facts() -> dict[str, Any]:
    """What was measured on."""
    told: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "hardware": hardware(),
        "not installed": [name for name in MAY_BE_MISSING if find_spec(name) is None],
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        told["memory GiB"] = round(card.total_memory / GIB, 1)
        told["capability"] = f"{card.major}.{card.minor}"
        told["multiprocessors"] = card.multi_processor_count
        told["cache MiB"] = card.L2_cache_size / 2**20
        told["driver"] = _driver()
    return told


def commit() -> str | None:
    return git_commit() or os.environ.get(COMMIT) or None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def prefix() -> str:
    """`2026-11-21-gpu-nvidia-h200`; on a CPU `2026-11-21-cpu`."""
    if not torch.cuda.is_available():
        return time.strftime("%Y-%m-%d") + "-cpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{time.strftime('%Y-%m-%d')}-gpu-{name}"


def run_step(step: str, out: Path, small: bool) -> Path:
    """Measure, print, and write `PREFIX-STEP.json`."""
    path = out / f"{prefix()}-{step}.json"
    path.unlink(missing_ok=True)  # one of an earlier run would pass for this one's
    if step == "facts":
        write_table(facts(), path)
        print(path.read_text(encoding="utf-8"))
        return path
    claims, found = MEASURED[step](small)
    if "claims" not in found:
        found = table(step, claims, **found)
    write_table({**found, "git": commit()}, path)
    print(format_claims(claims))
    return path


# The end.


def summarise(status: Path, logs: Path, out: Path) -> Path:
    """`PREFIX.md` of the tables that are there; `PREFIX-failed.txt` with the ends of the logs of
    steps that failed.

    `status`: a line a step, `name TAB exit code TAB seconds TAB budget`.
    """
    rows = [line.split("\t") for line in status.read_text(encoding="utf-8").splitlines()]
    tables = {
        path.stem.removeprefix(prefix() + "-"): path
        for path in sorted(out.glob(f"{prefix()}-*.json"))
    }
    known = (
        json.loads(tables["facts"].read_text(encoding="utf-8")) if "facts" in tables else facts()
    )
    lines = [
        f"# {known['hardware']['gpu'] or 'CPU'}, {known['date']}, commit {known['commit'] or 'unknown'}",
        "",
    ]
    lines += [
        f"- {name}: {_told(value)}"
        for name, value in known.items()
        if name not in ("date", "commit")
    ]
    lines += ["", "| step | result | seconds | budget |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {_result(code)} | {seconds} | {budget} |"
        for name, code, seconds, budget in rows
    ]
    for name, path in tables.items():
        lines += (
            _section(name, json.loads(path.read_text(encoding="utf-8"))) if name in MEASURED else []
        )
    page = out / f"{prefix()}.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    failed = out / f"{prefix()}-failed.txt"
    failed.unlink(missing_ok=True)
    ends = [
        f"{name}: {_result(code)} after {seconds} of {budget} s\n{_end_of(logs / f'{name}.log')}"
        for name, code, seconds, budget in rows
        if code not in ("0", LEFT_OUT)
    ]
    if ends:
        failed.write_text("\n\n".join(ends) + "\n", encoding="utf-8")
    return page


LEFT_OUT = "left-out"


def _result(code: str) -> str:
    words = {
        "0": "done",
        LEFT_OUT: "left out, pytest is not installed",
        "124": "ran out of time",
        "137": "ran out of time",
    }
    return words.get(code, f"failed with exit code {code}")


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items() if one is not None)
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def _section(name: str, found: dict[str, Any]) -> list[str]:
    lines = ["", f"## {name}", ""]
    if found["claims"]:
        lines += ["```", format_claims([Claim(**claim) for claim in found["claims"]]), "```"]
    if name == "kernels":
        from genrec_dist.bench import kernels

        lines += ["", *(f"- {line}" for line in kernels.format_shares(found).splitlines())]
        lines += [f"- left out: {one}" for one in found["left out"]]
    if name == "beam":
        from genrec_dist.bench import beam

        lines += ["", "```", beam.format_curves(found), "```"]
    if name.startswith("train-"):
        lines += [
            "",
            *(f"- {what}: {_told(value)}" for what, value in _training_facts(found).items()),
        ]
    return lines


def _training_facts(found: dict[str, Any]) -> dict[str, Any]:
    names = (
        "tokens a second", "samples a second", "TFLOP/s", "MFU", "padding share", "share waiting for data", "steps", "parameters",
        "last loss",
    )  # fmt: skip
    told = {name: found[name] for name in names if found[name] is not None}
    return {
        name: f"{value:.3g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"
        for name, value in told.items()
    }


def _end_of(log: Path, count: int = 25) -> str:
    if not log.is_file():
        return "(no output)"
    return "\n".join(
        f"    {line}"
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["facts", *MEASURED, "summary"])
    parser.add_argument("--out", type=Path, required=True, help="Directory of the tables.")
    parser.add_argument("--small", action="store_true", help="Sizes for a test.")
    parser.add_argument("--status", type=Path, help="summary: what became of the steps.")
    parser.add_argument("--logs", type=Path, help="summary: directory of STEP.log.")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.step == "summary":
        print(summarise(chosen.status, chosen.logs, chosen.out))
    else:
        run_step(chosen.step, chosen.out, chosen.small)


if __name__ == "__main__":
    main()
