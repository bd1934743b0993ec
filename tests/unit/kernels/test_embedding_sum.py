"""The embedding sum on a CPU: plain torch, the order of gradients, the choice by device, and the
kernel in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_cases import NAMES, PAD, Case, all_equal, make_case, plain_sum
from genrec_kernels import (
    GradientOrder,
    Rows,
    embedding,
    embedding_sum,
    make_gradient_order,
    wants_gradient_order,
)
from genrec_kernels import torch_reference as reference
from genrec_kernels.gradient_order import CHUNK, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from torch import Tensor
from two_ranks import environment

KERNEL_TESTS = Path(__file__).with_name("test_kernel_embedding.py")
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is for Linux alone")


# The kernel, where there is no GPU.


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.ranks
def test_kernel_passes_its_tests_in_the_interpreter() -> None:
    """In a process of its own: the switch must be set before Triton is imported, and holds for all
    it runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
    own = environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    last = done.stdout.strip().splitlines()[-1]
    found = re.match(r"(\d+) passed", last)
    assert found, last
    assert int(found[1]) >= 44
    assert "fail" not in last


NATIVE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from genrec_kernels import triton_embedding_sum as kernels

KINDS = {
    "*i64": {"tokens_at", "positions_at", "users_at", "items_at", "seed_at"},
    "*i32": {"header_at", "order_at", "chunks_at", "long_rows_at"},
    "i32": {"num_places", "position_offset"},
    "*fp32": {"rstd_at", "weight_parts", "bias_parts", "partial_at"},
    "fp32": {"scale", "dropped", "kept_scale", "eps"},
}
FIXED = {
    "WIDTH": 768, "USERS": True, "ITEMS": True, "DROPOUT": True, "NORM": True, "KEEP": True,
    "STRIP": 32, "table": 1, "BLOCK_K": 2, "BLOCK_D": 1024,
}
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
for name in ("_sum_kernel", "_norm_kernel", "_chunk_kernel", "_long_kernel"):
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    signature = {one: next((k for k, v in KINDS.items() if one in v), "*bf16") for one in names}
    signature |= {one: "constexpr" for one in names if one in FIXED}
    fixed = {(names.index(one),): value for one, value in FIXED.items() if one in names}
    source = ASTSource(kernel, signature, fixed)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    ptx = compiled.asm["ptx"].replace(".shared.", " ")
    assert not re.search(r"\\b(atom|red)\\.", ptx), "atomics have no order"
    print(name)
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [86, 90], ids=["RTX 3090", "H200"])
def test_kernels_compile_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    own = environment(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT / "kernels"))
    script = tmp_path / "compile.py"
    script.write_text(NATIVE, encoding="utf-8")
    command = [sys.executable, script, str(capability)]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_sum_kernel", "_norm_kernel", "_chunk_kernel", "_long_kernel"]


# Plain torch.


@pytest.mark.parametrize("missing", [("user",), ("item",), ("user", "item")])
def test_missing_table_adds_nothing(missing: tuple[str, ...]) -> None:
    case = make_case((3, 7), 6)
    tables = case.tables(torch.float64)
    zeros = {name: torch.zeros_like(getattr(tables, name)) for name in missing}
    ours = reference.embedding_sum(*case.ids, replace(tables, **dict.fromkeys(missing)))
    torch.testing.assert_close(ours, reference.embedding_sum(*case.ids, replace(tables, **zeros)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 11.3])
