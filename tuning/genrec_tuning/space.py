"""The space of a sweep: a YAML file, checked before anything starts, from which values are drawn
key by key."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genrec_shards.readers.documents import parse_yaml
from genrec_shards.storage.address import is_address

from genrec_dist.config.load import load_recipe, recipe_from, use_current_keys
from genrec_dist.config.recipe import Recipe
from genrec_dist.config.shipped import find_shipped, shipped_folder
from genrec_tuning.record import Value

Kind = Literal["uniform", "loguniform", "int", "logint", "choice"]
KINDS: tuple[Kind, ...] = ("uniform", "loguniform", "int", "logint", "choice")
MOST_CORNERS = 256
"""Above this many combinations of corners only each key's own corners are tried."""
_MAY_CHANGE = frozenset(("name", "trials", "keep", "retries", "resources_per_trial"))
"""Keys in which a resumed sweep may differ from what it was: they do not affect scores."""
_LEAST = {"grace": 1, "reduction": 2, "trials": 1, "seed": 0, "keep": 1, "retries": 0}
"""Keys that hold whole numbers, with the least that each may be."""
_KEYS = ("base", "set", "search", "scheduler", *_LEAST, "resources_per_trial", "space")


@dataclass(frozen=True)
class Domain:
    """The values that one key may have."""

    kind: Kind
    low: float = 0
    high: float = 0
    """Both inclusive."""
    under: dict[Value, dict[str, Domain]] = field(default_factory=dict)
    """Of a choice: value -> the keys that apply where it is chosen, and their domains."""

    @property
    def corners(self) -> tuple[Value, ...]:
        """All choices, or the lowest and the highest value."""
        return tuple(self.under) if self.kind == "choice" else (self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """The form of the space file."""
        if self.kind != "choice":
            return {self.kind: [self.low, self.high]}
        if not any(self.under.values()):
            return {"choice": list(self.under)}
        return {"choice": {value: as_dicts(domains) for value, domains in self.under.items()}}


def as_dicts(domains: Mapping[str, Domain]) -> dict[str, Any]:
    """Domains in the form of the space file."""
    return {key: domain.as_dict() for key, domain in domains.items()}


@dataclass(frozen=True)
class Resources:
    """What a trial is given."""

    cpu: float = 1
    gpu: float = 0
    processes: int = 1
    """Ranks of a trial, all on one node; above 1 each is a process of its own."""


@dataclass(frozen=True)
class Space:
    """A sweep as its file describes it."""

    name: str
    """Of the file, without its ending."""
    base: str
    """The recipe that is varied, as the file names it."""
    recipe: dict[str, Any]
    """That recipe with `set` in it, resolved; paths are absolute."""
    set: dict[str, Value]
    """Dotted key -> its value in all trials, the base's finals included."""
    space: dict[str, Domain]
    """Dotted key -> its domain."""
    search: Literal["optuna", "random"] = "optuna"
    """optuna: its tree-structured Parzen estimator, which learns from finished trials."""
    scheduler: Literal["asha", "none"] = "asha"
    grace: int = 2
    """ASHA stops no trial before this epoch."""
    reduction: int = 3
    """At epochs grace, grace * reduction, ... ASHA lets one in so many go on."""
    trials: int = 16
    seed: int = 0
    """Of the search; the seed of training is the recipe's."""
    resources: Resources = field(default_factory=Resources)
    keep: int = 3
    """Finished trials, the best by validation, whose weights stay on the disk."""
    retries: int = 2
    """Times that a trial whose process dies is started again, from its own checkpoint."""

    def as_dict(self) -> dict[str, Any]:
        """What `sweep.json` and `space.yaml` hold: `recipe` is the resolved base, `space` as in the
        file."""
        values = {**vars(self), "resources_per_trial": dataclasses.asdict(self.resources)}
        del values["resources"]
        return {**values, "space": as_dicts(self.space)}

    def sample(self, draw: Callable[[str, Domain], Value]) -> dict[str, Value]:
        """Values of one trial, drawn key by key; conditional keys only where they apply.

        Args:
            draw: gives a value of a domain. It gets the name of the draw too, which is the key and
                the choices above it (`pretrain.mask.p@span`): under another choice a key has
                another range and another meaning.
        """

        def sampled(domains: Mapping[str, Domain], branch: str) -> Iterator[tuple[str, Value]]:
            for key, domain in domains.items():
                value = draw(f"{key}{branch}", domain)
                yield key, value
                yield from sampled(domain.under.get(value, {}), f"{branch}@{value}")

        return dict(sampled(self.space, ""))

    def recipe_of(self, values: Mapping[str, Value], run: str) -> Recipe:
        """See `recipe_of`."""
        return recipe_of(self.as_dict(), values, run)


def recipe_of(space: Mapping[str, Any], values: Mapping[str, Value], run: str) -> Recipe:
    """The whole recipe of a trial.

    Args:
        space: `Space.as_dict()`, which is `Sweep.space` too.
        values: `Trial.values`.
        run: the trial's run directory.

    Raises:
        ValueError: the recipe refuses a value; names the key.
    """
    recipe = json.loads(json.dumps(space["recipe"]))
    return recipe_from(recipe, _overrides({**values, "run": run}), str(space["name"]))


def _overrides(values: Mapping[str, Value]) -> list[str]:
    """Values as `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def planned_epochs(recipe: Recipe) -> int:
    """Epochs of the last stage, which are the ones that are validated."""
    return recipe.finetune.epochs or recipe.pretrain.epochs


def load_space(source: str | Path, trials: int | None = None) -> Space:
    """Read a space file and try the corners of its ranges on the recipe.

    Args:
        source: the file, or the name of a shipped one.
        trials: in place of the file's.

    Raises:
        ValueError: no sweep is possible; one line with the file and the key.
    """
    path = Path(source)
    if not path.is_file():
        path = find_shipped(shipped_folder("genrec_tuning", "spaces"), str(source), "space file")
    values = parse_yaml(path.read_bytes(), str(path))
    try:
        if not isinstance(values, dict):
            raise ValueError("a space file is a mapping: base, set, space, trials, ...")
        space = _parse(values if trials is None else {**values, "trials": trials}, path)
        _try_corners(space)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return space


def _parse(values: dict[Any, Any], path: Path) -> Space:
    _refuse_unknown(values, _KEYS)
    for key in ("base", "space"):
        if not values.get(key):
            raise ValueError(f"{key} is missing or empty")
    base, fixed = values["base"], values.get("set") or {}
    if not isinstance(base, str):
        raise ValueError(f"base: {base!r} is no recipe file and no shipped recipe's name")
    if not isinstance(fixed, dict) or any(isinstance(value, dict) for value in fixed.values()):
        raise ValueError("set: write it as dotted keys and values, such as finetune.epochs: 6")
    _refuse_run(fixed, "set")
    fixed = {str(key): value for key, value in fixed.items()}
    # YAML 1.1 has no word for none; an empty value means it too.
    scheduler = values.get("scheduler", "asha") or "none"
    return Space(
        name=path.stem,
        base=base,
        recipe=_resolved(base, fixed, path.parent),
        set=fixed,
        space=_domains(values["space"], "space", set(fixed)),
        search=_one_of(values.get("search", "optuna"), "search", ("optuna", "random")),
        scheduler=_one_of(scheduler, "scheduler", ("asha", "none")),
        resources=_resources(values.get("resources_per_trial") or {}),
        **{
            key: _whole(values.get(key, getattr(Space, key)), key, least)
            for key, least in _LEAST.items()
        },
    )


def _refuse_unknown(values: Mapping[Any, Any], known: tuple[str, ...], where: str = "") -> None:
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ValueError(f"{where}unknown key {unknown[0]}; known here: {', '.join(known)}")


def _refuse_run(keys: Mapping[Any, Any], where: str) -> None:
    if "run" in keys:
        raise ValueError(
            f"{where}: run: each trial has a run directory of its own; give the sweep's as --out"
        )


def _resolved(base: str, fixed: Mapping[str, Value], folder: Path) -> dict[str, Any]:
    """The base recipe as nested values with `set` in it; its paths hold from any directory."""
    source = folder / base if (folder / base).is_file() else base

    def load(values: Mapping[str, Value], where: str) -> Recipe:
        try:
            # A shipped recipe may lack what only a run knows; a sweep knows the run.
            return load_recipe(source, _overrides({**values, "run": "runs/sweep"}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    for key, value in fixed.items():  # one by one, so that the message names the key
        load({key: value}, f"set: {key}")
    recipe = load(fixed, f"base: {base}")
    paths: dict[str, Value] = {"data": str(Path(recipe.data).absolute())}
    if recipe.shards is not None and not is_address(recipe.shards):
        paths["shards"] = str(Path(recipe.shards).absolute())
    found: dict[str, Any] = json.loads(
        json.dumps(load({**fixed, **paths}, f"base: {base}").as_dict())
    )
    return found


def _domains(values: Any, where: str, taken: set[str]) -> dict[str, Domain]:
    """Domains of a mapping of keys; `taken`: keys that have a value wherever these apply."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r} is no mapping of recipe keys to what they may be")
    _refuse_run(values, where)
    keys = set(map(str, values))
    if twice := sorted(keys & taken):
        what = "set and in space" if where == "space" else "a key above it, or set, and there"
        raise ValueError(f"{where}: {twice[0]} is in {what}: a key has one place")
    return {
        str(key): _domain(value, f"{where}: {key}", taken | keys) for key, value in values.items()
    }


