"""A split by time from the log to the lists, through the real commands: users with a target are
ranked once, and nobody else."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.splits import Split
from genrec_shards.timestamps import moment
from logs import DATES, Row, dated_rows, write_csv
from run_events import events
from two_ranks import environment, start_each

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.estimate.forecast import read_catalogue
from genrec_dist.evaluation.metrics import WEIGHTS, metrics_from_histogram, rank_histogram
from genrec_dist.inference.export_lists import recommend_all
from genrec_dist.inference.load import load_run
from genrec_dist.inference.recommend import Recommender
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints
from genrec_dist.training.setup import describe

RECIPE = """
workers: 0
log_every: 1
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32, max_tokens: 64,
        init_std: 0.3, item_loss: 1.0}
tokens: {vocab_size: 320}
pretrain: {epochs: 1, batch_size: 16}
finetune: {epochs: 2, batch_size: 40, learning_rate: 3.0e-3, targets: every-prefix}
validation: {users: 20, patience: 0}
"""
FIRST = [moment(date, "") // 1_000_000 for date in DATES.split(",")]


@dataclass(frozen=True)
class World:
    """One log, prepared, cut into shards and trained on."""

    rows: list[Row]
    data: Path
    run: Path
    log: Path

    @property
    def dataset(self) -> Dataset:
        return load_dataset(self.data)

    def targets(self, split: Split) -> dict[str, tuple[list[str], str]]:
        """User -> (history, target), the plain way, of those who have a target; in the order of
        ids."""
        dataset = self.dataset
        items, first = set(dataset.sequences.item_ids), FIRST[split == "test"]
        end = FIRST[1] if split == "validation" else FIRST[1] + 10**15
        found = {}
        for user in dataset.sequences.user_ids:
            seen = sorted(
                (time, item) for who, item, time in self.rows if who == user and item in items
            )
            later = [item for time, item in seen if first <= time < end]
            if later:
                found[user] = ([item for time, item in seen if time < first], later[0])
        return found


def made(folder: Path, held_out_seed: int) -> World:
    folder.mkdir(parents=True)
    rows = dated_rows(held_out_seed, num_items=30)
    write_csv(folder / "log.csv", rows)
    data, run, recipe = folder / "data", folder / "run", folder / "recipe.yaml"
    dates = ["--split", "global-time", "--cutoff", DATES, "--k-core", "3"]
    assert run_command(["prepare", str(folder / "log.csv"), "--out", str(data), *dates]) == 0
    assert run_command(["shard", str(data), "--users-per-shard", "1024"]) == 0
    recipe.write_text(f"data: {data}\nrun: {run}\n{RECIPE}", encoding="utf-8")
    assert run_command(["train", str(recipe)]) == 0
    return World(rows, data, run, folder / "log.csv")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("by-time") / "one", 0)


@pytest.fixture(scope="module")
def other_future(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Of the same first half of the year, and another second one."""
    return made(tmp_path_factory.mktemp("by-time") / "other", 1)


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints")))


def results(folder: Path, split: Split) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics = json.loads((folder / f"metrics-{split}.json").read_text(encoding="utf-8"))
    return metrics, pq.read_table(folder / f"top20-{split}.parquet").to_pylist()


def check_results(world: World, folder: Path, split: Split) -> dict[str, Any]:
    """Each user with a target once, in order, with that target after the right history; figures are
    those of the lists."""
    metrics, lists = results(folder, split)
    wanted = world.targets(split)
    assert [(row["user"], row["target"]) for row in lists] == [
        (user, target) for user, (_, target) in wanted.items()
    ]
    assert metrics["users"] == len(wanted) < world.dataset.sequences.num_users
    assert metrics["protocol"]["split"] == f"global-time {DATES}"
    exact = metrics_from_histogram(rank_histogram(np.array([row["rank"] for row in lists])))
    assert {name: metrics[name] for name in WEIGHTS} == exact
    found = metrics["breakdown"]["history_length"]
    lengths = [len(history) for history, _ in wanted.values()]
    assert found["1-2"]["users"] == sum(length <= 2 for length in lengths)
    assert found["6-10"]["users"] == sum(6 <= length <= 10 for length in lengths)
    if metrics["protocol"]["exclude_history"]:
        assert not any(set(row["items"]) & set(wanted[row["user"]][0]) for row in lists)
    return metrics


def test_the_same_training_period_trains_the_same_model(world: World, other_future: World) -> None:
    """To the bit, whatever is taken later: no held-out row is seen, counted or numbered."""
    assert (
        world.dataset.sequences.num_interactions != other_future.dataset.sequences.num_interactions
    )
    steps, others = (
        [
            (step["loss"], step["samples"], step["samples_digest"])
            for step in events(one.run, "step")
        ]
        for one in (world, other_future)
    )
    assert len(steps) > 5
    assert steps == others
    weights, same = (
        Checkpoint(list_checkpoints(one.run)[-1], {}, Ranks()).weights()
        for one in (world, other_future)
    )
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert {event["users"] for event in events(world.run, "validation")} == {20}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_ranks_each_user_with_a_target_once(world: World, split: Split) -> None:
    assert run_command(["evaluate", str(world.run), "--split", split, "--batch-size", "7"]) == 0
    metrics = check_results(world, world.run, split)
    _, lists = results(world.run, split)
    for row in lists:
        listed = {item: place for place, item in enumerate(row["items"], start=1)}
        assert row["rank"] == listed.get(row["target"], 0)
    assert metrics["protocol"]["trained_through"] == "n-2"


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("popularity", []), ("counting", []), ("repeat", []), ("knn", []), ("sasrec", ["epochs=2"]),
        ("sasrec+knn", ["sasrec.epochs=2", "knn.window=3"]),
    ],
)  # fmt: skip
def test_baselines_rank_the_same_users(
    world: World, tmp_path: Path, name: str, options: list[str], split: Split
) -> None:
    more = [text for option in options for text in ("--set", option)]
    command = ["baseline", name, str(world.data), "--out", str(tmp_path), "--split", split]
    assert run_command([*command, *more]) == 0
    metrics = check_results(world, tmp_path, split)
    if name == "popularity":
        excluded = metrics["protocol"]["exclude_history"]
        assert [row["rank"] for row in results(tmp_path, split)[1]] == popularity_ranks(
            world, split, excluded
        )


