"""The rows as tables for the terminal and in Markdown, which rows are comparable, and paired
comparisons."""

from __future__ import annotations

import json
from typing import Any

from genrec_shards.cleaning.published_sizes import SetName
from rich.table import Table

from genrec_dist.evaluation.compare import Comparison, compare
from genrec_dist.evaluation.metrics import METRICS, as_written, signed
from genrec_dist.reproduce.published import SETS, SOURCE
from genrec_dist.reproduce.result_rows import Row
from genrec_dist.reproduce.systems import COMPARED, EQUAL, REFIT, WITHOUT, ProtocolName

FIELDS = ("numbering", "split", "ties", "trained_through", "exclude_history", "users")
"""What two rows must share before one may be called better."""
_COLUMNS = ("system", "through", "runs", *METRICS)
"""Through: the last position that was trained on."""


def cells_of(rows: list[Row], protocol: ProtocolName, name: SetName) -> list[tuple[str, ...]]:
    """A tuple per line of the table: our rows, and under the paper's protocol the published ones
    after them."""
    lines = []
    for row in rows:
        figures = []
        for score in row.scores().values():
            spread = "" if score["std"] is None else f" ±{as_written(score['std'])}"
            figures.append(as_written(score["mean"]) + spread)
        lines.append((row.name, row.fields["trained_through"], str(len(row.runs)), *figures))
    published = SETS[name]
    if protocol == "paper" and published is not None:
        for label, scores in (
            ("GenRec, published", published.pretrained),
            ("without pretraining, published", published.without),
        ):
            lines.append((label, "not said", "–", *map(as_written, scores)))
    return lines


def table_of(rows: list[Row], protocol: ProtocolName, name: SetName) -> Table:
    """The table for the terminal."""
    table = Table(*_COLUMNS, title=f"{name}, test, {protocol}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in cells_of(rows, protocol, name):
        table.add_row(*cells, style="dim" if cells[0].endswith("published") else None)
    return table


def markdown_of(rows: list[Row], protocol: ProtocolName, name: SetName) -> str:
    """The same table in Markdown."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *cells_of(rows, protocol, name)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comparable(rows: list[Row], protocol: ProtocolName, name: SetName) -> list[str]:
    """Sentences that say which rows may be ranked among each other: those of one line alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([_field(row, key) for key in FIELDS]), []).append(row)
    lines = []
    for group in groups.values():
        first, users = group[0], group[0].fields["users"]
        words = (
            f"numbering {first.fields['numbering']}, {first.fields['split']}, ties "
            f"{first.fields['ties']}, trained through {first.fields['trained_through']}, history "
            f"{'left out' if _field(first, 'exclude_history') else 'kept in'}, "
        )
        words += f"{users} users" if isinstance(users, str) else f"{users['sample']} sampled users"
        names = ", ".join(row.name for row in group)
        lines.append(f"Comparable with each other ({words}): {names}.")
    if protocol == "paper":
        lines += _beside_published(rows, name)
        lines.append(
            "These codes are the file's own numbers, which in the shared files follow first "
            "appearance, test items included: the counting rule's row, which learns nothing, is "
            "what they alone give away. No row here is comparable with a leak-free one."
        )
    return lines


def _beside_published(rows: list[Row], name: SetName) -> list[str]:
    published = SETS[name]
    if published is None:
        return [f"The paper ({SOURCE}) has no row of {name}."]
    above = []
    for row in rows:
        means = [score["mean"] for score in row.scores().values()]
        pairs = zip(means, published.pretrained, strict=True)
        above.append(f"{row.name} {sum(ours > theirs for ours, theirs in pairs)}")
    return [
        f"The published rows ({SOURCE}, Tables 1 and 3) share the numbering and the leave-one-out "
        "split. Whether t_n-1 was trained on, whether lists leave out the history and how the "
        "epoch was chosen is not said there: they are shown, and not ranked with ours.",
        f"Metrics, of {len(METRICS)}, in which a row is above the published GenRec: "
        f"{', '.join(above)}.",
    ]


def _field(row: Row, key: str) -> Any:
    value = row.fields[key]
    # Lists that are the history itself do not leave it out.
    return False if key == "exclude_history" and value is None else value


def pairs_of(rows: list[Row]) -> list[tuple[Row, Row]]:
    """The pairs of rows to compare: `COMPARED`, their refits with each other, and pretraining with
    none."""
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
    folders = [row.runs[0] if row.system.kind == "rule" else row.runs[0].parent for row in (a, b)]
    try:
        found = compare(*folders)
    except ValueError as error:
        return None, f"{a.name} beside {b.name}: not compared: {error}"
    gaps = ", ".join(
        f"{metric} {signed(gap.difference)} ({signed(gap.ci95[0])} to {signed(gap.ci95[1])})"
        for metric, gap in found.metrics.items()
    )
    return found, f"{a.name} (A) beside {b.name} (B), A − B: {gaps}. {found.verdict()}"
