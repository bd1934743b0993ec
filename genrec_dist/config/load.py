"""Reading a recipe: YAML and `--set` into the typed sections, and back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from genrec_shards.readers.documents import parse_yaml

from genrec_dist.config.recipe import AUTO, AUTO_KEYS, Recipe
from genrec_dist.config.shipped import shipped_folder
from genrec_dist.config.suggest import did_you_mean
from genrec_dist.config.validate import check_recipe

RENAMED_KEYS = {
    "begin_from": "init_from",
    "recompute": "activation_checkpointing",
    "tokens.certain": "tokens.forced",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.average": "optimizer.ema_decay",
}
"""Keys of a recipe by their old names, which are still read, and their names today."""

_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}

Section = TypeVar("Section")


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file, or by name from those shipped with the package.

    Args:
        source: a file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings (`--set`), the value in YAML.

    Raises:
        ValueError: naming the file and the key for anything that does not fit.
    """
    values, path = read_recipe(source)
    return recipe_from(values, overrides, str(path))


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in shipped_folder("genrec_dist", "recipes").glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: `source` itself, or that of a shipped recipe of this name. Raises
    ValueError where there is neither."""
    path = Path(source)
    if path.is_file():
        return path
    names = shipped_recipes()
    if str(source) in names:
        return shipped_folder("genrec_dist", "recipes") / f"{source}.yaml"
    suggestion = did_you_mean(str(source), names)
    raise ValueError(
        f"{source}: no such recipe file{suggestion or ';'} shipped recipes: {', '.join(names)}"
    )


def read_recipe(source: str | Path) -> tuple[dict[str, Any], Path]:
    """Keys and values as the file of a recipe has them, unchecked, and the file. Raises ValueError
    where there is no such recipe, or its file is no YAML mapping."""
    path = find_recipe(source)
    values = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return values, path


def recipe_from(
    values: dict[str, Any], overrides: list[str] | None = None, source: str = "recipe"
) -> Recipe:
    """A checked recipe of nested keys and values, as YAML has them; `overrides` change `values`.
    Raises ValueError naming `source` and the key for anything that does not fit."""
    use_current_keys(values, source)
    overridden = {override.partition("=")[0] for override in overrides or []}
    for old, new in RENAMED_KEYS.items():
        if {old, new} <= overridden:
            raise ValueError(f"--set {old}: the old name of {new}, which is set too: set one")
    recipe = section_from(Recipe, values, overrides, source)
    check_recipe(recipe, source)
    return recipe


def section_from(
    kind: type[Section],
    values: dict[str, Any],
    overrides: list[str] | None,
    source: str,
    more_keys: Sequence[str] = (),
) -> Section:
    """A dataclass of typed settings from keys and values; their limits are not checked.

    Args:
        kind: the dataclass.
        values: by key; `overrides` change them.
        overrides: `dotted.key=value` each.
        source: what messages begin with.
        more_keys: keys that the caller takes itself, which an unknown one may have meant.

    Raises:
        ValueError: naming `source` and the key for one that is unknown, missing or of another type.
    """
    for override in overrides or []:
        _set(values, override)
    if kind is Recipe:  # an override may have set a whole section
        use_current_keys(values, source)
    _refuse_unknown(kind, values, source, "", [*more_keys, *dotted_keys(kind)])
    if kind is not Recipe:
        section: Section = _build(kind, values, source, "")
        return section
    values, auto_keys = _without_auto(values)
    recipe: Recipe = _build(Recipe, values, source, "")
    return dataclasses.replace(recipe, auto_keys=auto_keys)  # type: ignore[return-value]


def _without_auto(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy with placeholders for the keys that are `auto`, and these keys."""
    values, found = copy.deepcopy(values), []
    for key, placeholder in AUTO_KEYS.items():
        *sections, last = key.split(".")
        section: Any = values
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(last) == AUTO:
            section[last] = placeholder
            found.append(key)
    return values, tuple(found)


def with_values(recipe: Recipe, changes: dict[str, Any], source: str = "recipe") -> Recipe:
    """The recipe with other values, by dotted key; they are checked. Raises ValueError as
    `recipe_from`."""
    values = recipe.as_dict()
    for key, value in changes.items():
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[name] = value
    return recipe_from(values, source=source)


def setting_types(kind: Any) -> dict[str, Any]:
    """The types of the keys of a dataclass of settings, by their names."""
    hints = get_type_hints(kind)
    hints.pop("auto_keys", None)
    return hints


def dotted_keys(kind: type) -> list[str]:
    """The keys of a dataclass of settings, those of its sections with the section before a dot."""
    keys = []
    for name, hint in setting_types(kind).items():
        inner = dotted_keys(hint) if dataclasses.is_dataclass(hint) else []  # type: ignore[arg-type]
        keys += [f"{name}.{key}" for key in inner] or [name]
    return keys


