"""The model: BART's numbers with equation (2) as input, checked against Hugging Face's BART and by
hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5Config
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from genrec_dist.config.recipe import Model, Optimizer
from genrec_dist.data.batch import IGNORED
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.build import build_model
from genrec_dist.model.genrec import (
    GenRecConfig,
    GenRecForConditionalGeneration,
    attention_bias,
    check_ranges,
    choose_attention,
)
from genrec_dist.model.head_loss import target_loss
from genrec_dist.model.optimizer import build_optimizer

logging.set_verbosity_error()

SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
VOCAB, USERS, ITEMS = 40, 6, 9
TINY = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "heads": 2,
    "ffn": 32,
    "max_tokens": 32,
    "init_std": 0.3,
}
BART_TINY = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "init_std": 0.3,
}
BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "heads": 12,
    "ffn": 3072,
    "max_tokens": 1024,
}
LARGE = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "heads": 16,
    "ffn": 4096,
    "max_tokens": 1024,
}


def make(seed=0, vocab_size=VOCAB, num_users=USERS, num_items=ITEMS, num_masks=1, **shape):
    torch.manual_seed(seed)
    return build_model(
        Model(**{**TINY, **shape}),
        vocab_size=vocab_size,
        num_users=num_users,
        num_items=num_items,
        num_masks=num_masks,
        special=SPECIAL,
    ).eval()


def make_input(seed=0, lengths=(9, 4, 12), ids=True) -> EncoderInput:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, mask.shape, generator=generator) * mask

    tokens = torch.where(mask, draw(5, VOCAB), SPECIAL["pad"])
    users, items = draw(0, USERS + 1), draw(0, ITEMS + 1)
    positions = torch.arange(max(lengths)).expand_as(mask) * mask
    return EncoderInput(tokens, mask, positions, users * ids, items * ids)


def make_targets(seed=0, lengths=(3, 1, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    """(decoder inputs, labels) [R, T]."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = torch.where(seen, torch.randint(5, VOCAB, seen.shape, generator=generator), IGNORED)
    inputs = torch.full_like(labels, SPECIAL["pad"])
    inputs[:, 0] = SPECIAL["mask"]
    inputs[:, 1:] = torch.where(labels[:, :-1] == IGNORED, SPECIAL["pad"], labels[:, :-1])
    return inputs, labels


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- Size
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_users", "num_items", "extra_masks"), [(22363, 12101, 0), (35598, 18357, 3)]
)
def test_the_base_shape_has_barts_parameters_and_the_id_rows(num_users, num_items, extra_masks):
    with torch.device("meta"):
        model = make(
            vocab_size=50265 + extra_masks,
            num_users=num_users,
            num_items=num_items,
            num_masks=1 + extra_masks,
            **BASE,
        )
    # BART-base, the ids, one zero row a table, the numbered masks.
    assert (
        num_parameters(model)
        == 139_420_416 + (num_users + num_items) * 768 + 2 * 768 + extra_masks * 768
    )
    assert tuple(model.user_embedding.weight.shape) == (num_users + 1, 768)
    assert tuple(model.item_embedding.weight.shape) == (num_items + 1, 768)


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_a_shape_without_ids_has_exactly_hugging_faces_parameters(shape):
    config = BartConfig(
        d_model=shape["d_model"],
        encoder_layers=shape["encoder_layers"],
        decoder_layers=shape["decoder_layers"],
        encoder_attention_heads=shape["heads"],
        decoder_attention_heads=shape["heads"],
        encoder_ffn_dim=shape["ffn"],
        decoder_ffn_dim=shape["ffn"],
    )
    with torch.device("meta"):
        ours, theirs = make(vocab_size=50265, **shape), BartForConditionalGeneration(config)
    ids = (USERS + 1 + ITEMS + 1) * shape["d_model"]
    assert num_parameters(ours) == num_parameters(theirs) + ids
    if shape is LARGE:
        assert num_parameters(theirs) == 406_291_456


@pytest.mark.parametrize(("user_ids", "item_ids"), [(True, False), (False, True), (False, False)])
def test_an_id_table_that_is_off_is_not_there(user_ids, item_ids):
    model = make(user_ids=user_ids, item_ids=item_ids)
    assert (model.user_embedding is not None, model.item_embedding is not None) == (
        user_ids,
        item_ids,
    )
    whole = make()
    encoder = make_input()
    left_out = torch.zeros_like(encoder.user_rows)
    blind = EncoderInput(
        encoder.input_ids,
        encoder.attention_mask,
        encoder.position_ids,
        encoder.user_rows if user_ids else left_out,
        encoder.item_rows if item_ids else left_out,
    )
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    assert torch.equal(model.embed(encoder), whole.embed(blind))


