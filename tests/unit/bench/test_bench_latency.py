"""The benchmark of latency on small sizes: every caller requests its share."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from claims import check_claims
from genrec_shards.dataset import load_dataset

from genrec_dist.bench.latency import (
    CALLERS,
    DIRECT,
    GENERATED,
    LOCKED,
    SERVED,
    SHARED,
    TINY,
    Sizes,
    bench_latency,
    bench_serve,
    check_same,
    claims_of,
    format_latencies,
    generate_decodes,
    histories_of,
    one_round,
    random_run,
    summary,
)
from genrec_dist.bench.synthetic import make_data
from genrec_dist.inference.recommend import Recommendation, Recommender


def test_claims_are_made_of_what_was_measured(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    claims, table = bench_latency(sizes=TINY)
    assert torch.get_num_threads() == before
    check_claims(claims, table, tmp_path / "latency.json")
    rows = {(row["way"], row["callers"]): row for row in table["measured"]}
    assert set(rows) == {(way, callers) for way in (SHARED, LOCKED) for callers in (1, 3)}
    for row in rows.values():
        assert row["calls"] == 24
        assert 0 < row["p50 ms"] <= row["p95 ms"] <= row["p99 ms"]
        assert row["calls/s"] == pytest.approx(12 / np.median(row["seconds a round"]))
    figures = [(1, "p50 ms", "<= 1.05x"), (3, "p95 ms", ">= 1x"), (3, "calls/s", "> 1x")]
    for claim, (callers, figure, goal) in zip(claims, figures, strict=True):
        assert (claim.ours, claim.theirs) == tuple(
            rows[way, callers][figure] for way in (SHARED, LOCKED)
        )
        assert claim.goal == goal
    assert len(format_latencies(table).splitlines()) == 5


def test_claims_fail_where_the_lock_is_better() -> None:
    def row(way: str, callers: int, latency: float) -> dict[str, Any]:
        return summary(way, callers, [latency] * 10, [latency * 10] * 2)

    rows = [row(SHARED, 1, 0.2), row(LOCKED, 1, 0.1), row(SHARED, 8, 0.4), row(LOCKED, 8, 0.3)]
    claims = claims_of(rows, Sizes())
    assert [claim.holds for claim in claims] == [False] * 3
    assert [claim.ratio for claim in claims] == pytest.approx([2, 0.75, 0.75])


def test_each_caller_is_a_thread_with_histories_of_its_own() -> None:
    requests: list[tuple[int, str]] = []
    together = threading.Barrier(4)

    def way(history: Sequence[str]) -> None:
        requests.append((threading.get_ident(), history[0]))
        together.wait(60)  # only if all four request at the same time
        time.sleep(0.01)

    with ThreadPoolExecutor(4) as pool:
        seconds, each = one_round(pool, 4, way, [[str(number)] for number in range(12)])
    assert len(each) == 12
    assert min(each) >= 0.01
    assert seconds >= 0.03
    by_thread: dict[int, list[int]] = {}
    for thread, history in requests:
        by_thread.setdefault(thread, []).append(int(history))
    expected = [list(range(number, 12, 4)) for number in range(4)]
    assert sorted(map(sorted, by_thread.values())) == expected


def test_other_lists_in_a_batch_are_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_data(tmp_path / "made", 60, 40)
    run = random_run([f"item {number}" for number in range(40)])
    recommender, histories = Recommender(run), histories_of(dataset, run.catalogue)
    assert sorted(map(len, histories)) == sorted(dataset.sequences.lengths.tolist())
    check_same(recommender, histories[:10])
    answer = recommender.recommend

    def other_in_a_batch(requests: Any, k: int = 20) -> list[Recommendation]:
        return answer(requests[::-1], k)

    monkeypatch.setattr(recommender, "recommend", other_in_a_batch)
    with pytest.raises(AssertionError):
        check_same(recommender, histories[:10])


def test_run_is_measured_on_its_own_data_alone(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    claims, table = bench_latency(tiny_run, tiny_data, TINY)
    assert len(claims) == 3
    assert table["data"]["items"] == 64
    assert table["data"]["histories"] == tiny_data.name
    made = make_data(tmp_path / "made", 60, 40)
    with pytest.raises(ValueError, match="give --data the directory the run was trained on"):
        bench_latency(tiny_run, made.path, TINY)
    # Histories of other data are taken as histories of the run's items.
    run = Recommender.load(tiny_run).run
    synthetic = histories_of(load_dataset(made.path), run.catalogue)
    assert {item for history in synthetic for item in history} <= set(run.catalogue.item_ids)


def test_a_server_is_measured_at_each_number_of_callers(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENREC_TOKEN", "the user's own")
    claims, table = bench_serve(tiny_run, tiny_data, Sizes(calls=12, rounds=1))
    check_claims(claims, table, tmp_path / "serve.json")
    rows = {(row["way"], row["callers"]): row for row in table["measured"]}
    assert set(rows) == {
        (way, callers) for way in (SERVED, GENERATED, DIRECT) for callers in CALLERS
    }
    for (_, callers), row in rows.items():
        assert row["calls"] == max(12, -(-12 // callers) * callers)
        assert 0 < row["p50 ms"] <= row["p95 ms"] <= row["p99 ms"]
    for first, peer in ((0, GENERATED), (9, DIRECT)):
        assert claims[first].theirs == rows[peer, 1]["p50 ms"]
    assert [claim.ours for claim in claims[:3]] == [
        rows[SERVED, 1][figure] for figure in ("p50 ms", "p95 ms", "calls/s")
    ]
    assert len(format_latencies(table).splitlines()) == 10


def test_generate_is_measured_only_where_it_gives_the_models_own_scores(tiny_run: Path) -> None:
    config = Recommender.load(tiny_run).run.model.config
    assert generate_decodes(config)
    for name, value in (("decoder_start", "state"), ("certain_tokens", "given")):
        other = copy.deepcopy(config)
        assert hasattr(other, name)
        setattr(other, name, value)
        assert not generate_decodes(other)
