"""The events of a run: `events.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class EventLog:
    """Appends one JSON object per line; numbers of steps and validations also go to TensorBoard.
    `active=False` (other ranks) writes nothing."""

    def __init__(self, run: Path, active: bool = True):
        self.active = active
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        self.file = (run / "events.jsonl").open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"))

    def write(self, event: str, **fields: Any) -> None:
        """Append an event, with the time."""
        if not self.active:
            return
        line = {"time": round(time.time(), 3), "event": event, **fields}
        self.file.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        if event in ("step", "validation"):
            for name, value in fields.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event}/{name}", value, fields["step"])

    def close(self) -> None:
        """Flush and close both files."""
        if self.active:
            self.file.close()
            self.board.close()
