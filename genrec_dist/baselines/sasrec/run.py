"""The run directory of a trained SASRec or BSARec: settings, events, weights and item vectors; what
is finished is used again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from genrec_shards.atomic import atomic_file, sweep_killed_writers, write_text
from genrec_shards.dataset import Dataset
from genrec_shards.file_lock import LOCK_FILE, hold
from genrec_shards.histories import check_trained_through
from genrec_shards.readers.documents import parse_object
from genrec_shards.splits import Split, TrainedThrough
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genrec_dist.baselines.sasrec.bsarec import BsarecSettings
from genrec_dist.baselines.sasrec.model import SASRec, SasrecSettings, check_settings
from genrec_dist.baselines.sasrec.train import Epoch, Progress, Trained, model_of, train
from genrec_dist.baselines.soft_targets import soft_targets_of
from genrec_dist.config.load import section_from
from genrec_dist.evaluation.provenance import git_commit, versions
from genrec_dist.evaluation.score_mixture import TEXTS
from genrec_dist.model.weights import check_weights
from genrec_dist.text.vectors import described, item_vectors

SETTINGS_OF: dict[str, type[SasrecSettings]] = {"sasrec": SasrecSettings, "bsarec": BsarecSettings}
FORMAT_VERSIONS = {"sasrec": "1", "bsarec": "2"}
"""Of a run of each system. BSARec's 1 had no first items to learn."""
WEIGHTS, VECTORS, SETTINGS, EVENTS = (
    "best.safetensors",
    "item_vectors.safetensors",
    "sasrec.yaml",
    "events.jsonl",
)
PROGRESS = "training.safetensors"
"""What an interrupted training goes on from; gone when it is finished."""


