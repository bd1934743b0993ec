"""One rival of `genrec bench train` in a process of its own: it trains some steps for each line it
reads and says how long it took.

Processes do not share Accelerate's state, whose precision is that of whoever came last, and their
peaks of memory are their own."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.keyed_random import mixed_key
from genrec_shards.storage.sample_order import Plan, StepSamples

from genrec_dist.bench.train_peers import (
    TokenizingCollate,
    TrainerRival,
    Words,
    pad_samples,
    samples_of,
)
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import Batch, RankStep, Work
from genrec_dist.data.collate import BatchOptions, make_step
from genrec_dist.data.encoder_input import Layout
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words, mask_tokens, trim
from genrec_dist.estimate.flops import flops
from genrec_dist.inference.load import best_device, make_layout
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration, choose_packing
from genrec_dist.training.engine import make_accelerator, make_engine
from genrec_dist.training.profiling import peak_memory

OURS = {
    "ours": (),
    "ours, trimmed": ("tokens.trim=true",),
    "ours, padded": ("packing=padded",),
    "ours, whole head": ("head=full",),
    "ours, compiled": ("compile=layers",),
    "ours, recomputed": ("activation_checkpointing=true",),
    "ours, float32": ("precision=fp32",),
}
"""What `genrec train` does by default, and with one switch of the recipe set otherwise."""
PEERS = ("Trainer, tuned", "Trainer, default", "published collate")
MULTIPLE = 8


@dataclass(frozen=True)
class Setting:
    """What is trained, the same for all rivals."""

    data: str
    """Directory of `genrec prepare`."""
    samples: int = 2048
    """The first so many of an epoch's order, every prefix of a training part being one. Hugging
    Face's grouping by length sorts within a 4 * batch_size-th of them: fewer would not let it."""
    batch_size: int = 64
    max_tokens: int = 512
    shape: tuple[str, ...] = ()
    """Changes to the recipe `tiny`."""
    vocabulary: int = 50_265
    """Rows of the embedding and the head, of which the tokenizer uses few, as BART's does of
    its."""
    tokenizer: int = 300
    """Its size: with 300 an item has 3.6 sub-words, BART's has about 4."""
    threads: int = 0
    """0: as torch finds them."""

    def recipe(self, *more: str) -> Recipe:
        changes = (
            f"data={self.data}", "run=nowhere", "workers=0", f"model.max_tokens={self.max_tokens}", "model.user_ids=true",
            "model.positions=from-start", "model.dropout=0.1", "model.embedding_dropout=0",
            f"finetune.batch_size={self.batch_size}",
        )  # fmt: skip
        return load_recipe("tiny", [*changes, *self.shape, *more])


@dataclass(frozen=True)
class World:
    setting: Setting
    recipe: Recipe
    dataset: Dataset
    tokenizer: Any
    layout: Layout
    model: GenRecForConditionalGeneration
    steps: list[StepSamples]

    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sequences = self.dataset.sequences
        parts = [
            sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
            for user in user_rows
        ]
        return np.concatenate(parts), np.concatenate(
            [[0], np.cumsum([len(part) for part in parts])]
        )

    def share(self, samples: StepSamples, packed: bool, budget: int | None = None) -> RankStep:
        options = BatchOptions(
            micro_batch_tokens=budget or self.recipe.micro_batch_tokens, packed=packed
        )
        return make_step(samples, self, self.layout, options, epoch=0)

    def whole(self) -> list[Batch]:
        """All samples, padded."""
        return [
            batch
            for samples in self.steps
            for batch in self.share(samples, packed=False).micro_batches
        ]


