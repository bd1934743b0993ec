"""The benchmark of id tables on small sizes: the draws, the rivals, and every claim it makes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from claims import check_claims
from genrec_kernels.row_blocks import BLOCK
from torch import Tensor
from torch.multiprocessing import start_processes
from two_ranks import environment

from genrec_dist.bench.rows import DRAWS, Draw, Sizes, bench_rows, draw_ids, fill, ours, torchs

SMALL = Sizes(
    growth=(1000, 4000), peers=2000, dim=16, rows=200, steps=2, samples=8, model_steps=1, repeats=2
)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("num_rows", [1000, 10_000_000])
def test_draw_has_so_many_distinct_ids(draw: Draw, num_rows: int) -> None:
    ids = draw_ids(draw, num_rows, 500, seed=3)
    assert ids.min() >= 1
    assert ids.max() <= num_rows
    assert len(np.unique(ids)) == 500
    assert np.array_equal(ids, draw_ids(draw, num_rows, 500, seed=3))
    assert not np.array_equal(ids, draw_ids(draw, num_rows, 500, seed=4)[: len(ids)])
    most = np.unique(ids, return_counts=True)[1].max()
    assert most == 1 if draw == "uniform" else most > 20
    filled = fill(ids, 700, seed=0)
    assert len(filled) == 700
    assert np.array_equal(np.unique(filled), np.unique(ids))


def test_rivals_look_the_same_rows_up_and_learn_in_the_same_direction() -> None:
    start, ids = torch.randn(50, 4), np.array([1, 50, 7, 7])
    rows: list[Tensor] = []

    def backward(rows_TD: Tensor) -> None:
        rows.append(rows_TD.detach().clone())
        rows_TD.sum().backward()

    for rival in (ours(start), torchs(start, sparse=True), torchs(start, sparse=False)):
        rows.clear()
        for _ in range(2):
            rival(ids, backward)
        assert torch.equal(rows[0], start[torch.from_numpy(ids) - 1])
        assert (rows[1] < rows[0]).all()


@pytest.mark.dist
def test_claims_are_made_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked.load(environment())  # the ranks need not load what it has
    start = partial(start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)
    claims, table = bench_rows(SMALL)
    check_claims(claims, table, tmp_path / "rows.json")
    names = [claim.id.split(",")[0] for claim in claims]
    growth, peers = ["step", "id-part"], ["id part beside SparseAdam", "id part beside AdamW"]
    assert names == growth * 2 + peers * 2 + ["wire"] * 2
    # Bytes are counted, not timed: of uniform rows, a part is each rank's own.
    wire = table["wire"]["uniform"]
    assert wire["rows_by_rank"] == [SMALL.steps * SMALL.rows] * 2
    others = 0
    for step in range(SMALL.steps):
        for rank in range(2):
            ids = draw_ids("uniform", SMALL.peers, SMALL.rows, 2 * step + rank)
            others += np.count_nonzero((ids - 1) // BLOCK % 2 != rank)
    assert sum(wire["bytes_by_rank"]) == others * (4 + 2 * 4 * SMALL.dim) + 2 * 8 * SMALL.steps
