"""The steps of launch/gpu_check.sh: each measures within its budget and writes a dated table."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from genrec_dist.bench.measure import (
    Claim,
    Measured,
    OnPart,
    format_claims,
    read_events,
    table,
    write_table,
)
from genrec_dist.config.load import load_recipe
from genrec_dist.evaluation.provenance import git_commit, hardware, versions

# What is measured is imported by the step that measures it: each is a process of its own, and its
# seconds count.

COMMIT = "GENREC_COMMIT"
"""The environment variable that names the commit where the checkout came without its history."""
HEAVY = ("polars", "webdataset", "pydantic", "deepspeed", "ray", "triton")
MAY_BE_MISSING = (*HEAVY, "hypothesis", "pytest")
STEPS = ("steps", "graph", "lists", "kernels", "beam", "latency")
LISTED_USERS = 500
LEFT_OUT = "left-out"
GIB = 2**30


def measure(step: str, small: bool, seconds: float, on_part: OnPart) -> Measured:
    """Claims and measurements of a step.

    Args:
        step: one of STEPS.
        small: at the sizes of a test.
        seconds: what would begin later than this is left out, where a step has parts.
        on_part: told each part as soon as it is measured.
    """
    if step == "steps":
        from genrec_dist.bench.gpu import steps as gpu_steps

        return gpu_steps.bench_steps(small, seconds, on_part)
    if step == "graph":
        from genrec_dist.bench.gpu import graph

        return graph.bench_graph(small, seconds, on_part)
    if step == "kernels":
        from genrec_dist.bench import kernels

        sizes = kernels.TINY if small else kernels.Sizes(seconds=seconds)
        return kernels.bench_kernels(sizes=sizes, on_part=on_part)
    if step == "beam":
        from genrec_dist.bench import beam

        return beam.bench_beam(sizes=beam.TINY if small else beam.Sizes(repeats=3), on_part=on_part)
    if step == "latency":
        from genrec_dist.bench import latency

        few = latency.Sizes(calls=96, rounds=3)
        return latency.bench_latency(sizes=latency.TINY if small else few)
    return measure_lists(small, on_part)


def measure_lists(small: bool, on_part: OnPart) -> Measured:
    """A run of `best` to its end, and its lists on this device beside those of the CPU."""
    from genrec_shards.storage.write import write_shards

    from genrec_dist.bench.synthetic import make_data
    from genrec_dist.decoding.searcher import Mode
    from genrec_dist.inference.load import best_device, load_run
    from genrec_dist.inference.rank_users import Decoding, rank_batch
    from genrec_dist.training.run import train

    with tempfile.TemporaryDirectory(prefix="genrec-check-") as temporary:
        folder, run = Path(temporary), Path(temporary) / "run"
        dataset = make_data(folder / "made", *((200, 60) if small else ()))
        write_shards(dataset, folder / "shards")
        where = (f"data={dataset.path}", f"shards={folder / 'shards'}", f"run={run}")
        changes = ("finetune.epochs=1", "validation.users=500", "model.d_model=32" * small)
        train(load_recipe("best", [*where, *filter(None, changes)]))
        (validation,) = read_events(run / "events.jsonl", kind="validation")
        (end,) = read_events(run / "events.jsonl", kind="end")
        trained = {"NDCG@10": validation["NDCG@10"], "seconds": end["seconds"]}
        on_part("trained", trained)
        view = dataset.sequences.history_and_target("test")
        users = view.users[: 20 if small else LISTED_USERS]
        here, there = (load_run(run, device) for device in (best_device(), torch.device("cpu")))
        compared: dict[str, Any] = {}
        modes: tuple[Mode, ...] = ("exact", "compact")
        for mode in modes:
            decoding = Decoding(mode=mode)
            begun = time.perf_counter()
            ours = rank_batch(here.searcher, here.layout, view, users, decoding)
            seconds = time.perf_counter() - begun
            theirs = rank_batch(there.searcher, there.layout, view, users, decoding)
            # At equal scores, up to rounding, another item may stand at a place.
            apart = float(abs(ours.scores - theirs.scores).max())
            differ = int((ours.items != theirs.items).sum())
            compared[mode] = {"seconds": seconds, "scores apart": apart, "items differ": differ}
            on_part(mode, compared[mode])
    return [], table("lists", [], trained=trained, users=len(users), modes=compared)


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


def run_step(step: str, out: Path, small: bool, seconds: float = math.inf) -> Path:
    """Measure, print, and write `PREFIX-STEP.json`; each part is a line of `PREFIX-STEP.jsonl` as
    soon as it is measured, so that a step that is cut off has said what it knew."""
    path, parts = out / f"{prefix()}-{step}.json", out / f"{prefix()}-{step}.jsonl"
    for one in (path, parts):
        one.unlink(missing_ok=True)  # one of an earlier run would pass for this one's
    begun = time.monotonic()

    def on_part(name: str, figures: Mapping[str, Any]) -> None:
        line = {"part": name, "after": round(time.monotonic() - begun, 1), **figures}
        with parts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line, default=str), flush=True)

    if step == "facts":
        write_table(facts(), path)
        print(path.read_text(encoding="utf-8"))
        return path
    claims, found = measure(step, small, seconds, on_part)
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
    if name in ("steps", "graph", "lists"):
        kind = "modes" if name == "lists" else "cases"
        for case, figures in found[kind].items():
            short = {k: f"{v:,.4g}" if isinstance(v, float) else v for k, v in figures.items()}
            lines.append(f"- {case}: {_words(short)}")
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="Time for the step.")
    parser.add_argument("--status", type=Path, help="summary: what became of the steps.")
    parser.add_argument("--logs", type=Path, help="summary: directory of STEP.log.")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.step == "summary":
        print(summarise(chosen.status, chosen.logs, chosen.out))
    else:
        run_step(chosen.step, chosen.out, chosen.small, chosen.seconds)


if __name__ == "__main__":
    main()
