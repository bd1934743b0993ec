"""A static page for several runs: scores, paired differences to the first, curves on one axis, what
they cost, and the recipe keys in which they differ."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.atomic import write_text
from genrec_shards.splits import Split

from genrec_dist.config.used_settings import flat, used_settings
from genrec_dist.evaluation.bootstrap import holm
from genrec_dist.evaluation.compare import LEVEL, Comparison, compare
from genrec_dist.report.compare_training import COLORS, Entry, training_cost, training_curves
from genrec_dist.report.html import definitions, grid, page, table_row, text
from genrec_dist.report.run_files import read_run_files
from genrec_dist.report.score_tables import METRICS, system_name
from genrec_dist.report.svg import Dot, dot_chart, score, signed_score

SHOWN = ("NDCG@10", "HR@10")


def write_comparison(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    split: Split = "test",
    resamples: int = 10_000,
    seed: int = 0,
) -> Path:
    """Write a page that sets runs side by side.

    Args:
        runs: at least two; each a run, or a folder of runs that are seeds of one recipe. The others
            are compared with the first.
        out: the page.
        split: whose lists.
        resamples: of the paired bootstrap.
        seed: of the bootstrap.

    Returns:
        The page's path.

    Raises:
        ValueError: as `compare`, or fewer than two runs, or one twice.
    """
    paths = [Path(run) for run in runs]
    if len({path.resolve() for path in paths}) < max(len(paths), 2):
        raise ValueError("a comparison takes two runs or more, each of them once")
    found = [
        compare(other, paths[0], split=split, resamples=resamples, seed=seed) for other in paths[1:]
    ]
    write_text(out, _page_of(_entries(paths, found), split))
    return Path(out)


def _entries(paths: list[Path], found: list[Comparison]) -> list[Entry]:
    first = found[0]
    scores = [
        {key: row.b for key, row in first.metrics.items()},
        *({key: row.a for key, row in one.metrics.items()} for one in found),
    ]
    return [
        Entry(
            name=name,
            seeds=[read_run_files(Path(run)) for run in runs],
            color=number,
            scores=scores[number],
            comparison=comparison,
        )
        for number, (name, runs, comparison) in enumerate(
            zip(
                _names(paths),
                [first.b.runs, *(one.a.runs for one in found)],
                [None, *found],
                strict=True,
            )
        )
    ]


def _names(paths: list[Path]) -> list[str]:
    """The paths below the folder that they share."""
    whole = [path.resolve() for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    return [os.path.relpath(path, shared) for path in whole]


def _page_of(entries: list[Entry], split: Split) -> str:
    compared = [entry.comparison for entry in entries if entry.comparison is not None]
    p_values = holm(np.array([row.p for one in compared for row in one.metrics.values()]))
    clear = dict(
        zip(
            [(entry.name, key) for entry in entries[1:] for key in compared[0].metrics],
            (p_values < LEVEL).tolist(),
            strict=True,
        )
    )
    facts = [
        ("split", split),
        ("users", f"{compared[0].users:,}"),
        ("compared with", entries[0].name),
        ("resamples", f"{compared[0].resamples:,}"),
    ]
    header = (
        '<header><p class="kicker">GenRec runs side by side</p>'
        f"<h1>{len(entries)} runs on {text(split)}</h1>{definitions(facts, 'facts')}</header>"
    )
    sections = [
        header,
        _summary(entries, split, clear),
        _scores(entries, split),
        _differences(entries, clear),
        training_curves(entries),
        training_cost(entries, split),
        _settings(entries, split),
    ]
    return page(f"{len(entries)} runs", sections)


def _summary(entries: list[Entry], split: Split, clear: Mapping[tuple[str, str], bool]) -> str:
    best = max(entries, key=lambda entry: entry.scores["NDCG@10"])
    lead = (
        f"{best.name} has the highest NDCG@10 of {len(entries)} on {split}, "
        f"{score(best.scores['NDCG@10'])}."
    )
    lines = [_sentence(entry, entries[0], clear) for entry in entries[1:]]
    single = [
        entry.name for entry in entries if len(entry.seeds) == 1 and _is_trained(entry, split)
    ]
    if single:
        lines.append(f"One training each, no other seed was asked: {', '.join(single)}.")
    charts = [
        dot_chart(
            f"{key}, {split}",
            [
                Dot(
                    entry.name,
                    entry.scores[key],
                    entry.interval(split, key),
                    entry is best,
                    entry.color % COLORS,
                )
                for entry in entries
            ],
        )
        for key in SHOWN
    ]
    points = "".join(f"<li>{text(line)}</li>" for line in lines)
    return (
        f'<section><p class="lead">{text(lead)}</p><ul>{points}</ul>'
        f'<div class="charts apart">{"".join(charts)}</div></section>'
    )


def _is_trained(entry: Entry, split: Split) -> bool:
    """Whether another seed would give another result; a rule has none."""
    return (entry.metrics(split)[0].get("recipe") or {}).get("seed") is not None


def _recipe_of(entry: Entry, split: Split) -> dict[str, str] | None:
    """What the first seed's training read, flat; None of other systems' settings."""
    recipe = entry.seeds[0].recipe or entry.metrics(split)[0].get("recipe") or {}
    return _texts(used_settings(recipe)) if "finetune" in recipe else None


def _sentence(entry: Entry, first: Entry, clear: Mapping[tuple[str, str], bool]) -> str:
    """What the lists show of an entry beside the first one."""
    assert entry.comparison is not None
    rows = entry.comparison.metrics
    shown = {
        word: [
            key for key, row in rows.items() if clear[entry.name, key] and sign * row.difference > 0
        ]
        for word, sign in (("above", 1), ("below", -1))
    }
    told = [f"{word} {first.name} in {', '.join(keys)}" for word, keys in shown.items() if keys]
    rest = [key for key in rows if not clear[entry.name, key]]
    if rest:
        told.append(f"no difference to {first.name} is shown in {', '.join(rest)}")
    return f"{entry.name}: {'; '.join(told)}."


def _scores(entries: list[Entry], split: Split) -> str:
    rows = []
    for entry in entries:
        system = system_name(entry.metrics(split)[0].get("system", "genrec"))
        cells = [text(system), str(len(entry.seeds))]
        for key in METRICS:
            bounds = entry.interval(split, key)
            small = f"<small>{score(bounds[0])}–<wbr>{score(bounds[1])}</small>" if bounds else ""
            cells.append(f"{score(entry.scores[key])}{small}")
        rows.append(table_row(entry.name, cells))
    several = any(len(entry.seeds) > 1 for entry in entries)
    seeds = " Of several seeds: their mean, and below it the smallest and the largest." * several
    return (
        f"<section><h2>Scores</h2>{grid(('run', 'system', 'seeds', *METRICS), rows)}"
        '<p class="small">Small figures: 95 % bootstrap interval over users of a single run.'
        f"{seeds}</p></section>"
    )


def _differences(entries: list[Entry], clear: Mapping[tuple[str, str], bool]) -> str:
    first, others = entries[0], entries[1:]
    rows, charts = [], []
    for entry in others:
        assert entry.comparison is not None
        cells = []
        for key in METRICS:
            row = entry.comparison.metrics[key]
            interval = f"{signed_score(row.ci95[0])} to {signed_score(row.ci95[1])}"
            mark = ' class="sure"' if clear[entry.name, key] else ""
            cells.append(
                f"<span{mark}>{signed_score(row.difference)}{'*' * clear[entry.name, key]}</span>"
                f"<small>{interval}</small><small>p {row.p:.4f}</small>"
            )
        rows.append(table_row(entry.name, cells))
    for key in SHOWN:
        dots = [
            Dot(
                entry.name,
                entry.comparison.metrics[key].difference,
                entry.comparison.metrics[key].ci95,
                clear[entry.name, key],
                entry.color % COLORS,
            )
            for entry in others
            if entry.comparison is not None
        ]
        charts.append(dot_chart(f"{key} minus that of {first.name}", dots, signed=True))
    return (
        f"<section><h2>Differences to {text(first.name)}</h2>{grid(('run', *METRICS), rows)}"
        '<p class="small">Paired bootstrap over users, and over seeds where there are several; '
        f"small figures: 95 % interval and p. *: p is below {LEVEL:g} after Holm's correction for "
        f"the {len(METRICS) * len(others)} differences of this table.</p>"
        f'<div class="charts apart">{"".join(charts)}</div></section>'
    )


def _settings(entries: list[Entry], split: Split) -> str:
    """Keys of recipe and protocol with different values."""
    columns = [entry.name for entry in entries]
    several = any(len(entry.seeds) > 1 for entry in entries)
    recipes = [_recipe_of(entry, split) for entry in entries]
    protocols = [_texts(entry.metrics(split)[0].get("protocol") or {}) for entry in entries]
    parts = []
    for title, found, apart in (
        ("Recipe keys that differ", recipes, {"run"} | ({"seed"} if several else set())),
        ("Protocol keys that differ", protocols, set()),
    ):
        held = [values for values in found if values is not None]
        keys = [
            key
            for key in dict.fromkeys(key for values in held for key in values)
            if key not in apart and len({values.get(key) for values in held}) > 1
        ]
        rows = [
            table_row(
                key, ["–" if values is None else text(values.get(key, "–")) for values in found]
            )
            for key in keys
        ]
        if rows:
            parts.append(
                f'<h2>{title}</h2><div class="items">{grid(("key", *columns), rows)}</div>'
            )
    if not parts:
        parts = ["<h2>Settings</h2><p>No key of recipe or protocol differs.</p>"]
    elif several:
        parts[-1] += '<p class="small">Of several seeds: the values of the first.</p>'
    return "".join(f"<section>{part}</section>" for part in parts)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys, and values as text; without nulls."""
    known = {key: value for key, value in flat(values).items() if value is not None}
    return {k: value if isinstance(value, str) else json.dumps(value) for k, value in known.items()}
