"""The page of a sweep: right words and places, nothing from outside, nothing unescaped; and what a
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
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from genrec_tuning.record import Sweep, Trial
from genrec_tuning.report.axis import Axis, axes_of, score_axis, written
from genrec_tuning.report.charts import mark, stacked
from genrec_tuning.report.page import headline, report_of, saving, write_report
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sweeps import SPACE, awkward_sweep, epoch, ordinary_sweep, trial, with_finals

EVIL = "</title><script>alert(1)</script>\"'&"
VOID = {"meta", "br", "wbr", "hr"}
EMPTY = Sweep("nothing", {})


class Page(HTMLParser):
    """Tags and attributes as a browser's parser meets them; fails on tags left open."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def classes(self, kind: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for _, attributes in self.tags
            if kind in (attributes.get("class") or "").split()
        ]


def page_of(sweep: Sweep) -> Page:
    return Page(report_of(sweep))


def numbers(sweep: Sweep) -> list[float]:
    """All numbers that the page's drawings hold."""
    drawn = re.sub(
        r"<(style|script|pre).*?</\1>|<text.*?</text>|<title>.*?</title>",
        "",
        report_of(sweep),
        flags=re.S,
    )
    return [
        float(found)
        for found in re.findall(
            r"-?\d+\.?\d*(?:e-?\d+)?", " ".join(re.findall(r'"([^"]*)"', drawn))
        )
    ]


# What it says


def test_an_ordinary_sweep_says_everything() -> None:
    text = page_of(ordinary_sweep()).text
    for words in (
        "beauty", "trials 24 finished 7", "stopped by the scheduler", "asha, grace 1, reduction 3", "2 h 18 min", "resumed 1 ×",
        "2026-09-21", "t0011 leads with validation NDCG@10 .0570, reached at epoch 9 of 9.", "Next is t0015 with .0568",
        "pretrain.mask.strategy recency", "finetune.learning_rate, log scale", "last-biased 3 trials", "not applied",
        "median of recency: .0530", "Validation loss", "spared by the scheduler", "loss is NaN at step 120 of finetune",
        "genrec tune --finish", "choice: single: {}", "with other seeds",
    ):  # fmt: skip
        assert words in text, words
    assert (
        text.count("loss is NaN at step 120 of finetune") > 4
    )  # two trials, each in the table and under the pointer


def test_what_the_finals_say() -> None:
    text = page_of(with_finals(ordinary_sweep())).text
    for words in (
        "t0015 (winner) 3 of 3 .0570 .0566, .0570, .0574 .0544 .0400 .0791 .0479", "base recipe 3 of 3 .0505",
        "On test t0015 reaches NDCG@10 .0479, the base recipe .0451: +.0028 (95 % interval +.0009 to +.0047, p 0.0063 after Holm).",
        "t0011 3 of 3 .0565 .0561, .0565, .0569 – – – –", "test was looked at by t0015 and the base recipe alone.",
    ):  # fmt: skip
        assert words in text, words
    assert "flatters" not in text


def test_finals_that_show_no_difference_claim_none() -> None:
    sweep = with_finals(ordinary_sweep())
    assert sweep.comparison is not None
    sweep.comparison["metrics"]["NDCG@10"] = {
        **sweep.comparison["metrics"]["NDCG@10"],
        "p_holm": 0.4,
    }
    assert "p 0.4000 after Holm), which is not told from none." in page_of(sweep).text
    lost = dataclasses.replace(sweep, comparison=None)
    assert "t0015 wins on validation; on test it has not been compared" in page_of(lost).text


