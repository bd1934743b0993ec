"""The steps of launch/gpu_check.sh: each measures within its budget and writes a dated table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from genrec_dist.bench.measure import (
    Claim,
    Measured,
    format_claims,
    make_claim,
    read_events,
    table,
    write_table,
)
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.evaluation.provenance import git_commit, hardware, versions

# What is measured is imported by the step that measures it: each is a process of its own, and its
# seconds count.

COMMIT = "GENREC_COMMIT"
"""The environment variable that names the commit where the checkout came without its history."""
HEAVY = ("polars", "webdataset", "pydantic", "deepspeed", "ray", "triton")
MAY_BE_MISSING = (*HEAVY, "hypothesis", "pytest")
SMALL_MODEL = (
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=16",
    "model.max_tokens=64",
    "tokens.vocab_size=300",
    "finetune.batch_size=64",
)
BASE = (
    "micro_batch_tokens=16384",
    "finetune.batch_size=128",
    "finetune.targets=last",
    "validation.users=64",
    "model.d_model=768",
    "model.encoder_layers=6",
    "model.decoder_layers=6",
    "model.heads=12",
    "model.ffn=3072",
    "model.dropout=0.1",
    "model.embedding_dropout=0",
    "model.max_tokens=512",
    "model.user_ids=true",
    "model.positions=from-start",
    "tokens.vocab_size=50265",
)
"""BART-base's shape and the paper's input, as changes to the recipe `tiny`; the vocabulary is that
of a tokenizer trained on the codes."""
TRAININGS = ("train-tiny", "train-tiny-packed", "train-base", "train-base-packed")
STEPS = ("kernels", "beam", *TRAININGS, "latency")
LEFT_OUT = "left-out"
GIB = 2**30


def measure(step: str, small: bool) -> Measured:
    """Claims and measurements of a step; `small`: at the sizes of a test."""
    if step == "kernels":
        from genrec_dist.bench import kernels

        return kernels.bench_kernels(sizes=kernels.TINY if small else kernels.Sizes(seconds=90))
    if step == "beam":
        from genrec_dist.bench import beam

        return beam.bench_beam(sizes=beam.TINY if small else beam.Sizes(repeats=3))
    if step == "latency":
        from genrec_dist.bench import latency

        sizes = latency.Sizes(calls=96, rounds=3)
        return latency.bench_latency(sizes=latency.TINY if small else sizes)
    return measure_training(step, small)


def changes_to_tiny(step: str, small: bool) -> list[str]:
    """What the recipe of a training step changes in `tiny`: an epoch of a few hundred steps."""
    changes = ["packing=packed" if step.endswith("packed") else "packing=padded"]
    changes += ["finetune.epochs=1", *(BASE if "base" in step else ["validation.users=200"])]
    return [*changes, *(["log_every=2", *SMALL_MODEL] if small else ["log_every=10"])]


def measure_training(step: str, small: bool) -> Measured:
    """`genrec train` for an epoch: tokens per second, and the peak of memory beside what `genrec
    plan` forecasts."""
    from genrec_shards.storage.write import write_shards

    from genrec_dist.bench.synthetic import make_data
    from genrec_dist.training.run import train

    on_gpu, changes = torch.cuda.is_available(), changes_to_tiny(step, small)
    card = torch.cuda.get_device_properties(0).total_memory if on_gpu else 24 * GIB
    with tempfile.TemporaryDirectory(prefix="genrec-check-") as temporary:
        folder, run = Path(temporary), Path(temporary) / "run"
        dataset = make_data(folder / "made", *((200, 60) if small else ()))
        write_shards(dataset, folder / "shards")
        where = (f"data={dataset.path}", f"shards={folder / 'shards'}", f"run={run}")
        recipe = load_recipe("tiny", [*where, *changes])
        forecast = forecast_bytes(recipe, card / GIB)
        train(recipe)
        steps, (start, *_) = (read_events(run / "events.jsonl", kind) for kind in ("step", "start"))
    # On a CPU the peak of what tensors hold is not counted.
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    settled = steps[len(steps) // 5 :]  # before it: caches, compiled kernels, the allocator

    def of_steps(key: str, middle: Any = median) -> float | None:
        values = [event[key] for event in settled if key in event]
        return middle(values) if values else None

    return [] if peak is None else [memory_claim(step, peak, forecast)], {
        "tokens a second": of_steps("tokens_per_second"),
        "samples a second": of_steps("samples_per_second"),
        # Where the device's peak is known.
        "TFLOP/s": of_steps("tflops_per_second"),
        "MFU": of_steps("mfu"),
        "padding share": of_steps("padding_share", fmean),
        "share waiting for data": of_steps("data_wait_share", fmean),
        "steps": steps[-1]["step"] + 1,
        "parameters": start["parameters"],
        "last loss": steps[-1]["loss"],
        "precision": recipe.precision,
        "changes to the recipe tiny": changes,
        "memory": {"max_memory_allocated": peak, "foretold": forecast, "of the card": card},
    }


def forecast_bytes(recipe: Recipe, memory_gib: float) -> int:
    """What `genrec plan` says one process holds at its most, for this recipe's data."""
    from genrec_dist.estimate.forecast import forecast

    plan = forecast(recipe, memory_gib=memory_gib)
    return next(fit.peak for fit in plan.fits if fit.method == "ddp")


