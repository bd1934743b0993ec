"""T5 as the encoder-decoder: its numbers against Hugging Face's T5 and by hand, and what it is built
from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from genrec_dist.config.recipe import Model
from genrec_dist.data.batch import IGNORED, ItemTargets, ModelInputs, Work
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.estimate.flops import flops
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import choose_layers, choose_loss
from genrec_dist.model.seq2seq.t5 import GenRecT5ForConditionalGeneration

SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
VOCAB, USERS, ITEMS = 40, 6, 9
SHAPE = {"d_model": 16, "heads": 2, "ffn": 32, "max_tokens": 32}


def make(
    vocab_size: int = VOCAB, architecture: str = "t5", **model: object
) -> GenRecT5ForConditionalGeneration:
    sizes = ModelSizes(
        vocab_size=vocab_size, num_users=USERS, num_items=ITEMS, num_masks=1, special=SPECIAL
    )
    torch.manual_seed(0)
    settings = {**SHAPE, "architecture": architecture, **model}
    return build_model(Model(**settings), sizes).eval()  # type: ignore[arg-type,return-value]


def t5_in(folder: Path, **more: object) -> T5ForConditionalGeneration:
    """Random weights of a shape that no recipe has: heads narrower than the width."""
    torch.manual_seed(1)
    shape = {"d_model": 16, "d_kv": 4, "num_heads": 2, "d_ff": 24, "num_layers": 2}
    config = T5Config(
        **{
            **shape,
            "num_decoder_layers": 1,
            "vocab_size": VOCAB,
            "decoder_start_token_id": 0,
            **more,
        }
    )
    t5 = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, values in t5.named_parameters():
            if name.endswith("relative_attention_bias.weight"):
                values.mul_(20)  # so that positions matter
    t5.save_pretrained(folder)
    return t5


def make_inputs(
    lengths: tuple[int, ...] = (9, 4, 12), targets: tuple[int, ...] = (3, 1, 4)
) -> ModelInputs:
    dice = torch.Generator().manual_seed(2)
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def draw(low: int, high: int, like: torch.Tensor) -> torch.Tensor:
        return torch.randint(low, high, like.shape, generator=dice)

    seen_RT = torch.arange(max(targets)) < torch.tensor(targets)[:, None]
    labels_RT = torch.where(seen_RT, draw(5, VOCAB, seen_RT), IGNORED)
    inputs_RT = torch.full_like(labels_RT, SPECIAL["pad"])
    inputs_RT[:, 0] = SPECIAL["mask"]
    inputs_RT[:, 1:] = labels_RT[:, :-1].clamp(min=SPECIAL["pad"])
    return ModelInputs(
        encoder=EncoderInput(
            input_ids=torch.where(mask_BL, draw(5, VOCAB, mask_BL), SPECIAL["pad"]),
            attention_mask=mask_BL,
            position_ids=torch.arange(max(lengths)) * mask_BL,
            user_rows=draw(0, USERS + 1, mask_BL) * mask_BL,
            item_rows=draw(0, ITEMS + 1, mask_BL) * mask_BL,
        ),
        encoder_row=torch.arange(len(targets)),
        decoder_input_ids=inputs_RT,
        labels=labels_RT,
    )


def theirs_of(t5: T5ForConditionalGeneration, inputs: ModelInputs) -> torch.Tensor:
    """Hugging Face's summed loss."""
    output = t5(
        input_ids=inputs.encoder.input_ids,
        attention_mask=inputs.encoder.attention_mask.long(),
        decoder_input_ids=inputs.decoder_input_ids,
    )
    return F.cross_entropy(output.logits.flatten(0, 1), inputs.labels.flatten(), reduction="sum")


@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_with_ids_of_zero_it_is_t5(tmp_path: Path, feed_forward: str, head: str) -> None:
    """Loss and gradients of each weight."""
    t5 = t5_in(tmp_path, feed_forward_proj=feed_forward)
    model, inputs = make(backbone=str(tmp_path)), make_inputs()
    choose_loss(model, head)  # type: ignore[arg-type]
    with torch.no_grad():
        model.user_embedding.weight.zero_()
        model.item_embedding.weight.zero_()
    loss, expected = model(inputs=inputs), theirs_of(t5, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward(), expected.backward()
    ours = dict(model.named_parameters())
    for name, parameter in t5.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)
    assert ours["item_embedding.weight"].grad[1:].abs().sum() > 0
    assert not ours["item_embedding.weight"].grad[0].any()


@pytest.mark.parametrize("id_dim", [0, 5])
def test_the_encoder_reads_the_sum_of_tokens_and_ids_alone(id_dim: int) -> None:
    model, encoder = make(id_dim=id_dim), make_inputs().encoder
    ids_BLD = [
        F.embedding(rows, table.weight)
        for rows, table in (
            (encoder.user_rows, model.user_embedding),
            (encoder.item_rows, model.item_embedding),
        )
    ]
    if id_dim:
        ids_BLD = [
            values @ projection.weight.T
            for values, projection in zip(
                ids_BLD, (model.user_projection, model.item_projection), strict=True
            )
        ]
    expected_BLD = F.embedding(encoder.input_ids, model.shared.weight) + ids_BLD[0] + ids_BLD[1]
    torch.testing.assert_close(model.embed(encoder), expected_BLD)
    moved = EncoderInput(**{**vars(encoder), "position_ids": encoder.position_ids + 3})
    assert torch.equal(model.encode(encoder), model.encode(moved))