def test_the_saving_counts_what_the_scheduler_spared_and_nothing_else() -> None:
    trials = [
        trial(0, [0.1] * 9),
        trial(1, [0.1] * 3, "stopped"),
        trial(2, [0.1] * 5),  # ended by patience
        trial(3, [0.1] * 2, "failed"),
        trial(4, [0.1] * 4, "running"),
        trial(5, [0.1] * 4, "interrupted"),
    ]
    said = saving(Sweep("s", SPACE, tuple(trials)))
    assert said.startswith(
        "Of 27 epochs planned for the 3 trials that came to an end, 17 were run. The scheduler stopped 1"
    )
    assert "spared 6 epochs, 22.2 %" in said
    assert said.endswith("Patience ended others early: 4 epochs.")
    text = page_of(Sweep("s", SPACE, tuple(trials))).text
    assert "epoch 9: 1 spared by the scheduler" in text
    assert "epoch 9: 3 not run: failed, interrupted or still running" in text
    assert "epoch 6: 1 not needed: patience" in text
    assert saving(EMPTY) == "No trial has come to an end yet."


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (EMPTY, "No trial has been started yet."),
        (
            Sweep("s", SPACE, (trial(0, [], "running"),)),
            "No trial has come to an end with a score yet; running: 1.",
        ),
        (
            Sweep("s", SPACE, (trial(0, [], "failed", reason="out of memory"),)),
            "No trial has a score",
        ),
        (
            Sweep("s", SPACE, (trial(0, [0.02, 0.01]),)),
            "t0000 leads with validation NDCG@10 .0200, reached at epoch 1 of 9.",
        ),
        (
            Sweep("s", SPACE, (trial(0, [0.02], "stopped"),)),
            "It was stopped by the scheduler after 1 epochs.",
        ),
    ],
)
def test_little_or_nothing_is_a_page_that_says_so(sweep: Sweep, said: str) -> None:
    assert said in headline(sweep)
    page = page_of(sweep)
    assert said in page.text
    assert all(trial.id in page.text for trial in sweep.trials)
    if sweep.trials and sweep.trials[0].reason:
        assert "out of memory" in page.text


def test_one_trial_is_no_best_of_several() -> None:
    assert "flatters" not in headline(Sweep("s", SPACE, (trial(0, [0.02]),)))
    assert "flatters" in headline(
        Sweep("s", SPACE, (trial(0, [0.02]), trial(1, [0.01], "stopped")))
    )


# What it draws


def test_a_trial_is_in_every_chart_and_in_the_table() -> None:
    page = page_of(ordinary_sweep())
    for number in range(24):
        marked = [
            tag for tag, attributes in page.tags if attributes.get("data-trial") == f"t{number:04d}"
        ]
        assert marked.count("tr") == 1
        scored = not any(
            t.status == "failed" and t.id == f"t{number:04d}" for t in ordinary_sweep().trials
        )
        assert marked.count("g") >= (
            6 if scored else 3
        )  # two drawings of the parallel coordinates, the knobs, the curves


def test_stopped_trials_are_told_apart() -> None:
    sweep, page = ordinary_sweep(), page_of(ordinary_sweep())
    stopped = {one.id for one in sweep.trials if one.status == "stopped"}
    failed = {one.id for one in sweep.trials if one.status == "failed"}
    assert stopped
    assert failed
    assert {
        attributes["data-trial"]
        for attributes in page.classes("thread")
        if "stopped" in str(attributes["class"])
    } == stopped
    assert {
        attributes["data-trial"]
        for attributes in page.classes("curve")
        if "stopped" in str(attributes["class"])
    } == stopped
    assert {
        attributes["data-trial"]
        for attributes in page.classes("thread")
        if "failed" in str(attributes["class"])
    } == failed
    assert {
        attributes["data-trial"]
        for attributes in page.classes("best")
        if "data-trial" in attributes
    } == {"t0011"}


def test_threads_pass_their_axes_where_the_values_lie() -> None:
    trials = (
        trial(0, [0.1], values={"lr": 1e-4, "p": 0.5}),
        trial(1, [0.2], values={"lr": 1e-2}),
        trial(2, [0.3], values={"lr": 1e-3, "p": 0.0}),
    )
    space = {"space": {"lr": {"loguniform": [1e-4, 1e-2]}, "p": {"uniform": [0.0, 1.0]}}}
    page = page_of(Sweep("s", space, trials))
    across = {str(a["data-trial"]): a for a in page.classes("thread")[:3]}
    assert [str(across[f"t000{n}"]["class"]).split()[1] for n in range(3)] == ["q0", "q4", "q8"]
    lines = [str(a["d"]) for a in page.classes("line") if "d" in a][:3]
    ends = {re.search(r"M([\d.]+),([\d.]+).*?([\d.]+),([\d.]+)$", line).groups() for line in lines}  # type: ignore[union-attr]
    # The learning rate's axis is logarithmic, the score's ends are the scores.
    assert ends == {
        ("65.0", "312.0", "919.0", "312.0"),
        ("65.0", "62.0", "919.0", "187.0"),
        ("65.0", "187.0", "919.0", "62.0"),
    }
    middle = {re.search(r" ([\d.]+),([\d.]+)C", line).groups() for line in lines}  # type: ignore[union-attr]
    assert middle == {
        ("492.0", "187.0"),
        ("492.0", "352.0"),
        ("492.0", "312.0"),
    }  # half way, beside the axis, at its foot


