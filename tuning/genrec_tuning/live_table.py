"""What a person sees while a sweep goes: a table of trials in a terminal, one plain line an event
elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from genrec_dist.report.html import duration
from genrec_dist.report.svg import score
from genrec_tuning.record import Sweep, Trial, Value, best_trial, best_validation, epochs_spent
from genrec_tuning.report.axis import knobs, written

COLORS = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "interrupted": "magenta",
}
SHOWN_KEYS = 4
"""Keys of the space that have a column; all of them stand in the report."""


class SweepTable:
    """A table that is drawn anew at each event, running trials first, then the best; off a terminal
    a line a new epoch or end."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.live = (
            Live(console=self.console, auto_refresh=False, transient=False)
            if self.console.is_terminal
            else None
        )
        self.told: dict[str, tuple[int, str, int]] = {}
        """Trial -> epoch, status and attempts as last said."""

    def __enter__(self) -> SweepTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, sweep: Sweep) -> None:
        """Say what is new in the sweep."""
        if self.live:
            # The terminal's last line is where the cursor stays.
            self.live.update(drawn(sweep, rows=max(4, self.console.height - 7)), refresh=True)
        else:
            self._say(sweep)

    def _say(self, sweep: Sweep) -> None:
        for trial in sweep.trials:
            now = (epochs_spent(trial), trial.status, trial.attempts)
            before = self.told.get(trial.id)
            if before == now:
                continue
            self.told[trial.id] = now
            # What an earlier driver saw to its end is no news.
            if before is None and sweep.resumed and trial.status != "running":
                continue
            self.console.print(line(trial), highlight=False, markup=False, soft_wrap=True)


def line(trial: Trial) -> str:
    """A trial as one plain line."""
    parts = [trial.id, f"{trial.status:<11}", f"epoch {epochs_spent(trial)}/{trial.planned_epochs}"]
    if trial.epochs:
        last = trial.epochs[-1]
        parts += [f"NDCG@10 {last.NDCG10:.4f}", f"HR@10 {last.HR10:.4f}", f"loss {last.loss:.3f}"]
        parts += [f"{last.tokens_per_second:,.0f} tokens/s"]
    else:
        parts += [f"{key} {written(value)}" for key, value in trial.values.items()]
    parts += [f"attempt {trial.attempts}"] * (trial.attempts > 1) + (
        [_one_line(trial.reason)] if trial.reason else []
    )
    return "  ".join(parts)


def drawn(sweep: Sweep, rows: int) -> Group:
    """The table, its longest at so many trials, under a line about the whole sweep."""
    shown = [axis.name for axis in knobs(sweep)][:SHOWN_KEYS]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for name in ("trial", "status"):
        table.add_column(name, no_wrap=True)
    for key in shown:
        table.add_column(Text(key.rpartition(".")[2]), no_wrap=True, max_width=14)
    for name in ("epoch", "NDCG@10", "best", "loss", "tokens/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    best = best_trial(sweep)
    trials = _by_interest(sweep)
    for trial in trials[:rows]:
        table.add_row(
            *_cells(trial, shown), style="bold" if best is not None and trial.id == best.id else ""
        )
    parts: list[Text | Table] = [Text(_summary(sweep), style="bold"), table]
    if len(trials) > rows:
        parts.append(Text(f"and {len(trials) - rows} more", style="dim"))
    failed = [trial for trial in sweep.trials if trial.status == "failed" and trial.reason]
    if failed:
        parts.append(
            Text(
                f"{failed[-1].id}: {_one_line(failed[-1].reason or '')}",
                style="red",
                no_wrap=True,
                overflow="ellipsis",
            )
        )
    return Group(*parts)


def _summary(sweep: Sweep) -> str:
    planned = sweep.space.get("trials")
    count = f"{len(sweep.trials)}/{planned}" if isinstance(planned, int) else str(len(sweep.trials))
    states = [(state, sum(trial.status == state for trial in sweep.trials)) for state in COLORS]
    said = f"{sweep.name}: {count} trials" + "".join(
        f", {number} {state}" for state, number in states if number
    )
    spent = sum(map(epochs_spent, sweep.trials))
    said += f"; {spent} epochs"
    if sweep.started > 0:
        said += f"; {duration(max(0.0, time.time() - sweep.started))} since the start"
    best = best_trial(sweep)
    found = best_validation(best) if best else None
    return said + (f"; best {score(found.NDCG10)} ({best.id})" if best and found else "")


def _by_interest(sweep: Sweep) -> list[Trial]:
    """Running ones in order, then by score, those without one last."""

    def order(trial: Trial) -> tuple[int, float, str]:
        found = best_validation(trial)
        if trial.status == "running":
            return 0, 0.0, trial.id
        return (1, -found.NDCG10, trial.id) if found else (2, 0.0, trial.id)

    return sorted(sweep.trials, key=order)


def _cells(trial: Trial, keys: list[str]) -> list[Text | str]:
    last = trial.epochs[-1] if trial.epochs else None
    found = best_validation(trial)
    return [
        trial.id,
        Text(trial.status, style=COLORS[trial.status]),
        *(Text(_value(trial.values[key])) if key in trial.values else "" for key in keys),
        f"{epochs_spent(trial)}/{trial.planned_epochs}",
        score(last.NDCG10) if last else "",
        score(found.NDCG10) if found else "",
        f"{last.loss:.3f}" if last else "",
        f"{last.tokens_per_second:,.0f}" if last else "",
        duration(last.seconds) if last else "",
    ]


def _value(value: Value) -> str:
    return _one_line(written(value))


def _one_line(reason: str) -> str:
    return " ".join(reason.split())
