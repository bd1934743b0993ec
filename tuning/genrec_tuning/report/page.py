"""One page a sweep, `report.html`: which trial leads, which knobs matter, what was stopped and
spared; opens without a network."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from genrec_dist.report.html import definitions, duration, grid, page, percent, text
from genrec_dist.report.run_files import is_number
from genrec_dist.report.svg import score
from genrec_tuning.record import (
    Epoch,
    Final,
    Folder,
    Status,
    Sweep,
    Trial,
    best_trial,
    best_validation,
    epochs_spent,
)
from genrec_tuning.report.axis import Axis, knobs, score_axis, written
from genrec_tuning.report.charts import (
    Curve,
    Frame,
    Point,
    curves,
    key_mark,
    keys_of,
    scatter,
    stacked,
    strips,
)
from genrec_tuning.report.parallel_coordinates import Thread, parallel_coordinates

SCORE = "NDCG@10"
MOST_KNOBS = 6
"""Knobs beyond the first that get a chart of their own."""
METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
STATES: dict[Status, str] = {
    "finished": "finished",
    "stopped": "stopped by the scheduler",
    "failed": "failed",
    "interrupted": "interrupted",
    "running": "running",
}


def write_report(sweep: Sweep, path: str | Path) -> None:
    """Write the page of a sweep to a file, here or at an address that fsspec knows. One without
    trials has a page too."""
    folder, _, name = str(path).rpartition("/")
    Folder(folder or ".").write(name, report_of(sweep))


def report_of(sweep: Sweep) -> str:
    """The page as HTML."""
    view = _View(sweep)
    sections = [
        _header(view),
        _lead(view),
        _finals(sweep),
        _parallel(view),
        _knobs(view),
        _courses(view),
        _epochs(view),
        _more_knobs(view),
        _table(view),
        _space(sweep),
    ]
    room = resources.files("genrec_tuning")
    style, script = (
        room.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    return page(sweep.name, sections, style, script)


class _View:
    """What several parts of the page need: the axes of the space, and the groups in which trials
    are told apart."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.trials = sweep.trials
        self.best = best_trial(sweep)
        self.axes = knobs(sweep)
        self.grouping = self._grouping()
        names = list(self.grouping.choices) if self.grouping else []
        missing = (
            any(self.grouping.name not in trial.values for trial in self.trials)
            if self.grouping
            else True
        )
        self.groups = names + ["not applied" if names else "all trials"] * missing
        self.scores = [found.NDCG10 for trial in self.trials if (found := best_validation(trial))]
        self.axis = score_axis(SCORE, self.scores)
        # The learning rate first: it is what people look for.
        numeric = [axis for axis in self.axes if axis.kind != "choice"]
        self.numeric = sorted(numeric, key=lambda axis: not axis.name.endswith("learning_rate"))

    def _grouping(self) -> Axis | None:
        choices = [axis for axis in self.axes if axis.kind == "choice" and len(axis.choices) > 1]
        return min(choices, key=lambda axis: not axis.name.endswith("mask.strategy"), default=None)

    def group(self, trial: Trial) -> int:
        if self.grouping is None or self.grouping.name not in trial.values:
            return len(self.groups) - 1
        value = trial.values[self.grouping.name]
        return next(
            i
            for i, one in enumerate(self.grouping.choices)
            if self.grouping.at(one) == self.grouping.at(value)
        )

    def look(self, trial: Trial) -> str:
        if best_validation(trial) is None:
            return "failed"
        best = " best" if self.best is not None and trial.id == self.best.id else ""
        return ("stopped" if trial.status != "finished" else "") + best

    def keys(self, trials: Sequence[Trial]) -> str:
        """Keys of a chart that shows these trials."""
        looks = {look for trial in trials for look in self.look(trial).split()}
        more = [("stopped", "not run to its end")] if "stopped" in looks else []
        more += [("failed", "no score")] if "failed" in looks else []
        return keys_of(self.groups, more)

    def point(self, trial: Trial, x: float) -> Point:
        found = best_validation(trial)
        y = found.NDCG10 if found else None
        return Point(trial.id, _told(trial), x, y, self.group(trial), self.look(trial))


