"""`genrec reproduce` that is interrupted or killed goes on, and `launch/reproduce_gpu.sh` works in
slices that do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from places import ROOT
from reproductions import leak_free, read, write_folder, write_titled
from two_ranks import environment

from genrec_dist.cli.app import run_command
from genrec_dist.report.run_files import read_run_files
from genrec_dist.reproduce.train_process import worked_seconds

SCRIPT = ROOT / "launch" / "reproduce_gpu.sh"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def titled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_titled(tmp_path_factory.mktemp("titled"))


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def signal_at_first_checkpoint(out: Path, stopped: threading.Event) -> None:
    """SIGTERM to this process, as a scheduler sends it, once a training has something to resume
    from."""
    while not stopped.is_set():
        begun = list(out.rglob("checkpoints/step-*/state.json"))
        if begun and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.005)


@pytest.mark.ranks
def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twelve epochs, cut off in the first training, against twelve in one go."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    rows, long = ["knn", "best"], ["--set", "finetune.epochs=12", "--seeds", 1]
    arguments = leak_free(folder, broken, rows, *long)
    assert run_command([*arguments, "--minutes", "0"]) == 0
    left = "0 minutes are over: 5 of 5 steps are left; the same command goes on"
    assert left in capfd.readouterr().out
    ended = threading.Event()
    watcher = threading.Thread(target=signal_at_first_checkpoint, args=(broken, ended))
    watcher.start()
    try:
        code = run_command(arguments)
    finally:
        ended.set()
        watcher.join()
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capfd.readouterr().err
    run = broken / "leak-free" / "best" / "seed-0"
    assert read(run / "status.json")["status"] == "stopped"
    assert not (run / "metrics-test.json").exists()
    assert "best" not in (broken / "steps.jsonl").read_text()
    assert run_command(arguments) == 0
    files = read_run_files(run)
    starts, end = files.of("start"), files.of("end")[-1]
    assert [bool(start["resumed_from"]) for start in starts] == [False, True]
    most = starts[1]["time"] - starts[0]["time"] + end["seconds"] + 60
    assert 0 < worked_seconds(run) < most
    assert run_command(leak_free(folder, whole, rows, *long)) == 0
    for name in ("quality.json", "leak-free/best/seed-0/top20-test.parquet"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.ranks
@pytest.mark.dist
def test_an_interrupt_ends_all_that_work_side_by_side(folder: Path, tmp_path: Path) -> None:
    arguments = leak_free(folder, tmp_path / "out", ["best"], "--set", "finetune.epochs=400")
    process = subprocess.Popen(
        [sys.executable, "-m", "genrec_dist.cli", *arguments, "--parallel", "2"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    runs = [tmp_path / "out" / "leak-free" / "best" / f"seed-{seed}" for seed in (0, 1)]
    try:
        wait_for(lambda: all(list(run.glob("checkpoints/step-*/state.json")) for run in runs))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("genrec: stopped by SIGINT")
    for run in runs:
        assert read(run / "status.json")["status"] == "stopped"


@pytest.mark.dist
@pytest.mark.ranks
def test_killed_its_training_saves_and_ends_too(folder: Path, tmp_path: Path) -> None:
    """SIGKILL leaves nobody to tell the training: it notices, and what comes next finds a
    checkpoint and no other at work."""
    arguments = leak_free(folder, tmp_path / "out", ["best"], "--set", "finetune.epochs=400")
    words, outputs = ["-m", "genrec_dist.cli", *arguments], (tmp_path / "o", tmp_path / "e")
    alone = forked.Started(words, *outputs, environment())
    run = tmp_path / "out" / "leak-free" / "best" / "seed-0"
    try:
        wait_for(lambda: bool(list(run.glob("checkpoints/step-*/state.json"))))
    finally:
        alone.kill()
    wait_for(lambda: read(run / "status.json")["status"] != "running")
    assert read(run / "status.json")["status"] == "stopped"
    assert run_command([*arguments, "--minutes", "0"]) == 0


# launch/reproduce_gpu.sh


def run_script(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    own = environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="") | more
    words, options = [SCRIPT, *map(str, arguments)], {"cwd": SCRIPT.parent, "env": own}
    return subprocess.run(words, **options, capture_output=True, text=True, timeout=1900)  # type: ignore[call-overload, no-any-return]


def assert_no_gpu(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith("launch/reproduce_gpu.sh: no NVIDIA GPU for ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_the_script_without_a_gpu_or_arguments_is_one_line(folder: Path, tmp_path: Path) -> None:
    # An interpreter that fails is as one whose torch sees no GPU; with torch in the slow test.
    assert_no_gpu(run_script("beauty", folder / "log.txt", tmp_path / "out", PYTHON="/bin/false"))
    for few in (["beauty"], ["llama", "backbone", "items.csv", "beauty", "log.txt"]):
        said = run_script("--cpu", *few)
        assert (said.returncode, list(tmp_path.iterdir())) == (2, [])
        assert said.stderr.startswith("usage: launch/reproduce_gpu.sh")


@pytest.mark.dist
@pytest.mark.slow
def test_the_script_works_in_slices_that_go_on(folder: Path, tmp_path: Path) -> None:
    assert_no_gpu(run_script("beauty", folder / "log.txt", tmp_path / "out"))
    own = [
        "--cpu",
        "beauty",
        folder / "log.txt",
        tmp_path / "out",
        "--any-size",
        "--protocol",
        "paper",
    ]
    over = run_script(*own, SLICE_MINUTES="0", TOTAL_MINUTES="0.01")
    assert over.returncode == 3, over.stderr
    assert "steps are left; the same command goes on" in over.stdout
    failed = run_script(*own, "--systems", "magic")
    assert failed.returncode == 1
    assert "--systems magic: no such row here" in failed.stderr
    done = run_script(*own)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "out" / "quality.json")["beauty"]["paper"]
    names = ["popularity", "counting", "knn", "best", "paper-tiny"]
    assert list(rows) == [*names, "paper-tiny-without-pretraining"]


@pytest.mark.dist
@pytest.mark.slow
def test_the_script_makes_the_rows_of_a_language_model(titled: Path, tmp_path: Path) -> None:
    words = ["llama", titled / "backbone", titled / "items.csv", "beauty", titled / "log.txt"]
    small = ["--set", "llama:model.max_tokens=80", "--set", "llama:prompt.max_titles=5"]
    done = run_script("--cpu", *words, tmp_path / "out", "--any-size", *small)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "out" / "quality.json")["beauty"]["leak-free"]
    assert list(rows) == ["popularity", "knn", "graph+text", "llama-untrained", "llama"]
