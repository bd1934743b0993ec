"""A data directory and a trained run, made once through the real commands."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import forked
import pytest
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from tiny import TINY_RECIPE, tiny_log
from two_ranks import environment

# Ray's workers have niceness 15 by default: beside other tests they would hardly start.
os.environ.setdefault("RAY_worker_niceness", "0")

FIRST = (
    "test_tune_faults.py",
    "test_demo.py",
    "test_zero.py",
    "test_tune.py",
    "test_restarts.py",
    "test_baseline.py",
    "test_train.py",
    "test_faults.py",
    "test_reproduce.py",
    "test_reproduce_ends.py",
    "test_embedding_sum.py",
    "test_tune_share.py",
    "test_memory.py",
    "test_prompted_ranks.py",
    "test_kernel_ranks.py",
    "test_prepare_ray_cluster.py",
    "test_refresh.py",
    "test_fake_cuda.py",
    "test_api.py",
)
"""The files that take longest, longest first. A process takes a whole file; one of these begun last
would keep one process at work when the others have ended."""

try:
    import hypothesis
except ModuleNotFoundError:
    pass  # the check of a GPU runs some tests where it is not installed
else:
    # An example may take as long as a busy machine makes it; a hang ends by the tests' own timeout.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not search it again and again, here
    or in a process that is forked off this one."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or Triton's binding would report all of it as leaked


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, so that what a file makes is made once, in the order of collection: xdist itself
    would begin the files of the fewest tests last, and those take longest."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: gzip writes down the second, and all workers have to
    collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared and sharded data directory; the last user has all items. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "log.txt").write_text(tiny_log(), encoding="utf-8")
    dataset = prepare(folder / "log.txt", folder / "data", numbering="random")
    write_shards(dataset, folder / "data" / "shards", users_per_shard=64, users_per_record=32)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path) -> Path:
    """A run of a few steps, trained in a process of its own. Copy it before writing into it."""
    run, recipe = tiny_data.parent / "run", tiny_data.parent / "recipe.yaml"
    recipe.write_text(f"data: {tiny_data}\nrun: {run}\n{TINY_RECIPE}", encoding="utf-8")
    done = forked.run(["-m", "genrec_dist.train", recipe], environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def tiny_recipe(tiny_data: Path, tmp_path: Path) -> Path:
    """A recipe of such a run, which goes to `run` beside it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {tiny_data}\nrun: {tmp_path / 'run'}\n{TINY_RECIPE}", encoding="utf-8")
    return path
