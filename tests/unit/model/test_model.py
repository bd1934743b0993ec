"""The model: BART's numbers with equation (2) as input, checked against Hugging Face's BART and by
hand."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5Config
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from genrec_dist.config.recipe import Model, Optimizer
from genrec_dist.data.batch import IGNORED, ModelInputs
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.tokenizer import load_tokenizer
from genrec_dist.model.build import ModelSizes, build_model, check_memory
from genrec_dist.model.genrec import (
    GenRecConfig,
    GenRecForConditionalGeneration,
    choose_attention,
)
from genrec_dist.model.head_loss import target_loss
from genrec_dist.model.network import attention_bias, check_ranges
from genrec_dist.model.optimizer import build_optimizer
from genrec_dist.model.seq2seq.config import GenRecFields

logging.set_verbosity_error()

SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
VOCAB, USERS, ITEMS = 40, 6, 9
WITH_IDS = ("input_ids", "attention_mask", "position_ids", "user_rows", "item_rows")


def shape_of(d_model, layers, heads, ffn, max_tokens, **more):
    towers = {"encoder_layers": layers, "decoder_layers": layers}
    own = {"d_model": d_model, "heads": heads, "ffn": ffn, "max_tokens": max_tokens}
    return {**own, **towers, **more}


TINY = shape_of(16, 2, 2, 32, 32, init_std=0.3)
BASE = shape_of(768, 6, 12, 3072, 1024)
LARGE = shape_of(1024, 12, 16, 4096, 1024)


def bart_config(shape=TINY, vocab_size=VOCAB, **more) -> BartConfig:
    values = {"vocab_size": vocab_size, "max_position_embeddings": shape["max_tokens"], **more}
    for tower in ("encoder", "decoder"):
        values[f"{tower}_layers"] = shape[f"{tower}_layers"]
        values[f"{tower}_attention_heads"] = shape["heads"]
        values[f"{tower}_ffn_dim"] = shape["ffn"]
    return BartConfig(d_model=shape["d_model"], init_std=shape.get("init_std", 0.02), **values)


def make(seed=0, vocab_size=VOCAB, num_users=USERS, num_items=ITEMS, num_masks=1, **shape):
    torch.manual_seed(seed)
    sizes = ModelSizes(
        vocab_size=vocab_size,
        num_users=num_users,
        num_items=num_items,
        num_masks=num_masks,
        special=SPECIAL,
    )
    return build_model(Model(**{**TINY, **shape}), sizes).eval()


def make_input(seed=0, lengths=(9, 4, 12), ids=True) -> EncoderInput:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, mask.shape, generator=generator) * mask

    tokens = torch.where(mask, draw(5, VOCAB), SPECIAL["pad"])
    users, items = draw(0, USERS + 1), draw(0, ITEMS + 1)
    positions = torch.arange(max(lengths)).expand_as(mask) * mask
    return EncoderInput(tokens, mask, positions, users * ids, items * ids)


def make_inputs(
    encoder=None, seed=0, lengths=(3, 1, 4), rows=None, ids=True, sizes=(9, 4, 12)
) -> ModelInputs:
    """Inputs of an encoder input, with one decoder row per sample or the samples of `rows`."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = torch.where(seen, torch.randint(5, VOCAB, seen.shape, generator=generator), IGNORED)
    inputs = torch.full_like(labels, SPECIAL["pad"])
    inputs[:, 0] = SPECIAL["mask"]
    inputs[:, 1:] = torch.where(labels[:, :-1] == IGNORED, SPECIAL["pad"], labels[:, :-1])
    return ModelInputs(
        encoder=make_input(seed, sizes, ids) if encoder is None else encoder,
        encoder_row=torch.arange(len(lengths)) if rows is None else torch.tensor(rows),
        decoder_input_ids=inputs,
        labels=labels,
    )