def test_rungs_are_where_asha_compares() -> None:
    assert "ASHA compares here: epoch 1 " in page_of(ordinary_sweep()).text
    assert "ASHA compares here: epoch 3 " in page_of(ordinary_sweep()).text
    assert "ASHA compares here: epoch 9" not in page_of(ordinary_sweep()).text
    without = dataclasses.replace(ordinary_sweep(), space={**SPACE, "scheduler": "none"})
    assert "ASHA compares" not in page_of(without).text


def test_shapes_differ() -> None:
    assert (
        len(
            {re.sub(r"c\d", "", mark(group, 0, 0)) for group in range(6)}
            | {mark(0, 0, 0, look="failed")}
        )
        == 7
    )


def test_the_bars_of_an_epoch_stand_on_each_other() -> None:
    page = Page(stacked("t", "epoch", "trials", [("run", [4, 2]), ("spared", [0, 2])]))
    boxes = [
        {k: float(a[k] or 0) for k in ("x", "y", "width", "height")}
        for tag, a in page.tags
        if tag == "rect"
    ]
    assert len(boxes) == 3
    assert boxes[0]["height"] == pytest.approx(2 * boxes[1]["height"], abs=0.11)
    assert boxes[2]["y"] + boxes[2]["height"] == pytest.approx(boxes[1]["y"], abs=0.11)
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


# Axes


def test_axes_follow_the_space() -> None:
    axes = axes_of(SPACE["space"], [one.values for one in ordinary_sweep().trials])
    assert [
        (axis.name, axis.kind, axis.low, axis.high) for axis in axes if axis.kind != "choice"
    ] == [
        ("finetune.learning_rate", "log", 3e-4, 1e-2),
        ("pretrain.mask.p", "linear", 0.2, 0.9),
        ("pretrain.mask.k", "linear", 2, 6),
    ]
    assert axes[1].choices == ("single", "last-biased", "recency", "span", "multi")
    assert [axis.name for axis in axes][:3] == [
        "finetune.learning_rate",
        "pretrain.mask.strategy",
        "pretrain.mask.p",
    ]


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis("a", "log", 3e-4, 5e-3), ["5e-4", "1e-3", "2e-3", "5e-3"]),
        (Axis("a", "log", 1e-5, 1), ["1e-5", "1e-4", "1e-3", "0.01", "0.1", "1"]),
        (Axis("a", "log", 0.4, 0.45), ["0.4", "0.41", "0.42", "0.43", "0.44", "0.45"]),
        (Axis("a", "linear", 2, 6), ["2", "3", "4", "5", "6"]),
        (Axis("a", "linear", 0.2, 0.9), ["0.2", "0.4", "0.6", "0.8"]),
        (Axis("a", "linear", 3, 3), ["3"]),
        (Axis("a", "linear", 0, 3e-14), ["0", "3e-14"]),
        (
            Axis("a", "linear", 0.04, 0.0401),
            ["0.04", "0.04002", "0.04004", "0.04006", "0.04008", "0.0401"],
        ),
        (Axis("a", "choice", choices=("x", "true")), ["x", "true"]),
    ],
)
def test_ticks(axis: Axis, labels: list[str]) -> None:
    assert [label for _, label in axis.ticks()] == labels


@given(
    st.sampled_from(["linear", "log"]),
    st.floats(1e-12, 1e12),
    st.floats(1.0, 1e15),
    st.integers(4, 9),
)
@settings(deadline=None)
def test_ticks_lie_on_their_axis_in_order(
    kind: Any, low: float, factor: float, wanted: int
) -> None:
    axis = Axis("a", kind, low, low * factor)
    marks = axis.ticks(wanted)
    shares = [share for share, _ in marks]
    assert shares == sorted(set(shares))
    assert all(-1e-5 <= share <= 1 + 1e-5 for share in shares)
    assert len(marks) <= 3 * wanted
    if factor > 1.5:
        assert len(marks) >= 2


@given(
    st.lists(
        st.one_of(
            st.booleans(),
            st.integers(-5, 5),
            st.floats(allow_nan=True),
            st.text(max_size=4),
            st.none(),
        ),
        min_size=1,
    )
)
@settings(deadline=None)
def test_whatever_the_values_are_they_lie_on_their_axis(values: list[Any]) -> None:
    (axis,) = axes_of({}, [{"key": value} for value in values])
    for value in values:
        assert 0 <= axis.at(value) <= 1
        assert isinstance(written(value), str)


