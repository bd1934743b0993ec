"""One page a run, `report.html`: what was trained, how it went, and the honest comparison; opens
without a network."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from genrec_shards.atomic import atomic_file
from genrec_shards.histories import MANY_TIES

from genrec_dist.config.paths import check_writable
from genrec_dist.config.used_settings import used_settings
from genrec_dist.report.advice import advice
from genrec_dist.report.html import definitions, duration, grid, page, percent, text
from genrec_dist.report.run_files import RunFiles, is_number, read_run_files
from genrec_dist.report.svg import Dot, dot_chart, score
from genrec_dist.report.training_charts import curves, throughput

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
NAMES = {
    "genrec": "GenRec",
    "genrec, titles": "GenRec of titles",
    "knn": "co-occurrence kNN",
    "popularity": "popularity",
    "counting": "counting rule",
    "repeat": "recent items again",
    "ceiling": "oracle ceiling",
}
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
BREADTH = {
    "coverage@10": (
        "in some list of 10",
        "share of the catalogue that stands in at least one list",
    ),
    "coverage@20": ("in some list of 20", ""),
    "popularity@10": (
        "popularity",
        "training count of a listed item over that of a target, in the mean; 1: no bias",
    ),
    "gini@10": (
        "Gini",
        "0: every item is listed equally often; near 1: a few items fill the lists",
    ),
}
BREAKDOWN = {
    "history_length": "items in the history",
    "target_popularity": "times the target was taken in training",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a directory of `genrec train` or `genrec baseline` and return its
    path.

    Missing files leave their parts out; what could not be read is said on the page.
    Raises ValueError if the directory holds nothing that a run writes.
    """
    check_writable(Path(run_dir))
    run = read_run_files(Path(run_dir))
    source = _page_of(run)
    target = run.path / "report.html"
    with atomic_file(target) as temporary:
        temporary.write_text(source, encoding="utf-8")
    return target


def headline(metrics: dict[str, Any], key: str = "NDCG@10") -> str:
    """The comparison in plain words, as text; it claims no difference that the interval does not
    carry."""
    ours, name = metrics.get(key), _name(metrics.get("system", "genrec"))
    if not is_number(ours):
        return f"{name} has no {key} in its metrics."
    sentence = f"{name} reaches {key} {score(ours)} on {metrics.get('split', 'an unnamed split')}"
    interval = _interval(metrics, key)
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