@pytest.mark.parametrize("shape", [(5, 7), (300,), (0, 4)], ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("norm", [False, True], ids=["sum", "norm"])
def test_blocks_equal_plain_torch_to_the_bit(
    norm: bool,
    large: bool,
    shape: tuple[int, ...],
    scale: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_LARGE", 0 if large else 1 << 23)
    # Six places per block: many blocks, the last one short.
    monkeypatch.setattr(reference, "_BLOCK", 6 * 16)
    case = make_case(shape, 16, scale=scale, norm=norm)
    case.options = {"norm_eps": 0.1}
    case.ids[2] *= torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3  # few users
    found = case.run(reference.embedding_sum, dtype)
    assert all_equal(found, case.run(plain_sum, dtype))
    assert not shape[0] or all(grad.any() for grad in found[1:])
    padding = [found[1][PAD], found[3][0], found[4][0]]
    assert not any(row.any() for row in padding)


@pytest.mark.parametrize("option", ["projection", "without users"])
def test_gradients_are_the_derivatives(option: str) -> None:
    """Where `test_blocks_equal_plain_torch_to_the_bit` has no plain sum to compare with."""
    case = make_case((2, 3), 4, scale=2.0)
    # Row 0 of an id table and the row of the padding are held: they have no derivative.
    case.ids = [rows.clamp(min=2) for rows in case.ids]
    case.weights["position"] = case.weights["position"][:9]
    if option == "projection":
        dice = torch.Generator().manual_seed(2)
        for name, shape in (("item", (19, 3)), ("item_projection", (4, 3))):
            case.weights[name] = torch.randn(shape, generator=dice, dtype=torch.float64)
    if option == "without users":
        del case.weights["user"]
    names = list(case.weights)

    def summed(*values: Tensor) -> Tensor:
        tables = case.tables(torch.float64, **dict(zip(names, values, strict=True)))
        return reference.embedding_sum(*case.ids, tables)

    assert torch.autograd.gradcheck(summed, [one.requires_grad_() for one in case.weights.values()])


def test_id_table_of_another_type_learns_in_its_own() -> None:
    case = make_case((3, 5), 8)
    tables = case.tables(torch.bfloat16)
    exact = tables.item.detach().float().requires_grad_()
    summed = reference.embedding_sum(*case.ids, replace(tables, item=exact))
    assert summed.dtype == torch.bfloat16
    assert torch.equal(summed, reference.embedding_sum(*case.ids, tables))
    (grad,) = torch.autograd.grad(summed.sum(), exact)
    assert grad.dtype == torch.float32


def test_id_dropout_drops_the_id_terms_alone_and_only_in_training() -> None:
    case = make_case((3, 7), 6)
    tables = case.tables(torch.float64)

    def run(share: float, training: bool = True) -> Tensor:
        dropping = replace(tables, id_dropout=share)
        return reference.embedding_sum(*case.ids, dropping, training=training)

    whole = run(0.0)
    assert torch.equal(run(0.5, training=False), whole)
    without = replace(tables, user=None, item=None)
    assert torch.equal(run(1.0), reference.embedding_sum(*case.ids, without))
    torch.manual_seed(0)
    mean = sum(run(0.5) for _ in range(1000)) / 1000
    torch.testing.assert_close(mean, whole, atol=0.3, rtol=0)


# The order of gradients.


def sums_by(order: GradientOrder, number: int, values_nD: np.ndarray, num_rows: int) -> np.ndarray:
    """What a kernel makes of an order: chunks, then the partial sums of long rows; checked, so that
    nothing comes twice."""
    found = unpack(order.packed, order.segments[number])
    num_chunks, num_long_rows, _, _ = found.header.tolist()
    places_n = found.order.numpy()
    result = np.full((num_rows, values_nD.shape[1]), np.nan)
    partial = np.full((len(places_n) * 2 // CHUNK + 1, values_nD.shape[1]), np.nan)
    for first, count, target in found.chunks[:num_chunks].tolist():
        assert 1 <= count <= CHUNK
        places = places_n[first : first + count]
        assert (np.diff(places) > 0).all()
        into, row = (result, target) if target >= 0 else (partial, -1 - target)
        assert np.isnan(into[row]).all()
        into[row] = values_nD[places].sum(0)
    for first, count, row in found.long_rows[:num_long_rows].tolist():
        assert count > 1
        assert np.isnan(result[row]).all()
        result[row] = partial[first : first + count].sum(0)
    assert not found.chunks[num_chunks:].any()
    assert not found.long_rows[num_long_rows:].any()
    return np.nan_to_num(result)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 700), st.sampled_from([1, 2, 5, 1000]), st.integers(0, 99))
def test_gradient_order_names_each_occurrence_once_and_in_order(
    num_places: int, num_rows: int, seed: int
) -> None:
    dice = np.random.default_rng(seed)
    tables = [
        Rows(name, dice.integers(0, num_rows, num_places), num_rows, silent)
        for name, silent in zip(NAMES[:4], (0, None, 0, None), strict=True)
    ]
    order = make_gradient_order(tables)
    assert (order.packed.dtype, order.num_places) == (torch.int32, num_places)
    assert all(segment.start % 4 == 0 for segment in order.segments)
    values = dice.integers(-100, 100, (num_places, 2)).astype(float)
    for number, rows in enumerate(tables):
        expected = np.zeros((num_rows, 2))
        np.add.at(expected, rows.ids, values)
        if rows.silent is not None:
            expected[rows.silent] = 0
        assert np.array_equal(sums_by(order, number, values, num_rows), expected)


def test_missing_table_has_no_order() -> None:
    rows = Rows("token", np.array([[1, 2]]), 3)
    order = make_gradient_order([rows, rows, None, None])
    assert order.segments[2] == order.segments[3] == (0, 0, 0, 0)
    assert sums_by(order, 1, np.ones((2, 1)), 3)[:, 0].tolist() == [0, 1, 1]


# The choice.


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_logged", set())
    monkeypatch.delenv("GENREC_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def sum_on_cpu(case: Case) -> Tensor:
    return embedding_sum(*case.ids, case.tables(torch.float32))


@pytest.mark.usefixtures("unset")
def test_cpu_takes_plain_torch_and_logs_it_once(caplog: pytest.LogCaptureFixture) -> None:
    case = make_case((2, 3), 8)
    expected = reference.embedding_sum(*case.ids, case.tables(torch.float32))
    with caplog.at_level(logging.INFO, "genrec_kernels"):
        for _ in range(3):
            assert torch.equal(sum_on_cpu(case), expected)
    logged = [record.message for record in caplog.records]
    assert logged == ["embedding sum on cpu: plain torch, the kernel is for CUDA"]
    assert not wants_gradient_order("cpu")


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("setting", "installed", "message"),
    [
        ("fast", True, "GENREC_KERNELS=fast: it is reference, triton, or unset"),
        ("triton", True, "GENREC_KERNELS=triton: there is no Triton for cpu; unset it"),
        ("triton", False, r"GENREC_KERNELS=triton: triton is not installed; pip install '\S+'"),
    ],
)
def test_impossible_choice_is_one_line(
    setting: str, installed: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENREC_KERNELS", setting)
    monkeypatch.setattr(embedding, "_TRITON", installed)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        sum_on_cpu(make_case((2, 3), 8))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("setting", "installed", "expected"),
    [
        ("", True, "triton"),
        ("", False, "reference"),
        ("reference", True, "reference"),
        ("triton", True, "triton"),
    ],
)
def test_choice_on_cuda(
    setting: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENREC_KERNELS", setting)
    monkeypatch.setattr(embedding, "_TRITON", installed)
    monkeypatch.setattr(embedding, "_launched", [""])
    assert embedding.chosen("cuda") == expected


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton launches here")
@pytest.mark.usefixtures("unset")
def test_where_triton_cannot_launch_plain_torch_takes_over_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton is installed here and launches nothing, as on a machine without a compiler."""
    monkeypatch.setattr(embedding, "_launched", [])
    with caplog.at_level(logging.INFO, "genrec_kernels"):
        assert [embedding.chosen("cuda") for _ in range(3)] == ["reference"] * 3
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("embedding sum on cuda: plain torch, Triton does not launch here (")
    assert "gcc python3-dev" in line
    assert "\n" not in line
    monkeypatch.setenv("GENREC_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"^GENREC_KERNELS=triton: Triton does not launch here"):
        embedding.chosen("cuda")


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, genrec_kernels; "
        "print(sorted({'triton', 'torch._dynamo', 'genrec_dist'} & sys.modules.keys()))"
    )
    own: dict[str, Any] = environment(PYTHONPATH=str(ROOT / "kernels"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_torch_compile_keeps_plain_torch_in_one_graph() -> None:
    case = make_case((2, 3), 8, scale=2.0)
    compiled = torch.compile(embedding_sum, fullgraph=True, backend="eager")
    tables = case.tables(torch.float32)
    assert torch.equal(compiled(*case.ids, tables), plain_sum(*case.ids, tables))
