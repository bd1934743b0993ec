"""When a run takes a checkpoint, and what it waits for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from genrec_dist.config.recipe import Recipe
from genrec_dist.distributed.signals import RankGone, Terminated
from genrec_dist.training.checkpoint import State
from genrec_dist.training.saving.writer import CheckpointWriter, Saved


class Checkpoints:
    """The checkpoints of a run. `save`, `save_last` and `finish` are collective."""

    def __init__(
        self, recipe: Recipe, state: Callable[[], State], on_saved: Callable[[Saved], None]
    ):
        """Collective.

        Args:
            recipe: of the run.
            state: of this rank now, fit to be stored.
            on_saved: called with each checkpoint that has its name.
        """
        self.recipe, self.state, self.on_saved = recipe, state, on_saved
        self.writer = CheckpointWriter(recipe)
        self.step, self.begun = -1, time.monotonic()
        """Of the checkpoint that was begun last."""
        self.then: Callable[[], None] | None = None
        """Called once after `on_saved` of that checkpoint."""

    @property
    def is_due_by_clock(self) -> bool:
        """Whether the recipe's minutes are over since the last one, by this process's clock."""
        return 0 < 60 * self.recipe.checkpoint_minutes <= time.monotonic() - self.begun

    def is_due_by_steps(self, step: int) -> bool:
        """Whether the recipe wants one after so many steps."""
        every = self.recipe.checkpoint_every
        return every > 0 and step % every == 0

    def save(self) -> None:
        """Begin a checkpoint of now, once the one before it is written."""
        state = self.state()
        self.finish()
        self.step, self.begun = state.progress.step, time.monotonic()
        self.writer.start(state)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, where there is one. Raises OSError,
        ValueError, RankGone where it could not be written; the same on all ranks."""
        saved, then, self.then = self.writer.finish(), self.then, None
        if saved is not None:
            self.on_saved(saved)
            if then is not None:
                then()

    def save_last(self) -> None:
        """Write a checkpoint of now, in the time that a signal leaves: one of an earlier step that
        is being written is given up for it."""
        if self.step != self.state().progress.step:
            self.writer.abandon()
            self.save()
        self.finish()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Context at whose end no checkpoint is being written. What was copied before an error of
        another kind is written all the same, unless a rank is gone or nobody wants to wait."""
        try:
            yield
            self.finish()
        except (RankGone, Terminated):
            self.writer.abandon()
            raise
        except BaseException:
            with contextlib.suppress(Exception):
                self.finish()
            raise
