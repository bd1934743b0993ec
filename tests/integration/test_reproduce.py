"""`genrec reproduce` on a tiny set, with real trainings: both protocols, what it writes, and what it
refuses."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from genrec_shards.file_lock import LOCK_FILE, hold
from genrec_shards.sequences import read_sequences
from reproductions import (
    LEAK_FREE,
    OWN,
    PAPER,
    RULES,
    SETTINGS,
    command,
    leak_free,
    paper,
    read,
    refused,
    write_folder,
    write_titled,
)

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import METRICS
from genrec_dist.reproduce.published import SETS, size_difference
from genrec_dist.reproduce.result_rows import merge
from genrec_dist.reproduce.steps import recipe_of
from genrec_dist.reproduce.systems import SWITCHES, Options, systems_of, without_directory
from genrec_dist.reproduce.train_process import best_epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def titled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_titled(tmp_path_factory.mktemp("titled"))


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A directory in which both protocols have come to their end; read only."""
    out, published = folder / "done", folder / "published.json"
    assert run_command(leak_free(folder, out, LEAK_FREE, "--publish", published)) == 0
    assert run_command(paper(folder, out)) == 0
    return out


def test_tables_hold_the_mean_and_spread_of_all_rows(done: Path) -> None:
    found = read(done / "quality.json")
    assert list(found) == ["beauty"]
    rows = {protocol: sorted(table) for protocol, table in found["beauty"].items()}
    assert rows == {"leak-free": sorted(LEAK_FREE), "paper": sorted(PAPER)}
    for protocol, table in found["beauty"].items():
        for name, scores in table.items():
            assert list(scores) == list(METRICS)
            for score in scores.values():
                assert set(score) == {"mean", "std", "ci95"}
                assert (score["std"] is None) == (protocol == "paper" or name in RULES)
                assert score["ci95"][0] <= score["mean"] <= score["ci95"][1]
    best = done / "leak-free" / "best"
    runs = [read(best / f"seed-{seed}" / "metrics-test.json") for seed in (0, 1)]
    score = found["beauty"]["leak-free"]["best"]["HR@10"]
    values = [run["HR@10"] for run in runs]
    assert score["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert score["std"] == pytest.approx(statistics.stdev(values), abs=1e-6)
    lows = [run["ci95"]["HR@10"][0] for run in runs]
    assert score["ci95"][0] == pytest.approx(statistics.fmean(lows), abs=1e-6)
    assert [run["recipe"]["seed"] for run in runs] == [0, 1]


def test_runs_file_says_how_each_row_came_about(done: Path) -> None:
    found = read(done / "quality-runs.json")["beauty"]
    for protocol, numbering in (("leak-free", "random"), ("paper", "given")):
        assert {row["protocol"]["numbering"] for row in found[protocol].values()} == {numbering}
    for name, mode in (("best", "exact"), ("auto", "hybrid"), ("items", "items")):
        assert found["leak-free"][name]["protocol"]["decode"] == mode
    for row in (row for table in found.values() for row in table.values()):
        assert row["command"].startswith("genrec reproduce beauty --data log.txt")
        assert str(done.parent) not in json.dumps(row)
        assert all(run["hardware"]["cores"] and run["step_seconds"] >= 0 for run in row["runs"])
    best = found["leak-free"]["best"]["runs"][1]
    keys = ("seed", "best_epoch", "epochs", "validation_users")
    assert [best[key] for key in keys] == [1, 1, 1, 50]
    assert best["train_seconds"] > 0


def test_the_weights_of_hybrid_are_those_that_validation_chose(done: Path) -> None:
    for seed in (0, 1):
        run = done / "leak-free" / "hybrid" / f"seed-{seed}"
        chosen = read(run / mixture.FILE)["mixture"]
        protocol = read(run / "metrics-test.json")["protocol"]
        assert protocol["item_weight"] == chosen["item_weight"]
        assert (protocol["graph"] or {"weight": 0})["weight"] == chosen["graph_weight"]
    # Its control mixes the model that is a row of its own.
    assert not list((done / "leak-free" / "sasrec+knn").rglob("*.safetensors"))


def test_the_ablation_trains_what_it_says(done: Path) -> None:
    epochs = []
    for name in OWN:
        recipe = load_recipe(done / "paper" / name / "seed-0" / "recipe.yaml")
        epochs.append((recipe.pretrain.epochs, recipe.finetune.epochs))
    # An epoch of either stage has about one sample per user: a second epoch of finetuning costs as
    # much as the one of pretraining.
    assert epochs == [(1, 1), (0, 1), (0, 2)]


def test_a_finished_command_only_prints_and_says_what_is_comparable(
    done: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [*done.rglob("metrics-test.json"), done / "steps.jsonl", done / "quality.json"]
    before = {path: path.read_bytes() for path in paths}
    assert run_command(paper(folder, done)) == 0
    printed = capfd.readouterr().out
    assert "120 users and 64 items here, 22,363 and 12,101 in the paper's Table 2" in printed
    page = (done / "quality.md").read_text(encoding="utf-8")
    for text in (printed, page):
        for words in (
            "GenRec, published",
            ".0515",
            "No row here is comparable with a leak-free one",
            "own (A) beside own-without-pretraining (B)",
            "trained through n-2",
            "not ranked with ours",
        ):
            assert words in text
    assert "| own | n-2 | 1 | ." in page
    assert "| sasrec+knn | n-2 | 2 | ." in page  # by another call
    # Test is looked at once.
    assert {path: path.read_bytes() for path in before} == before
    assert not any(line.startswith("[") for line in printed.splitlines())


def test_comparisons_report_and_no_checkpoints_are_left(done: Path) -> None:
    pairs = {path.stem for path in (done / "leak-free").glob("compare-*.json")}
    names = {"best-knn", "best-sasrec", "hybrid-sasrec+knn", "hybrid-best", "items-sasrec"}
    names |= {"auto-sasrec+knn", "auto-knn"}
    assert pairs == {f"compare-{name}" for name in names}
    assert len(read(done / "leak-free" / "compare-best-sasrec.json")["b"]["runs"]) == 2
    assert (done / "leak-free" / "best" / "seed-0" / "report.html").is_file()
    assert not list(done.rglob("checkpoints/step-*"))


def test_published_rows_are_merged_and_others_kept(
    done: Path, folder: Path, tmp_path: Path
) -> None:
    published, ours = read(folder / "published.json"), read(done / "quality.json")
    assert published["beauty"]["leak-free"] == ours["beauty"]["leak-free"]
    assert (folder / "published-runs.json").is_file()
    path, sports = tmp_path / "quality.json", {"paper": {"knn": 1}}
    beauty: dict[str, Any] = {"leak-free": {"knn": 1, "other": 2}}
    path.write_text(json.dumps({"sports": sports, "beauty": beauty}))
    merge(path, "beauty", {"leak-free": {"knn": {"new": 3}}, "paper": {"best": {}}})
    beauty = {"leak-free": {"knn": {"new": 3}, "other": 2}, "paper": {"best": {}}}
    assert read(path) == {"sports": sports, "beauty": beauty}


def test_a_dry_run_lists_the_steps_and_writes_nothing(
    done: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = ["knn", "best"]
    assert run_command(leak_free(folder, tmp_path / "none", rows, "--dry-run", "--refit")) == 0
    printed = capfd.readouterr().out
    assert "leak-free: best, seed 1: train" in printed
    assert printed.count("to do") == 7
    assert not (tmp_path / "none").exists()
    assert run_command(leak_free(folder, done, [*rows, "best-n-1"], "--refit", "--dry-run")) == 0
    printed = capfd.readouterr().out
    assert printed.count("to do") == 4
    assert printed.count("done") >= 7


def test_a_refit_takes_the_epochs_that_validation_chose_and_keeps_its_last(
    done: Path, folder: Path
) -> None:
    options = Options(
        name="beauty",
        data=folder / "log.txt",
        out=done,
        seeds=2,
        recipe=str(folder / "head.yaml"),
        paper_recipe="paper-tiny",
        refit=True,
        overrides=("finetune.epochs=9",),
    )
    systems = systems_of("leak-free", options, pretrains=True, item_head=True)
    (refit,) = [system for system in systems if system.name == "best-n-1"]
    found = recipe_of(options, "leak-free", refit, 1)
    assert found.trained_through == "n-1"
    assert found.finetune.epochs == best_epoch(done / "leak-free" / "best" / "seed-1") == 1
    assert (found.validation.every_epochs, found.validation.patience) == (1, 0)
    for system in systems:
        assert system.through == ("n-1" if system.name.endswith("-n-1") else "n-2")


def test_a_refit_takes_the_median_of_the_seeds_best_epochs(tmp_path: Path, folder: Path) -> None:
    """Runs as training leaves them, of which validation chose the epochs 1, 5 and 2."""
    options = Options(
        name="beauty",
        data=folder / "log.txt",
        out=tmp_path,
        seeds=3,
        recipe=str(folder / "head.yaml"),
        paper_recipe="paper-tiny",
        refit=True,
    )
    systems = systems_of("leak-free", options, pretrains=True, item_head=True)
    (trained,) = [each for each in systems if each.name == "best"]
    for run, best in zip(options.runs("leak-free", trained), (1, 5, 2), strict=True):
        (run / "best").mkdir(parents=True)
        (run / "best" / "config.json").write_text("{}")
        (run / "status.json").write_text(json.dumps({"status": "finished", "best_step": 10 * best}))
        lines = [
            {"event": "validation", "stage": "finetune", "epoch": epoch - 1, "step": 10 * epoch}
            for epoch in range(1, 7)
        ]
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (refit,) = [system for system in systems if system.name == "best-n-1"]
    assert recipe_of(options, "leak-free", refit, 1).finetune.epochs == 2


def test_readings_and_switches_are_rows_of_their_own(folder: Path) -> None:
    options = Options(
        name="beauty",
        data=folder / "log.txt",
        out=folder,
        paper_recipe="paper-tiny",
        readings=("n-2", "n-1"),
        switches=True,
        overrides=("paper-tiny:seed=3", "best:seed=4"),
    )
    found = systems_of("paper", options, pretrains=True, item_head=False)
    systems = {system.name: system for system in found}
    later = systems["paper-tiny-without-pretraining-n-1"]
    assert (later.through, later.settings) == ("n-1", ("seed=3", "pretrain.epochs=0"))
    plain = load_recipe("paper-tiny", ["seed=3"])
    for name, sets in SWITCHES.items():
        switched = systems[f"paper-tiny+{name}"]
        if sets:
            assert load_recipe("paper-tiny", list(switched.settings)) != plain, name
    assert (switched.kind, switched.mode, switched.beam) == ("ranked", "free", 21)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--systems", "magic"],
            "--systems magic: no such row here; there are auto, auto-decoder, best, ",
        ),
        (["--paper-recipe", "absent"], "absent: no such recipe file"),
        (["--set", "model.d_modle=8"], "unknown key model.d_modle"),
        (["--set", "autos:seed=1"], "no row is of recipe autos: auto, "),
        (["--data", "absent.txt"], "absent.txt: no such file"),
        (["--publish", "PAGE"], "not a table {dataset: {protocol: {system: ...}}}"),
    ],
)
def test_what_does_not_fit_is_one_line(
    more: list[str], message: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page").write_text("[]")
    arguments = [str(tmp_path / "page") if word == "PAGE" else word for word in more]
    assert message in refused(capfd, leak_free(folder, tmp_path / "out", ["knn"], *arguments))
    assert not (tmp_path / "out" / "leak-free").exists()


def test_the_rows_with_texts_and_their_control_see_the_same(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "items.csv", tmp_path / "out"
    items = sorted(read_sequences(folder / "log.txt").item_ids)
    lines = [f"{item},word{number % 5} thing{number % 3}" for number, item in enumerate(items)]
    table.write_text("\n".join(["item,text", *lines]) + "\n", encoding="utf-8")
    rows = ["graph+text", "sasrec-text", "sasrec-text+graph+text", "auto-text-decoder", "auto-text"]
    words = ["--items", table, "--seeds", 1, "--systems", ",".join(rows)]
    words += [*SETTINGS.split(), "--set", "auto:finetune.distill.weight=0.25"]
    assert run_command(command(folder, out, *words)) == 0
    found = read(out / "quality-runs.json")["beauty"]["leak-free"]
    assert sorted(found) == sorted(rows)
    for row in ("auto-text", "sasrec-text+graph+text", "graph+text"):
        assert found[row]["protocol"]["graph"]["text"] is not None, row
    decoder = load_recipe(out / "leak-free" / "auto-text-decoder" / "seed-0" / "recipe.yaml")
    control = read(out / "leak-free" / "sasrec-text" / "seed-0" / "metrics-test.json")["recipe"]
    assert control["item_text"] == decoder.model.item_text == "add"
    assert control["init_items"] == decoder.model.init_items == "cooccurrence"
    assert control["distill"] == decoder.as_dict()["finetune"]["distill"]
    assert control["distill"]["weight"] == 0.25
    names = ["auto-text-decoder-sasrec-text", "auto-text-sasrec-text+graph+text"]
    for name in [*names, "auto-text-graph+text"]:
        assert (out / "leak-free" / f"compare-{name}.json").is_file()

    assert "was made with texts of another file" in refused(capfd, command(folder, out))
    for value in ("auto", "0"):
        more = ["--items", table, "--set", f"auto:finetune.distill.weight={value}"]
        line = refused(capfd, command(folder, out, *more))
        assert "the row auto-text and its control have model.item_text=add and finetune" in line
    line = refused(capfd, command(folder, out, "--items", table, "--protocol", "paper"))
    assert "the paper's protocol has no texts" in line


def test_the_rows_with_soft_targets_and_their_control_see_the_same(
    folder: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "out", ["sasrec-soft", "auto-soft-decoder", "auto-soft"]
    words = ["--protocol", "leak-free", "--seeds", 1, "--systems", ",".join(rows)]
    assert run_command(command(folder, out, *words, *SETTINGS.split())) == 0
    place = out / "leak-free"
    decoder = load_recipe(place / "auto-soft-decoder" / "seed-0" / "recipe.yaml")
    control = read(place / "sasrec-soft" / "seed-0" / "metrics-test.json")["recipe"]
    assert control["init_items"] == decoder.model.init_items == "cooccurrence"
    assert control["item_text"] == decoder.model.item_text == "none"
    assert control["distill"] == decoder.as_dict()["finetune"]["distill"]
    assert control["distill"]["weight"] == 0.5
    assert (place / "compare-auto-soft-decoder-sasrec-soft.json").is_file()
    # A recipe that cannot have them is refused for these rows alone.
    without = ["--dry-run", "--set", "auto:finetune.targets=every-prefix", "--systems"]
    assert run_command(command(folder, tmp_path / "other", *without, "knn,auto-decoder")) == 0
    assert run_command(command(folder, tmp_path / "other", *without, "auto-soft")) == 1


@pytest.mark.ranks
def test_a_language_model_is_listed_as_it_is_and_trained_by_adapters(
    titled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backbone, out = titled / "backbone", tmp_path / "out"
    words = ["reproduce", "beauty", "--data", titled / "log.txt", "--out", out, "--any-size"]
    words += ["--llama", backbone, "--seeds", 1, "--systems", "knn,llama-untrained,llama"]
    own = ["prompt.max_titles=5", "model.max_tokens=80"]
    for setting in (*own, "finetune.epochs=2", "finetune.learning_rate=0.05"):
        words += ["--set", f"llama:{setting}"]
    line = refused(capfd, list(map(str, words)))
    assert "--llama: the titles that it reads are needed: give --items as well" in line
    words += ["--items", titled / "items.csv"]
    assert run_command(list(map(str, words))) == 0
    text = (out / "quality-runs.json").read_text()
    assert str(titled) not in text
    found = json.loads(text)["beauty"]["leak-free"]
    assert sorted(found) == ["knn", "llama", "llama-untrained"]
    assert [found[name]["runs"][0]["epochs"] for name in ("llama-untrained", "llama")] == [0, 2]
    for name in ("llama-untrained", "llama"):
        assert found[name]["users"] == 90
        assert found[name]["settings"][0] == "model.backbone=backbone"
    runs = {name: out / "leak-free" / name / "seed-0" for name in found}
    assert not (runs["llama-untrained"] / "best" / "adapter").exists()
    assert (runs["llama"] / "best" / "adapter").is_dir()
    before, after = (found[name]["runs"][0]["test"] for name in ("llama-untrained", "llama"))
    assert before != after
    assert (out / "leak-free" / "compare-llama-llama-untrained.json").is_file()


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("--llama", "--llama"),
        ("/models/smollm2", "smollm2"),
        ("../log.txt", "log.txt"),
        ("llama:model.backbone=HERE/x", "llama:model.backbone=x"),
        ("model.backbone=owner/name", "model.backbone=owner/name"),
        ('prompt.template="Seen:\\n{history}/\\n"' + "x" * 300, None),
    ],
)
def test_what_is_written_of_a_command_has_no_directories(
    word: str, written: str | None, tmp_path: Path
) -> None:
    (tmp_path / "x").touch()
    word = word.replace("HERE", str(tmp_path))
    assert without_directory(word) == (word if written is None else written)


def test_usage_and_a_directory_in_use_are_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "'books' is not one of" in refused(capfd, ["reproduce", "books", "--data", "x"], 2)
    with hold(tmp_path / "out" / ".lock", "somebody"):
        line = refused(capfd, leak_free(folder, tmp_path / "out", ["knn"]))
    assert "another genrec reproduce works in this directory" in line


def test_a_file_of_other_sizes_is_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = leak_free(folder, tmp_path / "out", ["knn"])
    arguments.remove("--any-size")
    line = refused(capfd, arguments)
    sequences = read_sequences(folder / "log.txt")
    found = f"{sequences.num_users} users and {sequences.num_items} items here"
    assert f"log.txt: beauty has {found}, 22,363 and 12,101 in the paper's Table 2" in line
    assert "go on with --any-size" in line
    assert not (tmp_path / "out" / "leak-free").exists()
    assert run_command([*arguments, "--dry-run"]) == 0
    assert found in " ".join(capfd.readouterr().out.split())


def test_what_exists_has_to_be_what_is_requested(
    done: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "log.txt"
    other.write_text((folder / "log.txt").read_text().replace("user-3 ", "user-x "))
    for more, message in (
        (["--set", "head:model.dropout=0.25"], "with model.dropout 0.1, not 0.25: choose another"),
        (["--sasrec", "d_model=4"], "was made with d_model 8, not 4: choose another --out"),
        (["--knn", "window=5"], "was made with window 4, not 5: choose another --out"),
        (["--data", str(other)], f"was made of another file than {other}"),
    ):
        assert message in refused(capfd, leak_free(folder, done, LEAK_FREE, *more))


def test_a_training_that_fails_says_why(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = leak_free(folder, tmp_path, ["best"], "--set", "tokens.tokenizer=/absent")
    assert (
        "best/seed-0: the training ended with exit code 1: tokens.tokenizer /absent: neither"
        in (refused(capfd, arguments))
    )


def test_a_run_that_another_process_trains_is_left_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "leak-free" / "best" / "seed-0"
    with hold(run / LOCK_FILE, "I"):
        line = refused(capfd, leak_free(folder, tmp_path, ["best"]))
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    assert f"exit code 1: {run}/.lock: another process trains this run (process " in line


def test_the_sizes_of_the_papers_sets() -> None:
    assert size_difference("beauty", 22_363, 12_101) is None
    assert size_difference("toys", 1, 1) is None
    assert "35,598 and 18,357" in str(size_difference("sports", 35_598, 18_358))
    for found in SETS.values():
        if found is not None:
            pairs = zip(found.pretrained, found.without, strict=True)
            assert all(with_it >= without for with_it, without in pairs)


# Side by side


def test_side_by_side_finds_what_one_after_the_other_finds(
    done: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = ["knn", "sasrec", "best", "hybrid"]
    assert run_command(leak_free(folder, tmp_path / "out", rows, "--parallel", "3")) == 0
    printed = capfd.readouterr().out
    for name in ("best, seed 0: train: epoch 1 of 1", "best, seed 1: train: begins"):
        assert f"leak-free: {name}" in printed
    # No look at test before all seeds are trained, and no step twice.
    begun = [line for line in printed.splitlines() if line.endswith(": begins")]
    assert len(set(begun)) == len(begun) == 2 + 1 + 2 + 2 + 2 + 2 + 2
    trained = [place for place, line in enumerate(begun) if ": train" in line]
    assert max(trained) < begun.index("leak-free: best, seed 0: test: begins")
    expected, found = (
        read(out / "quality.json")["beauty"]["leak-free"] for out in (done, tmp_path / "out")
    )
    assert found == {name: expected[name] for name in rows}
    for path in sorted((tmp_path / "out" / "leak-free").rglob("top20-test.parquet")):
        same = done / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == same.read_bytes(), path
    steps = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    assert len(steps) == len(begun)


def test_one_that_fails_leaves_out_what_needs_it_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "head:tokens.tokenizer=/absent", "--parallel", "2"]
    line = refused(capfd, leak_free(folder, tmp_path, ["knn", "best"], *arguments))
    assert line.startswith(
        "genrec: 2 of 7 steps failed, 2 need them: leak-free: best, seed 0: train"
    )
    assert "tokens.tokenizer /absent: neither" in line
    assert line.endswith("; the others are done, and the same command goes on\n")
    assert list(read(tmp_path / "quality.json")["beauty"]["leak-free"]) == ["knn"]


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
    best = [best_epoch(out / "leak-free" / "best" / f"seed-{seed}") for seed in (0, 1)]
    recipes = (out / "leak-free" / "best-n-1").rglob("seed-*/recipe.yaml")
    epochs = {load_recipe(path).finetune.epochs for path in recipes}
    assert epochs == {statistics.median_low(best)}

    own = ["own", "own-n-1", "own+mask-last-biased", "own+free-decoding"]
    assert run_command(paper(folder, out, own, "--readings", "both", "--switches")) == 0
    assert set(own) <= set(read(out / "quality.json")["beauty"]["paper"])
    recipes = {name: out / "paper" / name / "seed-0" / "recipe.yaml" for name in own}
    assert load_recipe(recipes["own-n-1"]).trained_through == "n-1"
    masked = load_recipe(recipes["own+mask-last-biased"])
    assert masked.pretrain.mask.strategy == "last-biased"
    free = read(out / "paper" / "own+free-decoding" / "seed-0" / "metrics-test.json")["protocol"]
    assert (free["decode"], free["beam"]) == ("free", 21)


def test_an_automatic_precision_is_the_one_that_the_run_has(tmp_path: Path) -> None:
    from genrec_dist.reproduce.steps import _check_recipe

    requested = load_recipe("best", [f"data={tmp_path}", f"run={tmp_path}"])
    assert requested.precision == "auto"
    for kept in ("fp32", "bf16"):
        held = replace(requested, precision=kept)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(held))
        _check_recipe(tmp_path, requested)
    with pytest.raises(ValueError, match="precision"):
        _check_recipe(tmp_path, replace(requested, precision="fp32"))
