"""The report: right words and curves, nothing from outside, nothing unescaped, whatever is
missing."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import Page

from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.report.run_report import headline, write_report
from genrec_dist.report.svg import Dot, Line, dot_chart, line_chart, score, smooth, ticks

EVIL = "</title><script>alert(1)</script>\"'&"


def rows(**values: float) -> dict[str, float]:
    return {key.replace("_", "@"): value for key, value in values.items()}


def metrics_of(split: str) -> dict:
    return {
        "system": "genrec",
        "split": split,
        "users": 22363,
        **rows(
            HR_1=0.0121,
            HR_5=0.0541,
            HR_10=0.0788,
            HR_20=0.1102,
            NDCG_5=0.0397,
            NDCG_10=0.0476,
            NDCG_20=0.0552,
        ),
        "MRR@20": 0.0391,
        "invalid_rate": 0.0,
        "duplicate_rate": 0.0,
        "ci95": {
            "HR@5": [0.0512, 0.0571],
            "NDCG@5": [0.0376, 0.0419],
            "HR@10": [0.0753, 0.0824],
            "NDCG@10": [0.0454, 0.0499],
        },
        "protocol": {
            "numbering": "random",
            "ties": "file order",
            "split": "leave-one-out",
            "trained_through": "n-2",
            "exclude_history": True,
            "beam": 20,
            "decode": "exact",
            "users": {"sample": 2000, "seed": 0},
        },
        "beside": {
            "counting": rows(HR_5=0.0003, NDCG_5=0.0002, HR_10=0.0006, NDCG_10=0.0003),
            "popularity": rows(HR_5=0.0071, NDCG_5=0.0042, HR_10=0.0115, NDCG_10=0.0057),
            "knn": rows(HR_5=0.0566, NDCG_5=0.0421, HR_10=0.0789, NDCG_10=0.0493),
        },
        "users_per_second": 412.7,
        "seconds": 54.2,
        "recipe": None,
        "git": "0123456789ab",
        "versions": {"torch": "2.13.0"},
    }


def broad_metrics(split: str = "test") -> dict:
    """With what lists show of the catalogue and the breakdown, also of kNN; one bucket has no
    users."""

    def buckets(*names: str) -> dict:
        full = {
            "users": 1234,
            "HR@10": 0.0712,
            "NDCG@10": 0.0433,
            "ci95": {"HR@10": [0.06, 0.08], "NDCG@10": [0.03, 0.05]},
        }
        return {
            **dict.fromkeys(names, full),
            "51+": {"users": 0, "HR@10": None, "NDCG@10": None, "ci95": {}},
        }

    metrics = metrics_of(split)
    told = {"coverage@10": 0.312, "coverage@20": 0.456, "popularity@10": 2.34, "gini@10": 0.8125}
    more = {
        **told,
        "breakdown": {
            "history_length": buckets("1-2", "3-5"),
            "target_popularity": buckets("0", "1-4"),
        },
    }
    metrics["beside"]["knn"] = {**metrics["beside"]["knn"], **more, "coverage@10": 0.996}
    metrics["beside"]["knn"]["breakdown"] = {"history_length": {"1-2": {"NDCG@10": 0.0987}}}
    return {**metrics, **more, "top": 50}


def events_of(stages: tuple[str, ...]) -> list[dict]:
    dice, now, step = random.Random(0), 1_790_000_000.0, 0
    events = [
        {"time": now, "event": "start", "recipe": {"seed": 0}, "git": "0123456789ab+", "versions": {"torch": "2.13.0"},
         "parameters": 4_812_345, "resumed_from": None}
    ]  # fmt: skip
    for stage in stages:
        for epoch in range(8):
            for _ in range(40):
                step, now = step + 10, now + 1.7
                start = 6.9 if stage == "pretrain" else 4.6
                loss = (
                    2.4 + (start - 2.4) * math.exp(-((step - 1) % 3200) / 900) + dice.gauss(0, 0.09)
                )
                events.append(
                    {"time": now, "event": "step", "stage": stage, "epoch": epoch, "step": step, "loss": loss,
                     "learning_rate": 1e-3, "gradient_norm": 0.8, "tokens_per_second": 21_000 + dice.gauss(0, 600),
                     "samples_per_second": 430.0, "padding_share": 0.031, "data_wait_share": 0.004}
                )  # fmt: skip
            if stage == "finetune":
                rise = 1 - math.exp(-epoch / 2)
                events.append(
                    {"time": now, "event": "validation", "stage": stage, "epoch": epoch, "step": step, "users": 2000,
                     "loss": 2.5 + 1.6 * math.exp(-epoch / 2), "HR@5": 0.055 * rise, "HR@10": 0.02 + 0.071 * rise,
                     "NDCG@5": 0.04 * rise, "NDCG@10": 0.01 + 0.041 * rise, "seconds": 6.1}
                )  # fmt: skip
    return events


def make_run(
    run: Path,
    stages: tuple[str, ...] = ("pretrain", "finetune"),
    splits: tuple[str, ...] = ("test",),
) -> Path:
    run.mkdir(parents=True)
    events = events_of(stages)
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "recipe.yaml").write_text(
        f"data: {run.parent / 'data'}\nrun: {run}\nseed: 0\nprecision: bf16\n"
    )
    (run / "status.json").write_text(json.dumps({"status": "finished", "step": 6400, "of": 6400}))
    for split in splits:
        (run / f"metrics-{split}.json").write_text(json.dumps(metrics_of(split)))
    return run


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_full_run_says_everything(tmp_path: Path) -> None:
    run = make_run(tmp_path / "beauty", splits=("test", "validation"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "audit.json").write_text(json.dumps({"sentence": "Nothing leaks here."}))
    page = read(write_report(run))
    assert write_report(run) == run / "report.html"
    expected = [
        "beauty", "finished", "4,812,345", "0123456789ab+", "2026-09-21", "Nothing leaks here.",
        "GenRec reaches NDCG@10 .0476 on test (95 % interval .0454 to .0499)", ".0493", "3.4 % below it",
        "Metrics on test, 22,363 users", "Metrics on validation", ".0541 .0512– .0571", "co-occurrence kNN",
        "sample 2,000, seed 0", "exclude history yes", "n-2", "precision: bf16", "3.1 %", "0.4 %", "NDCG@10: 0.04",
    ]  # fmt: skip
    for words in expected:
        assert words in page.text, words
    for words in ("Tokens per second", "Share of the time that waits for data"):
        assert words in page.text, words
    assert sum(tag == "svg" for tag, _ in page.tags) == 6
    assert len(list(run.glob(".*"))) == 0


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", splits=())
    metrics = metrics_of("test")
    metrics["protocol"] |= {"beam": None, "item_weight": None, "graph": None}
    (run / "metrics-test.json").write_text(json.dumps(metrics))
    recipe = load_recipe("best", [f"run={run}"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    text = read(write_report(run)).text
    for words in ("item weight", "graph", "candidates kept at each step", "warmup", "strategy"):
        assert (words in text) == (words == "warmup"), words
    for words in ("pretrain: epochs: 0 finetune: epochs: 6", "decode exact", "seed: 0"):
        assert words in text, words
    for words in ("id_learning_rate", "backbone", "null"):
        assert words not in text, words


@pytest.mark.parametrize(
    ("targets", "unit"), [("every-prefix", "430 samples"), ("all-prefixes", "430 users")]
)
def test_samples_that_are_users_are_called_so(tmp_path: Path, targets: str, unit: str) -> None:
    run = make_run(tmp_path / "run", stages=("finetune",))
    (run / "recipe.yaml").write_text(f"finetune: {{epochs: 8, targets: {targets}}}\n")
    assert unit in read(write_report(run)).text


@pytest.mark.parametrize(("share", "warned"), [(0.441, True), (0.2, False), (None, False)])
def test_the_page_says_how_many_targets_share_their_time(
    tmp_path: Path, share: float | None, warned: bool
) -> None:
    run = make_run(tmp_path / "run", splits=())
    metrics = metrics_of("test") | {"tied_targets": share}
    metrics["protocol"]["ties"] = "shuffle"
    (run / "metrics-test.json").write_text(json.dumps(metrics))
    found = read(write_report(run)).text
    shared = "of users have a held-out item that shares its time with others"
    expected = "ties shuffle order" if share is None else f"ties shuffle: {share:.1%} {shared}"
    assert expected.replace("%", " %") in found
    assert ("warning: for so many the time does not say which came last" in found) == warned


def test_breadth_and_breakdown_are_tables(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", splits=())
    (run / "metrics-test.json").write_text(json.dumps(broad_metrics()))
    text = read(write_report(run)).text
    for words in (
        "Breadth of the lists on test", "GenRec 31.2 % 45.6 % 2.34 0.812", "co-occurrence kNN 99.6 % 45.6 % 2.34",
        "items in the history users HR@10 NDCG@10 kNN's NDCG@10", "times the target was taken in training",
        "3-5 1,234 .0712 .0600– .0800 .0433 .0300– .0500 –", "1-2 1,234 .0712 .0600– .0800 .0433 .0300– .0500 .0987",
        "51+ 0 – – –", "lists: top50-test.parquet",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    "broken",
    [[], {"history_length": []}, {"history_length": {"1-2": 3}}, {"history_length": {"1-2": {}}}],
)
def test_a_breakdown_of_another_shape_breaks_no_page(tmp_path: Path, broken: object) -> None:
    run = make_run(tmp_path / "run", splits=())
    metrics = {**broad_metrics(), "breakdown": broken, "coverage@10": "much"}
    metrics["beside"] = {"knn": {"breakdown": broken}}
    (run / "metrics-test.json").write_text(json.dumps(metrics))
    assert "Metrics on test" in read(write_report(run)).text


@pytest.mark.parametrize("key", ["beside", "protocol", "ci95", "recipe", "versions", "knn"])
def test_a_value_where_fields_belong_is_noted_and_breaks_no_page(tmp_path: Path, key: str) -> None:
    run = make_run(tmp_path / "run", splits=())
    metrics = broad_metrics()
    (metrics["beside"] if key == "knn" else metrics)[key] = "nan"
    (run / "metrics-test.json").write_text(json.dumps(metrics))
    text = read(write_report(run)).text
    assert "Metrics on test" in text
    assert f"{key} is no object" in text


def test_the_run_s_own_audit_comes_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "audit.json").write_text(json.dumps({"sentence": "of the directory"}))
    (run / "audit.json").write_text(json.dumps({"sentence": "of the run"}))
    text = read(write_report(run)).text
    assert "of the run" in text
    assert "of the directory" not in text


def test_nothing_from_outside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", splits=())
    (run / "metrics-test.json").write_text(json.dumps(broad_metrics()))
    path = write_report(run)
    source = path.read_text()
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert "url(" not in source
    for tag, attributes in read(path).tags:
        assert tag not in {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "image",
            "use",
        }
        assert not {"src", "href", "srcset", "xlink:href", "action"} & attributes.keys(), (
            tag,
            attributes,
        )
        assert not [name for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in source


def test_everything_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run<script>alert(1)<", splits=())
    metrics = metrics_of("test")
    metrics.update(system=EVIL, split=EVIL, git=EVIL, versions={"torch": EVIL})
    metrics["protocol"] = {EVIL: EVIL, "users": {EVIL: EVIL}}
    metrics["beside"][EVIL] = metrics["beside"]["knn"]
    metrics |= {
        "coverage@10": 0.5,
        "top": 20,
        "breakdown": {"history_length": {EVIL: {"users": EVIL, "HR@10": EVIL}}},
    }
    (run / "metrics-test.json").write_text(json.dumps(metrics))
    (run / "audit.json").write_text(json.dumps({"sentence": EVIL}))
    (run / "recipe.yaml").write_text(f"data: {json.dumps(EVIL)}\n")
    (run / "status.json").write_text(json.dumps({"status": EVIL, "reason": EVIL}))
    with (run / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"event": "start", "time": 1.0, "git": EVIL, "versions": {"torch": EVIL}})
            + "\n"
        )
    path = write_report(run)
    assert "<script" not in path.read_text()
    page = read(path)
    assert page.text.count("<script>alert(1)</script>") >= 12
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"})


@pytest.mark.parametrize(
    "kept", ["events.jsonl", "recipe.yaml", "status.json", "metrics-test.json"]
)
def test_any_part_may_be_alone(tmp_path: Path, kept: str) -> None:
    run = make_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    page = read(write_report(run))
    assert ("Not evaluated yet" in page.text) == (kept != "metrics-test.json")
    assert any(tag == "svg" for tag, _ in page.tags) == (
        kept in ("events.jsonl", "metrics-test.json")
    )


def test_interrupted_in_pretraining(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=("pretrain",), splits=())
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1790000999.0, "event": "st')
    page = read(write_report(run))
    assert "events.jsonl: 1 torn line skipped" in page.text
    assert "pretrain" in page.text
    assert "finetune" not in page.text


def test_values_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    broken = {
        "event": "step",
        "stage": "finetune",
        "step": 9000,
        "loss": None,
        "tokens_per_second": "fast",
    }
    with (run / "events.jsonl").open("a") as file:
        file.write(
            json.dumps(broken)
            + "\n[1, 2]\n"
            + '{"event": "step", "stage": "finetune", "step": 9010, "loss": NaN}\n'
        )
    source = write_report(run).read_text()
    assert "nan" not in source
    assert "None" not in source


def test_a_resumed_run_keeps_the_later_of_two_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"event": "start", "time": 0.0}]
    lines += [
        {"event": "step", "stage": "finetune", "step": step, "loss": 9.0} for step in (10, 20, 30)
    ]
    lines += [{"event": "start", "time": 1.0}]
    lines += [
        {"event": "step", "stage": "finetune", "step": step, "loss": 5.0} for step in (20, 30, 40)
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(write_report(run))
    assert "resumed 1 ×" in page.text
    faint = next(
        attributes["d"] for _, attributes in page.tags if attributes.get("class") == "c1 faint"
    )
    assert faint is not None
    assert len(faint.split("L")) == 4


def test_what_a_killed_report_left_is_removed_by_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    report = "from genrec_dist.report.run_report import write_report; write_report(sys.argv[1])"
    killed = f"import os, sys; os.fsync = lambda _: os.kill(os.getpid(), 9); {report}"
    done = subprocess.run([sys.executable, "-c", killed, run])
    assert done.returncode == -signal.SIGKILL
    assert len(list(run.glob(".report.html.*.tmp"))) == 1
    assert write_report(run).is_file()
    assert not list(run.glob(".report.html.*"))


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml.*genrec train"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_metrics_are_said_not_hidden(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics-test.json").write_text('{"system": ')
    assert "metrics-test.json: not JSON (Expecting value" in read(write_report(run)).text


@pytest.mark.parametrize(
    ("ours", "knn", "interval", "said"),
    [
        (0.06, 0.05, [0.055, 0.065], "GenRec is 20.0 % above it."),
        (0.04, 0.05, [0.035, 0.045], "GenRec is 20.0 % below it."),
        (
            0.05,
            0.049,
            [0.045, 0.055],
            "2.0 % above it, a gap that the interval does not tell from none.",
        ),
        (0.01, 0.0, None, "GenRec is above it."),
        (0.0, 0.0, None, "neither finds anything."),
    ],
)
def test_headline(ours: float, knn: float, interval: list[float] | None, said: str) -> None:
    metrics = {
        "system": "genrec",
        "split": "test",
        "NDCG@10": ours,
        "beside": {"knn": {"NDCG@10": knn}},
    }
    metrics["ci95"] = {"NDCG@10": interval} if interval else {}
    assert headline(metrics).endswith(said)


def test_headline_of_a_baseline_and_of_the_ceiling() -> None:
    metrics = {
        "system": "knn",
        "split": "test",
        "NDCG@10": 0.05,
        "beside": {"knn": {"NDCG@10": 0.05}},
    }
    assert headline(metrics) == "co-occurrence kNN reaches NDCG@10 .0500 on test."
    metrics = {
        "system": "genrec",
        "split": "test",
        "NDCG@10": 0.3,
        "beside": {"ceiling": {"NDCG@10": 0.4}},
    }
    assert headline(metrics).endswith("The oracle's ceiling is .4000; GenRec reaches 75.0 % of it.")


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 0.087) == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    assert ticks(2.37, 6.9) == [2, 3, 4, 5, 6, 7]
    for low, high in [(0, 1e-7), (-3, -2.9), (5, 5), (0, 123456), (0, 0)]:
        found = ticks(low, high)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 9


def test_smoothing_keeps_constants_and_starts_at_the_first_value() -> None:
    assert smooth([3.0] * 5, 10) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 9.0], 100)[0] == pytest.approx(1.0)
    assert smooth([1.0, 5.0], 0.1) == pytest.approx([1.0, 5.0])


def test_scores_are_written_as_the_field_does() -> None:
    assert [score(x) for x in (0.0493, 0.0, 1.0, 0.99999, None)] == [
        ".0493",
        ".0000",
        "1.0000",
        "1.0000",
        "–",
    ]


def test_charts_place_points_where_the_axes_say() -> None:
    page = Page(
        line_chart("t", "step", [Line("a", [0, 100], [0.0, 1.0], 0, dots=True)], from_zero=True)
    )
    first, last = [attributes for tag, attributes in page.tags if tag == "circle"][::-1]
    assert (first["cx"], first["cy"]) == ("58.0", "224.0")
    assert (last["cx"], last["cy"]) == ("464.0", "14.0")
    page = Page(dot_chart("t", [Dot("low", 0.1), Dot("high", 0.3, (0.25, 0.35), ours=True)]))
    dots = [attributes for tag, attributes in page.tags if tag == "circle"]
    assert [attributes["class"] for attributes in dots] == ["c0", "muted"]
    assert float(dots[0]["cx"] or 0) > float(dots[1]["cx"] or 0)


def test_many_points_are_thinned_and_the_last_is_kept() -> None:
    source = line_chart(
        "t", "step", [Line("a", range(100_000), [float(x) for x in range(100_000)], 0)]
    )
    assert len(source) < 40_000
    assert "99,999" in source


@pytest.mark.slow
def test_chromium_opens_it_without_a_network(tmp_path: Path) -> None:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium on PATH")
    path = write_report(make_run(tmp_path / "run"))
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9", "--window-size=1200,2400",
        "--enable-logging=stderr", "--v=0", f"--screenshot={tmp_path / 'page.png'}", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert complaints == []
    assert (tmp_path / "page.png").stat().st_size > 50_000