def _header(view: _View) -> str:
    sweep, space = view.sweep, view.sweep.space
    planned = space.get("trials")
    of = f" of {planned}" if is_number(planned) and planned != len(sweep.trials) else ""
    states = Counter(trial.status for trial in sweep.trials)
    facts: list[tuple[str, Any]] = [("trials", f"{len(sweep.trials)}{of}")]
    facts += [(said, states[state]) for state, said in STATES.items() if states[state]]
    facts += [(key, space[key]) for key in ("base", "search") if space.get(key) is not None]
    if space.get("scheduler") is not None:
        rungs = f", grace {space.get('grace')}, reduction {space.get('reduction')}" * (
            space["scheduler"] == "asha"
        )
        facts.append(("scheduler", f"{space['scheduler']}{rungs}"))
    if space.get("seed") is not None:
        facts.append(("seed", space["seed"]))
    if sweep.started > 0:
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(sweep.started))))
    if sweep.hours > 0:
        facts.append(("worked on", duration(sweep.hours * 3600)))
    if sweep.resumed:
        facts.append(("resumed", f"{sweep.resumed} ×"))
    return f'<header><p class="kicker">GenRec sweep</p><h1>{text(sweep.name)}</h1>{definitions(facts, "facts")}</header>'


def _lead(view: _View) -> str:
    values = "".join(
        f"<div><dt>{text(key)}</dt><dd>{text(written(value))}</dd></div>"
        for key, value in (view.best.values.items() if view.best else ())
    )
    told = f'<dl class="values">{values}</dl>' if values else ""
    return f'<section><p class="lead">{_unbroken(headline(view.sweep))}</p>{told}</section>'


def headline(sweep: Sweep) -> str:
    """Which trial leads, by how much, and what that is worth, in plain words."""
    best = best_trial(sweep)
    found = best_validation(best) if best else None
    if best is None or found is None:
        if not sweep.trials:
            return "No trial has been started yet."
        running = sum(trial.status == "running" for trial in sweep.trials)
        if running:
            return f"No trial has come to an end with a score yet; running: {running}."
        return "No trial has a score: the reasons stand in the table of trials."
    said = f"{best.id} leads with validation {SCORE} {score(found.NDCG10)}, "
    said += f"reached at epoch {found.epoch} of {best.planned_epochs}."
    ranked = [
        trial
        for trial in _ranked(sweep.trials)
        if trial.id != best.id and trial.status in ("finished", "stopped")
    ]
    second = best_validation(ranked[0]) if ranked else None
    if second is not None:
        said += f" Next is {ranked[0].id} with {score(second.NDCG10)}."
    if best.status == "stopped":
        said += f" It was stopped by the scheduler after {epochs_spent(best)} epochs."
    if len(ranked) > 0 and sweep.winner is None:
        said += " The highest of several scores flatters its trial; genrec tune --finish repeats the best three with other seeds."
    return said


def _parallel(view: _View) -> str:
    shown = [trial for trial in view.trials if trial.values]
    if not view.axes or not shown or not view.scores:
        return ""
    low, high = min(view.scores), max(view.scores)
    # Its ends are the scores themselves, so that the colours use the whole scale.
    final = Axis(SCORE, "linear", low, high)
    threads = []
    for trial in shown:
        found = best_validation(trial)
        rank = 0.0 if found is None else 1.0 if high == low else (found.NDCG10 - low) / (high - low)
        values = {**trial.values} | ({SCORE: found.NDCG10} if found else {})
        threads.append(Thread(trial.id, _told(trial), values, rank, view.look(trial)))
    drawing = parallel_coordinates([*view.axes, final], threads, {SCORE: "no score"})
    looks = {look for trial in shown for look in view.look(trial).split()}
    keys = '<span><i class="key line"></i>run to its end</span>'
    keys += '<span><i class="key line stopped"></i>not run to its end</span>' * ("stopped" in looks)
    keys += '<span><i class="key line dotted"></i>no score</span>' * ("failed" in looks)
    caption = f'<figcaption><b>Every trial, coloured by validation {SCORE}</b><span class="keys">{keys}</span></figcaption>'
    return f"<section><h2>Trials and their values</h2><figure>{caption}{drawing}</figure></section>"


def _knobs(view: _View) -> str:
    charts = []
    if view.numeric and view.scores:
        charts.append(_against(view, view.numeric[0]))
    if view.grouping and view.scores:
        points = [view.point(trial, 0.0) for trial in view.trials]
        title = f"{SCORE} by {view.grouping.name}"
        charts.append(strips(title, view.axis, view.groups, points, f"best validation {SCORE}"))
    if not charts:
        return ""
    names = [view.numeric[0].name] if view.numeric else []
    names += [view.grouping.name] if view.grouping else []
    return f'<section><h2>{text(" and ".join(names))}</h2><div class="charts">{"".join(charts)}</div></section>'