def test_padding_changes_nothing() -> None:
    model, inputs = make(), make_inputs((5, 5), (2, 2))
    alone = model.encode(inputs.encoder)
    wider = inputs.encoder.map(lambda values: F.pad(values, (0, 3)))
    torch.testing.assert_close(model.encode(wider)[:, :5], alone)


def test_dropouts_are_the_recipes(tmp_path: Path) -> None:
    model = make(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).train()
    inputs = make_inputs()
    assert torch.equal(model(inputs=inputs), model(inputs=inputs))
    for key in ("dropout", "attention_dropout", "activation_dropout", "embedding_dropout"):
        model = make(**{"dropout": 0.0, key: 0.5}).train()
        assert not torch.equal(model(inputs=inputs), model(inputs=inputs)), key
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.config.id_dropout == 0.5


def test_fresh_weights_begin_as_t5s_and_ids_by_init_std() -> None:
    model = make(vocab_size=4000, init_std=0.07)
    assert float(model.shared.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(model.item_embedding.weight[1:].detach().std()) == pytest.approx(0.07, rel=0.3)
    assert not model.item_embedding.weight[0].any()
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    query = model.encoder.block[0].layer[0].SelfAttention.q.weight.detach()
    assert float(query.std()) == pytest.approx((16 * 8) ** -0.5, rel=0.2)


def test_the_item_head_and_a_start_from_its_state() -> None:
    model, inputs = make(item_loss=1.0, decoder_start="state"), make_inputs()
    plain = model(inputs=inputs)
    places_R = torch.tensor([0, 14, 26])
    targets = ItemTargets(places_R, torch.tensor([3, 0, 8]), torch.arange(3))
    with_head = model(inputs=ModelInputs(**{**vars(inputs), "item_targets": targets}))
    memory_BLD = model.encode(inputs.encoder)
    state_RD = memory_BLD.flatten(0, 1)[places_R]
    hidden = model.decode(
        inputs.decoder_input_ids, memory_BLD, inputs.encoder.attention_mask, state_RD
    )
    expected = F.cross_entropy(
        (hidden @ model.shared.weight.T).flatten(0, 1), inputs.labels.flatten(), reduction="sum"
    )
    items = state_RD @ model.item_embedding.weight[1:].T
    expected = expected + F.cross_entropy(items, targets.items_R, reduction="sum")
    torch.testing.assert_close(with_head, expected)
    assert not torch.isclose(plain, with_head)


def test_backbones_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    bart = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=VOCAB,
    )  # fmt: skip
    BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    t5_in(tmp_path / "t5")
    t5_in(tmp_path / "untied", tie_word_embeddings=False)
    text = (tmp_path / "untied" / "config.json").read_text()
    text = text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    (tmp_path / "untied" / "config.json").write_text(text)
    for folder, architecture, message in (
        ("bart", "t5", "it is a bart model and model.architecture is t5: set model.architecture bart"),
        ("t5", "bart", "it is a t5 model and model.architecture is bart: set model.architecture t5"),
        ("untied", "t5", "its head has weights of its own (T5 1.1, FLAN-T5)"),
        ("none", "t5", "neither a directory with T5 weights in safetensors"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            make(backbone=str(tmp_path / folder), architecture=architecture)
    (tmp_path / "t5" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither a directory with T5 weights in safetensors"):
        make(backbone=str(tmp_path / "t5"))


def test_a_larger_tokenizer_adds_rows(tmp_path: Path) -> None:
    t5 = t5_in(tmp_path)
    model = make(vocab_size=VOCAB + 3, backbone=str(tmp_path))
    assert model.shared.weight.shape == (VOCAB + 3, 16)
    assert torch.equal(model.shared.weight[:VOCAB], t5.shared.weight)
    assert model.lm_head.weight is model.shared.weight


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_its_operations_are_those_of_the_formula(tmp_path: Path, feed_forward: str) -> None:
    """One sample without padding, as torch counts its forward pass."""
    t5_in(tmp_path, feed_forward_proj=feed_forward)
    model, inputs = make(backbone=str(tmp_path)), make_inputs((9,), (4,))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs=inputs)
    work = Work(inputs=9, targets=4, labels=4, encoder_pairs=81, decoder_pairs=16, cross_pairs=36)
    assert flops(model.config, work) == 3 * counter.get_total_flops()


def test_layers_that_are_computed_again_give_the_same_gradients() -> None:
    grads = []
    for again in (False, True):
        model, inputs = make(dropout=0.0).train(), make_inputs()
        choose_layers(model, compiled=False, recompute=again)
        model(inputs=inputs).backward()
        assert model.encoder.gradient_checkpointing is again
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
