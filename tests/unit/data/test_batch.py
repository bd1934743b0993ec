"""Batches: no held-out item in any array, no input that the target moves, and the text they stand
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
    TOKENIZER,
    TRAINING_CODES,
    USER_CODES,
    WHOLE,
    WORDS,
    Lists,
    batches_of,
    cases,
    engine_loss,
    layout,
    loss_and_gradient,
    marked_sequences,
    model,  # noqa: F401
    whole_step,
)
from genrec_shards.storage.sample_order import StepSamples, split_among_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.config.recipe import Mask
from genrec_dist.data.batch import IGNORED, Batch, dummy_batch
from genrec_dist.data.collate import (
    WORTH_A_CUT,
    choose_targets,
    cut,
    cut_packed,
    make_step,
    target_batch,
)
from genrec_dist.data.encoder_input import EncoderInput, Layout, encode_histories
from genrec_dist.data.word_table import build_words, item_text, user_text

TIGHT = WORDS.longest_user + 2 + 2 * WORDS.longest_item


def unpacked(batch: Batch) -> Batch:
    """A packed batch with its sequences side by side, without the sample that fills it up."""
    packing = batch.packing

    def rows(values: torch.Tensor, spans, fill: int) -> torch.Tensor:
        parts = values.split(spans.lengths.tolist())[:-1]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    fills = {
        "input_ids": PAD,
        "attention_mask": False,
        "position_ids": 0,
        "user_rows": 0,
        "item_rows": 0,
    }
    encoder = EncoderInput(
        **{
            name: rows(getattr(batch.encoder, name), packing.encoder, fill)
            for name, fill in fills.items()
        }
    )
    labels = rows(batch.labels, packing.rows, IGNORED)
    decoder_input_ids = rows(batch.decoder_input_ids, packing.rows, PAD)
    return replace(
        batch, encoder=encoder, labels=labels, decoder_input_ids=decoder_input_ids, packing=None
    )


def arrays(part) -> dict[str, torch.Tensor]:
    return {
        f.name: value
        for f in fields(part)
        if isinstance(value := getattr(part, f.name), torch.Tensor)
    }


# --- No leak
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_through", ["n-2", "n-1"])
@pytest.mark.parametrize("max_tokens", [512, TIGHT])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_no_held_out_item_is_seen_or_learned(space, mask, max_tokens, trained_through):
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


def test_the_markers_would_be_seen_if_they_were_training_items():
    source = marked_sequences("n-2")
    marker_tokens = {token for name, token in TOKENIZER.get_vocab().items() if "z" in name}
    learned = {
        token
        for batch in batches_of(whole_step(source, "last", "n-1"), source)
        for token in batch.labels.unique().tolist()
    }
    assert marker_tokens & learned


@pytest.mark.parametrize(
    "where", [layout(), layout(TIGHT), layout(user_ids=False)], ids=["wide", "tight", "no-user"]
)
@pytest.mark.parametrize(("space", "mask"), cases())
def test_another_target_of_any_length_moves_no_input(space, mask, where):
    source = marked_sequences()
    samples = whole_step(source, space)
    shortest = int(np.argmin(WORDS.lengths[WORDS.item_words(np.arange(15))]))
    longest = int(np.argmax(WORDS.lengths[WORDS.item_words(np.arange(15))]))
    assert np.diff(WORDS.lengths[WORDS.item_words(np.array([shortest, longest]))]) >= 2
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
            (batch,) = batches_of(alone, changed, where, mask)
            seen.append(batch)
        first, second = seen
        for name, value in arrays(first.encoder).items():
            assert torch.equal(value, getattr(second.encoder, name)), name
        assert torch.equal(first.encoder_row, second.encoder_row)
        assert torch.equal(first.decoder_input_ids[:, 0], second.decoder_input_ids[:, 0])
        assert first.labels.shape[1] < second.labels.shape[1]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("where", [layout(), layout(TIGHT)], ids=["wide", "tight"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
def test_other_targets_of_a_whole_step_move_neither_inputs_nor_the_cut(mask, where, packed):
    source = marked_sequences()
    samples = whole_step(source, "user")
    positions = choose_targets(samples, where, mask, 3, 0).positions_BK
    changed = Lists([list(row) for row in source.sequences])
    rng = np.random.default_rng(5)
    for user, row in zip(samples.user_rows, positions, strict=True):
        for position in row[row >= 0]:
            changed.sequences[user][position] = int(rng.integers(len(TRAINING_CODES)))
    before, after = (
        batches_of(samples, which, where, mask, budget=150, packed=packed)
        for which in (source, changed)
    )
    assert len(before) == len(after) > 1
    for first, second in zip(before, after, strict=True):
        for name, value in arrays(first.encoder).items():
            assert torch.equal(value, getattr(second.encoder, name)), name
        assert torch.equal(first.encoder_row, second.encoder_row)


# --- Against the text, sentence by sentence
# --------------------------------------------------------------------------


def sentence(user: int | None, words: list, where: Layout) -> tuple:
    """(input ids, positions, user rows, item rows) of one row; `words` are item rows and mask
    names, oldest first."""
    lengths = {word: len(_ids(_text(word))) for word in words}
    user_ids = _ids(user_text(USER_CODES[user])) if user is not None else []
    while 2 + len(user_ids) + sum(lengths[word] for word in words) > where.max_tokens:
        words = words[1:]
    text = (
        "<s>"
        + (user_text(USER_CODES[user]) if user is not None else "")
        + "".join(map(_text, words))
        + "</s>"
    )
    ids = _ids(text)
    item_rows = [0] + [0] * len(user_ids)
    for word in words:
        item_rows += [word + 1 if isinstance(word, int) else 0] * lengths[word]
    positions = list(range(len(ids)))
    if where.positions == "from-end":
        positions = positions[::-1]
    user_rows = (
        [0]
        + [0 if user is None else user + 1] * len(user_ids)
        + [0] * (len(ids) - 1 - len(user_ids))
    )
    return tuple(ids), tuple(positions), tuple(user_rows), (*item_rows, 0)


def _text(word) -> str:
    return item_text(CODES[word]) if isinstance(word, int) else word


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def decoder_row(mask_name: str, items: list[int]) -> tuple:
    labels = _ids("".join(item_text(CODES[item]) for item in items) + "</s>")
    return tuple(_ids(mask_name) + labels[:-1]), tuple(labels)


def mask_name(number: int) -> str:
    return f"<mask_{number}>" if number else "<mask>"


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
        return sentence(shown_user, words, where), (
            decoder_row("<mask>", [training[p] for p in places]),
        )
    words = [
        mask_name(places.index(p)) if p in places else training[p] for p in range(len(training))
    ]
    rows = tuple(decoder_row(mask_name(number), [training[p]]) for number, p in enumerate(places))
    return sentence(shown_user, words, where), rows


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
@settings(max_examples=60, deadline=None)
def test_batches_hold_the_tokenised_text_of_each_sample(
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


def test_truncation_drops_whole_oldest_items_and_keeps_user_and_mask():
    source = Lists([[8, 12, 8, 12, 8, 12, 0, 100, 101]])
    samples = whole_step(source, "last")
    (batch,) = batches_of(samples, source, layout(TIGHT))
    text = TOKENIZER.decode(batch.encoder.input_ids[0])
    assert text.startswith("<s> user_3 item_")
    assert text.endswith("<mask></s>")
    kept = text.removeprefix("<s> user_3").removesuffix("<mask></s>").split()
    assert kept == [f"item_{CODES[item]}" for item in [8, 12, 8, 12, 8, 12]][-len(kept) :]
    assert 1 <= len(kept) < 6
    assert batch.encoder.input_ids.shape[1] <= TIGHT


@given(
    histories=st.lists(
        st.lists(st.integers(0, len(CODES) - 1), max_size=9), min_size=1, max_size=6
    ),
    users=st.lists(st.integers(-1, len(USER_CODES) - 1), min_size=6, max_size=6),
    max_tokens=st.sampled_from([TIGHT, 512]),
    user_ids=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_histories_to_decode_are_written_as_finetuning_writes_them(
    histories, users, max_tokens, user_ids
):
    where = layout(max_tokens, user_ids)
    users = users[: len(histories)]
    items, offsets = Lists(histories).gather(range(len(histories)))
    encoder = encode_histories(items, offsets, np.array(users), where)
    known = [user if user >= 0 and user_ids else None for user in users]
    expected = [
        (sentence(user, [*row, "<mask>"], where), ())
        for user, row in zip(known, histories, strict=True)
    ]
    batch = Batch(encoder, torch.zeros(0), torch.zeros(0), torch.zeros(0), 0, 0, 0, 0, 0)
    assert read_back([batch]) == expected
    asked = target_batch(encoder, np.arange(len(histories)), where)
    assert [rows for _, rows in read_back([asked])] == [
        (decoder_row("<mask>", [i]),) for i in range(len(histories))
    ]
    assert asked.num_samples == len(histories)


def test_an_unknown_user_has_no_word_and_no_id():
    items, offsets = Lists([[0, 1], [0, 1]]).gather([0, 1])
    encoder = encode_histories(items, offsets, np.array([-1, 4]), layout())
    assert (
        TOKENIZER.decode(encoder.input_ids[0][encoder.attention_mask[0]])
        == "<s> item_1 item_12<mask></s>"
    )
    assert TOKENIZER.decode(encoder.input_ids[1]) == "<s> user_17 item_1 item_12<mask></s>"
    assert encoder.user_rows[0].unique().tolist() == [0]
    assert encoder.user_rows[1].unique().tolist() == [0, 5]


def test_no_history_at_all_leaves_the_mask():
    encoder = encode_histories(
        np.zeros(0, np.int32), np.zeros(3, np.int64), np.array([-1, 0]), layout()
    )
    assert TOKENIZER.decode(encoder.input_ids[0][encoder.attention_mask[0]]) == "<s><mask></s>"
    assert TOKENIZER.decode(encoder.input_ids[1]) == "<s> user_3<mask></s>"
    nobody = encode_histories(
        np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64), layout()
    )
    assert len(nobody.input_ids) == 0


def test_an_item_outside_the_catalogue_is_named():
    with pytest.raises(ValueError, match=f"item row {len(CODES)} is outside the table"):
        encode_histories(np.array([len(CODES)]), np.array([0, 1]), np.array([0]), layout())
    with pytest.raises(ValueError, match="user row 20 is outside the table"):
        encode_histories(np.array([0]), np.array([0, 1]), np.array([20]), layout())


# --- Micro-batches
# ---------------------------------------------------------------------------------------------------


@given(tokens=st.lists(st.integers(1, 500), min_size=1, max_size=200), budget=st.integers(1, 5000))
def test_a_cut_keeps_each_sample_once_and_within_the_budget(tokens, budget):
    tokens_B = np.array(tokens)
    parts = cut(tokens_B, budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    for part in parts:
        assert len(part) == 1 or _is_worth_one(tokens_B[part], budget)
    # One more sample would not have been worth it, so no part is smaller than it needs to be.
    for part, following in pairwise(parts):
        assert tokens_B[part].min() >= tokens_B[following].max()
        assert not _is_worth_one(tokens_B[[*part, following[0]]], budget)


def _is_worth_one(tokens_b: np.ndarray, budget: int) -> bool:
    rectangle = len(tokens_b) * tokens_b.max()
    return rectangle <= budget and rectangle - tokens_b.sum() <= WORTH_A_CUT


@given(tokens=st.lists(st.integers(1, 500), min_size=1, max_size=200), budget=st.integers(1, 5000))
def test_a_packed_cut_is_as_few_parts_as_the_budget_allows_and_even(tokens, budget):
    tokens_B = np.array(tokens)
    parts = cut_packed(tokens_B, budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tokens)))
    sizes = [int(tokens_B[part].sum()) for part in parts]
    assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    for part, following in pairwise(parts):
        assert tokens_B[part].min() >= tokens_B[following].max()
    if max(tokens) <= budget // 8:
        assert len(parts) <= -(-sum(tokens) * 8 // (budget * 7))
        assert max(sizes) - min(sizes) <= 2 * max(tokens)


@pytest.mark.parametrize("budget", [WHOLE, 150])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_a_packed_batch_holds_what_a_padded_one_holds(space, mask, budget):
    source = marked_sequences()
    samples = split_among_ranks(whole_step(source, space), 1, 3)
    padded = batches_of(samples, source, layout(90), mask)
    packed = batches_of(samples, source, layout(90), mask, budget=budget, packed=True)
    side_by_side = [unpacked(batch) for batch in packed]
    assert sorted(_without_unlabelled(side_by_side)) == sorted(_without_unlabelled(padded))
    for batch in side_by_side:
        pad = batch.encoder.input_ids == PAD
        assert torch.equal(pad, ~batch.encoder.attention_mask)
    for count in ("num_samples", "num_target_tokens", "num_tokens"):
        assert sum(getattr(b, count) for b in packed) == sum(getattr(b, count) for b in padded), (
            count
        )
    for batch in packed:
        assert batch.num_slots == len(batch.encoder.input_ids) + len(batch.labels)
        # What fills it up carries no id and asks for nothing.
        padding_sequence = slice(int(batch.packing.encoder.offsets[-2]), None)
        assert set(batch.encoder.input_ids[padding_sequence].tolist()) == {PAD}
        assert not batch.encoder.user_rows[padding_sequence].any()
        assert not batch.encoder.item_rows[padding_sequence].any()
        assert (batch.labels[int(batch.packing.rows.offsets[-2]) :] == IGNORED).all()


@pytest.mark.parametrize(("space", "mask"), cases())
def test_padding_samples_have_no_label_and_are_not_counted(space, mask):
    source = marked_sequences()
    samples = whole_step(source, space)
    samples = samples[: len(samples) - (len(samples) % 3 == 0)]
    whole = batches_of(samples, source, mask=mask)
    parts = [
        batches_of(split_among_ranks(samples, rank, 3), source, mask=mask) for rank in range(3)
    ]
    shared = [batch for part in parts for batch in part]
    for count in ("num_samples", "num_target_tokens", "num_tokens"):
        assert sum(getattr(b, count) for b in shared) == sum(getattr(b, count) for b in whole), (
            count
        )
    assert sum(len(b.encoder.input_ids) for b in shared) > len(samples)
    for batch in shared:
        assert int((batch.labels != IGNORED).sum()) == batch.num_target_tokens
    labelled = _without_unlabelled(shared)
    assert sorted(labelled) == sorted(read_back(whole))


def _without_unlabelled(batches: list[Batch]) -> list[tuple]:
    kept = []
    for batch in batches:
        labelled = (batch.labels != IGNORED).any(dim=1)
        rows = torch.isin(torch.arange(len(batch.encoder.input_ids)), batch.encoder_row[labelled])
        encoder = EncoderInput(
            **{name: value[rows] for name, value in arrays(batch.encoder).items()}
        )
        renumbered = (torch.cumsum(rows, 0) - 1)[batch.encoder_row[labelled]]
        kept.append(
            replace(
                batch,
                encoder=encoder,
                encoder_row=renumbered,
                decoder_input_ids=batch.decoder_input_ids[labelled],
                labels=batch.labels[labelled],
            )
        )
    return read_back([batch for batch in kept if len(batch.labels)])


@pytest.mark.parametrize(("space", "mask"), cases())
def test_how_a_step_is_cut_changes_neither_loss_nor_gradient(model, space, mask):
    source = marked_sequences()
    samples = whole_step(source, space)[:40]
    loss, gradient = loss_and_gradient(model, batches_of(samples, source, layout(128), mask))
    for budget in (150, 1):
        batches = batches_of(samples, source, layout(128), mask, budget=budget)
        assert len(batches) > 1
        other_loss, other_gradient = loss_and_gradient(model, batches)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("padding_samples", [False, True])
@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize(("space", "mask"), cases())
def test_packing_changes_neither_loss_nor_gradient(
    model, space, mask, head, padding_samples, monkeypatch
):
    """To 1e-5 in float32, all parameters: also where rows share an encoded sequence and where
    sequences are cut short."""
    monkeypatch.setattr(model, "loss_by", head)
    source = marked_sequences()
    samples = whole_step(source, space)[:60]
    if padding_samples:
        samples = split_among_ranks(samples[:38], 6, 7)
        assert samples.is_padding.any()
    loss, gradient = loss_and_gradient(model, batches_of(samples, source, layout(90), mask))
    for budget in (WHOLE, 150):
        batches = batches_of(samples, source, layout(90), mask, budget=budget, packed=True)
        other_loss, other_gradient = loss_and_gradient(model, batches)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_an_idle_packed_batch_goes_through_the_layers_and_teaches_nothing(model):
    source = marked_sequences()
    batches = batches_of(
        whole_step(source, "user"), source, mask=Mask("multi", k=NUM_MASKS), packed=True
    )
    dummy = dummy_batch(batches[-1])
    model.zero_grad()
    engine_loss(model, dummy).backward()
    touched = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(touched) == len(list(model.parameters()))
    assert not any(gradient.any() for gradient in touched)
    assert (dummy.num_samples, dummy.num_tokens, dummy.num_target_tokens) == (0, 0, 0)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
def test_how_a_step_is_split_among_ranks_changes_no_mask(mask):
    source = marked_sequences()
    samples = whole_step(source, "user")
    whole = read_back(batches_of(samples, source, mask=mask))
    halves = [split_among_ranks(samples, rank, 2) for rank in range(2)]
    assert not any(half.is_padding.any() for half in halves)
    shared = [
        sample for half in halves for sample in read_back(batches_of(half, source, mask=mask))
    ]
    assert sorted(shared) == sorted(whole)
    assert sorted(read_back(batches_of(samples, source, mask=mask, epoch=1))) != sorted(whole)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
def test_the_digest_is_that_of_the_samples_and_of_their_masks_on_any_number_of_ranks(mask):
    source = marked_sequences()
    samples = whole_step(source, "user")

    def digest_of(part: StepSamples, epoch: int) -> int:
        options = {"mask": mask, "seed": 3, "epoch": epoch, "micro_batch_tokens": WHOLE}
        return make_step(part, source, layout(), **options).samples_digest % 2**64

    # The same samples each epoch; all that differs are the masks drawn for them.
    digests = [digest_of(samples, epoch) for epoch in range(4)]
    assert len(set(digests)) == 4
    assert digest_of(samples[:-1], 0) != digests[0]
    for size in (1, 3):  # 20 samples on three ranks: one is there twice and does not count
        shares = [digest_of(split_among_ranks(samples, rank, size), 0) for rank in range(size)]
        assert sum(shares) % 2**64 == digests[0]


def test_a_batch_moves_whole():
    source = marked_sequences()
    (batch,) = batches_of(whole_step(source, "last"), source)
    moved = batch.to(torch.device("meta"))
    assert all(
        value.device.type == "meta"
        for part in (moved, moved.encoder)
        for value in arrays(part).values()
    )
    assert moved.num_samples == batch.num_samples


# --- Layouts that cannot be
# ------------------------------------------------------------------------------------------


def test_room_for_less_than_one_item_is_refused():
    needed = WORDS.longest_user + 2 + WORDS.longest_item
    assert layout(needed).sure_items == 1
    assert layout(needed + WORDS.longest_item - 1).sure_items == 1
    assert layout(needed - WORDS.longest_user, user_ids=False).sure_items == 1
    with pytest.raises(ValueError, match=f"model.max_tokens {needed - 1}: too few"):
        layout(needed - 1)


def test_more_masks_than_the_words_have_are_no_items_by_accident():
    words = build_words(TOKENIZER, CODES, USER_CODES, 1)
    source = Lists([[1, 2, 3, 4, 5, 6, 7, 8, 100, 101]])
    where = Layout(words, PAD, 512, True, "from-start")
    with pytest.raises(AssertionError):
        batches_of(whole_step(source, "user"), source, where, Mask("multi", k=4))
