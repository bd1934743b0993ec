"""What a person sees while a run goes: a bar in a terminal, plain lines elsewhere; and the meter behind its figures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from genrec_dist.batch import Batch

if TYPE_CHECKING:
    from genrec_dist.workshop import StageSteps


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

    def show(self, loss: float, tokens_per_second: float) -> None:
        self.facts = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
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


@dataclass
class Meter:
    """Real tokens, samples, padding and waiting since the last reading."""

    tokens: int = 0
    slots: int = 0
    samples: int = 0
    wait_seconds: float = 0.0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.tokens = self.slots = self.samples = 0
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

    def read(self, num_processes: int) -> dict[str, float]:
        """Rates of the whole run (this rank's times the number of ranks, which take equal shares), then a fresh start."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        fields = {
            "tokens_per_second": self.tokens * num_processes / seconds,
            "samples_per_second": self.samples * num_processes / seconds,
            "padding_share": 1 - self.tokens / max(self.slots, 1),
            "data_wait_share": self.wait_seconds / seconds,
        }
        self.restart()
        return fields
