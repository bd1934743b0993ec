"""The embedding kernel beside eager torch, torch.compile and atomics, on ids as Beauty has them."""

# n places, D width, R rows of a table

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from genrec_kernels.distinct_rows import distinct_rows
from genrec_kernels.sharded_rows import RowTable
from torch import Tensor

from genrec_dist.bench.measure import (
    Claim,
    Measured,
    OnPart,
    each_in_turn,
    in_turn,
    make_claim,
    table,
    tell_nobody,
    torch_threads,
)
from genrec_dist.bench.peers.kernels import (
    ATOMICS,
    CLONE,
    COMPILED,
    EAGER,
    OURS,
    ZERO_ROWS,
    Case,
    Rival,
    Shape,
    forward_alone,
    forward_and_backward,
    make_case,
    make_rivals,
    plain,
)
from genrec_dist.bench.rows import draw_ids, id_step
from genrec_dist.bench.synthetic import (
    BEAUTY_ITEMS,
    BEAUTY_USERS,
    MAX_TOKENS,
    VOCABULARY,
    Histories,
    open_data,
)
from genrec_dist.model.network import POSITION_OFFSET

GROWTH = "growth"


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _shapes() -> tuple[Shape, ...]:
    wide = Shape(768, torch.bfloat16 if _on_gpu() else torch.float32)
    return wide, Shape(128, torch.float32)


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    tokens: tuple[int, ...] = field(
        default_factory=lambda: (16_384, 131_072) if _on_gpu() else (16_384,)
    )
    shapes: tuple[Shape, ...] = field(default_factory=_shapes)
    users: int = BEAUTY_USERS
    """Of the synthetic histories that are used where no data is given."""
    items: int = BEAUTY_ITEMS
    repeats: int = field(default_factory=lambda: 30 if _on_gpu() else 15)
    num_cases: int = 3
    """Sets of ids, tables and gradients that take turns, so that none finds itself in a cache."""
    growth: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Rows of the id tables outside autograd whose steps are compared."""
    growth_dim: int = 64
    growth_rows: int = 4_096
    """Distinct rows of a step."""
    seconds: float = math.inf
    """What would start later than this is left out, and the table says so."""


TINY = Sizes(
    tokens=(300, 500),
    shapes=(Shape(16, torch.float32),),
    users=200,
    items=60,
    repeats=2,
    growth=(1000, 4000),
    growth_rows=100,
)


def bench_kernels(
    data: Path | None = None, sizes: Sizes | None = None, on_part: OnPart = tell_nobody
) -> Measured:
    """The claims and the table of `genrec bench kernels`: on a GPU, else on one thread of the CPU.

    Args:
        data: a directory of `genrec prepare`; None: synthetic histories.
        sizes: what is measured.
        on_part: told each sum, and the growth of the id tables, which comes last.

    Raises:
        AssertionError: if ours is further from float64's sums than eager torch is.
    """
    sizes = sizes or Sizes()
    device = torch.device("cuda" if _on_gpu() else "cpu")
    dataset, described = open_data(data, sizes.users, sizes.items)
    histories = Histories.of(dataset.sequences)
    parts: dict[str, Callable[[], Measured]] = {}
    for tokens in sizes.tokens:
        for shape in sizes.shapes:
            for norm in (False, True) if tokens == sizes.tokens[0] else (False,):
                name = f"{shape.name}, {tokens:,} tokens{', layer norm' if norm else ''}"
                cases = partial(make_cases, histories, shape, tokens, norm, sizes, device)
                parts[name] = partial(measure_sum, name, cases, sizes, device)
    parts[GROWTH] = partial(measure_growth, sizes, device)
    measured: dict[str, Measured] = {}
    end = time.monotonic() + sizes.seconds
    with torch_threads(1):
        for name, part in parts.items():
            if time.monotonic() < end:
                measured[name] = part()
                on_part(name, measured[name][1])
    claims = [claim for found, _ in measured.values() for claim in found]
    figures = {name: found for name, (_, found) in measured.items()}
    more = {
        "data": described,
        "growth": figures.pop(GROWTH, {}),
        "sums": figures,
        "left out": [name for name in parts if name not in measured],
        "repeats": sizes.repeats,
    }
    return claims, table("kernels", claims, **more)


# What is summed.


def draw_places(histories: Histories, num_places: int, seed: int) -> list[Tensor]:
    """Rows of the token, position, user and item tables, int64 [n] each, without padding: test
    histories of users drawn at random, one after another."""
    dice = np.random.default_rng(seed)
    drawn: list[list[Tensor]] = []
    while sum(len(rows[0]) for rows in drawn) < num_places:
        encoder = histories.encode(dice.integers(0, histories.sequences.num_users, 256))
        positions = encoder.position_ids + POSITION_OFFSET
        arrays = (encoder.input_ids, positions, encoder.user_rows, encoder.item_rows)
        drawn.append([rows[encoder.attention_mask] for rows in arrays])
    return [torch.cat(rows)[:num_places] for rows in zip(*drawn, strict=True)]


def make_cases(
    histories: Histories, shape: Shape, tokens: int, norm: bool, sizes: Sizes, device: torch.device
) -> list[Case]:
    log = histories.sequences
    rows = (VOCABULARY, MAX_TOKENS + POSITION_OFFSET, log.num_users + 1, log.num_items + 1)
    places = [draw_places(histories, tokens, seed) for seed in range(sizes.num_cases)]
    return [make_case(ids, rows, shape, norm, device) for ids in places]


# Measuring the sum.


def measure_sum(
    name: str, make: Callable[[], list[Case]], sizes: Sizes, device: torch.device
) -> Measured:
    """Forward alone, and forward and backward, of all rivals in turn on the same cases."""
    cases, rivals = make(), make_rivals(device)
    errors = check_errors(rivals, cases[0])
    moved = bytes_moved(cases[0])
    seconds: dict[str, dict[str, list[float]]] = {}
    for what, run in (("forward", forward_alone), ("forward and backward", forward_and_backward)):
        runs = {
            rival: each_in_turn(partial(run, function), cases) for rival, function in rivals.items()
        }
        halves = [torch.empty(moved[what] // 2, dtype=torch.uint8, device=device) for _ in cases]
        runs[CLONE] = each_in_turn(torch.clone, halves)
        seconds[what] = timed(runs, sizes.repeats, device)
    medians = {
        what: {rival: median(values) for rival, values in each.items()}
        for what, each in seconds.items()
    }
    shares = {
        what: {rival: each[CLONE] / value for rival, value in each.items()}
        for what, each in medians.items()
    }
    return claims_of(name, medians), {
        "seconds": seconds,
        "bytes read and written": moved,
        "share of clone's bandwidth": shares,
        "largest error beside float64": errors,
    }


def claims_of(name: str, medians: dict[str, dict[str, float]]) -> list[Claim]:
    """On a GPU the goals that were set for the kernel, on a CPU those of its plain-torch twin."""
    goals = [("forward and backward", COMPILED, ">= 1x"), ("forward and backward", EAGER, ">= 1x")]
    if ATOMICS in medians["forward"]:
        goals = [
            ("forward", CLONE, ">= 0.8x"),
            ("forward", COMPILED, "<= 1.05x"),
            ("forward and backward", COMPILED, ">= 1.5x"),
            ("forward and backward", EAGER, ">= 3x"),
            ("forward and backward", ATOMICS, ">= 1x"),
        ]
    claims = []
    for what, peer, goal in goals:
        mine, theirs = 1e3 * medians[what][OURS], 1e3 * medians[what][peer]
        id = f"{what.replace(' and ', '+')}, {name}"
        claims.append(make_claim(id, peer, mine, theirs, "ms", goal))
    return claims


def bytes_moved(case: Case) -> dict[str, int]:
    """What has to be read and written at least, the rows of each place counted anew.

    Forward: ids, rows and the sum. Backward: the gradient once for each table that learns of a
    place, and the tables' gradients."""
    row_bytes = case.gradient.shape[1] * case.gradient.element_size()
    num_places = len(case.ids[0])
    learning = sum(
        num_places if zero is None else int((ids != zero).sum())
        for ids, zero in zip(case.ids, ZERO_ROWS, strict=True)
    )
    read = 2 * num_places + sum(int((ids != 0).sum()) for ids in case.ids[2:])
    forward = 4 * 8 * num_places + (read + num_places) * row_bytes
    backward = (learning + sum(map(len, case.tables))) * row_bytes
    return {"forward": forward, "forward and backward": forward + backward}


