"""Weights of a score mixture: the grid, the choice and its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genrec_dist.config.load import section_from
from genrec_dist.data.item_graph import KnnSettings
from genrec_dist.evaluation import score_mixture as mixture
from genrec_dist.evaluation.metrics import METRICS, metrics_from_histogram
from genrec_dist.evaluation.score_mixture import Mixture


def test_grid_holds_each_mixture_once_and_choose_takes_the_first_best() -> None:
    tried = mixture.grid((0.0, 1.0), KnnSettings())
    assert (
        len(tried)
        == len(set(tried))
        == 2 * (1 + len(mixture.EPSILONS) * (len(mixture.GRAPH_WEIGHTS) - 1))
    )
    counts = np.zeros((len(tried), 21), np.int64)
    counts[:, 0] = 10
    counts[[7, 9], 2] += 3
    choice = mixture.choose(tried, counts)
    assert choice.mixture == tried[7]
    assert choice.users == 13
    assert choice.validation == {
        key: pytest.approx(metrics_from_histogram(counts[7])[key]) for key in METRICS
    }


def test_load_reads_what_save_wrote_and_refuses_other_origins(tmp_path: Path) -> None:
    tried = mixture.grid((1.0,), KnnSettings(window=3))
    counts = np.zeros((len(tried), 21), np.int64)
    counts[-2, 1] = 4
    counts[:, 0] += 1
    choice = mixture.choose(tried, counts)
    assert mixture.load(tmp_path, {"data": "x"}) is None
    path = mixture.save(choice, tmp_path, {"data": "x"})
    assert mixture.load(tmp_path, {"data": "x"}) == tried[-2]
    with pytest.raises(
        ValueError, match=r"hybrid\.json: weights chosen for data x, not y: remove it"
    ):
        mixture.load(tmp_path, {"data": "y"})
    held = json.loads(path.read_text())
    for changed in ({"origin": "x"}, {"mixture": {"graph": {"window": 10**9}}}):
        path.write_text(json.dumps(held | changed))
        with pytest.raises(
            ValueError, match=r"^\S*hybrid\.json: not readable .*choose the weights"
        ):
            mixture.load(tmp_path, {"data": "x"})
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"hybrid\.json: not readable .*choose the weights again"):
        mixture.load(tmp_path, {"data": "x"})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"graph_weight": -1.0}, "graph_weight is -1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0: it has to be above 0"),
        ({"text": {"recent": 0}}, "text recent is 0: it has to be from 1 to 1,000,000"),
        ({"text": {"recent": 10**30}}, "it has to be from 1 to 1,000,000"),
        ({"graph": {"window": 10**9}}, "knn: window is 1000000000: it has to be from 1 to 10,000"),
        ({"graph": {"recent": 10**30}}, "it has to be from 1 to 1,000,000"),
        ({"text": {"epsilon": 0.0}}, "text epsilon is 0.0: it has to be above 0"),
        ({"text": {"weight": -0.1}}, "text weight is -0.1: it has to be 0 or above"),
    ],
)
def test_mixture_refuses_what_cannot_be_mixed(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        section_from(Mixture, values, None, "hybrid")