def make_world(setting: Setting, *more: str) -> World:
    """The same weights and samples for whoever asks."""
    recipe = setting.recipe(*more)
    dataset = load_dataset(setting.data)
    tokenizer = train_tokenizer(dataset.numbering.item_codes, setting.tokenizer, 1)
    words = build_words(tokenizer, dataset.numbering.item_codes, dataset.numbering.user_codes, 1)
    special = {
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
    }
    if recipe.tokens.trim:
        words = trim(words, tokenizer.pad_token_id)
    torch.manual_seed(mixed_key(0, 0x1217) >> 1)
    model = build_model(
        recipe.model,
        ModelSizes(
            vocab_size=max(setting.vocabulary, len(tokenizer)),
            num_users=words.num_users,
            num_items=words.num_items,
            num_masks=1,
            special={**special, "mask": mask_tokens(tokenizer, 1)[0]},
            vocabulary=words.vocabulary,
        ),
    )
    plan = Plan(
        np.diff(dataset.sequences.offsets),
        1024,
        space="every-prefix",
        batch_size=setting.batch_size,
        seed=0,
    )
    steps = [
        plan.step(0, step)
        for step in range(min(plan.steps_per_epoch, -(-setting.samples // setting.batch_size)))
    ]
    return World(
        setting, recipe, dataset, tokenizer, make_layout(words, model.config), model, steps
    )


class Rival(Protocol):
    def train(self, num_steps: int) -> int:
        """So many steps of an epoch; the real tokens they held."""

    def slots(self) -> int:
        """Encoder places of an epoch, padding included."""


class Ours:
    """The training step of `genrec train`: its batches, its engine."""

    def __init__(self, world: World):
        self.world, self.packed = world, choose_packing(world.recipe.packing, best_device())
        self.engine = make_engine(world.model, world.recipe, make_accelerator(world.recipe))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = world.recipe.finetune.learning_rate

    def train(self, num_steps: int) -> int:
        tokens = 0
        for samples in self.world.steps[:num_steps]:
            share = self.world.share(samples, self.packed)
            for number, batch in enumerate(share.micro_batches):
                with self.engine.micro_step(last=number == len(share.micro_batches) - 1):
                    loss = self.engine.loss(batch.to(self.world.model.device), 0.0)
                    self.engine.backward(loss / share.num_target_tokens)
                tokens += batch.num_tokens
            self.engine.step()
        return tokens

    def slots(self) -> int:
        shares = [self.world.share(samples, self.packed) for samples in self.world.steps]
        return sum(
            batch.encoder.input_ids.numel() for share in shares for batch in share.micro_batches
        )


def make_rival(name: str, setting: Setting, folder: Path) -> tuple[Rival, World]:
    """Raises ValueError for a rival that there is none of."""
    if name in OURS:
        world = make_world(setting, *OURS[name])
        return Ours(world), world
    world = make_world(setting)
    pad = int(world.model.config.pad_token_id)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": setting.batch_size,
        "learning_rate": world.recipe.finetune.learning_rate,
    }
    if name == "published collate":
        return TrainerRival(
            world.model, words_of(world), TokenizingCollate(world.tokenizer, pad), arguments
        ), world
    stored = [
        s for b in world.whole() for s in samples_of(b.encoder, b.decoder_input_ids, b.labels)
    ]
    if name == "Trainer, default":
        return TrainerRival(
            world.model, stored, partial(pad_samples, pad_token=pad), arguments
        ), world
    if name != "Trainer, tuned":
        raise ValueError(f"{name}: no such rival; there are {', '.join((*OURS, *PEERS))}")
    arguments |= {
        "train_sampling_strategy": "group_by_length",
        "torch_compile": True,
        "optim": "adamw_torch_fused",
        "bf16": world.recipe.precision == "bf16",
    }
    return TrainerRival(
        world.model, stored, partial(pad_samples, pad_token=pad, multiple=MULTIPLE), arguments
    ), world


def words_of(world: World) -> Words:
    """The samples as words with their ids, cut to length beforehand."""
    found = []
    items, users = world.dataset.numbering.item_codes, world.dataset.numbering.user_codes
    lengths = world.layout.words.lengths
    for samples in world.steps:
        for user, position in zip(
            samples.user_rows.tolist(), samples.target_positions.tolist(), strict=True
        ):
            sequence, _ = world.gather(np.array([user]))
            history, target = sequence[:position], int(sequence[position])
            room = (
                world.setting.max_tokens
                - 3
                - int(lengths[world.layout.words.user_words(np.array([user]))[0]])
            )
            kept = np.cumsum(lengths[world.layout.words.item_words(history)][::-1]) <= room
            history = history[len(history) - int(kept.sum()) :]
            found.append(
                {
                    "words": [f"user_{users[user]}", *(f"item_{items[item]}" for item in history)],
                    "user_rows": [user + 1, *[0] * len(history)],
                    "item_rows": [0, *(history + 1).tolist()],
                    "target": f"item_{items[target]}",
                    "start": int(world.model.config.decoder_start_token_id),
                }
            )
    return Words(found)


def facts(rival: Rival, world: World) -> dict[str, Any]:
    """Of the samples, which are the same for all, and of how the rival lays them out."""
    batches = world.whole()
    work = sum((batch.work for batch in batches), Work())
    with torch.inference_mode():
        model = world.model.eval()
        loss = 0.0
        for batch in batches:
            logits, labels = model.target_logits(batch)
            loss += float(
                torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            )
    return {
        "samples": sum(batch.num_samples for batch in batches),
        "tokens": work.inputs + work.targets,
        "work": asdict(work),
        "tflop": flops(world.model.config, work) / 1e12,
        "parameters": sum(p.numel() for p in world.model.parameters()),
        "padding share": 1 - work.inputs / rival.slots(),
        "first loss": loss / work.targets,
    }


def main() -> None:
    """`python -m genrec_dist.bench.train_process NAME SETTING`: facts in a line, then one for each
    number of steps read."""
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
            told = {
                "seconds": time.perf_counter() - start,
                "tokens": tokens,
                "memory": peak_memory(world.model.device),
            }
            print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
