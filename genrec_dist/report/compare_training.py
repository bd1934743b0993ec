"""What a page of several runs knows of each of them; their curves on one axis, and their cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from genrec_shards.splits import Split

from genrec_dist.evaluation.compare import Comparison
from genrec_dist.report.html import duration, grid, text
from genrec_dist.report.run_files import RunFiles, is_number
from genrec_dist.report.score_tables import interval_of, table_row
from genrec_dist.report.svg import Line, line_chart, smooth

COLORS = 8
"""Colours of the page's palette; further runs begin again, dashed."""

Points = Callable[[RunFiles], list[tuple[float, float]]]


@dataclass(frozen=True)
class Entry:
    """One argument of the page: a run, or seeds of one recipe."""

    name: str
    seeds: list[RunFiles]
    color: int
    scores: dict[str, float]
    """Means over the seeds."""
    comparison: Comparison | None
    """With the first entry as B; None for the first itself."""

    def metrics(self, split: Split) -> list[dict[str, Any]]:
        return [run.metrics[split] for run in self.seeds]

    def interval(self, split: Split, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a single run; of several seeds their smallest and largest value."""
        rows = self.metrics(split)
        if len(rows) == 1:
            return interval_of(rows[0], key)
        return min(row[key] for row in rows), max(row[key] for row in rows)


def training_curves(entries: list[Entry]) -> str:
    charts = [
        line_chart(title, label, lines, from_zero=dots)
        for title, label, points, dots in (
            ("NDCG@10 on validation", "step", _scores_by_step, True),
            ("NDCG@10 on validation", "minutes of training", _scores_by_minute, True),
            ("Loss of finetuning", "step", _losses, False),
        )
        if (lines := _lines(entries, points, dots))
    ]
    if not charts:
        return ""
    return (
        f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div>'
        '<p class="small">Lines of one colour are seeds of one recipe. Losses are exponential '
        "averages over a 25th of the curve, and compare only where the tokens of the targets are "
        "the same.</p></section>"
    )


def _lines(entries: list[Entry], points: Points, dots: bool) -> list[Line]:
    """A line per training; of an entry's seeds the first has its name."""
    lines = []
    for entry in entries:
        for number, run in enumerate(entry.seeds):
            found = points(run)
            line = Line(
                entry.name,
                [x for x, _ in found],
                [y for _, y in found],
                entry.color % COLORS,
                dots,
                dashed=entry.color >= COLORS,
                in_legend=number == 0,
            )
            lines += [line] if found else []
    return lines


def _scores_by_step(run: RunFiles) -> list[tuple[float, float]]:
    return _series(run.stage("validation", "finetune"), "NDCG@10")


def _scores_by_minute(run: RunFiles) -> list[tuple[float, float]]:
    minutes = {
        event["step"]: seconds / 60
        for event, seconds in run.worked()
        if event.get("event") == "validation"
    }
    return [(minutes[step], score) for step, score in _scores_by_step(run) if step in minutes]


def _losses(run: RunFiles) -> list[tuple[float, float]]:
    points = _series(run.stage("step", "finetune"), "loss")
    smoothed = smooth([loss for _, loss in points], len(points) / 25)
    return [(step, loss) for (step, _), loss in zip(points, smoothed, strict=True)]


def _series(events: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(event["step"], event[key]) for event in events if is_number(event.get(key))]


def training_cost(entries: list[Entry], split: Split) -> str:
    """Means over seeds; the speed is the median of the logged steps."""
    rows = []
    for entry in entries:
        starts = [line for run in entry.seeds for line in run.of("start")]
        steps = [line for run in entry.seeds for line in run.of("step")]
        clocks = [clock[-1][1] for run in entry.seeds if (clock := run.worked())]
        last = [max(_numbers(run.of("step"), "step")) for run in entry.seeds if run.of("step")]
        cells = [
            starts[-1].get("device") or "–" if starts else "–",
            _mean(_numbers(starts, "parameters")),
            _mean(last),
            duration(fmean(clocks)) if clocks else "–",
            _mean([median(speeds)] if (speeds := _numbers(steps, "tokens_per_second")) else []),
            _mean(_numbers(entry.metrics(split), "users_per_second")),
        ]
        rows.append(table_row(entry.name, [text(cell) for cell in cells]))
    columns = "run", "device", "parameters", "steps", "training", "tokens/s", "users ranked/s"
    return f"<section><h2>Cost</h2>{grid(columns, rows)}</section>"


def _numbers(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if is_number(row.get(key))]


def _mean(values: list[float]) -> str:
    return f"{fmean(values):,.0f}" if values else "–"
