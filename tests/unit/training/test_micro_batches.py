"""`micro_batch_tokens: auto`: by a card's memory, the usual number elsewhere, kept by a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_events import events

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import MICRO_BATCH, Recipe
from genrec_dist.config.validate import MOST_MASKED
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.estimate.forecast import forecast
from genrec_dist.estimate.hardware import MEMORIES
from genrec_dist.estimate.memory.fit import GIB, RankMemory, usable
from genrec_dist.estimate.samples import catalogue_of, stage_samples
from genrec_dist.estimate.sizes import count_parameters
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup, describe
from genrec_dist.training.step import micro_batches
from genrec_dist.training.step.micro_batches import Devices, settle_micro_batches

GIBS: dict[str, float] = {name: float(gib) for name, gib in MEMORIES.items()}


def settled(recipe: Recipe, gib: float | None) -> tuple[int, str]:
    setup, model = build_setup(recipe)
    devices = Devices(free=None if gib is None else int(gib * GIB))
    found, why = settle_micro_batches(recipe, setup.dataset, setup.words, model, devices)
    assert found.auto_keys == ()
    return found.micro_batch_tokens, why


def auto(data: Path, name: str = "tiny", *overrides: str) -> Recipe:
    sets = [f"data={data}", "run=nowhere", "precision=bf16", f"{MICRO_BATCH}=auto", *overrides]
    return load_recipe(name, sets)


def test_a_cpu_takes_the_number_that_recipes_are_measured_with(tiny_data: Path) -> None:
    tokens, why = settled(auto(tiny_data), None)
    assert (tokens, why) == (6144, "micro_batch_tokens 6,144: the usual number on a CPU")
    assert settled(auto(tiny_data, "tiny", "model.max_tokens=7000"), None)[0] == 7000
    assert (
        settled(auto(tiny_data, "tiny", "model.architecture=t5", "model.positions=from-start"), 24)[
            0
        ]
        == 6144
    )
    for name in ("tiny", "best", "auto"):
        recipe = load_recipe(name)
        assert (MICRO_BATCH in recipe.auto_keys, recipe.micro_batch_tokens) == (True, 6144)


@pytest.mark.parametrize("card", ["RTX 3090", "H200"])
@pytest.mark.parametrize("name", ["tiny", "best", "small"])
def test_a_run_takes_what_the_plan_of_its_card_says(name: str, card: str, tiny_data: Path) -> None:
    """With batches that fill the card, and with one that is less than it holds."""
    for batch in (4_000_000, 50):
        recipe = auto(
            tiny_data, name, f"finetune.batch_size={batch}", f"pretrain.batch_size={batch}"
        )
        # Drawing the samples of so large a step for its time would take a minute.
        plan = forecast(recipe, **({"card": card} if batch == 50 else {"memory_gib": GIBS[card]}))
        tokens, why = settled(recipe, GIBS[card])
        assert plan.memory_gib == GIBS[card]
        assert plan.recipe.micro_batch_tokens == tokens
        setup, model = build_setup(recipe)
        memory = RankMemory(
            replace(recipe, micro_batch_tokens=tokens),
            model.config,
            count_parameters(recipe, model.config),
            stage_samples(recipe, catalogue_of(recipe, setup.dataset, setup.words)),
            1,
        )
        limit = usable(GIBS[card] * GIB)
        state = memory.state("ddp")
        assert state.peak(memory.activations("ddp", tokens, False)) <= limit
        if batch == 50:
            assert memory.step_tokens <= tokens < memory.step_tokens + 256
            assert "a whole step" in why
        else:
            assert state.peak(memory.activations("ddp", tokens + 256, False)) > limit
            assert "as many as fit" in why


def test_captured_steps_stay_below_the_most_that_one_mask_covers(tiny_data: Path) -> None:
    sets = ("step_graph=on", "finetune.batch_size=4000")
    assert settled(auto(tiny_data, "best", *sets), 24)[0] == MOST_MASKED
    assert settled(auto(tiny_data, "tiny", *sets), 24)[0] > MOST_MASKED


def test_too_little_memory_for_one_sample_is_one_line(tiny_data: Path) -> None:
    with pytest.raises(ValueError, match=r"one sample of model\.max_tokens 50 needs") as caught:
        settled(auto(tiny_data), 1.6)
    assert "of 1.6 GiB that are free on the smallest card 0.0 may be used" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resume_on_another_card_keeps_the_number(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun on a card that holds a whole step, and resumed on one that would not."""
    recipe = load_recipe(tiny_recipe, [f"{MICRO_BATCH}=auto", "checkpoint_every=2"])
    cards = [Devices(free=24 * GIB), Devices(free=GIB)]
    monkeypatch.setattr(micro_batches.Devices, "of", lambda *_: cards.pop(0))
    run = train(recipe)
    said = capsys.readouterr()
    kept = load_recipe(run / "recipe.yaml")
    (start,) = events(run, "start")
    assert kept.auto_keys == ()
    tokens = kept.micro_batch_tokens
    assert tokens not in (2048, 6144)
    assert start["recipe"][MICRO_BATCH] == tokens
    assert f"micro_batch_tokens {tokens:,}: a whole step; 24.0 GiB are free" in said.out + said.err
    assert f"micro-batches of up to {tokens:,} tokens" in " ".join((said.out + said.err).split())
    train(recipe, resume="latest")
    assert cards == []
    assert events(run, "start")[-1]["recipe"][MICRO_BATCH] == tokens
    assert load_recipe(run / "recipe.yaml") == kept
    assert resolve_recipe(recipe, run)[0].micro_batch_tokens == tokens


def test_a_dry_run_and_the_plan_say_the_number(
    tiny_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert describe(auto(tiny_data))[MICRO_BATCH] == 6144
    words = ["--set", f"data={tiny_data}", "--set", "run=nowhere"]
    assert run_command(["plan", "tiny", *words, "--card", "H200"]) == 0
    said = capfd.readouterr().out
    whole = 256 * -(-512 * 50 // 256)
    assert f"micro_batch_tokens {whole:,}" in said
    assert "GPU of 141 GiB" in said
    assert run_command(["plan", "tiny", *words, "--memory", "1.6"]) == 0
    assert "micro_batch_tokens 6,144" in capfd.readouterr().out
