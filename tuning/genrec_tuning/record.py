"""The record of a sweep: its trials, their epochs and its finals, in small JSON files that are the
truth about it."""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import fsspec
from genrec_shards.atomic import atomic_file

from genrec_dist.report.run_files import is_number

FORMAT_VERSION = 1
TRIALS, RUNS, FINALS = "trials", "runs", "finals"
SWEEP_FILE, SPACE_FILE, FINALS_FILE = "sweep.json", "space.yaml", "finals.json"

Value: TypeAlias = bool | int | float | str | None
Status = Literal["running", "finished", "stopped", "failed", "interrupted"]
"""stopped: by the scheduler. interrupted: the sweep ended before the trial did, which a resume
continues; so does it with `running` ones, whose driver is gone. failed: not to be tried again."""
DONE: frozenset[Status] = frozenset(("finished", "stopped", "failed"))

_NAMES = {"NDCG10": "NDCG@10", "HR10": "HR@10"}
"""Field -> key in JSON, where they differ."""


@dataclass(frozen=True)
class Epoch:
    """One validation of a trial."""

    epoch: int
    """Epochs of the last stage (finetuning, where there is any) so far: counted from 1."""
    step: int
    """Global step it follows."""
    NDCG10: float
    HR10: float
    loss: float
    """Of validation, a target token."""
    train_loss: float
    """Mean of the epoch's logged steps."""
    tokens_per_second: float
    """Real tokens, mean of the epoch's logged steps."""
    seconds: float
    """That the trial has run until then, its attempts summed; what lies between two of them does
    not count."""

    def as_dict(self) -> dict[str, Any]:
        return {_NAMES.get(key, key): value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Epoch:
        """Keys that are not an epoch's are passed over. Raises KeyError for one that is missing."""
        return cls(**{f.name: values[_NAMES.get(f.name, f.name)] for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Trial:
    """One point of the space and what became of it."""

    id: str
    """`t0003`, in order of creation."""
    values: dict[str, Value]
    """Dotted recipe key -> value as sampled; conditional keys only where they apply."""
    seed: int
    """Of its recipe."""
    status: Status
    reason: str | None = None
    """Why it failed, was interrupted, or was last tried again."""
    attempts: int = 0
    """Times it was started."""
    epochs: tuple[Epoch, ...] = ()
    planned_epochs: int = 0
    """Epochs that its recipe asks for."""
    run: str = ""
    """Its run directory, relative to the sweep's."""

    @property
    def number(self) -> int:
        return int(self.id.removeprefix("t"))

    @property
    def best(self) -> Epoch | None:
        """Its epoch of the highest NDCG@10; of equal ones the first, which is the one that `best/`
        holds."""
        return max(self.epochs, key=lambda epoch: epoch.NDCG10, default=None)

    @property
    def best_NDCG10(self) -> float | None:
        return self.best.NDCG10 if self.best else None

    @property
    def best_epoch(self) -> int | None:
        return self.best.epoch if self.best else None

    def with_epoch(self, epoch: Epoch) -> Trial:
        """The trial with this validation too; one it has already is kept as it was."""
        known = {one.epoch: one for one in (epoch, *self.epochs)}
        return dataclasses.replace(self, epochs=tuple(known[number] for number in sorted(known)))

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "epochs": [epoch.as_dict() for epoch in self.epochs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """Raises KeyError or TypeError for an object that is no trial."""
        return cls(
            **{**values, "epochs": tuple(Epoch.from_dict(epoch) for epoch in values["epochs"])}
        )


def trial_id(number: int) -> str:
    return f"t{number:04d}"


@dataclass(frozen=True)
class Final:
    """One run of the finals: a trial's values, or the base recipe, with a seed, to the last
    epoch."""

    system: str
    """The trial's id, or `base`."""
    seed: int
    run: str
    """Relative to the sweep's directory: `finals/t0003/seed-1`."""
    status: Status
    NDCG10: float | None = None
    """Best on validation."""
    test: dict[str, float] | None = None
    """Metrics on test, of the winner and the base alone: HR@5, NDCG@5, HR@10, NDCG@10."""

    def as_dict(self) -> dict[str, Any]:
        return {_NAMES.get(key, key): value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Final:
        return cls(**{f.name: values[_NAMES.get(f.name, f.name)] for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Sweep:
    """A sweep as far as it has come."""

    name: str
    space: dict[str, Any]
    """The space file, resolved: see `space.Space.as_dict`."""
    trials: tuple[Trial, ...] = ()
    """By id."""
    started: float = 0.0
    """Seconds since the epoch."""
    hours: float = 0.0
    """That drivers have worked on it, summed."""
    resumed: int = 0
    """Times it was resumed."""
    finals: tuple[Final, ...] = ()
    winner: str | None = None
    """The trial with the highest mean NDCG@10 on validation over the finals' seeds."""
    comparison: dict[str, Any] | None = None
    """The winner against the base recipe on test, paired: what `genrec compare --json` writes."""

    def trial(self, id_: str) -> Trial | None:
        return next((trial for trial in self.trials if trial.id == id_), None)

    def with_trial(self, trial: Trial) -> Sweep:
        others = [one for one in self.trials if one.id != trial.id]
        return dataclasses.replace(
            self, trials=tuple(sorted([*others, trial], key=lambda one: one.id))
        )


class Folder:
    """A directory here or at an address that fsspec knows, and the small files in it."""

    def __init__(self, address: str | Path):
        """Raises ValueError for an address of a kind that fsspec does not know or that is not
        installed."""
        self.address = str(address)
        try:
            self.files, self.path = fsspec.core.url_to_fs(self.address)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.address}: {error}") from None
        self.is_local = "file" in self.files.protocol

    def __truediv__(self, name: str) -> Folder:
        return Folder(posixpath.join(self.address, name))

    def place(self, name: str) -> str:
        return posixpath.join(self.path, name)

    def write(self, name: str, content: str | bytes) -> None:
        """A whole file or none: renamed where the file system can, put in one request elsewhere (as
        object stores do)."""
        content = content.encode("utf-8") if isinstance(content, str) else content
        if self.is_local:
            with atomic_file(self.place(name)) as temporary:
                temporary.write_bytes(content)
        else:
            self.files.makedirs(posixpath.dirname(self.place(name)), exist_ok=True)
            self.files.pipe_file(self.place(name), content)

    def read(self, name: str) -> str:
        """Raises FileNotFoundError."""
        text: bytes = self.files.cat_file(self.place(name))
        return text.decode("utf-8")

    def holds(self, name: str) -> bool:
        return bool(self.files.exists(self.place(name)))

    def names(self, name: str, ending: str) -> list[str]:
        """Names of the files in a subfolder, sorted; none where it is missing."""
        self.files.invalidate_cache(self.place(name))
        if not self.holds(name):
            return []
        found = (
            posixpath.basename(path.rstrip("/"))
            for path in self.files.ls(self.place(name), detail=False)
        )
        return sorted(one for one in found if one.endswith(ending) and not one.startswith("."))


@dataclass
class Recorder:
    """Writes the record of a sweep; the driver holds the only one."""

    folder: Folder
    sweep: Sweep = field(default_factory=lambda: Sweep("", {}))

    def put(self, trial: Trial) -> None:
        """Write one trial's file."""
        self.sweep = self.sweep.with_trial(trial)
        self.folder.write(f"{TRIALS}/{trial.id}.json", _json(trial.as_dict()))

    def put_facts(self, **changes: Any) -> None:
        """Change what `sweep.json` holds (`started`, `hours`, `resumed`), and write it."""
        self.sweep = dataclasses.replace(self.sweep, **changes)
        facts = {
            key: getattr(self.sweep, key)
            for key in ("name", "started", "hours", "resumed", "space")
        }
        self.folder.write(SWEEP_FILE, _json({"format_version": FORMAT_VERSION, **facts}))

    def put_finals(self, **changes: Any) -> None:
        """Change `finals`, `winner` or `comparison`, and write `finals.json`."""
        self.sweep = dataclasses.replace(self.sweep, **changes)
        finals = [final.as_dict() for final in self.sweep.finals]
        facts = {"finals": finals, "winner": self.sweep.winner, "comparison": self.sweep.comparison}
        self.folder.write(FINALS_FILE, _json({"format_version": FORMAT_VERSION, **facts}))


def read_sweep(directory: str | Path) -> Sweep:
    """The record of a sweep: a directory, or an address that fsspec knows.

    Raises ValueError for a directory that holds no sweep, and naming the file that is damaged.
    """
    folder = Folder(directory)
    if not folder.holds(SWEEP_FILE):
        raise ValueError(f"{directory}: no {SWEEP_FILE} in it: is it a directory of genrec tune?")
    facts = _object(folder, SWEEP_FILE)
    trials = [_trial(folder, f"{TRIALS}/{name}") for name in folder.names(TRIALS, ".json")]
    try:
        sweep = Sweep(
            name=facts["name"],
            space=facts["space"],
            trials=tuple(trials),
            started=facts["started"],
            hours=facts["hours"],
            resumed=facts["resumed"],
        )
    except KeyError as error:
        raise ValueError(f"{folder.place(SWEEP_FILE)}: {error} is missing: it is damaged") from None
    return _with_finals(folder, sweep) if folder.holds(FINALS_FILE) else sweep


def _trial(folder: Folder, name: str) -> Trial:
    try:
        trial = Trial.from_dict(_object(folder, name))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder.place(name)}: damaged ({error}); remove it to run this trial anew"
        ) from None
    if name != f"{TRIALS}/{trial.id}.json":
        raise ValueError(
            f"{folder.place(name)}: it is about trial {trial.id}; give the file its own name back"
        )
    return trial


def _with_finals(folder: Folder, sweep: Sweep) -> Sweep:
    facts = _object(folder, FINALS_FILE)
    try:
        finals = tuple(Final.from_dict(final) for final in facts["finals"])
        return dataclasses.replace(
            sweep, finals=finals, winner=facts["winner"], comparison=facts["comparison"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder.place(FINALS_FILE)}: damaged ({error})") from None


def _object(folder: Folder, name: str) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(name))
    except ValueError as error:
        remedy = "; remove it to run this trial anew" if name.startswith(TRIALS) else ""
        raise ValueError(f"{folder.place(name)}: damaged ({error}){remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{folder.place(name)}: not a JSON object")
    version = found.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder.place(name)}: format {version}, this version reads {FORMAT_VERSION}"
        )
    return found


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def best_validation(trial: Trial) -> Epoch | None:
    """A trial's epoch of the highest NDCG@10; None without one that is a number."""
    return max(
        (epoch for epoch in trial.epochs if is_number(epoch.NDCG10)),
        key=lambda epoch: epoch.NDCG10,
        default=None,
    )


def epochs_spent(trial: Trial) -> int:
    """Epochs of the last stage that a trial has run, as far as they were validated."""
    return max((epoch.epoch for epoch in trial.epochs), default=0)


def best_trial(sweep: Sweep) -> Trial | None:
    """The trial of the highest NDCG@10 on validation of those finished or stopped by the scheduler;
    of equals the first."""
    scored = [
        (found.NDCG10, trial)
        for trial in sorted(sweep.trials, key=lambda trial: trial.id)
        if trial.status in ("finished", "stopped") and (found := best_validation(trial))
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None