def logits_of(model, inputs: ModelInputs) -> torch.Tensor:
    return model.target_logits(inputs)[0]


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def barts_logits(bart, inputs: ModelInputs) -> torch.Tensor:
    """By Hugging Face's model, of the label tokens."""
    encoder = inputs.encoder
    output = bart(
        input_ids=encoder.input_ids,
        attention_mask=encoder.attention_mask.long(),
        decoder_input_ids=inputs.decoder_input_ids,
    )
    return output.logits[inputs.labels != IGNORED]


# Size.


@pytest.mark.parametrize(
    ("shape", "parameters"), [(BASE, 139_420_416), (LARGE, 406_291_456)], ids=["base", "large"]
)
@pytest.mark.parametrize("extra_masks", [0, 3])
def test_a_shape_has_barts_parameters_the_id_rows_and_the_masks(shape, parameters, extra_masks):
    sizes = {"vocab_size": 50265 + extra_masks, "num_masks": 1 + extra_masks}
    with torch.device("meta"):
        theirs = BartForConditionalGeneration(bart_config(shape, 50265))
        ours = make(num_users=35598, num_items=18357, **sizes, **shape)
    width = shape["d_model"]
    assert num_parameters(theirs) == parameters
    # The ids, one zero row per table, the numbered masks.
    assert num_parameters(ours) == parameters + (35598 + 18357 + 2 + extra_masks) * width
    assert tuple(ours.user_embedding.weight.shape) == (35598 + 1, width)
    assert tuple(ours.item_embedding.weight.shape) == (18357 + 1, width)


@pytest.mark.parametrize(("user_ids", "item_ids"), [(True, False), (False, True), (False, False)])
def test_an_id_table_that_is_off_does_not_exist(user_ids, item_ids):
    model, whole, encoder = make(user_ids=user_ids, item_ids=item_ids), make(), make_input()
    assert (model.user_embedding is not None) == user_ids
    assert (model.item_embedding is not None) == item_ids
    blind = replace(
        encoder, user_rows=encoder.user_rows * user_ids, item_rows=encoder.item_rows * item_ids
    )
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    assert torch.equal(model.embed(encoder), whole.embed(blind))


# Equation (2).


@pytest.mark.parametrize("scale_embedding", [False, True])
def test_embed_is_the_sum_of_token_position_user_and_item(scale_embedding):
    model, encoder = make(scale_embedding=scale_embedding), make_input()
    weights = model.state_dict()
    scale = 4.0 if scale_embedding else 1.0  # sqrt(16)
    expected = (
        weights["model.shared.weight"][encoder.input_ids] * scale
        + weights["model.encoder.embed_positions.weight"][encoder.position_ids + 2]
        + weights["user_embedding.weight"][encoder.user_rows]
        + weights["item_embedding.weight"][encoder.item_rows]
    )
    torch.testing.assert_close(model.embed(encoder), expected)
    # Users and items of one number have rows of their own.
    rows = encoder.attention_mask.long() * 3
    as_user = replace(encoder, user_rows=rows, item_rows=rows * 0)
    as_item = replace(encoder, user_rows=rows * 0, item_rows=rows)
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


# Against Hugging Face's BART.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scale_embedding", [False, True])
def test_without_ids_the_logits_are_barts(attention, scale_embedding):
    ours = make(scale_embedding=scale_embedding).double()
    ours.set_attn_implementation(attention)
    theirs = BartForConditionalGeneration(bart_config(scale_embedding=scale_embedding))
    theirs = theirs.double().eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    assert set(missing.unexpected_keys) == {"user_embedding.weight", "item_embedding.weight"}
    with torch.no_grad():
        ours.user_embedding.weight.zero_()
        ours.item_embedding.weight.zero_()
    inputs = make_inputs()
    expected = barts_logits(theirs, inputs)
    logits, kept = ours.target_logits(inputs)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    assert torch.equal(kept, inputs.labels[inputs.labels != IGNORED])
    encoder = inputs.encoder
    names = {"decoder_input_ids": inputs.decoder_input_ids, "labels": inputs.labels}
    by_names = ours(encoder.input_ids, encoder.attention_mask, **names)
    torch.testing.assert_close(by_names, target_loss(expected, kept, 1))
    torch.testing.assert_close(ours(inputs=inputs), by_names)
    with torch.no_grad():  # not all columns: the layer norm takes a constant away
        ours.user_embedding.weight[1:, :8] = 1.0
    assert not torch.allclose(logits_of(ours, inputs), expected)


