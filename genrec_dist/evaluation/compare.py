"""Is one run better than another? A paired bootstrap over users, and over seeds where a recipe has
several."""

# U users, S seeds (runs of one recipe), K distinct tuples of ranks, M metrics, R resamples

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.atomic import atomic_file
from genrec_shards.readers.documents import read_object
from genrec_shards.splits import Split
from rich.table import Table

from genrec_dist.config.load import use_current_keys
from genrec_dist.config.recipe import MOVES_NO_GRADIENT
from genrec_dist.evaluation.metrics import TOP, WEIGHTS, metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.results import lists_name

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
LEVEL = 0.05
"""A difference is called one where Holm's p is below."""

_DEEPEST = 10
"""Below this rank none of the metrics sees a target."""
_OF_THE_DATA = ("split", "ties")
"""Fields of the protocol that a data directory settles."""
_MUST_AGREE = (*_OF_THE_DATA, "trained_through", "exclude_history", "users")
_MAY_DIFFER = ("numbering", "beam", "decode")
_WITHOUT_BEAM = ("all", "items")
"""Modes of decoding that score every item, whatever the width of a beam is."""
_NOT_THE_RECIPE = frozenset(("seed", "best_epoch", "weight", "epsilon", *MOVES_NO_GRADIENT))
"""Keys in which two seeds of one recipe may differ: where things lie, what moves no gradient, and
what a training found."""
_USERS_AT_ONCE = 65_536
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Difference:
    """One metric of A beside B."""

    a: float
    """Mean over A's seeds."""
    b: float
    difference: float
    """a - b"""
    ci95: tuple[float, float]
    """2.5th and 97.5th percentile of the resampled differences."""
    p: float
    """Two-sided, of the hypothesis that there is no difference."""
    p_holm: float
    """The same, corrected for the number of metrics."""


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


@dataclass(frozen=True)
class _Run:
    path: Path
    lists: Path
    metrics: dict[str, Any]


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
    runs_a, runs_b = _seeds_of(Path(run_a), split), _seeds_of(Path(run_b), split)
    runs = runs_a + runs_b
    _check_protocols(runs)
    ranks_SU = _read_ranks(runs)
    for run, ranks_U in zip(runs, ranks_SU, strict=True):
        _check_metrics(run, ranks_U)
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
        for key in _MAY_DIFFER
        if a[key] != b[key] and None not in (a[key], b[key]) and (key != "beam" or with_beam)
    }