def _refuse_unknown(kind: Any, values: Any, source: str, prefix: str, known: Sequence[str]) -> None:
    """Raise ValueError for the first key that no field is named after; `known`: those of the whole
    recipe."""
    if not isinstance(values, dict):
        return
    hints = setting_types(kind)
    for name in sorted(set(map(str, values)) - set(hints)):
        key = f"{prefix}{name}"
        here = hints if prefix else dict.fromkeys(each.partition(".")[0] for each in known)
        suggestion = did_you_mean(key, known) or f"; known here: {', '.join(here)}"
        raise ValueError(f"{source}: unknown key {key}{suggestion}")
    for name, inner in values.items():
        if dataclasses.is_dataclass(hints[str(name)]):
            _refuse_unknown(hints[str(name)], inner, source, f"{prefix}{name}.", known)


def use_current_keys(values: dict[str, Any], source: str) -> None:
    """Give the keys of a nested recipe that have old names their names of today, in place. Raises
    ValueError naming `source` and the key where both names are given."""
    for old, new in RENAMED_KEYS.items():
        parent, _, old_name = old.rpartition(".")
        section = values.get(parent) if parent else values
        if not isinstance(section, dict) or old_name not in section:
            continue
        new_name = new.rpartition(".")[2]
        if new_name in section:
            raise ValueError(f"{source}: {old} is the old name of {new}: give one of them")
        section[new_name] = section.pop(old_name)


def with_later_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested recipe in which keys that it does not have stand at their defaults: what a
    training did before there were such keys."""

    def filled(given: Any, defaults: dict[str, Any]) -> dict[str, Any]:
        return defaults | {
            key: filled(value, defaults[key])
            if isinstance(value, dict) and isinstance(defaults.get(key), dict)
            else value
            for key, value in given.items()
        }

    return filled(values, Recipe("", "").as_dict())


def with_old_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested recipe with the old names: what checkpoints have always hashed."""
    renamed = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for old, new in RENAMED_KEYS.items():
        parent, _, new_name = new.rpartition(".")
        section = renamed[parent] if parent else renamed
        section[old.rpartition(".")[2]] = section.pop(new_name)
    if renamed["model"]["item_text"] == "none":  # as before the keys existed
        del renamed["model"]["item_text"], renamed["model"]["item_text_source"]
    for stage in (renamed["pretrain"], renamed["finetune"]):
        if stage["windows"] == "own":  # as before the key existed
            del stage["windows"]
        if not stage["distill"]["weight"]:
            del stage["distill"]
        if stage["epoch_fraction"] == 1:
            del stage["epoch_fraction"]
    if not renamed["model"]["item_output"]:
        del renamed["model"]["item_output"]
    if renamed["tokens"]["softmax"] == "vocabulary":
        del renamed["tokens"]["softmax"]
    if not renamed["prompt"]["template"]:  # as before the sections existed
        del renamed["prompt"], renamed["lora"]
    if renamed["model"]["architecture"] == "bart":
        renamed["model"] = {k: v for k, v in renamed["model"].items() if k != "architecture"}
    return renamed


def _set(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {override}: write it as dotted.key=value")
    *parents, last = RENAMED_KEYS.get(key, key).split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {parent} is a value, not a section")
    values[last] = parse_yaml(text, f"--set {override[:80]}", "put quotes around the value")


def _build(kind: Any, value: Any, source: str, key: str) -> Any:
    """`value` as `kind`, which is a dataclass, Literal, optional, tuple or scalar type."""
    where = f"{source}: {key}"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_section(kind, value, source, key)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, bool) and {"on", "off"} <= set(parts):  # as YAML 1.1 reads them
            value = "on" if value else "off"
        if value not in parts:
            suggestion = did_you_mean(str(value), map(str, parts))
            choices = ", ".join(map(str, parts))
            raise ValueError(f"{where}: {value!r} is none of {choices}{suggestion}")
        return value
    if origin in (types.UnionType, Union):
        if value is None and type(None) in parts:
            return None
        return _build(next(p for p in parts if p is not type(None)), value, source, key)
    if origin is tuple and parts[-1] is Ellipsis:  # one value is a list of one
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_build(parts[0], item, source, key) for item in items)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise ValueError(f"{where}: {value!r} is not a list of {len(parts)} values")
        pairs = zip(parts, value, strict=True)
        return tuple(_build(part, item, source, key) for part, item in pairs)
    if kind is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as text
            value = float(value)
        except ValueError:
            raise ValueError(f"{where}: {value!r} is not a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {value!r} is not {_IN_WORDS[kind]}")
    return value


def _build_section(kind: type, value: Any, source: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{source}: {key or 'recipe'}: {value!r} is not a section")
    hints, prefix = setting_types(kind), f"{key}." if key else ""
    built = {n: _build(hints[n], item, source, f"{prefix}{n}") for n, item in value.items()}
    for field in dataclasses.fields(kind):
        defaults = (field.default, field.default_factory)
        if field.name not in built and all(d is dataclasses.MISSING for d in defaults):
            missing = f"{prefix}{field.name}"
            raise ValueError(
                f"{source}: {missing} is missing; add it or pass --set {missing}=VALUE"
            )
    if kind is Recipe and "targets" not in value.get("pretrain", {"targets": ""}):
        # A pretraining section that names no targets means the mask strategy, as in the paper.
        built["pretrain"] = dataclasses.replace(built["pretrain"], targets="mask")
    return kind(**built)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    values = recipe.as_dict()
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    values["tracker"] = list(values["tracker"])
    return yaml.safe_dump(values, sort_keys=False)
