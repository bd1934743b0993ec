"""The run directory of a trained SASRec: settings, events, weights and item vectors; what is finished is used again."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from genrec_shards.atomic import atomic_file
from genrec_shards.prepare import Dataset
from genrec_shards.sequences import Split, TrainedThrough
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genrec_dist.baseline.sasrec import SASRec, SasrecSettings, check_settings
from genrec_dist.baseline.sasrec_train import Epoch, Trained, train
from genrec_dist.baseline.training import check_trained_through
from genrec_dist.events import git_commit, versions
from genrec_dist.recipe import section_from

FORMAT_VERSION = "1"
WEIGHTS, VECTORS, SETTINGS, EVENTS = "best.safetensors", "item_vectors.safetensors", "sasrec.yaml", "events.jsonl"


@dataclass(frozen=True)
class SasrecRun:
    """A trained model and what its file says of it."""

    model: SASRec
    settings: SasrecSettings
    best_epoch: int

    @property
    def recipe(self) -> dict[str, Any]:
        """What stands as `recipe` in the metrics."""
        return {**dataclasses.asdict(self.settings), "best_epoch": self.best_epoch}


def open_or_train(
    run: str | Path,
    dataset: Dataset,
    split: Split,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    overrides: list[str] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> SasrecRun:
    """The model of a run directory that is finished; elsewhere train one, from the start, and leave it there.

    `overrides`: `key=value` of `SasrecSettings`. Raises ValueError for settings that do not fit, for weights of other data,
    settings or `trained_through` than asked for, and where training has seen the split's targets.
    """
    check_trained_through(split, trained_through)
    path = Path(run)
    if (path / WEIGHTS).is_file():
        return load(path, dataset, trained_through, overrides)
    if trained_through == "n-1" and not any(override.startswith("epochs=") for override in overrides or []):
        raise ValueError(
            "trained_through n-1 leaves nothing to validate on: give --set epochs=N, the best epoch of the n-2 run"
        )
    settings = settings_from({}, overrides)
    path.mkdir(parents=True, exist_ok=True)
    with atomic_file(path / SETTINGS) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False), encoding="utf-8")
    trained = _train(path, dataset, settings, exclude_history, trained_through, on_epoch)
    _save(path, dataset, trained, trained_through)
    return SasrecRun(trained.model, settings, trained.best.epoch)


def settings_from(values: dict[str, Any], overrides: list[str] | None = None, source: str = "sasrec") -> SasrecSettings:
    """Settings of keys and values, changed by `key=value`. Raises ValueError naming `source` and the key that does not fit."""
    settings = section_from(SasrecSettings, values, overrides, source)
    check_settings(settings, source)
    return settings


def load(
    run: Path, dataset: Dataset, trained_through: TrainedThrough = "n-2", overrides: list[str] | None = None
) -> SasrecRun:  # fmt: skip
    """The finished run `run`. Raises ValueError, one line, where it is damaged or was made of something else."""
    path = run / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not readable ({error}): remove it and train again") from None
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {metadata.get('format_version')}, this version reads {FORMAT_VERSION}")
    _check_origin(path, metadata, dataset, trained_through)
    values = json.loads(metadata["settings"])
    settings = settings_from(dict(values), source=str(path))
    asked = settings_from(dict(values), overrides)
    for key, value in values.items():
        if getattr(asked, key) != value:
            raise ValueError(f"{run} was trained with {key} {value}, not {getattr(asked, key)}: choose another --out")
    model = SASRec(dataset.sequences.num_items, settings)
    model.load_state_dict(weights)
    return SasrecRun(model.eval(), settings, int(metadata["best_epoch"]))


def _check_origin(path: Path, metadata: dict[str, str], dataset: Dataset, trained_through: TrainedThrough) -> None:
    found, expected = metadata["sequences_hash"], dataset.info.sequences_hash
    if found != expected:
        raise ValueError(
            f"{path} was trained on sequences {found[:12]}, {dataset.path} has {expected[:12]}: choose another --out"
        )
    through = metadata["trained_through"]
    if through != trained_through:
        raise ValueError(f"{path} was trained through {through}: pass --trained-through {through}, or another --out")


def _train(
    run: Path,
    dataset: Dataset,
    settings: SasrecSettings,
    exclude_history: bool,
    trained_through: TrainedThrough,
    on_epoch: Callable[[Epoch], None] | None,
) -> Trained:
    # Anew where an earlier start was interrupted: no weights are there to go on from.
    with (run / EVENTS).open("w", encoding="utf-8", buffering=1) as file:

        def tell(event: str, **fields: Any) -> None:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}, allow_nan=False) + "\n")

        def ended(epoch: Epoch, model: SASRec) -> None:
            fields = dataclasses.asdict(epoch)
            tell("epoch", **{**fields.pop("scores"), **fields})
            if on_epoch is not None:
                on_epoch(epoch)

        tell(
            "start",
            system="sasrec",
            recipe=dataclasses.asdict(settings),
            trained_through=trained_through,
            exclude_history=exclude_history,
            threads=torch.get_num_threads(),
            git=git_commit(),
            versions=versions(),
        )
        trained = train(
            dataset.sequences,
            settings,
            exclude_history=exclude_history,
            trained_through=trained_through,
            on_epoch=ended,
        )
        tell(
            "end",
            status="finished",
            seconds=trained.last.seconds,
            best_epoch=trained.best.epoch,
            parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
            **{f"best_{name}": value for name, value in trained.best.scores.items()},
        )
    return trained


def _save(run: Path, dataset: Dataset, trained: Trained, trained_through: TrainedThrough) -> None:
    """The vectors first: where the weights lie, the run is finished."""
    origin = {
        "format_version": FORMAT_VERSION,
        "system": "sasrec",
        "sequences_hash": dataset.info.sequences_hash,
        "trained_through": trained_through,
        "settings": json.dumps(dataclasses.asdict(trained.model.settings)),
        "best_epoch": str(trained.best.epoch),
    }
    vectors_Id = trained.model.item_embedding.weight.detach().float().contiguous()
    _write(run / VECTORS, {"item_vectors": vectors_Id}, origin)
    _write(run / WEIGHTS, dict(trained.model.state_dict()), origin)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
