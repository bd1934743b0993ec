"""The Triton embedding sum against fp64 truth: natively on a GPU; elsewhere test_embedding_sum.py
runs this in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from embedding_cases import NAMES, OFFSET, PAD, Case, all_equal, make_case, plain_sum
from genrec_kernels import EmbeddingTables, embedding_sum
from genrec_kernels import torch_reference as reference
from genrec_kernels.gradient_order import CHUNK
from torch import Tensor

from genrec_dist.config.recipe import Model
from genrec_dist.data.batch import Batch, RankStep
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.id_tables import IdTables, plan_ids
from genrec_dist.training.loader import plan_sums

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not NATIVE and not INTERPRETED, reason="no GPU here; test_embedding_sum.py interprets these"
    ),
]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENREC_KERNELS", "triton")


def kernel(case: Case, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    return case.run(embedding_sum, dtype, DEVICE, order=case.order(DEVICE), **more)


def exact_results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The sum and its gradients in float64, of inputs that were rounded to a type."""
    rounded = {name: one.to(dtype).double() for name, one in case.weights.items()}
    truth = replace(case, weights=rounded, gradient=case.gradient.to(dtype).double())
    return truth.run(plain_sum, torch.float64)


def check(case: Case, dtype: torch.dtype, found: list[Tensor]) -> None:
    """No result is further from the truth than plain torch's, but for a rounding.

    Triton's interpreter cuts bfloat16 off where hardware rounds to nearest. What it computes says
    nothing of a GPU's bfloat16 and is held to a few units alone, so that a wrong sum is found."""
    expected = exact_results(case, dtype)
    cut_off = dtype == torch.bfloat16 and not NATIVE
    eager = case.run(plain_sum, dtype)
    names = ("sum", *case.weights)
    for name, ours, theirs, exact in zip(names, found, eager, expected, strict=True):
        ours_off, theirs_off = (
            (result.cpu().double() - exact).abs().max().item() for result in (ours, theirs)
        )
        # The result's own rounding, and those of float32 on the way to it.
        eps = torch.finfo(dtype).eps * (4 if cut_off else 0.5) + 4 * torch.finfo(torch.float32).eps
        assert ours_off <= theirs_off + eps * exact.abs().max().item(), (name, ours_off, theirs_off)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["sum", "norm"])
@pytest.mark.parametrize(
    ("shape", "width"),
    [((3, 11), 16), ((1, 67), 27), ((1, 257), 123), ((2, 5), 768), ((2, 7), 1024), ((1, 3), 8192)],
    ids=str,
)
def test_kernel_is_as_exact_as_plain_torch(
    shape: tuple[int, ...], width: int, norm: bool, dtype: torch.dtype
) -> None:
    case = make_case(shape, width, norm=norm, scale=3.0)
    check(case, dtype, kernel(case, dtype))


@pytest.mark.skipif(not NATIVE, reason="the interpreter cuts bfloat16 off instead of rounding it")
@pytest.mark.parametrize("norm", [False, True], ids=["sum", "norm"])
@pytest.mark.parametrize("width", [16, 27, 123, 768, 1024, 8192])
def test_bfloat16_is_rounded_once_to_nearest(width: int, norm: bool) -> None:
    """Everything is added in float32: a result is within half a unit in its last place. With a norm
    the gradients go through rows that were kept in bfloat16, so there the sum alone."""
    case = make_case((3, 40), width, norm=norm, scale=3.0)
    found, expected = (kernel(case, torch.bfloat16), exact_results(case, torch.bfloat16))
    for ours, exact in list(zip(found, expected, strict=True))[: 1 if norm else None]:
        unit = torch.finfo(torch.bfloat16).eps * torch.exp2(exact.abs().log2().floor())
        float32 = 64 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert ((ours.cpu().double() - exact).abs() <= unit / 2 + float32).all()


def test_row_of_thousands_of_places_is_summed_in_two_levels() -> None:
    case = make_case((1, 40 * CHUNK + 3), 8, hot=0.98)
    order = case.order()
    assert order.packed[order.segments[0].start + 1] > 0  # long rows
    found = kernel(case, torch.float32)
    check(case, torch.float32, found)
    expected = torch.zeros(37, 8, dtype=torch.float64)
    expected.index_add_(0, case.ids[0].view(-1), case.gradient.float().double().view(-1, 8))
    torch.testing.assert_close(found[1][7].cpu().double(), expected[7], atol=1e-4, rtol=0)


