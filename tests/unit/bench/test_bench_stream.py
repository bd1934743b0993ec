"""The benchmark of streaming on small sizes: both layouts hold the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from claims import check_claims
from genrec_shards.storage.write import write_shards

from genrec_dist.bench.measure import Claim
from genrec_dist.bench.stream import (
    Sizes,
    bench_stream,
    check_same,
    read_json_tars,
    write_json_tars,
)
from genrec_dist.bench.synthetic import make_data

SMALL = Sizes(users=300, items=50, many_users=4000, users_per_record=10, train_steps=0, repeats=2)


@pytest.fixture(scope="module")
def measured() -> tuple[list[Claim], dict[str, Any]]:
    return bench_stream(sizes=SMALL)


def test_both_layouts_must_hold_the_same(tmp_path: Path) -> None:
    sequences = (dataset := make_data(tmp_path / "made", 100, 40)).sequences
    write_shards(dataset, tmp_path / "shards")
    theirs = write_json_tars(sequences, tmp_path / "json", users_per_tar=30)
    assert len(theirs) == 4
    assert [sample["user"] for sample in read_json_tars(theirs)] == list(range(100))
    check_same(sequences, tmp_path / "shards", theirs)
    other = make_data(tmp_path / "other", 100, 40, seed=1)
    for compared, tars in ((sequences, theirs[:-1]), (other.sequences, theirs)):
        with pytest.raises(AssertionError):
            check_same(compared, tmp_path / "shards", tars)
    assert sequences.lengths.min() >= 5
    assert 8 < sequences.lengths.mean() < 10


def test_claims_are_made_of_what_was_measured(
    measured: tuple[list[Claim], dict[str, Any]], tmp_path: Path
) -> None:
    claims, table = measured
    check_claims(claims, table, tmp_path / "stream.json")
    networks = [f"network, {ranks} ranks a node" for ranks in (1, 2)]
    by_id = {claim.id: claim for claim in claims}
    assert list(by_id) == ["decode", "bytes", "resume", *networks]
    assert "webdataset" in by_id["decode"].peer
    sizes = table["decoding"]["bytes"]
    assert by_id["bytes"].ratio == sizes["tars"] / sizes["raw"]
    assert sizes["raw"] < sizes["tars"] < sizes["with manifest and lengths"] < sizes["json tars"]
    assert len(table["decoding"]["seconds"]["theirs"]) == 2
    resuming = table["resuming"]
    assert resuming["steps"]["90 %"] == resuming["steps_per_epoch"] * 90 // 100 > 0


def test_node_fetches_once_what_its_cache_holds(
    measured: tuple[list[Claim], dict[str, Any]],
) -> None:
    """However many ranks; without a cache each rank fetches for itself, in each epoch."""
    cases = measured[1]["network"]["cases"]
    fetched = {name: case["amplification"] for name, case in cases.items()}
    beside = 0.15  # each rank reads the manifest
    for ranks in (1, 2):
        whole = fetched[f"{ranks} ranks, cache larger than the data"]
        assert whole == pytest.approx([1, 0], abs=beside * ranks)
        first, second = fetched[f"{ranks} ranks, cache a quarter of the data"]
        assert 0.9 <= first < 1 + beside * ranks  # the end of a tar is never needed
        assert 0.2 < second <= 1
        first, second = fetched[f"{ranks} ranks, cache none"]
        # A rank can miss a record that holds ten users.
        assert 0.7 * ranks <= first < ranks * (1 + beside)
        assert 0.2 * ranks < second <= ranks
