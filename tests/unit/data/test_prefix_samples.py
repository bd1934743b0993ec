"""Samples of one user in one encoded sequence: those of every-prefix, to which a causal encoder
gives the same loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_cases import (
    CODES,
    TIGHT,
    TOKENIZER,
    TRAINING_CODES,
    WHOLE,
    WORDS,
    Lists,
    a_model,
    assert_same_learning,
    engine_loss,
    layout,
    loss_and_gradient,
    marked_sequences,
    step_of,
    whole_step,
)
from genrec_shards.storage.sample_order import split_among_ranks
from torch.nn import functional as F

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import IGNORED, dummy_batch
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.layout import Layout
from genrec_dist.data.samples.prefix_samples import prefix_segments
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.inference.load import load_run
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.run import train

COUNTS = ("num_target_tokens", "num_targets")


def causal(max_tokens=90, user_ids=True, unit="subword") -> Layout:
    return layout(max_tokens, user_ids, unit=unit, causal=True)


def make_model(where: Layout, start: str = "mask") -> GenRecForConditionalGeneration:
    return a_model(
        encoder_layers=2,
        max_tokens=90,
        encoder_attention="causal",
        item_loss=0.5,
        encoder_unit=where.unit,
        user_ids=where.user_ids,
        decoder_start=start,
    )


def prefixes_of(source, where, *, all_prefixes=True, samples=None, **options):
    space = "user" if all_prefixes else "every-prefix"
    samples = whole_step(source, space) if samples is None else samples
    return step_of(samples, source, where, item_targets=True, all_prefixes=all_prefixes, **options)


def encoded(histories: list[list[int]], users: list[int], where: Layout):
    items, offsets = Lists(histories).gather(range(len(histories)))
    return encode_histories(items, offsets, np.array(users), where)


LAYOUTS = {
    "wide": causal(),
    "tight": causal(TIGHT),
    "items": causal(6, unit="item"),
    "items-no-user": causal(20, False, "item"),
}


@pytest.mark.parametrize("start", ["mask", "state"])
@pytest.mark.parametrize("where", LAYOUTS.values(), ids=LAYOUTS)
def test_shared_samples_teach_what_samples_alone_do(where, start):
    """Loss and every gradient, packed and padded, also where histories are longer than what is
    read."""
    source, model = marked_sequences(), make_model(where, start)
    alone = prefixes_of(source, where, all_prefixes=False).micro_batches
    expected = loss_and_gradient(model, alone)
    for packed, budget in ((False, WHOLE), (True, WHOLE), (True, 90), (False, 120)):
        shared = prefixes_of(source, where, packed=packed, budget=budget).micro_batches
        assert_same_learning(model, shared, expected)
        for count in COUNTS:
            sums = [sum(getattr(batch, count) for batch in each) for each in (shared, alone)]
            assert sums[0] == sums[1], count
    positions = sum(int(batch.encoder.attention_mask.sum()) for batch in alone)
    assert sum(batch.work.inputs for batch in shared) < 0.8 * positions


@pytest.mark.parametrize("start", ["mask", "state"])
def test_the_loss_is_that_of_histories_encoded_one_by_one(start):
    """Against the encoder input of evaluation: each history by itself, and its next item."""
    source, where = marked_sequences(), causal()
    model = make_model(where, start)
    loss, _ = loss_and_gradient(model, prefixes_of(source, where, packed=True).micro_batches)
    total, tokens, item_total, targets = 0.0, 0, 0.0, 0
    for user, sequence in enumerate(source.sequences):
        for place in range(1, len(sequence) - 2):
            encoder = encoded([sequence[:place]], [user], where)
            memory, item = model.encode(encoder), sequence[place]
            word = WORDS.item_words(np.array([item]))[0]
            own = WORDS.tokens[WORDS.offsets[word] : WORDS.offsets[word + 1]].tolist()
            labels = torch.tensor([[*own, TOKENIZER.eos_token_id]])
            inputs = torch.tensor([[TOKENIZER.mask_token_id, *own]])
            state = memory[:, -1] if start == "state" else None
            hidden = model.decode(inputs, memory, encoder.attention_mask, state)
            logits = hidden[0] @ model.head_weight.T
            total += F.cross_entropy(logits, labels[0], reduction="sum").item()
            tokens += labels.numel()
            item_logits = model.item_logits(memory[:, -1])
            item_total += F.cross_entropy(item_logits, torch.tensor([item])).item()
            targets += 1
    assert loss == pytest.approx(total / tokens + 0.5 * item_total / targets, rel=1e-5)


def test_prefix_segments_hold_what_fits_of_each_history():
    where = causal(2 + 3, unit="item")  # <s>, user, three items
    items, starts, ends = np.arange(10, dtype=np.int32), np.array([0, 7]), np.array([7, 10])
    every = prefix_segments(items, starts, ends, np.array([0, 1]), where, all_prefixes=True)
    assert every.sample_P.tolist() == [0, 0, 0, 0, 1]
    assert every.starts_P.tolist() == [0, 1, 2, 3, 7]
    assert every.ends_P.tolist() == [3, 4, 5, 6, 9]
    assert every.targets_R.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert every.visible_R.tolist() == [3, 4, 5, 5, 5, 5, 3, 4]
    assert every.tokens_P.tolist() == [5, 5, 5, 5, 4]
    assert every.first_P.tolist() == [True, False, False, False, True]
    last = prefix_segments(items, starts, ends, np.array([0, 1]), where, all_prefixes=False)
    assert (last.starts_P.tolist(), last.ends_P.tolist()) == ([3, 7], [6, 9])
    assert last.targets_R.tolist() == [6, 9]


def test_shared_windows_begin_every_half_of_the_room():
    where = causal(1 + 4, user_ids=False, unit="item")  # <s> and four items
    items, starts, ends = np.arange(16, dtype=np.int32), np.array([0, 10]), np.array([10, 16])
    found = prefix_segments(
        items, starts, ends, np.array([0, 1]), where, all_prefixes=True, share_windows=True
    )
    assert found.sample_P.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.starts_P.tolist() == [0, 2, 4, 6, 10, 12]
    assert found.ends_P.tolist() == [4, 6, 8, 9, 14, 15]
    assert found.targets_R.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15]
    assert found.visible_R.tolist() == [2, 3, 4, 5, 4, 5, 4, 5, 4, 2, 3, 4, 5, 4]
    assert found.tokens_P.tolist() == [5, 5, 5, 4, 5, 4]
    assert found.learned_R.all()


@pytest.mark.parametrize("unit", ["item", "subword"])
def test_shared_windows_hold_half_of_the_room_or_more_and_each_target_once(unit):
    where = causal(17 if unit == "item" else 60, unit=unit)
    lengths = np.random.default_rng(5).integers(2, 120, 40)
    ends = np.cumsum(lengths)
    starts, users = ends - lengths, np.arange(40) % len(TRAINING_CODES)
    items = np.random.default_rng(6).integers(0, 20, ends[-1]).astype(np.int32)
    options = {"all_prefixes": True}
    own = prefix_segments(items, starts, ends, users, where, **options)
    found = prefix_segments(items, starts, ends, users, where, share_windows=True, **options)
    assert sorted(found.targets_R) == sorted(own.targets_R)
    assert found.tokens_P.max() <= where.max_tokens
    assert found.tokens_P.sum() < own.tokens_P.sum() / 4
    read_own = dict(zip(own.targets_R, own.visible_R, strict=True))
    for target, read in zip(found.targets_R, found.visible_R, strict=True):
        least = (read_own[target] - 8) / 2 - where.longest_item
        assert least <= read <= read_own[target]


@pytest.mark.parametrize("packed", [False, True])
def test_users_of_one_item_teach_nothing_and_are_no_error(packed):
    source = Lists([[0, 16, 17], [1, 18, 19], [2, 3, 20, 21]])
    step = prefixes_of(source, causal(), packed=packed, budget=8)
    assert (step.num_samples, step.num_targets) == (3, 1)
    assert len(step.micro_batches) > 1
    loss, gradient = loss_and_gradient(make_model(causal()), step.micro_batches)
    assert np.isfinite(loss)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
def test_prefix_samples_show_and_learn_no_held_out_item(packed):
    markers = set(range(len(TRAINING_CODES), len(CODES)))
    step = prefixes_of(marked_sequences(), causal(), packed=packed, budget=300)
    for batch in step.micro_batches:
        assert not markers & set((batch.encoder.item_rows - 1).unique().tolist())
        assert not markers & set(batch.item_targets.items_R.tolist())


def test_samples_that_even_out_ranks_are_not_learned_from():
    source, where = marked_sequences(), causal()
    samples = whole_step(source, "user")[:10]
    shares = [split_among_ranks(samples, rank, 3) for rank in range(3)]
    whole, *parts = (
        prefixes_of(source, where, packed=True, samples=each) for each in (samples, *shares)
    )
    assert sum(part.num_padding for part in parts) == 2
    for count in (*COUNTS, "num_samples"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count), count
    assert sum(part.samples_digest for part in parts) % 2**64 == whole.samples_digest % 2**64

    def learned(steps):
        batches = [batch for step in steps for batch in step.micro_batches]
        items = [item for batch in batches for item in batch.item_targets.items_R.tolist()]
        return sorted(item for item in items if item != IGNORED)

    assert learned(parts) == learned([whole])


@pytest.mark.parametrize("packed", [False, True])
def test_a_dummy_batch_of_prefixes_has_no_gradient(packed):
    where = causal(unit="item")
    model, step = make_model(where), prefixes_of(marked_sequences(), where, packed=packed)
    model.zero_grad()
    engine_loss(model, dummy_batch(step.micro_batches[-1])).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_padded_search_lists_what_each_user_alone_is_listed():
    where = causal()
    searcher = TrieSearcher(make_model(where, "state"), build_trie(*WORDS.tokens_of_items()))
    histories, users = [[3, 1, 4, 5], [], [9]], [0, 1, -1]
    found = searcher.search(encoded(histories, users, where), beam=20, top=10)
    for row, (history, user) in enumerate(zip(histories, users, strict=True)):
        alone = searcher.search(encoded([history], [user], where), beam=20, top=10)
        np.testing.assert_array_equal(alone.items[0], found.items[row])


def test_a_run_of_prefix_samples_learns_and_is_loaded(tiny_recipe):
    overrides = [
        "model.encoder_attention=causal",
        "model.encoder_unit=item",
        "finetune.targets=all-prefixes",
        "model.item_loss=0.3",
        "pretrain.epochs=0",
    ]
    run = load_run(train(load_recipe(tiny_recipe, overrides)))
    assert run.layout == replace(run.layout, causal=True, unit="item")


CAUSAL = "model.encoder_attention=causal"
REFUSED = [
    (
        ["finetune.targets=all-prefixes"],
        r"finetune\.targets all-prefixes: set model\.encoder_attention causal",
    ),
    ([CAUSAL, "pretrain.epochs=1"], r"pretrain\.targets mask: a causal encoder"),
    (
        [CAUSAL, "pretrain.epochs=0", "model.positions=from-end"],
        r"model\.positions from-end: under causal",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_load_recipe_refuses_what_a_causal_encoder_cannot_have(tiny_recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(tiny_recipe, overrides)
