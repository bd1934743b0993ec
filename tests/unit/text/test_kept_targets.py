"""Soft targets in the data directory: made once, of all that they depend on, and again when
torn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Started
from genrec_shards.dataset import load_dataset
from places import HELPERS
from topic_data import write_data
from two_ranks import environment

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Distill, Recipe
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.text.kept_targets import FOLDER, inputs_of, kept_soft_targets
from genrec_dist.training.setup import build_setup, describe

SCRIPT = HELPERS / "targets_process.py"
RECIPE = """
micro_batch_tokens: 256
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 32, max_tokens: 16,
  user_ids: false, encoder_attention: causal, decoder_start: state}
tokens: {vocab_size: 400, trim: true, forced: given}
finetune: {epochs: 2, batch_size: 16, targets: all-prefixes, distill: {weight: 0.4, top: 7}}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def recipe_of(data: Path, *overrides: str) -> Recipe:
    path = data.parent / "recipe.yaml"
    path.write_text(f"data: {data}\nrun: {data.parent / 'run'}\n{RECIPE}")
    return load_recipe(path, list(overrides))


def made(number: int) -> Callable[[], Teacher]:
    return lambda: Teacher(
        np.arange(3), np.full((4, 2), number, np.int32), np.ones((4, 2), np.float32)
    )


def forbidden() -> Teacher:
    raise AssertionError("made again")


def same(one: Teacher, other: Teacher) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Teacher)]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_a_run_leaves_its_soft_targets_to_the_next_and_a_dry_run_makes_none(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(data)
    assert describe(recipe)["users"] > 0
    assert not (data / FOLDER).exists()
    first = build_setup(recipe)[0]
    (kept,) = (data / FOLDER).iterdir()
    said = capsys.readouterr()
    assert (said.out + said.err).count("soft targets of the transition graph") == 1
    second = build_setup(recipe)[0]
    assert first.teacher is not None
    assert second.teacher is not None
    assert same(first.teacher, second.teacher)
    assert first.identity == second.identity
    assert "soft targets" not in "".join(capsys.readouterr())
    assert list((data / FOLDER).iterdir()) == [kept]
    build_setup(recipe_of(data, "finetune.distill.temperature=2"))
    assert len(list((data / FOLDER).iterdir())) == 2


def test_each_input_has_its_own(data: Path) -> None:
    """A change of any of them makes other soft targets, and none takes the place of another."""
    dataset, whole = load_dataset(data), Distill(weight=0.4)
    items = dataset.sequences.items.copy()
    items[-1] = (items[-1] + 1) % dataset.sequences.num_items  # of validation or test alone
    assert dataset.descriptions is not None
    texts = [*dataset.descriptions.texts]
    texts[0] += " blue"
    changes: list[dict[str, Any]] = [
        {},
        {"dataset": replace(dataset, sequences=replace(dataset.sequences, items=items))},
        {"dataset": replace(dataset, descriptions=replace(dataset.descriptions, texts=texts))},
        {"trained_through": "n-1"},
        {"distill": replace(whole, weight=0.5)},
        {"distill": replace(whole, temperature=2.0)},
        {"distill": replace(whole, top=9)},
        {"text": "factors"},
        {"text": None},
        {"settings": {"drawn": 25}},
        {"exclude_history": False},
    ]
    usual = {
        "dataset": dataset,
        "trained_through": "n-2",
        "distill": whole,
        "text": "words",
        "settings": {"drawn": 24},
        "exclude_history": True,
    }
    for twice in range(2):
        for number, change in enumerate(changes):
            inputs = inputs_of(**{**usual, **change})
            make = forbidden if twice else made(number)
            assert kept_soft_targets(dataset, inputs, make).items_SK[0, 0] == number
    assert len(list((data / FOLDER).iterdir())) == len(changes)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [torn, flipped, empty])
def test_what_is_damaged_is_made_again(data: Path, damage: Callable[[Path], None]) -> None:
    dataset = load_dataset(data)
    kept_soft_targets(dataset, {}, made(1))
    (path,) = (data / FOLDER).iterdir()
    damage(path)
    assert same(kept_soft_targets(dataset, {}, made(2)), made(2)())
    assert same(kept_soft_targets(dataset, {}, forbidden), made(2)())


def test_where_nothing_may_be_written_nothing_is_kept(data: Path) -> None:
    dataset = replace(load_dataset(data), path=Path("/sys/kernel"))
    assert same(kept_soft_targets(dataset, {}, made(3)), made(3)())


def started(data: Path, number: int, seconds: float) -> Started:
    here = data.parent
    arguments = [SCRIPT, data, here / "log", str(seconds)]
    return Started(arguments, here / f"out-{number}", here / f"err-{number}", environment())


def wait_for(log: Path, *lines: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if log.is_file() and sorted(log.read_text().split("\n")[:-1]) == sorted(lines):
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text() if log.is_file() else "nothing was said")


def test_two_processes_make_them_once(data: Path) -> None:
    processes = [started(data, number, 2.0) for number in range(2)]
    assert [each.wait(120).returncode for each in processes] == [0, 0]
    lines = (data.parent / "log").read_text().splitlines()
    assert sorted(lines) == ["has 8", "has 8", "making", "ready", "ready"]
    assert len(list((data / FOLDER).iterdir())) == 1


def test_who_waits_for_one_that_is_killed_makes_them(data: Path) -> None:
    log = data.parent / "log"
    first = started(data, 0, 1000.0)
    wait_for(log, "ready", "making")
    second = started(data, 1, 0.0)
    wait_for(log, "ready", "making", "ready")
    first.kill()
    assert second.wait(120).returncode == 0
    assert log.read_text().splitlines()[-2:] == ["making", "has 8"]
    assert [path.suffix for path in (data / FOLDER).iterdir()] == [".safetensors"]
