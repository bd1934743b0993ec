"""Plans for the embedding kernel's backward, made by the data worker behind its batches."""

from __future__ import annotations

import dataclasses

from genrec_kernels import Rows, SumPlan, plan_sum

from genrec_dist.batch import RankStep
from genrec_dist.model import POSITION_OFFSET, GenRecConfig
from genrec_dist.text import EncoderInput


def plan_sums(step: RankStep, config: GenRecConfig) -> RankStep:
    """The step with a plan in each micro-batch. Behind `plan_ids`: a plan is for the places that stand in the batches.

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


def _plan(encoder: EncoderInput, config: GenRecConfig, num_users: int, num_items: int) -> SumPlan:
    positions = encoder.position_ids.numpy() + POSITION_OFFSET
    return plan_sum(
        Rows("token", encoder.input_ids.numpy(), config.vocab_size, config.pad_token_id),
        Rows("position", positions, config.max_position_embeddings + POSITION_OFFSET),
        Rows("user", encoder.user_rows.numpy(), num_users + 1, 0) if config.num_users else None,
        Rows("item", encoder.item_rows.numpy(), num_items + 1, 0) if config.num_items else None,
    )
