"""The benchmark of id tables on small sizes: the draws, the task's ceiling, and every claim it has
to make."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from genrec_kernels.sharded_rows import BLOCK
from torch.multiprocessing import start_processes
from two_ranks import environment

from genrec_dist.bench.id_tables import Ours, Sizes, Task, Torchs, bench_rows, draw_ids
from genrec_dist.bench.measure import format_claims, write_table

SMALL = Sizes(
    growth=(1000, 4000), peers=2000, dim=16, rows=200, steps=2, samples=8, model_steps=1,
    quality_steps=150, repeats=2, rates=(0.3,), peer_rates=(0.03,),
)  # fmt: skip


@pytest.mark.parametrize("draw", ["zipf", "uniform"])
@pytest.mark.parametrize("num_rows", [1000, 10_000_000])
def test_a_draw_has_so_many_distinct_rows(draw: str, num_rows: int) -> None:
    ids = draw_ids(draw, num_rows, 500, seed=3)  # type: ignore[arg-type]
    assert ids.min() >= 1
    assert ids.max() <= num_rows
    assert len(np.unique(ids)) == 500
    assert np.array_equal(ids, draw_ids(draw, num_rows, 500, seed=3))  # type: ignore[arg-type]
    assert not np.array_equal(ids, draw_ids(draw, num_rows, 500, seed=4)[: len(ids)])  # type: ignore[arg-type]
    most = np.unique(ids, return_counts=True)[1].max()
    assert most == 1 if draw == "uniform" else most > 20


def test_the_rivals_look_the_same_rows_up() -> None:
    start = torch.randn(50, 4)
    ids = np.array([1, 50, 7, 7])
    for rival in (Ours(start, 0.1), Torchs(start, 0.1, True), Torchs(start, 0.1, False)):
        assert torch.equal(rival.look_up(ids), start[torch.from_numpy(ids) - 1])
        rival(ids, lambda rows: rows.sum().backward())
        moved = rival.look_up(ids) - start[torch.from_numpy(ids) - 1]
        assert (moved < 0).all()


def test_the_hidden_vectors_are_in_reach_of_a_learner() -> None:
    task = Task(100, 16, 1000)
    ids, contexts, _, odds = task.batch(0)
    best = torch.from_numpy(task.hidden_NH) @ task.mix_HD
    torch.testing.assert_close(
        (best[torch.from_numpy(ids) - 1] * contexts).sum(1), odds, rtol=1e-3, atol=1e-3
    )


@pytest.mark.dist
def test_every_claim_is_made_and_follows_from_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked.load(environment())  # the ranks need not load what it has
    monkeypatch.setattr(
        torch.multiprocessing, "spawn", partial(start_processes, start_method="forkserver")
    )
    claims, table = bench_rows(SMALL)
    write_table(table, tmp_path / "rows.json")
    back = json.loads((tmp_path / "rows.json").read_text())
    assert len(claims) == len(back["claims"]) == 4 + 8 + 1 + 2
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        bound = float(claim.goal.split()[1].removesuffix("x"))
        assert claim.holds == (
            claim.ratio <= bound if claim.goal.startswith("<=") else claim.ratio >= bound
        ), claim
        shown = claim.ours / claim.theirs
        assert claim.ratio == pytest.approx(shown if claim.goal.startswith("<=") else 1 / shown), (
            claim
        )
        assert claim.id in format_claims(claims)
    # Learning is no matter of speed: both come near the best loss there is.
    losses = back["quality"]
    for by_rate in losses["held_out_loss_by_rate"].values():
        assert losses["best_possible"] < min(by_rate.values()) < losses["untrained"] - 0.05
    # And bytes are counted, not timed: uniform rows, each rank's in part its own.
    wire = back["wire"]["uniform"]
    assert wire["rows_by_rank"] == [SMALL.steps * SMALL.rows] * 2
    others = sum(
        np.count_nonzero(
            (draw_ids("uniform", SMALL.peers, SMALL.rows, 2 * step + rank) - 1) // BLOCK % 2 != rank
        )
        for step in range(SMALL.steps)
        for rank in range(2)
    )
    assert sum(wire["bytes_by_rank"]) == others * (4 + 2 * 4 * SMALL.dim) + 2 * 8 * SMALL.steps
