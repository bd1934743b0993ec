"""The stages of a run and the steps each of them takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import SampleOrder, Space

from genrec_dist.config.recipe import Recipe, Stage


@dataclass(frozen=True)
class StageSteps:
    """A stage and its range of the run's global steps."""

    name: str
    stage: Stage
    plan: SampleOrder
    first_step: int
    first_epoch: int

    @property
    def epoch_steps(self) -> int:
        """Of one epoch."""
        return math.ceil(self.plan.steps_per_epoch * self.stage.epoch_fraction)

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return self.epoch_steps * self.stage.epochs

    @property
    def end_step(self) -> int:
        """Global step after the stage's last one."""
        return self.first_step + self.num_steps

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch of the stage, step of the epoch) of a global step."""
        return divmod(step - self.first_step, self.epoch_steps)

    def ends_epoch(self, step: int) -> bool:
        """Whether a global step is the last one of its epoch."""
        return self.locate(step)[1] == self.epoch_steps - 1


def stage_of(stages: list[StageSteps], step: int) -> StageSteps:
    """The stage that a global step belongs to."""
    return next(stage for stage in stages if step < stage.end_step)


def plan_stages(recipe: Recipe, reader: ShardReader) -> list[StageSteps]:
    """The stages that have epochs, one after another. Epochs are counted through all stages, so no
    two stages have the same sample order. Raises ValueError for a stage without a sample."""
    stages: list[StageSteps] = []
    first_step = first_epoch = 0
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        if stage.epochs == 0:
            continue
        space: Space = "user" if stage.targets in ("mask", "all-prefixes") else stage.targets  # type: ignore[assignment]
        plan = SampleOrder(
            reader.lengths,
            reader.manifest.users_per_record,
            space=space,
            batch_size=stage.batch_size,
            seed=recipe.seed,
            trained_through=recipe.trained_through,
            periods=reader.periods,
        )
        if plan.num_samples == 0:
            raise ValueError(f"{name}: no user has a sample for targets {stage.targets!r}")
        stages.append(StageSteps(name, stage, plan, first_step, first_epoch))
        first_step, first_epoch = stages[-1].end_step, first_epoch + stage.epochs
    return stages
