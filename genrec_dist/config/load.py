"""Reading a recipe: YAML and `--set` into the typed sections, and back."""

from __future__ import annotations

import dataclasses
import types
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from genrec_dist.config.recipe import Recipe
from genrec_dist.config.validate import check_recipe


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file, or by name from those shipped with the package.

    `overrides` are `dotted.key=value` strings (`--set`), the value in YAML.
    Raises ValueError naming the file and the key for anything that does not fit.
    """
    path = _find(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values")
    return recipe_from(values, overrides, str(path))


def recipe_from(
    values: dict[str, Any], overrides: list[str] | None = None, source: str = "recipe"
) -> Recipe:
    """A recipe of nested keys and values, as YAML has them; `overrides` change `values`.

    Raises ValueError naming `source` and the key for anything that does not fit.
    """
    for override in overrides or []:
        _set(values, override)
    recipe: Recipe = _build(Recipe, values, source, "")
    check_recipe(recipe, source)
    return recipe


Section = TypeVar("Section")


def section_from(
    kind: type[Section], values: dict[str, Any], overrides: list[str] | None, source: str
) -> Section:
    """Any dataclass of typed knobs from keys and values, as `recipe_from` makes a recipe; what
    values may be is not checked.

    Raises ValueError naming `source` and the key for one that is unknown, missing or of another
    type."""
    for override in overrides or []:
        _set(values, override)
    section: Section = _build(kind, values, source, "")
    return section


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("genrec_dist") / "recipes"))
    named = shipped / f"{source}.yaml"
    if named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ValueError(f"{source}: no such recipe file; shipped recipes: {names}")


def _set(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {override}: write it as dotted.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {parent} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: {text} is not YAML: put quotes around it") from None


def _build(kind: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_section(kind, value, source, key)
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(
            f"{source}: {key}: {value!r} is none of {', '.join(map(str, get_args(kind)))}"
        )
    if origin in (types.UnionType, Union):
        if value is None and type(None) in get_args(kind):
            return None
        inner = next(part for part in get_args(kind) if part is not type(None))
        return _build(inner, value, source, key)
    if origin is tuple:
        parts = get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise ValueError(f"{source}: {key}: {value!r} is not a list of {len(parts)} values")
        return tuple(
            _build(part, item, source, key) for part, item in zip(parts, value, strict=True)
        )
    return _scalar(kind, value, source, key)


def _scalar(kind: type, value: Any, source: str, key: str) -> Any:
    if kind is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as text
            value = float(value)
        except ValueError:
            raise ValueError(f"{source}: {key}: {value!r} is not a number") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{source}: {key}: {value!r} is not of type {kind.__name__}")
    return value


def _build_section(kind: type, value: Any, source: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{source}: {key or 'recipe'}: {value!r} is not a section")
    hints = get_type_hints(kind)
    unknown = sorted(set(map(str, value)) - set(hints))
    if unknown:
        where = f"{key}." if key else ""
        raise ValueError(
            f"{source}: unknown key {where}{unknown[0]}; known here: {', '.join(hints)}"
        )
    prefix = f"{key}." if key else ""
    built = {
        name: _build(hints[name], item, source, f"{prefix}{name}") for name, item in value.items()
    }
    defaults = {f.name: f for f in dataclasses.fields(kind)}
    missing = [
        name
        for name, f in defaults.items()
        if name not in built
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(
            f"{source}: {prefix}{missing[0]} is missing; add it or pass --set {prefix}{missing[0]}=VALUE"
        )
    if kind is Recipe and "targets" not in value.get("pretrain", {"targets": ""}):
        # A pretraining section that names no targets means the mask strategy, as in the paper.
        built["pretrain"] = dataclasses.replace(built["pretrain"], targets="mask")
    return kind(**built)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    values = recipe.as_dict()
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    return yaml.safe_dump(values, sort_keys=False)
