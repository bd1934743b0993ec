"""The table of metrics on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from genrec_dist.evaluation.metrics import METRICS, as_written

SORTED_BY = "NDCG@10"
BOUND = "bound"
"""The key of a row that no system can pass, such as an oracle's: it is not marked as the best."""


def format_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of systems, the best NDCG@10 first and marked, with 95 % intervals.

    Args:
        rows: metrics (what `ResultsWriter.finish` returns, or {"system": ..., "HR@5": ...}). The
            baselines that stand beside a row in `beside` get rows too, unless the table has them
            already. Figures are written as .0566, and as a dash where there is none.
    """
    rows = list(rows)
    rows += [row for metrics in rows for row in _beside_rows(metrics)]
    rows.sort(key=_sort_value, reverse=True)
    systems = [row for row in rows if not row.get(BOUND)]
    best = systems[0] if len(systems) > 1 and _sort_value(systems[0]) > -math.inf else None
    with_intervals = any(row.get("ci95") for row in rows)
    caption = [f"* best {SORTED_BY}"] if best is not None else []
    caption += ["behind each figure its 95 % interval"] if with_intervals else []
    table = Table("system", caption="; ".join(caption) or None, caption_justify="left")
    for column in METRICS:
        # Where the terminal is narrow the interval is below the figure.
        table.add_column(column, justify="right", min_width=len(".0000-.0000"))
    shown: set[tuple[str, ...]] = set()
    for row in rows:
        name = str(row.get("system", ""))
        figures = (name, *(as_written(row.get(column)) for column in METRICS))
        if figures in shown:
            continue
        shown.add(figures)
        cells = [_cell(row, column) for column in METRICS]
        mark, style = (" *", "bold") if row is best else ("", "")
        table.add_row(Text(f"{name}{mark}"), *cells, style=style)
    return table


def _cell(row: Mapping[str, Any], column: str) -> Text:
    text = Text(as_written(row.get(column)))
    interval = (row.get("ci95") or {}).get(column)
    if interval:
        text.append(f" {as_written(interval[0])}-{as_written(interval[1])}", "dim")
    return text


def _sort_value(row: Mapping[str, Any]) -> float:
    value = row.get(SORTED_BY)
    return -math.inf if value is None else float(value)


def _beside_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    beside = metrics.get("beside") or {}
    return [
        {**scores, "system": name}
        for name, scores in beside.items()
        if scores and name != metrics.get("system")
    ]