def bootstrap_difference(
    tuples_KS: np.ndarray, counts_K: np.ndarray, num_a: int, resamples: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Differences of HR and NDCG between A (the first `num_a` columns) and B (the others), with
    interval and p.

    `tuples_KS`: distinct tuples of one user's target ranks in all runs (0: absent), `counts_K`: how
    many users have each. Two things are left to chance, and a resample draws both:

    *Users.* U of the U users with replacement, the same ones for all runs: the comparison is
    paired. A user enters through her tuple alone, so that is one multinomial draw over the tuples,
    at a cost that does not grow with U.

    *Seeds*, within A and within B, where there are several. Two models of one recipe differ in
    their means because the recipe's training varies, and because each has its luck with these
    users; the users' draws contain the luck. What the variance s^2 of the S means has beyond it
    (the interaction of users and seeds, estimated by the analysis of variance without replication;
    nothing where that is negative) is the variance v of training, and the resample adds t * sqrt(v
    / S), t drawn from Student's t with S - 1 degrees of freedom. Drawing seeds from the seeds would
    count the interaction three times over (Owen, 2007) and take S values for a whole distribution.
    Of 300 simulated comparisons of three seeds each, none with a difference, the first alone
    rejected none where trainings were alike, the second alone 11 to 13 % where they were not; what
    stands here 1 to 4 %.

    With one seed the interval is about these trained models and says nothing of another training.
    Interval: percentiles of the resampled differences. p: twice the smaller share of them at or
    beyond 0, one resample counted on top so that it is never 0; it agrees with the interval. Over
    the metrics: Holm.

    Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 15;
    Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007); Holm, A simple
    sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979)."""
    num_users = int(counts_K.sum())
    gains_KSM = np.stack([WEIGHTS[name][tuples_KS] for name in METRICS], axis=2)
    sides = gains_KSM[:, :num_a], gains_KSM[:, num_a:]
    a_M, b_M = (counts_K @ side.mean(axis=1) / num_users for side in sides)
    rng = np.random.default_rng(seed)
    resampled_RM = _user_draws(rng, tuples_KS, counts_K, num_a, resamples)
    for side in sides:
        spread_M = np.sqrt(training_variance(side, counts_K) / side.shape[1])
        # A training that went well went well by all metrics, so they share the draw.
        resampled_RM += rng.standard_t(max(side.shape[1] - 1, 1), size=(resamples, 1)) * spread_M
    p_M, bounds_2M = _two_sided(resampled_RM), np.percentile(resampled_RM, [2.5, 97.5], axis=0)
    holm_M = holm(p_M)
    return {
        name: Difference(
            a=float(a_M[m]),
            b=float(b_M[m]),
            difference=float(a_M[m] - b_M[m]),
            ci95=(float(bounds_2M[0, m]), float(bounds_2M[1, m])),
            p=float(p_M[m]),
            p_holm=float(holm_M[m]),
        )
        for m, name in enumerate(METRICS)
    }


def training_variance(gains_KSM: np.ndarray, counts_K: np.ndarray) -> np.ndarray:
    """float64[M]: how much the mean of a metric varies from one training of the recipe to the next;
    0 for one seed.

    `gains_KSM`: what a user of each tuple counts in each run. The variance of the runs' means
    without the share that users and seeds have together, which is chance over users and not over
    trainings; at least 0."""
    S = gains_KSM.shape[1]
    if S == 1:
        return np.zeros(len(METRICS))
    num_users = int(counts_K.sum())
    mean_SM = np.tensordot(counts_K, gains_KSM, axes=(0, 0)) / num_users
    effect_SM = mean_SM - mean_SM.mean(axis=0)
    residual_KSM = gains_KSM - gains_KSM.mean(axis=1, keepdims=True) - effect_SM
    interaction_M = counts_K @ (residual_KSM**2).sum(axis=1) / max((num_users - 1) * (S - 1), 1)
    return np.maximum((effect_SM**2).sum(axis=0) / (S - 1) - interaction_M / num_users, 0.0)


def holm(p_M: np.ndarray) -> np.ndarray:
    """Holm's step-down p-values (1979): the smallest times M, the next times M - 1, ..., never
    falling, at most 1."""
    order = np.argsort(p_M, kind="stable")
    factors = np.arange(len(p_M), 0, -1)
    adjusted = np.empty(len(p_M))
    adjusted[order] = np.minimum(np.maximum.accumulate(p_M[order] * factors), 1.0)
    return adjusted


def render(found: Comparison) -> Table:
    """A table with the two values, their difference and what is known about it; `conclusion` stands
    below."""
    table = Table("metric", "A", "B", "A − B", "95 % interval", "p", "p (Holm)")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in found.metrics.items():
        interval = f"{_signed(row.ci95[0])} to {_signed(row.ci95[1])}"
        cells = (
            _plain(row.a),
            _plain(row.b),
            _signed(row.difference),
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


def write_json(found: Comparison, path: str | Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(
            json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def _user_draws(
    rng: np.random.Generator,
    tuples_KS: np.ndarray,
    counts_K: np.ndarray,
    num_a: int,
    resamples: int,
) -> np.ndarray:
    """float64[R, M]: the difference of A's and B's means over resampled users."""
    # The mean over a side's seeds does not ask which seed had which rank, and there are fewer
    # sorted tuples.
    ranks_KS = np.concatenate(
        [np.sort(tuples_KS[:, :num_a], axis=1), np.sort(tuples_KS[:, num_a:], axis=1)], axis=1
    )
    ranks_KS, counts_K = _merged(ranks_KS, counts_K)
    gains_KSM = np.stack([WEIGHTS[name][ranks_KS] for name in METRICS], axis=2)
    gaps_KM = gains_KSM[:, :num_a].mean(axis=1) - gains_KSM[:, num_a:].mean(axis=1)
    num_users, step = int(counts_K.sum()), max(1, _DRAWS_AT_ONCE // len(counts_K))
    parts = [
        rng.multinomial(num_users, counts_K / num_users, size=min(step, resamples - start))
        @ gaps_KM
        / num_users
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _two_sided(resampled_RM: np.ndarray) -> np.ndarray:
    resamples = len(resampled_RM)
    # A sum that ought to be 0 is not always exactly that in floats.
    below, above = (resampled_RM <= 1e-12).sum(axis=0), (resampled_RM >= -1e-12).sum(axis=0)
    return np.minimum(2 * (np.minimum(below, above) + 1) / (resamples + 1), 1.0)


def distinct_tuples(ranks_SU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct tuples of the users' ranks, uint8[K, S], and how many users have each, int64[K];
    below rank 10 is 0."""
    cut_US = np.where(ranks_SU > _DEEPEST, 0, ranks_SU).T
    return _merged(cut_US, np.ones(len(cut_US), np.int64))


