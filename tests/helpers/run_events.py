"""What a run has logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run directory, in their order; none where there is no file."""
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]