# --- Equation (2)
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_embedding", [False, True])
def test_the_encoder_sees_token_position_user_and_item(scale_embedding):
    model, encoder = make(scale_embedding=scale_embedding), make_input()
    weights = model.state_dict()
    scale = 4.0 if scale_embedding else 1.0  # sqrt(16)
    embedded = model.embed(encoder)
    for row, column in np.ndindex(*encoder.input_ids.shape):
        expected = (
            weights["model.shared.weight"][encoder.input_ids[row, column]] * scale
            + weights["model.encoder.embed_positions.weight"][encoder.position_ids[row, column] + 2]
            + weights["user_embedding.weight"][encoder.user_rows[row, column]]
            + weights["item_embedding.weight"][encoder.item_rows[row, column]]
        )
        torch.testing.assert_close(embedded[row, column], expected)


def test_users_and_items_of_one_number_have_rows_of_their_own():
    model, encoder = make(), make_input(ids=False)
    rows = encoder.attention_mask.long() * 3
    as_user = EncoderInput(
        encoder.input_ids, encoder.attention_mask, encoder.position_ids, rows, rows * 0
    )
    as_item = EncoderInput(
        encoder.input_ids, encoder.attention_mask, encoder.position_ids, rows * 0, rows
    )
    assert not torch.allclose(model.embed(as_user), model.embed(as_item))
    assert model.user_embedding.weight.data_ptr() != model.item_embedding.weight.data_ptr()


def test_id_dropout_is_off_in_evaluation_and_on_in_training():
    model, encoder = make(embedding_dropout=0.5, dropout=0.0), make_input()
    still = model.embed(encoder)
    assert torch.equal(still, model.embed(encoder))
    model.train()
    torch.manual_seed(0)
    moved = model.embed(encoder)
    untouched = (encoder.user_rows == 0) & (encoder.item_rows == 0)
    assert torch.equal(moved[untouched], still[untouched])
    assert not torch.equal(moved, still)


# --- Against Hugging Face's BART
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scale_embedding", [False, True])
def test_without_ids_the_logits_are_barts(attention, scale_embedding):
    ours = make(scale_embedding=scale_embedding).double()
    ours.set_attn_implementation(attention)
    theirs = (
        BartForConditionalGeneration(BartConfig(**BART_TINY, scale_embedding=scale_embedding))
        .double()
        .eval()
    )
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    assert set(missing.unexpected_keys) == {"user_embedding.weight", "item_embedding.weight"}
    with torch.no_grad():
        ours.user_embedding.weight.zero_()
        ours.item_embedding.weight.zero_()
    encoder, (decoder_inputs, labels) = make_input(), make_targets()
    expected = theirs(
        input_ids=encoder.input_ids,
        attention_mask=encoder.attention_mask.long(),
        decoder_input_ids=decoder_inputs,
    ).logits[labels != IGNORED]
    logits, kept = ours.target_logits(encoder, torch.arange(3), decoder_inputs, labels)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    assert torch.equal(kept, labels[labels != IGNORED])
    through_forward = ours(
        encoder.input_ids, encoder.attention_mask, decoder_input_ids=decoder_inputs, labels=labels
    )
    summed = target_loss(expected, kept, 1)
    torch.testing.assert_close(through_forward, summed)
    with torch.no_grad():
        ours.user_embedding.weight[1:, :8] = (
            1.0  # not all columns: the layer norm takes a constant away
        )
    assert not torch.allclose(
        ours.target_logits(encoder, torch.arange(3), decoder_inputs, labels)[0], expected
    )


