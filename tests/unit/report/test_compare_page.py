"""The page of several runs: its figures are those of `compare`, its curves those of the events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.synthetic import make_process
from html_page import Page

from genrec_dist.baselines.run import run_baseline
from genrec_dist.cli.app import run_command
from genrec_dist.evaluation.compare import compare
from genrec_dist.report.compare_page import write_comparison
from genrec_dist.report.svg import Dot, dot_chart, score, signed_score

RECIPE = "data: d\nrun: r\nseed: {seed}\nfinetune: {{epochs: {epochs}, batch_size: 40}}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of three rules on the same users, of whom kNN can learn. Read only."""
    folder = tmp_path_factory.mktemp("made")
    write_sequences(make_process(num_items=64, num_groups=8).sample(150, 5, 9), folder / "log.txt")
    dataset = prepare(folder / "log.txt", folder / "data")
    for name in ("knn", "popularity", "counting"):
        run_baseline(name, dataset, "test", folder / name, exclude_history=True)
    return folder


def trained(folder: Path, path: Path, seed: int, epochs: int) -> Path:
    """Results that look like those of a training: recipe, and events with a break of an hour."""
    shutil.copytree(folder, path)
    (path / "recipe.yaml").write_text(RECIPE.format(seed=seed, epochs=epochs))
    metrics = json.loads((path / "metrics-test.json").read_text())
    metrics["recipe"] = {"seed": seed, "finetune.epochs": epochs, "finetune": {}}
    (path / "metrics-test.json").write_text(json.dumps(metrics))
    events = [{"event": "start", "time": 0.0, "parameters": 1234, "device": "CPU"}]
    for epoch in range(epochs):
        now, step = 60.0 * (epoch + 1) + 3600.0 * (epoch > 0), 10 * (epoch + 1)
        if epoch == 1:
            events.append({"event": "start", "time": 3660.0, "parameters": 1234})
        events += [
            {"event": "step", "stage": "finetune", "step": step, "loss": 3.0 / (epoch + 1), "time": now,
             "tokens_per_second": 500.0 + seed},
            {"event": "validation", "stage": "finetune", "step": step, "NDCG@10": 0.01 * (epoch + 1),
             "time": now},
        ]  # fmt: skip
    (path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    return path


def test_figures_are_those_of_the_comparison(made: Path, tmp_path: Path) -> None:
    runs = [made / name for name in ("knn", "popularity", "counting")]
    path = write_comparison(runs, tmp_path / "page.html", resamples=500)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "default-src 'none'" in source
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert "3 runs on test" in page.text
    for run in runs:
        metrics = json.loads((run / "metrics-test.json").read_text())
        low, high = metrics["ci95"]["HR@5"]
        assert f"{score(metrics['HR@5'])} {score(low)}– {score(high)}" in page.text
    for run in runs[1:]:
        found = compare(run, runs[0], resamples=500)
        for row in found.metrics.values():
            low, high = map(signed_score, row.ci95)
            assert f"{low} to {high} p {row.p:.4f}" in page.text
            assert signed_score(row.difference) in page.text
    assert "No key of recipe or protocol differs." in page.text
    assert "Training" not in page.text  # rules have no curves


def test_a_difference_is_called_one_after_correction_for_the_whole_page(
    made: Path, tmp_path: Path
) -> None:
    """Beside enough others without a difference, one that `compare` alone calls clear is not."""
    runs = [made / "popularity", made / "counting"]
    found = compare(runs[1], runs[0], resamples=200)
    least = min(row.p_holm for row in found.metrics.values())
    assert least < 0.05
    sentence = "counting: below popularity in"
    path = tmp_path / "page.html"
    assert sentence in Page(write_comparison(runs, path, resamples=200).read_text()).text
    for number in range(12):
        runs.append(shutil.copytree(made / "popularity", tmp_path / f"same{number}"))
    text = Page(write_comparison(runs, path, resamples=200).read_text()).text
    assert "counting: no difference to" in text
    assert "52 differences" in text


def test_seeds_are_one_entry_and_curves_leave_out_breaks(made: Path, tmp_path: Path) -> None:
    for seed, source in ((0, "knn"), (1, "popularity")):
        trained(made / source, tmp_path / "seeds" / f"s{seed}", seed, epochs=3)
    # One system, as seeds of a recipe are.
    for seed in (0, 1):
        path = tmp_path / "seeds" / f"s{seed}" / "metrics-test.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"system": "genrec"}))
    single = trained(made / "counting", tmp_path / "single", 0, epochs=2)
    page = Page(
        write_comparison(
            [tmp_path / "seeds", single], tmp_path / "page.html", resamples=200
        ).read_text()
    )
    scores = [
        json.loads((made / name / "metrics-test.json").read_text())["NDCG@10"]
        for name in ("knn", "popularity")
    ]
    mean, low, high = sum(scores) / 2, min(scores), max(scores)
    assert f"{score(mean)} {score(low)}– {score(high)}" in page.text
    assert "One training each, no other seed was asked: single." in page.text
    assert "finetune.epochs 3 2" in page.text
    assert "seed 0" not in page.text
    # The third validation is after three minutes of training; the hour between is none of them.
    assert "seeds: 0.03 at minutes of training 3" in page.text
    assert "single: 0.02 at step 20" in page.text
    assert "seeds – 1,234 30 3 min 0 s 500" in page.text
    legends = page.text.count("single seeds") + page.text.count("seeds single")
    assert legends >= 3


def test_differences_have_an_axis_with_zero_inside() -> None:
    page = Page(dot_chart("t", [Dot("a", 0.1), Dot("b", -0.3, (-0.4, -0.2))], signed=True))
    first, last = [float(at["cx"] or 0) for tag, at in page.tags if tag == "circle"]
    stems = [float(at["x1"] or 0) for tag, at in page.tags if at.get("class") == "stem"]
    assert stems[0] == stems[1]
    assert last < stems[0] < first
    assert "b: −.3000 (−.4000 to −.2000)" in page.text


def test_a_long_name_ends_as_it_ends(made: Path) -> None:
    page = Page(dot_chart("t", [Dot("a" * 40 + "/seed-7", 0.1)]))
    assert "…" + "a" * 13 + "/seed-7 " in page.text + " "


def test_what_cannot_be_compared_leaves_no_page(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn, out = str(made / "knn"), str(tmp_path / "page.html")
    cases = [
        ([knn, "--compare"], 2, "two runs or more"),
        ([knn, knn, "--compare", "--out", out], 1, "each of them once"),
        ([knn, str(made / "popularity")], 2, "--compare sets them side by side"),
        ([knn, "--out", out], 2, "--out goes with --compare"),
        ([knn, str(tmp_path / "gone"), "--compare", "--out", out], 1, "no such directory"),
    ]
    for arguments, code, said in cases:
        assert run_command(["report", *arguments]) == code
        assert said in capsys.readouterr().err
    other = shutil.copytree(made / "popularity", tmp_path / "other")
    metrics = json.loads((other / "metrics-test.json").read_text())
    metrics["protocol"]["trained_through"] = "n-1"
    (other / "metrics-test.json").write_text(json.dumps(metrics))
    assert run_command(["report", "--compare", knn, str(other), "--out", out]) == 1
    assert "evaluate both under one protocol" in capsys.readouterr().err
    assert not Path(out).exists()
    assert run_command(["report", "--compare", knn, str(made / "popularity"), "--out", out]) == 0
    assert Path(out).is_file()