def test_a_score_axis_holds_its_scores() -> None:
    assert (score_axis("s", [0.01, 0.05]).low, score_axis("s", [0.01, 0.05]).high) == (0, 0.05)
    assert score_axis("s", [0.049, 0.051]).low > 0.04
    assert score_axis("s", [3.0, 5.0], padded=False).low == 3
    assert (score_axis("s", []).low, score_axis("s", [0.2]).low) == (0, 0.2)


def test_values_are_written_as_in_a_recipe() -> None:
    values = [3e-4, 1.234e-5, 0.05, 12, 1e6, True, None, "a b", 0.0, 250.0, -2e-3]
    assert list(map(written, values)) == [
        "3e-4",
        "1.23e-5",
        "0.05",
        "12",
        "1e6",
        "true",
        "null",
        "a b",
        "0",
        "250",
        "-2e-3",
    ]


# What it must never do


def test_nothing_from_outside() -> None:
    source = report_of(with_finals(ordinary_sweep()))
    for forbidden in ("http:", "https:", "@import", "url(", "//cdn", "src="):
        assert forbidden not in source, forbidden
    for tag, attributes in Page(source).tags:
        assert tag not in {
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "image",
            "use",
            "form",
        }
        assert not {"src", "href", "srcset", "xlink:href", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]


def test_everything_is_escaped_and_one_script_may_run() -> None:
    source = report_of(awkward_sweep(EVIL))
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
        in source
    )
    page = Page(source)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(EVIL) > 10


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["running", "finished", "stopped", "failed", "interrupted"]),
            st.lists(st.floats(0, 1), max_size=4),
            st.dictionaries(
                st.sampled_from(
                    ["seed", "finetune.learning_rate", "pretrain.mask.strategy", "a.b"]
                ),
                st.one_of(
                    st.floats(1e-9, 1e9),
                    st.integers(-9, 9),
                    st.booleans(),
                    st.none(),
                    st.text(max_size=5),
                ),
            ),
            st.integers(0, 5),
        ),
        max_size=6,
    )
)
@settings(deadline=None, max_examples=60)
def test_any_sweep_has_a_page(drawn: list[Any]) -> None:
    trials = [trial(n, scores, status, values=values, planned_epochs=planned)
              for n, (status, scores, values, planned) in enumerate(drawn)]  # fmt: skip
    page = page_of(Sweep("s", SPACE, tuple(trials)))
    assert all(one.id in page.text for one in trials)
    assert all(math.isfinite(number) for number in numbers(Sweep("s", SPACE, tuple(trials))))


def test_what_is_no_number_is_not_drawn() -> None:
    odd = Trial(
        "t0000",
        {"finetune.learning_rate": math.nan, "a": math.inf},
        0,
        "failed",
        epochs=(epoch(1, math.nan),),
    )
    good = trial(1, [0.02], values={"finetune.learning_rate": 1e-3, "a": 1.0})
    source = report_of(Sweep("s", SPACE, (odd, good)))
    assert "t0001 leads" in source
    assert not re.search(r'(d|x|y|cx|cy|x1|y1|width|height)="[^"]*(nan|inf)', source)


