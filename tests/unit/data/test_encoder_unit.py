"""An encoder position an item: what stands there, what is cut, and that packing, padding and
searching see the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_cases import (
    CODES,
    MASKS,
    PAD,
    TOKENIZER,
    USER_CODES,
    WHOLE,
    WORDS,
    a_model,
    batches_of,
    cases,
    loss_and_gradient,
    marked_sequences,
    whole_step,
)
from torch.nn import functional as F

from genrec_dist.data.encoder_input import Layout, encode_histories
from genrec_dist.data.word_table import item_text, user_text
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.model.genrec import GenRecForConditionalGeneration


def by_items(max_tokens=64, user_ids=True, positions="from-start") -> Layout:
    return Layout(WORDS, PAD, max_tokens, user_ids, positions, "item")


@pytest.fixture(scope="module")
def model() -> GenRecForConditionalGeneration:
    return a_model(max_tokens=64, encoder_unit="item", scale_embedding=True)


def test_a_position_is_the_sum_of_its_words_sub_words(model):
    """Each with BART's scale, and one position and id embedding (X = sum of EMB(S) + PosEMB +
    IDEMB)."""
    longest = int(np.argmax(WORDS.lengths[WORDS.item_words(np.arange(len(CODES)))]))
    user, items = 3, [4, longest, 0]
    encoder = encode_histories(
        np.array(items, np.int32), np.array([0, 3]), np.array([user]), by_items()
    )
    texts = [
        "<s>",
        user_text(USER_CODES[user]),
        *(item_text(CODES[item]) for item in items),
        "<mask>",
        "</s>",
    ]
    assert encoder.input_ids.shape == (1, len(texts))
    tokens, places = model.model.shared.weight, model.model.encoder.embed_positions.weight
    expected = []
    for position, text in enumerate(texts):
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        expected.append(tokens[ids].sum(0) * 16**0.5 + places[position + 2])
    expected[1] = expected[1] + model.user_embedding.weight[user + 1]
    for number, item in enumerate(items):
        expected[2 + number] = expected[2 + number] + model.item_embedding.weight[item + 1]
    torch.testing.assert_close(model.embed(encoder)[0], torch.stack(expected))
    normed = F.layer_norm(
        torch.stack(expected), (16,), *model.model.encoder.layernorm_embedding.parameters()
    )
    torch.testing.assert_close(model.embed(encoder, normed=True)[0], normed)
    assert max(len(TOKENIZER.encode(text, add_special_tokens=False)) for text in texts) > 2, (
        "nothing was summed"
    )


def test_whole_oldest_items_go_where_there_are_more_than_fit():
    history = np.arange(10, dtype=np.int32)
    encoder = encode_histories(history, np.array([0, 10]), np.array([0]), by_items(max_tokens=8))
    assert encoder.input_ids.shape == (1, 8)
    assert encoder.item_rows[0].tolist() == [0, 0, 7, 8, 9, 10, 0, 0]
    assert by_items(max_tokens=8).sure_items == 5


def test_too_few_positions_for_an_item_are_refused():
    assert by_items(max_tokens=4).sure_items == 1
    with pytest.raises(
        ValueError, match=r"max_tokens 3: too few for the longest user and item, 1 and 1 positions"
    ):
        by_items(max_tokens=3)


@pytest.mark.parametrize(
    "where", [by_items(), by_items(8), by_items(user_ids=False, positions="from-end")]
)
@pytest.mark.parametrize(("space", "mask"), cases())
def test_packing_changes_neither_loss_nor_gradient(model, space, mask, where):
    source = marked_sequences()
    samples = whole_step(source, space)[:60]
    loss, gradient = loss_and_gradient(model, batches_of(samples, source, where, mask))
    for budget in (WHOLE, 64):
        batches = batches_of(samples, source, where, mask, budget=budget, packed=True)
        other_loss, other_gradient = loss_and_gradient(model, batches)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert all(batch.encoder.further_ids.shape[-1] == where.num_further for batch in batches)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
def test_inputs_are_as_long_as_they_have_items(mask):
    source = marked_sequences()
    samples = whole_step(source, "user")
    batches = batches_of(samples, source, by_items(), mask)
    items = int(samples.training_lengths.sum())
    positions = sum(int(batch.encoder.attention_mask.sum()) for batch in batches)
    hidden = 0 if mask.strategy != "span" else sum(int((b.labels != -100).sum()) for b in batches)
    assert positions <= items + 3 * len(samples)
    assert positions + hidden >= items + 3 * len(samples)


@pytest.mark.parametrize("start", ["mask", "state"])
def test_a_search_in_static_shapes_lists_the_same(start):
    """Also where users who fill up the shape have states to start from."""
    model = a_model(max_tokens=64, encoder_unit="item", decoder_start=start)
    histories = [[4, 12, 0], [], list(range(15))]
    items = np.array([item for history in histories for item in history], np.int32)
    encoder = encode_histories(
        items, np.cumsum([0, *map(len, histories)]), np.array([1, -1, 2]), by_items()
    )
    trie = build_trie(*WORDS.tokens_of_items())
    plain, static = (
        TrieSearcher(model, trie, static=static).search(encoder, beam=30, top=10)
        for static in (False, True)
    )
    np.testing.assert_array_equal(plain.items, static.items)
    for row, history in enumerate(histories):
        alone = encode_histories(
            np.array(history, np.int32),
            np.array([0, len(history)]),
            np.array([[1, -1, 2][row]]),
            by_items(),
        )
        found = TrieSearcher(model, trie).search(alone, beam=30, top=10)
        np.testing.assert_array_equal(found.items[0], plain.items[row])


def test_what_is_summed_beyond_the_first_sub_word_learns(model):
    """A sub-word that never comes first in its word gets its gradient by the sum alone."""
    source = marked_sequences()
    batch = batches_of(whole_step(source, "last"), source, by_items())[0]
    first = set(batch.encoder.input_ids.unique().tolist())
    later = sorted(set(batch.encoder.further_ids.unique().tolist()) - first - {PAD})
    assert later
    model.zero_grad()
    model.encode(batch.encoder).square().sum().backward()
    gradient = model.model.shared.weight.grad
    assert (gradient[later].abs().sum(1) > 0).all()
    assert not gradient[PAD].any()
    without = replace(batch.encoder, further_ids=torch.full_like(batch.encoder.further_ids, PAD))
    assert not torch.equal(model.encode(batch.encoder), model.encode(without))