def test_packed_places_equal_padded_ones() -> None:
    padded = make_case((4, 9), 24, norm=True)
    ours = kernel(padded.reshaped(36), torch.float32)
    summed, *grads = kernel(padded, torch.float32)
    assert all_equal(ours, [summed.view(36, 24), *grads])


@pytest.mark.parametrize("norm", [False, True])
def test_padding_and_row_0_learn_nothing(norm: bool) -> None:
    case = make_case((2, 6), 16, norm=norm)
    case.ids = [torch.full((2, 6), value) for value in (PAD, 0, 0, 0)]
    _, token, position, user, item, *_ = kernel(case, torch.float32)
    assert not any(table.any() for table in (token, user, item))
    assert position[OFFSET].any()
    _, token, _, user, item, *_ = kernel(make_case((5, 7), 16, norm=norm), torch.float32)
    assert not any(row.any() for row in (token[PAD], user[0], item[0]))
    assert token.any(1).sum() > 5


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (1,)], ids=str)
def test_empty_batch_and_single_place(shape: tuple[int, ...]) -> None:
    case = make_case((4, 5), 16, norm=True).reshaped(*shape)
    found = kernel(case, torch.float32)
    assert [len(grad) for grad in found[1:5]] == [37, 300, 5, 19]
    if np.prod(shape):
        check(case, torch.float32, found)
    else:
        assert not any(grad.any() for grad in found[1:])


def test_a_hundred_runs_agree_to_the_bit() -> None:
    case = make_case((1, 2 * CHUNK + 9), 16, norm=True, hot=0.9)
    first = kernel(case, torch.bfloat16)
    for _ in range(100 if NATIVE else 2):
        assert all_equal(kernel(case, torch.bfloat16), first)


def test_without_an_order_the_result_is_the_same() -> None:
    case = make_case((3, 20), 16)
    without = case.run(embedding_sum, torch.float32, DEVICE)
    for ours, theirs in zip(without, kernel(case, torch.float32), strict=True):
        torch.testing.assert_close(ours, theirs)
        # On the CPU an order is made on the spot; on a device plain torch takes over.
        assert NATIVE or torch.equal(ours, theirs)


@pytest.mark.parametrize(("which", "name"), enumerate(NAMES[:4]))
@pytest.mark.parametrize("bad", [-7, 300])
def test_id_outside_its_table_is_named_before_any_launch(which: int, name: str, bad: int) -> None:
    case = make_case((2, 6), 16)
    case.ids[which][1, 3] = bad
    shown, rows = bad + OFFSET if name == "position" else bad, len(case.weights[name])
    message = f"^{name} id {shown} is outside its table of {rows} rows"
    with pytest.raises(ValueError, match=message):
        case.order()
    if not NATIVE:
        with pytest.raises(ValueError, match=message), torch.no_grad():
            embedding_sum(*case.ids, case.tables(torch.float32))


