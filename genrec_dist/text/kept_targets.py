"""Soft targets kept in the data directory: one process makes them, once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.atomic import atomic_file, sweep_killed_writers
from genrec_shards.dataset import Dataset
from genrec_shards.file_lock import hold
from genrec_shards.splits import TrainedThrough
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from genrec_dist.config.recipe import Distill
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.text import teacher, tune
from genrec_dist.text.vectors import NOT_WRITABLE, source_identity

FOLDER = "soft-targets"
"""Of the data directory; everything in it can be made again."""
VERSION = 1
"""To be raised where the same inputs come to make other soft targets."""
WAIT_SECONDS = 6 * 3600.0
"""How long a process waits for the one that makes them."""


def kept_soft_targets(
    dataset: Dataset, inputs: dict[str, Any], make: Callable[[], Teacher]
) -> Teacher:
    """The soft targets of these inputs: of an earlier run, of the process that makes them now, or
    made here and left for the next one.

    What is damaged is made again. In a data directory that may not be written to nothing is kept.

    Args:
        dataset: whose directory they are kept in.
        inputs: everything that they depend on (`inputs_of`).
        make: makes them.

    Raises:
        ValueError: another process has been making them for `WAIT_SECONDS`.
        OSError: they cannot be written.
    """
    key = json.dumps(inputs, sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = dataset.path / FOLDER / f"{name}.safetensors"
    found = _load(path)
    if found is not None:
        return found
    lock = path.with_suffix(".lock")
    try:
        with hold(lock, "another process makes these soft targets", wait=WAIT_SECONDS):
            found = _load(path)
            if found is None:
                sweep_killed_writers(path.parent, path.name)
                found = make()
                _save(found, path, key)
            return found
    except OSError as error:
        if error.errno not in NOT_WRITABLE or found is not None:
            raise
        return make()


def inputs_of(
    dataset: Dataset,
    trained_through: TrainedThrough,
    distill: Distill,
    text: str | None,
    settings: dict[str, Any],
    *,
    exclude_history: bool,
) -> dict[str, Any]:
    """What soft targets depend on.

    Args:
        dataset: the interactions, also those of validation, on which settings are chosen.
        trained_through: where the training parts end.
        distill: of the recipe.
        text: the source by which texts are compared; None: they are not.
        settings: what is tried for the graph's.
        exclude_history: as of `make_teacher`.
    """
    texts = None
    if text is not None:
        assert dataset.descriptions is not None
        texts = {
            "texts": dataset.descriptions.texts_hash,
            "source": "words" if text == "words" else source_identity(text),
            "tried": [tune.HISTORIES, tune.POWERS, tune.UNIFORM, tune.MOST_USERS],
            "weight": teacher.TEXT_WEIGHT,
        }
    return {
        "version": VERSION,
        "sequences": dataset.sequences.sequences_hash(),
        "trained_through": trained_through,
        "distill": dataclasses.asdict(distill),
        "epsilon": teacher.EPSILON,
        "exclude_history": exclude_history,
        "graph": settings,
        "text": texts,
    }


def _parts(found: Teacher) -> Iterator[tuple[str, np.ndarray]]:
    for field in dataclasses.fields(Teacher):
        yield field.name, getattr(found, field.name)


def _digest(found: Teacher) -> str:
    """Of values, types and shapes."""
    digest = hashlib.sha256()
    for name, values in _parts(found):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _save(found: Teacher, path: Path, key: str) -> None:
    with atomic_file(path) as temporary:
        save_file(dict(_parts(found)), temporary, {"inputs": key, "sha256": _digest(found)})


def _load(path: Path) -> Teacher | None:
    """What is kept; None where nothing is, or where it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            fields = [field.name for field in dataclasses.fields(Teacher)]
            found = Teacher(**{name: file.get_tensor(name) for name in fields})
            return found if file.metadata()["sha256"] == _digest(found) else None
    except (SafetensorError, OSError, KeyError, TypeError):
        return None
