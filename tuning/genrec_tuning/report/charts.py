"""The charts of a sweep's page, as figures of Plotly's."""

from __future__ import annotations

import itertools
import math
from typing import Any, TypeAlias

from genrec_dist.report.html import text
from genrec_dist.report.run_files import is_number
from genrec_dist.report.svg import score
from genrec_tuning.record import Sweep, Trial, show_value

Figure: TypeAlias = dict[str, Any]
"""A figure of Plotly's: `data`, its traces, and `layout`."""
SCORE = "NDCG@10"
MOST_KEYS = 7
"""Numeric keys that get a chart of their own."""
# Tones that are read on light and on dark paper.
PALETTE = ("#2f86c4", "#d3691e", "#1d9a75", "#b9559a", "#a08310", "#7474d6")
GREY, PALE = "#8a949d", "rgba(128,128,128,.15)"
WORST, BEST = (168, 184, 190), (9, 104, 172)
EPOCH_COLORS = ["#2f86c4", "#a9cbe2", "#8fcfb9", GREY]
BELOW = -0.15
"""Where the parallel coordinates show a key that does not apply, and a missing score."""
RUN, SPARED, PATIENCE = "run", "spared by the scheduler", "not needed: patience"
OPEN = "not run: failed, interrupted or still running"


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