def test_eager_and_fused_attention_agree_in_value_and_gradient():
    found = []
    for attention in ("eager", "sdpa"):
        model = make().double()
        model.set_attn_implementation(attention)
        logits, labels = model.target_logits(make_inputs())
        F.cross_entropy(logits, labels).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((logits.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_choose_attention_gives_the_logits_of_fp32_up_to_rounding(precision):
    model = make(init_std=0.1)
    expected = logits_of(model, make_inputs())
    choose_attention(model, precision)
    assert model.config._attn_implementation == ("eager" if precision == "bf16" else "sdpa")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = logits_of(model, make_inputs())
    tolerance = 0.05 if precision == "bf16" else 1e-5
    torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


def test_attention_bias_has_the_precision_of_the_scores():
    bias = attention_bias(torch.tensor([True, False]), torch.zeros(1, dtype=torch.float64))
    assert bias.tolist() == [0.0, float("-inf")]
    assert bias.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_bias(torch.tensor([True]), torch.zeros(1)).dtype == torch.bfloat16


# Padding, several decoder rows.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_ragged_batch_are_what_they_are_alone(attention):
    model = make().double()
    model.set_attn_implementation(attention)
    inputs, alone = make_inputs(), []
    for row, (length, width) in enumerate(zip((9, 4, 12), (3, 1, 4), strict=True)):
        part = inputs.encoder.map(lambda values, row=row, n=length: values[row : row + 1, :n])
        window = (slice(row, row + 1), slice(width))
        decoder = {
            "encoder_row": torch.arange(1),
            "decoder_input_ids": inputs.decoder_input_ids[window],
            "labels": inputs.labels[window],
        }
        alone.append(logits_of(model, ModelInputs(encoder=part, **decoder)))
    torch.testing.assert_close(logits_of(model, inputs), torch.cat(alone), atol=1e-10, rtol=0)


def test_decoder_rows_that_share_a_sequence_read_it_as_if_it_were_repeated():
    model, rows = make().double(), [0, 0, 1, 2, 2]
    shared = make_inputs(lengths=(3, 1, 4, 2, 4), rows=rows)
    repeated = shared.encoder.map(lambda values: values[rows])
    expected = logits_of(model, replace(shared, encoder=repeated, encoder_row=torch.arange(5)))
    torch.testing.assert_close(logits_of(model, shared), expected, atol=1e-10, rtol=0)


def test_no_target_sees_a_later_one():
    model, inputs = make().double(), make_inputs(sizes=(9,), lengths=(4,))
    changed = inputs.decoder_input_ids.clone()
    changed[0, 3] = 7 if changed[0, 3] != 7 else 8
    before = logits_of(model, inputs)
    after = logits_of(model, replace(inputs, decoder_input_ids=changed))
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


# Hugging Face's forward and generate.


@pytest.mark.parametrize("positions", ["from-start", "from-end"])
def test_forward_without_labels_has_the_same_logits_and_fills_in_what_is_left_out(positions):
    model, inputs = make(positions=positions).double(), make_inputs()
    encoder = inputs.encoder
    if positions == "from-end":
        backward = encoder.attention_mask.sum(1, keepdim=True) - 1 - torch.arange(12)
        encoder = replace(encoder, position_ids=backward.clamp(min=0))
    expected = logits_of(model, replace(inputs, encoder=encoder))
    ids = {"user_rows": encoder.user_rows, "item_rows": encoder.item_rows}
    for given in (
        {"attention_mask": encoder.attention_mask, "position_ids": encoder.position_ids, **ids},
        {"attention_mask": encoder.attention_mask.long(), **ids},
        ids,
    ):
        output = model(encoder.input_ids, decoder_input_ids=inputs.decoder_input_ids, **given)
        found = output.logits[inputs.labels != IGNORED]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_generate_works_from_our_encoder_states_and_from_plain_inputs():
    model, encoder = make().double(), make_input()
    memory = model.encode(encoder)
    states, mask = BaseModelOutput(last_hidden_state=memory), encoder.attention_mask
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    from_states = model.generate(encoder_outputs=states, attention_mask=mask, **options)
    given = {name: getattr(encoder, name) for name in WITH_IDS}
    from_inputs = model.generate(**given, **options)
    assert torch.equal(from_states, from_inputs)
    assert (from_states[:, 0] == SPECIAL["mask"]).all()
    assert from_states.shape[0] == 3
    blind = model.generate(encoder.input_ids, encoder.attention_mask, **options)
    assert not torch.equal(blind, from_inputs)
    # One beam is greedy decoding.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokens = torch.full((3, 1), SPECIAL["mask"])
    for _ in range(4):
        logits = model.lm_head(model.decode(tokens, memory, mask))[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(**given, **{**options, "num_beams": 1}), tokens)


# Ranges.


TABLES = [
    ("input_ids", "token", VOCAB),
    ("position_ids", "position", 32),
    ("user_rows", "user", 7),
    ("item_rows", "item", 10),
]


@pytest.mark.parametrize(("field", "name", "limit"), TABLES)
@pytest.mark.parametrize("side", ["above", "below"])
def test_an_id_outside_its_table_is_named_before_any_lookup(field, name, limit, side):
    model, inputs = make(), make_inputs()
    check_ranges(inputs.encoder, model.config)
    values = getattr(inputs.encoder, field).clone()
    values[1, 2] = limit if side == "above" else -1
    encoder = replace(inputs.encoder, **{field: values})
    message = f"^{name} id {values[1, 2]} is outside its table of {limit} rows"
    with pytest.raises(ValueError, match=message) as caught:
        model(inputs=replace(inputs, encoder=encoder))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        model(**vars(encoder), decoder_input_ids=inputs.decoder_input_ids)
    values[1, 2] = limit - 1
    check_ranges(encoder, model.config)


def test_too_long_an_input_names_what_to_lower():
    tokens = torch.full((1, 33), 5)
    with pytest.raises(ValueError, match=r"33 input tokens, 32 positions: lower model\.max_tokens"):
        make()(tokens, decoder_input_ids=tokens[:, :1])
    with pytest.raises(ValueError, match="input_ids is missing"):
        make()(decoder_input_ids=tokens[:, :1])


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_row_0_of_both_tables_stays_zero_while_the_others_learn(decay):
    model = make().train()
    optimizer = build_optimizer(model, Optimizer(decay=decay, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = model.item_embedding.weight.detach().clone()
    for step in range(4):
        model(inputs=make_inputs(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for table in (model.user_embedding, model.item_embedding):
        assert (table.weight[0] == 0).all()
        assert (table.weight[1:] != 0).all()
    assert not torch.equal(model.item_embedding.weight, before)


# Saved and loaded.


def same_weights(first, second) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_model_loads_back_bit_for_bit(tmp_path):
    model = make(num_masks=3, positions="from-end", embedding_dropout=0.25)
    model.config.numbering_hash, model.config.exclude_history = "abc", False
    values = json.loads(json.dumps(model.config.to_dict()))
    assert GenRecConfig.from_dict(values).to_dict() == model.config.to_dict()
    model.save_pretrained(tmp_path)
    again = GenRecForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert same_weights(model, again)
    assert torch.equal(logits_of(model, make_inputs()), logits_of(again, make_inputs()))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "genrec"
    names = {*GenRecFields.__annotations__, "decoder_start_token_id", "pad_token_id"} & {*stored}
    assert {"num_users", "id_dropout", "numbering_hash", "exclude_history"} < names
    for name in names - {"model_type"}:
        assert getattr(again.config, name) == getattr(model.config, name), name
    assert again.config.encoder_positions == "from-end"
    shared = again.model.shared.weight
    assert again.lm_head.weight is shared is again.model.encoder.embed_tokens.weight


# Backbones.


@pytest.fixture(scope="module", params=["with head", "without head"])
def backbone(request, tmp_path_factory):
    """(directory, model) of small BART weights, as BART with its head and as the published files
    without."""
    path = tmp_path_factory.mktemp("bart")
    torch.manual_seed(7)
    bart = BartForConditionalGeneration(bart_config(activation_function="relu"))
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
    config, generation = model.config, model.generation_config
    assert (config.dropout, config.activation_function) == (0.25, "relu")
    assert config.max_input_tokens == 20
    for each in (config, generation):
        assert (each.decoder_start_token_id, each.forced_eos_token_id) == (4, None)
    # Its id tables are a function of the seed.
    first, again, other = (make(seed=seed, backbone=str(path)) for seed in (3, 3, 4))
    assert same_weights(first, again)
    assert not same_weights(first, other)
    # Without ids it has BART's logits.
    inputs = make_inputs(ids=False)
    expected = barts_logits(bart, inputs)
    torch.testing.assert_close(logits_of(first, inputs), expected, atol=1e-5, rtol=0)


def test_a_larger_vocabulary_adds_rows_after_the_old_ones(backbone, tmp_path):
    path, bart = backbone
    model = make(backbone=str(path), vocab_size=VOCAB + 3)
    shared = model.model.shared.weight
    assert model.config.vocab_size == len(shared) == VOCAB + 3
    assert torch.equal(shared[:VOCAB], bart.model.shared.weight)
    for tied in (model.lm_head, model.model.decoder.embed_tokens, model.model.encoder.embed_tokens):
        assert tied.weight is shared
    model.save_pretrained(tmp_path)
    assert same_weights(model, GenRecForConditionalGeneration.from_pretrained(tmp_path))


def test_a_backbones_head_bias_is_left_out_of_training_and_decoding(tmp_path):
    bart = BartForConditionalGeneration(bart_config())
    bart.final_logits_bias.fill_(1.0)
    bart.final_logits_bias[0, 7] = 100.0
    bart.save_pretrained(tmp_path)
    model, inputs = make(backbone=str(tmp_path)), make_inputs()
    given = {name: getattr(inputs.encoder, name) for name in WITH_IDS}
    theirs = model(**given, decoder_input_ids=inputs.decoder_input_ids).logits
    expected = theirs[inputs.labels != IGNORED]
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-5, rtol=0)


def refusal(**shape) -> str:
    with pytest.raises(ValueError) as caught:
        make(**shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_backbone_that_does_not_fit_is_named(backbone, tmp_path):
    path, _ = backbone
    message = f"model.max_tokens 33: {path} has 32 positions"
    assert refusal(backbone=str(path), max_tokens=33) == message
    T5Config().save_pretrained(tmp_path)
    assert "it is a t5 model and model.architecture is bart" in refusal(backbone=str(tmp_path))


@pytest.mark.parametrize(
    "what", ["nothing", "no weights", "broken weights", "broken configuration"]
)
def test_a_backbone_that_cannot_be_loaded_is_named_with_two_ways_out(tmp_path, what):
    path = tmp_path / "backbone"
    if what != "nothing":
        bart_config().save_pretrained(path)
    if what == "broken weights":
        (path / "model.safetensors").write_bytes(b"xx")
    if what == "broken configuration":
        (path / "config.json").write_text("{")
    message = refusal(backbone=str(path))
    assert message.startswith(f"model.backbone {path}: ")
    assert "give its directory, or set model.backbone to null" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("config", "its config.json: encoder_layers is 1000000: it has to be a whole number from"),
        ("missing", "tensor model.encoder.layers.1.fc1.weight is missing"),
        ("nan", "tensor model.encoder.layers.1.fc1.weight holds numbers that are not finite"),
        ("shape", "the shapes of its tensors are not those that its config.json says"),
        ("pickle", "neither a directory with BART weights in safetensors nor reachable"),
    ],
)
def test_a_backbone_with_weights_that_are_not_there_is_refused(tmp_path, damage, message):
    BartForConditionalGeneration(bart_config()).save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.encoder.layers.1.fc1.weight"
    weights = load_file(file)
    if damage == "missing":
        del weights[name]
    elif damage == "nan":
        weights[name][1, 2] = float("nan")
    elif damage == "shape":
        weights[name] = weights[name][1:].clone()
    save_file(weights, file, metadata={"format": "pt"})
    if damage == "config":
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_layers": 10**6}))
    if damage == "pickle":
        file.unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    assert refusal(backbone=str(tmp_path)).startswith(f"model.backbone {tmp_path}: {message}")


def test_no_kernel_that_a_configuration_names_is_used(tmp_path, monkeypatch):
    """With the package `kernels` installed transformers would fetch it from the hub."""
    BartForConditionalGeneration(bart_config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    kernel = {"_attn_implementation": "kernels-community/flash-attn"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **kernel}))

    def fetch(*_args, **_options):
        pytest.fail("a kernel was asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    assert make(backbone=str(tmp_path)).config._attn_implementation == "sdpa"


def test_tokens_beyond_the_backbones_vocabulary_are_set_with_their_rows(backbone):
    path, _ = backbone
    special = {**SPECIAL, "mask": VOCAB + 1}
    sizes = ModelSizes(
        vocab_size=VOCAB + 2, num_users=USERS, num_items=ITEMS, num_masks=1, special=special
    )
    model = build_model(Model(**TINY, backbone=str(path)), sizes)
    assert model.config.decoder_start_token_id == VOCAB + 1
    assert model.generation_config.decoder_start_token_id == VOCAB + 1


def test_a_model_beyond_the_machines_memory_is_refused_before_any_is_asked_for():
    """1,000 layers of the largest width: the first of them alone would fill most machines."""
    largest = {"d_model": 65_536, "encoder_layers": 1_000, "decoder_layers": 1_000}
    message = refusal(**largest, heads=64, ffn=2**20)
    assert re.fullmatch(r"the model has [\d,]{15,} parameters, .* lower model.d_model, .*", message)


def test_the_memory_of_a_model_is_that_of_its_matrices():
    """Of a model that just does not fit: 4 bytes of each parameter, biases and norms left out."""
    model = make(id_dim=8)
    exact = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    exact -= 2 * 2 * 16 + 2 * 8 + 2 * 8 * 16  # rows before the positions, zero rows, projections
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4}.get(name, exact))
        check_memory(model.config)
        patch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4}.get(name, exact - 1))
        with pytest.raises(ValueError, match=f"has {exact:,} parameters, "):
            check_memory(model.config)


def test_hub_names_without_a_network_are_named_with_two_ways_out(tmp_path, monkeypatch):
    """Of a backbone and of a tokenizer, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name, special = "facebook/bart-base", {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
    sizes = ModelSizes(vocab_size=9, num_users=1, num_items=1, num_masks=1, special=special)
    for key, load in (
        ("model.backbone", lambda: build_model(Model(backbone=name), sizes)),
        ("tokens.tokenizer", lambda: load_tokenizer(name)),
    ):
        with pytest.raises(ValueError, match=rf"^{key} {name}: ") as caught:
            load()
        assert f"give its directory, or set {key} to null" in str(caught.value)
