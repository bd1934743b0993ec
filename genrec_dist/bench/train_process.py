"""One rival of `genrec bench train` in a process of its own: some steps per line that it reads.

Processes do not share Accelerate's state, whose precision is that of the last one, and their
peaks of memory are their own."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from genrec_dist.bench.peers.train import TokenizingCollate, TrainerRival, pad_samples, samples_of
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import Batch, RankStep
from genrec_dist.data.fit_recipe import resolve_recipe
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.inference.load import best_device
from genrec_dist.model.genrec import GenRecForConditionalGeneration, choose_packing
from genrec_dist.training.engine import make_engine
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.profiling import peak_memory
from genrec_dist.training.setup import build_setup

OURS, TRIMMED = "ours", "ours, trimmed"
TUNED, DEFAULT, PUBLISHED = "Trainer, tuned", "Trainer, default", "published collate"


@dataclass(frozen=True)
class Setting:
    """What is trained, the same for all rivals."""

    data: str
    """Directory of `genrec prepare`."""
    shards: str
    tokenizer: str
    """Directory of the tokenizer."""
    samples: int = 2048
    """The first so many of an epoch's order, every prefix of a training part being one. Hugging
    Face's grouping by length sorts within a 4 * batch_size-th of them: fewer would not let it."""
    batch_size: int = 64
    max_tokens: int = 512
    shape: tuple[str, ...] = ()
    """Changes to the recipe `tiny`."""
    threads: int = 0
    """0: as torch finds them."""

    @property
    def num_steps(self) -> int:
        return -(-self.samples // self.batch_size)

    def recipe(self, *more: str) -> Recipe:
        changes = {
            "data": self.data,
            "shards": self.shards,
            "tokens.tokenizer": self.tokenizer,
            "model.max_tokens": self.max_tokens,
            "model.user_ids": "true",
            "model.positions": "from-start",
            "model.dropout": 0.1,
            "model.embedding_dropout": 0,
            "pretrain.epochs": 0,
            "finetune.batch_size": self.batch_size,
            "finetune.targets": "every-prefix",
        }
        overrides = [f"{key}={value}" for key, value in changes.items()]
        return load_recipe("tiny", [*overrides, *self.shape, *more])


class World:
    """The samples and weights that all rivals train; `changes` to the recipe."""

    def __init__(self, setting: Setting, *changes: str):
        self.recipe = resolve_recipe(setting.recipe(*changes))[0]
        self.setup, self.model = build_setup(self.recipe)
        self.num_steps = min(setting.num_steps, self.setup.stages[0].plan.steps_per_epoch)

    def steps(self, packed: bool = False) -> Iterator[RankStep]:
        """The steps of an epoch, made one by one."""
        made = self.setup
        batches = StepBatches(
            made.stages, made.reader, made.layout, self.recipe, 0, 1, packed=packed
        )
        return (batches[step] for step in range(self.num_steps))

    def padded(self) -> list[Batch]:
        """All samples, padded."""
        return [batch for step in self.steps() for batch in step.micro_batches]


class Rival(Protocol):
    def train(self, num_steps: int) -> int:
        """Take so many steps of an epoch; returns the real tokens they held."""

    def slots(self) -> int:
        """Encoder places of an epoch, padding included."""


class Ours:
    """The training step of `genrec train`: its batches, its engine."""

    def __init__(self, world: World):
        self.world, self.packed = world, choose_packing(world.recipe, best_device())
        self.engine = make_engine(world.model, world.recipe, make_accelerator(world.recipe))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = world.recipe.finetune.learning_rate

    def train(self, num_steps: int) -> int:
        tokens = 0
        for step in islice(self.world.steps(self.packed), num_steps):
            for number, batch in enumerate(step.micro_batches, 1):
                with self.engine.micro_step(last=number == len(step.micro_batches)):
                    loss = self.engine.loss(batch.to(self.world.model.device), 0.0)
                    self.engine.backward(loss / step.num_target_tokens)
                tokens += batch.num_tokens
            self.engine.step()
        return tokens

    def slots(self) -> int:
        steps = self.world.steps(self.packed)
        return sum(one.encoder.input_ids.numel() for step in steps for one in step.micro_batches)


def make_rival(name: str, setting: Setting, folder: Path) -> tuple[Rival, World]:
    """Raises ValueError for an unknown name."""
    if name in (OURS, TRIMMED):
        world = World(setting, *(["tokens.trim=true"] if name == TRIMMED else []))
        return Ours(world), world
    world = World(setting)
    pad = int(world.model.config.pad_token_id)
    samples = [sample for batch in world.padded() for sample in samples_of(batch)]
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": setting.batch_size,
        "learning_rate": world.recipe.finetune.learning_rate,
    }
    collate: Any = partial(pad_samples, pad_token=pad)
    if name == PUBLISHED:
        collate = TokenizingCollate(world.setup.tokenizer, pad)
        samples = [collate.with_texts(sample) for sample in samples]
    elif name == TUNED:
        collate = partial(pad_samples, pad_token=pad, multiple=8)
        arguments |= {
            "train_sampling_strategy": "group_by_length",
            "torch_compile": True,
            "optim": "adamw_torch_fused",
            "bf16": world.recipe.precision == "bf16",
        }
    elif name != DEFAULT:
        known = ", ".join((OURS, TRIMMED, TUNED, DEFAULT, PUBLISHED))
        raise ValueError(f"{name}: no such rival; there are {known}")
    assert isinstance(world.model, GenRecForConditionalGeneration)
    return TrainerRival(world.model, samples, collate, arguments), world


def facts(rival: Rival, world: World) -> dict[str, Any]:
    """Of the samples, which are the same for all, and of how the rival lays them out."""
    batches = world.padded()
    model, loss, targets = world.model.eval(), 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            logits, labels = model.target_logits(batch)
            targets += len(labels)
            loss += float(cross_entropy(logits.float(), labels, reduction="sum"))
    inputs = sum(int(batch.encoder.attention_mask.sum()) for batch in batches)
    return {
        "samples": sum(batch.num_samples for batch in batches),
        "tokens": inputs + targets,
        "parameters": sum(p.numel() for p in world.model.parameters()),
        "padding share": 1 - inputs / rival.slots(),
        "first loss": loss / targets,
    }


def main() -> None:
    """`python -m genrec_dist.bench.train_process NAME SETTING`: facts in a line, then a line for
    each number of steps read."""
    name, text = sys.argv[1:]
    values = json.loads(text)
    setting = Setting(**{**values, "shape": tuple(values["shape"])})
    if setting.threads:
        torch.set_num_threads(setting.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    with tempfile.TemporaryDirectory() as folder:
        rival, world = make_rival(name, setting, Path(folder))
        print(json.dumps(facts(rival, world)), file=answers, flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            tokens = rival.train(int(line))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken = {"seconds": time.perf_counter() - start, "tokens": tokens}
            taken["memory"] = peak_memory(world.model.device)
            print(json.dumps(taken), file=answers, flush=True)


if __name__ == "__main__":
    main()
