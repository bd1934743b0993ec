"""The tiny run, loaded in float64, so that the order of lists does not hang on rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from genrec_shards.dataset import Dataset, load_dataset

from genrec_dist.inference.load import LoadedRun, load_run
from genrec_dist.inference.recommend import Recommender


@pytest.fixture(scope="session")
def loaded(tiny_run: Path) -> LoadedRun:
    run = load_run(tiny_run)
    model = run.model.double()
    return replace(run, model=model, searcher=run.searcher.of(model))


@pytest.fixture(scope="session")
def recommender(loaded: LoadedRun) -> Recommender:
    return Recommender(loaded)


@pytest.fixture(scope="session")
def dataset(tiny_data: Path) -> Dataset:
    return load_dataset(tiny_data)