def gradients(
    case: Case, sum_of: Callable[..., Tensor], tables: EmbeddingTables, *names: str, **more: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(the sum, the gradients of these fields)."""
    learned = [getattr(tables, name).requires_grad_() for name in names]
    summed = sum_of(*(rows.to(DEVICE) for rows in case.ids), tables, **more)
    return summed, torch.autograd.grad(summed, learned, case.like(summed))


def test_tables_may_be_missing_or_frozen() -> None:
    case = make_case((3, 8), 16)
    order = case.order(DEVICE)
    results = [
        gradients(case, sum_of, case.tables(torch.float32, DEVICE, user=None), "item")
        for sum_of in (partial(embedding_sum, order=order), reference.embedding_sum)
    ]
    torch.testing.assert_close(*results)
    frozen = case.tables(torch.float32, DEVICE, user=None, item=None)
    assert not embedding_sum(*(rows.to(DEVICE) for rows in case.ids), frozen).requires_grad


def test_float32_rows_beside_bf16_layers_get_a_gradient_of_their_own_size() -> None:
    case = make_case((3, 30), 16)
    fetched = case.weights["item"].to(DEVICE, torch.float32)
    tables = case.tables(torch.bfloat16, DEVICE, item=fetched)
    order = case.order(DEVICE)
    summed, (found,) = gradients(case, embedding_sum, tables, "item", order=order)
    assert summed.dtype == torch.bfloat16
    assert (found.dtype, found.shape) == (torch.float32, fetched.shape)
    rounded = case.gradient.bfloat16().double().view(-1, 16)
    expected = torch.zeros(19, 16, dtype=torch.float64).index_add_(0, case.ids[3].view(-1), rounded)
    torch.testing.assert_close(found.cpu().double()[1:], expected[1:], atol=1e-5, rtol=0)


def test_few_factorised_rows_are_projected_before_they_are_looked_up() -> None:
    case = make_case((4, 20), 16)
    dice = torch.Generator().manual_seed(3)
    narrow, projection = (torch.randn(rows, 6, generator=dice) for rows in (19, 16))
    narrow[0] = 0
    order, found = case.order(DEVICE), []
    for sum_of, dtype in (
        (partial(embedding_sum, order=order), torch.float32),
        (reference.embedding_sum, torch.float64),
    ):
        given = {"item": narrow.to(DEVICE, dtype), "item_projection": projection.to(DEVICE, dtype)}
        tables = case.tables(dtype, DEVICE, **given)
        summed, grads = gradients(case, sum_of, tables, "item", "item_projection")
        found.append([summed.detach(), *grads])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_dropout_drops_in_the_backward_what_it_dropped_in_the_forward(share: float) -> None:
    case = make_case((4, 40), 32)
    case.weights = {name: torch.zeros_like(one) for name, one in case.weights.items()}
    for name in ("user", "item"):
        case.weights[name][1:] = 1
    tables = case.tables(torch.float32, DEVICE, id_dropout=share)
    learned = [tables.user.requires_grad_(), tables.item.requires_grad_()]
    ids = [rows.to(DEVICE) for rows in case.ids]

    def run(training: bool = True) -> Tensor:
        return embedding_sum(*ids, tables, training=training, order=case.order(DEVICE))

    torch.manual_seed(5)
    summed = run()
    kept = [0.0] if share == 1 else [0.0, 1 / (1 - share)]
    assert summed.detach().unique().tolist() == pytest.approx(kept)
    seen = (ids[2] > 0) | (ids[3] > 0)
    assert not summed[~seen].any()
    assert (summed[seen] > 0).float().mean().item() == pytest.approx(1 - share, abs=0.03)
    columns = (summed[seen] > 0).float().mean(0)
    assert share == 1 or columns.std() < 0.15  # no column and no place is favoured
    grads = torch.autograd.grad(summed, learned, torch.ones_like(summed))
    for grad, rows in zip(grads, ids[2:], strict=True):
        own = summed.detach().view(-1, 32) * (rows > 0).view(-1, 1)
        torch.testing.assert_close(grad, torch.zeros_like(grad).index_add_(0, rows.view(-1), own))
    torch.manual_seed(5)
    assert torch.equal(run(), summed)
    assert share == 1 or not torch.equal(run(), summed)
    assert run(training=False)[seen].eq(1).all()


def test_row_two_billion_numbers_into_its_table() -> None:
    width, row = 1024, 2**21 + 3
    try:
        # Memory that is not touched is only promised.
        items = torch.empty(row + 1, width, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine has no 4 GiB of address space")
    items[row] = 3.0
    zeros = torch.zeros(4, width, device=DEVICE)
    ids = [torch.tensor([value], device=DEVICE) for value in (0, 0, 0, row)]
    with torch.no_grad():
        assert embedding_sum(*ids, EmbeddingTables(zeros, zeros, item=items)).eq(3.0).all()


def test_operators_keep_torchs_rules() -> None:
    case = make_case((2, 9), 16, norm=True)
    order = case.order(DEVICE)
    ids = [rows.to(DEVICE) for rows in case.ids]
    weights = [one.to(DEVICE, torch.float32).requires_grad_() for one in case.weights.values()]
    seed, gradient = torch.tensor([5], device=DEVICE), torch.randn(18, 16, device=DEVICE)
    operators: Any = torch.ops.genrec
    numbers = (2.0, OFFSET, 0.5, 1e-5, True)
    inputs = (*ids, *weights, seed, order.packed, order.sizes(), *numbers)
    torch.library.opcheck(operators.embedding_sum.default, inputs)
    inputs = (gradient, order.packed, order.sizes()[:4], 37, torch.bfloat16, 2.0, None, 0.0, 0)
    torch.library.opcheck(operators.row_sums.default, inputs)
    inputs = (gradient, gradient, gradient[:, 0].abs(), weights[4].detach())
    torch.library.opcheck(operators.norm_backward.default, inputs)


def test_torch_compile_sees_one_operator_and_changes_no_bit() -> None:
    case = make_case((2, 9), 16, norm=True)
    called: list[str] = []

    def watch(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    expected = kernel(case, torch.float32)
    for backend in (watch, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(embedding_sum, fullgraph=True, backend=backend)
        found = case.run(compiled, torch.float32, DEVICE, order=case.order(DEVICE))
        assert all_equal(found, expected)
    assert [name for name in called if "getitem" not in name] == ["genrec.embedding_sum.default"]


# The model.

USERS, ITEMS, VOCABULARY = 7, 30, 40


def step_of(number: int) -> RankStep:
    """Two sentences of nine places, and targets that depend on them, so that there is something to
    learn."""
    dice = np.random.default_rng(number)
    mask = np.arange(9) < np.array([[9], [6]])
    items = dice.integers(1, ITEMS + 1, (2, 9)) * mask
    users = np.zeros_like(items)
    users[:, 1], items[:, :2] = dice.integers(1, USERS + 1, 2), 0
    tokens = np.where(mask, 5 + items % 30, PAD)
    arrays = (tokens, mask, np.arange(9) * mask, users, items)
    encoder = EncoderInput(*(torch.from_numpy(array) for array in arrays))
    labels = torch.from_numpy(5 + items[:, 2:5] % 30)
    inputs = torch.cat([torch.full((2, 1), 4), labels[:, :-1]], 1)
    batch = Batch(
        encoder=encoder,
        encoder_row=torch.arange(2),
        decoder_input_ids=inputs,
        labels=labels,
        num_samples=2,
        num_target_tokens=6,
        num_targets=2,
        num_tokens=21,
        num_slots=24,
    )
    return RankStep([batch], 0, 2, 0)


SHAPE = Model(
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    heads=2,
    ffn=8,
    max_tokens=16,
    init_std=0.3,
    dropout=0.0,
)


def train(
    how: str, monkeypatch: pytest.MonkeyPatch, *, outside: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """(losses of 20 steps, weights after them)."""
    monkeypatch.setenv("GENREC_KERNELS", how)
    torch.manual_seed(0)
    model: GenRecForConditionalGeneration = build_model(
        SHAPE,
        ModelSizes(
            vocab_size=VOCABULARY,
            num_users=USERS,
            num_items=ITEMS,
            num_masks=1,
            special={"bos": 0, "pad": PAD, "eos": 2, "mask": 4},
            ids_outside=outside,
        ),
    )
    model.to(DEVICE).train()
    tables = IdTables(model.config, 0, Ranks(), torch.device(DEVICE))
    # Adam would blow up the rounding in gradients that are zero but for it, as a key's bias has.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for number in range(20):
        step = step_of(number % 4)
        if outside:
            step = plan_ids(step, model.config)
        if how == "triton":
            step = plan_sums(step, model.config)
        tables.attach(model, step)
        batch = step.micro_batches[0].to(torch.device(DEVICE))
        loss = model(inputs=batch) / batch.num_target_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tables.learn(0.1)
        losses.append(loss.item())
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return losses, weights | {f"{kind} rows": table.full() for kind, table in tables.tables.items()}


@pytest.mark.parametrize("outside", [False, True], ids=["dense", "row-adagrad"])
def test_twenty_steps_with_the_kernel_are_twenty_steps_without(
    outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, weights = train("triton", monkeypatch, outside=outside)
    others, other_weights = train("reference", monkeypatch, outside=outside)
    assert losses == pytest.approx(others, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], atol=1e-5, rtol=0, msg=name)