def test_eager_and_fused_attention_agree_in_value_and_gradient():
    found = []
    for attention in ("eager", "sdpa"):
        model = make().double()
        model.set_attn_implementation(attention)
        logits, labels = model.target_logits(make_input(), torch.arange(3), *make_targets())
        F.cross_entropy(logits, labels).backward()
        found.append(
            (
                logits.detach(),
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_attention_that_is_chosen_gives_the_logits_of_fp32_up_to_rounding(precision):
    model = make(init_std=0.1)
    expected, _ = model.target_logits(make_input(), torch.arange(3), *make_targets())
    choose_attention(model, precision)
    assert model.config._attn_implementation == ("eager" if precision == "bf16" else "sdpa")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits, _ = model.target_logits(make_input(), torch.arange(3), *make_targets())
    tolerance = 0.05 if precision == "bf16" else 1e-5
    torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


def test_the_attention_bias_has_the_precision_of_the_scores():
    seen = torch.tensor([True, False])
    assert attention_bias(seen, torch.zeros(1, dtype=torch.float64)).tolist() == [
        0.0,
        float("-inf"),
    ]
    assert attention_bias(seen, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_bias(seen, torch.zeros(1)).dtype == torch.bfloat16


# --- Padding, several decoder rows
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_ragged_batch_are_what_they_are_alone(attention):
    model = make().double()
    model.set_attn_implementation(attention)
    lengths, target_lengths = (9, 4, 12), (3, 1, 4)
    encoder, (inputs, labels) = make_input(lengths=lengths), make_targets(lengths=target_lengths)
    together, _ = model.target_logits(encoder, torch.arange(3), inputs, labels)
    alone = []
    for row, (length, target_length) in enumerate(zip(lengths, target_lengths, strict=True)):
        part = encoder.map(lambda values, row=row, length=length: values[row : row + 1, :length])
        window = (slice(row, row + 1), slice(target_length))
        logits, _ = model.target_logits(part, torch.arange(1), inputs[window], labels[window])
        alone.append(logits)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=0)


def test_decoder_rows_that_share_a_sentence_read_it_as_if_it_were_repeated():
    model = make().double()
    rows = torch.tensor([0, 0, 1, 2, 2])
    encoder, (inputs, labels) = make_input(), make_targets(lengths=(3, 1, 4, 2, 4))
    shared, _ = model.target_logits(encoder, rows, inputs, labels)
    expected, _ = model.target_logits(
        encoder.map(lambda values: values[rows]), torch.arange(5), inputs, labels
    )
    torch.testing.assert_close(shared, expected, atol=1e-10, rtol=0)


def test_no_target_sees_what_comes_behind_it():
    model = make().double()
    encoder, (inputs, labels) = make_input(lengths=(9,)), make_targets(lengths=(4,))
    before, _ = model.target_logits(encoder, torch.arange(1), inputs, labels)
    changed = inputs.clone()
    changed[0, 3] = 7 if inputs[0, 3] != 7 else 8
    after, _ = model.target_logits(encoder, torch.arange(1), changed, labels)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


# --- Hugging Face's forward and generate
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["from-start", "from-end"])
def test_forward_without_labels_gives_the_same_logits_and_fills_in_what_is_left_out(positions):
    model = make(positions=positions).double()
    encoder, (inputs, labels) = make_input(), make_targets()
    if positions == "from-end":
        backward = encoder.attention_mask.sum(1, keepdim=True) - 1 - torch.arange(12)
        encoder = EncoderInput(
            encoder.input_ids,
            encoder.attention_mask,
            backward.clamp(min=0),
            encoder.user_rows,
            encoder.item_rows,
        )
    expected, _ = model.target_logits(encoder, torch.arange(3), inputs, labels)
    ids = {"user_rows": encoder.user_rows, "item_rows": encoder.item_rows}
    for given in (
        {"attention_mask": encoder.attention_mask, "position_ids": encoder.position_ids, **ids},
        {"attention_mask": encoder.attention_mask.long(), **ids},
        ids,
    ):
        logits = model(encoder.input_ids, decoder_input_ids=inputs, **given).logits
        torch.testing.assert_close(logits[labels != IGNORED], expected, atol=1e-10, rtol=0)


def greedy(model, encoder: EncoderInput, steps: int) -> torch.Tensor:
    tokens = torch.full((len(encoder.input_ids), 1), SPECIAL["mask"])
    for _ in range(steps):
        logits = model.lm_head(model.decode(tokens, model.encode(encoder), encoder.attention_mask))[
            :, -1
        ]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def test_generate_works_from_our_encoder_states_and_from_plain_inputs():
    model, encoder = make().double(), make_input()
    states = BaseModelOutput(last_hidden_state=model.encode(encoder))
    knobs = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    from_states = model.generate(
        encoder_outputs=states, attention_mask=encoder.attention_mask, **knobs
    )
    names = ("input_ids", "attention_mask", "position_ids", "user_rows", "item_rows")
    from_inputs = model.generate(**{name: getattr(encoder, name) for name in names}, **knobs)
    assert torch.equal(from_states, from_inputs)
    assert (from_states[:, 0] == SPECIAL["mask"]).all()
    assert from_states.shape[0] == 3
    blind = model.generate(encoder.input_ids, encoder.attention_mask, **knobs)
    assert not torch.equal(blind, from_inputs)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    alone = model.generate(
        **{name: getattr(encoder, name) for name in names},
        max_new_tokens=4,
        do_sample=False,
        num_beams=1,
    )
    assert torch.equal(alone, greedy(model, encoder, 4))


# --- Ranges
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "name", "limit"),
    [
        ("input_ids", "token", VOCAB),
        ("position_ids", "position", 32),
        ("user_rows", "user", 7),
        ("item_rows", "item", 10),
    ],
)
@pytest.mark.parametrize("side", ["above", "below"])
def test_an_id_outside_its_table_is_named_before_any_lookup(field, name, limit, side):
    model, encoder = make(), make_input()
    check_ranges(encoder, model.config)
    values = getattr(encoder, field).clone()
    values[1, 2] = limit if side == "above" else -1
    given = {n: getattr(encoder, n) for n in EncoderInput.__dataclass_fields__} | {field: values}
    with pytest.raises(
        ValueError, match=f"^{name} id {values[1, 2]} is outside its table of {limit} rows"
    ) as caught:
        model(**given, decoder_input_ids=make_targets()[0], labels=make_targets()[1])
    assert "\n" not in str(caught.value)
    values[1, 2] = limit - 1
    check_ranges(EncoderInput(**given), model.config)


