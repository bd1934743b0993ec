"""`genrec plan`: what fits where, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.estimate import forecast as module
from genrec_dist.estimate.forecast import (
    GIB,
    RESERVE_GIB,
    Forecast,
    advise,
    as_dict,
    forecast,
    read_catalogue,
    stage_samples,
)
from genrec_dist.estimate.memory import (
    METHODS,
    MicroBatch,
    activation_bytes,
    build_config,
    compute_of,
)

BEAUTY: dict[str, Any] = {"users": 22_363, "items": 12_101}
LAUNCH = ROOT / "launch"


def test_the_papers_recipes_on_24_gib(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command's figures for Beauty's sizes; the largest micro-batch fits and the next larger
    one does not."""
    for name, parameters in (("paper-base", 165_890_304), ("paper-large", 441_584_640)):
        path = tmp_path / f"{name}.json"
        arguments = [
            "plan",
            name,
            "--gpus",
            "1",
            "--memory",
            "24",
            "--users",
            "22363",
            "--items",
            "12101",
        ]
        assert run_command([*arguments, "--launch", str(LAUNCH), "--json", str(path)]) == 0
        assert "Use one process without ZeRO" in capfd.readouterr().out
        written = json.loads(path.read_text())
        ddp = written["methods"][0]
        assert [each["method"] for each in written["methods"]] == list(METHODS)
        assert written["parameters"] == parameters
        assert ddp["state"]["total"] == 16 * parameters  # weights, gradients, two moments
        tokens = ddp["largest_micro_batch_tokens"]
        peaks = [peak_of(name, ddp["state"]["total"], tokens + more) for more in (0, 256)]
        assert peaks[0] <= (24 - RESERVE_GIB) * GIB < peaks[1]


