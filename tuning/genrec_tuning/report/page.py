"""The page of a sweep, `report.html`: which trial leads, which keys matter, what was stopped and
spared. One file with plotly.js in it, which opens without a network and may load nothing."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from genrec_dist.report.html import definitions, duration, page, percent, text
from genrec_dist.report.run_files import is_number
from genrec_dist.report.svg import score
from genrec_tuning.export import best_yaml, table_of
from genrec_tuning.record import Folder, Sweep, show_value
from genrec_tuning.report.charts import SCORE, charts_of
from genrec_tuning.report.tables import finals_section, sentence, trials_section

STATES = {"stopped": "stopped by the scheduler"}
NOTE = """<p class="small">Dashed or hollow: not run to its end, so its score is that of fewer
epochs. Epochs are those of the last stage, counted from 1; dotted uprights are the epochs at which
ASHA compares trials and stops the losing ones. In the first chart the better trials are bluer,
and a line below an axis is a trial to which the key does not apply, or one without a score.</p>"""
STYLE = """
figure.whole { grid-column: 1 / -1; }
.chart { height: 400px; }
.values { display: flex; flex-wrap: wrap; gap: 12px 36px; }
.values dd { font-weight: 600; overflow-wrap: anywhere; }
"""
# Text and lines of the charts take the colours of the page, which follow the system's.
SCRIPT = """
"use strict";
const draw = () => {
  const style = getComputedStyle(document.documentElement);
  const [ink, rule] = ["--soft", "--rule"].map((name) => style.getPropertyValue(name).trim());
  for (const [id, {data, layout}] of Object.entries(CHARTS)) {
    const own = {...layout, font: {color: ink}};
    for (const key of ["xaxis", "yaxis"])
      own[key] = {...layout[key], gridcolor: rule, linecolor: rule, zerolinecolor: rule};
    Plotly.react(id, data, own, {responsive: true, displayModeBar: false});
  }
};
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def write_results(sweep: Sweep, directory: str | Path) -> None:
    """Write `sweep.parquet`, `report.html` and, once a trial has come to its end with a score,
    `best.yaml`; each file whole or not at all.

    Args:
        sweep: the record.
        directory: the sweep's, here or at an address that fsspec knows.
    """
    folder, parquet = Folder(directory), io.BytesIO()
    pq.write_table(table_of(sweep), parquet)
    folder.write("sweep.parquet", parquet.getvalue())
    if sweep.best is not None:
        folder.write("best.yaml", best_yaml(sweep))
    folder.write("report.html", report_html(sweep))


