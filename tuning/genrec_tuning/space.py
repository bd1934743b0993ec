"""The space of a sweep: a YAML file, checked before anything starts, from which values are sampled
key by key."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import yaml
from genrec_shards.storage.remote import is_address

from genrec_dist.config.load import load_recipe, recipe_from
from genrec_dist.config.recipe import Recipe
from genrec_tuning.record import Value

Kind = Literal["uniform", "loguniform", "int", "logint", "choice"]
KINDS: tuple[Kind, ...] = ("uniform", "loguniform", "int", "logint", "choice")
MOST_CORNERS = 256
"""Above this many combinations of corners only each key's own corners are tried."""
_MAY_CHANGE = frozenset(("name", "trials", "keep", "retries", "resources_per_trial"))
"""Keys in which a resumed sweep may differ from what it was: they move no score."""


@dataclass(frozen=True)
class Domain:
    """What one key may be."""

    kind: Kind
    low: float = 0
    high: float = 0
    """Both inclusive."""
    under: dict[Value, dict[str, Domain]] = field(default_factory=dict)
    """Of a choice: value -> the keys that apply where it is chosen, and their domains."""

    @property
    def choices(self) -> tuple[Value, ...]:
        return tuple(self.under)

    @property
    def corners(self) -> tuple[Value, ...]:
        return self.choices if self.kind == "choice" else (self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """The form of the space file."""
        if self.kind != "choice":
            return {self.kind: [self.low, self.high]}
        if not any(self.under.values()):
            return {"choice": list(self.choices)}
        return {"choice": {value: as_dicts(domains) for value, domains in self.under.items()}}


def as_dicts(domains: Mapping[str, Domain]) -> dict[str, Any]:
    return {key: domain.as_dict() for key, domain in domains.items()}


class Suggest(Protocol):
    """What a sampler is asked: the interface of optuna's trials, of which this uses three
    methods."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value: ...


@dataclass(frozen=True)
class Resources:
    """What a trial is given."""

    cpu: float = 1
    gpu: float = 0
    processes: int = 1
    """Ranks of a trial; above 1 they are processes of their own, all on the node of the trial."""


@dataclass(frozen=True)
class Space:
    """A sweep as its file asks for it."""

    name: str
    """Of the file, without its ending."""
    base: str
    """The recipe that is varied, as the file names it."""
    recipe: dict[str, Any]
    """That recipe with `set` in it, resolved; paths are absolute."""
    set: dict[str, Value]
    """Dotted key -> what it is in all trials, the base's finals included."""
    space: dict[str, Domain]
    """Dotted key -> what it may be."""
    search: Literal["optuna", "random"] = "optuna"
    """optuna: its tree-structured Parzen estimator, which learns from finished trials."""
    scheduler: Literal["asha", "none"] = "asha"
    grace: int = 2
    """ASHA stops no trial before this epoch."""
    reduction: int = 3
    """At epochs grace, grace * reduction, ... ASHA lets one in so many go on."""
    trials: int = 16
    seed: int = 0
    """Of the sampling; the seed of training is the recipe's."""
    resources: Resources = field(default_factory=Resources)
    keep: int = 3
    """Finished trials, the best by validation, whose weights stay on the disk."""
    retries: int = 2
    """Times that a trial whose process dies is started again, from its own checkpoint."""

    def as_dict(self) -> dict[str, Any]:
        """What `sweep.json` and `space.yaml` hold; `recipe` is the resolved base, `space` as in the
        file."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "resources"
        }
        return {
            **values,
            "resources_per_trial": dataclasses.asdict(self.resources),
            "space": as_dicts(self.space),
        }

    def sample(self, trial: Suggest) -> dict[str, Value]:
        """Values of one trial, asked key by key: conditional keys only where they apply."""
        return dict(_sampled(self.space, trial, ""))

    def recipe_of(self, values: Mapping[str, Value], run: str) -> Recipe:
        return recipe_of(self.as_dict(), values, run)


def _sampled(
    domains: Mapping[str, Domain], trial: Suggest, branch: str
) -> Iterator[tuple[str, Value]]:
    for key, domain in domains.items():
        # Named by its branch: under another choice the key has another range and another meaning.
        name = f"{key}{branch}"
        value: Value
        if domain.kind in ("uniform", "loguniform"):
            value = trial.suggest_float(
                name, domain.low, domain.high, log=domain.kind == "loguniform"
            )
        elif domain.kind in ("int", "logint"):
            value = trial.suggest_int(
                name, int(domain.low), int(domain.high), log=domain.kind == "logint"
            )
        else:
            value = trial.suggest_categorical(name, domain.choices)
        yield key, value
        if domain.kind == "choice":
            yield from _sampled(domain.under[value], trial, f"{branch}@{value}")


def recipe_of(space: Mapping[str, Any], values: Mapping[str, Value], run: str) -> Recipe:
    """The whole recipe of a trial. `space`: `Space.as_dict()`, which is `Sweep.space` too;
    `values`: `Trial.values`.

    Raises ValueError naming the key for a value that the recipe refuses.
    """
    recipe = json.loads(json.dumps(space["recipe"]))
    return recipe_from(recipe, overrides_of({**values, "run": run}), str(space["name"]))


def overrides_of(values: Mapping[str, Value]) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def planned_epochs(recipe: Recipe) -> int:
    """Epochs of the last stage, which are the ones that are validated."""
    return recipe.finetune.epochs or recipe.pretrain.epochs


def load_space(source: str | Path, trials: int | None = None) -> Space:
    """Read a space file and try what it asks for on the recipe. `trials`: in place of the file's.

    Raises ValueError, one line naming the file and the key, for anything that could not be a sweep.
    """
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path}: no such space file; those of this project are in tuning/spaces")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a space file is a mapping: base, set, space, trials, ...")
    if trials is not None:
        values["trials"] = trials
    space = _space(values, path)
    _try(space, path)
    return space


_KEYS = ("base", "set", "search", "scheduler", "grace", "reduction", "trials", "seed", "resources_per_trial", "keep",
         "retries", "space")  # fmt: skip


def _space(values: dict[str, Any], path: Path) -> Space:
    unknown = sorted(set(map(str, values)) - set(_KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]}; known here: {', '.join(_KEYS)}")
    for key in ("base", "space"):
        if not values.get(key):
            raise ValueError(f"{path}: {key} is missing or empty")
    if not isinstance(values["base"], str):
        raise ValueError(
            f"{path}: base: {values['base']!r} is no recipe file and no shipped recipe's name"
        )
    fixed = _fixed(values.get("set") or {}, path)
    domains = _domains(values["space"], path, "space", set(fixed))
    return Space(
        name=path.stem,
        base=values["base"],
        recipe=_resolved(values["base"], fixed, path),
        set=fixed,
        space=domains,
        search=_one_of(values, "search", ("optuna", "random"), path),
        scheduler=_one_of(values, "scheduler", ("asha", "none"), path),
        grace=_whole(values, "grace", 2, 1, path),
        reduction=_whole(values, "reduction", 3, 2, path),
        trials=_whole(values, "trials", 16, 1, path),
        seed=_whole(values, "seed", 0, 0, path),
        resources=_resources(values.get("resources_per_trial") or {}, path),
        keep=_whole(values, "keep", 3, 1, path),
        retries=_whole(values, "retries", 2, 0, path),
    )


def _fixed(values: Any, path: Path) -> dict[str, Value]:
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError(
            f"{path}: set: write it as dotted keys and values, such as finetune.epochs: 6"
        )
    _refuse_places(values, path, "set")
    return {str(key): value for key, value in values.items()}


def _refuse_places(keys: Mapping[str, Any], path: Path, where: str) -> None:
    if "run" in keys:
        raise ValueError(
            f"{path}: {where}: run: each trial has a run directory of its own; give the sweep's as --out"
        )


def _resolved(base: str, fixed: Mapping[str, Value], path: Path) -> dict[str, Any]:
    """The base recipe as nested values, `set` in it, its paths good from any directory."""
    beside = path.parent / base
    source = beside if beside.is_file() else base
    for key, value in fixed.items():  # one by one, so that the key is named
        _recipe(source, {key: value}, f"{path}: set: {key}")
    recipe = _recipe(source, fixed, f"{path}: base: {base}")
    places: dict[str, Value] = {"data": str(Path(recipe.data).absolute())}
    if recipe.shards is not None and not is_address(recipe.shards):
        places["shards"] = str(Path(recipe.shards).absolute())
    recipe = _recipe(source, {**fixed, **places}, f"{path}: base: {base}")
    return cast(dict[str, Any], json.loads(json.dumps(recipe.as_dict())))


def _recipe(source: str | Path, values: Mapping[str, Value], where: str) -> Recipe:
    try:
        # A shipped recipe may lack what only a run knows; a sweep knows the run.
        return load_recipe(source, overrides_of({**values, "run": "runs/sweep"}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _domains(values: Any, path: Path, where: str, taken: set[str]) -> dict[str, Domain]:
    """Domains of a mapping of keys; `taken`: keys that have a value wherever these apply."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: {where}: {values!r} is no mapping of recipe keys to what they may be"
        )
    _refuse_places(values, path, where)
    keys = {str(key) for key in values}
    twice = sorted(keys & taken)
    if twice:
        what = "set and in space" if where == "space" else "a key above it, or set, and there"
        raise ValueError(f"{path}: {where}: {twice[0]} is in {what}: a key has one place")
    return {
        str(key): _domain(value, path, f"{where}: {key}", taken | keys)
        for key, value in values.items()
    }


