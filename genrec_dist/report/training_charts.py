"""The parts of a run's page about its training: curves by step, and how fast it went."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from genrec_dist.config.recipe import sample_unit
from genrec_dist.report.html import grid, text
from genrec_dist.report.run_files import RunFiles, is_number
from genrec_dist.report.svg import Line, line_chart, smooth

STAGES = ("pretrain", "finetune")


def curves(run: RunFiles) -> str:
    """Loss and validation by step; "" where nothing was logged."""
    charts, losses, scores = [], [], []
    for color, stage in enumerate(STAGES):
        losses += _smoothed(run.stage("step", stage), "loss", stage, color)
        losses.append(
            Line(
                f"{stage}, validation",
                *_series(run.stage("validation", stage), "loss"),
                color,
                dots=True,
                dashed=True,
            )
        )
        for offset, key in enumerate(("NDCG@10", "HR@10")):
            xs, ys = _series(run.stage("validation", stage), key)
            name = key if stage == "finetune" else f"{key}, {stage}"
            scores.append(
                Line(name, xs, ys, offset if stage == "finetune" else offset + 2, dots=True)
            )
    if any(len(line.xs) for line in losses):
        charts.append(line_chart("Loss", "step", losses))
    if any(len(line.xs) for line in scores):
        charts.append(line_chart("Validation", "step", scores, from_zero=True))
    if not charts:
        return ""
    users = {count for line in run.of("validation") if is_number(count := line.get("users"))}
    told = (
        f" Validation: {', '.join(f'{count:,}' for count in sorted(users))} users." if users else ""
    )
    return (
        f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div>'
        '<p class="small">Faint: as logged; strong: exponential average over a 25th of the '
        f"curve.{told}</p></section>"
    )


def throughput(run: RunFiles) -> str:
    """Rates and shares by stage, speed and waiting by step; "" where nothing was logged."""
    rows = []
    rates, waits = [], []
    for color, stage in enumerate(STAGES):
        steps = run.stage("step", stage)
        if not steps:
            continue
        rates += _smoothed(steps, "tokens_per_second", stage, color)
        waits += _smoothed(steps, "data_wait_share", stage, color)
        cells = [
            _figure(steps, "tokens_per_second", median, "{:,.0f}"),
            _figure(steps, "samples_per_second", median, "{:,.0f} " + _sample_unit(run, stage)),
            _figure(steps, "mfu", median, "{:.1%}"),
            _figure(steps, "padding_share", fmean, "{:.1%}"),
            _figure(steps, "data_wait_share", fmean, "{:.1%}"),
            _figure(steps, "peak_memory_gib", max, "{:.2f} GiB"),
        ]
        rows.append(
            f'<tr><th scope="row">{stage}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    if not rows:
        return ""
    titles = ("Tokens per second", rates), ("Share of the time that waits for data", waits)
    charts = "".join(
        line_chart(name, "step", lines, from_zero=True) for name, lines in titles if lines
    )
    return (
        f'<section><h2>Throughput</h2>{grid(_RATES, rows)}<div class="charts">{charts}</div>'
        '<p class="small">Rates count real tokens and are medians of the logged steps; shares are '
        "means. MFU: share of "
        f"the device's peak, {text(_peak(run))}.</p></section>"
    )


_RATES = (
    "stage",
    "tokens/s",
    "per second",
    "MFU",
    "padding",
    "waiting for data",
    "memory of rank 0",
)


def _sample_unit(run: RunFiles, stage: str) -> str:
    section = run.recipe.get(stage)
    return sample_unit(section.get("targets")) if isinstance(section, dict) else "samples"


def _peak(run: RunFiles) -> str:
    """What the run took for its device's peak."""
    peak = run.of("start")[-1].get("peak") if run.of("start") else None
    return str(peak["source"]) if isinstance(peak, dict) and "source" in peak else "not known here"


def _smoothed(events: list[dict[str, Any]], key: str, name: str, color: int) -> list[Line]:
    """A value by step as logged, faint, and its running mean; no line where nothing was logged."""
    xs, ys = _series(events, key)
    if not xs:
        return []
    return [Line(name, xs, ys, color, faint=True), Line(name, xs, smooth(ys, len(ys) / 25), color)]


def _series(events: Iterable[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(event["step"], event[key]) for event in events if is_number(event.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def _figure(events: list[dict[str, Any]], key: str, reduce: Any, form: str) -> str:
    values = _series(events, key)[1]
    return form.format(reduce(values)).replace("%", " %") if values else "–"
