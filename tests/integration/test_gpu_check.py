"""launch/gpu_check.sh, run for real on a CPU: not installed, without packages a GPU machine lacks,
and with steps that fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from two_ranks import environment

from genrec_dist.bench.gpu.check import (
    LEFT_OUT,
    STEPS,
    prefix,
    run_step,
    summarise,
)
from genrec_dist.bench.gpu.steps import CASES

SCRIPT = ROOT / "launch" / "gpu_check.sh"
# Not on the GPU machine; and nothing of ours is installed there either.
MISSING = ("polars", "webdataset", "pydantic", "deepspeed", "ray", "hypothesis")
BLOCKER = """
import os, sys
from importlib.machinery import PathFinder

blocked = set(os.environ["BLOCKED"].split(","))

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if blocked & {name, name.partition(".")[0]}:
            return None
        return PathFinder.find_spec(name, path, target)

    invalidate_caches = PathFinder.invalidate_caches
    find_distributions = PathFinder.find_distributions

finders = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in finders]
# What an editable installation adds to the path.
known = os.environ["PYTHONPATH"].split(":")
sys.path[:] = [p for p in sys.path if p in known or "packages" in p or "lib" in p]
"""


def blocked_environment(folder: Path, *more: str, **variables: str) -> dict[str, str]:
    """Of a Python without our packages and those that are blocked."""
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    own = {"PYTHONPATH": str(folder / "blocker"), "BLOCKED": ",".join((*MISSING, *more))}
    return environment(**own, **variables)


def run_script(
    folder: Path, *arguments: str, blocked: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    # Plugins of packages that are there after all would look for them past the blocker.
    own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHON": sys.executable}
    own |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    env = blocked_environment(folder, *blocked, **own)
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 1900}
    return subprocess.run([SCRIPT, *arguments], env=env, **options)


def test_nothing_of_ours_is_installed_behind_the_blocker(tmp_path: Path) -> None:
    names = ["genrec_dist", "genrec_kernels", "webdataset"]
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    command, env = [sys.executable, "-c", code], blocked_environment(tmp_path)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    done = run_script(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch/gpu_check.sh: no NVIDIA GPU for ")
    assert done.stderr.count("\n") == 1
    wrong = subprocess.run([SCRIPT, "--fast"], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stderr) == (2, "usage: launch/gpu_check.sh [--cpu OUT]\n")


@pytest.mark.dist
@pytest.mark.slow
def test_steps_run_with_this_checkout_alone(tmp_path: Path) -> None:
    out, measured = tmp_path / "out", list(STEPS)
    steps = ["facts", "tests", *measured]
    own = {"GENREC_COMMIT": "0123456789ab", "GPU_CHECK_STEPS": " ".join(steps)}
    done = run_script(tmp_path, "--cpu", str(out), **own)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, page = done.stdout.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == sorted([*steps, "summary"])
    assert page == str(out / f"{prefix()}.md")
    written = {path.name.removeprefix(prefix()) for path in out.iterdir()}
    parts = {f"-{step}.jsonl" for step in ("steps", "graph", "lists", "kernels", "beam")}
    assert written == {".md", "-facts.json", *(f"-{step}.json" for step in measured), *parts}
    facts = json.loads((out / f"{prefix()}-facts.json").read_text())
    assert set(MISSING) <= set(facts["not installed"])
    text = Path(page).read_text()
    assert text.startswith(f"# CPU, {prefix()[:10]}, commit ")
    for step in measured:
        found = json.loads((out / f"{prefix()}-{step}.json").read_text())
        assert found["git"] == facts["commit"]
        assert f"| {step} | done |" in text
        assert f"## {step}" in text


@pytest.mark.slow
def test_each_case_of_the_steps_is_a_line_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    path = run_step("steps", tmp_path, small=True)
    cases = json.loads(path.read_text())["cases"]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == [case.name for case in CASES] == list(cases)
    for name, found in cases.items():
        assert "failed" not in found, (name, found)
        assert found["tokens a second"] > 0
        assert found["the same bits twice"] is True  # on a CPU


def test_a_case_for_which_there_is_no_time_is_left_out_by_name(tmp_path: Path) -> None:
    path = run_step("steps", tmp_path, small=True, seconds=-1)
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    assert len(lines) == len(CASES)
    assert all("left out" in json.loads(line) for line in lines)


def test_script_has_every_step_and_its_gpu_tests_are_found() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    steps = sorted(["facts", *STEPS])
    budgets = {
        name: int(seconds)
        for name, seconds in re.findall(r"^ *(?:measure|step) (\S+) (\d+)", text, re.M)
    }
    assert sorted(re.findall(r"^measure (\S+) \d+ \d+$", text, re.M)) == steps
    assert {*steps, "tests", "summary"} == budgets.keys()
    # Of twelve minutes one is for installing and copying, and one for estimates that are too low.
    assert sum(budgets.values()) + 60 <= 600
    named = re.search(r'^all_steps="([^"]*)"', text, re.M)
    assert named is not None
    assert sorted(named[1].split()) == sorted([*steps, "tests"])
    listing = re.search(r"\$\((grep -rl [^)]*)\)", text)
    assert listing is not None
    found = subprocess.run(["bash", "-c", listing[1]], cwd=ROOT, capture_output=True, text=True)
    assert "tests/unit/kernels/test_kernel_embedding.py" in found.stdout.split()
    assert str(ROOT) not in text
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.dist
@pytest.mark.ranks
def test_failed_step_and_one_left_out_stop_no_other(tmp_path: Path) -> None:
    out, blocked = tmp_path / "out", ("pytest", "genrec_dist.bench.synthetic")
    steps = {"GPU_CHECK_STEPS": "tests beam facts"}
    done = run_script(tmp_path, "--cpu", str(out), blocked=blocked, **steps)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tests: left out, pytest is not installed" in done.stdout
    assert "beam: failed with exit code 1" in done.stdout
    assert "facts: done" in done.stdout
    names = {path.name.removeprefix(prefix()) for path in out.iterdir()}
    assert names == {".md", "-facts.json", "-failed.txt"}
    text = (out / f"{prefix()}-failed.txt").read_text()
    assert text.startswith("beam: failed with exit code 1 after ")
    assert "No module named 'genrec_dist.bench.synthetic'" in text
    assert "| beam | failed with exit code 1 |" in (out / f"{prefix()}.md").read_text()


@pytest.mark.dist
def test_step_that_runs_out_of_time_says_so(tmp_path: Path) -> None:
    own = {"GPU_CHECK_STEPS": "facts", "GPU_CHECK_SECONDS": "1"}
    done = run_script(tmp_path, "--cpu", str(tmp_path / "out"), **own)
    assert done.returncode == 1
    assert done.stdout.startswith("facts: ran out of its 1 s\n")
    failed = (tmp_path / "out" / f"{prefix()}-failed.txt").read_text()
    assert failed.startswith("facts: ran out of time after ")


def test_page_has_the_result_of_each_step(tmp_path: Path) -> None:
    run_step("facts", tmp_path, small=True)
    codes = {"facts": "0", "tests": LEFT_OUT, "kernels": "124", "beam": "3"}
    status, failed = tmp_path / "status", tmp_path / f"{prefix()}-failed.txt"
    lines = "".join(f"{name}\t{code}\t7\t40\n" for name, code in codes.items())
    status.write_text(lines, encoding="utf-8")
    (tmp_path / "beam.log").write_text("first\n" * 40 + "ValueError: last\n", encoding="utf-8")
    page = summarise(status, tmp_path, tmp_path).read_text()
    for line in (
        "| facts | done | 7 | 40 |",
        "| tests | left out, pytest is not installed | 7 | 40 |",
        "| kernels | ran out of time | 7 | 40 |",
        "| beam | failed with exit code 3 | 7 | 40 |",
    ):
        assert line in page
    first, second = failed.read_text().split("\n\n")
    assert first == "kernels: ran out of time after 7 of 40 s\n(no output)"
    assert second.startswith("beam: failed with exit code 3 after 7 of 40 s\n")
    assert len(second.splitlines()) == 26
    assert second.endswith("ValueError: last\n")
    status.write_text("facts\t0\t7\t40\n", encoding="utf-8")
    summarise(status, tmp_path, tmp_path)
    assert not failed.exists()
