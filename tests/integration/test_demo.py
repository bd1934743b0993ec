"""The demo, run for real: GenRec beats kNN and comes close to the ceiling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.synthetic import make_process

from genrec_dist.cli.demo import SHARE_OF_CEILING, score_ceiling, share_of_ceiling

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "genrec_dist.cli", "demo", "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def metrics(run: tuple[Path, str]) -> dict:
    return json.loads((run[0] / "metrics-test.json").read_text())


def test_genrec_beats_knn_beyond_the_intervals(metrics: dict) -> None:
    for key in ("HR@10", "NDCG@10"):
        assert metrics["ci95"][key][0] > metrics["beside"]["knn"]["ci95"][key][1], key


def test_genrec_reaches_the_stated_share_of_the_ceiling(metrics: dict) -> None:
    assert share_of_ceiling(metrics) >= SHARE_OF_CEILING
    assert share_of_ceiling(metrics) < 1.02  # above the oracle only a leak or a fluke can carry it


def test_the_ceiling_is_the_oracle_on_the_same_users(run: tuple[Path, str], metrics: dict) -> None:
    dataset = load_dataset(run[0] / "data")
    assert dataset.sequences.num_items >= 1000
    assert metrics["beside"]["ceiling"] == score_ceiling(make_process(), dataset)


def test_the_closing_table_names_all_four(run: tuple[Path, str]) -> None:
    for name in ("GenRec", "co-occurrence kNN", "popularity", "ceiling"):
        assert name in run[1]


def test_the_report_stands(run: tuple[Path, str]) -> None:
    assert "GenRec" in (run[0] / "report.html").read_text()


def test_every_list_is_full_valid_and_free_of_the_history(metrics: dict) -> None:
    assert metrics["invalid_rate"] == metrics["duplicate_rate"] == 0
    assert metrics["protocol"]["exclude_history"] is True
