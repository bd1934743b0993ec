"""`genrec plan`: what fits where, and the advice."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from places import ROOT
from rich.console import Console

from genrec_dist.bench.measure import torch_threads
from genrec_dist.bench.plan import CASES, measure_plan
from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.estimate import advice as advice_module
from genrec_dist.estimate import forecast as forecast_module
from genrec_dist.estimate.advice import advise
from genrec_dist.estimate.forecast import Forecast, forecast
from genrec_dist.estimate.forecast_table import as_dict, render
from genrec_dist.estimate.memory.activations import activation_bytes, compute_of
from genrec_dist.estimate.memory.fit import GIB, RESERVE_GIB
from genrec_dist.estimate.memory.state import METHODS
from genrec_dist.estimate.samples import (
    ASSUMED_ITEM_TOKENS,
    Catalogue,
    read_catalogue,
    stage_samples,
)
from genrec_dist.estimate.sizes import build_config

BEAUTY: dict[str, Any] = {"users": 22_363, "items": 12_101}
LAUNCH = ROOT / "launch"


def plan_of(name: str = "paper-base", *overrides: str, **options: Any) -> Forecast:
    return forecast(load_recipe(name, list(overrides)), **{**BEAUTY, **options})


def test_plan_without_data_says_that_it_assumes_no_texts() -> None:
    assert plan_of("auto").catalogue.source.endswith("; items without texts assumed")
    assert "texts" not in plan_of("best").catalogue.source


@pytest.mark.parametrize("recipe", ["paper-base", "paper-large"])
def test_the_table_of_the_page_is_what_plan_says(recipe: str) -> None:
    """docs/scale.md: state in GiB and largest micro-batch of each way to spread the weights."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    table = page.partition("| | base fp32, 1 GPU")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()[2:]]
    assert len(cells) == len(METHODS)
    columns = {
        "paper-base": {("fp32", 1): 0, ("bf16", 1): 1, ("fp32", 8): 4},
        "paper-large": {("fp32", 1): 2, ("bf16", 1): 3, ("fp32", 8): 5},
    }[recipe]
    for (precision, gpus), column in columns.items():
        options: dict[str, Any] = {"gpus": gpus, "memory_gib": 24, "zero_files": LAUNCH}
        fits = plan_of(recipe, f"precision={precision}", **options).fits
        found = [f"{fit.state.total / GIB:.2f} / {fit.largest:,}" for fit in fits]
        assert [row[column] for row in cells] == found


