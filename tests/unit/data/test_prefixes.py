"""Samples of one user behind one encoded sequence: those of every-prefix, to which a causal encoder
gives the same loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_cases import (
    CODES,
    PAD,
    TOKENIZER,
    TRAINING_CODES,
    WHOLE,
    WORDS,
    Lists,
    a_model,
    marked_sequences,
    whole_step,
)
from genrec_shards.storage.sample_order import split_among_ranks

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import IGNORED, Batch, dummy_batch
from genrec_dist.data.collate import make_step
from genrec_dist.data.encoder_input import EncoderInput, Layout, encode_histories
from genrec_dist.data.prefix_samples import cut_prefixes
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.inference.load import load_run
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.run import train


def causal(max_tokens=90, user_ids=True, unit="subword") -> Layout:
    return Layout(WORDS, PAD, max_tokens, user_ids, "from-start", unit, causal=True)


def make_model(
    unit: str, user_ids: bool = True, start: str = "mask"
) -> GenRecForConditionalGeneration:
    return a_model(
        encoder_layers=2, max_tokens=90, encoder_attention="causal", item_loss=0.5,
        encoder_unit=unit, user_ids=user_ids, decoder_start=start,
    )  # fmt: skip


def step_of(source, space, where, *, every, packed, budget=WHOLE, samples=None):
    samples = whole_step(source, space) if samples is None else samples
    return make_step(
        samples, source, where, mask=None, seed=3, epoch=0, micro_batch_tokens=budget, packed=packed, item_targets=True,
        all_prefixes=every,
    )  # fmt: skip


def loss_and_gradient(model, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    tokens, targets = (
        sum(getattr(batch, name) for batch in batches)
        for name in ("num_target_tokens", "num_targets")
    )
    model.zero_grad()
    value = 0.0
    for batch in batches:
        loss = model(
            **vars(batch.encoder), encoder_row=batch.encoder_row, decoder_input_ids=batch.decoder_input_ids,
            labels=batch.labels, packing=batch.packing, visible=batch.visible, item_targets=batch.item_targets,
            tokens_a_target=tokens / targets,
        ) / tokens  # fmt: skip
        loss.backward()
        value += loss.item()
    return value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


LAYOUTS = [
    causal(),
    causal(WORDS.longest_user + 2 + 2 * WORDS.longest_item),
    causal(6, unit="item"),
    causal(20, False, "item"),
]


@pytest.mark.parametrize("start", ["mask", "state"])
@pytest.mark.parametrize("where", LAYOUTS, ids=["wide", "tight", "items", "items-no-user"])
def test_shared_samples_teach_what_samples_alone_do(where, start):
    """Loss and every gradient, packed and padded, also where histories are longer than what is
    read."""
    source = marked_sequences()
    model = make_model(where.unit, where.user_ids, start)
    alone = step_of(source, "every-prefix", where, every=False, packed=False).micro_batches
    loss, gradient = loss_and_gradient(model, alone)
    positions = sum(int(batch.encoder.attention_mask.sum()) for batch in alone)
    for packed, budget in ((False, WHOLE), (True, WHOLE), (True, 90), (False, 120)):
        shared = step_of(
            source, "user", where, every=True, packed=packed, budget=budget
        ).micro_batches
        other_loss, other_gradient = loss_and_gradient(model, shared)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()
        for count in ("num_target_tokens", "num_targets"):
            assert sum(getattr(b, count) for b in shared) == sum(
                getattr(b, count) for b in alone
            ), count
    assert sum(b.work.inputs for b in shared) < 0.8 * positions


@pytest.mark.parametrize("start", ["mask", "state"])
def test_the_padded_rows_are_those_of_a_model_asked_one_by_one(start):
    """Against the encoder input of evaluation: each history by itself, its next item asked."""
    source, where = marked_sequences(), causal()
    model = make_model("subword", start=start)
    loss, _ = loss_and_gradient(
        model, step_of(source, "user", where, every=True, packed=True).micro_batches
    )
    total, tokens, named, targets = 0.0, 0, 0.0, 0
    for user, sequence in enumerate(source.sequences):
        for place in range(1, len(sequence) - 2):
            history = np.array(sequence[:place], np.int32)
            encoder = encode_histories(history, np.array([0, place]), np.array([user]), where)
            memory = model.encode(encoder)
            word = WORDS.item_words(np.array([sequence[place]]))[0]
            label = torch.tensor(
                [
                    [
                        *WORDS.tokens[WORDS.offsets[word] : WORDS.offsets[word + 1]].tolist(),
                        TOKENIZER.eos_token_id,
                    ]
                ]
            )
            inputs = torch.cat([torch.tensor([[TOKENIZER.mask_token_id]]), label[:, :-1]], 1)
            state = memory[:, -1] if start == "state" else None
            logits = (
                model.decode(inputs, memory, encoder.attention_mask, state) @ model.head_weight.T
            )
            total += torch.nn.functional.cross_entropy(logits[0], label[0], reduction="sum").item()
            tokens += label.numel()
            named += torch.nn.functional.cross_entropy(
                model.item_logits(memory[:, -1]), torch.tensor([sequence[place]]), reduction="sum"
            ).item()
            targets += 1
    assert loss == pytest.approx(total / tokens + 0.5 * named / targets, rel=1e-5)


def test_nothing_behind_a_position_moves_what_is_encoded_of_it():
    model, where = make_model("item"), causal(unit="item")
    items = np.array([3, 1, 4, 5, 9], np.int32)
    whole = model.encode(encode_histories(items, np.array([0, 5]), np.array([2]), where))
    part = model.encode(encode_histories(items[:3], np.array([0, 3]), np.array([2]), where))
    torch.testing.assert_close(whole[:, :5], part, rtol=1e-6, atol=1e-6)
    other = items.copy()
    other[4] = 7
    assert not torch.equal(
        whole[:, -1],
        model.encode(encode_histories(other, np.array([0, 5]), np.array([2]), where))[:, -1],
    )


def test_each_target_reads_what_fits_of_its_history():
    where = causal(2 + 3, unit="item")  # <s>, user, three items
    items = np.arange(10, dtype=np.int32)
    cut = cut_prefixes(
        items, np.array([0, 7]), np.array([7, 10]), np.array([0, 1]), where, every=True
    )
    assert cut.sample_P.tolist() == [0, 0, 0, 0, 1]
    assert list(zip(cut.starts_P.tolist(), cut.ends_P.tolist(), strict=True)) == [
        (0, 3),
        (1, 4),
        (2, 5),
        (3, 6),
        (7, 9),
    ]
    assert cut.targets_R.tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert cut.visible_R.tolist() == [3, 4, 5, 5, 5, 5, 3, 4]
    assert cut.tokens_P.tolist() == [5, 5, 5, 5, 4]
    assert cut.first_P.tolist() == [True, False, False, False, True]
    last = cut_prefixes(
        items, np.array([0, 7]), np.array([7, 10]), np.array([0, 1]), where, every=False
    )
    assert list(zip(last.starts_P.tolist(), last.ends_P.tolist(), strict=True)) == [(3, 6), (7, 9)]
    assert last.targets_R.tolist() == [6, 9]


def test_users_of_one_item_teach_nothing_and_are_no_error():
    source = Lists([[0, 16, 17], [1, 18, 19], [2, 3, 20, 21]])
    for packed in (False, True):
        step = step_of(source, "user", causal(), every=True, packed=packed, budget=8)
        assert (step.num_samples, step.num_targets) == (3, 1)
        assert len(step.micro_batches) > 1
        loss, gradient = loss_and_gradient(make_model("subword"), step.micro_batches)
        assert np.isfinite(loss)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
def test_no_held_out_item_is_seen_or_learned(packed):
    source = marked_sequences()
    markers = set(range(len(TRAINING_CODES), len(CODES)))
    for batch in step_of(
        source, "user", causal(), every=True, packed=packed, budget=300
    ).micro_batches:
        assert not markers & set((batch.encoder.item_rows - 1).unique().tolist())
        assert not markers & set(batch.item_targets.items_R.tolist())


def test_samples_that_even_out_ranks_are_not_learned_from():
    source, where = marked_sequences(), causal()
    samples = whole_step(source, "user")[:10]
    whole = step_of(source, "user", where, every=True, packed=True, samples=samples)
    parts = [
        step_of(
            source,
            "user",
            where,
            every=True,
            packed=True,
            samples=split_among_ranks(samples, rank, 3),
        )
        for rank in range(3)
    ]
    assert sum(part.num_padding for part in parts) == 2
    for count in ("num_targets", "num_target_tokens", "num_samples"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count), count
    assert sum(part.samples_digest for part in parts) % 2**64 == whole.samples_digest % 2**64

    def learned(steps):
        items = [
            item
            for step in steps
            for batch in step.micro_batches
            for item in batch.item_targets.items_R.tolist()
        ]
        return sorted(item for item in items if item != IGNORED)

    assert learned(parts) == learned([whole])


@pytest.mark.parametrize("packed", [False, True])
def test_an_idle_batch_goes_through_the_layers_and_teaches_nothing(packed):
    model = make_model("item")
    step = step_of(marked_sequences(), "user", causal(unit="item"), every=True, packed=packed)
    dummy = dummy_batch(step.micro_batches[-1])
    model.zero_grad()
    model(
        **vars(dummy.encoder), encoder_row=dummy.encoder_row, decoder_input_ids=dummy.decoder_input_ids, labels=dummy.labels,
        packing=dummy.packing, visible=dummy.visible, item_targets=dummy.item_targets,
    ).backward()  # fmt: skip
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_padded_search_lists_what_each_user_alone_is_listed():
    model, where = make_model("subword", start="state"), causal()
    searcher = TrieSearcher(model, build_trie(*WORDS.tokens_of_items()))
    histories = [[3, 1, 4, 5], [], [9]]
    items = np.array([item for history in histories for item in history], np.int32)
    together = encode_histories(
        items, np.cumsum([0, *map(len, histories)]), np.array([0, 1, -1]), where
    )
    assert isinstance(together, EncoderInput)
    found = searcher.search(together, beam=20, top=10)
    for row, (history, user) in enumerate(zip(histories, (0, 1, -1), strict=True)):
        alone = encode_histories(
            np.array(history, np.int32), np.array([0, len(history)]), np.array([user]), where
        )
        np.testing.assert_array_equal(
            searcher.search(alone, beam=20, top=10).items[0], found.items[row]
        )


def test_a_run_of_shared_samples_learns_and_is_loaded(tiny_recipe):
    recipe = load_recipe(
        tiny_recipe,
        [
            "model.encoder_attention=causal",
            "model.encoder_unit=item",
            "finetune.targets=all-prefixes",
            "model.item_loss=0.3",
            "pretrain.epochs=0",
        ],
    )
    run = load_run(train(recipe))
    assert run.layout == replace(run.layout, causal=True, unit="item")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["finetune.targets=all-prefixes"],
            r"finetune\.targets all-prefixes: set model\.encoder_attention causal",
        ),
        (
            ["model.encoder_attention=causal", "pretrain.epochs=1"],
            r"pretrain\.targets mask: a causal encoder",
        ),
        (
            ["model.encoder_attention=causal", "pretrain.epochs=0", "model.positions=from-end"],
            r"model\.positions from-end: under causal",
        ),
    ],
)
def test_what_a_causal_encoder_cannot_have_is_refused(tiny_recipe, overrides, told):
    with pytest.raises(ValueError, match=told):
        load_recipe(tiny_recipe, overrides)
