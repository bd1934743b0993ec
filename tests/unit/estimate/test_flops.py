"""Operations: what torch counts of the same micro-batch, none for padding and repeated samples."""

import copy

import numpy as np
import pytest
import torch
from batch_cases import (
    MASKS,
    WHOLE,
    a_model,
    batches_of,
    cases,
    engine_loss,
    layout,
    marked_sequences,
    whole_step,
)
from torch.utils.flop_counter import FlopCounterMode

from genrec_dist.data.batch import Work
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.hardware import CARDS, peak_of


@pytest.fixture(scope="module")
def model():
    return a_model()


def counted(model, batch) -> float:
    with FlopCounterMode(display=False) as counter:
        engine_loss(model, batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("space", "mask"), cases())
def test_flops_equal_torchs_count_to_the_operation(model, space, mask):
    """A sample alone, its decoder rows of one length: no rectangle of attention is padded."""
    # Attention as two products: of a CPU's fused kernel torch counts nothing.
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    source = marked_sequences()
    samples = whole_step(source, space)
    exact = 0
    for number in range(len(samples)):
        (batch,) = batches_of(samples[number : number + 1], source, layout(90), mask)
        work = batch.work
        if (work.targets, work.inputs) == (batch.labels.numel(), batch.encoder.input_ids.numel()):
            # The formula has a history's keys and values once per sample, as packed steps do; here
            # each further row makes them again.
            again = 6 * (len(batch.labels) - 1) * work.inputs * 2 * eager.config.d_model**2
            assert flops(eager.config, work) + again == counted(eager, batch)
            exact += 1
        if exact == 12:  # enough; each is a backward of its own
            break
    assert exact >= 5


@pytest.mark.parametrize(("space", "mask"), cases())
def test_flops_equal_torchs_count_of_packed_samples_of_one_length(model, space, mask):
    """The rectangles of attention are full; what fills the micro-batch up is left out."""
    source = marked_sequences()
    samples = whole_step(source, space)
    (whole,) = batches_of(samples, source, layout(90), mask)
    common = int(whole.encoder.attention_mask.sum(1).mode().values)
    # A batch orders its samples by length: those of one length are found one by one.
    alone = [
        batches_of(samples[i : i + 1], source, layout(90), mask, packed=True)[0]
        for i in range(len(samples))
    ]
    kept = np.array([i for i, batch in enumerate(alone) if batch.work.inputs == common])
    (batch,) = batches_of(samples[kept], source, layout(90), mask, packed=True)
    work, filler = batch.work, len(batch.encoder.input_ids) - batch.work.inputs
    assert work.inputs == common * len(kept)
    found = counted(model, batch)
    assert flops(model.config, work) <= found
    labels = len(batch.labels)
    slack = Work(filler, labels - work.targets, labels - work.labels, encoder_pairs=filler**2)
    # Targets of a sample are padded to the longest for cross-attention; the filler's see each
    # other.
    wasted = Work(cross_pairs=work.cross_pairs, decoder_pairs=4 * work.decoder_pairs)
    assert found <= flops(model.config, work + slack + wasted) * 1.02


def test_flops_by_hand():
    class Config:
        d_model, encoder_layers, decoder_layers, encoder_ffn_dim, decoder_ffn_dim = 8, 2, 3, 16, 32
        spoken_tokens, vocab_size = 0, 100

    encoder = 2 * 2 * (10 * (4 * 64 + 2 * 8 * 16) + 2 * 8 * 52)
    decoder = 2 * 3 * (7 * (4 * 64 + 2 * 8 * 32) + 2 * 8 * 25)
    forward = encoder + decoder + 2 * 3 * (17 * 2 * 64 + 2 * 8 * 36) + 2 * 6 * 8 * 100
    work = Work(inputs=10, targets=7, labels=6, encoder_pairs=52, decoder_pairs=25, cross_pairs=36)
    assert flops(Config, work) == 3 * forward  # type: ignore[arg-type]
    Config.spoken_tokens = 40
    assert flops(Config, work) == 3 * (forward - 2 * 6 * 8 * 60)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.strategy)
def test_packed_and_padded_batches_need_the_same_work(mask):
    source = marked_sequences()
    samples, needs = whole_step(source, "user"), set()
    for budget, packed in ((WHOLE, False), (WHOLE, True), (200, False), (200, True)):
        batches = batches_of(samples, source, mask=mask, budget=budget, packed=packed)
        needs.add(sum((batch.work for batch in batches), Work()))
    assert len(needs) == 1
    assert needs.pop().inputs > 0


def test_peak_is_measured_on_a_cpu_and_not_guessed_for_an_unknown_card(monkeypatch):
    monkeypatch.setattr("genrec_dist.estimate.hardware._SIDE", 256)
    found = peak_of(torch.device("cpu"), "bf16")
    assert found.flops > 1e7
    assert found.source.startswith("measured: a bfloat16 product")
    assert peak_of(torch.device("cpu"), "bf16") is found, "each training would measure anew"
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    peaks = [peak_of(cuda, precision).flops for precision in ("fp32", "bf16")]
    assert peaks == [tflops * 1e12 for tflops in CARDS["RTX 3090"]]
    for name, bf16 in (("H100 PCIe", 756), ("H100 NVL", 835), ("H100 80GB HBM3", 989.4)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, n=name: f"NVIDIA {n}")
        assert peak_of(cuda, "bf16").flops == bf16 * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    assert peak_of(cuda, "bf16") is None