def _against(view: _View, axis: Axis) -> str:
    """Trials by the value of one knob and their score."""
    shown = [trial for trial in view.trials if axis.name in trial.values]
    told = ", log scale" if axis.kind == "log" else ""
    points = [view.point(trial, float(trial.values[axis.name] or 0)) for trial in shown]
    frame = Frame(axis, view.axis, f"{axis.name}{told}", f"best validation {SCORE}")
    return scatter(
        f"{SCORE} against {axis.name.rpartition('.')[2]}", frame, points, view.keys(shown)
    )


def _courses(view: _View) -> str:
    shown = [trial for trial in view.trials if trial.epochs]
    if not shown:
        return ""
    length = max(
        [trial.planned_epochs for trial in shown] + [epochs_spent(trial) for trial in shown]
    )
    x, rungs, keys = (
        Axis("epoch", "linear", 0, float(length)),
        _rungs(view.sweep, length),
        _curve_keys(view, shown),
    )
    charts = []
    for title, read in (("Validation NDCG@10", _NDCG10), ("Validation loss", _loss)):
        lines = []
        for trial in shown:
            points = [
                (epoch.epoch, read(epoch)) for epoch in trial.epochs if is_number(read(epoch))
            ]
            if points:
                xs, ys = zip(*points, strict=True)
                lines.append(
                    Curve(trial.id, _told(trial), xs, ys, view.group(trial), view.look(trial))
                )
        if lines:
            axis = score_axis(title, [y for line in lines for y in line.ys], padded="NDCG" in title)
            charts.append(
                curves(
                    title,
                    Frame(x, axis, "epoch", title.lower().replace("ndcg", "NDCG")),
                    lines,
                    rungs,
                    keys,
                )
            )
    told = (
        " Dotted uprights: epochs at which ASHA compares trials and stops the losing ones."
        if rungs
        else ""
    )
    return (
        f'<section><h2>Learning curves</h2><div class="charts">{"".join(charts)}</div>'
        f'<p class="small">Epochs are those of the last stage, counted from 1.{told}</p></section>'
        if charts
        else ""
    )


def _curve_keys(view: _View, shown: Sequence[Trial]) -> str:
    keys = "".join(
        f"<span>{key_mark(index)}{text(name)}</span>" for index, name in enumerate(view.groups)
    )
    stopped = any("stopped" in view.look(trial) for trial in shown)
    return keys + '<span><i class="key line stopped"></i>not run to its end</span>' * stopped


def _rungs(sweep: Sweep, length: int) -> list[int]:
    """Epochs at which ASHA compares, as far as the space says so."""
    grace, reduction = sweep.space.get("grace"), sweep.space.get("reduction")
    if sweep.space.get("scheduler") != "asha" or not is_number(grace) or not is_number(reduction):
        return []
    if grace < 1 or reduction <= 1:
        return []
    powers = itertools.takewhile(
        lambda epoch: epoch < length, (grace * reduction**power for power in range(64))
    )
    return [int(epoch) for epoch in powers]


def saving(sweep: Sweep) -> str:
    """What the scheduler spared of the epochs that were planned, in plain words."""
    ended = [
        trial
        for trial in sweep.trials
        if trial.status in ("finished", "stopped") and trial.planned_epochs
    ]
    if not ended:
        return "No trial has come to an end yet."
    planned, run = sum(trial.planned_epochs for trial in ended), sum(map(epochs_spent, ended))
    stopped = [trial for trial in ended if trial.status == "stopped"]
    spared = sum(trial.planned_epochs - epochs_spent(trial) for trial in stopped)
    patient = planned - run - spared
    count = f"{len(ended)} trials that came" if len(ended) > 1 else "1 trial that came"
    said = f"Of {planned} epochs planned for the {count} to an end, {run} were run. "
    if stopped:
        said += (
            f"The scheduler stopped {len(stopped)} of them and spared {spared} epochs, {percent(spared / planned)}, "
            "of running every trial to its end"
        )
        said += "; some of them patience might have ended too." if patient else "."
    else:
        said += "The scheduler stopped none."
    return said + (f" Patience ended others early: {patient} epochs." if patient else "")


def _epochs(view: _View) -> str:
    length = max(
        (max(trial.planned_epochs, epochs_spent(trial)) for trial in view.trials), default=0
    )
    if not length:
        return ""
    counts = {name: [0] * length for name in ("run", "spared", "patience", "open")}
    for trial in view.trials:
        after = {"stopped": "spared", "finished": "patience"}.get(trial.status, "open")
        for epoch in range(max(trial.planned_epochs, epochs_spent(trial))):
            counts["run" if epoch < epochs_spent(trial) else after][epoch] += 1
    layers = [
        ("run", counts["run"]),
        ("spared by the scheduler", counts["spared"]),
        ("not needed: patience", counts["patience"]),
        ("not run: failed, interrupted or still running", counts["open"]),
    ]
    chart = stacked("What became of the planned epochs", "epoch", "trials", layers)
    return (
        f'<section><h2>Epochs spared</h2><div class="beside">{chart}<p class="lead">{_unbroken(saving(view.sweep))}</p></div>'
        "</section>"
    )


