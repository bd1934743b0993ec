"""What a person sees while a sweep runs: a table of trials in a terminal, one plain line per event
elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from genrec_dist.report.html import duration
from genrec_dist.report.svg import score
from genrec_tuning.record import Epoch, Sweep, Trial, show_value

COLORS = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "interrupted": "magenta",
}
SHOWN_KEYS = 4
"""Keys of the space that have a column; the report has all of them."""
LONGEST_VALUE = 14
"""Characters that are shown of a value."""


class SweepTable:
    """A table that is drawn anew at each event, running trials first, then the best; off a terminal
    one line per new epoch or end."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        terminal = self.console.is_terminal
        self.live = Live(console=self.console, auto_refresh=False) if terminal else None
        self.printed: dict[str, tuple[int, str, int]] = {}
        """Trial -> epoch, status and attempts of its last line."""

    def __enter__(self) -> SweepTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def show(self, sweep: Sweep) -> None:
        """Show what is new in the sweep."""
        if self.live:
            # The cursor stays in the terminal's last line.
            table = drawn(sweep, max(4, self.console.height - 7), self.console.width)
            self.live.update(table, refresh=True)
            return
        for trial in sweep.trials:
            now, before = (
                (trial.last_epoch, trial.status, trial.attempts),
                self.printed.get(trial.id),
            )
            self.printed[trial.id] = now
            # What ended under an earlier driver is not new.
            old = before is None and sweep.resumed and trial.status != "running"
            if before != now and not old:
                self.console.print(line(trial), highlight=False, markup=False, soft_wrap=True)


def line(trial: Trial) -> str:
    """A trial as one plain line."""
    parts = [trial.id, f"{trial.status:<11}", f"epoch {trial.last_epoch}/{trial.planned_epochs}"]
    if trial.epochs:
        last = trial.epochs[-1]
        parts += [f"NDCG@10 {last.NDCG10:.4f}", f"HR@10 {last.HR10:.4f}", f"loss {last.loss:.3f}"]
        parts += [f"{last.tokens_per_second:,.0f} tokens/s"]
    else:
        parts += [f"{key} {show_value(value)}" for key, value in trial.values.items()]
    parts += [f"attempt {trial.attempts}"] * (trial.attempts > 1)
    return "  ".join([*parts, " ".join((trial.reason or "").split())]).rstrip()


def drawn(sweep: Sweep, rows: int, width: int = 120) -> Group:
    """The table of at most `rows` trials, under a line about the whole sweep; of its columns those
    that fit into `width`."""

    def order(trial: Trial) -> tuple[bool, float, str]:
        running = trial.status == "running"
        return not running, -trial.best.NDCG10 if trial.best and not running else 0.0, trial.id

    trials, best = sorted(sweep.trials, key=order), sweep.best
    columns = _fitting_columns(sweep, trials[:rows], width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        justify: Any = "right" if column.is_number else "left"
        table.add_column(Text(column.title), justify=justify, no_wrap=True)
    for row, trial in enumerate(trials[:rows]):
        cells = [Text(column.cells[row]) for column in columns]
        cells[1].style = COLORS[trial.status]
        table.add_row(*cells, style="bold" if best and trial.id == best.id else "")
    parts: list[Text | Table] = [Text(_headline(sweep), style="bold"), table]
    if len(trials) > rows:
        parts.append(Text(f"and {len(trials) - rows} more", style="dim"))
    failed = [trial for trial in sweep.trials if trial.status == "failed" and trial.reason]
    if failed:
        last_failed = f"{failed[-1].id}: {' '.join(str(failed[-1].reason).split())}"
        parts.append(Text(last_failed, style="red", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


@dataclass(frozen=True)
class _Column:
    title: str
    cells: list[str]
    leaves: int = 0
    """Of the columns that do not fit, the one with the highest number is left out first; 0: stays,
    whatever the width."""
    is_number: bool = True

    @property
    def width(self) -> int:
        return max(map(len, (self.title, *self.cells))) + 2


def _fitting_columns(sweep: Sweep, trials: list[Trial], width: int) -> list[_Column]:
    """The columns that fit into `width`, of these trials."""

    def of_last(text: Callable[[Epoch], str]) -> list[str]:
        return [text(trial.epochs[-1]) if trial.epochs else "" for trial in trials]

    columns = [
        _Column("trial", [trial.id for trial in trials], is_number=False),
        _Column("status", [trial.status for trial in trials], is_number=False),
    ]
    for number, key in enumerate(list(sweep.keys)[:SHOWN_KEYS]):
        values = [" ".join(show_value(trial.values.get(key, "")).split()) for trial in trials]
        values = [value[:LONGEST_VALUE] for value in values]
        columns.append(_Column(key.rpartition(".")[2], values, leaves=1 + number, is_number=False))
    epochs = [f"{trial.last_epoch}/{trial.planned_epochs}" for trial in trials]
    best = [score(trial.best.NDCG10) if trial.best else "" for trial in trials]
    columns += [
        _Column("epoch", epochs),
        _Column("NDCG@10", of_last(lambda epoch: score(epoch.NDCG10))),
        _Column("best", best),
        _Column("loss", of_last(lambda epoch: f"{epoch.loss:.3f}"), leaves=11),
        _Column("tokens/s", of_last(lambda epoch: f"{epoch.tokens_per_second:,.0f}"), leaves=12),
        _Column("time", of_last(lambda epoch: duration(epoch.seconds)), leaves=10),
    ]
    while sum(column.width for column in columns) - 2 > width:
        least = max(columns, key=lambda column: column.leaves)
        if not least.leaves:
            break
        columns.remove(least)
    return columns


def _headline(sweep: Sweep) -> str:
    planned = sweep.space.get("trials")
    count = f"{len(sweep.trials)}/{planned}" if isinstance(planned, int) else str(len(sweep.trials))
    parts = [f"{sweep.name}: {count} trials"]
    for state in COLORS:
        if number := sum(trial.status == state for trial in sweep.trials):
            parts.append(f", {number} {state}")
    parts.append(f"; {sum(trial.last_epoch for trial in sweep.trials)} epochs")
    if sweep.started > 0:
        parts.append(f"; {duration(max(0.0, time.time() - sweep.started))} since the start")
    if (best := sweep.best) and best.best:
        parts.append(f"; best {score(best.best.NDCG10)} ({best.id})")
    return "".join(parts)
