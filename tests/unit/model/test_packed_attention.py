"""Attention over packed sequences, against attention written out sequence by sequence in
float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.data.batch import in_one_buffer, out_of_buffer
from genrec_dist.data.packing import Attended, filled_size, segments_of
from genrec_dist.model.packed_attention import LONG_ON_CPU, ByRectangles, attend, has_varlen

HEADS, WIDTH, SCALE = 2, 4, 0.5
DEVICE = torch.device("cuda")


def drawn(lengths: list[int], seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), HEADS, WIDTH)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(query, key, value, attended: Attended) -> torch.Tensor:
    """One sequence after another."""
    lengths = [segments.lengths.tolist() for segments in (attended.queries, attended.keys)]
    parts = query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1])
    out, first = [], 0
    for q, k, v in zip(*parts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
        if attended.causal:
            hidden = ~torch.ones(len(q), len(k), dtype=torch.bool).tril()
        if attended.visible is not None:
            visible = torch.from_numpy(attended.visible[first : first + len(q)])
            hidden = torch.arange(len(k)) >= visible[:, None]
        first += len(q)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


def compared(attended: Attended, dtype=torch.float64) -> float:
    """Largest difference of result and gradients to those written out."""
    lengths = [segments.lengths.tolist() for segments in (attended.queries, attended.keys)]
    inputs = [drawn(lengths[min(seed, 1)], seed, dtype).requires_grad_() for seed in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = drawn(lengths[0], 9)
    got, wanted = attend(*inputs, attended, SCALE), by_hand(*exact, attended)
    got.backward(grad.to(dtype))
    wanted.backward(grad)
    pairs = [(got, wanted), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    return max(float((a.detach().double() - b.detach()).abs().max()) for a, b in pairs if a.numel())


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_attend_is_attention_within_each_sequence(lengths, data):
    keys = segments_of(np.array(sorted(lengths, reverse=True)))
    counts = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    rows, queries = segments_of(np.array([n for n in counts if n] or [1])), np.array(counts)
    assert compared(Attended(keys, keys)) < 1e-12
    assert compared(Attended(segments_of(queries), keys)) < 1e-12
    assert compared(Attended(rows, rows, causal=True, by_length=False)) < 1e-12
    visible = [data.draw(st.integers(1, n)) for n in np.repeat(keys.lengths, queries)]
    seen = Attended(segments_of(queries), keys, visible=np.array(visible, np.int64))
    assert compared(seen) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_of_by_rectangles_is_the_derivative(causal):
    segments = segments_of(np.array([5, 4, 4, 2, 1]))
    attended = Attended(segments, segments, causal=causal, by_length=not causal)
    inputs = [drawn(segments.lengths.tolist(), seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(
        lambda *qkv: ByRectangles.apply(*qkv, attended, SCALE, 0.0), inputs
    )


@pytest.mark.parametrize("longest", [LONG_ON_CPU // 4, LONG_ON_CPU + 7], ids=["short", "long"])
def test_in_bfloat16_it_errs_by_bfloat16(longest):
    segments = segments_of(np.array([longest, longest - 3, 9, 9, 1]))
    assert compared(Attended(segments, segments), torch.bfloat16) < 0.05
    assert (
        compared(Attended(segments_of(np.array([3, 1, 2, 0, 5])), segments), torch.bfloat16) < 0.05
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("width", [32, 64])
def test_the_kernel_for_ragged_sequences_gives_the_same(width):
    """On a GPU: bfloat16 as autocast hands it over, and what a rectangle of the same numbers
    gives."""
    generator = torch.Generator().manual_seed(0)
    keys, rows = np.array([300, 41, 41, 9, 1]), np.array([4, 2, 6, 2, 0])
    for queries, causal in ((keys, False), (rows, False), (keys, True)):
        attended = Attended(segments_of(queries), segments_of(keys), causal=causal)
        buffer, placed = in_one_buffer(attended)
        there = out_of_buffer(buffer.to(DEVICE), placed)
        inputs = [
            torch.randn(int(lengths.sum()), 4, width, generator=generator)
            .to(DEVICE, torch.bfloat16)
            .requires_grad_()
            for lengths in (queries, keys, keys)
        ]
        assert has_varlen(inputs[0])
        twins = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        got = attend(*inputs, there, SCALE)
        wanted = ByRectangles.apply(*twins, attended, SCALE, 0.0)
        grad = torch.randn(got.shape, generator=generator).to(DEVICE, torch.bfloat16)
        got.backward(grad)
        wanted.backward(grad)
        found, expected = (
            [out, *(x.grad for x in of)] for out, of in ((got, inputs), (wanted, twins))
        )
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_no_sequence_sees_another():
    """NaN in one sequence stays there."""
    lengths = [9, 8, 8, 3, 3, 1]
    segments = segments_of(np.array(lengths))
    inputs = [drawn(lengths, seed) for seed in range(3)]
    for tensor in inputs:
        tensor[9:17] = float("nan")
    for tensor in inputs:
        tensor.requires_grad_()
    out = attend(*inputs, Attended(segments, segments), SCALE)
    bad = torch.zeros(len(out), dtype=torch.bool)
    bad[9:17] = True
    assert out[bad].isnan().all()
    assert not out[~bad].isnan().any()
    out.sum().backward()
    assert not any(tensor.grad[~bad].isnan().any() for tensor in inputs)


def test_dropout_of_weights_keeps_their_mean_and_its_gradient():
    segments = segments_of(np.array([6] * 4000))
    attended = Attended(segments, segments)
    inputs = [drawn([24000], seed).requires_grad_() for seed in range(3)]
    torch.manual_seed(0)
    out = attend(*inputs, attended, SCALE, 0.25)
    whole = attend(*inputs, attended, SCALE)
    assert not torch.equal(out, whole)
    assert (out - whole).mean().abs() < 0.005
    # In the values it is linear: the gradient is the very weights, kept ones scaled up.
    torch.manual_seed(0)
    again = attend(inputs[0], inputs[1], inputs[2] + 1, attended, SCALE, 0.25)
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(attend(*inputs, attended, SCALE, 0.25).sum(), inputs[2])
    assert float((again - out).sum()) == pytest.approx(float(grad.sum()), rel=1e-6)
    # Each head drops for itself, and a query whose keys are all dropped gets nothing.
    segments = segments_of(np.array([3, 2]))

    def seeded(*qkv):
        torch.manual_seed(3)
        return ByRectangles.apply(*qkv, Attended(segments, segments), SCALE, 0.5)

    few = [drawn([5], seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(seeded, few)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=400))
@settings(max_examples=60, deadline=None)
def test_groups_hold_each_sequence_once_with_little_padding(lengths):
    segments = segments_of(np.array(sorted(lengths, reverse=True)))
    groups = Attended(segments, segments).groups
    ends = np.cumsum([0, *(group.keys.number for group in groups)]).tolist()
    assert [group.keys.first for group in groups] == ends[:-1]
    assert sum(group.size for group in groups) == len(lengths)
    assert sum(group.keys.number for group in groups) == sum(lengths)
    for group in groups:
        rectangle = group.size * group.keys.longest
        assert rectangle - group.keys.number <= 0.25 * rectangle


@given(num_tokens=st.integers(1, 10**6))
def test_sizes_to_fill_up_to_are_few_and_near(num_tokens):
    size = filled_size(num_tokens)
    assert num_tokens <= size <= max(num_tokens * (1 + 1 / 32), num_tokens + 7)
    assert filled_size(size) == size
    octave = range(2**12 + 1, 2**13 + 1, 7)
    assert len({filled_size(number) for number in octave}) <= 33
