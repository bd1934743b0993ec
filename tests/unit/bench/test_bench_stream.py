"""The benchmark of streaming on small sizes: both layouts hold the same, and every claim is made of
what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from genrec_shards.storage.write import write_shards

from genrec_dist.bench.measure import Claim, format_claims, write_table
from genrec_dist.bench.stream import (
    Sizes,
    bench_stream,
    check_same,
    make_data,
    measure_waiting,
    read_json_tars,
    write_json_tars,
)

SMALL = Sizes(users=300, items=50, many_users=4000, users_per_record=10, train_steps=0, repeats=2)


def test_both_layouts_must_hold_the_same(tmp_path: Path) -> None:
    sequences = (dataset := make_data(tmp_path / "made", 100, 40)).sequences
    write_shards(dataset, tmp_path / "shards")
    theirs = write_json_tars(sequences, tmp_path / "json", users_per_tar=30)
    assert len(theirs) == 4
    assert [sample["user"] for sample in read_json_tars(theirs)] == list(range(100))
    check_same(sequences, tmp_path / "shards", theirs)
    with pytest.raises(AssertionError):
        check_same(sequences, tmp_path / "shards", theirs[:-1])
    other = make_data(tmp_path / "other", 100, 40, seed=1)
    with pytest.raises(AssertionError):
        check_same(other.sequences, tmp_path / "shards", theirs)
    assert sequences.lengths.min() >= 5
    assert 8 < sequences.lengths.mean() < 10


@pytest.fixture(scope="module")
def measured() -> tuple[list[Claim], dict[str, Any]]:
    return bench_stream(sizes=SMALL)


def test_every_claim_is_made_of_what_was_measured(
    measured: tuple[list[Claim], dict[str, Any]], tmp_path: Path
) -> None:
    claims, table = measured
    by_id = {claim.id: claim for claim in claims}
    assert set(by_id) == {
        "decode",
        "bytes",
        "resume",
        "network, 1 ranks a node",
        "network, 2 ranks a node",
    }
    rates = table["decoding"]["samples_per_second"]
    assert by_id["decode"].ratio == pytest.approx(rates["ours"] / rates["theirs"])
    assert by_id["decode"].holds == (by_id["decode"].ratio >= 30)
    sizes = table["decoding"]["bytes"]
    assert by_id["bytes"].ratio == sizes["tars"] / sizes["raw"]
    assert sizes["raw"] < sizes["tars"] < sizes["with manifest and lengths"] < sizes["json tars"]
    assert len(table["decoding"]["seconds"]["theirs"]) == 2
    assert (
        table["resuming"]["steps"]["90 %"] == table["resuming"]["steps_per_epoch"] * 90 // 100 > 0
    )
    write_table(table, tmp_path / "stream.json")
    assert json.loads((tmp_path / "stream.json").read_text())["name"] == "stream"
    assert "webdataset" in format_claims(claims)


def test_a_node_fetches_once_what_its_cache_holds(
    measured: tuple[list[Claim], dict[str, Any]],
) -> None:
    """However many ranks; without a cache each rank fetches for itself, in each epoch."""
    fetched = {
        name: case["amplification"] for name, case in measured[1]["network"]["cases"].items()
    }
    beside = 0.1  # each rank asks for the manifest
    for ranks in (1, 2):
        assert fetched[f"{ranks} ranks, cache larger than the data"] == pytest.approx(
            [1, 0], abs=beside * ranks
        )
        first, second = fetched[f"{ranks} ranks, cache a quarter of the data"]
        assert 0.9 <= first < 1 + beside * ranks  # the end of a tar is never asked for
        assert 0.2 < second <= 1
        first, second = fetched[f"{ranks} ranks, cache none"]
        assert (
            0.8 * ranks <= first < ranks * (1 + beside)
        )  # a rank can miss a record that holds ten users
        assert 0.2 * ranks < second <= ranks


@pytest.mark.dist
def test_a_real_run_is_watched_and_ended(tmp_path: Path) -> None:
    dataset = make_data(tmp_path / "made", 400, 60)
    write_shards(dataset, tmp_path / "shards")
    (claim,), more = measure_waiting(dataset, tmp_path, Sizes(train_steps=3))
    assert 0 <= claim.ours <= 1
    assert claim.ours == pytest.approx(np.mean(more["shares"]))
    assert more["seconds_to_make_a_batch"] > 0


def test_a_run_that_cannot_start_is_told(tmp_path: Path) -> None:
    dataset = make_data(tmp_path / "made", 40, 20)
    with pytest.raises(ValueError, match=r"took no step: .*shards"):
        measure_waiting(dataset, tmp_path, Sizes(train_steps=3))