def check_errors(rivals: Mapping[str, Rival], case: Case) -> dict[str, dict[str, float]]:
    """Largest error of the sum and of any gradient, over the largest true value of it.

    Raises AssertionError if ours is further from float64 than eager torch, but for one rounding."""
    exact = Case(
        ids=case.ids,
        tables=[one.detach().double().requires_grad_() for one in case.tables],
        norm=[one.detach().double().requires_grad_() for one in case.norm],
        gradient=case.gradient.double(),
        plan=None,
    )
    truth = forward_and_backward(lambda one: plain(one.ids, one.tables, one.norm), exact)
    largest = [one.abs().max().clamp(min=1e-30) for one in truth]
    errors = {
        name: [
            float((found.double() - true).abs().max() / most)
            for found, true, most in zip(
                forward_and_backward(rival, case), truth, largest, strict=True
            )
        ]
        for name, rival in rivals.items()
    }
    rounding = torch.finfo(case.gradient.dtype).eps
    for mine, theirs in zip(errors[OURS], errors[EAGER], strict=True):
        text = f"ours is {mine:.2g} from float64's result, eager torch {theirs:.2g}"
        assert mine <= theirs + rounding, text
    return {name: {"sum": e[0], "gradients": max(e[1:])} for name, e in errors.items()}


