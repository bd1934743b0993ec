"""What a run has logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run directory, in their order; none where there is no file. Of a
    line that is being written or that a kill has cut off, which is the last one or has the `start` of
    the resumed run after it, nothing is read."""
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines) and '"event": "start"' not in lines[number]:
                raise
    return [event for event in found if event["event"] == kind]
