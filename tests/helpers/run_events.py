"""What a run has logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run directory, in their order; none where there is no file. Of a
    line that a kill has cut off, which the `start` of the resumed run follows, nothing is read."""
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        try:
            found.append(json.loads(line))
        except ValueError:
            if '"event": "start"' not in after:
                raise
    return [event for event in found if event["event"] == kind]