def memory_claim(step: str, peak: int, forecast: int) -> Claim:
    name = step.removeprefix("train-")
    figures = (f"peak memory, {name}", "genrec plan", peak / GIB, forecast / GIB, "GiB")
    claim = make_claim(*figures, "none")
    return replace(claim, goal="0.8x to 1.25x", holds=0.8 <= claim.ratio <= 1.25)


def facts() -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {
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
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            driver = None
        else:
            driver = done.stdout.partition("\n")[0].strip() or None
        found |= {
            "memory GiB": round(card.total_memory / GIB, 1),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cache MiB": card.L2_cache_size / 2**20,
            "driver": driver,
        }
    return found


def commit() -> str | None:
    return git_commit() or os.environ.get(COMMIT) or None


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
    claims, found = measure(step, small)
    if "claims" not in found:
        found = table(step, claims, **found)
    write_table({**found, "git": commit()}, path)
    print(format_claims(claims))
    return path


# The summary.


def summarise(status: Path, logs: Path, out: Path) -> Path:
    """`PREFIX.md` of the tables that are there; `PREFIX-failed.txt` with the ends of the logs of
    steps that failed.

    Args:
        status: a file with a line per step, `name TAB exit code TAB seconds TAB budget`.
        logs: the folder of `STEP.log`.
    """
    rows = [line.split("\t") for line in status.read_text(encoding="utf-8").splitlines()]
    tables = {
        path.stem.removeprefix(prefix() + "-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(out.glob(f"{prefix()}-*.json"))
    }
    known = tables["facts"] if "facts" in tables else facts()
    card, named = known["hardware"]["gpu"] or "CPU", known["commit"] or "unknown"
    lines = [f"# {card}, {known['date']}, commit {named}", ""]
    shown = {name: value for name, value in known.items() if name not in ("date", "commit")}
    lines += [f"- {name}: {_words(value)}" for name, value in shown.items()]
    lines += ["", "| step | result | seconds | budget |", "|---|---|---|---|"]
    for name, code, seconds, budget in rows:
        lines.append(f"| {name} | {_result(code)} | {seconds} | {budget} |")
    for name, found in tables.items():
        lines += _section(name, found) if name in STEPS else []
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


def _result(code: str) -> str:
    late = "ran out of time"
    words = {"0": "done", LEFT_OUT: "left out, pytest is not installed", "124": late, "137": late}
    return words.get(code, f"failed with exit code {code}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items() if one is not None)
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)


def _section(name: str, found: dict[str, Any]) -> list[str]:
    lines = ["", f"## {name}", ""]
    if found["claims"]:
        lines += ["```", format_claims([Claim(**claim) for claim in found["claims"]]), "```"]
    if name == "kernels":
        from genrec_dist.bench.kernels import format_shares

        lines += ["", *(f"- {line}" for line in format_shares(found).splitlines())]
        lines += [f"- left out: {one}" for one in found["left out"]]
    if name == "beam":
        from genrec_dist.bench.beam import format_curves

        lines += ["", "```", format_curves(found), "```"]
    if name in TRAININGS:
        figures = {key: value for key, value in found.items() if isinstance(value, int | float)}
        lines.append("")
        for key, value in figures.items():
            small = isinstance(value, float) and value < 1000
            lines.append(f"- {key}: {value:.3g}" if small else f"- {key}: {value:,.0f}")
    return lines


def _end_of(log: Path, count: int = 25) -> str:
    if not log.is_file():
        return "(no output)"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-count:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["facts", *STEPS, "summary"])
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
