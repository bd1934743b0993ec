"""What does a refreshed model score beside one that starts over, on the same longer data?

`OMP_NUM_THREADS=1 python benchmarks/refresh.py Beauty.txt.gz [--users N] [--json FILE]`. The log is
cut in two: the older part holds nine of ten users without their last two items, the newer part all
the rest, so that new items are those that come there alone. A model is trained on the older part
(recipe `best`), the data grow, and models that begin with it and models that start over are trained
on them; all are scored on the test items of all users of the longer data."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.append import append
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences, read_sequences
from genrec_shards.splits import MINIMUM_LENGTH
from genrec_shards.storage.write import write_shards

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.metrics import metrics_from_histogram
from genrec_dist.evaluation.provenance import git_commit, hardware, versions
from genrec_dist.inference.load import LoadedRun, load_run, make_searcher
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.validation import target_histogram
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

HELD_BACK = 2
"""Items of each old user that are new."""


def cut(sequences: Sequences, num_users: int, folder: Path) -> None:
    """Write `old.txt` and `new.txt` of a seeded sample of users."""
    dice = random.Random(0)
    users = sorted(dice.sample(range(sequences.num_users), min(num_users, sequences.num_users)))
    old, new = [], []
    for user in users:
        items = [
            sequences.item_ids[row]
            for row in sequences.items[slice(*sequences.offsets[user : user + 2])]
        ]
        kept = 0 if dice.random() < 0.1 else len(items) - HELD_BACK
        kept = kept if kept >= MINIMUM_LENGTH else 0
        id_ = sequences.user_ids[user]
        old += [" ".join([id_, *items[:kept]])] if kept else []
        new.append(" ".join([id_, *items[kept:]]))
    (folder / "old.txt").write_text("\n".join(old) + "\n", encoding="utf-8")
    (folder / "new.txt").write_text("\n".join(new) + "\n", encoding="utf-8")


def scores(loaded: LoadedRun, data: Path, num_old_items: int) -> dict[str, float]:
    """On the test items: of all users, and of those whose item is an old one and a new one."""
    view = load_dataset(data).sequences.history_and_target("test")
    is_new = view.targets >= num_old_items
    found = {}
    for name, asked in (
        ("all", np.ones_like(is_new)),
        ("old items", ~is_new),
        ("new items", is_new),
    ):
        decoding = Decoding(exclude_history=loaded.model.config.exclude_history)
        histogram = target_histogram(
            loaded.searcher, loaded.layout, view, np.flatnonzero(asked), decoding, Ranks()
        )
        metrics = metrics_from_histogram(histogram)
        found |= {f"{name}: users": int(asked.sum())} | {
            f"{name}: {key}": metrics[key] for key in ("HR@10", "NDCG@10")
        }
    return found


def before_any_step(recipe: Recipe) -> LoadedRun:
    """The model that a run begins with."""
    assert recipe.init_from is not None
    origin = load_run(recipe.init_from)
    setup, model = build_setup(recipe)
    model.config.exclude_history = origin.model.config.exclude_history
    searcher = make_searcher(model.eval(), setup.words, torch.device("cpu"))
    return replace(origin, model=model, words=setup.words, layout=setup.layout, searcher=searcher)


def measure(source: Path, num_users: int, folder: Path) -> dict[str, Any]:
    cut(read_sequences(source), num_users, folder)
    old = prepare(folder / "old.txt", folder / "old")
    longer = append(folder / "new.txt", folder / "old", folder / "longer")
    for dataset in (old, longer):
        write_shards(dataset, dataset.path / "shards")

    def recipe(data: str, run: str, epochs: int, *more: str) -> Recipe:
        sets = [
            f"data={folder / data}",
            f"run={folder / run}",
            f"finetune.epochs={epochs}",
            "validation.users=1000",
        ]
        return load_recipe("best", [*sets, *more])

    begin = f"init_from={folder / 'origin'}"
    train(recipe("old", "origin", 6))
    plans = {
        "refreshed, 1 epoch": recipe("longer", "refreshed-1", 1, begin),
        "refreshed, 2 epochs": recipe("longer", "refreshed-2", 2, begin),
        "refreshed at a third of the rate, 1 epoch": recipe(
            "longer", "refreshed-low", 1, begin, "finetune.learning_rate=5e-4"
        ),
        "starts over, 1 epoch": recipe("longer", "anew-1", 1),
        "starts over, 2 epochs": recipe("longer", "anew-2", 2),
        "starts over, 6 epochs": recipe("longer", "anew-6", 6),
    }
    rows = {
        "before any step": scores(
            before_any_step(plans["refreshed, 1 epoch"]), longer.path, old.info.items
        )
    }
    for name, plan in plans.items():
        started = time.monotonic()
        run = train(plan)
        seconds = time.monotonic() - started
        rows[name] = {"seconds": seconds} | scores(load_run(run), longer.path, old.info.items)
    sizes = {
        kind: {"old": getattr(old.info, kind), "longer": getattr(longer.info, kind)}
        for kind in ("users", "items", "interactions")
    }
    return {"name": "refresh", "log": source.name, **sizes, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a log in the sequences format")
    parser.add_argument("--users", type=int, default=6000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.source, options.users, Path(folder))
    found |= {"hardware": hardware(), "versions": versions(), "git": git_commit()}
    for name, row in found["rows"].items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
