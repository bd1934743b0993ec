"""A trace of a few training steps, which Perfetto (ui.perfetto.dev) or chrome://tracing opens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from genrec_shards.atomic import atomic_file
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 2
"""Steps that are let pass before: the first ones prepare what the others use again."""


class Trace(AbstractContextManager["Trace"]):
    """Records `steps` steps of this rank into `trace-rank-R.json.gz` of the run; 0 records nothing."""

    def __init__(self, run: Path, rank: int, steps: int, device: torch.device):
        self.path, self.profiler = run / f"trace-rank-{rank}.json.gz", None
        if steps:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
            self.profiler = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Trace:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def step(self) -> None:
        """A step is over."""
        if self.profiler is not None:
            self.profiler.step()

    def _write(self, recorded: profile) -> None:
        with atomic_file(self.path) as temporary:
            # The exporter packs what ends in .gz.
            packed = temporary.with_name(temporary.name + ".gz")
            try:
                recorded.export_chrome_trace(str(packed))
                packed.replace(temporary)
            finally:
                packed.unlink(missing_ok=True)
