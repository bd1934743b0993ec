"""Lines that Python wrote with `repr` and not as JSON, as in Amazon's releases of 2014: respelled
as JSON, never run.

`ast.literal_eval` would read them too, but slowly, and on CPython 3.11 several threads must not
compile at once."""

import json
import re
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:[uU]?(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<name>True|False|None)\b"""
    r"""|(?P<number>[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)L?|(?P<sign>[{}\[\]():,]))""",
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_RESPELLED = {"True": "true", "False": "false", "None": "null", "(": "[", ")": "]"}
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": ""}


def parsed_line(line: str) -> Any:
    """What one line says in JSON or in Python's spelling of it; None where it is neither."""
    for spelled in (lambda: line, lambda: _as_json(line)):
        try:
            return json.loads(spelled())
        except (ValueError, RecursionError):
            continue
    return None


def _as_json(line: str) -> str:
    """The line respelled as JSON. Raises ValueError where a token of it is no literal."""
    parts = []
    at, end = 0, len(line.rstrip())
    while at < end:
        token = _TOKEN.match(line, at)
        if token is None:
            raise ValueError(f"no literal at {at}")
        kind, text = token.lastgroup, token.group(token.lastgroup or 0)
        if kind == "text":
            text = json.dumps(_ESCAPE.sub(_unescaped, text[1:-1]))
        elif kind == "number":
            text = text.removeprefix("+")
            text += "0" * text.endswith(".")
        else:
            text = _RESPELLED.get(text, text)
        parts.append(text)
        at = token.end()
    return "".join(parts)


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code or found[4]:
        number = int(code, 16) if code else int(found[4], 8)
        return chr(number) if number < 0x110000 else found[0]
    return _LETTERS.get(found[5], found[5] if found[5] in "\\'\"" else found[0])