def _merged(ranks_KS: np.ndarray, counts_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each tuple once, the commonest first, with the sum of its counts."""
    tuples_KS, places = np.unique(ranks_KS, axis=0, return_inverse=True)
    sums_K = np.bincount(places.ravel(), weights=counts_K).astype(np.int64)
    # numpy draws a multinomial one category after the other: the big ones first leave little for
    # the rest.
    order = np.argsort(-sums_K, kind="stable")
    return tuples_KS[order], sums_K[order]


def _seeds_of(path: Path, split: Split) -> list[_Run]:
    """The run that `path` is, or the runs in it. Raises ValueError where they are not seeds of one
    recipe."""
    name = f"metrics-{split}.json"
    if (path / name).is_file():
        return [_load(path, split)]
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such directory: give a run, or a folder whose folders are its seeds"
        )
    folders = sorted(
        folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )
    runs = [_load(folder, split) for folder in folders if (folder / name).is_file()]
    if not runs:
        raise ValueError(
            f"{path}: no {name} in it, nor in a folder of it: run `genrec evaluate ... --split "
            f"{split}`"
        )
    left_out = [
        folder
        for folder in folders
        if (folder / "recipe.yaml").is_file() and not (folder / name).is_file()
    ]
    if left_out:
        # Whoever compares the seeds that happen to be evaluated has chosen among them.
        raise ValueError(
            f"{left_out[0]}: a run without {name}: evaluate it too, or move it elsewhere"
        )
    _check_seeds(runs)
    return runs


def _load(path: Path, split: Split) -> _Run:
    file = path / f"metrics-{split}.json"
    metrics = read_object(file, "a metrics file of this program", "evaluate again")
    try:
        if isinstance(metrics.get("recipe"), dict):
            use_current_keys(metrics["recipe"], str(file))
        protocol, top = metrics["protocol"], int(metrics.get("top", TOP))
        {key: protocol[key] for key in (*_MUST_AGREE, *_MAY_DIFFER)}
        {key: float(metrics[key]) for key in METRICS}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: not a metrics file of this program ({error}): evaluate again"
        ) from None
    lists = path / lists_name(split, top)
    if not lists.is_file():
        raise ValueError(f"{lists}: no such file: evaluate again")
    return _Run(path, lists, metrics)


def _check_seeds(runs: list[_Run]) -> None:
    first = runs[0]
    seeds: dict[Any, Path] = {}
    for run in runs:
        recipe, theirs = run.metrics.get("recipe") or {}, first.metrics.get("recipe") or {}
        for key in ("system", *_MAY_DIFFER):
            ours, other = (
                (r.metrics.get(key), r.metrics["protocol"].get(key)) for r in (run, first)
            )
            if ours != other:
                raise ValueError(
                    f"{run.path}: not of one recipe with {first.path}: {key} differs; compare "
                    "them apart"
                )
        odd = next(
            (
                key
                for key in sorted({*recipe, *theirs} - _NOT_THE_RECIPE)
                if recipe.get(key) != theirs.get(key)
            ),
            None,
        )
        if odd is not None:
            raise ValueError(
                f"{run.path}: not of one recipe with {first.path}: {odd} differs; compare them "
                "apart"
            )
        seed = recipe.get("seed")
        if seed in seeds:
            raise ValueError(
                f"{run.path} and {seeds[seed]} both have seed {seed}: one run twice is not two "
                "seeds"
            )
        seeds[seed] = run.path


def _check_protocols(runs: list[_Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for key in _MUST_AGREE:
            ours, theirs = _protocol(first, key), _protocol(run, key)
            if ours != theirs:
                data = key in _OF_THE_DATA
                remedy = "on one data directory" if data else "under one protocol"
                raise ValueError(
                    f"{'different data: ' * data}{key} is {json.dumps(ours)} in {first.path} and "
                    f"{json.dumps(theirs)} in {run.path}: evaluate both {remedy}"
                )


def _protocol(run: _Run, key: str) -> Any:
    value = run.metrics["protocol"][key]
    # Lists that are the history itself do not leave it out.
    return False if key == "exclude_history" and value is None else value


def _read_ranks(runs: list[_Run]) -> np.ndarray:
    """uint8[S, U]: target ranks, 0 below place 20; all files are read side by side, and must name
    the same users."""
    parts: list[np.ndarray] = []
    with_columns = [_batches(run.lists) for run in runs]
    for number, batches in enumerate(itertools.zip_longest(*with_columns)):
        for run, batch in zip(runs, batches, strict=True):
            _check_same(runs[0], run, batches[0], batch, number * _USERS_AT_ONCE)
        ranks = np.stack([batch.column("rank").to_numpy() for batch in batches])
        parts.append(np.where(ranks > TOP, 0, ranks).astype(np.uint8))
    if not parts:
        raise ValueError(f"{runs[0].lists}: no users in it: evaluate again")
    return np.concatenate(parts, axis=1)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """`user`, `target` and `rank` of so many users at a time, each batch full but the last."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := {"user", "target", "rank"} - set(file.schema_arrow.names):
                raise ValueError(
                    f"{path}: no column {min(missing)}: it was written by an older version; "
                    "evaluate again"
                )
            yield from file.iter_batches(_USERS_AT_ONCE, columns=["user", "target", "rank"])
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, not a damaged page's
            raise
        raise ValueError(
            f"{path}: not readable as Parquet ({str(error).splitlines()[0]}): evaluate again"
        ) from None


def _check_same(
    first: _Run, run: _Run, ours: pa.RecordBatch | None, theirs: pa.RecordBatch | None, start: int
) -> None:
    if ours is None or theirs is None or len(ours) != len(theirs):
        counts = [pq.read_metadata(one.lists).num_rows for one in (first, run)]
        raise ValueError(
            f"different data: {counts[0]:,} users in {first.lists}, {counts[1]:,} in {run.lists}: "
            "evaluate both on one data directory"
        )
    for column in ("user", "target"):
        mine, others = ours.column(column), theirs.column(column)
        if not mine.equals(others):
            at = next(
                i
                for i, pair in enumerate(zip(mine.to_pylist(), others.to_pylist(), strict=True))
                if len({*pair}) > 1
            )
            raise ValueError(
                f"different data: {column} {mine[at].as_py()!r} in row {start + at} of "
                f"{first.lists}, {others[at].as_py()!r} in that of {run.lists}: evaluate both on "
                "one data directory"
            )


def _check_metrics(run: _Run, ranks_U: np.ndarray) -> None:
    """A metrics file that another evaluation left would name the wrong protocol."""
    found = metrics_from_histogram(rank_histogram(ranks_U))
    odd = next((key for key in METRICS if abs(found[key] - run.metrics[key]) > 1e-9), None)
    if odd is not None:
        raise ValueError(
            f"{run.path}: the lists give {odd} {found[odd]:.6f}, metrics say "
            f"{run.metrics[odd]:.6f}: evaluate again"
        )


def _side(path: Path, runs: list[_Run]) -> Side:
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


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")


def _p(value: float) -> str:
    return f"{value:.4f}".removeprefix("0") if value < 1 else "1"