def peak_of(name: str, state: int, tokens: int) -> int:
    """By hand: the shortest samples are the worst, their targets fill the head."""
    recipe = load_recipe(name)
    config, plan = build_config(recipe, **BEAUTY), forecast(recipe, **BEAUTY)
    shortest = min(int(each.lengths[0]) for each in plan.samples)
    batches = [
        MicroBatch(tokens // int(length), int(length), 5)
        for each in plan.samples
        for length in {shortest, *each.quantiles}
    ]
    return state + max(
        activation_bytes(config, plan.sizes, batch, "fp32").total for batch in batches
    )


def plan_of(name: str = "paper-base", *overrides: str, **options: Any) -> Forecast:
    return forecast(load_recipe(name, list(overrides)), **{**BEAUTY, **options})


def test_what_fits_with_ddp_is_left_to_ddp() -> None:
    advice = " ".join(plan_of(gpus=8).advice)
    assert "Use DDP, ZeRO is slower here" in advice
    assert "2.7 GB" in advice
    assert "A rank's share of a step" in advice


def test_the_least_stage_is_taken_where_ddp_is_too_large() -> None:
    """A whole range of cards: first nothing fits, then slower methods, last DDP; the fastest that
    fits is named."""
    said = []
    for memory in (2.6, 3.4, 4.2, 5.5):
        plan = plan_of(
            "paper-base", "micro_batch_tokens=512", gpus=8, memory_gib=memory, zero_files=LAUNCH
        )
        fits = {fit.method for fit in plan.fits if fit.fits(plan.limit)}
        said.append(next((method for method in module._BY_COST if method in fits), None))
        line = plan.advice[0]
        if said[-1] is None:
            assert line.startswith("Nothing fits")
        elif said[-1] == "ddp":
            assert line.startswith("Use DDP")
        else:
            assert f"use {module._NAMES[said[-1]]}, the fastest method that fits" in line
    places = [
        len(module._BY_COST) if each is None else module._BY_COST.index(each) for each in said
    ]
    assert places == sorted(places, reverse=True)
    assert said[-1] == "ddp"
    assert len(set(said)) >= 3, said


def test_a_too_large_micro_batch_is_to_be_lowered() -> None:
    plan = plan_of("paper-base", "finetune.batch_size=4096", "micro_batch_tokens=400000")
    assert not plan.fits[0].fits(plan.limit)
    largest = max(fit.largest for fit in plan.fits if fit.method == "ddp")
    assert f"Lower micro_batch_tokens to {largest:,} with DDP" in " ".join(plan.advice)
    lowered = plan_of("paper-base", "finetune.batch_size=4096", f"micro_batch_tokens={largest}")
    assert lowered.fits[0].fits(lowered.limit)


def test_a_card_too_small_for_one_sample_says_what_to_lower() -> None:
    advice = " ".join(plan_of("paper-large", memory_gib=1.6).advice)
    assert "Nothing fits" in advice
    assert "Not one longest sample fits. Lower model.max_tokens" in advice
    assert "precision, to bf16" in advice


def test_large_id_tables_are_named_and_outside_they_are_not_state() -> None:
    many: dict[str, Any] = {"users": 3_000_000, "items": 500_000}
    inside = plan_of("tiny", "model.user_ids=true", gpus=4, **many)
    assert "row-adagrad" in " ".join(inside.advice)
    outside = plan_of(
        "tiny", "model.user_ids=true", "optimizer.id_tables=row-adagrad", gpus=4, **many
    )
    assert "row-adagrad" not in " ".join(outside.advice)
    ids = 3_500_000 * 128
    assert inside.sizes.ids == ids + 2 * 128
    assert inside.fits[0].state.total - outside.fits[0].state.total > 16 * ids - ids * 4 / 4 * 1.1
    narrow = plan_of("tiny", "model.user_ids=true", "model.id_dim=32", gpus=4, **many)
    assert narrow.sizes.ids == (3_500_000 + 2) * 32


def test_lengths_come_from_the_data(tiny_data: Path) -> None:
    """120 users of 4 to 64 items, tokenised by the run's own vocabulary."""
    recipe = load_recipe(
        "tiny", [f"data={tiny_data}", "run=x", "tokens.vocab_size=4096", "pretrain.epochs=1"]
    )
    catalogue = read_catalogue(recipe, None, None)
    assert (catalogue.users, catalogue.items) == (120, 64)
    assert catalogue.words is not None
    pretrain, finetune = stage_samples(recipe, catalogue)
    # One token an item and no user: <s>, the items, one of them a mask, </s>.
    assert pretrain.lengths.tolist() == sorted(
        min(int(n) + 2, 50) for n in catalogue.training_items
    )
    prefixes = sorted(min(k + 3, 50) for n in catalogue.training_items for k in range(1, int(n)))
    assert finetune.lengths.tolist() == prefixes
    assert (finetune.target_tokens, finetune.epoch_samples) == (2, len(prefixes))


def test_time_is_told_only_from_a_stated_speed() -> None:
    assert not plan_of().duration
    told = plan_of(tflops=10.0, gpus=2).duration["finetune"]
    plan = plan_of()
    flops = plan.step_flops["finetune"] / 16 * 22_363
    assert told.epoch_seconds == pytest.approx(flops / 2e13)
    assert told.total_seconds == pytest.approx(25 * told.epoch_seconds)
    card = plan_of(card="RTX 3090").duration["finetune"]
    assert "not measured" in card.assumption
    assert card.epoch_seconds == pytest.approx(flops / (35.6e12 * module.MFU))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 10, "items": None}, "--users and --items belong together"),
        (
            {"users": None, "items": None},
            "nowhere: no data directory there: give --users and --items",
        ),
        ({"users": 0, "items": 5}, "both must be at least 1"),
        ({"memory_gib": 1.0}, "--memory 1: 1.5 GiB of it are kept free"),
        ({"card": "RTX 9"}, "--card RTX 9: known are RTX 3090"),
        ({"card": "A100", "tflops": 3.0}, "give one of them"),
        ({"tflops": 0.0}, "--tflops 0.0: it has to be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of("paper-base", "data=nowhere", **options)


def test_json_holds_every_method_and_what_is_unchecked() -> None:
    plan = plan_of(gpus=2)
    values = as_dict(plan)
    assert json.loads(json.dumps(values)) == values
    assert values["advice"] == advise(plan)
    assert "no figure was checked on a GPU" in values["unchecked"][0]
    assert [compute_of(method, True) for method in METHODS].count("autocast") == 1
