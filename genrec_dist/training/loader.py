"""The batches of each step, prepared ahead of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from genrec_kernels import Rows, make_gradient_order
from genrec_shards.errors import DataError
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import StepSamples, split_among_ranks
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.data.collate import WORTH_A_BATCH, BatchOptions
from genrec_dist.data.layout import Layout
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.data.samples.step import make_step
from genrec_dist.distributed.signals import ignore_signals
from genrec_dist.model.build import CodedConfig
from genrec_dist.model.genrec import GenRecConfig
from genrec_dist.model.network import POSITION_OFFSET
from genrec_dist.training.id_tables import plan_ids
from genrec_dist.training.stages import StageSteps, stage_of
from genrec_dist.training.step.fixed_size import Sizes, fitted, sizes_of


def plan_sums(step: RankStep, config: GenRecConfig, fixed: bool = False) -> RankStep:
    """The step with a plan of its embedding sum in each micro-batch. Run after `plan_ids`, which
    changes the row numbers that are planned. `fixed`: as of `make_gradient_order`. Raises
    ValueError for an id outside its table; the kernel on the device does not check."""
    if config.ids_outside:
        num_users, num_items = (len(step.id_rows.get(kind, ())) for kind in ("user", "item"))
    else:
        num_users, num_items = config.num_users, config.num_items
    num_positions = config.max_position_embeddings + POSITION_OFFSET
    batches = []
    for batch in step.micro_batches:
        encoder = batch.encoder
        positions = encoder.position_ids.numpy() + POSITION_OFFSET
        users, items = encoder.user_rows.numpy(), encoder.item_rows.numpy()
        tables = [
            Rows("token", encoder.input_ids.numpy(), config.vocab_size, config.pad_token_id),
            Rows("position", positions, num_positions),
            Rows("user", users, num_users + 1, 0) if config.num_users else None,
            Rows("item", items, num_items + 1, 0) if config.num_items else None,
        ]
        batches.append(dataclasses.replace(batch, plan=make_gradient_order(tables, fixed)))
    return dataclasses.replace(step, micro_batches=batches)


T = TypeVar("T")
LOOKED_AT = 16
"""First steps of a stage whose micro-batches say what size all have."""


def ahead(loader: Iterable[T]) -> Iterator[T]:
    """A loader's batches, the next one received while the current one is used: a worker sends
    handles of shared memory, and opening some twenty of them takes milliseconds."""
    source = iter(loader)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield batch


class StepBatches(TorchDataset[RankStep]):
    """Global step -> this rank's share of it. A map-style data set, so that loading ahead and
    resuming need no state."""

    def __init__(
        self,
        stages: list[StageSteps],
        reader: ShardReader,
        layout: Layout,
        recipe: Recipe,
        rank: int,
        world: int,
        ids_outside: CodedConfig | None = None,
        sums: GenRecConfig | None = None,
        packed: bool = False,
        one_size: bool = False,
        most_padding: int = WORTH_A_BATCH,
        teacher: Teacher | None = None,
    ):
        """A data set of all steps.

        Args:
            stages: of the run.
            reader: of the shards.
            layout: of encoder inputs.
            recipe: of the run.
            rank: whose share is made.
            world: number of ranks.
            ids_outside: the model's configuration, if its id tables are outside it.
            sums: the model's configuration, if its embedding sum takes plans.
            packed: whether micro-batches are packed.
            one_size: whether all of a stage have one size, which is that of its first steps: a
                function of recipe and data, so that a resumed run has the same.
            most_padding: of a padded micro-batch (`padding_worth_a_batch`).
            teacher: of finetuning.
        """
        self.stages, self.reader, self.layout, self.recipe = stages, reader, layout, recipe
        self.rank, self.world, self.teacher = rank, world, teacher
        self.packed, self.most_padding = packed, most_padding
        self.ids_outside, self.sums = ids_outside, sums
        self.sizes: dict[str, Sizes] = {}
        if one_size:
            longest = recipe.model.max_tokens
            for here in stages:
                last = min(here.first_step + LOOKED_AT, here.end_step)
                steps = [self[step] for step in range(here.first_step, last)]
                self.sizes[here.name] = sizes_of(steps, longest)

    def __getitem__(self, step: int) -> RankStep:
        here = stage_of(self.stages, step)
        epoch, step_of_epoch = here.locate(step)
        epoch += here.first_epoch
        all_samples = here.plan.step(epoch, step_of_epoch)
        samples = split_among_ranks(all_samples, self.rank, self.world)
        try:
            return self._share(samples, here, epoch)
        except DataError:
            raise
        except Exception as error:
            # A worker's traceback reaches a person as one long line: name the record instead, which
            # is looked for by making the step of each record's samples alone.
            records_B = samples.user_rows // self.reader.manifest.users_per_record
            place = f"step {step}"
            for record in np.unique(records_B).tolist():
                try:
                    self._share(samples[records_B == record], here, epoch)
                except Exception:
                    place = self.reader.place(record)
                    break
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"{place}: no batch can be made of it ({reason})") from error

    def _share(self, samples: StepSamples, here: StageSteps, epoch: int) -> RankStep:
        def make(budget: int) -> RankStep:
            return make_step(
                samples,
                self.reader,
                self.layout,
                dataclasses.replace(options, micro_batch_tokens=budget),
                epoch=here.first_epoch + epoch,
            )

        options = BatchOptions(
            micro_batch_tokens=self.recipe.micro_batch_tokens,
            seed=self.recipe.seed,
            mask=here.stage.mask if here.stage.targets == "mask" else None,
            packed=self.packed,
            most_padding=self.most_padding,
            item_targets=self.recipe.model.item_loss > 0
            or self.recipe.model.decoder_start != "mask",
            all_prefixes=here.stage.targets == "all-prefixes",
            share_windows=here.stage.windows == "shared",
            teacher=self.teacher if here.name == "finetune" else None,
        )
        sizes, budget = self.sizes.get(here.name), self.recipe.micro_batch_tokens
        if sizes is None:
            share = make(budget)
        else:
            share = fitted(make, sizes, budget, self.layout.pad_token)
        if self.ids_outside is not None:
            share = plan_ids(share, self.ids_outside)
        if self.sums is None:
            return share
        return plan_sums(share, self.sums, fixed=sizes is not None)


def loaded(data: StepBatches, steps: range, workers: int) -> Iterator[tuple[int, RankStep]]:
    """(global step, this rank's share of it), made ahead by so many processes; 0: in this one."""
    loader = DataLoader(
        data,
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )
    source = iter(loader)
    shares = ahead(source) if workers else source
    try:
        yield from zip(steps, shares, strict=True)
    except DataError as error:
        # A worker's error has its traceback as message; the last line is its own message.
        raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
    finally:
        # Workers ignore signals: while an error keeps this generator alive, nothing else would
        # end them.
        if workers:
            shares.close()  # type: ignore[attr-defined]
            source._shutdown_workers()  # type: ignore[attr-defined]
