"""What the rows say: tables for the terminal and in Markdown, what is comparable with what, and
paired comparisons."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from genrec_dist.evaluation.compare import Comparison, compare
from genrec_dist.evaluation.metrics import as_written
from genrec_dist.reproduce.published import METRICS, SETS, SOURCE, SetName, published_rows
from genrec_dist.reproduce.result_rows import Row
from genrec_dist.reproduce.systems import COMPARED, EQUAL, REFIT, WITHOUT, ProtocolName

FIELDS = ("numbering", "split", "ties", "trained_through", "exclude_history", "users")
"""What two rows must share before one may be called better."""
_COLUMNS = ("system", "through", "runs", *METRICS)
"""Through: the last position that was trained on."""


def cells_of(rows: list[Row], protocol: ProtocolName, name: SetName) -> list[tuple[str, ...]]:
    """A line each: ours, and under the paper's protocol the published rows behind them."""
    lines = []
    for row in rows:
        scores = row.scores()
        figures = (_figure(scores[metric]) for metric in METRICS)
        lines.append((row.name, row.fields["trained_through"], str(len(row.runs)), *figures))
    if protocol == "paper":
        for published, values in published_rows(name).items():
            lines.append(
                (published, "not said", "–", *(as_written(values[metric]) for metric in METRICS))
            )
    return lines


def table_of(rows: list[Row], protocol: ProtocolName, name: SetName) -> Table:
    table = Table(*_COLUMNS, title=f"{name}, test, {protocol}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in cells_of(rows, protocol, name):
        table.add_row(*cells, style="dim" if cells[0].endswith("published") else None)
    return table


def markdown_of(rows: list[Row], protocol: ProtocolName, name: SetName) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *cells_of(rows, protocol, name)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comparable(rows: list[Row], protocol: ProtocolName, name: SetName) -> list[str]:
    """Which rows may be ranked among each other, in words; those of one line alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([_field(row, key) for key in FIELDS]), []).append(row)
    lines = [
        f"Comparable with each other ({_words(found[0])}): {_names(found)}."
        for found in groups.values()
    ]
    if protocol == "paper":
        lines += _beside_published(rows, name)
        lines.append(
            "These codes are the file's own numbers, which in the shared files follow first appearance, test items included: "
            "the counting rule's row, which learns nothing, is what they alone give away. No row here is comparable with a "
            "leak-free one."
        )
    return lines


def _beside_published(rows: list[Row], name: SetName) -> list[str]:
    found = SETS[name]
    if found.pretrained is None:
        return [f"The paper ({SOURCE}) has no row of {name}."]
    lines = [
        f"The published rows ({SOURCE}, Tables 1 and 3) share the numbering and the leave-one-out split. Whether t_n-1 was trained "
        "on, whether lists leave out the history and how the epoch was chosen is not said there: they stand beside, unranked."
    ]
    above = [f"{row.name} {_times_above(row, found.pretrained)}" for row in rows]
    lines.append(
        f"Metrics, of {len(METRICS)}, in which a row stands above the published GenRec: {', '.join(above)}."
    )
    return lines


def _times_above(row: Row, published: tuple[float, ...]) -> int:
    scores = row.scores()
    return sum(
        scores[metric]["mean"] > value for metric, value in zip(METRICS, published, strict=True)
    )


def pairs_of(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Which rows are set beside which: `COMPARED`, their refits among each other, and pretraining
    beside none."""
    by_name = {row.name: row for row in rows}
    names = [(a, b) for a, others in COMPARED.items() for b in others]
    names += [(a + REFIT, b + REFIT) for a, b in names]
    for name in by_name:
        stem, end = (name.removesuffix(REFIT), REFIT) if name.endswith(REFIT) else (name, "")
        names += [(name, f"{stem}{WITHOUT}{more}{end}") for more in ("", EQUAL)]
    return [(by_name[a], by_name[b]) for a, b in names if a in by_name and b in by_name]


def compared(a: Row, b: Row) -> tuple[Comparison | None, str]:
    """The paired comparison and a line of it; None and the reason where the two cannot be
    compared."""
    try:
        found = compare(a.folder, b.folder)
    except ValueError as error:
        return None, f"{a.name} beside {b.name}: not compared: {error}"
    gaps = ", ".join(
        f"{metric} {_signed(gap.difference)} ({_signed(gap.ci95[0])} to {_signed(gap.ci95[1])})"
        for metric, gap in found.metrics.items()
    )
    return found, f"{a.name} (A) beside {b.name} (B), A − B: {gaps}. {found.verdict()}"


def _figure(score: dict[str, Any]) -> str:
    mean = as_written(score["mean"])
    return mean if score["std"] is None else f"{mean} ±{as_written(score['std'])}"


def _field(row: Row, key: str) -> Any:
    value = row.fields[key]
    # Lists that are the history itself do not leave it out.
    return False if key == "exclude_history" and value is None else value


def _words(row: Row) -> str:
    users = row.fields["users"]
    return ", ".join(
        (
            f"numbering {row.fields['numbering']}",
            row.fields["split"],
            f"ties {row.fields['ties']}",
            f"trained through {row.fields['trained_through']}",
            "history left out" if _field(row, "exclude_history") else "history kept in",
            f"{users} users" if isinstance(users, str) else f"{users['sample']} users of a sample",
        )
    )


def _names(rows: list[Row]) -> str:
    return ", ".join(row.name for row in rows)


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")
