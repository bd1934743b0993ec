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
from genrec_shards.dataset import load_dataset
from places import ROOT
from two_ranks import environment

from genrec_dist.bench.gpu_check import (
    LEFT_OUT,
    MEASURED,
    foretold_bytes,
    memory_claim,
    prefix,
    run_step,
    summarise,
)
from genrec_dist.config.load import load_recipe
from genrec_dist.estimate.forecast import forecast

SCRIPT = ROOT / "launch" / "gpu_check.sh"
OTHER_TRAININGS = ("train-tiny-packed", "train-base", "train-base-packed")
# Not on the GPU machine; and nothing of ours is installed there either.
MISSING = ("polars", "webdataset", "pydantic", "deepspeed", "ray", "hypothesis")
BLOCKER = """
import os, sys
from importlib.machinery import PathFinder

blocked = set(os.environ["BLOCKED"].split(","))

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if blocked & {name, name.partition(".")[0]} else PathFinder.find_spec(name, path, target)

    invalidate_caches = PathFinder.invalidate_caches
    find_distributions = PathFinder.find_distributions

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path if "editable" not in repr(finder)]
# What an editable installation adds to the path.
sys.path[:] = [place for place in sys.path if place in os.environ["PYTHONPATH"].split(":") or "packages" in place or "lib" in place]
"""


def run_script(
    folder: Path, *arguments: str, blocked: tuple[str, ...] = MISSING, **more: str
) -> subprocess.CompletedProcess[str]:
    """The script, with packages that are simply not there."""
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    # Plugins of packages that are there after all would look for them past the blocker.
    own = environment(
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        PYTHON=sys.executable,
        PYTHONPATH=str(folder / "blocker"),
        BLOCKED=",".join(blocked),
        CUDA_VISIBLE_DEVICES="",
    )
    return subprocess.run(
        [SCRIPT, *arguments],
        env=own | more,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1900,
    )


