"""Shards whose manifest somebody wrote anew, in agreement with tars of other items: nothing is
learned of them, and one line names tar and record."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
from genrec_shards.errors import DataError
from genrec_shards.storage.reader import ShardReader
from shard_damage import change_manifest, npy, replace_record
from torch.utils.data import DataLoader

from genrec_dist.config.load import load_recipe
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup


@pytest.fixture
def shards(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data / "shards", tmp_path / "shards"))


@pytest.fixture
def recipe(tiny_recipe: Path, shards: Path) -> Path:
    text = tiny_recipe.read_text().replace("workers: 0", f"workers: 1\nshards: {shards}")
    tiny_recipe.write_text(text)
    return tiny_recipe


def put_item(shards: Path, row: int) -> None:
    """Another item in the first place of record 0."""

    def change(members: dict[str, bytes]) -> None:
        items = np.load(io.BytesIO(members["00000000.items.npy"]))
        items[0] = row if row != items[0] else row + 1
        members["00000000.items.npy"] = npy(items)

    replace_record(shards, change)


def test_a_training_refuses_other_items_under_the_old_hash(recipe: Path, shards: Path) -> None:
    put_item(shards, 1)
    done = forked.run(["-m", "genrec_dist.train", recipe], {**os.environ}, timeout=300)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("genrec: ")]
    assert told == [
        f"genrec: {shards}/shard-000000.tar: record 0: holds other items than the data: run "
        "`genrec shard` again"
    ]
    assert "Traceback" not in done.stderr


def test_another_number_of_items_is_refused_at_the_start(recipe: Path, shards: Path) -> None:
    change_manifest(shards, lambda manifest: manifest.update(items=65))
    with pytest.raises(DataError, match="shards: made from other sequences than"):
        build_setup(load_recipe(recipe))


def test_lengths_of_other_users_are_refused_at_the_start(recipe: Path, shards: Path) -> None:
    setup, _ = build_setup(load_recipe(recipe))
    reader = ShardReader(shards)
    reader.lengths = reader.lengths[::-1]
    with pytest.raises(DataError, match="shards: made from other sequences than"):
        reader.expect(setup.dataset.sequences, "data")


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_worker_meets_names_the_record(recipe: Path, shards: Path, workers: int) -> None:
    setup, _ = build_setup(load_recipe(recipe))
    put_item(shards, 10**6)  # nothing has a token for it
    change_manifest(shards, lambda manifest: manifest.update(items=2 * 10**6))
    unbound = ShardReader(shards)
    data = StepBatches(setup.stages, unbound, setup.layout, setup.recipe, 0, 1)
    with pytest.raises(DataError) as caught:
        list(DataLoader(data, sampler=range(3), batch_size=None, num_workers=workers))
    line = str(caught.value).strip().splitlines()[-1]
    assert (
        f"{shards}/shard-000000.tar: record 0: no batch can be made of it (ValueError: item row"
        in line
    )
