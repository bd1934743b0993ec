"""Values of a recipe that are chosen from the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from genrec_shards.dataset import load_dataset
from topic_data import write_data

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import dump_recipe, load_recipe, recipe_from, with_values
from genrec_dist.config.recipe import AUTO_KEYS, MICRO_BATCH, Recipe
from genrec_dist.data.fit_recipe import DataFacts, as_text, fit_recipe, resolve_recipe

TEXTS = ("model.item_text", "finetune.distill.weight")


def chosen(num_items: int, lengths: np.ndarray, *overrides: str) -> dict[str, int | float | str]:
    recipe = load_recipe("auto", list(overrides))
    fitted, values = fit_recipe(recipe, DataFacts(num_items, lengths))
    assert fitted.auto_keys == (MICRO_BATCH,)
    assert all(value.reason for value in values)
    assert len(as_text(values).splitlines()) == len(values)
    return {value.key: value.value for value in values}


@pytest.mark.parametrize(
    ("num_items", "lengths", "values"),
    [
        # As Beauty: short histories, the vocabulary of `best`.
        (12_101, np.full(22_363, 7), [16_384, 50, 83, 6, 1]),
        # As MovieLens-100k: few users of long histories. 5 users a step, 189 steps in an epoch.
        (1_349, np.full(943, 103), [4_096, 112, 5, 8, 1]),
        # Longer than what an encoder takes, on more targets: steps are larger.
        (60_000, np.full(6_000, 1_000), [131_072, 256, 4, 6, 1]),
        # Few users: many epochs, validated now and then.
        (200, np.full(100, 5), [2_048, 50, 125, 200, 100]),
        # Users who have nothing to learn from.
        (50, np.ones(30, np.int64), [2_048, 50, 4096, 200, 100]),
        # More items than tokens.
        (400_000, np.full(1_000_000, 10), [131_072, 50, 373, 6, 1]),
    ],
)
def test_values_follow_users_items_and_lengths(
    num_items: int, lengths: np.ndarray, values: list[int]
) -> None:
    found = chosen(num_items, lengths)
    assert [found.pop(key) for key in TEXTS] == ["none", 0.0]
    assert list(found.values()) == values


BEAUTY = (12_101, np.full(22_363, 7))
T5 = [
    "model.architecture=t5", "model.encoder_attention=bidirectional", "model.init_items=random",
    "tokens.trim=false", "finetune.targets=every-prefix", "finetune.windows=own",
]  # fmt: skip


@pytest.mark.parametrize(
    ("num_items", "lengths", "overrides", "one_word", "values"),
    [
        (*BEAUTY, [], True, ["add", 0.5]),
        (*BEAUTY, ["finetune.distill.weight=0.3"], True, ["add", 0.3]),
        # Codes of several words, sub-words of another vocabulary, too many items for one token.
        (*BEAUTY, [], False, ["none", 0.0]),
        (*BEAUTY, ["model.backbone=facebook/bart-base"], True, ["none", 0.0]),
        (*BEAUTY, ["tokens.vocab_size=8192"], True, ["none", 0.0]),
        (400_000, np.full(1_000, 10), [], True, ["none", 0.0]),
        # What another key refuses is not chosen.
        (*BEAUTY, ["init_from=runs/old"], True, ["none", 0.5]),
        (*BEAUTY, T5, True, ["none", 0.0]),
        # Soft targets of the graph alone.
        (*BEAUTY, ["text=none"], True, ["add", 0.0]),
        (*BEAUTY, ["finetune.targets=every-prefix", "finetune.windows=own"], True, ["add", 0.0]),
        # Soft targets of 10 million targets, and of 900,000 among 60,000 items.
        (1_349, np.full(100_000, 101), [], True, ["add", 0.0]),
        (60_000, np.full(100_000, 10), [], True, ["add", 0.0]),
    ],
)
def test_texts_are_a_part_of_the_decoder_where_they_can_be(
    num_items: int, lengths: np.ndarray, overrides: list[str], one_word: bool, values: list
) -> None:
    recipe = load_recipe("auto", overrides)
    facts = DataFacts(num_items, lengths, has_texts=True, one_word=one_word)
    fitted, why = fit_recipe(recipe, facts)
    assert [fitted.model.item_text, fitted.finetune.distill.weight] == values
    assert all(one.reason for one in why)
    # Where most of what training holds are items that it holds often.
    fitted, _ = fit_recipe(recipe, replace(facts, rare=0.4))
    given = [key for key in TEXTS if key not in load_recipe("auto", overrides).auto_keys]
    assert fitted.model.item_text == "none"
    assert fitted.finetune.distill.weight == (values[1] if given else 0)


def test_what_is_given_is_kept_and_what_follows_rests_on_it() -> None:
    found = chosen(500, np.full(1000, 9), "finetune.batch_size=500")
    assert "finetune.batch_size" not in found
    assert found["finetune.epochs"] == 200  # two steps an epoch, 750 epochs would be too many
    assert found["validation.every_epochs"] == 50
    # 83 users a step: 270 steps in a whole epoch, 14 in a twentieth; 1,500 steps at least.
    found = chosen(12_101, np.full(22_363, 7), "finetune.epoch_fraction=0.05")
    assert (found["finetune.epochs"], found["validation.every_epochs"]) == (108, 8)


def test_recipes_with_auto_are_written_and_read_back() -> None:
    recipe = load_recipe("auto", ["tokens.vocab_size=4096"])
    assert recipe.auto_keys == tuple(key for key in AUTO_KEYS if key != "tokens.vocab_size")
    assert recipe_from(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert recipe.as_dict()["finetune"]["epochs"] == recipe.as_dict()[MICRO_BATCH] == "auto"
    with pytest.raises(ValueError, match=r"finetune\.warmup_fraction: 'auto' is not a number"):
        load_recipe("auto", ["finetune.warmup_fraction=auto"])
    with pytest.raises(ValueError, match="unknown key auto_keys"):
        load_recipe("auto", ["auto_keys=[]"])


def test_held_out_items_choose_nothing(tmp_path: Path) -> None:
    one, two = (
        load_dataset(write_data(tmp_path / str(swap), swap_held_out=swap)) for swap in (False, True)
    )
    assert one.sequences.sequences_hash() != two.sequences.sequences_hash()
    facts, other = DataFacts.of(one, "n-2"), DataFacts.of(two, "n-2")
    np.testing.assert_array_equal(facts.lengths_U, np.diff(one.sequences.offsets) - 2)
    np.testing.assert_array_equal(facts.lengths_U, other.lengths_U)
    assert replace(facts, lengths_U=None) == replace(other, lengths_U=None)
    assert facts.has_texts


def test_auto_takes_the_texts_that_data_have(tiny_data: Path, tmp_path: Path) -> None:
    numberings: tuple[dict[str, Any], ...] = ({}, {"numbering": "semantic"})
    for number, more in enumerate(numberings):
        data = write_data(tmp_path / str(number), **more)
        fitted, _ = resolve_recipe(load_recipe("auto", [f"data={data}"]))
        found = fitted.model.item_text, fitted.finetune.distill.weight
        assert found == (("none", 0.0) if more else ("add", 0.5))
    fitted, _ = resolve_recipe(load_recipe("auto", [f"data={tiny_data}"]))
    assert (fitted.model.item_text, fitted.finetune.distill.weight) == ("none", 0.0)


def test_a_run_that_begins_from_a_model_has_its_positions(
    tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    facts = DataFacts(500, np.full(100, 90), positions=64)
    recipe = load_recipe("auto")
    assert fit_recipe(recipe, replace(facts, positions=None))[0].model.max_tokens == 96
    fitted, values = fit_recipe(recipe, facts)
    assert fitted.model.max_tokens == 64
    assert "the model that it begins from has 64" in as_text(values)
    # A model of 40 positions, where these data would have 50.
    config = json.loads((tiny_run / "best" / "config.json").read_text())
    config |= {"max_position_embeddings": 40, "max_input_tokens": 40}
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text(json.dumps(config))
    for more, positions in (([], 50), ([f"init_from={tmp_path}"], 40)):
        recipe = load_recipe("auto", [f"data={tiny_data}", *more])
        assert resolve_recipe(recipe)[0].model.max_tokens == positions


def test_a_resumed_run_keeps_its_values(tiny_data: Path, tmp_path: Path) -> None:
    recipe = load_recipe("auto", [f"data={tiny_data}", f"run={tmp_path}"])
    fitted, values = resolve_recipe(recipe)
    assert {value.key for value in values} == set(AUTO_KEYS) - {MICRO_BATCH}
    begun = replace(fitted, finetune=replace(fitted.finetune, epochs=17))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(begun))
    resumed, values = resolve_recipe(recipe, tmp_path)
    assert (resumed.finetune.epochs, values) == (17, [])
    assert resumed == replace(begun, precision=resumed.precision)
    settled = with_values(begun, {MICRO_BATCH: 777})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settled))
    assert resolve_recipe(recipe, tmp_path)[0] == settled


def test_auto_trains_chooses_its_mixture_and_lists_by_it(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The whole path by the commands: values in the run's recipe, weights in hybrid.json, and the
    same lists from evaluate and recommend without --decode."""
    run = tmp_path / "run"
    words = [f"data={tiny_data}", f"run={run}", "finetune.epochs=2", "model.d_model=32"]
    assert run_command(["train", "auto", *(w for word in words for w in ("--set", word))]) == 0
    said = capsys.readouterr().out
    assert "chosen from the data: tokens.vocab_size" in said
    kept = load_recipe(run / "recipe.yaml")
    assert isinstance(kept, Recipe)
    assert (kept.auto_keys, kept.finetune.epochs, kept.decode) == ((), 2, "hybrid")
    held = json.loads((run / "hybrid.json").read_text())
    assert held["validation"]["NDCG@10"] == max(row[-1] for row in held["table"])
    assert run_command(["evaluate", str(run)]) == 0
    metrics = json.loads((run / "metrics-test.json").read_text())
    assert metrics["system"] == "genrec, hybrid"
    capsys.readouterr()
    dataset = load_dataset(tiny_data)
    user = dataset.sequences.user_ids[0]
    assert run_command(["recommend", str(run), "--user", user, "--top", "5"]) == 0
    by_default = json.loads(capsys.readouterr().out)
    for mode, same in (("hybrid", True), ("exact", False)):
        assert (
            run_command(["recommend", str(run), "--user", user, "--top", "5", "--decode", mode])
            == 0
        )
        assert (json.loads(capsys.readouterr().out)["scores"] == by_default["scores"]) is same