def test_nothing_of_ours_is_installed_behind_the_blocker(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    for module in ("genrec_dist", "genrec_kernels", "webdataset"):
        own = environment(PYTHONPATH=str(tmp_path), BLOCKED=",".join(MISSING))
        command = [sys.executable, "-c", f"import {module}"]
        done = subprocess.run(
            command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert f"No module named '{module}'" in done.stderr


def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("launch/gpu_check.sh: no NVIDIA GPU for ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    wrong = subprocess.run([SCRIPT, "--fast"], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stderr) == (2, "usage: launch/gpu_check.sh [--cpu OUT]\n")


@pytest.mark.dist
@pytest.mark.slow
def test_the_steps_run_with_this_checkout_alone(tmp_path: Path) -> None:
    """One training of four: the others ask for the same modules."""
    out = tmp_path / "out"
    measured = [step for step in MEASURED if step not in OTHER_TRAININGS]
    steps = ["facts", "tests", *measured]
    own = {"GENREC_COMMIT": "0123456789ab", "GPU_CHECK_STEPS": " ".join(steps)}
    done = run_script(tmp_path, "--cpu", str(out), **own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()[:-1]) == sorted(
        [*steps, "summary"]
    )
    assert done.stdout.splitlines()[-1] == str(out / f"{prefix()}.md")
    written = {path.name.removeprefix(prefix()) for path in out.iterdir()}
    assert written == {".md", "-facts.json", *(f"-{step}.json" for step in measured)}
    facts = json.loads((out / f"{prefix()}-facts.json").read_text())
    assert set(MISSING) <= set(facts["not installed"])
    page = (out / f"{prefix()}.md").read_text()
    assert page.startswith(f"# CPU, {prefix()[:10]}, commit ")
    for step in measured:
        found = json.loads((out / f"{prefix()}-{step}.json").read_text())
        assert found["git"] == facts["commit"]
        assert f"| {step} | done |" in page
        assert f"## {step}" in page
    trained = json.loads((out / f"{prefix()}-train-tiny.json").read_text())
    assert trained["tokens a second"] > 0
    assert trained["steps"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("step", OTHER_TRAININGS)
def test_the_other_trainings_are_measured(step: str, tmp_path: Path) -> None:
    path = run_step(step, tmp_path, small=True)
    assert path.name == f"{prefix()}-{step}.json"
    trained = json.loads(path.read_text())
    assert trained["tokens a second"] > 0
    assert trained["steps"] >= 4
    changes = trained["changes to the recipe tiny"]
    assert f"packing={'packed' if step.endswith('packed') else 'padded'}" in changes
    assert ("finetune.targets=last" in changes) == ("base" in step)


def test_the_script_takes_every_step_there_is() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^measure (\S+) \d+$", text, re.M)) == sorted(["facts", *MEASURED])
    named = re.search(r"GPU_CHECK_STEPS:-([^}]*)}", text)
    assert named is not None
    assert sorted(named[1].split()) == sorted(["facts", "tests", *MEASURED])


@pytest.mark.dist
@pytest.mark.ranks
def test_a_step_that_fails_or_is_not_to_be_had_stops_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = {"GPU_CHECK_STEPS": "tests beam latency"}
    done = run_script(
        tmp_path,
        "--cpu",
        str(out),
        blocked=(*MISSING, "pytest", "genrec_dist.bench.beam_fixture"),
        **own,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tests: left out, pytest is not installed" in done.stdout
    assert "beam: failed with exit code 1" in done.stdout
    assert "latency: done" in done.stdout
    assert {path.name.removeprefix(prefix()) for path in out.iterdir()} == {
        ".md",
        "-latency.json",
        "-failed.txt",
    }
    told = (out / f"{prefix()}-failed.txt").read_text()
    assert told.startswith("beam: failed with exit code 1 after ")
    assert "No module named 'genrec_dist.bench.beam_fixture'" in told
    assert "| beam | failed with exit code 1 |" in (out / f"{prefix()}.md").read_text()


@pytest.mark.dist
def test_a_step_that_runs_out_of_time_says_so(tmp_path: Path) -> None:
    done = run_script(
        tmp_path, "--cpu", str(tmp_path / "out"), GPU_CHECK_STEPS="facts", GPU_CHECK_SECONDS="1"
    )
    assert done.returncode == 1
    assert done.stdout.startswith("facts: ran out of its 1 s\n")
    assert (
        (tmp_path / "out" / f"{prefix()}-failed.txt")
        .read_text()
        .startswith("facts: ran out of time after ")
    )


def test_the_page_tells_of_each_step(tmp_path: Path) -> None:
    run_step("facts", tmp_path, small=True)
    codes = {"facts": "0", "tests": LEFT_OUT, "kernels": "124", "beam": "3"}
    status = tmp_path / "status"
    status.write_text(
        "".join(f"{name}\t{code}\t7\t40\n" for name, code in codes.items()), encoding="utf-8"
    )
    (tmp_path / "beam.log").write_text("first\n" * 40 + "ValueError: last\n", encoding="utf-8")
    failed = tmp_path / f"{prefix()}-failed.txt"
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


def test_memory_is_set_beside_what_was_foretold(tiny_data: Path) -> None:
    recipe = load_recipe("tiny", [f"data={tiny_data}", "tokens.vocab_size=300"])
    foretold = foretold_bytes(recipe, 24.0)
    plan = forecast(recipe, memory_gib=24.0)
    assert len(load_dataset(tiny_data).sequences.item_ids) == plan.catalogue.items
    assert foretold == plan.fits[0].peak > plan.fits[0].state.total
    claim = memory_claim("tiny", 4 * foretold, foretold)
    assert (claim.ratio, claim.holds) == (0.25, False)
    assert memory_claim("tiny", foretold, foretold).holds


def test_the_script_names_no_path_of_this_machine() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert os.access(SCRIPT, os.X_OK)
