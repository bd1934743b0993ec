"""The Triton embedding sum against fp64 truth: natively on a GPU; elsewhere test_embedding_sum.py
runs this in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from genrec_kernels import Rows, SumPlan, embedding_sum, plan_sum
from genrec_kernels import torch_reference as reference
from genrec_kernels.gradient_order import CHUNK
from torch import Tensor
from torch.nn import functional as F

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

PAD, OFFSET = 1, 2
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENREC_KERNELS", "triton")


@dataclass
class Case:
    """Ids on the CPU, and tables in fp64: token, position, user, item, the norm's weight and
    bias."""

    ids: list[Tensor]
    tables: list[Tensor]
    gradient: Tensor
    norm: bool = False
    scale: float = 1.0

    def plan(self, **more: Any) -> SumPlan:
        tokens, positions, users, items = (rows.numpy() for rows in self.ids)
        sizes = [len(table) for table in self.tables]
        return plan_sum(
            Rows("token", tokens, sizes[0], PAD),
            Rows("position", positions + OFFSET, sizes[1]),
            Rows("user", users, sizes[2], 0),
            Rows("item", items, sizes[3], 0),
            **more,
        )

    def run(
        self, sum_of: Callable[..., Tensor], dtype: torch.dtype, device: str = DEVICE, **more: Any
    ) -> list[Tensor]:
        """[X, gradient of each table] in `dtype`."""
        tables = [table.to(device, dtype).requires_grad_() for table in self.tables]
        used = tables if self.norm else tables[:4]
        norm = {"norm_weight": tables[4], "norm_bias": tables[5]} if self.norm else {}
        ids = [rows.to(device) for rows in self.ids]
        summed = sum_of(
            *ids,
            *tables[:4],
            scale=self.scale,
            position_offset=OFFSET,
            pad_token_id=PAD,
            **norm,
            **more,
        )
        assert summed.dtype == dtype
        assert summed.shape == (*self.ids[0].shape, self.tables[0].shape[1])
        grads = torch.autograd.grad(summed, used, self.gradient.to(device, dtype))
        return [summed.detach(), *grads]

    def kernel(self, dtype: torch.dtype, **more: Any) -> list[Tensor]:
        return self.run(embedding_sum, dtype, plan=self.plan().to(torch.device(DEVICE)), **more)


def make(
    shape: tuple[int, ...],
    width: int,
    *,
    norm: bool = False,
    scale: float = 1.0,
    hot: float = 0.3,
    seed: int = 0,
) -> Case:
    """Ids as they come: a hot sub-word, padding, positions in order, and a user or an item or
    neither at a place."""
    dice = np.random.default_rng(seed)
    num_tokens, num_positions, num_users, num_items = 37, 300, 5, 19
    tokens = np.where(dice.random(shape) < hot, 7, dice.integers(0, num_tokens, shape))
    tokens[dice.random(shape) < 0.1] = PAD
    positions = np.broadcast_to(np.arange(shape[-1]) % (num_positions - OFFSET), shape).copy()
    kind = dice.integers(0, 3, shape)
    users = dice.integers(1, num_users, shape) * (kind == 1)
    items = dice.integers(1, num_items, shape) * (kind == 2)
    sizes = (num_tokens, num_positions, num_users, num_items)
    tables = [torch.from_numpy(dice.standard_normal((rows, width))) for rows in sizes]
    tables[2][0] = tables[3][0] = 0
    tables += [torch.from_numpy(dice.standard_normal(width)) for _ in range(2)]
    gradient = torch.from_numpy(dice.standard_normal((*shape, width)))
    return Case(
        [torch.from_numpy(rows) for rows in (tokens, positions, users, items)],
        tables,
        gradient,
        norm,
        scale,
    )


def plain(*arguments: Any, **more: Any) -> Tensor:
    """Equation 2 as anybody writes it, of torch's own lookups: what the kernel must not be less
    exact than."""
    tokens, positions, users, items, token, position, user, item = arguments
    summed = F.embedding(tokens, token, padding_idx=PAD) * more["scale"] + F.embedding(
        positions + OFFSET, position
    )
    summed = (
        summed + F.embedding(users, user, padding_idx=0) + F.embedding(items, item, padding_idx=0)
    )
    if "norm_weight" in more:
        summed = F.layer_norm(summed, summed.shape[-1:], more["norm_weight"], more["norm_bias"])
    return summed


NAMES = ("sum", "token", "position", "user", "item", "norm weight", "norm bias")


def check(case: Case, dtype: torch.dtype, found: list[Tensor]) -> None:
    """No result further from the truth than plain torch's, but for a rounding."""
    truth = replace(case, tables=[table.to(dtype).double() for table in case.tables])
    truth.gradient = case.gradient.to(dtype).double()
    expected = truth.run(plain, torch.float64, "cpu")
    eager = case.run(plain, dtype, "cpu")
    for name, ours, theirs, exact in zip(NAMES, found, eager, expected, strict=False):
        ours_off, theirs_off = (
            (result.cpu().double() - exact).abs().max().item() for result in (ours, theirs)
        )
        # The result's own, and those of float32 on the way to it.
        rounding = (
            torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        ) * exact.abs().max().item()
        assert ours_off <= theirs_off + rounding, (name, ours_off, theirs_off)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["sum", "norm"])
