"""The benchmark of the embedding kernel at small sizes: its ids, its bytes, its claims, and the
peer that adds by atomics."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from two_ranks import environment

from genrec_dist.bench import kernels as bench
from genrec_dist.bench.beam_fixture import PAD, Users, make_users
from genrec_dist.bench.kernels import (
    ATOMICS,
    CLONE,
    COMPILED,
    EAGER,
    OURS,
    Case,
    GrownStep,
    Shape,
    Sizes,
    StepShape,
    bench_kernels,
    bytes_moved,
    check_errors,
    commonest,
    draw_places,
    format_shares,
    make_case,
    make_rivals,
)
from genrec_dist.bench.measure import Claim, format_claims, write_table

CPU = torch.device("cpu")
TINY = (
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=16",
    "tokens.vocab_size=300",
    "finetune.batch_size=64",
)
SMALL = Sizes(
    tokens=(300, 500), shapes=(Shape(16, torch.float32),), users=200, items=60, repeats=2, fewest_sets=2, growth=(1000, 4000),
    growth_dim=8, growth_tokens=400, growth_rows=100, steps=(StepShape("tiny", TINY),), step_repeats=2,
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launch/gpu_check.sh measures on a GPU"
)


# What is summed.


def test_places_are_those_of_spelled_histories() -> None:
    tokens, positions, users, items = draw_places(make_users(500, 300), 4000, seed=3)
    assert {len(rows) for rows in (tokens, positions, users, items)} == {4000}
    assert not ((users > 0) & (items > 0)).any()
    starts = (positions == 2).nonzero()[:, 0]
    assert (tokens[starts] == 0).all()  # <s>
    assert len(starts) > 50
    assert (positions[1:] - positions[:-1])[positions[1:] > 2].eq(1).all()
    # ` item` and `_` stand before each item's digits.
    shares = commonest([tokens, positions, users, items])
    assert 0.15 < shares["token"] < 0.35
    assert shares["item"] > 0.02
    again = draw_places(make_users(500, 300), 4000, seed=3)
    assert all(
        torch.equal(one, other)
        for one, other in zip(again, (tokens, positions, users, items), strict=True)
    )
    assert not torch.equal(draw_places(make_users(500, 300), 4000, seed=4)[0], tokens)


def small_case(norm: bool = True, dtype: torch.dtype = torch.float32) -> Case:
    dice = np.random.default_rng(0)
    ids = [torch.from_numpy(dice.integers(0, rows, 40)) for rows in (30, 9, 5, 12)]
    return make_case(ids, (30, 9, 5, 12), Shape(16, dtype), norm, CPU, seed=1)


def test_bytes_are_counted_by_the_rows_that_are_read_and_learn() -> None:
    ids = [torch.tensor(rows) for rows in ([PAD, 5, 6], [2, 3, 4], [0, 0, 2], [0, 1, 0])]
    case = make_case(ids, (10, 7, 3, 2), Shape(4, torch.bfloat16), False, CPU, seed=0)
    row = 4 * 2
    forward = 4 * 8 * 3 + (3 + 3 + 1 + 1) * row + 3 * row
    assert bytes_moved(case) == {
        "forward": forward,
        "forward and backward": forward + (2 + 3 + 1 + 1) * row + (10 + 7 + 3 + 2) * row,
    }


@pytest.mark.parametrize("norm", [False, True])
def test_a_sum_that_is_less_exact_is_not_measured(norm: bool) -> None:
    case = small_case(norm)
    rivals = {
        name: rival
        for name, rival in make_rivals(Shape(16, torch.float32), CPU).items()
        if name != COMPILED
    }
    found = check_errors(rivals, case)
    assert found[OURS]["sum"] < 1e-6
    assert 0 < found[EAGER]["gradients"] < 1e-5
    with pytest.raises(AssertionError, match=r"ours is 0.*from float64"):
        check_errors({**rivals, OURS: lambda one: 1.001 * bench.ours(one)}, case)


# The peer.

INTERPRETED = """
import torch
from genrec_dist.bench.kernels import PAD, Shape, make_case, plain
from genrec_dist.bench.kernel_peers import atomics

dice = torch.Generator().manual_seed(0)
rows = (30, 9, 5, 12)
ids = [torch.randint(0, size, (150,), generator=dice) for size in rows]
case = make_case(ids, rows, Shape(20, torch.float32), False, torch.device("cpu"), 1)
results = []
for summed in (atomics(ids, case.tables, PAD), atomics(ids, case.tables, PAD, torch.float32), plain(ids, case.tables, [])):
    results.append([summed, *torch.autograd.grad(summed, case.tables, case.gradient)])
for found in results[:2]:
    for ours, theirs in zip(found, results[2], strict=True):
        torch.testing.assert_close(ours, theirs)