def _page_of(run: RunFiles) -> str:
    sections = [
        _header(run),
        _comparison(run),
        _advice(run),
        curves(run),
        *(part(metrics) for metrics in run.metrics.values() for part in (_table, _breadth)),
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
            Dot(_name(system), row[key], _interval(row, key), ours=index == 0)
            for index, (system, row) in enumerate(_systems(metrics))
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


def _table(metrics: dict[str, Any]) -> str:
    rows = []
    for index, (system, row) in enumerate(_systems(metrics)):
        rows.append(
            _row(_name(system), [_with_interval(row, key) for key in METRICS], ours=index == 0)
        )
    users = f", {metrics['users']:,} users" if is_number(metrics.get("users")) else ""
    more = [
        f"{key} {score(metrics[key])}"
        for key in ("HR@1", "HR@20", "NDCG@20", "MRR@20")
        if is_number(metrics.get(key))
    ]
    more += [
        f"{key.replace('_', ' ')} {percent(metrics[key])}"
        for key in ("invalid_rate", "duplicate_rate")
        if is_number(metrics.get(key))
    ]
    if is_number(metrics.get("users_per_second")):
        more.append(f"{metrics['users_per_second']:,.0f} users/s")
    if is_number(metrics.get("top")):
        more.append(f"lists: top{metrics['top']}-{metrics.get('split', '')}.parquet")
    return (
        f"<section><h2>Metrics on {text(metrics.get('split', ''))}{users}</h2>"
        f"{grid(('system', *METRICS), rows)}"
        '<p class="small">Small figures: 95 % bootstrap interval over users. '
        f"{text('; '.join(more))}</p></section>"
    )


def _breadth(metrics: dict[str, Any]) -> str:
    """What the lists show of the catalogue, and for whom and for what they are right."""
    parts = [part for part in (_catalogue(metrics), _breakdown(metrics)) if part]
    if not parts:
        return ""
    return (
        "<section><h2>Breadth of the lists on "
        f"{text(metrics.get('split', ''))}</h2>{''.join(parts)}</section>"
    )


def _catalogue(metrics: dict[str, Any]) -> str:
    systems = [
        (name, row)
        for name, row in _systems(metrics)
        if any(is_number(row.get(key)) for key in BREADTH)
    ]
    if not systems:
        return ""
    rows = [
        _row(
            _name(name),
            [_breadth_cell(key, row.get(key)) for key in BREADTH],
            name == systems[0][0],
        )
        for name, row in systems
    ]
    told = "; ".join(f"{name}: {meaning}" for name, meaning in BREADTH.values() if meaning)
    return (
        f'{grid(("system", *(name for name, _ in BREADTH.values())), rows)}<p class="small">'
        f"{text(told)}.</p>"
    )


def _breadth_cell(key: str, value: Any) -> str:
    if not is_number(value):
        return "–"
    return (
        percent(value)
        if key.startswith("coverage")
        else f"{value:.3f}"
        if key.startswith("gini")
        else f"{value:.2f}"
    )


def _breakdown(metrics: dict[str, Any]) -> str:
    """A table a dimension: the run's own scores by bucket, and those of kNN in the same bucket."""
    tables = []
    for dimension, meaning in BREAKDOWN.items():
        ours, knn = (
            _buckets(metrics, dimension),
            _buckets((metrics.get("beside") or {}).get("knn"), dimension),
        )
        with_knn = bool(knn) and metrics.get("system") != "knn"
        rows = []
        for name, bucket in ours.items():
            cells = [f"{bucket['users']:,}" if is_number(bucket.get("users")) else "–"]
            cells += [_with_interval(bucket, key) for key in ("HR@10", "NDCG@10")]
            cells += [_with_interval(knn.get(name, {}), "NDCG@10")] * with_knn
            rows.append(_row(name, cells))
        if rows:
            columns = (meaning, "users", "HR@10", "NDCG@10", *["kNN's NDCG@10"] * with_knn)
            tables.append(f'<div class="narrow">{grid(columns, rows)}</div>')
    return f'<div class="pair">{"".join(tables)}</div>' if tables else ""


def _buckets(metrics: Any, dimension: str) -> dict[str, dict[str, Any]]:
    found = (metrics.get("breakdown") or {}) if isinstance(metrics, dict) else {}
    buckets = found.get(dimension) if isinstance(found, dict) else None
    return (
        {name: row for name, row in buckets.items() if isinstance(row, dict)}
        if isinstance(buckets, dict)
        else {}
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


def _systems(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The run's own system first, then those beside it, best NDCG@10 first."""
    beside = [
        (name, row) for name, row in (metrics.get("beside") or {}).items() if isinstance(row, dict)
    ]
    beside.sort(key=lambda pair: -pair[1]["NDCG@10"] if is_number(pair[1].get("NDCG@10")) else 0.0)
    own = str(metrics.get("system", "genrec"))
    return [(own, metrics), *((name, row) for name, row in beside if name != own)]


def _interval(row: dict[str, Any], key: str) -> tuple[float, float] | None:
    bounds = (row.get("ci95") or {}).get(key)
    if isinstance(bounds, list) and len(bounds) == 2 and all(is_number(bound) for bound in bounds):
        return bounds[0], bounds[1]
    return None


def _row(name: str, cells: Iterable[str], ours: bool = False) -> str:
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{" class=ours" if ours else ""}><th scope="row">{text(name)}</th>{inside}</tr>'


def _with_interval(row: dict[str, Any], key: str) -> str:
    """A score, and its interval in small figures below."""
    value, interval = row.get(key), _interval(row, key)
    bounds = f"<small>{score(interval[0])}–<wbr>{score(interval[1])}</small>" if interval else ""
    return f"{score(value if is_number(value) else None)}{bounds}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {item:,}" if is_number(item) else f"{key} {item}" for key, item in value.items()
        )
    return str(value)


def _name(system: Any) -> str:
    return NAMES.get(str(system), str(system))