@pytest.mark.parametrize(
    ("shape", "width"), [((3, 11), 16), ((1, 257), 123), ((2, 5), 768)], ids=str
)
def test_it_is_as_exact_as_plain_torch(
    shape: tuple[int, ...], width: int, norm: bool, dtype: torch.dtype
) -> None:
    case = make(shape, width, norm=norm, scale=3.0)
    check(case, dtype, case.kernel(dtype))


def test_a_row_of_thousands_of_places_is_summed_in_two_levels() -> None:
    case = make((1, 40 * CHUNK + 3), 8, hot=0.98)
    plan = case.plan()
    assert plan.packed[plan.stretches[0].start + 1] > 0  # long rows
    found = case.kernel(torch.float32)
    check(case, torch.float32, found)
    expected = torch.zeros(37, 8, dtype=torch.float64)
    expected.index_add_(0, case.ids[0].view(-1), case.gradient.float().double().view(-1, 8))
    torch.testing.assert_close(found[1][7].cpu().double(), expected[7], atol=1e-4, rtol=0)


def test_what_is_packed_is_what_is_padded() -> None:
    padded = make((4, 9), 24, norm=True)
    packed = replace(
        padded, ids=[rows.view(-1) for rows in padded.ids], gradient=padded.gradient.view(-1, 24)
    )
    for ours, theirs in zip(
        packed.kernel(torch.float32), padded.kernel(torch.float32), strict=True
    ):
        assert torch.equal(ours, theirs.view_as(ours))


@pytest.mark.parametrize("norm", [False, True])
def test_padding_and_row_0_learn_nothing(norm: bool) -> None:
    case = make((2, 6), 16, norm=norm)
    case.ids = [torch.full((2, 6), value) for value in (PAD, 0, 0, 0)]
    _, token, position, user, item, *_ = case.kernel(torch.float32)
    assert not token.any()
    assert not user.any()
    assert not item.any()
    assert position[OFFSET].any()
    case = make((5, 7), 16, norm=norm)
    _, token, _, user, item, *_ = case.kernel(torch.float32)
    assert not token[PAD].any()
    assert not user[0].any()
    assert not item[0].any()
    assert token.any(1).sum() > 5


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (1,)], ids=str)
def test_an_empty_batch_and_a_single_place(shape: tuple[int, ...]) -> None:
    case = make((4, 5), 16, norm=True)
    size = int(np.prod(shape))
    case.ids = [rows.view(-1)[:size].view(shape) for rows in case.ids]
    case.gradient = case.gradient.view(-1, 16)[:size].view(*shape, 16)
    found = case.kernel(torch.float32)
    assert [len(grad) for grad in found[1:5]] == [37, 300, 5, 19]
    if size:
        check(case, torch.float32, found)
    else:
        assert not any(grad.any() for grad in found[1:])


def test_a_hundred_runs_are_one_to_the_bit() -> None:
    case = make((1, 2 * CHUNK + 9), 16, norm=True, hot=0.9)
    first = case.kernel(torch.bfloat16)
    for _ in range(100 if NATIVE else 2):
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(case.kernel(torch.bfloat16), first, strict=True)
        )


def test_plans_of_any_size_give_one_result() -> None:
    case = make((3, 50), 16)
    first = case.kernel(torch.float32)
    static = case.plan(static=True)
    assert static.packed.numel() > case.plan().packed.numel()
    found = case.run(embedding_sum, torch.float32, plan=static.to(torch.device(DEVICE)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, first, strict=True))
    # Static sizes depend on the shape alone: what a captured graph needs.
    other = make((3, 50), 16, seed=9)
    assert other.plan(static=True).stretches == static.stretches


def test_without_a_plan_the_result_is_the_same() -> None:
    case = make((3, 20), 16)
    with_plan, without = case.kernel(torch.float32), case.run(embedding_sum, torch.float32)
    for ours, theirs in zip(without, with_plan, strict=True):
        torch.testing.assert_close(ours, theirs)
        # On the CPU a plan is made on the spot; on a device plain torch takes over.
        assert NATIVE or torch.equal(ours, theirs)