def _domain(value: Any, where: str, taken: set[str]) -> Domain:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise ValueError(
            f"{where}: {value!r} is not one of {', '.join(KINDS)} with what belongs to it"
        )
    kind, given = next(iter(value.items()))
    where = f"{where}: {kind}"
    if kind == "choice":
        return _choice(given, where, taken)
    if not isinstance(given, list) or len(given) != 2:
        raise ValueError(f"{where}: {given!r} is no list of lowest and highest")
    low, high = (_number(one, where) for one in given)
    if kind in ("int", "logint"):
        if low != int(low) or high != int(high):
            raise ValueError(f"{where}: {given!r} are no whole numbers; take uniform or loguniform")
        low, high = int(low), int(high)
    if not low < high:
        raise ValueError(f"{where}: {given!r}: the first has to be below the second")
    if kind in ("loguniform", "logint") and low <= 0:
        raise ValueError(f"{where}: {given!r}: a logarithm needs numbers above 0")
    return Domain(kind, low, high)


def _choice(given: Any, where: str, taken: set[str]) -> Domain:
    if not isinstance(given, list | dict) or not given:
        raise ValueError(f"{where}: {given!r}: nothing to choose from; give a list or a mapping")
    for one in given:
        if not isinstance(one, bool | int | float | str | None):
            raise ValueError(f"{where}: {one!r} is no single value")
    if len(set(given)) < len(given):
        raise ValueError(f"{where}: {list(given)!r}: a value is there twice")
    branches = given if isinstance(given, dict) else dict.fromkeys(given)
    above = where.removesuffix(": choice")
    under = {
        value: _domains(inner or {}, f"{above}: {value}", taken)
        for value, inner in branches.items()
    }
    return Domain("choice", under=under)


