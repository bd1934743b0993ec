"""Tables of scores: the systems of a metrics file beside each other, what their lists show of the
catalogue, and the scores by bucket."""

from __future__ import annotations

from typing import Any

from genrec_dist.report.html import grid, percent, table_row, text
from genrec_dist.report.run_files import is_number
from genrec_dist.report.svg import BucketSeries, bucket_chart, score, short_count

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
NAMES = {
    "genrec": "GenRec",
    "genrec, hybrid": "GenRec, hybrid",
    "genrec, item head": "GenRec, item head",
    "genrec, titles": "GenRec of titles",
    "knn": "co-occurrence kNN",
    "popularity": "popularity",
    "counting": "counting rule",
    "repeat": "recent items again",
    "ceiling": "oracle ceiling",
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
FEWEST = 10
"""Users of a bucket that is drawn; of fewer the interval would fill the chart."""
CHARTED = {"history_length": "history length", "target_popularity": "target popularity"}


def metrics_table(metrics: dict[str, Any]) -> str:
    rows = []
    for index, (system, row) in enumerate(systems_of(metrics)):
        rows.append(
            table_row(
                system_name(system), [with_interval(row, key) for key in METRICS], ours=index == 0
            )
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


def breadth(metrics: dict[str, Any]) -> str:
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
        for name, row in systems_of(metrics)
        if any(is_number(row.get(key)) for key in BREADTH)
    ]
    if not systems:
        return ""
    rows = [
        table_row(
            system_name(name),
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
    """Charts and a table per dimension: the run's own scores by bucket, and those of kNN in the
    same bucket."""
    tables, charts = [], []
    for dimension, meaning in BREAKDOWN.items():
        ours, knn = (
            buckets_of(metrics, dimension),
            buckets_of((metrics.get("beside") or {}).get("knn"), dimension),
        )
        with_knn = bool(knn) and metrics.get("system") != "knn"
        rows = []
        for name, bucket in ours.items():
            cells = [f"{bucket['users']:,}" if is_number(bucket.get("users")) else "–"]
            cells += [with_interval(bucket, key) for key in ("HR@10", "NDCG@10")]
            cells += [with_interval(knn.get(name, {}), "NDCG@10")] * with_knn
            rows.append(table_row(name, cells))
        if rows:
            beside = {"co-occurrence kNN": knn} if with_knn else {}
            systems = {system_name(metrics.get("system", "genrec")): ours, **beside}
            charts += [
                _bucket_chart(f"{key} by {CHARTED[dimension]}", meaning, systems, key)
                for key in ("NDCG@10", "HR@10")
            ]
            columns = (meaning, "users", "HR@10", "NDCG@10", *["kNN's NDCG@10"] * with_knn)
            tables.append(f'<div class="narrow">{grid(columns, rows)}</div>')
    if not tables:
        return ""
    drawn, few = "".join(charts), ""
    if drawn:
        few = f'<p class="small">Buckets of fewer than {FEWEST} users are in the tables alone.</p>'
    return f'<div class="charts apart">{drawn}</div>{few}<div class="pair">{"".join(tables)}</div>'


def _bucket_chart(
    title: str, meaning: str, systems: dict[str, dict[str, dict[str, Any]]], key: str
) -> str:
    """A metric by bucket; `systems` are the buckets of each, the run's own first."""
    ours = {
        name: bucket["users"]
        for name, bucket in next(iter(systems.values())).items()
        if is_number(bucket.get("users")) and bucket["users"] >= FEWEST
    }
    if not ours:
        return ""
    labels = [(name, short_count(users)) for name, users in ours.items()]
    series = []
    for color, (system, buckets) in enumerate(systems.items()):
        found = [buckets.get(name, {}) for name in ours]
        values = [bucket[key] if is_number(bucket.get(key)) else None for bucket in found]
        series.append(
            BucketSeries(system, values, [interval_of(bucket, key) for bucket in found], color)
        )
    return bucket_chart(title, f"{meaning}; below: users", labels, series)


def buckets_of(metrics: Any, dimension: str) -> dict[str, dict[str, Any]]:
    found = (metrics.get("breakdown") or {}) if isinstance(metrics, dict) else {}
    buckets = found.get(dimension) if isinstance(found, dict) else None
    return (
        {name: row for name, row in buckets.items() if isinstance(row, dict)}
        if isinstance(buckets, dict)
        else {}
    )


def systems_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The run's own system first, then those beside it, best NDCG@10 first."""
    beside = [
        (name, row) for name, row in (metrics.get("beside") or {}).items() if isinstance(row, dict)
    ]
    beside.sort(key=lambda pair: -pair[1]["NDCG@10"] if is_number(pair[1].get("NDCG@10")) else 0.0)
    own = str(metrics.get("system", "genrec"))
    return [(own, metrics), *((name, row) for name, row in beside if name != own)]


def interval_of(row: dict[str, Any], key: str) -> tuple[float, float] | None:
    bounds = (row.get("ci95") or {}).get(key)
    if isinstance(bounds, list) and len(bounds) == 2 and all(is_number(bound) for bound in bounds):
        return bounds[0], bounds[1]
    return None


def with_interval(row: dict[str, Any], key: str) -> str:
    """A score, and its interval in small figures below."""
    value, interval = row.get(key), interval_of(row, key)
    bounds = f"<small>{score(interval[0])}–<wbr>{score(interval[1])}</small>" if interval else ""
    return f"{score(value if is_number(value) else None)}{bounds}"


def system_name(system: Any) -> str:
    return NAMES.get(str(system), str(system))
