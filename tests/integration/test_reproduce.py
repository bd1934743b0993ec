"""`genrec reproduce` on a tiny set, with real trainings: both protocols, interrupted and gone on
with, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from places import ROOT
from tiny import TINY_RECIPE, tiny_log
from two_ranks import environment

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.distributed.deadline import Deadline
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.report.run_files import read_journal
from genrec_dist.reproduce.layout import Place
from genrec_dist.reproduce.published import METRICS, SETS, odd_sizes, published_rows
from genrec_dist.reproduce.result_rows import merge
from genrec_dist.reproduce.steps import recipe_of
from genrec_dist.reproduce.systems import SWITCHES, Choices, Trained, systems_of
from genrec_dist.reproduce.train_process import best_epoch, worked_seconds

SASREC = ["--sasrec", "d_model=8", "--sasrec", "epochs=2", "--sasrec", "validation_users=50"]
KNN = ["--knn", "window=4"]
LEAK_FREE = [
    "popularity",
    "counting",
    "repeat",
    "knn",
    "sasrec",
    "sasrec+knn",
    "best",
    "hybrid",
    "items",
]
PAPER = [
    "counting",
    "best",
    "own",
    "own-without-pretraining",
    "own-without-pretraining-equal-compute",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, a recipe with an item head and no pretraining, and one that pretrains."""
    place = tmp_path_factory.mktemp("reproduce")
    # Whole numbers, which the counting rule needs under `given`.
    (place / "log.txt").write_text(tiny_log().replace(" B", " "), encoding="utf-8")
    where = "data: data\nrun: run\ncheckpoint_every: 1\n"
    (place / "own.yaml").write_text(where + TINY_RECIPE, encoding="utf-8")
    head = TINY_RECIPE.replace("init_std", "item_loss: 1.0, init_std").replace(
        "pretrain: {epochs: 1", "pretrain: {epochs: 0"
    )
    assert head.count("item_loss") == head.count("epochs: 0") == 1
    (place / "head.yaml").write_text(where + head, encoding="utf-8")
    return place


def command(folder: Path, out: Path, *more: object) -> list[str]:
    recipes = ["--recipe", str(folder / "head.yaml"), "--paper-recipe", str(folder / "own.yaml")]
    return [
        "reproduce",
        "beauty",
        "--data",
        str(folder / "log.txt"),
        "--out",
        str(out),
        *recipes,
        *map(str, more),
    ]