def _number(value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{where}: {value!r} is no number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {value!r} is no number")
    return value


def _one_of(value: Any, key: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{key}: {value!r} is none of {', '.join(known)}")
    return value


def _whole(value: Any, key: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}: {value!r} is no whole number from {least} on")
    return value


def _resources(values: Any) -> Resources:
    where = "resources_per_trial: "
    if not isinstance(values, dict):
        raise ValueError(f"{where}{values!r} is no mapping of cpu, gpu, processes")
    _refuse_unknown(values, ("cpu", "gpu", "processes"), where)
    processes = _whole(values.get("processes", 1), f"{where}processes", 1)
    cpu = _number(values.get("cpu", processes), f"{where}cpu")
    gpu = _number(values.get("gpu", 0), f"{where}gpu")
    if cpu <= 0 or gpu < 0:
        raise ValueError(f"{where}cpu has to be above 0 and gpu 0 or above")
    if gpu > 1 and gpu != int(gpu):
        raise ValueError(
            f"{where}gpu {gpu}: above 1 a trial takes whole GPUs; below, a part of one"
        )
    if gpu and processes > 1 and gpu != processes:
        raise ValueError(f"{where}gpu {gpu}, processes {processes}: each process takes one GPU")
    return Resources(cpu, gpu, processes)


def _try_corners(space: Space) -> None:
    """Refuse a space if the recipe refuses a corner of a range or one of its choices."""
    known = space.as_dict()
    for values in points(space.space):
        try:
            recipe_of(known, values, "runs/trial")
        except ValueError as error:
            # The key that the message names, else the last one.
            named = [key for key in values if key.rpartition(".")[2] in str(error)]
            key = max(named, key=len, default=list(values)[-1])
            raise ValueError(
                f"space: {key}: {json.dumps(values[key])} is refused: {error}"
            ) from None


def points(domains: Mapping[str, Domain]) -> Iterator[dict[str, Value]]:
    """The corners of a space: all combinations of each key's corners where they are few, else one
    key at a time beside the others' first."""
    alone = {
        key: [
            {key: corner, **below}
            for corner in domain.corners
            for below in points(domain.under.get(corner, {}))
        ]
        for key, domain in domains.items()
    }
    combinations: Iterator[Any] = itertools.product(*alone.values())
    if math.prod(map(len, alone.values())) > MOST_CORNERS:
        first = {key: found[0] for key, found in alone.items()}
        combinations = (
            {**first, key: one}.values() for key, found in alone.items() for one in found
        )
    for combination in combinations:
        yield {key: value for part in combination for key, value in part.items()}


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any], source: str) -> None:
    """Raise ValueError naming the first key whose change makes a resumed sweep another sweep.

    Args:
        before: `Space.as_dict()` with which the sweep was begun.
        after: that of its resume.
        source: the space file, for the message.
    """

    def changes(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            old, new = ({str(k): v for k, v in one.items()} for one in (before, after))
            for name in dict.fromkeys([*old, *new]):
                yield from changes(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        elif json.dumps(before) != json.dumps(after):
            yield key, before, after

    recipe = json.loads(json.dumps(before.get("recipe", {})))
    use_current_keys(recipe, source)  # a sweep of an earlier version has the old names
    for key, old, new in changes({**before, "recipe": recipe}, after, ""):
        if key.split(".")[0] not in _MAY_CHANGE:
            raise ValueError(
                f"{source}: {key} is {json.dumps(new)}, the sweep was begun with "
                f"{json.dumps(old)}: undo the change, or begin another sweep with another --out"
            )
