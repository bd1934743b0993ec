"""Batches: no held-out item in any array, no input that the target changes, and the text they stand
for."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from batch_cases import (
    CODES,
    MASKS,
    NUM_MASKS,
    PAD,
    SPACES,
    TIGHT,
    TOKENIZER,
    TRAINING_CODES,
    USER_CODES,
    WHOLE,
    WORDS,
    Lists,
    a_model,
    assert_same_learning,
    batches_of,
    cases,
    engine_loss,
    layout,
    loss_and_gradient,
    marked_sequences,
    model,
    step_of,
    whole_step,
)
from genrec_shards.sequences import offsets_of
from genrec_shards.storage.sample_order import split_among_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.config.recipe import Mask
from genrec_dist.data.batch import IGNORED, Batch, dummy_batch
from genrec_dist.data.collate import WORTH_A_BATCH, padding_worth_a_batch, target_batch
from genrec_dist.data.encoder_input import EncoderInput, encode_histories
from genrec_dist.data.layout import Layout
from genrec_dist.data.samples.step import choose_targets, split_packed, split_padded
from genrec_dist.data.word_table import build_words, item_text, user_text

__all__ = ["model"]

COUNTS = ("num_samples", "num_target_tokens", "num_targets", "num_tokens")
by_strategy = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
by_case = pytest.mark.parametrize(("space", "mask"), cases())


def side_by_side(batch: Batch) -> Batch:
    """A packed batch as a padded one, without the sequence that fills it up."""
    packing = batch.packing

    def rows(values: torch.Tensor, segments, fill: int) -> torch.Tensor:
        parts = values.split(segments.lengths.tolist())[:-1]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    encoder = EncoderInput(
        **{
            name: rows(values, packing.encoder, PAD if name == "input_ids" else 0)
            for name, values in arrays(batch.encoder).items()
        }
    )
    labels = rows(batch.labels, packing.rows, IGNORED)
    inputs = rows(batch.decoder_input_ids, packing.rows, PAD)
    return replace(batch, encoder=encoder, labels=labels, decoder_input_ids=inputs, packing=None)


def arrays(part) -> dict[str, torch.Tensor]:
    values = {item.name: getattr(part, item.name) for item in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def assert_same_inputs(first: Batch, second: Batch) -> None:
    for name, value in arrays(first.encoder).items():
        assert torch.equal(value, getattr(second.encoder, name)), name
    assert torch.equal(first.encoder_row, second.encoder_row)


def assert_same_counts(batches: list[Batch], others: list[Batch]) -> None:
    for count in COUNTS:
        sums = [sum(getattr(batch, count) for batch in each) for each in (batches, others)]
        assert sums[0] == sums[1], count


# No leak.


@pytest.mark.parametrize("trained_through", ["n-2", "n-1"])
@pytest.mark.parametrize("max_tokens", [512, TIGHT])
@by_case
def test_make_step_shows_and_learns_no_held_out_item(space, mask, max_tokens, trained_through):
    source = marked_sequences(trained_through)
    marker_rows = set(range(len(TRAINING_CODES) + 1, len(CODES) + 1))
    marker_tokens = {token for name, token in TOKENIZER.get_vocab().items() if "z" in name}
    learned = set()
    for epoch in range(4):
        samples = whole_step(source, space, trained_through, epoch)
        for batch in batches_of(samples, source, layout(max_tokens), mask, epoch, budget=300):
            assert not marker_rows & set(batch.encoder.item_rows.unique().tolist())
            for tokens in (batch.encoder.input_ids, batch.decoder_input_ids, batch.labels):
                assert not marker_tokens & set(tokens.unique().tolist())
            learned |= set(batch.labels.unique().tolist())
    assert len(learned) > 5
    # As training items the markers would be seen.
    (batch,) = batches_of(whole_step(marked_sequences(), "last", "n-1"), marked_sequences())
    assert marker_tokens & set(batch.labels.unique().tolist())


@pytest.mark.parametrize(
    "where", [layout(), layout(TIGHT), layout(user_ids=False)], ids=["wide", "tight", "no-user"]
)
@by_case
def test_another_target_of_any_length_changes_no_input(space, mask, where):
    source = marked_sequences()
    samples = whole_step(source, space)[:30]
    lengths = WORDS.lengths[WORDS.item_words(np.arange(len(TRAINING_CODES)))]
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())
    assert lengths[longest] - lengths[shortest] >= 2
    positions = samples.target_positions[:, None]
    if mask is not None:
        positions = choose_targets(samples, where, mask, 3, 0).positions_BK
    for index in range(len(samples)):
        user, alone = int(samples.user_rows[index]), samples[index : index + 1]
        seen = []
        for item in (shortest, longest):
            changed = Lists([list(row) for row in source.sequences])
            for position in positions[index][positions[index] >= 0]:
                changed.sequences[user][position] = item
            seen += batches_of(alone, changed, where, mask)
        first, second = seen
        assert_same_inputs(first, second)
        assert torch.equal(first.decoder_input_ids[:, 0], second.decoder_input_ids[:, 0])
        assert first.labels.shape[1] < second.labels.shape[1]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("where", [layout(), layout(TIGHT)], ids=["wide", "tight"])
@by_strategy
def test_other_targets_of_a_step_change_neither_inputs_nor_the_split(mask, where, packed):
    source = marked_sequences()
    samples = whole_step(source, "user")
    positions = choose_targets(samples, where, mask, 3, 0).positions_BK
    changed = Lists([list(row) for row in source.sequences])
    rng = np.random.default_rng(5)
    for user, row in zip(samples.user_rows, positions, strict=True):
        for position in row[row >= 0]:
            changed.sequences[user][position] = int(rng.integers(len(TRAINING_CODES)))
    before, after = (
        batches_of(samples, each, where, mask, budget=150, packed=packed)
        for each in (source, changed)
    )
    assert len(before) == len(after) > 1
    for first, second in zip(before, after, strict=True):
        assert_same_inputs(first, second)


# Against the text, sentence by sentence.


def sentence(user: int | None, words: list, where: Layout) -> tuple:
    """(input ids, positions, user rows, item rows) of one row; `words` are item rows and mask
    names, oldest first."""
    lengths = {word: len(_ids(_text(word))) for word in words}
    user_ids = _ids(user_text(USER_CODES[user])) if user is not None else []
    while 2 + len(user_ids) + sum(lengths[word] for word in words) > where.max_tokens:
        words = words[1:]
    ids = [*_ids("<s>"), *user_ids, *_ids("".join(map(_text, words)) + "</s>")]
    item_rows = [0] + [0] * len(user_ids)
    for word in words:
        item_rows += [word + 1 if isinstance(word, int) else 0] * lengths[word]
    positions = list(range(len(ids)))
    if where.positions == "from-end":
        positions = positions[::-1]
    user_rows = np.zeros(len(ids), int)
    user_rows[1 : 1 + len(user_ids)] = 0 if user is None else user + 1
    return tuple(ids), tuple(positions), tuple(user_rows.tolist()), (*item_rows, 0)


def _text(word) -> str:
    return item_text(CODES[word]) if isinstance(word, int) else word


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def decoder_row(mask_name: str, items: list[int]) -> tuple:
    labels = _ids("".join(item_text(CODES[item]) for item in items) + "</s>")
    return tuple(_ids(mask_name) + labels[:-1]), tuple(labels)


def expected_sample(samples, index: int, source: Lists, where: Layout, mask: Mask | None) -> tuple:
    """One sample in plain Python: its sentence, and its decoder rows."""
    user = int(samples.user_rows[index])
    training = source.sequences[user][: samples.training_lengths[index]]
    shown_user = user if where.user_ids else None
    if mask is None:
        position = int(samples.target_positions[index])
        words = [*training[:position], "<mask>"]
        return sentence(shown_user, words, where), (decoder_row("<mask>", [training[position]]),)
    chosen = choose_targets(samples[index : index + 1], where, mask, 3, 0).positions_BK[0]
    places = [int(place) for place in chosen if place >= 0]
    if mask.strategy == "span":
        words = [*training[: places[0]], "<mask>", *training[places[-1] + 1 :]]
        row = decoder_row("<mask>", [training[p] for p in places])
        return sentence(shown_user, words, where), (row,)
    names = ["<mask>", *(f"<mask_{number}>" for number in range(1, len(places)))]
    words = list(training)
    for name, place in zip(names, places, strict=True):
        words[place] = name
    rows = (decoder_row(name, [training[p]]) for name, p in zip(names, places, strict=True))
    return sentence(shown_user, words, where), tuple(rows)


def read_back(batches: list[Batch]) -> list[tuple]:
    """What each sample of the batches is, padding taken off."""
    found = []
    for batch in batches:
        encoder = batch.encoder
        for row in range(len(encoder.input_ids)):
            length = int(encoder.attention_mask[row].sum())
            assert encoder.attention_mask[row, :length].all()
            parts = (encoder.input_ids, encoder.position_ids, encoder.user_rows, encoder.item_rows)
            assert (encoder.input_ids[row, length:] == PAD).all()
            assert not any(part[row, length:].any() for part in parts[1:])
            decoded = tuple(
                _decoder_row(batch, int(r)) for r in torch.nonzero(batch.encoder_row == row)[:, 0]
            )
            found.append((tuple(tuple(part[row, :length].tolist()) for part in parts), decoded))
    return found


def _decoder_row(batch: Batch, row: int) -> tuple:
    length = int((batch.labels[row] != IGNORED).sum())
    assert (batch.labels[row, length:] == IGNORED).all()
    assert batch.labels[row, length - 1] == TOKENIZER.eos_token_id
    assert (batch.decoder_input_ids[row] >= 0).all()
    # The mask that the row fills stands in the sentence: truncation never takes it.
    sentence_ids = batch.encoder.input_ids[batch.encoder_row[row]]
    assert (sentence_ids == batch.decoder_input_ids[row, 0]).sum() == 1
    return tuple(batch.decoder_input_ids[row, :length].tolist()), tuple(
        batch.labels[row, :length].tolist()
    )


@given(
    space=st.sampled_from(SPACES),
    mask=st.sampled_from(MASKS),
    max_tokens=st.sampled_from([TIGHT, TIGHT + 5, 60, 512]),
    user_ids=st.booleans(),
    positions=st.sampled_from(["from-start", "from-end"]),
    budget=st.sampled_from([1, 100, 400, WHOLE]),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None)
def test_make_step_holds_the_tokenised_text_of_each_sample(
    space, mask, max_tokens, user_ids, positions, budget, seed
):
    source = marked_sequences(seed=seed)
    samples = whole_step(source, space)
    where = layout(max_tokens, user_ids, positions)
    used = mask if space == "user" else None
    expected = [
        expected_sample(samples, index, source, where, used) for index in range(len(samples))
    ]
    batches = batches_of(samples, source, where, used, budget=budget)
    assert sorted(read_back(batches)) == sorted(expected)
    for batch in batches:
        num_rows, num_columns = batch.encoder.input_ids.shape
        assert num_rows == 1 or num_rows * num_columns <= budget
        assert int(batch.encoder.attention_mask.sum(1).max()) == num_columns
        assert batch.num_tokens == int(batch.encoder.attention_mask.sum()) + batch.num_target_tokens
        assert batch.num_slots == batch.encoder.input_ids.numel() + batch.labels.numel()
    assert sum(batch.num_samples for batch in batches) == len(samples)


@given(
    histories=st.lists(
        st.lists(st.integers(0, len(CODES) - 1), max_size=9), min_size=1, max_size=6
    ),
    users=st.lists(st.integers(-1, len(USER_CODES) - 1), min_size=6, max_size=6),
    max_tokens=st.sampled_from([TIGHT, 512]),
    user_ids=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_encode_histories_is_what_finetuning_reads(histories, users, max_tokens, user_ids):
    where = layout(max_tokens, user_ids)
    users = users[: len(histories)]
    items, offsets = Lists(histories).gather(range(len(histories)))
    encoder = encode_histories(items, offsets, np.array(users), where)
    known = [user if user >= 0 and user_ids else None for user in users]
    expected = [
        (sentence(user, [*row, "<mask>"], where), ())
        for user, row in zip(known, histories, strict=True)
    ]
    none = torch.zeros(0)
    batch = Batch(encoder=encoder, encoder_row=none, decoder_input_ids=none, labels=none)
    assert read_back([batch]) == expected
    batch = target_batch(encoder, np.arange(len(histories)), where)
    rows = [(decoder_row("<mask>", [i]),) for i in range(len(histories))]
    assert [found for _, found in read_back([batch])] == rows
    assert batch.num_samples == len(histories)


def test_encode_histories_takes_nobody_and_names_rows_outside_the_catalogue():
    nobody = encode_histories(np.zeros(0, int), np.array([0]), np.zeros(0, int), layout())
    assert len(nobody.input_ids) == 0
    with pytest.raises(ValueError, match=f"item row {len(CODES)} is outside the table"):
        encode_histories(np.array([len(CODES)]), np.array([0, 1]), np.array([0]), layout())
    with pytest.raises(ValueError, match="user row 20 is outside the table"):
        encode_histories(np.array([0]), np.array([0, 1]), np.array([20]), layout())


# Micro-batches.


def is_worth_one(tokens_b: np.ndarray, budget: int) -> bool:
    rectangle = len(tokens_b) * tokens_b.max()
    return rectangle <= budget and rectangle - tokens_b.sum() <= WORTH_A_BATCH


def test_a_gpu_takes_more_padding_before_another_micro_batch():
    tokens_B = np.array([500] * 20 + [100] * 60)
    cuts = [
        len(split_padded(tokens_B, 65_536, padding_worth_a_batch(device, 128)))
        for device in ("cpu", "cuda")
    ]
    assert cuts == [2, 1]
    assert padding_worth_a_batch("cuda", 1024) < padding_worth_a_batch("cuda", 128)


@given(tokens=st.lists(st.integers(1, 500), min_size=1, max_size=200), budget=st.integers(1, 5000))
def test_splits_hold_each_sample_once_by_length_within_the_budget(tokens, budget):
    tokens_B = np.array(tokens)
    padded, packed = split_padded(tokens_B, budget), split_packed(tokens_B, budget)
    for parts in (padded, packed):
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
        for part, following in pairwise(parts):
            assert tokens_B[part].min() >= tokens_B[following].max()
    assert all(len(part) == 1 or is_worth_one(tokens_B[part], budget) for part in padded)
    # One more sample would not have been worth it, so no part is smaller than it needs to be.
    for part, following in pairwise(padded):
        assert not is_worth_one(tokens_B[[*part, following[0]]], budget)
    # Packed: as few parts as the budget allows, and even.
    sizes = [int(tokens_B[part].sum()) for part in packed]
    assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, packed, strict=True))
    if max(tokens) <= budget // 8:
        assert len(packed) <= -(-sum(tokens) * 8 // (budget * 7))
        assert max(sizes) - min(sizes) <= 2 * max(tokens)


def labelled(batches: list[Batch]) -> list[tuple]:
    """The samples that have a label, in order."""
    kept = []
    for batch in batches:
        rows_R = (batch.labels != IGNORED).any(dim=1)
        samples = torch.isin(torch.arange(len(batch.encoder.input_ids)), batch.encoder_row[rows_R])
        kept.append(
            replace(
                batch,
                encoder=batch.encoder.map(lambda values, samples=samples: values[samples]),
                encoder_row=(torch.cumsum(samples, 0) - 1)[batch.encoder_row[rows_R]],
                decoder_input_ids=batch.decoder_input_ids[rows_R],
                labels=batch.labels[rows_R],
            )
        )
    return sorted(read_back([batch for batch in kept if len(batch.labels)]))


@pytest.mark.parametrize("budget", [WHOLE, 150])
@by_case
def test_a_packed_batch_holds_what_a_padded_one_holds(space, mask, budget):
    source = marked_sequences()
    samples = split_among_ranks(whole_step(source, space), 1, 3)
    padded = batches_of(samples, source, layout(90), mask)
    packed = batches_of(samples, source, layout(90), mask, budget=budget, packed=True)
    unpacked = [side_by_side(batch) for batch in packed]
    assert labelled(unpacked) == labelled(padded)
    assert_same_counts(packed, padded)
    for batch in unpacked:
        assert torch.equal(batch.encoder.input_ids == PAD, ~batch.encoder.attention_mask)
    for batch in packed:
        assert batch.num_slots == len(batch.encoder.input_ids) + len(batch.labels)
        padding = slice(int(batch.packing.encoder.offsets[-2]), None)
        assert set(batch.encoder.input_ids[padding].tolist()) == {PAD}
        assert not batch.encoder.user_rows[padding].any()
        assert not batch.encoder.item_rows[padding].any()
        assert (batch.labels[int(batch.packing.rows.offsets[-2]) :] == IGNORED).all()


@by_case
def test_padding_samples_have_no_label_and_are_not_counted(space, mask):
    source = marked_sequences()
    samples = whole_step(source, space)
    samples = samples[: len(samples) - (len(samples) % 3 == 0)]
    whole = batches_of(samples, source, mask=mask)
    shares = [split_among_ranks(samples, rank, 3) for rank in range(3)]
    shared = [batch for share in shares for batch in batches_of(share, source, mask=mask)]
    assert_same_counts(shared, whole)
    assert sum(len(b.encoder.input_ids) for b in shared) > len(samples)
    for batch in shared:
        assert int((batch.labels != IGNORED).sum()) == batch.num_target_tokens
    assert labelled(shared) == sorted(read_back(whole))


@pytest.fixture(scope="module")
def item_model():
    return a_model(max_tokens=64, encoder_unit="item", scale_embedding=True)


LAYOUTS = {
    "sub-words": layout(90),
    "items": layout(64, unit="item"),
    "items-tight": layout(8, unit="item"),
    "items-no-user": layout(64, False, "from-end", "item"),
}


@pytest.mark.parametrize("where", LAYOUTS.values(), ids=LAYOUTS)
@by_case
def test_neither_split_nor_packing_changes_loss_and_gradient(model, item_model, space, mask, where):
    """To 1e-5 in float32, all parameters; also where rows share an encoded sequence and where
    sequences are cut."""
    network = model if where.unit == "subword" else item_model
    source = marked_sequences()
    samples = whole_step(source, space)[:40]
    expected = loss_and_gradient(network, batches_of(samples, source, where, mask))
    for budget, packed in ((60, False), (WHOLE, True), (60, True)):
        batches = batches_of(samples, source, where, mask, budget=budget, packed=packed)
        assert len(batches) > 1 or budget == WHOLE
        assert_same_learning(network, batches, expected)
    if where.unit == "item":
        assert all(b.encoder.further_ids.shape[-1] == where.num_further for b in batches)


@pytest.mark.parametrize("head", ["full", "chunked"])
@by_case
def test_packing_padding_samples_changes_neither_loss_nor_gradient(
    model, space, mask, head, monkeypatch
):
    monkeypatch.setattr(model, "loss_by", head)
    source = marked_sequences()
    samples = split_among_ranks(whole_step(source, space)[:38], 6, 7)
    assert samples.is_padding.any()
    expected = loss_and_gradient(model, batches_of(samples, source, layout(90), mask))
    batches = batches_of(samples, source, layout(90), mask, budget=150, packed=True)
    assert_same_learning(model, batches, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_dummy_batch_passes_through_the_layers_without_a_gradient(model, packed):
    source, multi = marked_sequences(), Mask("multi", k=NUM_MASKS)
    batches = batches_of(whole_step(source, "user"), source, mask=multi, packed=packed)
    dummy = dummy_batch(batches[-1])
    model.zero_grad()
    engine_loss(model, dummy).backward()
    touched = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(touched) == len(list(model.parameters()))
    assert not any(gradient.any() for gradient in touched)
    assert all(getattr(dummy, count) == 0 for count in COUNTS)


@by_strategy
def test_the_split_among_ranks_changes_neither_masks_nor_digest(mask):
    source = marked_sequences()
    samples = whole_step(source, "user")

    def read(part, epoch=0) -> list[tuple]:
        return read_back(batches_of(part, source, mask=mask, epoch=epoch))

    def digest_of(part, epoch=0) -> int:
        return step_of(part, source, epoch=epoch, mask=mask).samples_digest % 2**64

    halves = [split_among_ranks(samples, rank, 2) for rank in range(2)]
    assert not any(half.is_padding.any() for half in halves)
    assert sorted(sample for half in halves for sample in read(half)) == sorted(read(samples))
    assert sorted(read(samples, epoch=1)) != sorted(read(samples))
    # The same samples each epoch; all that differs are the masks drawn for them.
    digests = [digest_of(samples, epoch) for epoch in range(4)]
    assert len(set(digests)) == 4
    assert digest_of(samples[:-1]) != digests[0]
    for size in (1, 3):  # 20 samples on three ranks: one is repeated and does not count
        shares = [digest_of(split_among_ranks(samples, rank, size)) for rank in range(size)]
        assert sum(shares) % 2**64 == digests[0]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_moves_whole(packed):
    source = marked_sequences()
    samples = whole_step(source, "last")
    (batch,) = batches_of(samples, source, packed=packed, item_targets=True)
    moved = batch.to(torch.device("meta"))
    values = {**arrays(moved), **arrays(moved.encoder), **arrays(moved.item_targets)}
    if packed:
        values |= arrays(moved.packing) | arrays(moved.packing.encoder)
    assert all(value.device.type == "meta" for value in values.values())
    assert moved.num_samples == batch.num_samples


# Positions of items.


def test_one_position_per_item_is_cut_and_counted_by_items():
    where = layout(8, unit="item")
    items = np.arange(10, dtype=np.int32)
    encoder = encode_histories(items, offsets_of(np.array([10])), np.array([0]), where)
    assert encoder.input_ids.shape == (1, 8)
    assert encoder.item_rows[0].tolist() == [0, 0, 7, 8, 9, 10, 0, 0]
    assert where.sure_items == 5


@by_strategy
def test_inputs_of_one_position_per_item_are_as_long_as_they_have_items(mask):
    source = marked_sequences()
    samples = whole_step(source, "user")
    batches = batches_of(samples, source, layout(64, unit="item"), mask)
    items = int(samples.training_lengths.sum())
    positions = sum(int(batch.encoder.attention_mask.sum()) for batch in batches)
    hidden = sum(b.num_target_tokens for b in batches) if mask.strategy == "span" else 0
    assert positions <= items + 3 * len(samples)
    assert positions + hidden >= items + 3 * len(samples)


# Layouts that cannot be.


def test_layout_refuses_room_for_less_than_one_item():
    needed = WORDS.longest_user + 2 + WORDS.longest_item
    assert layout(needed).sure_items == 1
    assert layout(needed + WORDS.longest_item - 1).sure_items == 1
    assert layout(needed - WORDS.longest_user, user_ids=False).sure_items == 1
    assert layout(4, unit="item").sure_items == 1
    with pytest.raises(ValueError, match=f"model.max_tokens {needed - 1}: too few"):
        layout(needed - 1)
    with pytest.raises(
        ValueError, match=r"max_tokens 3: too few for the longest user and item, 1 and 1 positions"
    ):
        layout(3, unit="item")


def test_more_masks_than_the_words_have_are_not_taken_for_items():
    words = build_words(TOKENIZER, CODES, USER_CODES, 1)
    source = Lists([[1, 2, 3, 4, 5, 6, 7, 8, 100, 101]])
    where = Layout(words, PAD, 512, True, "from-start")
    with pytest.raises(AssertionError):
        batches_of(whole_step(source, "user"), source, where, Mask("multi", k=4))