def popularity_ranks(world: World, split: Split, excluded: bool) -> list[int]:
    """By counting rows before July; items that tie with the target rank above it."""
    sequences = world.dataset.sequences
    users, taken = set(sequences.user_ids), dict.fromkeys(sequences.item_ids, 0)
    for user, item, time in world.rows:
        if time < FIRST[0] and user in users and item in taken:
            taken[item] += 1
    ranks = []
    for history, target in world.targets(split).values():
        rivals = set(taken) - (set(history) if excluded else set())
        place = sum(taken[item] >= taken[target] for item in rivals)
        ranks.append(place if target in rivals and place <= 20 else 0)
    return ranks


def test_weights_of_the_mixture_are_chosen_on_users_with_a_target(
    world: World, tmp_path: Path
) -> None:
    run = copied(world.run, tmp_path / "run")
    hybrid = ["evaluate", str(run), "--split", "validation", "--decode", "hybrid"]
    assert run_command([*hybrid, "--tune-weights"]) == 0
    chosen = json.loads((run / "hybrid.json").read_text(encoding="utf-8"))
    assert chosen["users"] == len(world.targets("validation"))
    assert run_command(hybrid) == 0
    assert check_results(world, run, "validation")["NDCG@10"] == pytest.approx(
        chosen["validation"]["NDCG@10"]
    )


@pytest.mark.dist
@pytest.mark.ranks
def test_two_ranks_write_the_same_lists(world: World, tmp_path: Path) -> None:
    one, two = (copied(world.run, tmp_path / name) for name in ("one", "two"))
    command = ["-m", "genrec_dist.cli", "evaluate", "--batch-size", "5"]
    alone = forked.run([*command, one], environment(), timeout=300)
    assert alone.returncode == 0, alone
    done = start_each([*command, two], tmp_path / "logs", timeout=300)
    assert not any(rank.returncode for rank in done), done
    assert (one / "top20-test.parquet").read_bytes() == (two / "top20-test.parquet").read_bytes()
    check_results(world, two, "test")


def test_recommend_uses_the_whole_history_of_everyone(world: World, tmp_path: Path) -> None:
    sequences = world.dataset.sequences
    path = recommend_all(
        Recommender(load_run(world.run), exclude_history=True), world.dataset, tmp_path
    )
    assert path is not None
    lists = pq.read_table(path).to_pylist()
    assert [row["user"] for row in lists] == sequences.user_ids
    items = set(sequences.item_ids)
    for row in lists:
        taken = {item for user, item, _ in world.rows if user == row["user"] and item in items}
        assert not taken & set(row["items"])
        assert len(row["items"]) == min(20, len(items) - len(taken))


def test_plans_count_what_the_periods_leave(world: World, tmp_path: Path) -> None:
    periods = world.dataset.sequences.periods
    assert periods is not None
    for through in ("n-2", "n-1"):
        settings = [f"data={world.data}", f"run={tmp_path}", f"trained_through={through}"]
        recipe = load_recipe(world.data.parent / "recipe.yaml", settings)
        lengths = periods.lengths(through)
        assert describe(recipe)["stages"]["finetune"]["samples"] == (lengths - 1).sum()
        assert read_catalogue(recipe, None, None).training_items.tolist() == lengths.tolist()
    assert (periods.training_U < periods.known_U).any()


def test_two_splits_are_not_compared(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = {
        "leave-one-out": [],
        "later": ["--split", "global-time", "--cutoff", "2014-07-01,2014-11-01"],
    }
    by_time = str(tmp_path / "by-time")
    assert run_command(["baseline", "popularity", str(world.data), "--out", by_time]) == 0
    for name, options in cuts.items():
        data, out = tmp_path / name / "data", tmp_path / name / "popularity"
        command = ["prepare", str(world.log), "--out", str(data), "--k-core", "3", *options]
        assert run_command(command) == 0
        assert run_command(["baseline", "popularity", str(data), "--out", str(out)]) == 0
        capsys.readouterr()
        assert run_command(["compare", str(tmp_path / "by-time"), str(out)]) == 1
        assert f'split is "global-time {DATES}" in' in capsys.readouterr().err


def test_the_command_says_what_was_cut(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--split", "global-time", "--cutoff", DATES, "--k-core", "3"]
    assert run_command(["prepare", str(world.log), "--out", str(tmp_path / "data"), *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    info = world.dataset.info
    assert info.global_time is not None
    assert "trained before 2014-07-01, validated before 2014-10-01, tested from there on" in said
    assert f"{info.global_time.users_without_history} users without history left out" in said
    for reason, words in (
        ("rows_of_users_without_history", "of users without history"),
        ("rows_of_items_outside_the_catalogue", "of items outside the catalogue"),
    ):
        assert f"{info.dropped[reason]} held-out rows {words}" in said