def check_plotly() -> None:
    """Raise ValueError, one line, where plotly is not installed."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise ValueError("plotly is not installed: pip install 'genrec-dist[tune]'") from None


def report_html(sweep: Sweep) -> str:
    """The page as HTML; a sweep without trials has one too."""
    from plotly.offline import get_plotlyjs

    charts = charts_of(sweep)
    sections = [_header(sweep), _lead(sweep), finals_section(sweep)]
    script = ""
    if charts:
        drawn = "".join(
            f"<figure{' class=whole' if name == 'parallel' else ''}><figcaption><b>{title}</b>"
            f'</figcaption><div class="chart" id="{name}"></div></figure>'
            for name, (title, _) in charts.items()
        )
        noscript = '<noscript><p class="small">The charts need JavaScript.</p></noscript>'
        drawn = f'{noscript}<div class="charts">{drawn}</div>{NOTE}'
        sections.append(f"<section><h2>Trials and their values</h2>{drawn}</section>")
        figures = {name: figure for name, (_, figure) in charts.items()}
        # In JSON `<` has an escape, so nothing in the data can end the script.
        data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
        script = f"{get_plotlyjs()};\nconst CHARTS = {data};\n{SCRIPT}"
    return page(sweep.name, [*sections, trials_section(sweep), _space(sweep)], STYLE, script)


def _header(sweep: Sweep) -> str:
    space, planned = sweep.space, sweep.space.get("trials")
    of = f" of {planned}" if is_number(planned) and planned != len(sweep.trials) else ""
    facts: list[tuple[str, Any]] = [("trials", f"{len(sweep.trials)}{of}")]
    states = Counter(STATES.get(trial.status, trial.status) for trial in sweep.trials)
    facts += sorted(states.items())
    rungs = f", grace {space.get('grace')}, reduction {space.get('reduction')}"
    for key in ("base", "search", "scheduler", "seed"):
        if space.get(key) is not None:
            facts.append((key, f"{space[key]}{rungs if space[key] == 'asha' else ''}"))
    if sweep.started > 0:
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(sweep.started))))
    facts += [("worked on", duration(sweep.hours * 3600))] * (sweep.hours > 0)
    facts += [("resumed", f"{sweep.resumed} ×")] * (sweep.resumed > 0)
    head = f'<p class="kicker">GenRec sweep</p><h1>{text(sweep.name)}</h1>'
    return f"<header>{head}{definitions(facts, 'facts')}</header>"


def _lead(sweep: Sweep) -> str:
    values = [(k, show_value(v)) for k, v in (sweep.best.values if sweep.best else {}).items()]
    sentences = [headline(sweep), saving(sweep)] if sweep.trials else [headline(sweep)]
    said = "".join(f'<p class="lead">{sentence(one)}</p>' for one in sentences)
    return f"<section>{said}{definitions(values, 'values') if values else ''}</section>"


def headline(sweep: Sweep) -> str:
    """Which trial leads, by how much, and what that is worth, in plain words."""
    best = sweep.best
    if best is None or best.best is None:
        running = sum(trial.status == "running" for trial in sweep.trials)
        if running:
            return f"No trial has come to an end with a score yet; running: {running}."
        if sweep.trials:
            return "No trial has a score: the reasons are in the table of trials."
        return "No trial has been started yet."
    said = f"{best.id} leads with validation {SCORE} {score(best.best.NDCG10)}, "
    said += f"reached at epoch {best.best.epoch} of {best.planned_epochs}."
    others = sweep.ranked[1:]
    if others and others[0].best:
        said += f" Next is {others[0].id} with {score(others[0].best.NDCG10)}."
    if best.status == "stopped":
        said += f" It was stopped by the scheduler after {best.last_epoch} epochs."
    if others and sweep.winner is None:
        said += " The highest of several scores flatters its trial; "
        said += "genrec tune --finish repeats the best three with other seeds."
    return said


def saving(sweep: Sweep) -> str:
    """What the scheduler spared of the epochs that were planned, in plain words."""
    ended = [t for t in sweep.trials if t.status in ("finished", "stopped") and t.planned_epochs]
    if not ended:
        return "No trial has come to an end yet."
    planned, run = sum(t.planned_epochs for t in ended), sum(t.last_epoch for t in ended)
    stopped = [trial for trial in ended if trial.status == "stopped"]
    spared = sum(trial.planned_epochs - trial.last_epoch for trial in stopped)
    said = f"Of {planned} epochs planned for the trials that came to an end ({len(ended)}), "
    said += f"{run} were run. The scheduler stopped {len(stopped) or 'none'} of them"
    if stopped:
        said += f" and spared {spared} epochs, {percent(spared / planned)}, "
        said += "of running every trial to its end"
    if patient := planned - run - spared:
        said += f". Patience ended others early: {patient} epochs"
    return f"{said}."


def _space(sweep: Sweep) -> str:
    own = {key: value for key, value in sweep.space.items() if key not in ("name", "recipe")}
    parts = {"Space": own, "Base recipe, resolved": sweep.space.get("recipe")}
    return "".join(
        f"<details><summary>{name}</summary><pre>"
        f"{text(yaml.safe_dump(part, sort_keys=False, allow_unicode=True))}</pre></details>"
        for name, part in parts.items()
        if part
    )
