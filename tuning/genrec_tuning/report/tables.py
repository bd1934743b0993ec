"""The tables of a sweep's page: finals, comparison, trials."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from genrec_dist.evaluation.metrics import METRICS
from genrec_dist.report.html import duration, grid, table_row, text
from genrec_dist.report.run_files import is_number
from genrec_dist.report.svg import score
from genrec_tuning.export import table_of
from genrec_tuning.record import Final, Sweep, show_value
from genrec_tuning.report.charts import SCORE


def finals_section(sweep: Sweep) -> str:
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
        rows.append(table_row(f"{name} (winner)" if won else _system(name), cells, won))
    columns = ("", "seeds run", f"validation {SCORE}", *(f"test {key}" for key in METRICS))
    looked = " and ".join(_system(name) for name in systems if any(f.test for f in systems[name]))
    rule = "Means over seeds, each seed in small figures. The winner has the best mean on "
    rule += f"validation; test was looked at by {looked or 'nobody yet'}"
    return (
        f'<section><h2>Finals</h2><p class="lead">{sentence(verdict(sweep))}</p>'
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
            rows.append(table_row(key, [*cells, f"{p:.4f}"], ours=False))
    head = ("on test, paired over users and seeds", text(sweep.winner), "base recipe")
    return grid((*head, "difference, 95 % interval", "p after Holm"), rows) if rows else ""


def trials_section(sweep: Sweep) -> str:
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
        rows.append(table_row(row["trial"], cells[1:], ours))
    return (
        f'<section><h2>All trials</h2><div class="trials">{grid(map(text, found[0]), rows)}</div>'
        '<p class="small">Scores are those of each trial\'s best epoch on validation. '
        "–: not known, or does not apply. The same table: sweep.parquet.</p></section>"
    )


def _system(name: str) -> str:
    return "the base recipe" if name == "base" else name


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if is_number(value)]
    return fmean(known) if known else None


def sentence(words: str) -> str:
    """Text whose percent signs stay with their numbers."""
    return text(words).replace(" %", "&nbsp;%")