def _more_knobs(view: _View) -> str:
    rest = view.numeric[1 : 1 + MOST_KNOBS]
    shown = [axis for axis in rest if any(axis.name in trial.values for trial in view.trials)]
    if not shown or not view.scores:
        return ""
    charts = "".join(_against(view, axis) for axis in shown)
    left = len(view.numeric) - 1 - len(rest)
    told = f'<p class="small">{left} more numeric knobs are in sweep.parquet.</p>' if left else ""
    return f'<section><h2>Other knobs</h2><div class="charts">{charts}</div>{told}</section>'


def _finals(sweep: Sweep) -> str:
    if not sweep.finals:
        return ""
    systems = list(dict.fromkeys(final.system for final in sweep.finals))
    means = {
        system: _mean([final for final in sweep.finals if final.system == system])
        for system in systems
    }
    systems.sort(key=lambda system: -(means[system] or 0.0))
    rows = []
    for system in systems:
        runs = [final for final in sweep.finals if final.system == system]
        each = f"<small>{text(', '.join(_score(final.NDCG10) for final in runs))}</small>"
        cells = [
            f"{sum(final.status == 'finished' for final in runs)} of {len(runs)}",
            f"{_score(means[system])}{each}",
        ]
        cells += [_score(_mean_test(runs, key)) for key in METRICS]
        name = (
            "base recipe"
            if system == "base"
            else f"{system} (winner)"
            if system == sweep.winner
            else system
        )
        mine = ' class="ours"' if system == sweep.winner else ""
        inside = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(
            f'<tr{mine} data-trial="{text(system)}"><th scope="row">{text(name)}</th>{inside}</tr>'
        )
    columns = ("", "seeds run", f"validation {SCORE}", *(f"test {key}" for key in METRICS))
    return (
        f'<section><h2>Finals</h2><p class="lead">{_unbroken(_verdict(sweep))}</p><div class="trials">{grid(columns, rows)}</div>'
        f'<p class="small">Means over seeds, each seed in small figures. {_looked_at(sweep)}</p>{_comparison(sweep)}</section>'
    )


def _looked_at(sweep: Sweep) -> str:
    """Who was evaluated on test."""
    looked = [
        "the base recipe" if name == "base" else name
        for name in dict.fromkeys(f.system for f in sweep.finals if f.test)
    ]
    rule = "The winner is the one with the best mean on validation; "
    return text(
        rule
        + (
            f"test was looked at by {' and '.join(looked)} alone."
            if looked
            else "test was not looked at yet."
        )
    )


def _verdict(sweep: Sweep) -> str:
    found = _differences(sweep).get(SCORE)
    if sweep.winner is None:
        return "The finals have no winner yet."
    if found is None:
        return f"{sweep.winner} wins on validation; on test it has not been compared with the base recipe."
    low, high = found["ci95"]
    said = f"On test {sweep.winner} reaches {SCORE} {score(found['a'])}, the base recipe {score(found['b'])}: "
    said += f"{_signed(found['difference'])} (95 % interval {_signed(low)} to {_signed(high)}, "
    said += f"p {found['p_holm']:.4f} after Holm)"
    return said + ("." if found["p_holm"] < 0.05 else ", which is not told from none.")


def _comparison(sweep: Sweep) -> str:
    found = _differences(sweep)
    if not found:
        return ""
    rows = []
    for key, row in found.items():
        low, high = row["ci95"]
        cells = (
            score(row["a"]),
            score(row["b"]),
            f"{_signed(row['difference'])}<small>{_signed(low)} to {_signed(high)}</small>",
            f"{row['p_holm']:.4f}",
        )
        rows.append(
            f'<tr><th scope="row">{text(key)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    columns = (
        "on test, paired over users and seeds",
        text(sweep.winner),
        "base recipe",
        "difference",
        "p after Holm",
    )
    return f'<div class="paired">{grid(columns, rows)}</div>'


