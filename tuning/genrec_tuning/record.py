"""The record of a sweep: its trials, their epochs and its finals, in small JSON files. They are the
truth about a sweep; Ray and Optuna are rebuilt from them."""

from __future__ import annotations

import dataclasses
import json
import math
import posixpath
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import fsspec
from genrec_shards.atomic import atomic_file
from genrec_shards.readers.documents import parse_object

from genrec_dist.report.run_files import is_number

FORMAT_VERSION = 1
TRIALS, RUNS, FINALS = "trials", "runs", "finals"
SWEEP_FILE, SPACE_FILE, FINALS_FILE = "sweep.json", "space.yaml", "finals.json"

Value: TypeAlias = bool | int | float | str | None
Status = Literal["running", "finished", "stopped", "failed", "interrupted"]
"""stopped: by the scheduler. interrupted: the sweep ended before the trial did; a resume continues
it, and a `running` one whose driver is gone. failed: not to be tried again."""
DONE: frozenset[Status] = frozenset(("finished", "stopped", "failed"))

_JSON_NAMES = {"NDCG10": "NDCG@10", "HR10": "HR@10"}
"""Field -> key in JSON, where they differ."""


class _Record:
    """A dataclass that is kept as a JSON object."""

    def as_dict(self) -> dict[str, Any]:
        values = {_JSON_NAMES.get(key, key): value for key, value in vars(self).items()}
        if "epochs" in values:
            values["epochs"] = [epoch.as_dict() for epoch in values["epochs"]]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Keys that are no fields are passed over. Raises TypeError where one is missing."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        keys = {name: _JSON_NAMES.get(name, name) for name in names}
        return cls(**{name: values[key] for name, key in keys.items() if key in values})


@dataclass(frozen=True)
class Epoch(_Record):
    """One validation of a trial."""

    epoch: int
    """Epochs of the last stage (finetuning, where there is any) so far: counted from 1."""
    step: int
    """Global step before it."""
    NDCG10: float
    HR10: float
    loss: float
    """Of validation, per target token."""
    train_loss: float
    """Mean of the epoch's logged steps."""
    tokens_per_second: float
    """Real tokens, mean of the epoch's logged steps."""
    seconds: float
    """That the trial had run by then: all attempts, without the time between them."""


@dataclass(frozen=True)
class Trial(_Record):
    """One point of the space and what became of it."""

    id: str
    """`t0003`, in order of creation."""
    values: dict[str, Value]
    """Dotted recipe key -> sampled value; conditional keys only where they apply."""
    seed: int
    """Of its recipe."""
    status: Status
    reason: str | None = None
    """Why it failed, was interrupted, or was last tried again."""
    attempts: int = 0
    """Times it was started."""
    epochs: tuple[Epoch, ...] = ()
    planned_epochs: int = 0
    """Epochs in its recipe."""
    run: str = ""
    """Its run directory, relative to the sweep's."""

    @property
    def number(self) -> int:
        return int(self.id.removeprefix("t"))

    @property
    def best(self) -> Epoch | None:
        """Its epoch of the highest NDCG@10, of equal ones the first, which is the one in `best/`;
        None without one that is a number."""
        scored = [epoch for epoch in self.epochs if is_number(epoch.NDCG10)]
        return max(scored, key=lambda epoch: epoch.NDCG10, default=None)

    @property
    def last_epoch(self) -> int:
        """Epochs of the last stage that it has run and validated."""
        return max((epoch.epoch for epoch in self.epochs), default=0)

    def with_epoch(self, epoch: Epoch) -> Trial:
        """The trial with this validation too; one that it has already stays as it was."""
        known = {one.epoch: one for one in (epoch, *self.epochs)}
        return dataclasses.replace(self, epochs=tuple(known[number] for number in sorted(known)))


@dataclass(frozen=True)
class Final(_Record):
    """One run of the finals: a trial's values, or the base recipe, with one seed, to the last
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
    """HR@5, NDCG@5, HR@10 and NDCG@10 on test, of the winner and the base alone."""

    @property
    def name(self) -> str:
        return f"{self.system}/seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as far as it has come."""

    name: str
    space: dict[str, Any]
    """The space file, resolved: see `space.Space.as_dict`."""
    trials: tuple[Trial, ...] = ()
    """By id."""
    started: float = 0.0
    """Seconds since 1970."""
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
        trials = {one.id: one for one in (*self.trials, trial)}
        return dataclasses.replace(self, trials=tuple(trials[id_] for id_ in sorted(trials)))

    @property
    def ranked(self) -> list[Trial]:
        """Trials that finished or were stopped with a score, by NDCG@10 on validation; of equals
        the first."""
        scored = [
            (-trial.best.NDCG10, trial.id, trial)
            for trial in self.trials
            if trial.status in ("finished", "stopped") and trial.best
        ]
        return [trial for *_, trial in sorted(scored)]

    @property
    def best(self) -> Trial | None:
        """The first of `ranked`."""
        return next(iter(self.ranked), None)

    @property
    def keys(self) -> dict[str, list[tuple[str, Any]]]:
        """Keys that the sweep varies, in the order of its space, those that only trials have last;
        each with its domains, one per branch: `("loguniform", [3e-4, 1e-2])`."""
        found: dict[str, list[tuple[str, Any]]] = {}

        def visit(domains: Any) -> None:
            for key, domain in domains.items() if isinstance(domains, Mapping) else ():
                if isinstance(domain, Mapping) and len(domain) == 1:
                    ((kind, given),) = domain.items()
                    found.setdefault(str(key), []).append((str(kind), given))
                    for branch in given.values() if isinstance(given, Mapping) else ():
                        visit(branch)

        visit(self.space.get("space"))
        for trial in self.trials:
            for key in trial.values:
                found.setdefault(key, [])
        return found