def timed(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each run, in turn, after a round to warm up.

    On a GPU by CUDA events, while the device is kept busy for some 10 ms before each run, so that
    it never waits for the host's launches: as in a training step, where the host is ahead."""
    if device.type == "cpu":
        return in_turn(runs, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(20_000_000)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return seconds


# As the id table grows.


def measure_growth(sizes: Sizes, device: torch.device) -> Measured:
    """Seconds of the fetch and the update of a step, by rows of the table outside autograd."""
    runs = {}
    for num_rows in sizes.growth:
        rows = RowTable(num_rows, sizes.growth_dim, init_std=0.02, key=1, device=device)
        drawn = [draw_ids("zipf", num_rows, sizes.growth_rows, seed) for seed in range(6)]
        plans = [distinct_rows([ids], num_rows)[0] for ids in drawn]
        runs[str(num_rows)] = each_in_turn(partial(id_step, rows), plans)
    seconds = timed(runs, 2 * sizes.repeats, device)
    first, last = (1e3 * median(seconds[str(n)]) for n in (sizes.growth[0], sizes.growth[-1]))
    id, peer = f"id part of a step, {sizes.growth[-1]:.0e} rows", f"{sizes.growth[0]:.0e} rows"
    claim = make_claim(id, f"the same, {peer}", last, first, "ms", "<= 1.2x")
    more = {"dim": sizes.growth_dim, "distinct rows": sizes.growth_rows}
    return [claim], {"seconds": seconds, **more}


def format_shares(table: Mapping[str, Any]) -> str:
    """The share of clone()'s bandwidth that each rival reaches: plain lines."""
    lines = []
    for name, measured in table["sums"].items():
        for what, shares in measured["share of clone's bandwidth"].items():
            figures = [f"{rival} {share:.0%}" for rival, share in shares.items() if rival != CLONE]
            lines.append(f"{what}, {name}: of clone()'s bandwidth {', '.join(figures)}")
    return "\n".join(lines)
