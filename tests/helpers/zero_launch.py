"""DeepSpeed engines of every stage, launched as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from two_ranks import deepspeed_environment, start_each


def launch(jobs: list[dict[str, Any]], folder: Path, world: int) -> None:
    path = folder / f"jobs-{world}.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).parent / "zero_rank.py"
    done = start_each(
        [script, path], folder / f"logs-{world}", world, timeout=500, env=deepspeed_environment()
    )
    assert not any(rank.returncode for rank in done), done
