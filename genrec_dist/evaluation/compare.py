"""Is one run better than another? The comparison of two runs, its table and its verdict."""

# U users, S seeds (runs of one recipe), K distinct tuples of ranks

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec_shards.splits import Split
from rich.table import Table

from genrec_dist.evaluation.bootstrap import Difference, bootstrap_difference, distinct_tuples
from genrec_dist.evaluation.compared_runs import (
    MAY_DIFFER,
    ComparedRun,
    check_metrics,
    check_protocols,
    read_ranks,
    seeds_of,
)
from genrec_dist.evaluation.metrics import signed

LEVEL = 0.05
"""A difference is called one where Holm's p is below."""
_WITHOUT_BEAM = ("all", "items")
"""Modes of decoding that score every item, whatever the width of a beam is."""


@dataclass(frozen=True)
class Side:
    """One argument of the comparison: a run, or several seeds of one recipe."""

    name: str
    system: str
    runs: list[str]


@dataclass(frozen=True)
class Comparison:
    a: Side
    b: Side
    split: str
    users: int
    metrics: dict[str, Difference]
    differs: dict[str, list[Any]]
    """Fields of the protocol that need not agree and do not: [A's, B's]. What one of the two does
    not have, as a baseline has no beam, is not among them."""
    resamples: int
    seed: int

    def verdict(self) -> str:
        """What the figures carry, in words."""
        return _verdict(self)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {**dataclasses.asdict(self), "verdict": self.verdict()}


def compare(
    run_a: str | Path,
    run_b: str | Path,
    *,
    split: Split = "test",
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs, or two folders of runs that are seeds of one recipe, on the lists of one
    split.

    Raises ValueError, one line, if something is missing or unreadable, and if the runs do not share
    users, targets and protocol (`numbering`, `beam` and `decode` may differ)."""
    if resamples < 100:
        raise ValueError(
            f"{resamples} resamples tell nothing about a 95 % interval: give 1000 or more"
        )
    runs_a, runs_b = seeds_of(Path(run_a), split), seeds_of(Path(run_b), split)
    runs = runs_a + runs_b
    check_protocols(runs)
    ranks_SU = read_ranks(runs)
    for run, ranks_U in zip(runs, ranks_SU, strict=True):
        check_metrics(run, ranks_U)
    tuples_KS, counts_K = distinct_tuples(ranks_SU)
    found = bootstrap_difference(tuples_KS, counts_K, len(runs_a), resamples, seed)
    protocols = [side[0].metrics["protocol"] for side in (runs_a, runs_b)]
    return Comparison(
        a=_side(Path(run_a), runs_a),
        b=_side(Path(run_b), runs_b),
        split=split,
        users=ranks_SU.shape[1],
        metrics=found,
        differs=_differences(*protocols),
        resamples=resamples,
        seed=seed,
    )


def _differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """See `Comparison.differs`."""
    with_beam = all(protocol["decode"] not in _WITHOUT_BEAM for protocol in (a, b))
    return {
        key: [a[key], b[key]]
        for key in MAY_DIFFER
        if a[key] != b[key] and None not in (a[key], b[key]) and (key != "beam" or with_beam)
    }


def render(found: Comparison) -> Table:
    """A table with the two values, their difference and what is known about it; `conclusion` stands
    below."""
    table = Table("metric", "A", "B", "A − B", "95 % interval", "p", "p (Holm)")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in found.metrics.items():
        interval = f"{signed(row.ci95[0])} to {signed(row.ci95[1])}"
        cells = (
            _plain(row.a),
            _plain(row.b),
            signed(row.difference),
            interval,
            _p(row.p),
            _p(row.p_holm),
        )
        table.add_row(name, *cells, style="bold" if row.p_holm < LEVEL else None)
    return table


def conclusion(found: Comparison) -> str:
    """Who A and B are, where their protocols differ, and the verdict; a line each."""
    lines = [
        f"{side}: {who.name} ({who.system}, {_runs(who)})"
        for side, who in (("A", found.a), ("B", found.b))
    ]
    lines += [f"{key} differs: {a} and {b}" for key, (a, b) in found.differs.items()]
    return "\n".join([*lines, found.verdict()])


def _side(path: Path, runs: list[ComparedRun]) -> Side:
    return Side(
        str(path), str(runs[0].metrics.get("system", "genrec")), [str(run.path) for run in runs]
    )


def _verdict(found: Comparison) -> str:
    clear = {name: row for name, row in found.metrics.items() if row.p_holm < LEVEL}
    about = f"on {found.split}, {found.users:,} users"
    if not clear:
        sentence = (
            f"No difference that these lists can show ({about}): after Holm no p is below "
            f"{LEVEL:g}."
        )
    else:
        sides = {
            "A": [n for n, r in clear.items() if r.difference > 0],
            "B": [n for n, r in clear.items() if r.difference < 0],
        }
        told = [f"{side} is better in {', '.join(names)}" for side, names in sides.items() if names]
        sentence = f"{'; '.join(told)} ({about}; p after Holm below {LEVEL:g})."
        if len(clear) < len(found.metrics):
            rest = ", ".join(name for name in found.metrics if name not in clear)
            sentence += f" In {rest} no difference is shown."
    single = [
        name
        for name, side in (("A", found.a), ("B", found.b))
        if len(side.runs) == 1 and side.system in ("genrec", "genrec, titles")
    ]
    if single:
        sentence += (
            f" {' and '.join(single)} stand{'s' * (len(single) == 1)} for one training run: "
            "another seed was not asked."
        )
    return sentence


def _runs(side: Side) -> str:
    return "1 run" if len(side.runs) == 1 else f"{len(side.runs)} seeds"


def _plain(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _p(value: float) -> str:
    return f"{value:.4f}".removeprefix("0") if value < 1 else "1"