def trial_id(number: int) -> str:
    return f"t{number:04d}"


def show_value(value: Value) -> str:
    """A value as a person writes it into a recipe: 3e-4, 0.05, 12, true, last-biased."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str | int) or not math.isfinite(value):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


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
        """The path of a file in it, as `files` takes it."""
        return posixpath.join(self.path, name)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file or none: it is renamed into place here, and put in one request
        elsewhere, which is whole on object stores."""
        content = content.encode("utf-8") if isinstance(content, str) else content
        if self.is_local:
            with atomic_file(self.place(name)) as temporary:
                temporary.write_bytes(content)
        else:
            self.files.makedirs(posixpath.dirname(self.place(name)), exist_ok=True)
            self.files.pipe_file(self.place(name), content)

    def holds(self, name: str) -> bool:
        return bool(self.files.exists(self.place(name)))

    def remove(self, *names: str) -> None:
        """Remove subfolders, as far as they are there."""
        for name in names:
            if self.is_local:  # a process that still writes there is no error
                shutil.rmtree(self.place(name), ignore_errors=True)
            elif self.holds(name):
                self.files.rm(self.place(name), recursive=True)


@dataclass
class Recorder:
    """Writes the record of a sweep; only the driver has one."""

    folder: Folder
    sweep: Sweep = field(default_factory=lambda: Sweep("", {}))

    def put(self, trial: Trial) -> None:
        """Write one trial's file."""
        self.sweep = self.sweep.with_trial(trial)
        self._write(f"{TRIALS}/{trial.id}.json", trial.as_dict())

    def interrupt(self, reason: str) -> None:
        """Note that nobody works any longer on trials that ran; a resume continues them."""
        for trial in self.sweep.trials:
            if trial.status == "running":
                self.put(dataclasses.replace(trial, status="interrupted", reason=reason))

    def put_facts(self, **changes: Any) -> None:
        """Change what `sweep.json` holds (`started`, `hours`, `resumed`), and write it."""
        self.sweep = dataclasses.replace(self.sweep, **changes)
        keys = ("name", "started", "hours", "resumed", "space")
        facts = {key: getattr(self.sweep, key) for key in keys}
        self._write(SWEEP_FILE, {"format_version": FORMAT_VERSION, **facts})

    def put_finals(self, **changes: Any) -> None:
        """Change `finals`, `winner` or `comparison`, and write `finals.json`."""
        self.sweep = dataclasses.replace(self.sweep, **changes)
        facts = {
            "format_version": FORMAT_VERSION,
            "finals": [final.as_dict() for final in self.sweep.finals],
            "winner": self.sweep.winner,
            "comparison": self.sweep.comparison,
        }
        self._write(FINALS_FILE, facts)

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self.folder.write(name, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_sweep(directory: str | Path) -> Sweep:
    """The record of a sweep. `directory`: here, or an address that fsspec knows. Raises ValueError
    where it holds no sweep, or a file is damaged; names the file."""
    folder = Folder(directory)
    if not folder.holds(SWEEP_FILE):
        raise ValueError(f"{directory}: no {SWEEP_FILE} in it: is it a directory of genrec tune?")
    folder.files.invalidate_cache(folder.place(TRIALS))
    paths = folder.files.ls(folder.place(TRIALS), detail=False) if folder.holds(TRIALS) else []
    names = sorted(posixpath.basename(path) for path in paths)
    trials = []
    for name in names:
        if name.endswith(".json") and not name.startswith("."):
            trial = _read(folder, f"{TRIALS}/{name}", _trial)
            if name != f"{trial.id}.json":
                place = folder.place(f"{TRIALS}/{name}")
                raise ValueError(
                    f"{place}: it is about trial {trial.id}; give the file its own name back"
                )
            trials.append(trial)
    known = ("name", "space", "started", "hours", "resumed")
    facts = _read(folder, SWEEP_FILE, lambda values: {key: values[key] for key in known})
    if folder.holds(FINALS_FILE):
        facts |= _read(folder, FINALS_FILE, _finals)
    return Sweep(**facts, trials=tuple(trials))


def _trial(values: dict[str, Any]) -> Trial:
    epochs = tuple(Epoch.from_dict(epoch) for epoch in values["epochs"])
    return Trial.from_dict({**values, "epochs": epochs})


def _finals(values: dict[str, Any]) -> dict[str, Any]:
    finals = tuple(Final.from_dict(final) for final in values["finals"])
    return {"finals": finals, "winner": values["winner"], "comparison": values["comparison"]}


def _read(folder: Folder, name: str, parse: Any) -> Any:
    """What `parse` makes of a file's JSON object."""
    place = folder.place(name)
    remedy = "remove it to run this trial anew" if name.startswith(TRIALS) else ""
    values = parse_object(folder.files.cat_file(place), place, "a record of a sweep", remedy)
    try:
        if (version := values.pop("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
            problem = f"format {version}, this version reads {FORMAT_VERSION}"
        else:
            return parse(values)
    except KeyError as error:
        problem = f"damaged ({error} is missing)"
    except (ValueError, TypeError, AttributeError) as error:
        problem = f"damaged ({error})"
    raise ValueError(f"{place}: {problem}" + (f"; {remedy}" if remedy else ""))
