"""What a person sees while a run goes: a bar in a terminal, plain lines elsewhere; and the meter behind its figures."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from genrec_dist.batch import Batch
from genrec_dist.flops import flops
from genrec_dist.model import GenRecConfig
from genrec_dist.peak import Peak
from genrec_dist.work import Work

if TYPE_CHECKING:
    from genrec_dist.workshop import StageSteps

WORTH_SHOWING = 0.03
"""Share of padding or waiting from which the bar names it."""


class TrainingDisplay:
    """One bar a stage with loss, real tokens a second, the last validation and the time left."""

    def __init__(self, stages: list[StageSteps], step: int, active: bool = True):
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            disable=not active or not self.console.is_terminal,
        )
        self.active = active
        self.stages = {stage.name: stage for stage in stages}
        self.tasks: dict[str, TaskID] = {
            stage.name: self.progress.add_task(
                stage.name,
                total=stage.num_steps,
                completed=_clip(step - stage.first_step, stage),
                start=False,
                facts="",
            )
            for stage in stages
        }
        self.current = stages[0].name
        self.started: set[str] = set()
        self.facts = ""
        self.validation = ""

    def __enter__(self) -> TrainingDisplay:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def advance(self, name: str, step: int) -> None:
        if name not in self.started:
            self.started.add(name)
            self.progress.start_task(self.tasks[name])
        self.current = name
        self.progress.update(self.tasks[name], completed=step - self.stages[name].first_step)

    def show(self, loss: float, fields: dict[str, float]) -> None:
        """`fields`: what the meter has read."""
        self.facts = f"loss {loss:.3f}  {fields['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in fields:
            self.facts += f"  MFU {fields['mfu']:.0%}"
        # What costs time without need is shown where it does.
        for name, what in (("padding_share", "padding"), ("data_wait_share", "waiting")):
            if fields[name] > WORTH_SHOWING:
                self.facts += f"  {what} {fields[name]:.0%}"
        self.facts += f"  {fields['peak_memory_gib']:.1f} GiB"
        self._refresh()

    def show_validation(self, name: str, epoch: int, scores: dict[str, float]) -> None:
        self.validation = f"NDCG@10 {scores['NDCG@10']:.4f}"
        self._refresh()
        if self.active and not self.console.is_terminal:
            self.console.print(
                f"{name} epoch {epoch + 1}/{self.stages[name].stage.epochs}  {self.facts}  "
                f"validation loss {scores['loss']:.3f}  HR@10 {scores['HR@10']:.4f}  NDCG@10 {scores['NDCG@10']:.4f}",
                highlight=False,
            )

    def _refresh(self) -> None:
        self.progress.update(self.tasks[self.current], facts=f"{self.facts}  {self.validation}".rstrip())


def _clip(steps: int, stage: StageSteps) -> int:
    return min(max(steps, 0), stage.num_steps)


class Meter:
    """Real tokens, samples, operations, padding and waiting since the last reading."""

    def __init__(self, config: GenRecConfig, device: torch.device, peak: Peak | None):
        """`peak`: of one process's device, for the share of it that is reached."""
        self.config, self.device, self.peak = config, device, peak
        self.restart()

    def restart(self) -> None:
        self.tokens = self.slots = self.samples = 0
        self.work = Work()
        self.wait_seconds, self.started = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - start

    def count(self, batch: Batch) -> None:
        self.tokens += batch.num_tokens
        self.slots += batch.num_slots
        self.samples += batch.num_samples
        self.work += batch.work

    def read(self, num_processes: int) -> dict[str, float]:
        """Rates of the whole run (this rank's times the number of ranks, which take equal shares), then a fresh start.

        The step that was just logged has been waited for, so the seconds are those of the device. `mfu` is there where the
        device's peak is known.
        """
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
    """Most bytes this process has held so far: of the GPU's memory by tensors, of a CPU's by everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
