"""Damage to a file, drawn by hypothesis: a few bytes changed, the end perhaps cut off."""

from pathlib import Path

from hypothesis import strategies as st


def damaged(whole: bytes, path: Path, data: st.DataObject) -> Path:
    """`path`, now holding `whole` with up to three bytes changed and, half the time, without its
    end."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole))) if data.draw(st.booleans()) else len(whole)
    path.write_bytes(changed[:end])
    return path