def _domain(value: Any, path: Path, where: str, taken: set[str]) -> Domain:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise ValueError(
            f"{path}: {where}: {value!r} is not one of {', '.join(KINDS)} with what belongs to it"
        )
    kind, given = next(iter(value.items()))
    if kind == "choice":
        return _choice(given, path, where, taken)
    if not isinstance(given, list) or len(given) != 2:
        raise ValueError(f"{path}: {where}: {kind}: {given!r} is no list of lowest and highest")
    low, high = (_number(one, path, f"{where}: {kind}") for one in given)
    if kind in ("int", "logint"):
        if low != int(low) or high != int(high):
            raise ValueError(
                f"{path}: {where}: {kind}: {given!r} are no whole numbers; take uniform or loguniform"
            )
        low, high = int(low), int(high)
    if not low < high:
        raise ValueError(
            f"{path}: {where}: {kind}: {given!r}: the first has to be below the second"
        )
    if kind in ("loguniform", "logint") and low <= 0:
        raise ValueError(f"{path}: {where}: {kind}: {given!r}: a logarithm needs numbers above 0")
    return Domain(kind, low, high)


def _choice(given: Any, path: Path, where: str, taken: set[str]) -> Domain:
    if not isinstance(given, list | dict) or not given:
        raise ValueError(
            f"{path}: {where}: choice: {given!r}: nothing to choose from; give a list or a mapping"
        )
    for one in given:
        if not isinstance(one, bool | int | float | str | None):
            raise ValueError(f"{path}: {where}: choice: {one!r} is no single value")
    if len(set(given)) < len(given):
        raise ValueError(f"{path}: {where}: choice: {list(given)!r}: a value is there twice")
    branches = given if isinstance(given, dict) else dict.fromkeys(given)
    under = {
        value: _domains(inner or {}, path, f"{where}: {value}", taken) if inner is not None else {}
        for value, inner in branches.items()
    }
    return Domain("choice", under=under)


