"""The display of a run's progress: live lines in a terminal, one line per event elsewhere."""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from genrec_shards.cleaning.left_out import counted
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from genrec_dist.estimate.hardware import device_name
from genrec_dist.report.html import duration

if TYPE_CHECKING:
    from genrec_dist.training.setup import TrainingSetup
    from genrec_dist.training.stages import StageSteps

WORTH_SHOWING = 0.03
"""Share of padding or waiting from which it is shown."""
FORETOLD_STEPS, FORETOLD_SECONDS = 10, 10.0
"""After so many steps, or seconds of them, behind its first one a stage's time is foretold."""
LINE_SECONDS = 60.0
"""Longest silence off a terminal, up to the next `step` event."""
LONGEST_BAR, ROOM_FOR_FACTS = 24, 32


@dataclass(frozen=True)
class EpochReport:
    """A finished epoch: validated, and in a checkpoint that a run can be resumed from."""

    epoch: int
    """Of the last stage, counted from 1."""
    epochs: int
    """Of the stage."""
    step: int
    """Its last global step."""
    scores: dict[str, float]
    """`loss`, `HR@5`, `HR@10`, `NDCG@5`, `NDCG@10` on validation."""
    last: bool
    """Whether training has ended, also by early stopping."""


class TrainingDisplay:
    """One line per stage, with steps and time left, which are shown at any width, then the facts
    that fit: loss, real tokens per second, the last validation. What is said once stays above."""

    def __init__(
        self,
        stages: list[StageSteps],
        step: int,
        active: bool = True,
        console: Console | None = None,
    ):
        """`step`: the run's next one; `active=False` (other ranks) shows nothing."""
        self.console, self.active = console or Console(stderr=True), active
        self.lines = {s.name: StageLine(s, step, is_validated=s is stages[-1]) for s in stages}
        self.current = next((s.name for s in stages if step < s.end_step), stages[-1].name)
        self.work = "step"
        """What the run is doing; Ctrl-C waits for its end."""
        self.live: Live | None = None
        if active and self.console.is_terminal:
            self.live = Live(
                console=self.console, get_renderable=self._render, vertical_overflow="visible"
            )
        self.last_line = time.monotonic()

    def __enter__(self) -> TrainingDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def advance(self, name: str, step: int, seconds: float) -> None:
        """Move stage `name` to the global step `step`; the one before it took `seconds`."""
        self.current, line = name, self.lines[name]
        if line.advance(step, seconds):
            left = counted(line.stage.num_steps - line.done, "more step")
            more = ", without validation" * (line.is_validated and not line.validation_seconds)
            expected = f"about {duration(line.seconds_left)} for {left}"
            self.say([f"{name}: {expected}, by the first of them{more}"])

    def show(self, loss: float, fields: dict[str, float]) -> None:
        """Show the loss and rates; `fields` are those of `Meter.read`."""
        line = self.lines[self.current]
        line.loss = f"loss {loss:.3f}"
        line.rates = [f"{fields['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in fields:
            line.rates.append(f"MFU {fields['mfu']:.0%}")
        # Shown only where they cost a noticeable share of the time.
        for name, what in (("padding_share", "padding"), ("data_wait_share", "waiting")):
            if fields[name] > WORTH_SHOWING:
                line.rates.append(f"{what} {fields[name]:.0%}")
        line.rates.append(f"{fields['peak_memory_gib']:.1f} GiB")
        is_due = time.monotonic() - self.last_line >= LINE_SECONDS
        # After the last step of an epoch comes the epoch's own line.
        if self.live is None and is_due and line.done % line.stage.epoch_steps:
            self.say([self.current, line.steps, line.clock.strip(), *line.facts])

    def end_epoch(
        self, name: str, epoch: int, scores: dict[str, float] | None, seconds: float = 0.0
    ) -> None:
        """Say how an epoch of stage `name` ended.

        Args:
            name: of the stage.
            epoch: counted from 0.
            scores: of its validation, if there was one.
            seconds: that the validation took.
        """
        line, parts = self.lines[name], []
        if scores is not None:
            line.validation_seconds = seconds
            line.validation = f"NDCG@10 {scores['NDCG@10']:.4f}"
            parts = [line.validation, f"HR@10 {scores['HR@10']:.4f}"]
            parts.append(f"validation loss {scores['loss']:.3f}")
        title = f"{name} epoch {epoch + 1}/{line.stage.stage.epochs}"
        self.say([title, *parts, line.loss, *line.rates])

    def say(self, parts: list[str], wrap: bool = False) -> None:
        """Say a line that stays: whole off a terminal; in one, the parts that fit its width, or
        all of them on several lines (`wrap`)."""
        if not self.active:
            return
        self.last_line = time.monotonic()
        if self.live is not None and not wrap:
            parts = fitting(parts, self.console.width) or parts[:1]
        # A log file gets a line whatever its length.
        self.console.print(
            "  ".join(parts), highlight=False, markup=False, soft_wrap=self.live is None
        )

    def say_stopping(self, number: int) -> None:
        """Say what a signal will come to."""
        line = f"stopping after this {self.work}, then a checkpoint"
        again = "; again: end without one" * (number == signal.SIGINT)
        self.say([line + again], wrap=True)

    def _render(self) -> Group:
        options = self.console.options
        bar = "-" if options.ascii_only else "━"
        widest = max(len(line.steps) for line in self.lines.values())
        lines = [line.drawn(self.console.width, bar, widest) for line in self.lines.values()]
        if self.work != "step":
            lines.append(Text(f"in the {self.work}", style="dim"))
        return Group(*lines)


class StageLine:
    """What is shown of a stage."""

    def __init__(self, stage: StageSteps, step: int, is_validated: bool):
        self.stage, self.done = stage, min(max(step - stage.first_step, 0), stage.num_steps)
        self.is_validated, self.validation_seconds = is_validated, 0.0
        self.loss = self.validation = ""
        self.rates: list[str] = []
        self.num_timed, self.elapsed, self.is_foretold = 0, 0.0, False
        self.recent: deque[float] = deque(maxlen=100)
        """Seconds of the last steps."""

    def advance(self, step: int, seconds: float) -> bool:
        """Note a step; returns whether the stage's time can be foretold now, for the first time."""
        if self.num_timed == 1:
            self.recent.clear()  # the first step allocates what the others use again
        self.done = step - self.stage.first_step
        self.num_timed, self.elapsed = self.num_timed + 1, self.elapsed + seconds
        self.recent.append(seconds)
        is_enough = len(self.recent) >= FORETOLD_STEPS or sum(self.recent) >= FORETOLD_SECONDS
        now = not self.is_foretold and self.num_timed > 1 and is_enough
        self.is_foretold |= now
        return now and self.done < self.stage.num_steps

    @property
    def seconds_left(self) -> float:
        """By the last steps, and the last validation where there was one."""
        step_seconds = sum(self.recent) / max(len(self.recent), 1)
        epochs_left = self.stage.stage.epochs - self.done // self.stage.epoch_steps
        return (
            step_seconds * (self.stage.num_steps - self.done)
            + self.validation_seconds * epochs_left
        )

    @property
    def steps(self) -> str:
        """Steps done and all, always of the same width."""
        total = f"{self.stage.num_steps:,}"
        return f"{self.done:>{len(total)},}/{total}"

    @property
    def clock(self) -> str:
        """The time left, or of a stage that is over the time it took."""
        if self.done == self.stage.num_steps and self.num_timed:
            return f"in {clock(self.elapsed)}".rjust(12)
        return f"{clock(self.seconds_left):>7} left" if self.recent else " " * 12

    @property
    def facts(self) -> list[str]:
        """The rest, the most important ones first."""
        return [*filter(None, (self.loss, self.validation)), *self.rates]

    def drawn(self, width: int, bar: str, steps_width: int) -> Text:
        """The line, at most `width` wide where steps and time fit into it.

        Args:
            width: of the terminal.
            bar: a character of it.
            steps_width: room for `steps`, the same for all stages.
        """
        head, tail = f"{self.stage.name:<8}", f"{self.steps:>{steps_width}}  {self.clock}"
        room = width - len(head) - len(tail) - 4
        length = min(LONGEST_BAR, max(0, room - ROOM_FOR_FACTS))
        full = round(length * self.done / self.stage.num_steps)
        facts = fitting(self.facts, room - length)
        return Text.assemble(
            (head, "bold"),
            " ",
            (bar * full, "bar.complete"),
            (bar * (length - full), "bar.back"),
            " " * bool(length),
            (tail, "cyan"),
            "  " * bool(facts),
            "  ".join(facts),
            no_wrap=True,
            overflow="crop",
        )


def fitting(parts: list[str], width: int) -> list[str]:
    """The first parts that fit into `width` columns with two spaces between them."""
    while parts and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return parts


def clock(seconds: float) -> str:
    """1:02:03, 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def introduction(
    setup: TrainingSetup, num_parameters: int, device: torch.device, processes: int, step: int
) -> list[str]:
    """What a run is about, for its first line.

    Args:
        setup: of the run.
        num_parameters: of the model and its id tables.
        device: of this process.
        processes: number of them.
        step: the run's next one.
    """
    words, threads = setup.words, torch.get_num_threads()
    steps = [
        f"{counted(s.num_steps, 'step')} of {s.name} in {counted(s.stage.epochs, 'epoch')}"
        for s in setup.stages
    ]
    place = f"CPU, {counted(threads, 'thread')}"
    if device.type == "cuda":
        place = device_name(device)
    place = f"{processes} processes, each on {place}" if processes > 1 else place
    return [
        f"{setup.run}: {setup.dataset.sequences.num_users:,} users, {words.num_items:,} items;",
        f"{num_parameters:,} parameters;",
        ", ".join(steps) + (f", from step {step:,} on;" if step else ";"),
        f"{place}, {setup.recipe.precision},",
        f"micro-batches of up to {counted(setup.recipe.micro_batch_tokens, 'token')}",
    ]
