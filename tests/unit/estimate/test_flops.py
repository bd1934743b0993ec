"""Operations: what torch counts of the same micro-batch, packed, and nothing for padding and
repeated samples."""

import copy

import numpy as np
import pytest
import torch
from batch_cases import (
    MASKS,
    WHOLE,
    batches_of,
    cases,
    engine_loss,
    layout,
    marked_sequences,
    whole_step,
)
from torch.utils.flop_counter import FlopCounterMode

from genrec_dist.data.batch import Batch, Work
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.hardware import CARDS, peak_of


def counted(model, batch: Batch) -> float:
    with FlopCounterMode(display=False) as counter:
        engine_loss(model, batch).backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def eager(model):
    """With attention as two products: of the fused kernel of a CPU torch counts nothing."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain


@pytest.mark.parametrize(("space", "mask"), cases())
def test_they_are_what_torch_counts_to_the_operation(eager, space, mask):
    """A sample alone, its decoder rows of one length: no rectangle of attention has a place that is
    filled up."""
    source = marked_sequences()
    samples = whole_step(source, space)
    exact = 0
    for number in range(len(samples)):
        (batch,) = batches_of(samples[number : number + 1], source, layout(90), mask)
        if (
            batch.work.targets == batch.labels.numel()
            and batch.work.inputs == batch.encoder.input_ids.numel()
        ):
            # The formula has a history's keys and values once a sample, as packed steps do; here
            # each further row makes them again.
            again = 6 * (len(batch.labels) - 1) * batch.work.inputs * 2 * eager.config.d_model**2
            assert flops(eager.config, batch.work) + again == counted(eager, batch)
            exact += 1
    assert exact >= 5


@pytest.mark.parametrize(("space", "mask"), cases())
def test_they_are_what_torch_counts_where_no_rectangle_holds_padding(model, space, mask):
    """Samples of one length, so that the rectangles of attention are full; what fills the
    micro-batch up is left out."""
    source = marked_sequences()
    samples = whole_step(source, space)
    (whole,) = batches_of(samples, source, layout(90), mask)
    lengths = whole.encoder.attention_mask.sum(1)
    common = int(lengths.mode().values)
    # Order by length is the batch's own: the samples of one length are found by asking for each
    # alone.
    alone = [
        batches_of(samples[i : i + 1], source, layout(90), mask, packed=True)[0]
        for i in range(len(samples))
    ]
    kept = [i for i, batch in enumerate(alone) if batch.work.inputs == common]
    (batch,) = batches_of(samples[np.array(kept)], source, layout(90), mask, packed=True)
    assert batch.work.inputs == common * len(kept)
    filler = len(batch.encoder.input_ids) - batch.work.inputs
    found = counted(model, batch)
    assert flops(model.config, batch.work) <= found
    slack = Work(
        inputs=filler,
        targets=len(batch.labels) - batch.work.targets,
        labels=len(batch.labels) - batch.work.labels,
        encoder_pairs=filler**2,
    )
    # Targets of a sample look at it side by side, padded where their lengths differ; the filler's
    # at each other.
    wasted = Work(cross_pairs=batch.work.cross_pairs, decoder_pairs=4 * batch.work.decoder_pairs)
    assert found <= flops(model.config, batch.work + slack + wasted) * 1.02


def test_by_hand():
    class Config:
        d_model, encoder_layers, decoder_layers, encoder_ffn_dim, decoder_ffn_dim = 8, 2, 3, 16, 32
        spoken_tokens, vocab_size = 0, 100

    forward = {
        "encoder": 2 * 2 * (10 * (4 * 64 + 2 * 8 * 16) + 2 * 8 * 52),
        "decoder": 2 * 3 * (7 * (4 * 64 + 2 * 8 * 32) + 2 * 8 * 25),
        "across": 2 * 3 * (17 * 2 * 64 + 2 * 8 * 36),
        "head": 2 * 6 * 8 * 100,
    }
    work = Work(inputs=10, targets=7, labels=6, encoder_pairs=52, decoder_pairs=25, cross_pairs=36)
    assert flops(Config, work) == 3 * sum(forward.values())  # type: ignore[arg-type]
    Config.spoken_tokens = 40
    assert flops(Config, work) == 3 * (sum(forward.values()) - 2 * 6 * 8 * 60)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
def test_packed_and_padded_batches_need_the_same(mask):
    source = marked_sequences()
    samples = whole_step(source, "user")
    needs = [
        sum(
            (
                batch.work
                for batch in batches_of(samples, source, mask=mask, budget=budget, packed=packed)
            ),
            Work(),
        )
        for budget, packed in ((WHOLE, False), (WHOLE, True), (200, False), (200, True))
    ]
    assert len(set(needs)) == 1
    assert needs[0].inputs > 0


def test_a_cpu_is_measured_and_an_unknown_card_is_not_guessed(monkeypatch):
    found = peak_of(torch.device("cpu"), "bf16")
    assert found.flops > 1e8
    assert found.source.startswith("measured: a bfloat16 product")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    assert peak_of(torch.device("cuda"), "bf16").flops == CARDS["RTX 3090"][1] * 1e12
    assert peak_of(torch.device("cuda"), "fp32").flops == CARDS["RTX 3090"][0] * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    assert peak_of(torch.device("cuda"), "bf16") is None
