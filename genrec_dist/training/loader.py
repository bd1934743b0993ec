"""The batches of each step, made ahead of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from genrec_kernels import GradientOrder, Rows, make_gradient_order
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import split_among_ranks
from torch.utils.data import Dataset as TorchDataset

from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.data.collate import make_step
from genrec_dist.data.encoder_input import EncoderInput, Layout
from genrec_dist.model.genrec import POSITION_OFFSET, GenRecConfig
from genrec_dist.training.id_tables import plan_ids
from genrec_dist.training.stages import StageSteps, stage_of


def plan_sums(step: RankStep, config: GenRecConfig) -> RankStep:
    """The step with a plan in each micro-batch. Behind `plan_ids`: a plan is for the places that
    stand in the batches.

    Raises ValueError for an id outside its table: on a device nobody looks again.
    """
    if config.ids_outside:
        num_users, num_items = (len(step.id_rows.get(kind, ())) for kind in ("user", "item"))
    else:
        num_users, num_items = config.num_users, config.num_items
    batches = [
        dataclasses.replace(batch, plan=_plan(batch.encoder, config, num_users, num_items))
        for batch in step.micro_batches
    ]
    return dataclasses.replace(step, micro_batches=batches)


def _plan(
    encoder: EncoderInput, config: GenRecConfig, num_users: int, num_items: int
) -> GradientOrder:
    positions = encoder.position_ids.numpy() + POSITION_OFFSET
    tables = [
        Rows("token", encoder.input_ids.numpy(), config.vocab_size, config.pad_token_id),
        Rows("position", positions, config.max_position_embeddings + POSITION_OFFSET),
        Rows("user", encoder.user_rows.numpy(), num_users + 1, 0) if config.num_users else None,
        Rows("item", encoder.item_rows.numpy(), num_items + 1, 0) if config.num_items else None,
    ]
    return make_gradient_order(tables)


T = TypeVar("T")


def ahead(loader: Iterable[T]) -> Iterator[T]:
    """A loader's batches, the next one received while this one is worked on: what a worker hands
    over are handles of memory, and to take up some twenty of them costs the loop milliseconds."""
    source = iter(loader)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield batch


class StepBatches(TorchDataset[RankStep]):
    """Global step -> this rank's share of it. A map, so that loading ahead and resuming need no
    state."""

    def __init__(
        self,
        stages: list[StageSteps],
        reader: ShardReader,
        layout: Layout,
        recipe: Recipe,
        rank: int,
        world: int,
        ids_outside: GenRecConfig | None = None,
        sums: GenRecConfig | None = None,
        packed: bool = False,
    ):
        """`ids_outside`, `sums`: the model's configuration where its id tables live outside it,
        where its sum takes plans."""
        self.stages, self.reader, self.layout, self.recipe = stages, reader, layout, recipe
        self.rank, self.world, self.ids_outside, self.sums, self.packed = (
            rank,
            world,
            ids_outside,
            sums,
            packed,
        )

    def __getitem__(self, step: int) -> RankStep:
        here = stage_of(self.stages, step)
        epoch, step_of_epoch = here.locate(step)
        samples = split_among_ranks(
            here.plan.step(here.first_epoch + epoch, step_of_epoch), self.rank, self.world
        )
        share = make_step(
            samples,
            self.reader,
            self.layout,
            mask=here.stage.mask if here.stage.targets == "mask" else None,
            seed=self.recipe.seed,
            epoch=here.first_epoch + epoch,
            micro_batch_tokens=self.recipe.micro_batch_tokens,
            packed=self.packed,
            all_prefixes=here.stage.targets == "all-prefixes",
            ask_items=self.recipe.model.item_loss > 0 or self.recipe.model.decoder_start == "state",
        )
        if self.ids_outside is not None:
            share = plan_ids(share, self.ids_outside)
        return share if self.sums is None else plan_sums(share, self.sums)