def test_it_is_written_whole(tmp_path: Path) -> None:
    write_report(ordinary_sweep(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report_of(ordinary_sweep())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    write_report(EMPTY, "memory://sweep/report.html")


# In a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PROBE = """
const seen = (node) => node.getClientRects().length > 0 && getComputedStyle(node).visibility !== "hidden";
const named = (node) => (node.tagName + "." + (node.getAttribute("class") ?? "") + ": " + node.textContent.slice(0, 40)).trim();
const outside = [], clipped = [], overlaps = [], wide = innerWidth + 1;
const scrolled = (node) => { const box = node.closest(".wide"); return box && box.scrollWidth > box.clientWidth; };
for (const node of document.querySelectorAll("main *")) {
  if (!seen(node) || scrolled(node) || node.closest("pre")) continue;
  const box = node.getBoundingClientRect();
  if (box.left < -1 || box.right > wide) outside.push(named(node));
}
for (const svg of document.querySelectorAll("figure svg[role=img]")) {
  if (!seen(svg)) continue;
  const whole = svg.getBoundingClientRect(), boxes = [];
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    if (box.left < whole.left - 2 || box.right > whole.right + 2 || box.top < whole.top - 2 || box.bottom > whole.bottom + 2)
      clipped.push(named(text));
    for (const [other, old] of boxes) {
      const across = Math.min(box.right, old.right) - Math.max(box.left, old.left);
      const down = Math.min(box.bottom, old.bottom) - Math.max(box.top, old.top);
      if (across > 2 && down > 4) overlaps.push(named(text) + " / " + named(other));
    }
    boxes.push([text, box]);
  }
}
const tone = (query) => { const node = document.querySelector(query); return node && getComputedStyle(node).stroke; };
const found = {
  width: innerWidth, page: document.documentElement.scrollWidth, outside, clipped, overlaps,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  best: tone(".thread.best path.line"), worst: tone(".thread.q0 path.line"),
  group: getComputedStyle(document.querySelector("path.mark.c1") ?? document.body).fill,
  shown: [...document.querySelectorAll(".across, .down")].filter(seen).map((node) => node.className.replace("wide ", "")),
  charts: [...document.querySelectorAll("figure svg[role=img]")].filter(seen).length, lit: 0, tip: "",
};
const target = document.querySelector(".curve path.line");
if (target) {
  target.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 200, clientY: 200 }));
  const id = target.closest("[data-trial]").dataset.trial;
  found.lit = document.querySelectorAll(`.lit[data-trial=${id}]`).length;
  found.told = document.querySelector(".tip").textContent.startsWith(id);
  found.others = [...document.querySelectorAll(".lit")].filter((node) => node.dataset.trial !== id).length;
}
const note = document.createElement("output");
note.textContent = JSON.stringify(found);
document.body.append(note);
"""


NARROW = """<!doctype html><iframe src="page.html" style="width:WIDTHpx; height:900px; border:0"></iframe>
<script>onload = () => document.body.append(document.querySelector("iframe").contentDocument.querySelector("output"))</script>"""


def browse(tmp_path: Path, sweep: Sweep, width: int, dark: bool = False) -> dict[str, Any]:
    """What the probe, run inside the page in a real browser, measured; fails on anything that the
    console says."""
    if BROWSER is None:
        pytest.skip("no Chromium on PATH")
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    source = report_of(sweep).replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    path = tmp_path / "page.html"
    path.write_text(source.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    if width < 500:  # the narrowest window that Chromium opens
        path = tmp_path / "narrow.html"
        path.write_text(NARROW.replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9", f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr", "--v=0", "--dump-dom",
        "--allow-file-access-from-files",
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    told = re.search(r"<output>(.*)</output>", done.stdout, re.S)
    assert told is not None, done.stdout[-2000:]
    found: dict[str, Any] = json.loads(
        told[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    return found


def check_layout(found: dict[str, Any]) -> None:
    assert found["page"] <= found["width"], "the page scrolls sideways"
    assert found["outside"] == []
    assert found["clipped"] == []
    assert found["overlaps"] == []
    assert found["requests"] == []


@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_lays_it_out(tmp_path: Path, width: int) -> None:
    found = browse(tmp_path, with_finals(ordinary_sweep()), width)
    assert found["width"] == width
    check_layout(found)
    assert found["shown"] == ["across" if width > 760 else "down"]
    assert found["charts"] == 8
    assert (
        found["lit"] >= 5
    )  # it stands out in both drawings, in knobs and curves, and in the table
    assert found["others"] == 0
    assert found["told"]


def test_a_browser_paints_it_light_and_dark(tmp_path: Path) -> None:
    light = browse(tmp_path, ordinary_sweep(), 1200)
    dark = browse(tmp_path, ordinary_sweep(), 1200, dark=True)
    assert (light["dark"], dark["dark"]) == (False, True)
    for key in ("paper", "ink", "best", "worst", "group"):
        assert light[key] != dark[key], key
        assert re.match(r"rgb", light[key]), light[key]
    for found in (light, dark):
        assert contrast(found["ink"], found["paper"]) > 7
        assert contrast(found["group"], found["paper"]) > 3
        assert contrast(found["best"], found["paper"]) > 2 * contrast(
            found["worst"], found["paper"]
        )


def test_a_browser_lays_out_what_is_awkward(tmp_path: Path) -> None:
    for sweep in (
        awkward_sweep(EVIL),
        EMPTY,
        Sweep("s", SPACE, (trial(0, [0.02], values={"finetune.learning_rate": 1e-3}),)),
    ):
        for width in (1200, 400):
            check_layout(browse(tmp_path, sweep, width))


def contrast(one: str, other: str) -> float:
    """Of two colours as WCAG 2 counts it, 1 to 21."""
    light, dark = sorted(map(luminance, (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