def _number(value: Any, path: Path, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{path}: {where}: {value!r} is no number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: {where}: {value!r} is no number")
    return value


def _one_of(values: dict[str, Any], key: str, known: tuple[str, ...], path: Path) -> Any:
    # YAML 1.1 has no word for none; `null` and leaving the value out mean it where it is known.
    value = values.get(key, known[0])
    value = "none" if value is None and "none" in known else value
    if value not in known:
        raise ValueError(f"{path}: {key}: {value!r} is none of {', '.join(known)}")
    return value


def _whole(
    values: Mapping[str, Any], key: str, default: int, least: int, path: Path, where: str = ""
) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{path}: {where}{key}: {value!r} is no whole number from {least} on")
    return value


def _resources(values: Any, path: Path) -> Resources:
    where = "resources_per_trial: "
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {where}{values!r} is no mapping of cpu, gpu, processes")
    unknown = sorted(set(map(str, values)) - {"cpu", "gpu", "processes"})
    if unknown:
        raise ValueError(
            f"{path}: {where}unknown key {unknown[0]}; known here: cpu, gpu, processes"
        )
    processes = _whole(values, "processes", 1, 1, path, where)
    cpu = _number(values.get("cpu", processes), path, f"{where}cpu")
    gpu = _number(values.get("gpu", 0), path, f"{where}gpu")
    if cpu <= 0 or gpu < 0:
        raise ValueError(f"{path}: {where}cpu has to be above 0 and gpu 0 or above")
    if gpu and processes > 1 and gpu != processes:
        raise ValueError(
            f"{path}: {where}gpu {gpu}, processes {processes}: each process takes one GPU"
        )
    return Resources(cpu, gpu, processes)


def _try(space: Space, path: Path) -> None:
    """Take the corners of every range and each choice to the recipe."""
    known = space.as_dict()
    for values in points(space.space):
        try:
            recipe_of(known, values, "runs/trial")
        except ValueError as error:
            key = _guilty(space, values, str(error))
            raise ValueError(
                f"{path}: space: {key}: {json.dumps(values.get(key))} is refused: {error}"
            ) from None


def _guilty(space: Space, values: Mapping[str, Value], message: str) -> str:
    """The sampled key that is refused: the one that the message names, else the last of the
    values."""
    named = [key for key in values if key in message or key.rpartition(".")[2] in message]
    return max(named, key=len, default=list(values)[-1])


def points(domains: Mapping[str, Domain]) -> Iterator[dict[str, Value]]:
    """Each key's corners and choices: all combinations where they are few, else one key at a time
    beside the others' first."""
    alone = {key: list(_alone(key, domain)) for key, domain in domains.items()}
    if math.prod(map(len, alone.values())) <= MOST_CORNERS:
        for chosen in itertools.product(*alone.values()):
            yield dict(itertools.chain.from_iterable(one.items() for one in chosen))
        return
    first = {key: found[0] for key, found in alone.items()}
    for key, found in alone.items():
        for one in found:
            yield dict(
                itertools.chain.from_iterable(part.items() for part in {**first, key: one}.values())
            )


def _alone(key: str, domain: Domain) -> Iterator[dict[str, Value]]:
    for corner in domain.corners:
        for below in points(domain.under.get(corner, {})):
            yield {key: corner, **below}


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any], source: str) -> None:
    """Raise ValueError naming the first key in which a sweep that is resumed would be another
    one."""
    for key, old, new in _differences(before, after, ""):
        if key.split(".")[0] not in _MAY_CHANGE:
            raise ValueError(
                f"{source}: {key} is {json.dumps(new)}, the sweep was begun with {json.dumps(old)}: "
                "undo the change, or begin another sweep with another --out"
            )


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        ours, theirs = ({str(k): v for k, v in one.items()} for one in (before, after))
        for name in dict.fromkeys([*ours, *theirs]):
            yield from _differences(
                ours.get(name), theirs.get(name), f"{key}.{name}" if key else name
            )
    elif json.dumps(before) != json.dumps(after):
        yield key, before, after