print(sum(bool(one.any()) for one in results[0]), results[0][1][PAD].any(), results[0][3][0].any())
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; it is there for Linux alone",
)
def test_atomics_give_the_same_sums_in_the_interpreter() -> None:
    own = environment(TRITON_INTERPRET="1")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "5 tensor(False) tensor(False)\n"


# Claims.


@pytest.fixture(scope="module")
def measured() -> tuple[list[Claim], dict[str, Any]]:
    before = (torch.get_num_threads(), os.environ.get("GENREC_KERNELS"))
    found = bench_kernels(sizes=SMALL)
    assert (torch.get_num_threads(), os.environ.get("GENREC_KERNELS")) == before
    return found


@pytest.mark.dist
@pytest.mark.ranks
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_every_claim_is_made_of_what_was_measured(
    measured: tuple[list[Claim], dict[str, Any]], tmp_path: Path
) -> None:
    claims, table = measured
    names = [
        "d=16 float32, 300 tokens",
        "d=16 float32, 300 tokens, layer norm",
        "d=16 float32, 500 tokens",
    ]
    assert list(table["sums"]) == names
    expected = [(f"forward+backward, {name}", peer) for name in names for peer in (COMPILED, EAGER)]
    expected.insert(4, ("id part of a step, 4e+03 rows", "the same, 1e+03 rows"))
    assert [(claim.id, claim.peer) for claim in claims] == expected
    for claim in claims:
        if claim.id.startswith("forward"):
            seconds = table["sums"][claim.id.removeprefix("forward+backward, ")]["seconds"][
                "forward and backward"
            ]
            assert claim.ours == 1e3 * np.median(seconds[OURS])
            assert claim.ratio == pytest.approx(
                np.median(seconds[claim.peer]) / np.median(seconds[OURS])
            )
            assert claim.holds == (claim.ratio >= 1)
            assert claim.goal == ">= 1x"
            assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
                (OURS, EAGER, COMPILED, CLONE), 2
            )
    assert claims[4].holds == (claims[4].ratio <= 1.2)
    assert table["left out"] == []
    step = table["steps"]["tiny"]
    share = step["share of a step"][OURS]
    assert 0 < share < 1
    of_a_step = step["seconds of the sum, forward and backward, a step"][OURS]
    assert share == pytest.approx(of_a_step / np.median(step["seconds of a step"]["reference"]))
    write_table(table, tmp_path / "kernels.json")
    back = json.loads((tmp_path / "kernels.json").read_text())
    assert back["name"] == "kernels"
    assert format_shares(back).count("of clone()'s bandwidth") == 6
    assert "in a step of tiny: ours" in format_shares(back)
    assert "id part of a step" in format_claims(claims)


def test_what_would_begin_too_late_is_left_out_and_named() -> None:
    claims, table = bench_kernels(sizes=replace(SMALL, seconds=0))
    assert claims == []
    assert table["left out"] == [
        "d=16 float32, 300 tokens", "d=16 float32, 300 tokens, layer norm", "growth", "steps", "d=16 float32, 500 tokens",
    ]  # fmt: skip
    assert format_shares(table) == ""


def test_goals_on_a_gpu_are_those_that_were_set() -> None:
    forward = {OURS: 1.0, EAGER: 9.0, COMPILED: 0.96, ATOMICS: 1.0, CLONE: 0.79}
    both = {OURS: 1.0, EAGER: 3.1, COMPILED: 1.4, ATOMICS: 1.2, CLONE: 0.5}
    claims = bench._claims_on_gpu("x", {"forward": forward, "forward and backward": both})
    assert [(claim.peer, claim.goal, claim.holds) for claim in claims] == [
        (CLONE, ">= 0.8x", False),
        (COMPILED, "<= 1.05x its time", True),
        (COMPILED, ">= 1.5x", False),
        (EAGER, ">= 3x", True),
        (ATOMICS, ">= 1x", True),
    ]
    assert claims[0].ratio == 0.79
    slower = bench._claims_on_gpu(
        "x", {"forward": forward | {COMPILED: 0.95}, "forward and backward": both}
    )
    assert not slower[1].holds


# The table that grows.


def test_a_step_changes_the_rows_of_its_batch_alone() -> None:
    step = GrownStep(1000, SMALL, CPU)
    rows, inputs, _ = step.batches[0]
    before = step.table.values.clone()
    step(step.batches[0])
    changed = (step.table.values != before).any(1).nonzero()[:, 0]
    assert torch.equal(changed, rows)
    assert len(rows) == 100
    assert len(inputs[3]) == 400
    assert len({tuple(batch[0].tolist()) for batch in step.batches}) == len(step.batches) > 1


def test_data_of_ones_own_is_taken(tiny_data: Path) -> None:
    users = bench._users(tiny_data, SMALL)
    assert isinstance(users, Users)
    assert len(users.offsets) == 121
    places = draw_places(users, 700, 0)
    assert places[2].max() <= 120
    assert places[3].max() <= 64
