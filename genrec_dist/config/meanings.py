"""What each key of a recipe means: the docstrings of the schema's fields, read from its source."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from genrec_dist.config import recipe as schema
from genrec_dist.config.load import setting_types
from genrec_dist.config.recipe import AUTO, AUTO_KEYS, Recipe
from genrec_dist.config.validate import LIMITS

WIDTH = 100


@dataclass(frozen=True)
class Meaning:
    """What is known of one key."""

    text: str
    """The docstring of its field; of a section whose field has none, that of its class."""
    allowed: str
    """Values that it may have; "" where there is no more to say than that it is a number."""
    is_section: bool = False


def meanings() -> dict[str, Meaning]:
    """The meaning of each key of a recipe, by its dotted name, in the order of the schema."""
    return dict(_meanings(Recipe, "", _docstrings(Path(schema.__file__))))


def _meanings(
    kind: Any, prefix: str, docstrings: Mapping[str, str]
) -> Iterator[tuple[str, Meaning]]:
    for name, hint in setting_types(kind).items():
        text, key = docstrings.get(f"{kind.__name__}.{name}", ""), f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            section = docstrings[getattr(hint, "__name__", "")]
            yield key, Meaning(text or section, "", is_section=True)
            yield from _meanings(hint, f"{key}.", docstrings)
        else:
            allowed = [_allowed(hint, LIMITS[key][0] if key in LIMITS else "")]
            allowed += [AUTO] * (key in AUTO_KEYS)
            yield key, Meaning(text, ", ".join(filter(None, allowed)))


def _docstrings(source: Path) -> dict[str, str]:
    """The docstrings of classes, by name, and of their fields, as `Class.field`, on one line each.
    Python keeps none of a field: it is the string that follows the field in the source."""
    found = {}
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        found[node.name] = " ".join((ast.get_docstring(node) or "").split())
        for field, after in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[f"{node.name}.{field.target.id}"] = " ".join(str(after.value.value).split())
    return found


def _allowed(hint: Any, limit: str) -> str:
    """The values of a type in words: "mask, state", "true, false", "a name, null"."""
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (types.UnionType, Union):
        parts = [_allowed(part, limit) or "a name" for part in get_args(hint)]
        return ", ".join(parts)
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return f"{_allowed(get_args(hint)[0], limit)}, or a list of them"
    return {bool: "true, false", type(None): "null"}.get(hint, limit)


def annotated(recipe: Recipe, head: str = "") -> str:
    """A recipe as YAML that `load_recipe` reads, with the meaning of each key above it.

    Args:
        recipe: all of its keys are in the text.
        head: a comment for the first lines.
    """
    lines = [*_comment(head, ""), ""] if head else []
    values = recipe.as_dict()
    for key, meaning in meanings().items():
        value: Any = values
        for name in key.split("."):
            value = value[name]
        indent, name = "  " * key.count("."), key.rpartition(".")[2]
        if meaning.is_section:
            lines += ["", *_comment(meaning.text, indent), f"{indent}{name}:"]
            continue
        allowed = f" Allowed: {meaning.allowed}." if meaning.allowed else ""
        lines += [*_comment(meaning.text + allowed, indent), f"{indent}{name}: {_as_yaml(value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
    )


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("...").strip()