@pytest.mark.parametrize(("which", "name"), enumerate(("token", "position", "user", "item")))
@pytest.mark.parametrize("bad", [-7, 300])
def test_an_id_outside_its_table_is_named_before_any_launch(
    which: int, name: str, bad: int
) -> None:
    case = make((2, 6), 16)
    case.ids[which][1, 3] = bad
    shown = bad + OFFSET if name == "position" else bad
    with pytest.raises(
        ValueError,
        match=f"^{name} id {shown} is outside its table of {len(case.tables[which])} rows",
    ):
        case.plan()
    if not NATIVE:
        with (
            pytest.raises(ValueError, match=f"^{name} id {shown} is outside its table"),
            torch.no_grad(),
        ):
            embedding_sum(
                *case.ids, *(table.float() for table in case.tables[:4]), position_offset=OFFSET
            )


def test_tables_that_are_left_out_or_frozen() -> None:
    case = make((3, 8), 16)
    ids = [rows.to(DEVICE) for rows in case.ids]
    token, position, _, item = (table.to(DEVICE, torch.float32) for table in case.tables[:4])
    plan = case.plan().to(torch.device(DEVICE))
    item.requires_grad_()
    ours = embedding_sum(*ids, token, position, None, item, pad_token_id=PAD, plan=plan)
    theirs = reference.embedding_sum(*ids, token, position, None, item, pad_token_id=PAD)
    torch.testing.assert_close(ours, theirs)
    weight = case.gradient.to(DEVICE, torch.float32)
    (found,) = torch.autograd.grad(ours, item, weight)
    (expected,) = torch.autograd.grad(theirs, item, weight)
    torch.testing.assert_close(found, expected)
    assert not embedding_sum(*ids, token, position, None, None).requires_grad


def test_fetched_rows_are_float32_beside_bf16_layers_and_their_gradient_is_no_larger_than_they() -> (
    None
):
    case = make((3, 30), 16)
    tables = [table.to(DEVICE, torch.bfloat16) for table in case.tables[:3]]
    fetched = case.tables[3].to(DEVICE, torch.float32).requires_grad_()
    ids = [rows.to(DEVICE) for rows in case.ids]
    plan = case.plan().to(torch.device(DEVICE))
    summed = embedding_sum(
        *ids, *tables, fetched, position_offset=OFFSET, pad_token_id=PAD, plan=plan
    )
    assert summed.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(summed, fetched, case.gradient.to(DEVICE, torch.bfloat16))
    assert (found.dtype, found.shape) == (torch.float32, fetched.shape)
    rounded = case.gradient.bfloat16().double().view(-1, 16)
    expected = torch.zeros(19, 16, dtype=torch.float64).index_add_(0, case.ids[3].view(-1), rounded)
    torch.testing.assert_close(found.cpu().double()[1:], expected[1:], atol=1e-5, rtol=0)


def test_few_factorised_rows_are_projected_before_they_are_looked_up() -> None:
    case = make((4, 20), 16)
    dice = torch.Generator().manual_seed(3)
    narrow = torch.randn(19, 6, generator=dice)
    narrow[0] = 0
    projection = torch.randn(16, 6, generator=dice)
    found = []
    for sum_of, dtype in ((embedding_sum, torch.float32), (reference.embedding_sum, torch.float64)):
        ids = [rows.to(DEVICE) for rows in case.ids]
        tables = [table.to(DEVICE, dtype) for table in case.tables[:3]]
        learned = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (narrow, projection)]
        plan = case.plan().to(torch.device(DEVICE))
        summed = sum_of(
            *ids, *tables, learned[0], item_projection=learned[1], pad_token_id=PAD, plan=plan
        )
        found.append(
            [
                summed.detach(),
                *torch.autograd.grad(summed, learned, case.gradient.to(DEVICE, dtype)),
            ]
        )
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_dropout_drops_in_the_backward_what_it_dropped_in_the_forward(share: float) -> None:
    case = make((4, 40), 32)
    token, position = (
        torch.zeros_like(table, dtype=torch.float32, device=DEVICE) for table in case.tables[:2]
    )
    users, items = (torch.ones(rows, 32, device=DEVICE) for rows in (5, 19))
    users[0] = items[0] = 0
    ids = [rows.to(DEVICE) for rows in case.ids]
    plan = case.plan().to(torch.device(DEVICE))
    arguments: dict[str, Any] = {
        "id_dropout": share,
        "training": True,
        "plan": plan,
        "pad_token_id": PAD,
    }
    tables = [users.requires_grad_(), items.requires_grad_()]
    torch.manual_seed(5)
    summed = embedding_sum(*ids, token, position, *tables, **arguments)
    kept = 0.0 if share == 1 else 1 / (1 - share)
    values = summed.detach().unique().tolist()
    assert values == pytest.approx([0.0, kept] if share < 1 else [0.0])
    seen = (ids[2] > 0) | (ids[3] > 0)
    assert not summed[~seen].any()
    assert (summed[seen] > 0).float().mean().item() == pytest.approx(1 - share, abs=0.03)
    columns = (summed[seen] > 0).float().mean(0)
    assert share == 1 or columns.std() < 0.15  # no column and no place is favoured
    grads = torch.autograd.grad(summed, tables, torch.ones_like(summed))
    for grad, rows in zip(grads, ids[2:], strict=True):
        expected = torch.zeros_like(grad).index_add_(
            0, rows.view(-1), summed.detach().view(-1, 32) * (rows > 0).view(-1, 1)
        )
        torch.testing.assert_close(grad, expected)
    torch.manual_seed(5)
    assert torch.equal(embedding_sum(*ids, token, position, *tables, **arguments), summed)
    assert share == 1 or not torch.equal(
        embedding_sum(*ids, token, position, *tables, **arguments), summed
    )
    still = embedding_sum(*ids, token, position, *tables, **arguments | {"training": False})
    assert still[seen].eq(1).all()


