"""One page a run, `report.html`: what was trained, how it went, and the honest comparison; opens
without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml
from genrec_shards.atomic import sweep_killed_writers, write_text
from genrec_shards.histories import MANY_TIES

from genrec_dist.config.paths import check_writable
from genrec_dist.config.used_settings import used_settings
from genrec_dist.report.advice import advice
from genrec_dist.report.html import definitions, duration, page, percent, text
from genrec_dist.report.list_sections import list_sections
from genrec_dist.report.run_files import RunFiles, is_number, read_run_files
from genrec_dist.report.score_tables import (
    breadth,
    interval_of,
    metrics_table,
    system_name,
    systems_of,
)
from genrec_dist.report.svg import Dot, dot_chart, score
from genrec_dist.report.training_charts import curves, throughput

PROTOCOL = {
    "numbering": "how items got the digits of their codes",
    "ties": "order of items that share a timestamp",
    "split": "which interactions are held out",
    "trained_through": "last position the model may learn from",
    "exclude_history": "whether items of the history are left out of the lists",
    "beam": "candidates kept at each step of decoding",
    "decode": "exact: softmax over the whole vocabulary; compact: over the trie's tokens; "
    "free: no trie; all: every item scored",
    "users": "whose lists are scored",
}


def write_report(run_dir: str | Path, data: str | Path | None = None) -> Path:
    """Write `report.html` into a directory of `genrec train`, `evaluate --out` or `baseline`.

    Missing files leave their parts out; what could not be read is said on the page.

    Args:
        run_dir: the directory.
        data: the data directory, for histories and titles; None: the one that the run names.

    Returns:
        The page's path.

    Raises:
        ValueError: the directory holds nothing that a run writes.
    """
    check_writable(Path(run_dir))
    run = read_run_files(Path(run_dir))
    source = _page_of(run, _data_of(run) if data is None else Path(data))
    target = run.path / "report.html"
    sweep_killed_writers(run.path)
    write_text(target, source)
    return target


def headline(metrics: dict[str, Any], key: str = "NDCG@10") -> str:
    """The comparison in plain words, as text; it claims no difference that the interval does not
    carry."""
    ours, name = metrics.get(key), system_name(metrics.get("system", "genrec"))
    if not is_number(ours):
        return f"{name} has no {key} in its metrics."
    sentence = f"{name} reaches {key} {score(ours)} on {metrics.get('split', 'an unnamed split')}"
    interval = interval_of(metrics, key)
    sentence += f" (95 % interval {score(interval[0])} to {score(interval[1])})" if interval else ""
    beside = metrics.get("beside") or {}
    knn = (beside.get("knn") or {}).get(key)
    if metrics.get("system") != "knn" and is_number(knn):
        sentence += f"; co-occurrence kNN, which learns nothing but counts, reaches {score(knn)}: "
        if knn > 0:
            gap = (ours - knn) / knn
            sentence += f"{name} is {percent(abs(gap))} {'above' if gap >= 0 else 'below'} it"
        else:
            sentence += f"{name} is above it" if ours > 0 else "neither finds anything"
        if interval and interval[0] <= knn <= interval[1]:
            sentence += ", a gap that the interval does not tell from none"
    sentence += "."
    ceiling = (beside.get("ceiling") or {}).get(key)
    if is_number(ceiling) and ceiling > 0:
        sentence += (
            f" The oracle's ceiling is {score(ceiling)}; {name} reaches {percent(ours / ceiling)} "
            "of it."
        )
    return sentence


def _data_of(run: RunFiles) -> Path | None:
    """The data directory by the recipe, of `evaluate --out` that in the metrics file."""
    recipes = [run.recipe, *(metrics.get("recipe") or {} for metrics in run.metrics.values())]
    named = next((recipe["data"] for recipe in recipes if recipe.get("data")), None)
    return None if named is None else Path(str(named))


def _page_of(run: RunFiles, data: Path | None) -> str:
    lists = list_sections(run, data)
    sections = [
        _header(run),
        _comparison(run),
        _advice(run),
        curves(run),
        *(part(metrics) for metrics in run.metrics.values() for part in (metrics_table, breadth)),
        lists,
        _protocol(run),
        _audit(run),
        throughput(run),
        _notes(run),
        _recipe(run),
    ]
    return page(run.path.resolve().name, sections)


def _header(run: RunFiles) -> str:
    start = (run.of("start") or [{}])[-1]
    first, last = (run.of("start") or [{}])[0], (run.events or [{}])[-1]
    measured = next(iter(run.metrics.values()), {})
    status = (
        run.status.get("status") or (run.of("end") or [{}])[-1].get("status") or "no status written"
    )
    facts: list[tuple[str, Any]] = [("status", status)]
    if run.status.get("reason"):
        facts.append(("reason", run.status["reason"]))
    if is_number(first.get("time")):
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(first["time"]))))
        if is_number(last.get("time")):
            facts.append(("from first to last event", duration(last["time"] - first["time"])))
    if len(run.of("start")) > 1:
        facts.append(("resumed", f"{len(run.of('start')) - 1} ×"))
    if run.recipe.get("data"):
        facts.append(("data", run.recipe["data"]))
    if is_number(start.get("parameters")):
        facts.append(("parameters", f"{start['parameters']:,}"))
    facts.append(("code", start.get("git") or measured.get("git") or "not in a checkout"))
    versions = start.get("versions") or measured.get("versions") or {}
    if versions.get("torch"):
        facts.append(("torch", versions["torch"]))
    name = text(run.path.resolve().name)
    return (
        f'<header><p class="kicker">GenRec run</p><h1>{name}</h1>'
        f"{definitions(facts, 'facts')}</header>"
    )


def _comparison(run: RunFiles) -> str:
    if not run.metrics:
        how = "<code>genrec evaluate RUN --split test</code>"
        return (
            f'<section><p class="lead">Not evaluated yet: {how} adds the comparison.</p></section>'
        )
    metrics = next(iter(run.metrics.values()))
    charts = []
    for key in ("NDCG@10", "HR@10"):
        dots = [
            Dot(system_name(system), row[key], interval_of(row, key), ours=index == 0)
            for index, (system, row) in enumerate(systems_of(metrics))
            if is_number(row.get(key))
        ]
        if dots:
            charts.append(dot_chart(f"{key}, {metrics.get('split', '')}", dots))
    return (
        f'<section><p class="lead">{text(headline(metrics))}</p><div class="charts">'
        f"{''.join(charts)}</div></section>"
    )


def _advice(run: RunFiles) -> str:
    lines = advice(run)
    return (
        f"<section>{''.join(f'<p>{text(line)}</p>' for line in lines)}</section>" if lines else ""
    )


def _protocol(run: RunFiles) -> str:
    metrics = next(iter(run.metrics.values()), {})
    protocol = metrics.get("protocol")
    if not isinstance(protocol, dict) or not protocol:
        return ""
    tied = metrics.get("tied_targets")
    if is_number(tied):
        shared = f"{percent(tied)} of users have a held-out item that shares its time with others"
        warning = "; warning: for so many the time does not say which came last"
        ties = f"{protocol.get('ties')}: {shared}{warning if tied > MANY_TIES else ''}"
        protocol = protocol | {"ties": ties}
    rows = "".join(
        f"<div><dt>{text(key.replace('_', ' '))}</dt><dd><b>{text(_plain(value))}</b>"
        + (f"<small>{PROTOCOL[key]}</small>" if key in PROTOCOL else "")
        + "</dd></div>"
        for key, value in protocol.items()
        if value is not None  # of a part that this system does not have, as a beam
    )
    return f'<section><h2>Protocol</h2><dl class="protocol">{rows}</dl></section>'


def _audit(run: RunFiles) -> str:
    sentence = run.audit.get("sentence")
    if not isinstance(sentence, str):
        return ""
    return f"<section><h2>Audit of the data</h2><blockquote>{text(sentence)}</blockquote></section>"


def _notes(run: RunFiles) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in run.notes)
    return f"<section><h2>Could not be read</h2><ul>{items}</ul></section>" if items else ""


def _recipe(run: RunFiles) -> str:
    if not run.recipe_text:
        return ""
    shown, note = run.recipe_text, ""
    if run.recipe:
        shown = yaml.safe_dump(used_settings(run.recipe), sort_keys=False, allow_unicode=True)
        note = '<p class="small">Settings of parts that are off are left out.</p>'
    return f"<details><summary>Recipe</summary><pre>{text(shown)}</pre>{note}</details>"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {item:,}" if is_number(item) else f"{key} {item}" for key, item in value.items()
        )
    return str(value)
