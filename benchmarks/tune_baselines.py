"""Tune kNN and SASRec by validation, in published spaces, and look at test once: what GenRec has to
beat.

    python benchmarks/tune_baselines.py data/beauty --system knn --tries 120 --json
    benchmarks/results/2026-11-21-baselines.json python benchmarks/tune_baselines.py data/beauty
    --system sasrec --minutes 90 --json benchmarks/results/2026-11-21-baselines.json python
    benchmarks/tune_baselines.py data/beauty --system sasrec --finish --seeds 0,1,2 --json
    benchmarks/results/...

Every try is a row of the file as soon as it has ended, failures included; a command that is given
again goes on behind the rows that are there, and a training that was cut off goes on from its last
epoch. Selection: NDCG@10 on validation, of kNN over all users, of SASRec over its 4,000 validation
users of seed 0, the same ones in every try."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline_search import KNN, SASREC, Search, best
from genrec_shards.atomic import atomic_file
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.histories import exclude_history_default

from genrec_dist.baselines import knn
from genrec_dist.baselines.run import run_baseline
from genrec_dist.baselines.sasrec_run import EVENTS, open_or_train
from genrec_dist.baselines.sasrec_train import Epoch
from genrec_dist.data.item_graph import KnnSettings
from genrec_dist.distributed.signals import NotFinite
from genrec_dist.evaluation.metrics import metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.provenance import git_commit

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")
CURVE = ("epoch", "seconds", "loss", "HR@10", "NDCG@10")
HOPELESS_AT, HOPELESS_BELOW = 10, 0.8
"""A training that has less than this share of what the best one had after so many epochs is ended
there."""


class Hopeless(Exception):
    """Ends a training that cannot win; its words say why."""


class OutOfTime(Exception):
    """Ends the search; the training goes on with the next command."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tune kNN and SASRec by validation and score the winner on test."
    )
    parser.add_argument("data", type=Path, help="a directory of genrec prepare")
    parser.add_argument("--system", choices=("knn", "sasrec"), required=True)
    parser.add_argument(
        "--json", type=Path, required=True, help="rows of all tries; gone on with where it is there"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/baselines"), help="where runs are kept"
    )
    parser.add_argument("--tries", type=int, default=120, help="how many settings at most")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="no epoch begins after so many minutes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--seeds", default="0", help="with --finish: seeds of the winner, as 0,1,2")
    parser.add_argument(
        "--finish", action="store_true", help="score the winner on test; knn does so at the end"
    )
    asked = parser.parse_args()
    tuning = Tuning(load_dataset(asked.data), asked)
    if not asked.finish:
        tuning.search()
    if asked.finish or (asked.system == "knn" and tuning.done >= asked.tries):
        tuning.finish([int(seed) for seed in asked.seeds.split(",")])
    print(tuning.table())