def test_a_row_that_lies_two_billion_numbers_into_its_table() -> None:
    width, row = 1024, 2**21 + 3
    try:
        # Memory that nobody touches is only promised.
        items = torch.empty(row + 1, width, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had here")
    items[row] = 3.0
    token, position = torch.zeros(4, width), torch.zeros(4, width)
    ids = [torch.tensor([value], device=DEVICE) for value in (0, 0, 0, row)]
    with torch.no_grad():
        summed = embedding_sum(*ids, token.to(DEVICE), position.to(DEVICE), None, items)
    assert summed.eq(3.0).all()


def test_the_operators_keep_torchs_rules() -> None:
    case = make((2, 9), 16)
    plan = case.plan().to(torch.device(DEVICE))
    ids = [rows.to(DEVICE) for rows in case.ids]
    tables = [table.to(DEVICE, torch.float32).requires_grad_() for table in case.tables]
    seed = torch.tensor([5], device=DEVICE)
    operators: Any = torch.ops.genrec
    torch.library.opcheck(
        operators.embedding_sum.default,
        (*ids, *tables, seed, plan.packed, plan.sizes(), 2.0, OFFSET, 0.5, 1e-5, True),
    )
    gradient = torch.randn(18, 16, device=DEVICE)
    torch.library.opcheck(
        operators.row_sums.default,
        (gradient, plan.packed, plan.sizes()[:4], 37, torch.bfloat16, 2.0, None, 0.0, 0),
    )
    weight = tables[4].detach()
    torch.library.opcheck(
        operators.norm_backward.default, (gradient, gradient, gradient[:, 0].abs(), weight)
    )


def test_torch_compile_sees_one_operator_and_changes_no_bit() -> None:
    case = make((2, 9), 16, norm=True)
    plan = case.plan().to(torch.device(DEVICE))
    called: list[str] = []

    def watch(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def run(backend: Any) -> list[Tensor]:
        compiled = torch.compile(embedding_sum, fullgraph=True, backend=backend)
        return case.run(compiled, torch.float32, plan=plan)

    expected = case.run(embedding_sum, torch.float32, plan=plan)
    for backend in (watch, "aot_eager"):
        torch._dynamo.reset()
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(run(backend), expected, strict=True)
        )
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
    encoder = EncoderInput(
        torch.from_numpy(np.where(mask, 5 + items % 30, PAD)),
        torch.from_numpy(mask),
        torch.from_numpy(np.arange(9) * mask),
        torch.from_numpy(users),
        torch.from_numpy(items),
    )
    labels = torch.from_numpy(5 + items[:, 2:5] % 30)
    inputs = torch.cat([torch.full((2, 1), 4), labels[:, :-1]], 1)
    batch = Batch(encoder, torch.arange(2), inputs, labels, 2, 6, 2, 21, 24)
    return RankStep([batch], 0, 2, 0)


def train(
    how: str, monkeypatch: pytest.MonkeyPatch, *, outside: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """(losses of 20 steps, weights behind them)."""
    monkeypatch.setenv("GENREC_KERNELS", how)
    torch.manual_seed(0)
    shape = Model(
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        heads=2,
        ffn=8,
        max_tokens=16,
        init_std=0.3,
        dropout=0.0,
    )
    special = {"bos": 0, "pad": PAD, "eos": 2, "mask": 4}
    model: GenRecForConditionalGeneration = build_model(
        shape,
        ModelSizes(
            vocab_size=VOCABULARY,
            num_users=USERS,
            num_items=ITEMS,
            num_masks=1,
            special=special,
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
        summed = model(
            **vars(batch.encoder), encoder_row=batch.encoder_row, decoder_input_ids=batch.decoder_input_ids,
            labels=batch.labels, plan=batch.plan,
        )  # fmt: skip
        loss = summed / batch.num_target_tokens
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
