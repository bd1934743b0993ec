"""Small batches with known words, a model that reads them, and the loss an engine makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from genrec_shards.sequences import offsets_of
from genrec_shards.storage.sample_order import SampleOrder, StepSamples

from genrec_dist.config.recipe import Mask, Model
from genrec_dist.data.batch import Batch, RankStep
from genrec_dist.data.collate import BatchOptions
from genrec_dist.data.layout import Layout
from genrec_dist.data.samples.masking import STRATEGIES
from genrec_dist.data.samples.step import make_step
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words, mask_tokens
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration

NUM_MASKS = 4

# The letter z occurs in the words of held-out items alone, so that a leaking sub-word is known by
# its letters.
TRAINING_CODES = [
    str(code) for code in (1, 12, 123, 2, 27, 7, 99, 1000, 12101, 5, 50, 555, 40404, 8, 81)
]
CODES = TRAINING_CODES + [f"z{code}" for code in range(100, 200)]
USER_CODES = [
    str(code)
    for code in (3, 33, 22363, 4, 17, 171, 9, 90, 909, 31, 64, 6464, 2, 22, 222, 1, 11, 111, 5, 55)
]
TOKENIZER = train_tokenizer(CODES, 300, NUM_MASKS)
WORDS = build_words(TOKENIZER, CODES, USER_CODES, NUM_MASKS)
PAD = TOKENIZER.pad_token_id
MASKS = [Mask(name, k=NUM_MASKS) for name in sorted(STRATEGIES)]
SPACES = ["user", "last", "every-prefix"]
WHOLE = 10**6
"""A budget of tokens that takes a whole step."""
TIGHT = WORDS.longest_user + 2 + 2 * WORDS.longest_item
"""Positions for two items of any length."""


def layout(
    max_tokens=512, user_ids=True, positions="from-start", unit="subword", causal=False
) -> Layout:
    return Layout(WORDS, PAD, max_tokens, user_ids, positions, unit, causal)


class Lists:
    """Sequences held as lists."""

    def __init__(self, sequences: list[list[int]]):
        self.sequences = sequences

    def gather(self, user_rows):
        rows = [self.sequences[user] for user in user_rows]
        items = np.array([item for row in rows for item in row], np.int32)
        return items, offsets_of(np.array([len(row) for row in rows], np.int64))

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.sequences])


def marked_sequences(trained_through="n-2", seed=0) -> Lists:
    """Sequences whose held-out items are markers that occur nowhere else."""
    rng = np.random.default_rng(seed)
    num_held_out = 2 if trained_through == "n-2" else 1
    markers = iter(range(len(TRAINING_CODES), len(CODES)))
    training = [
        rng.integers(0, len(TRAINING_CODES), rng.integers(1, 14)).tolist() for _ in USER_CODES
    ]
    return Lists([row + [next(markers) for _ in range(num_held_out)] for row in training])


def whole_step(source: Lists, space: str, trained_through="n-2", epoch=0) -> StepSamples:
    options = {"space": space, "batch_size": 1000, "seed": 1, "window_records": 2}
    order = SampleOrder(source.lengths, 4, trained_through=trained_through, **options)
    return order.step(epoch, 0)


def step_of(samples, source, where=None, epoch=0, budget=WHOLE, **options) -> RankStep:
    """`options`: of `BatchOptions`."""
    settings = BatchOptions(micro_batch_tokens=budget, seed=3, **options)
    return make_step(samples, source, where or layout(), settings, epoch)


def batches_of(
    samples, source, where=None, mask=None, epoch=0, budget=WHOLE, **options
) -> list[Batch]:
    step = step_of(samples, source, where, epoch, budget, mask=mask, **options)
    return step.micro_batches


def cases():
    return [pytest.param("user", mask, id=mask.strategy) for mask in MASKS] + [
        pytest.param(space, None, id=space) for space in SPACES[1:]
    ]


def a_model(**shape) -> GenRecForConditionalGeneration:
    """One that reads these words, with weights far apart."""
    torch.manual_seed(0)
    special = {
        "bos": TOKENIZER.bos_token_id,
        "pad": PAD,
        "eos": TOKENIZER.eos_token_id,
        "mask": mask_tokens(TOKENIZER, 1)[0],
    }
    sizes = ModelSizes(
        vocab_size=len(TOKENIZER),
        num_users=WORDS.num_users,
        num_items=WORDS.num_items,
        num_masks=NUM_MASKS,
        special=special,
    )
    small = Model(
        **{
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "heads": 2,
            "ffn": 32,
            "init_std": 0.2,
            "max_tokens": 128,
            **shape,
        }
    )
    return build_model(small, sizes).eval()


@pytest.fixture(scope="module")
def model():
    return a_model()


def engine_loss(model, batch: Batch, tokens_per_target: float = 1.0) -> torch.Tensor:
    """The summed loss as the engines compute it."""
    return model(inputs=batch, tokens_per_target=tokens_per_target)


def loss_and_gradient(model, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """The loss of a step per target token, and the gradient of all parameters."""
    tokens = sum(batch.num_target_tokens for batch in batches)
    rate = tokens / sum(batch.num_targets for batch in batches)
    model.zero_grad()
    value = 0.0
    for batch in batches:
        loss = engine_loss(model, batch, rate) / tokens
        loss.backward()
        value += loss.item()
    return value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same_learning(model, batches: list[Batch], expected: tuple[float, torch.Tensor]) -> None:
    """Loss and gradient are `expected` to 1e-5."""
    loss, gradient = loss_and_gradient(model, batches)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() <= 1e-5 * expected[1].norm()