class Tuning:
    """The search of one system on one data set, as it stands in the file."""

    def __init__(self, dataset: Dataset, asked: argparse.Namespace):
        self.dataset, self.asked = dataset, asked
        self.system: str = asked.system
        self.of: Search = {"knn": KNN, "sasrec": SASREC}[self.system]
        self.key = f"{dataset.info.source.name.split('.')[0]} {self.system}"
        self.exclude_history = exclude_history_default(dataset.sequences)
        self.started = time.monotonic()
        with self.section() as section:
            for name, value in {**self.of.as_dict(), "seed": asked.seed}.items():
                if section.setdefault(name, value) != value:
                    raise SystemExit(
                        f"{asked.json}: {self.key} was searched with another {name}: choose another --json"
                    )
            section.setdefault("selection", self.selection())
            section.setdefault("tries", [])
            self.tries: list[dict[str, Any]] = section["tries"]

    @property
    def done(self) -> int:
        return len(self.tries)

    def selection(self) -> str:
        users = "all users" if self.system == "knn" else "the 4,000 validation users of seed 0"
        return f"highest NDCG@10 on validation over {users}; history {'excluded' if self.exclude_history else 'not excluded'}"

    def search(self) -> None:
        run = self.try_knn if self.system == "knn" else self.try_sasrec
        while self.done < self.asked.tries and self.time_left() > 0:
            number = self.done
            settings = self.of.settings(number, self.asked.seed, self.tries)
            try:
                row = {"number": number, "settings": settings, **run(number, settings)}
            except OutOfTime:
                print(f"{self.key}: out of time in try {number}; the same command goes on with it")
                return
            self.tries.append(row)
            with self.section() as section:
                section["tries"] = self.tries
            print(
                f"{self.key} {number}: {row['score']} {settings} {row['ended']} {row['seconds']} s",
                flush=True,
            )

    def time_left(self) -> float:
        return self.asked.minutes * 60 - (time.monotonic() - self.started)

    def try_knn(self, number: int, settings: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        rule = knn.fit(
            self.dataset.sequences,
            "validation",
            exclude_history=self.exclude_history,
            settings=KnnSettings(**settings),
        )
        view = self.dataset.sequences.history_and_target("validation")
        ranks = rule(view.users).ranks(view.targets[view.users])
        metrics = metrics_from_histogram(rank_histogram(ranks))
        return {
            "score": metrics["NDCG@10"],
            "validation": {name: metrics[name] for name in METRICS},
            "ended": "finished",
            "seconds": round(time.perf_counter() - start, 1),
        }

    def try_sasrec(self, number: int, settings: dict[str, Any]) -> dict[str, Any]:
        run = self.run_of(number)

        def watch(epoch: Epoch) -> None:
            self.check_hope(epoch)
            if self.time_left() < 0:
                raise OutOfTime

        ended, failed = "finished", False
        try:
            self.train(run, settings, watch)
        except (Hopeless, NotFinite) as error:
            ended, failed = str(error), isinstance(error, NotFinite)
        curve = curve_of(run)
        top = max((row for row in curve), key=lambda row: row[-1], default=None)
        return {
            "score": top[-1] if top and not failed else None,
            "validation": scores_of(run, top[0]) if top else None,
            "best_epoch": top[0] if top else None,
            "ended": ended,
            "seconds": curve[-1][1] if curve else None,
            "curve": curve,
        }

    def check_hope(self, epoch: Epoch) -> None:
        leader = best(self.tries)
        if leader is None or epoch.epoch != HOPELESS_AT or len(leader["curve"]) < HOPELESS_AT:
            return
        theirs = leader["curve"][HOPELESS_AT - 1][-1]
        if epoch.scores["NDCG@10"] < HOPELESS_BELOW * theirs:
            raise Hopeless(
                f"ended after {HOPELESS_AT} epochs: below {HOPELESS_BELOW} of the best try's {theirs:.4f} there"
            )

    def train(self, run: Path, settings: dict[str, Any], watch: Callable[[Epoch], None]) -> None:
        open_or_train(
            run, self.dataset, "validation", exclude_history=self.exclude_history, overrides=as_overrides(settings),
            on_epoch=watch,
        )  # fmt: skip

    def finish(self, seeds: list[int]) -> None:
        """The winner, and no other, on test; of SASRec with each of the seeds."""
        winner = best(self.tries)
        if winner is None:
            raise SystemExit(f"{self.key}: no try has ended well")
        rows = []
        for seed in seeds if self.system == "sasrec" else [0]:
            settings, run = dict(winner["settings"]), self.run_of(winner["number"])
            if seed:
                settings, run = {**settings, "seed": seed}, run.with_name(f"{run.name}-seed{seed}")
            scores = {
                split: run_baseline(
                    self.system, self.dataset, split, run, settings=as_overrides(settings), exclude_history=self.exclude_history
                )
                for split in ("validation", "test")
            }  # fmt: skip
            rows.append(
                {
                    "seed": seed,
                    **{
                        split: {name: found[name] for name in METRICS}
                        for split, found in scores.items()
                    },
                    "test_ci95": {name: scores["test"]["ci95"][name] for name in METRICS},
                }
            )
            print(self.key, "seed", seed, rows[-1]["validation"], rows[-1]["test"], flush=True)
            with self.section() as section:
                section["winner"] = {
                    "number": winner["number"],
                    "settings": winner["settings"],
                    "all_users": rows,
                }

    def run_of(self, number: int) -> Path:
        return Path(self.asked.runs) / f"{self.key.replace(' ', '-').lower()}-t{number:03}"

    @contextlib.contextmanager
    def section(self) -> Iterator[dict[str, Any]]:
        """This search's part of the file, written back at the end; two searches may write to one
        file."""
        path: Path = self.asked.json
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else new_file()
            yield held["searches"].setdefault(self.key, {})
            with atomic_file(path) as temporary:
                temporary.write_text(dumped(held), encoding="utf-8")
        finally:
            os.close(folder)

    def table(self) -> str:
        ranked = sorted(
            (row for row in self.tries if row["score"] is not None), key=lambda row: -row["score"]
        )
        lines = [f"{self.key}: {self.done} tries, by NDCG@10 on validation"]
        for row in ranked[:15]:
            figures = " ".join(f"{row['validation'][name]:.4f}" for name in METRICS)
            lines.append(f"  {row['number']:3}  {figures}  {row['settings']}")
        return "\n".join(lines)


def as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def curve_of(run: Path) -> list[list[float]]:
    return [[event[key] for key in CURVE] for event in epochs_of(run)]


def scores_of(run: Path, epoch: int) -> dict[str, float]:
    event = next(event for event in epochs_of(run) if event["epoch"] == epoch)
    return {name: event[name] for name in METRICS}


def epochs_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / EVENTS).read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "epoch"]


def new_file() -> dict[str, Any]:
    return {
        "name": "baselines",
        "protocol": "trained_through n-2, codes of genrec prepare --numbering random (neither system reads codes)",
        "curve": list(CURVE),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; seconds are wall time beside other work",
        "git": git_commit(),
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "searches": {},
    }


def dumped(held: dict[str, Any]) -> str:
    """Indented, but lists of numbers, as an epoch of a curve, stay in one line."""
    text = json.dumps(held, indent=1, allow_nan=False)
    return (
        re.sub(r"\[\s+([-+\d.e,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        + "\n"
    )


if __name__ == "__main__":
    main()
