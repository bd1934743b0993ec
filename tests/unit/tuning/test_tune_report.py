"""The page of a sweep: right words and charts, nothing from outside, nothing unescaped; and what a
real browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from genrec_tuning.record import Sweep
from genrec_tuning.report.charts import charts_of, epoch_counts, rungs_of
from genrec_tuning.report.page import headline, report_html, saving
from html_page import Page
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_sweeps import SPACE, awkward_sweep, ordinary_sweep, trial, with_finals
from plotly.offline import get_plotlyjs

EVIL = "</title><script>alert(1)</script>\"'&"
EMPTY = Sweep("nothing", {})


@pytest.fixture(autouse=True)
def short_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five megabytes of plotly.js are in the page only where a test is about them."""
    if "browser" not in request.fixturenames and "library" not in request.fixturenames:
        monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "const Plotly = {}")


@pytest.fixture
def library() -> str:
    return str(get_plotlyjs())


def strings(value: Any) -> Iterator[str]:
    """All strings in nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (ordinary_sweep(), (
            "beauty", "trials 24", "finished 7", "stopped by the scheduler", "2 h 18 min", "2026-09-21",
            "asha, grace 1, reduction 3", "resumed 1 ×", "Next is t0015 with .0568", "with other seeds",
            "t0011 leads with validation NDCG@10 .0570, reached at epoch 9 of 9.", "choice: single: {}",
            "pretrain.mask.strategy recency", "loss is NaN at step 120 of finetune", "genrec tune --finish",
        )),
        (with_finals(ordinary_sweep()), (
            "t0015 (winner) 3 of 3 .0570 .0566, .0570, .0574 .0544 .0400 .0791 .0479", "A is better in",
            "t0011 3 of 3 .0565 .0561, .0565, .0569 – – – –", "+0.0028 +0.0009 to +0.0047 0.0063",
            "the base recipe 3 of 3 .0505", "test was looked at by t0015 and the base recipe.",
        )),
        (dataclasses.replace(with_finals(ordinary_sweep()), comparison=None), (
            "t0015 wins on validation; on test it has not been compared with the base recipe.",
        )),
        (EMPTY, ("No trial has been started yet.",)),
        (Sweep("s", SPACE, (trial(0, [], "running"),)), (
            "No trial has come to an end with a score yet; running: 1.", "t0000")),
        (Sweep("s", SPACE, (trial(0, [], "failed", reason="out of memory"),)), (
            "No trial has a score", "out of memory")),
        (Sweep("s", SPACE, (trial(0, [0.02], "stopped"),)), (
            "t0000 leads with validation NDCG@10 .0200, reached at epoch 1 of 9.",
            "It was stopped by the scheduler after 1 epochs.")),
    ],
    ids=["ordinary", "finals", "not compared", "empty", "running", "failed", "one trial"],
)  # fmt: skip
def test_the_page_says(sweep: Sweep, words: tuple[str, ...]) -> None:
    text = Page(report_html(sweep)).text
    for some in words:
        assert some in text, some
    one_of_several = len(sweep.trials) > 1 and not sweep.finals
    assert ("flatters" in headline(sweep)) == ("flatters" in text) == one_of_several


def test_the_saving_counts_what_the_scheduler_spared_and_nothing_else() -> None:
    trials = (
        trial(0, [0.1] * 9),
        trial(1, [0.1] * 3, "stopped"),
        trial(2, [0.1] * 5),  # ended by patience
        trial(3, [0.1] * 2, "failed"),
        trial(4, [0.1] * 4, "running"),
        trial(5, [0.1] * 4, "interrupted"),
    )
    said = saving(Sweep("s", SPACE, trials))
    assert said.startswith(
        "Of 27 epochs planned for the trials that came to an end (3), 17 were run. "
        "The scheduler stopped 1 of them and spared 6 epochs, 22.2 %"
    )
    assert said.endswith("Patience ended others early: 4 epochs.")
    assert "stopped none of them." in saving(Sweep("s", SPACE, trials[:1]))
    assert saving(EMPTY) == "No trial has come to an end yet."
    run, spared, patience, left = epoch_counts(Sweep("s", SPACE, trials)).values()
    assert run == [6, 6, 5, 4, 2, 1, 1, 1, 1]
    assert spared == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert patience == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert left == [0, 0, 1, 1, 3, 3, 3, 3, 3]


def test_charts_show_every_trial_and_tell_stopped_ones_apart() -> None:
    sweep = ordinary_sweep()
    charts = {name: figure for name, (_, figure) in charts_of(sweep).items()}
    assert list(charts) == [
        "parallel", "key0", "key1", "key2", "choice", "NDCG10", "loss", "epochs",
    ]  # fmt: skip
    for figure in charts.values():
        plotly.graph_objects.Figure(figure)  # Plotly refuses what it does not know
    finished = {one.id for one in sweep.trials if one.status == "finished"}
    scored = {one.id for one in sweep.trials if one.best}
    assert finished < scored < {one.id for one in sweep.trials}
    lines = {trace["name"]: trace["line"] for trace in charts["parallel"]["data"]}
    assert lines.keys() == {one.id for one in sweep.trials}
    assert {id_ for id_, line in lines.items() if line["dash"] == "solid"} == finished
    assert [id_ for id_, line in lines.items() if line["width"] == 4] == ["t0011"]
    for name in ("key0", "choice"):
        about = [text.split(":")[0] for trace in charts[name]["data"] for text in trace["text"]]
        assert sorted(about) == sorted(scored)
    hollow = {
        text.split(":")[0]
        for trace in charts["key0"]["data"]
        for text, symbol in zip(trace["text"], trace["marker"]["symbol"], strict=True)
        if symbol == "circle-open"
    }
    assert hollow == scored - finished
    curves = {trace["text"].split(":")[0]: trace for trace in charts["NDCG10"]["data"]}
    assert curves.keys() == scored
    assert curves["t0011"]["y"] == [one.NDCG10 for one in sweep.trials[11].epochs]
    assert charts["key0"]["layout"]["xaxis"]["type"] == "log"
    colors = {trace["name"]: trace["marker"]["color"] for trace in charts["choice"]["data"]}
    for trace in [*charts["key0"]["data"], *charts["key1"]["data"]]:
        assert trace["marker"]["color"] == colors[trace["name"]]
    assert [tuple(trace["y"]) for trace in charts["epochs"]["data"]] == [
        tuple(counts) for counts in epoch_counts(sweep).values() if any(counts)
    ]


def test_parallel_coordinates_pass_their_axes_where_the_values_are() -> None:
    trials = (
        trial(0, [0.1], values={"lr": 1e-4, "p": 0.5, "s": "b"}),
        trial(1, [0.2], values={"lr": 1e-2, "s": "a"}),
        trial(2, [], "failed", values={"lr": 1e-3, "p": 0.0, "s": "c"}),
    )
    space = {"space": {"lr": {"loguniform": [1e-4, 1e-2]}, "p": {"uniform": [0.0, 1.0]}}}
    _, figure = charts_of(Sweep("s", space, trials))["parallel"]
    below = pytest.approx(-0.15)
    # The learning rate's axis is logarithmic; what does not apply is below its axis.
    assert [trace["y"] for trace in figure["data"]] == [
        [0.0, 1.0, 0.5, 0.0],
        [1.0, below, 0.0, 1.0],
        [pytest.approx(0.5), 0.0, 1.0, below],
    ]
    labels = {(one["x"], one["y"]): one["text"] for one in figure["layout"]["annotations"]}
    assert (labels[0, 0.0], labels[0, 1.0], labels[2, 0.5]) == ("1e-4", "0.01", "b")


def test_rungs_are_where_asha_compares() -> None:
    sweep = ordinary_sweep()
    assert rungs_of(sweep) == [1, 3]
    _, figure = charts_of(sweep)["NDCG10"]
    assert [line["x0"] for line in figure["layout"]["shapes"]] == [1, 3]
    assert rungs_of(dataclasses.replace(sweep, space={**SPACE, "scheduler": "none"})) == []


def test_nothing_is_loaded_from_outside(library: str) -> None:
    source = report_html(with_finals(ordinary_sweep()))
    # The library itself names addresses of maps, which the policy would refuse to load.
    assert source.count(library) == 1
    own = source.replace(library, "")
    for forbidden in ("http:", "https:", "@import", "url(", "//cdn", "src="):
        assert forbidden not in own, forbidden
    for tag, attributes in Page(own).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "image", "form"}
        assert not {"src", "href", "srcset", "xlink:href", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]


def test_everything_is_escaped_and_one_script_may_run() -> None:
    sweep = awkward_sweep(EVIL)
    source = report_html(sweep)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        f"'sha256-{digest}'"
    )
    assert policy in source
    (data,) = re.findall(r"^const CHARTS = (.*);$", script, re.M)
    assert "<" not in data
    page = Page(source)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(EVIL) > 10
    shown = [one.replace("<br>", "") for one in strings([c for _, c in charts_of(sweep).values()])]
    assert sum("&lt;script&gt;alert" in one for one in shown) > 10
    assert not [one for one in shown if "<" in one or ">" in one]


values = st.one_of(st.floats(), st.integers(-9, 9), st.booleans(), st.none(), st.text(max_size=5))
keys = st.sampled_from(["seed", "finetune.learning_rate", "pretrain.mask.strategy", "a.b"])
states = st.sampled_from(["running", "finished", "stopped", "failed", "interrupted"])


@given(
    st.lists(
        st.tuples(
            states,
            st.lists(st.floats(0, 1) | st.just(math.nan), max_size=4),
            st.dictionaries(keys, values),
            st.integers(0, 5),
        ),
        max_size=6,
    )
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_sweep_has_a_page(drawn: list[Any]) -> None:
    trials = [
        trial(n, scores, status, values=values, planned_epochs=planned)
        for n, (status, scores, values, planned) in enumerate(drawn)
    ]
    sweep = Sweep("s", SPACE, tuple(trials))
    page = Page(report_html(sweep))
    assert all(one.id in page.text for one in trials)
    json.dumps([figure for _, figure in charts_of(sweep).values()], allow_nan=False)


# In a browser

PROBE = """
const charts = [...document.querySelectorAll(".chart")];
const note = document.createElement("output");
const wide = (node) => node.closest(".wide, pre, svg") === null && node.getBoundingClientRect().right > innerWidth + 1;
setTimeout(() => {
  note.textContent = JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll("main *")].filter(wide).map((node) => node.tagName + node.className),
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    charts: charts.length, drawn: charts.filter((node) => node.querySelector("svg.main-svg .trace")).length,
    labels: [...document.querySelectorAll("svg text")].map((node) => node.textContent).join(" "),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg.main-svg text")).fill,
  });
  document.body.append(note);
}, 1000);
"""


@pytest.fixture
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH")


@pytest.mark.parametrize(
    ("sweep", "charts"), [(with_finals(ordinary_sweep()), 8), (awkward_sweep(EVIL), 12)]
)
def test_a_browser_draws_every_chart(
    browser: str, tmp_path: Path, sweep: Sweep, charts: int
) -> None:
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    source = report_html(sweep).replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    path, found = tmp_path / "page.html", {}
    path.write_text(source.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    for dark in (0, 1):
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9", "--hide-scrollbars",
            f"--window-size={500 + 700 * dark},900", f"--blink-settings=preferredColorScheme={1 - dark}",
            "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
        shown = re.search(r"<output>(.*)</output>", done.stdout, re.S)
        assert shown is not None, done.stdout[-2000:]
        found = {dark: json.loads(unescape(shown[1])), **found}
        assert found[dark]["charts"] == found[dark]["drawn"] == charts
        assert found[dark]["page"] <= found[dark]["width"], "the page scrolls sideways"
        assert found[dark]["outside"] == found[dark]["requests"] == []
        if sweep.name == EVIL:
            assert EVIL[:20] in found[dark]["labels"]
    assert found[0]["paper"] != found[1]["paper"]
    assert found[0]["ink"] != found[1]["ink"]
