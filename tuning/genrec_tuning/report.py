"""The page of a sweep, `report.html`: which trial leads, which keys matter, what was stopped and
spared. One file with plotly.js in it, which opens without a network and may load nothing."""

from __future__ import annotations

import io
import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import pyarrow.parquet as pq
import yaml

from genrec_dist.report.html import definitions, duration, grid, page, percent, text
from genrec_dist.report.run_files import is_number
from genrec_dist.report.svg import score
from genrec_tuning.export import best_yaml, table_of
from genrec_tuning.record import Final, Folder, Sweep, Trial, show_value

Figure: TypeAlias = dict[str, Any]
"""A figure of Plotly's: `data`, its traces, and `layout`."""
SCORE = "NDCG@10"
MOST_KEYS = 7
"""Numeric keys that get a chart of their own."""
METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
STATES = {"stopped": "stopped by the scheduler"}
# Tones that are read on light and on dark paper.
PALETTE = ("#2f86c4", "#d3691e", "#1d9a75", "#b9559a", "#a08310", "#7474d6")
GREY, PALE = "#8a949d", "rgba(128,128,128,.15)"
WORST, BEST = (168, 184, 190), (9, 104, 172)
EPOCH_COLORS = ["#2f86c4", "#a9cbe2", "#8fcfb9", GREY]
BELOW = -0.15
"""Where the parallel coordinates show a key that does not apply, and a missing score."""
RUN, SPARED, PATIENCE = "run", "spared by the scheduler", "not needed: patience"
OPEN = "not run: failed, interrupted or still running"
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
    sections = [_header(sweep), _lead(sweep), _finals(sweep)]
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
    return page(sweep.name, [*sections, _table(sweep), _space(sweep)], STYLE, script)


def charts_of(sweep: Sweep) -> dict[str, tuple[str, Figure]]:
    """Name of each chart -> its title, as HTML, and its figure. Plotly reads tags in labels, so
    each string goes through `text` first."""
    trials = sorted(sweep.trials, key=lambda trial: trial.id)
    kinds = {key: kind for key in sweep.keys if (kind := _kind(sweep, key))}
    choices = [key for key, kind in kinds.items() if kind == "choice"]
    by = min(choices, key=lambda key: not key.endswith("mask.strategy"), default=None)
    # The learning rate first: it is what people look for.
    numeric = [key for key, kind in kinds.items() if kind != "choice"]
    numeric.sort(key=lambda key: not key.endswith("learning_rate"))
    groups = {t.id: show_value(t.values[by]) if by in t.values else "not applied" for t in trials}
    colors = dict(zip(sorted(set(groups.values())), itertools.cycle(PALETTE), strict=False))
    charts: dict[str, tuple[str, Figure]] = {}

    def by_group(key: str, **style: Any) -> list[dict[str, Any]]:
        """Traces of the score by the value of a key, one per group."""
        traces = []
        for group, color in colors.items():
            own = [t for t in trials if t.best and key in t.values and groups[t.id] == group]
            xs = [t.values[key] for t in own]
            xs = [x if kinds[key] != "choice" else text(show_value(x)) for x in xs]
            ys, about = [t.best.NDCG10 for t in own if t.best], list(map(_about, own))
            trace = {"name": text(group), "x": xs, "y": ys, "text": about, "hoverinfo": "text"}
            marker = {"color": color, "size": 9, "line": {"width": 2}}
            if style["type"] == "scatter":
                ended = [trial.status == "finished" for trial in own]
                marker["symbol"] = ["circle" if end else "circle-open" for end in ended]
            traces += [{**trace, "marker": marker, **style}] if own else []
        return traces

    if kinds and any(trial.best for trial in trials):
        title = f"Every trial, coloured by validation {SCORE}"
        charts["parallel"] = (title, _parallel(trials, kinds))
    for number, key in enumerate(numeric[:MOST_KEYS]):
        if traces := by_group(key, type="scatter", mode="markers"):
            figure = _figure(traces, key, f"validation {SCORE}")
            figure["layout"]["xaxis"]["type"] = kinds[key]
            charts[f"key{number}"] = (f"{SCORE} against {text(key)}", figure)
    if by and (traces := by_group(by, type="box", boxpoints="all")):
        charts["choice"] = (f"{SCORE} by {text(by)}", _figure(traces, by, f"validation {SCORE}"))
    for field, title in (("NDCG10", f"Validation {SCORE}"), ("loss", "Validation loss")):
        traces, named = [], set[str]()
        for trial in trials:
            points = [(epoch.epoch, getattr(epoch, field)) for epoch in trial.epochs]
            points = [point for point in points if is_number(point[1])]
            group = groups[trial.id]
            trace = _line(trial, points, colors[group], trial == sweep.best)
            first = {"showlegend": group not in named, "legendgroup": text(group)}
            named |= {group} if points else set()
            traces += [{**trace, **first, "name": text(group)}] if points else []
        if traces:
            upright = {"type": "line", "yref": "paper", "y0": 0, "y1": 1}
            upright["line"] = {"color": GREY, "dash": "dot", "width": 1}
            rungs = [{**upright, "x0": rung, "x1": rung} for rung in rungs_of(sweep)]
            charts[field] = (title, _figure(traces, "epoch", title, shapes=rungs))
    bars = [
        {"type": "bar", "name": name, "x": list(range(1, len(numbers) + 1)), "y": numbers}
        for name, numbers in epoch_counts(sweep).items()
        if any(numbers)
    ]
    if bars:
        figure = _figure(bars, "epoch", "trials", barmode="stack", colorway=EPOCH_COLORS)
        charts["epochs"] = ("What became of the planned epochs", figure)
    return charts


