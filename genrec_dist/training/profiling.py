"""The speed of training: rates per step, and a trace of a few steps that Perfetto
(ui.perfetto.dev) or chrome://tracing opens."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from genrec_shards.atomic import atomic_file
from torch.profiler import ProfilerActivity, profile, schedule

from genrec_dist.data.batch import Batch, Work
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.hardware import Peak
from genrec_dist.model.causal.kinds import AnyConfig

WARM_UP = 2
"""Steps that are not recorded first: they allocate what the others use again."""


class Trace(AbstractContextManager["Trace"]):
    """Records `steps` steps of this rank into `trace-rank-R.json.gz` of the run; 0 records
    nothing."""

    def __init__(self, run: Path, rank: int, steps: int, device: torch.device):
        self.path, self.profiler = run / f"trace-rank-{rank}.json.gz", None
        if steps:
            activities = [ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Trace:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
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


class Meter:
    """Real tokens, samples, operations, padding and waiting since the last reading."""

    def __init__(self, config: AnyConfig, device: torch.device, peak: Peak | None):
        """`peak`: of one process's device, for the share of it that is reached (`mfu`)."""
        self.config, self.device, self.peak = config, device, peak
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, and start the clock again."""
        self.tokens = self.slots = self.samples = 0
        self.work = Work()
        self.wait_seconds, self.started = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of waiting for data."""
        start = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - start

    def count(self, batch: Batch) -> None:
        """Count a micro-batch that was trained on."""
        self.tokens += batch.num_tokens
        self.slots += batch.num_slots
        self.samples += batch.num_samples
        self.work += batch.work

    def read(self, num_processes: int) -> dict[str, float]:
        """Rates of the whole run since the last reading: this rank's times the number of ranks,
        since all take equal shares. `mfu` is among them where the device's peak is known.

        The loop has waited for the step that it logs, so the seconds are those of the device."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        rate = flops(self.config, self.work) / seconds
        fields = {
            "tokens_per_second": self.tokens * num_processes / seconds,
            "samples_per_second": self.samples * num_processes / seconds,
            "tflops_per_second": rate * num_processes / 1e12,
            "padding_share": 1 - self.tokens / max(self.slots, 1),
            "data_wait_share": self.wait_seconds / seconds,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.peak is not None:
            fields["mfu"] = rate / self.peak.flops
        self.restart()
        return fields


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: tensors in the GPU's memory, or on a CPU
    everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
