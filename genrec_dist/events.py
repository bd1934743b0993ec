"""What a run tells while it goes: `events.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class EventLog:
    """Appends one JSON object a line; numbers also go to TensorBoard. `active=False` (other ranks) writes nothing."""

    def __init__(self, run: Path, active: bool = True):
        self.active = active
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        self.file = (run / "events.jsonl").open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"))

    def write(self, event: str, **fields: Any) -> None:
        if not self.active:
            return
        line = {"time": round(time.time(), 3), "event": event, **fields}
        self.file.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        if event in ("step", "validation"):
            for name, value in fields.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event}/{name}", value, fields["step"])

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


def git_commit() -> str | None:
    """The commit of the code in use, with `+` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """Versions of what the numbers of a run depend on."""
    names = ("genrec-dist", "torch", "transformers", "tokenizers", "accelerate", "numpy", "deepspeed", "triton")
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