def _figure(traces: list[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": text(x)}}, "yaxis": {"title": {"text": text(y)}}}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    clear = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    more = {"legend": legend, "margin": {"t": 10, "r": 10, "b": 50, "l": 60}}
    return {"data": traces, "layout": {**axes, **clear, **more, **layout}}


def _line(trial: Trial, points: list[Any], color: str, best: bool) -> dict[str, Any]:
    """A trial's line through points (x, y): dashed where it was not run to its end."""
    dash = "solid" if trial.status == "finished" else "dash"
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": color, "dash": dash, "width": 4 if best else 2},
        "text": _about(trial),
        "hoverinfo": "text",
        "name": trial.id,
    }


def _kind(sweep: Sweep, key: str) -> str | None:
    """How a key is drawn: `linear`, `log` or `choice`; None where no trial has it."""
    domains = sweep.keys[key]
    values = [trial.values[key] for trial in sweep.trials if key in trial.values]
    if not values:
        return None
    if any(kind == "choice" for kind, _ in domains) or not all(map(is_number, values)):
        return "choice"
    log = any(kind.startswith("log") for kind, _ in domains)
    return "log" if log and min(map(float, values)) > 0 else "linear"  # type: ignore[arg-type]


def _parallel(trials: list[Trial], kinds: dict[str, str]) -> Figure:
    """Parallel coordinates by ordinary lines. Plotly's own trace draws by WebGL, and its library
    evaluates text, which the page's policy forbids."""
    lines: dict[str, list[tuple[int, float]]] = {trial.id: [] for trial in trials}
    labels = []
    for x, (key, kind) in enumerate([*kinds.items(), (SCORE, "linear")]):
        values: dict[str, Any] = {t.id: t.values[key] for t in trials if key in t.values}
        if key == SCORE:
            values = {trial.id: trial.best.NDCG10 for trial in trials if trial.best}
        # A value's place on its axis before it is scaled: 0 to 1 from the lowest to the highest.
        names = list(map(show_value, values.values()))
        order = sorted(set(names))
        places = [
            order.index(name) if kind == "choice" else math.log(v) if kind == "log" else float(v)
            for name, v in zip(names, values.values(), strict=True)
        ]
        low, span = min(places), (max(places) - min(places)) or 1.0
        shares = {id_: (at - low) / span for id_, at in zip(values, places, strict=True)}
        for id_, line in lines.items():
            line.append((x, shares.get(id_, BELOW)))
        ends = dict(zip(shares.values(), names, strict=True))
        ends = ends if kind == "choice" else {end: ends[end] for end in (0.0, max(ends))}
        labels += [{"x": x, "y": y, "text": text(name[:24])} for y, name in ends.items()]
    best = max(trials, key=lambda trial: lines[trial.id][-1][1])
    traces = []
    for trial in trials:
        share = max(0.0, lines[trial.id][-1][1])  # the score's, which is the last axis
        tone = [round(a + share * (b - a)) for a, b in zip(WORST, BEST, strict=True)]
        color = f"rgb({','.join(map(str, tone))})" if trial.best else GREY
        traces.append(_line(trial, lines[trial.id], color, trial == best))
    labels = [{**label, "showarrow": False, "bgcolor": PALE} for label in labels]
    figure = _figure(traces, "", "", annotations=labels, showlegend=False)
    names = [text(key.rpartition(".")[2]) for key in kinds] + [SCORE]
    figure["layout"]["xaxis"] |= {"tickvals": list(range(len(names))), "ticktext": names}
    figure["layout"]["yaxis"] |= {"visible": False}
    return figure


def _about(trial: Trial) -> str:
    """What the pointer shows of a trial, one line per fact."""
    ran = f"{trial.last_epoch} of {trial.planned_epochs} epochs"
    lines = [f"{trial.id}: {trial.status} after {ran}"]
    if trial.best:
        lines.append(f"{SCORE} {score(trial.best.NDCG10)} at epoch {trial.best.epoch}")
    elif trial.reason:
        lines.append(trial.reason)
    lines += [f"{key} {show_value(value)}" for key, value in trial.values.items()]
    return "<br>".join(map(text, lines))


def rungs_of(sweep: Sweep) -> list[int]:
    """Epochs at which ASHA compares trials, as far as the space says so."""
    grace, reduction = sweep.space.get("grace"), sweep.space.get("reduction")
    length = max((trial.planned_epochs for trial in sweep.trials), default=0)
    if sweep.space.get("scheduler") != "asha" or not is_number(grace) or not is_number(reduction):
        return []
    if grace < 1 or reduction <= 1:
        return []
    powers = (int(grace * reduction**power) for power in range(64))
    return list(itertools.takewhile(lambda epoch: epoch < length, powers))


def epoch_counts(sweep: Sweep) -> dict[str, list[int]]:
    """What became of the planned epochs -> number of trials, per epoch from 1."""
    lengths = [max(trial.planned_epochs, trial.last_epoch) for trial in sweep.trials]
    counts = {name: [0] * max(lengths, default=0) for name in (RUN, SPARED, PATIENCE, OPEN)}
    for trial, length in zip(sweep.trials, lengths, strict=True):
        rest = {"stopped": SPARED, "finished": PATIENCE}.get(trial.status, OPEN)
        for epoch in range(length):
            counts[RUN if epoch < trial.last_epoch else rest][epoch] += 1
    return counts


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
    said = "".join(f'<p class="lead">{_sentence(one)}</p>' for one in sentences)
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


def _finals(sweep: Sweep) -> str:
    if not sweep.finals:
        return ""
    systems: dict[str, list[Final]] = {}
    for final in sweep.finals:
        systems.setdefault(final.system, []).append(final)
    means = {name: _mean([final.NDCG10 for final in runs]) for name, runs in systems.items()}
    rows = []
    for name in sorted(systems, key=lambda name: -(means[name] or 0.0)):
        runs, won = systems[name], name == sweep.winner
        each = ", ".join(score(_mean([final.NDCG10])) for final in runs)
        cells = [f"{sum(final.status == 'finished' for final in runs)} of {len(runs)}"]
        cells += [f"{score(means[name])}<small>{text(each)}</small>"]
        cells += [score(_mean([(f.test or {}).get(key) for f in runs])) for key in METRICS]
        rows.append(_row(f"{name} (winner)" if won else _system(name), cells, won))
    columns = ("", "seeds run", f"validation {SCORE}", *(f"test {key}" for key in METRICS))
    looked = " and ".join(_system(name) for name in systems if any(f.test for f in systems[name]))
    rule = "Means over seeds, each seed in small figures. The winner has the best mean on "
    rule += f"validation; test was looked at by {looked or 'nobody yet'}"
    return (
        f'<section><h2>Finals</h2><p class="lead">{_sentence(verdict(sweep))}</p>'
        f'{grid(columns, rows)}<p class="small">{text(rule)}.</p>{_comparison(sweep)}</section>'
    )


def verdict(sweep: Sweep) -> str:
    """What the finals showed, in plain words."""
    if sweep.winner is None:
        return "The finals have no winner yet."
    if not sweep.comparison:
        return (
            f"{sweep.winner} wins on validation; "
            "on test it has not been compared with the base recipe."
        )
    said = sweep.comparison.get("verdict", "")
    return f"{sweep.winner} wins on validation. On test, it (A) and the base recipe (B): {said}"


def _comparison(sweep: Sweep) -> str:
    rows = []
    for key, row in ((sweep.comparison or {}).get("metrics") or {}).items():
        numbers = [row.get(name) for name in ("a", "b", "difference", "p_holm")]
        numbers += row.get("ci95") or [None]
        if all(map(is_number, numbers)):
            a, b, difference, p, low, high = numbers
            cells = [
                score(a),
                score(b),
                f"{difference:+.4f}<small>{low:+.4f} to {high:+.4f}</small>",
            ]
            rows.append(_row(key, [*cells, f"{p:.4f}"], ours=False))
    head = ("on test, paired over users and seeds", text(sweep.winner), "base recipe")
    return grid((*head, "difference, 95 % interval", "p after Holm"), rows) if rows else ""


def _table(sweep: Sweep) -> str:
    """What `sweep.parquet` holds, the best trial first."""
    if not sweep.trials:
        return ""
    forms: dict[str, Any] = {"NDCG@10": score, "HR@10": score, "seconds": duration}
    forms |= {"loss": "{:.3f}".format, "tokens_per_second": "{:,.0f}".format}
    rows = []
    found = table_of(sweep).to_pylist()
    for row in sorted(found, key=lambda row: (-(row[SCORE] or 0.0), row["trial"])):
        cells = [
            "–" if value is None else text(forms.get(key, show_value)(value))
            for key, value in row.items()
        ]
        ours = sweep.best is not None and row["trial"] == sweep.best.id
        rows.append(_row(row["trial"], cells[1:], ours))
    return (
        f'<section><h2>All trials</h2><div class="trials">{grid(map(text, found[0]), rows)}</div>'
        '<p class="small">Scores are those of each trial\'s best epoch on validation. '
        "–: not known, or does not apply. The same table: sweep.parquet.</p></section>"
    )


def _row(name: str, cells: list[str], ours: bool) -> str:
    """A table row; cells are HTML."""
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{" class=ours" if ours else ""}><th scope="row">{text(name)}</th>{inside}</tr>'


def _space(sweep: Sweep) -> str:
    own = {key: value for key, value in sweep.space.items() if key not in ("name", "recipe")}
    parts = {"Space": own, "Base recipe, resolved": sweep.space.get("recipe")}
    return "".join(
        f"<details><summary>{name}</summary><pre>"
        f"{text(yaml.safe_dump(part, sort_keys=False, allow_unicode=True))}</pre></details>"
        for name, part in parts.items()
        if part
    )


def _system(name: str) -> str:
    return "the base recipe" if name == "base" else name


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if is_number(value)]
    return fmean(known) if known else None


def _sentence(words: str) -> str:
    """Text whose percent signs stay with their numbers."""
    return text(words).replace(" %", "&nbsp;%")