def _differences(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """The comparison's metrics, as far as they are whole."""
    metrics = (sweep.comparison or {}).get("metrics")
    if not isinstance(metrics, Mapping):
        return {}
    wanted = ("a", "b", "difference", "p_holm")
    return {
        str(key): dict(row)
        for key, row in metrics.items()
        if isinstance(row, Mapping)
        and all(is_number(row.get(name)) for name in wanted)
        and isinstance(row.get("ci95"), list | tuple)
        and len(row["ci95"]) == 2
        and all(is_number(bound) for bound in row["ci95"])
    }


def _table(view: _View) -> str:
    if not view.trials:
        return ""
    reasons = any(trial.reason for trial in view.trials)
    again = any(trial.attempts > 1 for trial in view.trials)
    columns = [
        "trial",
        "",
        SCORE,
        "epochs run",
        *(_heading(axis.name) for axis in view.axes),
        "HR@10",
        "loss",
        "best epoch",
    ]
    columns += ["tokens/s", "time", "seed"] + ["attempts"] * again + ["reason"] * reasons
    rows = []
    for trial in _ranked(view.trials):
        found = best_validation(trial)
        best = view.best is not None and trial.id == view.best.id
        cells = [("word", f'<span class="state {trial.status}">{text(trial.status)}</span>')]
        cells += [
            ("", _score(found.NDCG10 if found else None)),
            ("", f"{epochs_spent(trial)} of {trial.planned_epochs}"),
        ]
        for axis in view.axes:
            known = axis.name in trial.values
            cells.append(("", text(written(trial.values[axis.name])) if known else "–"))
        cells += [("", _score(found.HR10 if found else None))]
        cells += [
            ("", f"{found.loss:.3f}" if found and is_number(found.loss) else "–"),
            ("", str(found.epoch) if found else "–"),
        ]
        speeds = [
            epoch.tokens_per_second for epoch in trial.epochs if is_number(epoch.tokens_per_second)
        ]
        cells += [("", f"{fmean(speeds):,.0f}" if speeds else "–")]
        cells += [
            ("", duration(trial.epochs[-1].seconds) if trial.epochs else "–"),
            ("", str(trial.seed)),
        ]
        cells += [("", str(trial.attempts))] * again + [
            ("word reason", text(trial.reason or ""))
        ] * reasons
        inside = "".join(
            f'<td class="{kind}">{cell}</td>' if kind else f"<td>{cell}</td>"
            for kind, cell in cells
        )
        mine = ' class="ours"' if best else ""
        rows.append(
            f'<tr{mine} data-trial="{text(trial.id)}"><th scope="row">{text(trial.id)}</th>{inside}</tr>'
        )
    return (
        f'<section><h2>All trials</h2><div class="trials">{grid(columns, rows)}</div><p class="small">Scores are those of '
        "each trial's best epoch on validation. –: not known, or does not apply. The same table: sweep.parquet.</p></section>"
    )


def _space(sweep: Sweep) -> str:
    if not sweep.space:
        return ""
    asked = {key: value for key, value in sweep.space.items() if key not in ("name", "recipe")}
    parts = [("Space", asked), ("Base recipe, resolved", sweep.space.get("recipe"))]
    return "".join(
        f"<details><summary>{name}</summary><pre>{text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))}</pre></details>"
        for name, told in parts
        if told
    )


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first, those without a score last."""

    def order(trial: Trial) -> tuple[float, str]:
        found = best_validation(trial)
        return (-found.NDCG10 if found else float("inf"), trial.id)

    return sorted(trials, key=order)


def _told(trial: Trial) -> str:
    """What the pointer is told about a trial, one line a fact."""
    found = best_validation(trial)
    lines = [
        f"{trial.id} · {trial.status} after {epochs_spent(trial)} of {trial.planned_epochs} epochs"
    ]
    if found:
        lines.append(f"{SCORE} {score(found.NDCG10)} at epoch {found.epoch}")
    elif trial.reason:
        lines.append(trial.reason)
    return "\n".join([*lines, *(f"{key} {written(value)}" for key, value in trial.values.items())])


def _heading(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"<small>{text(section)}</small>{text(name)}" if section else text(name)


def _score(value: float | None) -> str:
    return score(value if is_number(value) else None)


def _unbroken(sentence: str) -> str:
    """Text whose percent signs stay with their numbers."""
    return text(sentence).replace(" %", "&nbsp;%")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")


def _mean(finals: Sequence[Final]) -> float | None:
    found = [final.NDCG10 for final in finals if is_number(final.NDCG10)]
    return fmean(found) if found else None


def _mean_test(finals: Sequence[Final], key: str) -> float | None:
    found = [value for final in finals if is_number(value := (final.test or {}).get(key))]
    return fmean(found) if found else None


def _NDCG10(epoch: Epoch) -> float:
    return epoch.NDCG10


def _loss(epoch: Epoch) -> float:
    return epoch.loss
