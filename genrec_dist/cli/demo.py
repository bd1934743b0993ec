"""The demo: the whole path on a synthetic catalogue, beside baselines and a ceiling that nobody can
pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.atomic import atomic_directory, write_json
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import Process, make_process
from rich.console import Console
from rich.table import Table

from genrec_dist.baselines.leak_audit import write_audit
from genrec_dist.config.load import load_recipe
from genrec_dist.evaluation.metrics import (
    bootstrap_ci95,
    metrics_from_histogram,
    rank_histogram,
    target_ranks,
)
from genrec_dist.evaluation.table import BOUND, format_table
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import best_device, load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.report.run_report import write_report
from genrec_dist.training.run import train

USERS, SHORTEST, LONGEST = 6000, 8, 20
SHARE_OF_CEILING = 0.8
"""Share of the oracle's NDCG@10 that the demo promises, and a test asserts."""
MARKER = "demo.json"
"""Shows that a directory is a demo's and may be replaced."""


def run_demo(out: Path, overrides: list[str], console: Console) -> None:
    """Make data, train, evaluate, compare, and print the closing table. `out` is replaced if it
    holds an older demo.

    Raises ValueError if `out` holds something else.
    """
    with atomic_directory(out, overwrite=True, marker=MARKER) as folder:
        (folder / MARKER).write_text("{}", encoding="utf-8")
    process = make_process()
    dataset = _make_data(process, out)
    console.print(_introduction(dataset), highlight=False, soft_wrap=True)
    recipe = load_recipe("demo", [f"data={out / 'data'}", f"run={out}", *overrides])
    train(recipe)
    metrics = evaluate(
        load_run(out, best_device()),
        dataset,
        "test",
        decoding=Decoding(beam=recipe.validation.beam),
        recipe=recipe.as_dict(),
    )
    assert metrics is not None
    ceiling = score_ceiling(process, dataset)
    metrics["beside"]["ceiling"] = ceiling
    write_json(out / "metrics-test.json", metrics)
    page = write_report(out)
    console.print(closing_table(metrics))
    console.print(conclusion(metrics), highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def _make_data(process: Process, out: Path) -> Dataset:
    source = out / "sequences.txt.gz"
    write_sequences(process.sample(USERS, SHORTEST, LONGEST), source)
    dataset = prepare(source, out / "data", numbering="random")
    write_audit(dataset)
    # Small tars, so that the demo really reads from several.
    write_shards(dataset, out / "data" / "shards", users_per_shard=2048)
    return dataset


def _introduction(dataset: Dataset) -> str:
    return (
        f"{dataset.sequences.num_users:,} users take {dataset.sequences.num_interactions:,} of "
        f"{dataset.sequences.num_items:,} synthetic items; the next item depends on the last two "
        "together, and on noise."
    )


def score_ceiling(process: Process, dataset: Dataset) -> dict[str, Any]:
    """Metrics of the Bayes oracle, which knows the process: in expectation no system can score
    higher."""
    lists_UN = process.oracle_lists(dataset.sequences, "test")
    targets_U = dataset.sequences.history_and_target("test").targets
    hist = rank_histogram(target_ranks(lists_UN, targets_U))
    return {**metrics_from_histogram(hist), "ci95": bootstrap_ci95(hist)}


def closing_table(metrics: dict[str, Any]) -> Table:
    """The ceiling, GenRec, kNN and popularity, the best first."""
    beside = metrics["beside"]
    rows = [
        {"system": "ceiling (Bayes oracle)", BOUND: True, **beside["ceiling"]},
        {"system": "GenRec", **_scores(metrics)},
    ]
    rows += [
        {"system": name, **beside[key]}
        for key, name in (("knn", "co-occurrence kNN"), ("popularity", "popularity"))
    ]
    return format_table(rows)


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in ("system", "beside")}


def share_of_ceiling(metrics: dict[str, Any], key: str = "NDCG@10") -> float:
    return float(np.divide(metrics[key], metrics["beside"]["ceiling"][key]))


def conclusion(metrics: dict[str, Any]) -> str:
    knn = metrics["beside"]["knn"]["NDCG@10"]
    return (
        f"GenRec reaches {share_of_ceiling(metrics):.0%} of the ceiling's NDCG@10; co-occurrence "
        "kNN, which only counts "
        f"pairs, {knn / metrics['beside']['ceiling']['NDCG@10']:.0%}."
    )