@dataclass(frozen=True)
class SasrecRun:
    """A trained model and what its file says of it."""

    model: SASRec
    settings: SasrecSettings
    best_epoch: int

    @property
    def recipe(self) -> dict[str, Any]:
        """The `recipe` of the metrics."""
        return {**dataclasses.asdict(self.settings), "best_epoch": self.best_epoch}

    def digest(self) -> str:
        """sha256 of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Training:
    """What a model is trained on, and for which lists."""

    dataset: Dataset
    split: Split
    """Whose targets are ranked."""
    exclude_history: bool
    """Whether lists leave out the history."""
    trained_through: TrainedThrough = "n-2"
    """The last position that is trained on."""
    on_epoch: Callable[[Epoch], None] | None = None
    """Called after each epoch."""
    system: str = "sasrec"
    """Which model: one of SETTINGS_OF."""


def open_or_train(
    run: str | Path, training: Training, overrides: list[str] | None = None
) -> SasrecRun:
    """The model of a finished run directory; elsewhere train one and leave it there, from the last
    epoch of a training that was interrupted.

    Args:
        run: The run directory.
        training: What the model is of.
        overrides: `key=value` of the system's settings.

    Raises:
        ValueError: For settings that do not fit, for weights of other data, settings or
            `trained_through` than requested, where training has seen the split's targets, and
            where another process trains this run.
    """
    dataset, trained_through = training.dataset, training.trained_through
    check_trained_through(training.split, trained_through)
    path = Path(run)
    with contextlib.ExitStack() as held:
        if not (path / WEIGHTS).is_file():
            held.enter_context(hold(path / LOCK_FILE, "another process trains this run"))
        # Looked at again: another process may have finished it before the lock was free.
        if (path / WEIGHTS).is_file():
            return load(path, dataset, trained_through, overrides, training.system)
        sweep_killed_writers(path, WEIGHTS, VECTORS, SETTINGS, EVENTS, PROGRESS)
        return _train_anew(path, training, overrides)


def _train_anew(run: Path, training: Training, overrides: list[str] | None) -> SasrecRun:
    """Train in a run directory that this process holds; from the last epoch that is there."""
    trained_through = training.trained_through
    has_epochs = any(override.startswith("epochs=") for override in overrides or [])
    if trained_through == "n-1" and not has_epochs:
        raise ValueError(
            "trained_through n-1 leaves nothing to validate on: give --set epochs=N, the best "
            "epoch of the n-2 run"
        )
    settings = sasrec_settings({}, overrides, system=training.system)
    origin = {  # what the training is of; metadata of all its files
        "format_version": FORMAT_VERSIONS[training.system],
        "system": training.system,
        "sequences_hash": training.dataset.info.sequences_hash,
        "trained_through": trained_through,
        "exclude_history": json.dumps(training.exclude_history),
        "settings": json.dumps(dataclasses.asdict(settings)),
    }
    if settings.item_text != "none" or _soft_text(settings, training.dataset):
        origin[TEXTS] = described(training.dataset).texts_hash
    progress = _read_progress(run / PROGRESS, origin) if (run / PROGRESS).is_file() else None
    write_text(run / SETTINGS, yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    trained = _train(run, training, settings, origin, progress)
    _save(run, origin, trained)
    (run / PROGRESS).unlink(missing_ok=True)
    return SasrecRun(trained.model, settings, trained.best.epoch)


def sasrec_settings(
    values: dict[str, Any],
    overrides: list[str] | None = None,
    source: str | None = None,
    system: str = "sasrec",
) -> SasrecSettings:
    """Settings of keys and values, changed by `key=value`. Raises ValueError naming `source` (None:
    the system) and the key that does not fit."""
    settings = section_from(SETTINGS_OF[system], values, overrides, source or system)
    check_settings(settings, source or system)
    return settings


def load(
    run: Path,
    dataset: Dataset,
    trained_through: TrainedThrough,
    overrides: list[str] | None,
    system: str = "sasrec",
) -> SasrecRun:
    """The finished run `run`. Raises ValueError where it is damaged or was made of something
    else."""
    path = run / WEIGHTS
    metadata, weights = _read(path, "remove it and train again")
    facts = {"system", "sequences_hash", "trained_through", "settings", "best_epoch"}
    version, current = metadata.get("format_version"), FORMAT_VERSIONS.values()
    if version not in current:
        raise ValueError(f"{path}: format {version}, this version reads {', '.join(current)}")
    if lost := facts - metadata.keys():
        raise ValueError(f"{path}: {min(lost)} is missing in its header: remove it and train again")
    if metadata["system"] != system:
        raise ValueError(f"{path} is of {metadata['system']}, not {system}: choose another --out")
    if version != FORMAT_VERSIONS[system]:
        raise ValueError(
            f"{path}: format {version}, {system} has {FORMAT_VERSIONS[system]} now: choose another "
            "--out, or remove it to train again"
        )
    found, expected = metadata["sequences_hash"], dataset.info.sequences_hash
    if found != expected:
        raise ValueError(
            f"{path} was trained on sequences {found[:12]}, {dataset.path} has {expected[:12]}: "
            "choose another --out"
        )
    through = metadata["trained_through"]
    if through != trained_through:
        raise ValueError(
            f"{path} was trained through {through}: pass --trained-through {through}, or another "
            "--out"
        )
    values = parse_object(metadata["settings"], f"{path}: settings")
    settings = sasrec_settings(dict(values), source=str(path), system=system)
    stored = dataclasses.asdict(settings)
    requested = dataclasses.asdict(sasrec_settings(dict(values), overrides, system=system))
    for key in values:
        value, wanted = stored[key], requested[key]
        if wanted != value:
            raise ValueError(
                f"{run} was trained with {key} {value}, not {wanted}: choose another --out"
            )
    model = model_of(dataset.sequences.num_items, settings)
    check_weights(path, weights, model.state_dict())
    model.load_state_dict(weights)
    return SasrecRun(model.eval(), settings, int(metadata["best_epoch"]))


def _read_progress(path: Path, origin: dict[str, str]) -> Progress:
    """Raises ValueError, one line, where the file is damaged or of another training than this
    one."""
    metadata, tensors = _read(path, "remove it to train from the start")
    for key, requested in origin.items():
        found = metadata.get(key)
        if found != requested:
            raise ValueError(
                f"{path}: an interrupted training with {key} {found}, not {requested}: choose "
                "another --out, or remove it to train from the start"
            )
    last, best = (
        Epoch(**parse_object(metadata[name], f"{path}: {name}")) for name in ("last", "best")
    )
    return Progress(last, best, tensors)


def _read(path: Path, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors). Raises ValueError, one line, for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not readable ({error}): {remedy}") from None


def _train(
    run: Path,
    training: Training,
    settings: SasrecSettings,
    origin: dict[str, str],
    progress: Progress | None,
) -> Trained:
    texts_IF = None
    if settings.item_text != "none":
        texts_IF = item_vectors(training.dataset, settings.item_text_source)
    teacher = None
    if settings.distill.weight:
        teacher = soft_targets_of(
            training.dataset,
            training.trained_through,
            settings.distill,
            settings.text,
            exclude_history=training.exclude_history,
        )
    _drop_events_after(run / EVENTS, progress.last.epoch if progress else 0)
    with (run / EVENTS).open("a", encoding="utf-8", buffering=1) as file:

        def write(event: str, **fields: Any) -> None:
            line = {"time": round(time.time(), 3), "event": event, **fields}
            file.write(json.dumps(line, allow_nan=False) + "\n")

        def epoch_ended(epoch: Epoch, model: SASRec) -> None:
            fields = dataclasses.asdict(epoch)
            write("epoch", **{**fields.pop("scores"), **fields})
            if training.on_epoch is not None:
                training.on_epoch(epoch)

        def keep(progress: Progress) -> None:
            epochs = {"last": progress.last, "best": progress.best}
            texts = {name: json.dumps(dataclasses.asdict(epochs[name])) for name in epochs}
            _write(run / PROGRESS, progress.tensors, {**origin, **texts})

        write(
            "start",
            system=training.system,
            recipe=dataclasses.asdict(settings),
            trained_through=training.trained_through,
            exclude_history=training.exclude_history,
            resumed_from=progress.last.epoch if progress else None,
            threads=torch.get_num_threads(),
            git=git_commit(),
            versions=versions(),
        )
        trained = train(
            training.dataset.sequences,
            settings,
            exclude_history=training.exclude_history,
            trained_through=training.trained_through,
            texts_IF=texts_IF,
            teacher=teacher,
            on_epoch=epoch_ended,
            on_progress=keep,
            progress=progress,
        )
        write(
            "end",
            status="finished",
            seconds=trained.last.seconds,
            best_epoch=trained.best.epoch,
            parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
            **{f"best_{name}": value for name, value in trained.best.scores.items()},
        )
    return trained


def _soft_text(settings: SasrecSettings, dataset: Dataset) -> bool:
    """Whether soft targets compare texts."""
    return bool(
        settings.distill.weight and settings.text != "none" and dataset.descriptions is not None
    )


def _drop_events_after(path: Path, epoch: int) -> None:
    """Epochs whose weights were lost are trained and written again. Of a training that starts anew
    nothing is kept."""
    exists = epoch and path.is_file()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if exists else []

    def is_kept(line: str) -> bool:
        if not line.endswith("\n"):  # torn
            return False
        event = parse_object(line, str(path))
        of_epochs = event.get("event") == "epoch" and event["epoch"] <= epoch
        return of_epochs or event.get("event") == "start"

    # What follows an epoch that was lost has been lost with it.
    write_text(path, "".join(itertools.takewhile(is_kept, lines)))


def _save(run: Path, origin: dict[str, str], trained: Trained) -> None:
    """The vectors first: where the weights exist, the run is finished."""
    metadata = {**origin, "best_epoch": str(trained.best.epoch)}
    vectors_Id = trained.model.item_embedding.weight.detach().float().contiguous()
    _write(run / VECTORS, {"item_vectors": vectors_Id}, metadata)
    _write(run / WEIGHTS, dict(trained.model.state_dict()), metadata)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