def leak_free(folder: Path, out: Path, rows: list[str] = LEAK_FREE, *more: object) -> list[str]:
    systems = ["--systems", ",".join(rows)]
    return command(
        folder, out, "--protocol", "leak-free", "--seeds", 2, *systems, *SASREC, *KNN, *more
    )


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A directory in which both protocols have come to their end; read only."""
    out = folder / "done"
    assert (
        run_command(leak_free(folder, out, LEAK_FREE, "--publish", folder / "published.json")) == 0
    )
    assert (
        run_command(
            command(folder, out, "--protocol", "paper", "--seeds", 1, "--systems", ",".join(PAPER))
        )
        == 0
    )
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int = 1) -> str:
    capfd.readouterr()
    assert run_command(arguments) == code
    said = capfd.readouterr().err
    assert said.startswith("genrec: ")
    assert said.count("\n") == 1
    return said


def test_both_protocols_have_all_their_rows_in_the_shape_that_is_owed(done: Path) -> None:
    found = read(done / "quality.json")
    assert list(found) == ["beauty"]
    assert {protocol: sorted(rows) for protocol, rows in found["beauty"].items()} == {
        "leak-free": sorted(LEAK_FREE), "paper": sorted(PAPER),
    }  # fmt: skip
    for protocol, rows in found["beauty"].items():
        for name, scores in rows.items():
            assert list(scores) == list(METRICS)
            seeds = (
                2
                if protocol == "leak-free"
                and name in ("sasrec", "sasrec+knn", "best", "hybrid", "items")
                else 1
            )
            for score in scores.values():
                assert set(score) == {"mean", "std", "ci95"}
                assert (score["std"] is None) == (seeds == 1)
                assert score["ci95"][0] <= score["mean"] <= score["ci95"][1]


def test_a_row_is_the_mean_and_the_spread_of_its_seeds(done: Path) -> None:
    runs = [
        read(done / "leak-free" / "best" / f"seed-{seed}" / "metrics-test.json") for seed in (0, 1)
    ]
    score = read(done / "quality.json")["beauty"]["leak-free"]["best"]["HR@10"]
    values = [run["HR@10"] for run in runs]
    assert score["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert score["std"] == pytest.approx(statistics.stdev(values), abs=1e-6)
    assert score["ci95"][0] == pytest.approx(
        statistics.fmean(run["ci95"]["HR@10"][0] for run in runs), abs=1e-6
    )
    assert [run["recipe"]["seed"] for run in runs] == [0, 1]


def test_each_protocol_has_its_numbering_and_each_row_its_decoding(done: Path) -> None:
    told = read(done / "quality-runs.json")["beauty"]
    for protocol, numbering in (("leak-free", "random"), ("paper", "given")):
        assert {row["protocol"]["numbering"] for row in told[protocol].values()} == {numbering}
    decodings = {name: row["protocol"]["decode"] for name, row in told["leak-free"].items()}
    assert (decodings["best"], decodings["hybrid"], decodings["items"]) == (
        "exact",
        "hybrid",
        "items",
    )
    for rows in told.values():
        for row in rows.values():
            assert row["command"].startswith("genrec reproduce beauty --data log.txt")
            assert str(done.parent) not in json.dumps(row)
            assert all(run["hardware"]["cores"] and run["step_seconds"] >= 0 for run in row["runs"])
    best = told["leak-free"]["best"]["runs"][1]
    assert (best["seed"], best["best_epoch"], best["epochs"], best["validation_users"]) == (
        1,
        1,
        1,
        50,
    )
    assert best["train_seconds"] > 0


def test_the_weights_of_hybrid_are_those_that_validation_chose(done: Path) -> None:
    for seed in (0, 1):
        run = done / "leak-free" / "hybrid" / f"seed-{seed}"
        chosen, protocol = (
            read(run / mixture.FILE)["mixture"],
            read(run / "metrics-test.json")["protocol"],
        )
        assert protocol["item_weight"] == chosen["item_weight"]
        assert (protocol["graph"] or {"weight": 0})["weight"] == chosen["graph_weight"]
    # Its control has the model that stands as a row of its own.
    assert not list((done / "leak-free" / "sasrec+knn").rglob("*.safetensors"))


def test_the_ablation_trains_what_it_says(done: Path) -> None:
    epochs = {}
    for name in PAPER[2:]:
        recipe = load_recipe(done / "paper" / name / "seed-0" / "recipe.yaml")
        epochs[name.removeprefix("own")] = (recipe.pretrain.epochs, recipe.finetune.epochs)
    # An epoch of either stage takes about one sample a user: a second epoch of finetuning stands
    # for the one of pretraining.
    assert epochs == {
        "": (1, 1),
        "-without-pretraining": (0, 1),
        "-without-pretraining-equal-compute": (0, 2),
    }


def test_the_page_says_what_is_comparable_and_sets_the_paper_beside(
    done: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in done.rglob("metrics-test.json")}
    steps = (done / "steps.jsonl").read_bytes()
    quality = (done / "quality.json").read_bytes()
    assert (
        run_command(
            command(folder, done, "--protocol", "paper", "--seeds", 1, "--systems", ",".join(PAPER))
        )
        == 0
    )
    said = capfd.readouterr().out
    assert "120 users and 64 items here, 22,363 and 12,101 in the paper's Table 2" in said
    page = (done / "quality.md").read_text(encoding="utf-8")
    for text in (said, page):
        assert "GenRec, published" in text
        assert ".0515" in text
        assert "No row here is comparable with a leak-free one" in text
        assert "own (A) beside own-without-pretraining (B)" in text
        assert "trained through n-2" in text
        assert "they stand beside, unranked" in text
    assert "| own | n-2 | 1 | ." in page
    assert "| sasrec+knn | n-2 | 2 | ." in page  # by another call
    # Nothing was done anew: test is looked at once.
    assert {path: path.read_bytes() for path in before} == before
    assert (done / "steps.jsonl").read_bytes() == steps
    assert (done / "quality.json").read_bytes() == quality
    assert "[" not in [line[:1] for line in said.splitlines()]


def test_the_comparisons_and_the_report_are_there(done: Path) -> None:
    names = {path.name for path in (done / "leak-free").glob("compare-*.json")}
    assert names == {
        f"compare-{pair}.json"
        for pair in ("best-knn", "best-sasrec", "hybrid-sasrec+knn", "hybrid-best", "items-sasrec")
    }
    assert len(read(done / "leak-free" / "compare-best-sasrec.json")["b"]["runs"]) == 2
    assert (done / "leak-free" / "best" / "seed-0" / "report.html").is_file()
    # What has come to its end is not gone on with, and checkpoints are most of its bytes.
    assert not list(done.rglob("checkpoints/step-*"))


def test_published_rows_are_merged_and_others_kept(
    done: Path, folder: Path, tmp_path: Path
) -> None:
    published, ours = read(folder / "published.json"), read(done / "quality.json")
    assert published["beauty"]["leak-free"] == ours["beauty"]["leak-free"]
    assert (folder / "published-runs.json").is_file()
    path = tmp_path / "quality.json"
    path.write_text(
        json.dumps(
            {"sports": {"paper": {"knn": 1}}, "beauty": {"leak-free": {"knn": 1, "other": 2}}}
        )
    )
    merge(path, "beauty", {"leak-free": {"knn": {"new": 3}}, "paper": {"best": {}}})
    assert read(path) == {
        "sports": {"paper": {"knn": 1}},
        "beauty": {"leak-free": {"knn": {"new": 3}, "other": 2}, "paper": {"best": {}}},
    }


def signal_at_first_checkpoint(out: Path, stopped: threading.Event) -> None:
    """SIGTERM to this process, as a scheduler sends it, once a training has something to go on
    from."""
    while not stopped.is_set():
        if (
            list(out.rglob("checkpoints/step-*/state.json"))
            and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.005)


def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(
    done: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twelve epochs, cut off in the first training, against twelve in one go."""
    rows, long = ["knn", "best"], ["--set", "finetune.epochs=12"]
    arguments = leak_free(folder, tmp_path / "broken", rows, *long, "--seeds", 1)
    assert run_command([*arguments, "--minutes", "0"]) == 0
    assert (
        "0 minutes are over: 5 of 5 steps are left; the same command goes on"
        in capfd.readouterr().out
    )
    ended = threading.Event()
    watcher = threading.Thread(target=signal_at_first_checkpoint, args=(tmp_path / "broken", ended))
    watcher.start()
    try:
        code = run_command(arguments)
    finally:
        ended.set()
        watcher.join()
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capfd.readouterr().err
    run = tmp_path / "broken" / "leak-free" / "best" / "seed-0"
    assert read(run / "status.json")["status"] == "stopped"
    assert not (run / "metrics-test.json").exists()
    assert "best" not in (tmp_path / "broken" / "steps.jsonl").read_text()
    assert run_command(arguments) == 0
    starts = read_journal(run).of("start")
    assert [bool(start["resumed_from"]) for start in starts] == [False, True]
    assert (
        0
        < worked_seconds(run)
        < starts[1]["time"] - starts[0]["time"] + read_journal(run).of("end")[-1]["seconds"] + 60
    )
    assert run_command(leak_free(folder, tmp_path / "whole", rows, *long, "--seeds", 1)) == 0
    for name in ("quality.json", "leak-free/best/seed-0/top20-test.parquet"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_dry_run_lists_the_steps_and_writes_nothing(
    done: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_command(leak_free(folder, tmp_path / "none", ["knn", "best"], "--dry-run", "--refit"))
        == 0
    )
    said = capfd.readouterr().out
    assert "leak-free: best, seed 1: train" in said
    assert said.count("to do") == 7
    assert not (tmp_path / "none").exists()
    assert (
        run_command([*leak_free(folder, done, ["knn", "best", "best-n-1"]), "--refit", "--dry-run"])
        == 0
    )
    said = capfd.readouterr().out
    assert said.count("to do") == 4
    assert said.count("there") >= 7


def test_a_refit_takes_the_epochs_that_validation_chose(done: Path, folder: Path) -> None:
    """And keeps its last epoch: the validation targets are training targets."""
    choices = Choices(
        recipe=str(folder / "head.yaml"), refit=True, overrides=("finetune.epochs=9",)
    )
    recipe = load_recipe(folder / "head.yaml")
    systems = systems_of("leak-free", choices, recipe=recipe, paper=recipe, hybrid=recipe)
    (refit,) = [
        system for system in systems if isinstance(system, Trained) and system.name == "best-n-1"
    ]
    place = Place(done, folder / "log.txt", 2, Deadline(), print)
    found = recipe_of(place, "leak-free", refit, 1)
    assert found.trained_through == "n-1"
    assert found.finetune.epochs == best_epoch(done / "leak-free" / "best" / "seed-1") == 1
    assert (found.validation.every_epochs, found.validation.patience) == (1, 0)
    assert {system.trained_through for system in systems if system.name.endswith("-n-1")} == {"n-1"}
    assert {system.trained_through for system in systems if not system.name.endswith("-n-1")} == {
        "n-2"
    }


def test_the_readings_and_the_switches_are_rows_of_their_own() -> None:
    recipe = load_recipe("paper-tiny")
    choices = Choices(
        paper_recipe="paper-tiny",
        readings=("n-2", "n-1"),
        switches=True,
        overrides=("paper-tiny:seed=3", "best:seed=4"),
    )
    systems = {
        system.name: system
        for system in systems_of("paper", choices, recipe=recipe, paper=recipe, hybrid=recipe)
    }
    assert {f"paper-tiny+{switch}" for switch in SWITCHES} <= set(systems)
    later = systems["paper-tiny-without-pretraining-n-1"]
    assert isinstance(later, Trained)
    assert (later.trained_through, later.overrides) == ("n-1", ("seed=3", "pretrain.epochs=0"))
    for name, sets in SWITCHES.items():
        switched = systems[f"paper-tiny+{name}"]
        if isinstance(switched, Trained):
            assert load_recipe("paper-tiny", list(switched.overrides)) != load_recipe(
                "paper-tiny", ["seed=3"]
            ), sets


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--systems", "magic"], "--systems magic: no such row here; there are best, "),
        (["--paper-recipe", "absent"], "absent: no such recipe file"),
        (["--set", "model.d_modle=8"], "unknown key model.d_modle"),
        (["--data", "absent.txt"], "absent.txt: no such file"),
        (["--publish", "PAGE"], "not a table {dataset: {protocol: {system: ...}}}"),
    ],
)
def test_what_does_not_fit_is_one_line(
    more: list[str], said: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page").write_text("[]")
    arguments = [str(tmp_path / "page") if word == "PAGE" else word for word in more]
    assert said in refused(capfd, [*leak_free(folder, tmp_path / "out", ["knn"]), *arguments])
    assert not (tmp_path / "out" / "leak-free").exists()


def test_an_unknown_set_is_a_matter_of_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert "'books' is not one of" in refused(capfd, ["reproduce", "books", "--data", "x"], 2)


def test_what_is_there_has_to_be_what_is_asked_for(
    done: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, leak_free(folder, done, LEAK_FREE, "--set", "head:model.dropout=0.25"))
    assert "was trained with model.dropout 0.1, not 0.25: choose another --out" in line
    assert "d_model 8, not 4" in refused(
        capfd, leak_free(folder, done, LEAK_FREE, "--sasrec", "d_model=4")
    )
    assert "made with window 4, not 5" in refused(
        capfd, leak_free(folder, done, LEAK_FREE, "--knn", "window=5")
    )
    other = tmp_path / "log.txt"
    other.write_text((folder / "log.txt").read_text().replace("user-3 ", "user-x "))
    line = refused(capfd, [*leak_free(folder, done), "--data", str(other)])
    assert f"was made of another file than {other}" in line


def test_a_training_that_fails_says_why(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = leak_free(folder, tmp_path / "out", ["best"])
    assert run_command([*arguments, "--minutes", "0"]) == 0
    shutil.rmtree(tmp_path / "out")
    line = refused_late(capfd, [*arguments, "--set", "tokens.tokenizer=/absent"])
    assert (
        "best/seed-0: the training ended with exit code 1: tokens.tokenizer /absent: neither a directory"
        in line
    )


def refused_late(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """A refusal behind steps that have been told of."""
    capfd.readouterr()
    assert run_command(arguments) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    return said


def test_two_never_work_in_one_directory(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from genrec_shards.file_lock import hold

    with hold(tmp_path / "out" / ".lock", "somebody"):
        line = refused(capfd, leak_free(folder, tmp_path / "out", ["knn"]))
    assert "another genrec reproduce works in this directory" in line


def test_the_sizes_of_the_papers_sets() -> None:
    assert odd_sizes("beauty", 22_363, 12_101) is None
    assert odd_sizes("toys", 1, 1) is None
    assert "35,598 and 18,357" in str(odd_sizes("sports", 35_598, 18_358))
    assert not published_rows("toys")
    for name, found in SETS.items():
        rows = list(published_rows(name).values())
        assert (
            all(
                with_it >= without
                for with_it, without in zip(*(row.values() for row in rows), strict=True)
            )
            or not rows
        )
        assert (found.users is None) == (not rows)


# launch/reproduce_gpu.sh

SCRIPT = ROOT / "launch" / "reproduce_gpu.sh"


def run_script(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    own = environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="") | more
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env=own,
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=1900,
    )


def test_the_script_without_a_gpu_or_arguments_is_one_line(folder: Path, tmp_path: Path) -> None:
    done = run_script("beauty", folder / "log.txt", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("launch/reproduce_gpu.sh: no NVIDIA GPU for ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert (run_script("--cpu", "beauty").returncode, list(tmp_path.iterdir())) == (2, [])


@pytest.mark.ranks
def test_refits_readings_and_switches_are_trained_as_their_names_say(
    done: Path, folder: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(done, tmp_path / "more")
    refits = ["popularity-n-1", "knn-n-1", "sasrec-n-1", "best-n-1"]
    assert run_command(leak_free(folder, out, [*LEAK_FREE, *refits], "--refit")) == 0
    rows = read(out / "quality.json")["beauty"]["leak-free"]
    assert set(rows) == {*LEAK_FREE, *refits}
    for name in refits:
        found = sorted((out / "leak-free" / name).rglob("metrics-test.json"))
        assert len(found) == (1 if name.startswith(("popularity", "knn")) else 2)
        assert {read(path)["protocol"]["trained_through"] for path in found} == {"n-1"}
        assert rows[name] != rows[name.removesuffix("-n-1")]
    chosen = statistics.median(
        best_epoch(out / "leak-free" / "best" / f"seed-{seed}") for seed in (0, 1)
    )
    epochs = {
        load_recipe(str(path)).finetune.epochs
        for path in (out / "leak-free" / "best-n-1").rglob("recipe.yaml")
    }
    assert epochs == {math.ceil(chosen)} or epochs == {math.floor(chosen)}

    own = ["own", "own-n-1", "own+mask-last-biased", "own+free-decoding"]
    asked = [
        "--protocol",
        "paper",
        "--seeds",
        1,
        "--readings",
        "both",
        "--switches",
        "--systems",
        ",".join(own),
    ]
    assert run_command(command(folder, out, *asked)) == 0
    rows = read(out / "quality.json")["beauty"]["paper"]
    assert set(own) <= set(rows)
    place = out / "paper"
    reading = load_recipe(str(place / "own-n-1" / "seed-0" / "recipe.yaml"))
    assert reading.trained_through == "n-1"
    assert (
        load_recipe(
            str(place / "own+mask-last-biased" / "seed-0" / "recipe.yaml")
        ).pretrain.mask.strategy
        == "last-biased"
    )
    free = read(place / "own+free-decoding" / "seed-0" / "metrics-test.json")
    assert (free["protocol"]["decode"], free["protocol"]["beam"]) == ("free", 21)


@pytest.mark.dist
@pytest.mark.ranks
def test_killed_its_training_saves_and_ends_too(folder: Path, tmp_path: Path) -> None:
    """SIGKILL leaves nobody to tell the training: it notices, and what comes next finds a
    checkpoint and no other at work."""
    out = tmp_path / "out"
    arguments = leak_free(folder, out, ["best"], "--set", "finetune.epochs=400")
    alone = forked.Started(
        ["-m", "genrec_dist.cli", *arguments],
        tmp_path / "out.txt",
        tmp_path / "err.txt",
        environment(),
    )
    run = out / "leak-free" / "best" / "seed-0"
    try:
        wait_for(lambda: bool(list(run.glob("checkpoints/step-*/state.json"))))
    finally:
        alone.kill()
    wait_for(lambda: read(run / "status.json")["status"] != "running")
    assert read(run / "status.json")["status"] == "stopped"
    assert run_command([*arguments, "--minutes", "0"]) == 0


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.dist
@pytest.mark.slow
def test_the_script_works_in_slices_that_go_on(folder: Path, tmp_path: Path) -> None:
    own = ["--cpu", "beauty", folder / "log.txt", tmp_path / "out", "--protocol", "paper"]
    over = run_script(*own, SLICE_MINUTES="0", TOTAL_MINUTES="0.01")
    assert over.returncode == 3, over.stderr
    assert "steps are left; the same command goes on" in over.stdout
    failed = run_script(*own, "--systems", "magic")
    assert failed.returncode == 1
    assert "--systems magic: no such row here" in failed.stderr
    done = run_script(*own)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "out" / "quality.json")["beauty"]["paper"]
    assert list(rows) == [
        "popularity",
        "counting",
        "knn",
        "best",
        "paper-tiny",
        "paper-tiny-without-pretraining",
    ]
