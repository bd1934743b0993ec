"""Choosing the values of a recipe that are given as `auto`, from the data and the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from genrec_shards.dataset import load_dataset
from genrec_shards.sequences import Sequences
from genrec_shards.splits import TrainedThrough

from genrec_dist.config.load import load_recipe, with_values
from genrec_dist.config.native_precision import with_precision
from genrec_dist.config.recipe import Recipe
from genrec_dist.config.used_settings import flat

LARGEST_VOCABULARY = 2**17
"""Beyond it an item has more than one token: the softmax would be too wide."""
SHORTEST, LONGEST = 50, 256
"""Least and most positions of the encoder."""
TARGETS_PER_STEP = 500
"""Of a data set of up to `TARGETS_OF_FEW` targets; above, it grows with their square root."""
TARGETS_OF_FEW = 200_000
FEWEST_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 1500, 6, 200
STEPS_BETWEEN_VALIDATIONS = 100


@dataclass(frozen=True)
class Fitted:
    """A value that was chosen, and why."""

    key: str
    value: int
    reason: str

    def __str__(self) -> str:
        return f"{self.key} {self.value:,}: {self.reason}"


@dataclass(frozen=True)
class DataFacts:
    """What the values are chosen by. Held-out items are not in it."""

    num_items: int
    lengths_U: np.ndarray
    """int64 [U], items of each user's training part."""

    @classmethod
    def of(cls, sequences: Sequences, trained_through: TrainedThrough) -> DataFacts:
        """Of the training parts alone."""
        ends_U = sequences.training_ends(trained_through)
        return cls(sequences.num_items, ends_U - sequences.offsets[:-1])

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
        ValueError: If the data directory is missing or damaged.
    """
    fitted: list[Fitted] = []
    if recipe.auto_keys and run is not None and (run / "recipe.yaml").is_file():
        kept = load_recipe(run / "recipe.yaml")
        held = flat(kept.as_dict())
        known = [key for key in recipe.auto_keys if key not in kept.auto_keys]
        recipe = with_values(recipe, {key: held[key] for key in known})
    elif set(recipe.auto_keys) & _CHOICES.keys():
        recipe, fitted = fit_recipe(
            recipe, DataFacts.of(load_dataset(recipe.data).sequences, recipe.trained_through)
        )
    return with_precision(recipe, run), fitted


def _vocabulary(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    # A byte-level BPE needs some merges on the way to the last item's; 12,101 items fit in 16,384.
    needed = 1.25 * facts.num_items + 1000
    size = min(2 ** int(np.ceil(np.log2(needed))), LARGEST_VOCABULARY)
    if needed > LARGEST_VOCABULARY:
        return size, f"{facts.num_items:,} items do not fit, so that some have several tokens"
    return size, f"enough for each of {facts.num_items:,} items to be one token"


def _positions(recipe: Recipe, facts: DataFacts) -> tuple[int, str]:
    longest = int(np.percentile(facts.lengths_U, 95)) + 2
    size = min(max(-(-longest // 8) * 8, SHORTEST), LONGEST)
    share = float((facts.lengths_U + 2 <= size).mean())
    return size, f"{share:.0%} of the users' training parts fit"


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


_CHOICES: dict[str, Callable[[Recipe, DataFacts], tuple[int, str]]] = {
    "tokens.vocab_size": _vocabulary,
    "model.max_tokens": _positions,
    "finetune.batch_size": _batch,
    "finetune.epochs": _epochs,
    "validation.every_epochs": _validations,
}


def as_text(fitted: list[Fitted]) -> str:
    """Lines a person can read; "" where nothing was chosen."""
    return "\n".join(f"chosen from the data: {value}" for value in fitted)
