"""Hostile contents of files: damaged bytes, JSON of another shape, values that nobody means."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = "[" * 200_000
SCRIPT = "<script>alert(1)</script>"
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 3.5, 1e308, -(10**9), 10**9, 10**30, float("nan"), float("inf"),
    "", " ", "7", "nan", "None", "x" * 100_000, "\x00", "\ud800", "\x1b[31mred", "../../etc/passwd",
    "/etc/passwd", ".", "foo\nbar", "日本", SCRIPT, "__import__('os').system('touch canary')",
    [], {}, [[]], [None], {"a": 1}, ["x"] * 1000,
]  # fmt: skip
TEXTS = [
    b"", b"\x00" * 64, b"null", b"[]", b"7", b'"text"', b"{", b"{}", b"\xff\xfe{\x00}\x00", b"NaN",
    DEEP.encode(), b'{"a":' * 100_000, b"9" * 6000, b'"\\ud800"', b"\xef\xbb\xbf{}", b"\xff" * 40,
    b'{"a": 1, "a": 2}', b"\x80\x04\x95", b"PK\x03\x04", b"x" * 1_000_000,
]  # fmt: skip


def shown(value: object) -> str:
    """A value as a note of an attack has it."""
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"


def damaged(data: bytes, dice: random.Random) -> tuple[bytes, str]:
    """`data` torn, flipped, spliced or replaced, and in words what was done."""
    at = dice.randrange(len(data)) if data else 0
    end = min(len(data), at + dice.choice([1, 4, 50, 1000]))
    noise = dice.choice([b"\x00" * 9, b"\xff" * 3, b"\n", b'"', b"[" * 3000, dice.randbytes(30)])
    flipped = bytes([data[at] ^ 1 << dice.randrange(8)]) if data else b""
    return dice.choice(
        [
            (data[:at], f"cut at byte {at} of {len(data)}"),
            (data[:at] + flipped + data[at + 1 :], f"one bit of byte {at} flipped"),
            (data[:at] + flipped + data[at + 1 :], f"one bit of byte {at} flipped"),
            (data[:at] + data[end:], f"bytes {at} to {end} left out"),
            (data[:at] + noise + data[at:], f"{len(noise)} bytes put in at {at}"),
            (data[:at] + bytes(end - at) + data[end:], f"bytes {at} to {end} zero"),
            (data[:end] + data[at:], f"bytes {at} to {end} twice"),
            (data + noise, f"{len(noise)} bytes at the end"),
            (dice.choice(TEXTS), "replaced as a whole"),
        ]
    )


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def changed_tree(tree: Any, dice: random.Random) -> tuple[Any, str]:
    """A JSON object or list with one value replaced, left out or added."""
    tree = copy.deepcopy(tree)
    container, key = dice.choice(places(tree))
    how = dice.randrange(8)
    if how == 0:
        del container[key]
        return tree, f"{key} left out"
    if how == 1 and isinstance(container, dict):
        container["more"] = dice.choice(VALUES)
        return tree, "a key added"
    if how == 2 and isinstance(container[key], int | float):
        container[key] = container[key] * 2 + 1
    elif how == 3 and isinstance(container[key], str):
        container[key] = container[key][::-1] + "x"
    else:
        container[key] = dice.choice(VALUES)
    return tree, f"{key} = {shown(container[key])}"


def damaged_json(data: bytes, dice: random.Random) -> tuple[bytes, str]:
    """A JSON file whose text is damaged, or, more often, one of its values."""
    if dice.random() < 0.25:
        return damaged(data, dice)
    tree, what = changed_tree(json.loads(data), dice)
    return json.dumps(tree).encode(), what


def damaged_lines(data: bytes, dice: random.Random) -> tuple[bytes, str]:
    """As `damaged_json`, of a file with a JSON object on each line."""
    lines = data.splitlines()
    at = dice.randrange(len(lines))
    lines[at], what = damaged_json(lines[at], dice)
    return b"\n".join(lines), f"line {at + 1}: {what}"
