"""The benchmark of the embedding kernel at small sizes: its ids, its bytes, its claims."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from claims import check_claims
from genrec_shards.dataset import load_dataset

from genrec_dist.bench import kernels as bench
from genrec_dist.bench.kernels import (
    GROWTH,
    TINY,
    bench_kernels,
    bytes_moved,
    check_errors,
    claims_of,
    draw_places,
    format_shares,
)
from genrec_dist.bench.peers import kernels as peers
from genrec_dist.bench.peers.kernels import (
    ATOMICS,
    CLONE,
    COMPILED,
    EAGER,
    OURS,
    Case,
    Shape,
    forward_and_backward,
    make_case,
    make_rivals,
)
from genrec_dist.bench.synthetic import BOS, PAD, Histories

CPU = torch.device("cpu")
SUMS = [
    "d=16 float32, 300 tokens",
    "d=16 float32, 300 tokens, layer norm",
    "d=16 float32, 500 tokens",
]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launch/gpu_check.sh measures on a GPU"
)


def test_places_are_those_of_histories_without_padding(tiny_data: Path) -> None:
    histories = Histories.of(load_dataset(tiny_data).sequences)
    found = draw_places(histories, 4000, seed=3)
    tokens, positions, users, items = found
    assert {len(rows) for rows in found} == {4000}
    assert not ((users > 0) & (items > 0)).any()
    assert PAD not in tokens
    starts = (positions == bench.POSITION_OFFSET).nonzero()[:, 0]
    assert (tokens[starts] == BOS).all()
    assert len(starts) > 20
    assert positions.diff()[positions[1:] > bench.POSITION_OFFSET].eq(1).all()
    assert 60 < users.max() <= 120
    assert 50 < items.max() <= 64
    assert all(map(torch.equal, draw_places(histories, 4000, seed=3), found))
    assert not torch.equal(draw_places(histories, 4000, seed=4)[0], tokens)


def small_case(norm: bool) -> Case:
    dice = np.random.default_rng(0)
    ids = [torch.from_numpy(dice.integers(0, rows, 40)) for rows in (30, 9, 5, 12)]
    return make_case(ids, (30, 9, 5, 12), Shape(16, torch.float32), norm, CPU)


def test_bytes_are_counted_by_the_rows_that_are_read_and_learn() -> None:
    ids = [torch.tensor(rows) for rows in ([PAD, 5, 6], [2, 3, 4], [0, 0, 2], [0, 1, 0])]
    case = make_case(ids, (10, 7, 3, 2), Shape(4, torch.bfloat16), False, CPU)
    row = 4 * 2
    forward = 4 * 8 * 3 + (3 + 3 + 1 + 1) * row + 3 * row
    backward = (2 + 3 + 1 + 1) * row + (10 + 7 + 3 + 2) * row
    assert bytes_moved(case) == {"forward": forward, "forward and backward": forward + backward}


@pytest.mark.parametrize("norm", [False, True])
def test_rivals_give_the_same_sums_and_a_less_exact_one_is_not_measured(norm: bool) -> None:
    case = small_case(norm)
    rivals = make_rivals(CPU) | {ATOMICS: peers.by_atomics}
    del rivals[COMPILED]
    found = check_errors(rivals, case)
    assert found[OURS]["sum"] < 1e-6
    assert all(0 < found[name]["gradients"] < 1e-5 for name in (EAGER, ATOMICS))
    gradients = forward_and_backward(peers.by_atomics, case)[1:5]
    for zero_row, gradient in zip(peers.ZERO_ROWS, gradients, strict=True):
        assert zero_row is None or not gradient[zero_row].any()
    with pytest.raises(AssertionError, match=r"ours is 0.*from float64"):
        check_errors({**rivals, OURS: lambda one: 1.001 * peers.ours(one)}, case)


@pytest.mark.dist
@pytest.mark.ranks
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_claims_are_made_of_what_was_measured(tmp_path: Path) -> None:
    before = (torch.get_num_threads(), os.environ.get("GENREC_KERNELS"))
    claims, table = bench_kernels(sizes=TINY)
    assert (torch.get_num_threads(), os.environ.get("GENREC_KERNELS")) == before
    check_claims(claims, table, tmp_path / "kernels.json")
    expected = [(f"forward+backward, {name}", peer) for name in SUMS for peer in (COMPILED, EAGER)]
    expected.append(("id part of a step, 4e+03 rows", "the same, 1e+03 rows"))
    assert [(claim.id, claim.peer) for claim in claims] == expected
    assert list(table["sums"]) == SUMS
    for claim in (claim for claim in claims if claim.id.startswith("forward")):
        of_sum = table["sums"][claim.id.removeprefix("forward+backward, ")]
        seconds = of_sum["seconds"]["forward and backward"]
        assert claim.ours == 1e3 * np.median(seconds[OURS])
        assert claim.theirs == 1e3 * np.median(seconds[claim.peer])
        assert claim.goal == ">= 1x"
        counts = {name: len(values) for name, values in seconds.items()}
        assert counts == dict.fromkeys((OURS, EAGER, COMPILED, CLONE), 2)
    assert table["left out"] == []
    assert format_shares(table).count("of clone()'s bandwidth") == 6


def test_what_would_start_too_late_is_left_out_and_named() -> None:
    claims, table = bench_kernels(sizes=replace(TINY, seconds=0))
    assert claims == []
    assert table["left out"] == [*SUMS, GROWTH]  # the sums say more
    assert format_shares(table) == ""


def test_goals_on_a_gpu_are_those_that_were_set() -> None:
    forward = {OURS: 1.0, EAGER: 9.0, COMPILED: 0.96, ATOMICS: 1.0, CLONE: 0.79}
    both = {OURS: 1.0, EAGER: 3.1, COMPILED: 1.4, ATOMICS: 1.2, CLONE: 0.5}
    claims = claims_of("x", {"forward": forward, "forward and backward": both})
    assert [(claim.peer, claim.goal, claim.holds) for claim in claims] == [
        (CLONE, ">= 0.8x", False),
        (COMPILED, "<= 1.05x", True),
        (COMPILED, ">= 1.5x", False),
        (EAGER, ">= 3x", True),
        (ATOMICS, ">= 1x", True),
    ]
    assert claims[0].ratio == 0.79
