"""Choosing the values of a recipe that are given as `auto`, from the data and the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.histories import training_counts
from genrec_shards.splits import TrainedThrough

from genrec_dist.config.load import load_recipe, with_values
from genrec_dist.config.model_config import read_model_config
from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.paths import origin_folder
from genrec_dist.config.recipe import Recipe
from genrec_dist.config.used_settings import flat

LARGEST_VOCABULARY = 2**17
"""Beyond it an item has more than one token: the softmax would be too wide."""
SHORTEST, LONGEST = 50, 256
"""Least and most positions of the encoder."""
TARGETS_PER_STEP = 500
"""Of a data set of up to `TARGETS_OF_FEW` targets; above, it grows with their square root."""
TARGETS_OF_FEW = 200_000
ONE_WORD = ("random", "train-order")
"""Numberings whose codes are the numbers 1 to N: such a vocabulary has a token for each."""
RARE = 50
"""Texts help to find items that training holds less often, and hinder above (docs/quality.md)."""
SOFT_WEIGHT = 0.5
"""Of soft targets, where there are any."""
MOST_SOFT, MOST_SOFT_SHARES = 2_000_000, 20_000_000_000
"""Most targets that soft ones are made for, and most shares of items in all: on one core some 15
minutes, once per data directory, and 800 MB."""
FEWEST_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1500, 6, 200
STEPS_BETWEEN_VALIDATIONS = 100


@dataclass(frozen=True)
class Fitted:
    """A value that was chosen, and why."""

    key: str
    value: int | float | str
    reason: str

    def __str__(self) -> str:
        value = f"{self.value:,}" if isinstance(self.value, int) else self.value
        return f"{self.key} {value}: {self.reason}"


@dataclass(frozen=True)
class DataFacts:
    """What the values are chosen by. Held-out items are not in it."""

    num_items: int
    lengths_U: np.ndarray
    """int64 [U], items of each user's training part."""
    has_texts: bool = False
    """Whether items have texts (`genrec prepare --items`)."""
    rare: float = 1.0
    """Share of the training parts that are items which these hold less than `RARE` times."""
    one_word: bool = True
    """Whether codes are those of `ONE_WORD`."""
    positions: int | None = None
    """Of the model that training begins from (`init_from`), which may not grow."""

    @classmethod
    def of(cls, dataset: Dataset, trained_through: TrainedThrough) -> DataFacts:
        """Of the training parts alone."""
        sequences = dataset.sequences
        ends_U = sequences.training_ends(trained_through)
        counts_I = training_counts(sequences, trained_through)
        return cls(
            sequences.num_items,
            ends_U - sequences.offsets[:-1],
            has_texts=dataset.descriptions is not None,
            rare=float(counts_I[counts_I < RARE].sum() / max(counts_I.sum(), 1)),
            one_word=dataset.info.numbering in ONE_WORD,
        )

    @property
    def num_targets(self) -> int:
        """Items that follow another one in a training part."""
        return int(np.maximum(self.lengths_U - 1, 0).sum())


def fit_recipe(recipe: Recipe, facts: DataFacts) -> tuple[Recipe, list[Fitted]]:
    """The recipe with a value in place of each `auto`, and the values that were chosen.

    Args:
        recipe: With or without keys that are `auto`.
        facts: Of the data that it trains on.
    """
    fitted: list[Fitted] = []
    # A later value may rest on an earlier one: epochs on the batch size.
    for key, choose in _CHOICES.items():
        if key in recipe.auto_keys:
            value, reason = choose(recipe, facts)
            fitted.append(Fitted(key, value, reason))
            recipe = with_values(recipe, {key: value})
    return recipe, fitted


def resolve_recipe(recipe: Recipe, run: Path | None = None) -> tuple[Recipe, list[Fitted]]:
    """The recipe with values from its data directory and the precision of this machine. What is
    left to choose is `micro_batch_tokens`, by the device (`training.step.micro_batches`).

    Args:
        recipe: Of a run.
        run: The directory of the run that is resumed, whose own values are kept.

    Raises:
        ValueError: If the data directory, or the model that training begins from, is missing or
            damaged.
    """
    fitted: list[Fitted] = []
    if recipe.auto_keys and run is not None and (run / "recipe.yaml").is_file():
        kept = load_recipe(run / "recipe.yaml")
        held = flat(kept.as_dict())
        known = [key for key in recipe.auto_keys if key not in kept.auto_keys]
        recipe = with_values(recipe, {key: held[key] for key in known})
    elif set(recipe.auto_keys) & _CHOICES.keys():
        facts = DataFacts.of(load_dataset(recipe.data), recipe.trained_through)
        if recipe.init_from is not None:
            found = read_model_config(origin_folder(recipe.init_from))
            facts = replace(facts, positions=found.get("max_position_embeddings"))
        recipe, fitted = fit_recipe(recipe, facts)
    return with_precision(recipe, run), fitted