@pytest.mark.parametrize(
    ("name", "parameters"), [("paper-base", 165_890_304), ("paper-large", 441_584_640)]
)
def test_plan_of_the_papers_recipes_on_24_gib(
    name: str, parameters: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command's figures for Beauty's sizes; the largest micro-batch fits and the next does
    not."""
    words = f"plan {name} --gpus 1 --memory 24 --users 22363 --items 12101".split()
    path = tmp_path / "plan.json"
    assert run_command([*words, "--launch", str(LAUNCH), "--json", str(path)]) == 0
    assert "Use one process without ZeRO" in capfd.readouterr().out
    written = json.loads(path.read_text())
    ddp = written["methods"][0]
    assert [each["method"] for each in written["methods"]] == list(METHODS)
    assert written["parameters"] == parameters
    assert ddp["state"]["total"] == 16 * parameters  # weights, gradients, two moments
    plan = plan_of(name)
    config = build_config(plan.recipe, **BEAUTY)

    def peak(tokens: int) -> int:
        found = [
            activation_bytes(config, plan.sizes, each.micro_batch(tokens // n, n), "fp32").total
            for each in plan.samples
            for n in map(int, each.lengths)
        ]
        return ddp["state"]["total"] + max(found)

    largest = ddp["largest_micro_batch_tokens"]
    assert peak(largest) <= (24 - RESERVE_GIB) * GIB < peak(largest + 256)


def test_a_narrow_terminal_gets_every_figure_in_two_tables() -> None:
    plan = plan_of()

    def cells(width: int) -> list[str]:
        console = Console(file=io.StringIO(), width=width, record=True)
        console.print(render(plan, width))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)
        rows = [line.replace("│", " ").split() for line in lines]
        return sorted(cell for row in rows if row[:1] in (["DDP"], ["ZeRO"]) for cell in row[1:])

    names = ["0", "1", "2", "3", "2", "+", "offload", "3", "+", "offload"]  # of ZeRO, again
    assert cells(80) == sorted([*cells(120), *names])
    assert len(cells(120)) == 7 * 10 + len(names)


def test_advice_names_the_fastest_method_that_fits() -> None:
    """A range of cards: first nothing fits, then slower methods, last DDP."""
    found = []
    for memory in (2.6, 3.4, 4.2, 5.5):
        options: dict[str, Any] = {"gpus": 8, "memory_gib": memory, "zero_files": LAUNCH}
        plan = plan_of("paper-base", "micro_batch_tokens=512", **options)
        fits = {fit.method for fit in plan.fits if fit.fits(plan.limit)}
        found.append(
            next((n for n, method in enumerate(forecast_module.BY_COST) if method in fits), 9)
        )
        expected = "Nothing fits"
        if found[-1] == 0:
            expected = "Use DDP, ZeRO is slower here"
        elif found[-1] != 9:
            name = advice_module.NAMES[forecast_module.BY_COST[found[-1]]]
            expected = f"use {name}, the fastest method that fits"
        assert expected in advise(plan)[0]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0
    assert len(set(found)) >= 3
    advice = " ".join(advise(plan_of(gpus=8)))
    assert "2.7 GB" in advice
    assert "A rank's share of a step" in advice


def test_advice_lowers_what_is_too_large() -> None:
    sets = ("finetune.batch_size=4096", "micro_batch_tokens=400000")
    plan = plan_of("paper-base", *sets)
    assert not plan.fits[0].fits(plan.limit)
    largest = plan.fits[0].largest
    assert f"Lower micro_batch_tokens to {largest:,} with DDP" in " ".join(advise(plan))
    lowered = plan_of("paper-base", sets[0], f"micro_batch_tokens={largest}")
    assert lowered.fits[0].fits(lowered.limit)
    advice = " ".join(advise(plan_of("paper-large", memory_gib=1.6)))
    assert "Nothing fits" in advice
    assert "Not one longest sample fits. Lower model.max_tokens" in advice
    assert "precision, to bf16" in advice


def test_large_id_tables_are_named_and_outside_they_are_not_state() -> None:
    many: dict[str, Any] = {"users": 3_000_000, "items": 500_000, "gpus": 4}
    inside = plan_of("tiny", "model.user_ids=true", **many)
    assert "row-adagrad" in " ".join(advise(inside))
    outside = plan_of("tiny", "model.user_ids=true", "optimizer.id_tables=row-adagrad", **many)
    assert "row-adagrad" not in " ".join(advise(outside))
    ids = 3_500_000 * 128
    assert inside.sizes.ids == ids + 2 * 128
    assert inside.fits[0].state.total - outside.fits[0].state.total > 16 * ids - ids * 1.1
    narrow = plan_of("tiny", "model.user_ids=true", "model.id_dim=32", **many)
    assert narrow.sizes.ids == (3_500_000 + 2) * 32


def test_lengths_come_from_the_data(tiny_data: Path) -> None:
    """120 users of 4 to 64 items, tokenised by the run's own vocabulary."""
    sets = [f"data={tiny_data}", "run=x", "tokens.vocab_size=4096", "pretrain.epochs=1"]
    recipe = load_recipe("tiny", sets)
    catalogue = read_catalogue(recipe, None, None)
    assert (catalogue.users, catalogue.items) == (120, 64)
    pretrain, finetune = stage_samples(recipe, catalogue)
    # One token per item and no user: <s>, the items, one of them a mask, </s>.
    counts = [int(n) for n in catalogue.training_items]
    assert pretrain.lengths.tolist() == sorted(min(n + 2, 50) for n in counts)
    prefixes = sorted(min(k + 3, 50) for n in counts for k in range(1, n))
    assert finetune.lengths.tolist() == prefixes
    assert (finetune.target_tokens, finetune.epoch_samples) == (2, len(prefixes))
    part = stage_samples(load_recipe("tiny", [*sets, "finetune.epoch_fraction=0.25"]), catalogue)
    assert part[1].epoch_samples == round(len(prefixes) / 4)


def test_time_is_estimated_only_from_a_stated_speed() -> None:
    plan = plan_of()
    assert not plan.duration
    given = plan_of(tflops=10.0, gpus=2).duration["finetune"]
    flops = plan.step_flops["finetune"] / 16 * 22_363
    # Padding takes time too.
    assert 1 < given.epoch_seconds / (flops / 2e13) < 2.2
    assert given.total_seconds == pytest.approx(25 * given.epoch_seconds)
    assert given.step.bound == "arithmetic"
    small = plan_of("paper-base", "precision=bf16", card="H200").duration["finetune"]
    assert "assumed" in small.assumption
    assert small.step.bound == "host"
    assert small.step.seconds > 3 * small.step.parts["arithmetic"]


def test_a_large_step_is_bound_by_its_products_and_a_small_one_by_the_host() -> None:
    sets = ("finetune.batch_size=2048", "micro_batch_tokens=65536", "precision=bf16")
    large = plan_of("paper-base", *sets, card="RTX 3090").duration["finetune"].step
    assert large.bound in ("arithmetic", "memory")
    small = plan_of("paper-base", "precision=bf16", card="H200").duration["finetune"].step
    assert small.bound == "host"
    # As many launches for sixteen samples as for two thousand.
    assert small.launches == pytest.approx(large.launches / large.micro_batches, rel=0.05)
    assert small.micro_batches == 1


def test_long_targets_of_all_prefixes_are_sequences_of_their_own() -> None:
    """One for each item that does not fit, or a shared one for half a window's items."""
    catalogue = Catalogue(1, 100, np.array([60]), "one user")
    for windows in ("own", "shared"):
        recipe = load_recipe("best", [f"finetune.windows={windows}", "model.max_tokens=201"])
        (found,) = stage_samples(recipe, catalogue)
        tokens = 2 + 1 + 59 * ASSUMED_ITEM_TOKENS
        assert (found.lengths.tolist(), tokens) == ([201], 239)
        beyond = math.ceil((tokens - 201) / ASSUMED_ITEM_TOKENS)
        assert found.windows.tolist() == [{"own": beyond, "shared": 1}[windows]]
        assert found.rows.per_sample == pytest.approx(59 / (1 + found.windows[0]))
        assert found.micro_batch(1, 201).shares_memory


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_this_cpu_takes_what_was_foretold_within_half(
    name: str, precision: str, tiny_data: Path
) -> None:
    """In processor time of one thread, the median of three: other work on the machine still moves
    what a core multiplies by a quarter (docs/log.md)."""
    settings = [f"data={tiny_data}", f"precision={precision}"]
    with torch_threads(1):
        found = [measure_plan(name, settings, steps=2) for _ in range(3)]
    assert 1 / 1.5 < median(each.foretold / each.measured for each in found) < 1.5, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 10, "items": None}, "--users and --items belong together"),
        ({"users": None, "items": None}, "or set data in the recipe to one"),
        ({"users": 0, "items": 5}, "both must be at least 1"),
        ({"memory_gib": 1.0}, "--memory 1: 1.5 GiB of it are kept free"),
        ({"memory_gib": float("nan")}, "--memory nan: it has to be GiB of one GPU, to 65,536"),
        ({"memory_gib": float("inf")}, "--memory inf: it has to be GiB of one GPU"),
        ({"gpus": 10**9}, "--gpus 1000000000: it has to be from 1 to 65,536"),
        ({"users": 10**12}, "--users 1000000000000 --items .*: rows are int32, 2,147,483,647 at"),
        ({"card": "RTX 9"}, "--card RTX 9: known are RTX 3090"),
        ({"card": "A100", "tflops": 3.0}, "give one of them"),
        ({"tflops": 0.0}, "--tflops 0.0: it has to be above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("paper-base", "data=nowhere", **options)


def test_json_holds_every_method_the_advice_and_what_is_unchecked() -> None:
    plan = plan_of(gpus=2)
    values = as_dict(plan)
    assert json.loads(json.dumps(values)) == values
    assert values["advice"] == advise(plan)
    assert "no figure was checked on a GPU" in values["unchecked"][0]
    assert [compute_of(method, True) for method in METHODS].count("autocast") == 1
