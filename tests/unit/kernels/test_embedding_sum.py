"""The embedding sum on a CPU: the twin, its plan, the choice by device, and the kernel in Triton's
interpreter."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genrec_kernels import Rows, SumPlan, embedding, embedding_sum, plan_sum
from genrec_kernels import torch_reference as reference
from genrec_kernels.gradient_order import CHUNK, parts
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from torch import Tensor
from torch.nn import functional as F
from two_ranks import environment

KERNEL_TESTS = Path(__file__).with_name("test_kernel_embedding.py")
TRITON = importlib.util.find_spec("triton") is not None
PAD = 3


# The kernel, where there is no GPU.


@pytest.mark.skipif(not TRITON, reason="Triton is not installed; it is there for Linux alone")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.ranks
def test_the_kernel_in_the_interpreter() -> None:
    """In a process of its own: the switch must stand before Triton is imported, and holds for all
    it runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
    done = subprocess.run(
        command,
        env=environment(TRITON_INTERPRET="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    last = done.stdout.strip().splitlines()[-1]
    found = re.match(r"(\d+) passed", last)
    assert found, last
    assert int(found[1]) >= 45
    assert "fail" not in last


NATIVE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from genrec_kernels import triton_sum

IDS, NUMBERS = {"tokens_at", "positions_at", "users_at", "items_at", "seed_at"}, {"num_places", "position_offset"}
PLANS, FLOATS = {"header_at", "order_at", "chunks_at", "longs_at"}, {"rstd_at", "weight_parts", "bias_parts", "partial_at"}
FACTORS = {"scale", "dropped", "kept_scale", "eps"}

def kind(name, table):
    return (
        "*i64" if name in IDS else "*i32" if name in PLANS else "i32" if name in NUMBERS
        else "*fp32" if name in FLOATS else "fp32" if name in FACTORS else table
    )

for kernel in (triton_sum._sum_kernel, triton_sum._norm_kernel, triton_sum._chunk_kernel, triton_sum._long_kernel):
    names = kernel.arg_names
    fixed = {
        "WIDTH": 768, "USERS": True, "ITEMS": True, "DROPOUT": True, "NORM": True, "KEEP": True, "STRIP": 32, "table": 1,
        "BLOCK_K": 2, "BLOCK_D": 1024,
    }
    fixed = {name: value for name, value in fixed.items() if name in names}
    signature = {name: "constexpr" if name in fixed else kind(name, "*bf16") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    assert not re.search(r"\\b(atom|red)\\.", compiled.asm["ptx"].replace(".shared.", " ")), "atomics have no order"
    print(kernel.__name__)
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="Triton is not installed; it is there for Linux alone")
@pytest.mark.parametrize("capability", [86, 90], ids=["RTX 3090", "H200"])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    own = environment(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT / "kernels"))
    script = tmp_path / "compile.py"
    script.write_text(NATIVE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env=own,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_sum_kernel", "_norm_kernel", "_chunk_kernel", "_long_kernel"]


# The twin.


def arguments(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, seed: int = 0, learns: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Ids and tables: token, position, user, item. Few users, many items, as in a batch."""
    dice = torch.Generator().manual_seed(seed)
    sizes = (11, 9, 4, 13)
    ids = [torch.randint(0, size, shape, generator=dice) for size in sizes]
    ids[2] *= torch.rand(shape, generator=dice) < 0.1
    tables = [
        torch.randn(size, width, generator=dice, dtype=torch.float64).to(dtype) for size in sizes
    ]
    tables[2][0] = tables[3][0] = 0
    return ids, [table.requires_grad_(learns) for table in tables]


def plain(ids: list[Tensor], tables: list[Tensor], scale: float) -> Tensor:
    summed = F.embedding(ids[0], tables[0], padding_idx=PAD) * scale + F.embedding(
        ids[1], tables[1]
    )
    return (
        summed
        + F.embedding(ids[2], tables[2], padding_idx=0)
        + F.embedding(ids[3], tables[3], padding_idx=0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 11.3])
@pytest.mark.parametrize("shape", [(5, 7), (300,), (0, 4)], ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_block_by_block_it_is_plain_torch_to_the_bit(
    large: bool,
    shape: tuple[int, ...],
    scale: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_LARGE", 0 if large else 1 << 23)
    monkeypatch.setattr(
        reference, "_BLOCK", 6 * 16
    )  # six places a block: many blocks, the last one short
    ids, tables = arguments(shape, 16, dtype)
    gradient = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = reference.embedding_sum(*ids, *tables, scale=scale, pad_token_id=PAD)
    theirs = plain(ids, tables, scale)
    assert torch.equal(ours, theirs)
    found, expected = (torch.autograd.grad(summed, tables, gradient) for summed in (ours, theirs))
    assert all(torch.equal(grad, other) for grad, other in zip(found, expected, strict=True))
    assert not shape[0] or all(grad.any() for grad in found)


def test_positions_count_from_their_offset() -> None:
    ids, tables = arguments((4, 6), 8, torch.float32)
    shifted = [ids[0], ids[1] - ids[1].clamp(max=2), *ids[2:]]
    moved = [shifted[0], shifted[1] + 2, *shifted[2:]]
    moved[1] = moved[1].clamp(max=8)
    shifted[1] = moved[1] - 2
    assert torch.equal(
        reference.embedding_sum(*shifted, *tables, position_offset=2),
        reference.embedding_sum(*moved, *tables),
    )


@pytest.mark.parametrize("options", ["sum", "norm", "projection", "without users", "offset"])
def test_the_twins_gradients_are_its_derivatives(options: str) -> None:
    ids, tables = arguments((2, 3), 4, torch.float64)
    dice = torch.Generator().manual_seed(2)
    more: dict[str, Any] = {"scale": 2.0}
    learned: dict[str, Tensor] = {}
    if options == "norm":
        learned = {
            name: torch.randn(4, generator=dice, dtype=torch.float64)
            for name in ("norm_weight", "norm_bias")
        }
    if options == "projection":
        tables[3] = torch.randn(13, 3, generator=dice, dtype=torch.float64, requires_grad=True)
        learned = {"item_projection": torch.randn(4, 3, generator=dice, dtype=torch.float64)}
    if options == "offset":
        ids[1] %= 7
        more["position_offset"] = 2
    if options in ("sum", "offset"):
        ids[2][0, 0], ids[3][:] = 2, ids[3].clamp(min=1)
    present = [
        table
        for number, table in enumerate(tables)
        if not (options == "without users" and number == 2)
    ]
    names = list(learned)
    learned_list = [tensor.requires_grad_() for tensor in learned.values()]

    def summed(*values: Tensor) -> Tensor:
        chosen = list(values[: len(present)])
        if options == "without users":
            chosen.insert(2, None)  # type: ignore[arg-type]
        return reference.embedding_sum(
            *ids, *chosen, **more, **dict(zip(names, values[len(present) :], strict=True))
        )

    # Row 0 of an id table is held at zero: no derivative is asked of it.
    free = [rows > 0 for rows in ids[2:]]
    assert any(mask.any() for mask in free)
    for rows in ids[2:]:
        rows.clamp_(min=1)
    assert torch.autograd.gradcheck(summed, (*present, *learned_list))


def test_the_norm_is_torchs_layer_norm() -> None:
    ids, tables = arguments((3, 5), 8, torch.float32)
    weight, bias = torch.randn(8), torch.randn(8)
    normed = reference.embedding_sum(
        *ids, *tables, norm_weight=weight, norm_bias=bias, norm_eps=0.1
    )
    assert torch.equal(normed, F.layer_norm(plain(ids, tables, 1.0), (8,), weight, bias, 0.1))


def test_an_id_table_of_another_type_is_added_in_the_tokens_and_learns_in_its_own() -> None:
    ids, tables = arguments((3, 5), 8, torch.bfloat16)
    exact = tables[3].detach().float().requires_grad_()
    summed = reference.embedding_sum(*ids, *tables[:3], exact)
    assert summed.dtype == torch.bfloat16
    assert torch.equal(summed, reference.embedding_sum(*ids, *tables))
    (grad,) = torch.autograd.grad(summed.sum(), exact)
    assert grad.dtype == torch.float32


# The plan.


def sums_by(plan: SumPlan, number: int, values_nD: np.ndarray, num_rows: int) -> np.ndarray:
    """What a kernel makes of an order: chunks, then the partial sums of long rows; counted, so that
    nothing comes twice."""
    found = parts(plan.packed, plan.stretches[number])
    num_chunks, num_longs, _, _ = found.header.tolist()
    order = found.order.numpy()
    result = np.full((num_rows, values_nD.shape[1]), np.nan)
    partial = np.full((len(order) * 2 // CHUNK + 1, values_nD.shape[1]), np.nan)
    for first, count, target in found.chunks[:num_chunks].tolist():
        assert 1 <= count <= CHUNK
        places = order[first : first + count]
        assert (np.diff(places) > 0).all()
        into, row = (result, target) if target >= 0 else (partial, -1 - target)
        assert np.isnan(into[row]).all()
        into[row] = values_nD[places].sum(0)
    for first, count, row in found.longs[:num_longs].tolist():
        assert count > 1
        assert np.isnan(result[row]).all()
        result[row] = partial[first : first + count].sum(0)
    assert not found.chunks[num_chunks:].any()
    assert not found.longs[num_longs:].any()
    return np.nan_to_num(result)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 700), st.sampled_from([1, 2, 5, 1000]), st.booleans(), st.integers(0, 99))
def test_a_plan_names_each_occurrence_once_and_in_order(
    num_places: int, num_rows: int, static: bool, seed: int
) -> None:
    dice = np.random.default_rng(seed)
    tables = [Rows(name, dice.integers(0, num_rows, num_places), num_rows, silent)
              for name, silent in (("token", 0), ("position", None), ("user", 0), ("item", None))]  # fmt: skip
    plan = plan_sum(tables[0], tables[1], tables[2], tables[3], static=static)
    assert (plan.packed.dtype, plan.num_places) == (torch.int32, num_places)
    assert all(stretch.start % 4 == 0 for stretch in plan.stretches)
    values = dice.integers(-100, 100, (num_places, 2)).astype(float)
    for number, rows in enumerate(tables):
        expected = np.zeros((num_rows, 2))
        np.add.at(expected, rows.ids, values)
        if rows.silent is not None:
            expected[rows.silent] = 0
        assert np.array_equal(sums_by(plan, number, values, num_rows), expected)
    if static:
        other = [rows._replace(ids=dice.permutation(rows.ids) * 0) for rows in tables]
        assert (
            plan_sum(other[0], other[1], other[2], other[3], static=True).stretches
            == plan.stretches
        )


def test_a_table_that_is_not_there_has_no_order() -> None:
    rows = Rows("token", np.array([[1, 2]]), 3)
    plan = plan_sum(rows, rows, None, None)
    assert plan.stretches[2] == plan.stretches[3] == (0, 0, 0, 0)
    assert sums_by(plan, 1, np.ones((2, 1)), 3)[:, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_id_outside_its_table_makes_no_plan(bad: int) -> None:
    good = Rows("token", np.array([[1, 2]]), 3)
    with pytest.raises(
        ValueError,
        match=rf"^item id {bad} is outside its table of 5 rows: prepare and shard again$",
    ):
        plan_sum(good, good, None, Rows("item", np.array([[4, bad]]), 5))


# The choice.


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_said", set())
    monkeypatch.delenv("GENREC_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("nothing_said")
def test_on_a_cpu_it_is_plain_torch_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ids, tables = arguments((2, 3), 8, torch.float32)
    with caplog.at_level(logging.INFO, "genrec_kernels"):
        for _ in range(3):
            assert torch.equal(embedding_sum(*ids, *tables), reference.embedding_sum(*ids, *tables))
    assert [record.message for record in caplog.records] == [
        "embedding sum on cpu: plain torch, the kernel is for CUDA"
    ]
    assert not embedding.wants_plan("cpu")


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(
    ("asked", "installed", "said"),
    [
        ("fast", True, "GENREC_KERNELS=fast: it is reference, triton, or unset"),
        ("triton", True, "GENREC_KERNELS=triton: there is no Triton for cpu; unset it"),
        (
            "triton",
            False,
            r"GENREC_KERNELS=triton: triton is not installed; pip install 'genrec-dist\[kernels\]'",
        ),
    ],
)
def test_what_cannot_be_had_is_one_line(
    asked: str, installed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENREC_KERNELS", asked)
    monkeypatch.setattr(embedding, "_TRITON", installed)
    ids, tables = arguments((2, 3), 8, torch.float32)
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        embedding_sum(*ids, *tables)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(
    ("asked", "installed", "expected"),
    [
        ("", True, "triton"),
        ("", False, "reference"),
        ("reference", True, "reference"),
        ("triton", True, "triton"),
    ],
)
def test_the_choice_on_cuda(
    asked: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENREC_KERNELS", asked)
    monkeypatch.setattr(embedding, "_TRITON", installed)
    assert embedding.chosen("cuda") == expected


def test_importing_the_package_is_light() -> None:
    code = "import sys, genrec_kernels; print(sorted({'triton', 'torch._dynamo', 'genrec_dist'} & sys.modules.keys()))"
    own = environment(PYTHONPATH=str(ROOT / "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr


def test_torch_compile_leaves_the_twin_in_one_graph() -> None:
    ids, tables = arguments((2, 3), 8, torch.float32)
    compiled = torch.compile(embedding_sum, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*ids, *tables, scale=2.0), plain(ids, tables, 2.0))