def _vocabulary_for(facts: DataFacts) -> float:
    # A byte-level BPE needs some merges on the way to the last item's; 12,101 items fit in 16,384.
    return 1.25 * facts.num_items + 1000


def _vocabulary(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    needed = _vocabulary_for(facts)
    size = min(2 ** int(np.ceil(np.log2(needed))), LARGEST_VOCABULARY)
    if needed > LARGEST_VOCABULARY:
        return size, f"{facts.num_items:,} items do not fit, so that some have several tokens"
    return size, f"enough for each of {facts.num_items:,} items to be one token"


def _positions(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    longest = int(np.percentile(facts.lengths_U, 95)) + 2
    size = min(max(-(-longest // 8) * 8, SHORTEST), LONGEST)
    size, origin = min(size, facts.positions or size), ""
    if size == facts.positions:
        origin = f"the model that it begins from has {size}; "
    share = float((facts.lengths_U + 2 <= size).mean())
    return size, f"{origin}{share:.0%} of the users' training parts fit"


def _cannot_have(recipe: Recipe, facts: DataFacts, changes: dict[str, Any]) -> str:
    """Why items' rows and soft targets of items are not to be had; "" where they are."""
    if recipe.tokens.tokenizer or recipe.model.backbone or not facts.one_word:
        return "an item may have several tokens"
    if _vocabulary_for(facts) > recipe.tokens.vocab_size:
        return f"some of {facts.num_items:,} items may have several tokens"
    try:
        with_values(recipe, changes)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return ""


def _without_texts(facts: DataFacts) -> str:
    """Why texts are left to the mixture; "" where they are a part of the decoder."""
    if not facts.has_texts:
        return "the data have no texts of items (genrec prepare --items)"
    if facts.rare < 0.5:
        often = 1 - facts.rare
        return f"{often:.0%} of what training holds are items that it holds {RARE} times or more"
    return ""


def _item_text(recipe: Recipe, facts: DataFacts) -> tuple[str, str]:
    problem = _without_texts(facts) or _cannot_have(recipe, facts, {"model.item_text": "add"})
    if problem:
        return "none", problem
    reason = f"of what training holds are items that it holds less than {RARE} times"
    return "add", f"the data have texts, and {facts.rare:.0%} {reason}"


def _soft_weight(recipe: Recipe, facts: DataFacts) -> tuple[float, str]:
    # Without texts they lift the decoder alone and not the mixture, and take as long to make.
    if recipe.text == "none":
        return 0.0, "text none: the transition graph alone lifts the decoder and not the mixture"
    changes = {"finetune.distill.weight": SOFT_WEIGHT}
    if problem := _without_texts(facts) or _cannot_have(recipe, facts, changes):
        return 0.0, problem
    shares = facts.num_targets * facts.num_items
    if facts.num_targets > MOST_SOFT or shares > MOST_SOFT_SHARES:
        reason = f"{facts.num_targets:,} targets of {facts.num_items:,} items would take too long"
        return 0.0, reason
    return SOFT_WEIGHT, "soft targets of the transition graph and the items' texts"


def _batch(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    per_user = max(facts.num_targets / max(len(facts.lengths_U), 1), 0.1)
    per_step = TARGETS_PER_STEP * max(1.0, facts.num_targets / TARGETS_OF_FEW) ** 0.5
    size = int(min(max(round(per_step / per_user), 4), 4096))
    return size, f"users per step, of {per_user:.1f} targets each"


def _steps_per_epoch(recipe: Recipe, facts: DataFacts) -> int:
    stage = recipe.finetune
    return math.ceil(-(-len(facts.lengths_U) // stage.batch_size) * stage.epoch_fraction)


def _epochs(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    steps = _steps_per_epoch(recipe, facts)
    epochs = min(max(FEWEST_EPOCHS, -(-FEWEST_STEPS // steps)), MOST_EPOCHS)
    return epochs, f"{epochs * steps:,} steps at most, {steps:,} in an epoch"


def _validations(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    every = -(-STEPS_BETWEEN_VALIDATIONS // _steps_per_epoch(recipe, facts))
    every = min(every, recipe.finetune.epochs)
    return every, f"so that {STEPS_BETWEEN_VALIDATIONS} steps or more lie between two validations"


_CHOICES: dict[str, Callable[[Recipe, DataFacts], tuple[int | float | str, str]]] = {
    "tokens.vocab_size": _vocabulary,
    "model.max_tokens": _positions,
    "model.item_text": _item_text,
    "finetune.distill.weight": _soft_weight,
    "finetune.batch_size": _batch,
    "finetune.epochs": _epochs,
    "validation.every_epochs": _validations,
}


def as_text(fitted: list[Fitted]) -> str:
    """Lines a person can read; "" where nothing was chosen."""
    return "\n".join(f"chosen from the data: {value}" for value in fitted)
