"""The display of a run's progress: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from genrec_dist.training.stages import StageSteps

WORTH_SHOWING = 0.03
"""Share of padding or waiting from which the bar shows it."""


class TrainingDisplay:
    """One bar per stage: loss, real tokens per second, the last validation and the time left."""

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
                completed=min(max(step - stage.first_step, 0), stage.num_steps),
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

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, name: str, step: int) -> None:
        """Move the bar of stage `name` to the global step `step`."""
        if name not in self.started:
            self.started.add(name)
            self.progress.start_task(self.tasks[name])
        self.current = name
        self.progress.update(self.tasks[name], completed=step - self.stages[name].first_step)

    def show(self, loss: float, fields: dict[str, float]) -> None:
        """Show the loss and rates; `fields` are those of `Meter.read`."""
        self.facts = f"loss {loss:.3f}  {fields['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in fields:
            self.facts += f"  MFU {fields['mfu']:.0%}"
        # Shown only where they cost a noticeable share of the time.
        for name, what in (("padding_share", "padding"), ("data_wait_share", "waiting")):
            if fields[name] > WORTH_SHOWING:
                self.facts += f"  {what} {fields[name]:.0%}"
        self.facts += f"  {fields['peak_memory_gib']:.1f} GiB"
        self._refresh()

    def show_validation(self, name: str, epoch: int, scores: dict[str, float]) -> None:
        """Show the scores of stage `name` after its epoch `epoch`, counted from 0."""
        self.validation = f"NDCG@10 {scores['NDCG@10']:.4f}"
        self._refresh()
        if self.active and not self.console.is_terminal:
            self.console.print(
                f"{name} epoch {epoch + 1}/{self.stages[name].stage.epochs}  {self.facts}  "
                f"validation loss {scores['loss']:.3f}  HR@10 {scores['HR@10']:.4f}  "
                f"NDCG@10 {scores['NDCG@10']:.4f}",
                highlight=False,
            )

    def _refresh(self) -> None:
        self.progress.update(
            self.tasks[self.current], facts=f"{self.facts}  {self.validation}".rstrip()
        )