def test_too_long_an_input_names_what_to_lower():
    tokens = torch.full((1, 33), 5)
    with pytest.raises(ValueError, match=r"33 input tokens, 32 positions: lower model\.max_tokens"):
        make()(tokens, decoder_input_ids=tokens[:, :1])
    with pytest.raises(ValueError, match="input_ids is missing"):
        make()(decoder_input_ids=tokens[:, :1])


# --- Row 0
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_row_0_of_both_tables_stays_zero_while_the_others_learn(decay):
    model = make().train()
    optimizer = build_optimizer(model, Optimizer(decay=decay, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = model.item_embedding.weight.detach().clone()
    for step in range(4):
        logits, labels = model.target_logits(make_input(step), torch.arange(3), *make_targets(step))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    for table in (model.user_embedding, model.item_embedding):
        assert (table.weight[0] == 0).all()
        assert (table.weight[1:] != 0).all()
    assert not torch.equal(model.item_embedding.weight, before)


# --- Saved and loaded
# ------------------------------------------------------------------------------------------------


def same_weights(first, second) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_model_loads_back_bit_for_bit(tmp_path):
    model = make(num_masks=3, positions="from-end", embedding_dropout=0.25)
    model.config.numbering_hash, model.config.exclude_history = "abc", False
    model.save_pretrained(tmp_path)
    again = GenRecForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert same_weights(model, again)
    inputs, labels = make_targets()
    logits = [
        m.target_logits(make_input(), torch.arange(3), inputs, labels)[0] for m in (model, again)
    ]
    assert torch.equal(*logits)
    for name in (
        "num_users", "num_items", "num_masks", "id_dropout", "encoder_positions", "max_input_tokens",
        "numbering_hash", "exclude_history", "decoder_start_token_id", "pad_token_id",
    ):  # fmt: skip
        assert getattr(again.config, name) == getattr(model.config, name), name
    assert again.config.encoder_positions == "from-end"
    assert (
        again.lm_head.weight is again.model.shared.weight is again.model.encoder.embed_tokens.weight
    )


def test_the_configuration_survives_json():
    config = make(num_masks=3, positions="from-end").config
    values = json.loads(json.dumps(config.to_dict()))
    assert values["model_type"] == "genrec"
    assert GenRecConfig.from_dict(values).to_dict() == config.to_dict()


# --- Backbones
# -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["with head", "without head"])
def backbone(request, tmp_path_factory):
    """(directory, model) of small BART weights, as BART with its head and as the published files
    without."""
    path = tmp_path_factory.mktemp("bart")
    torch.manual_seed(7)
    bart = BartForConditionalGeneration(BartConfig(**BART_TINY, activation_function="relu"))
    (bart if request.param == "with head" else bart.model).save_pretrained(path)
    return path, bart.eval()


def test_bart_weights_load_and_the_id_tables_start_fresh(backbone):
    path, bart = backbone
    model = make(backbone=str(path), max_tokens=20, dropout=0.25, vocab_size=VOCAB - 8)
    for name, value in bart.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.dtype == torch.float32
    assert model.config.vocab_size == VOCAB  # a smaller tokenizer leaves the backbone's table
    for table, rows in ((model.user_embedding, USERS + 1), (model.item_embedding, ITEMS + 1)):
        assert table.weight.shape == (rows, 16)
        assert (table.weight[0] == 0).all()
        assert 0.15 < table.weight[1:].std() < 0.6
    config = model.config
    assert (config.dropout, config.activation_function, config.max_input_tokens) == (
        0.25,
        "relu",
        20,
    )
    assert (config.decoder_start_token_id, config.forced_eos_token_id) == (4, None)
    assert model.generation_config.decoder_start_token_id == 4
    assert model.generation_config.forced_eos_token_id is None


def test_a_backbone_with_silent_ids_speaks_as_it_did(backbone):
    path, bart = backbone
    model = make(backbone=str(path))
    encoder, (inputs, labels) = make_input(ids=False), make_targets()
    expected = bart(
        input_ids=encoder.input_ids,
        attention_mask=encoder.attention_mask.long(),
        decoder_input_ids=inputs,
    ).logits[labels != IGNORED]
    logits, _ = model.target_logits(encoder, torch.arange(3), inputs, labels)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_fresh_id_tables_are_a_function_of_the_seed(backbone):
    path, _ = backbone
    first, again, other = (make(seed=seed, backbone=str(path)) for seed in (3, 3, 4))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_a_larger_vocabulary_adds_rows_behind_the_old_ones(backbone, tmp_path):
    path, bart = backbone
    model = make(backbone=str(path), vocab_size=VOCAB + 3)
    assert model.config.vocab_size == len(model.model.shared.weight) == VOCAB + 3
    assert torch.equal(model.model.shared.weight[:VOCAB], bart.model.shared.weight)
    assert (
        model.lm_head.weight is model.model.shared.weight is model.model.decoder.embed_tokens.weight
    )
    assert model.model.encoder.embed_tokens.weight is model.model.shared.weight
    model.save_pretrained(tmp_path)
    assert same_weights(model, GenRecForConditionalGeneration.from_pretrained(tmp_path))


def test_a_backbone_with_a_bias_on_its_head_speaks_one_language_in_training_and_decoding(tmp_path):
    bart = BartForConditionalGeneration(BartConfig(**BART_TINY))
    bart.final_logits_bias.fill_(1.0)
    bart.final_logits_bias[0, 7] = 100.0
    bart.save_pretrained(tmp_path)
    model = make(backbone=str(tmp_path))
    encoder, (inputs, labels) = make_input(), make_targets()
    ours, _ = model.target_logits(encoder, torch.arange(3), inputs, labels)
    names = ("input_ids", "attention_mask", "position_ids", "user_rows", "item_rows")
    theirs = model(
        **{name: getattr(encoder, name) for name in names}, decoder_input_ids=inputs
    ).logits
    torch.testing.assert_close(ours, theirs[labels != IGNORED], atol=1e-5, rtol=0)


def refusal(**shape) -> str:
    with pytest.raises(ValueError) as caught:
        make(**shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_backbone_that_does_not_fit_is_named(backbone, tmp_path):
    path, _ = backbone
    assert (
        refusal(backbone=str(path), max_tokens=33)
        == f"model.max_tokens 33: {path} has 32 positions"
    )
    T5Config().save_pretrained(tmp_path)
    assert "it is a t5 model, only BART fits" in refusal(backbone=str(tmp_path))


@pytest.mark.parametrize(
    "what", ["nothing", "no weights", "broken weights", "broken configuration"]
)
def test_a_backbone_that_cannot_be_loaded_is_named_with_two_ways_out(tmp_path, what):
    path = tmp_path / "backbone"
    if what != "nothing":
        BartConfig(**BART_TINY).save_pretrained(path)
    if what == "broken weights":
        (path / "model.safetensors").write_bytes(b"xx")
    if what == "broken configuration":
        (path / "config.json").write_text("{")
    message = refusal(backbone=str(path))
    assert message.startswith(f"model.backbone {path}: ")
    assert "give its directory, or set model.backbone to null" in message


def test_a_hub_name_without_a_network_is_named_with_two_ways_out(tmp_path):
    program = (
        "from genrec_dist.model.build import build_model; from genrec_dist.config.recipe import Model; "
        "build_model(Model(backbone='facebook/bart-base'), vocab_size=9, num_users=1, num_items=1, num_masks=1, "
        "special={'bos': 0, 'pad': 1, 'eos': 2, 'mask': 4})"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: model.backbone facebook/bart-base: ")
    assert "give its directory, or set model.backbone to null" in last
