"""One encoder position per item: what it adds up, what learns, and that searches agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_cases import (
    CODES,
    PAD,
    TOKENIZER,
    USER_CODES,
    WORDS,
    Lists,
    a_model,
    batches_of,
    layout,
    marked_sequences,
    whole_step,
)
from torch.nn import functional as F

from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.word_table import item_text, user_text
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie

BY_ITEMS = layout(64, unit="item")


def encoded(histories: list[list[int]], users: list[int]):
    items, offsets = Lists(histories).gather(range(len(histories)))
    return encode_histories(items, offsets, np.array(users), BY_ITEMS)


@pytest.fixture(scope="module")
def model():
    return a_model(max_tokens=64, encoder_unit="item", scale_embedding=True)


def test_a_position_is_the_sum_of_its_words_sub_words(model):
    """Each with BART's scale, and one position and id embedding (X = sum of EMB(S) + PosEMB +
    IDEMB)."""
    longest = int(np.argmax(WORDS.lengths[WORDS.item_words(np.arange(len(CODES)))]))
    user, items = 3, [4, longest, 0]
    encoder = encoded([items], [user])
    item_texts = [item_text(CODES[item]) for item in items]
    texts = ["<s>", user_text(USER_CODES[user]), *item_texts, "<mask>", "</s>"]
    assert encoder.input_ids.shape == (1, len(texts))
    tokens, places = model.model.shared.weight, model.model.encoder.embed_positions.weight
    ids = [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]
    assert max(map(len, ids)) > 2, "nothing was summed"
    rows = [tokens[each].sum(0) * 16**0.5 + places[row + 2] for row, each in enumerate(ids)]
    rows[1] = rows[1] + model.user_embedding.weight[user + 1]
    for number, item in enumerate(items):
        rows[2 + number] = rows[2 + number] + model.item_embedding.weight[item + 1]
    expected = torch.stack(rows)
    torch.testing.assert_close(model.embed(encoder)[0], expected)
    normed = F.layer_norm(expected, (16,), *model.model.encoder.layernorm_embedding.parameters())
    torch.testing.assert_close(model.embed(encoder, normed=True)[0], normed)


@pytest.mark.parametrize("start", ["mask", "state"])
def test_a_static_search_and_one_user_alone_list_the_same(start):
    """Also where users who fill up the shape have states to start from."""
    model = a_model(max_tokens=64, encoder_unit="item", decoder_start=start)
    histories, users = [[4, 12, 0], [], list(range(15))], [1, -1, 2]
    trie = build_trie(*WORDS.tokens_of_items())
    plain, static = (
        TrieSearcher(model, trie, static=static).search(encoded(histories, users), beam=30, top=10)
        for static in (False, True)
    )
    np.testing.assert_array_equal(plain.items, static.items)
    for row, (history, user) in enumerate(zip(histories, users, strict=True)):
        alone = TrieSearcher(model, trie).search(encoded([history], [user]), beam=30, top=10)
        np.testing.assert_array_equal(alone.items[0], plain.items[row])


def test_sub_words_after_the_first_learn(model):
    """A sub-word that never comes first in its word gets its gradient by the sum alone."""
    source = marked_sequences()
    batch = batches_of(whole_step(source, "last"), source, BY_ITEMS)[0]
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
