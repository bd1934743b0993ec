"""Id tables outside the model: the rows a step touches are fetched, learned and stored, and no
others."""

# D width of the tables, u rows of a step

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from genrec_kernels.sharded_rows import RowTable, distinct_rows
from genrec_shards.keyed_random import mixed_key
from genrec_shards.sequences import SplitView
from torch import Tensor

from genrec_dist.data.batch import Batch, RankStep
from genrec_dist.data.encoder_input import ragged
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.model.genrec import FetchedRows, GenRecConfig, GenRecForConditionalGeneration

Kind = Literal["user", "item"]


def plan_ids(step: RankStep, config: GenRecConfig) -> RankStep:
    """The step with its ids as places among its distinct rows: made by the data worker, so that the
    loop never sorts."""
    encoders = [batch.encoder for batch in step.micro_batches]
    plans: dict[str, Tensor] = {}
    for kind, num_rows in (("user", config.num_users), ("item", config.num_items)):
        if not num_rows:
            continue
        field = f"{kind}_rows"
        rows, places = distinct_rows(
            [getattr(encoder, field).numpy() for encoder in encoders], num_rows
        )
        encoders = [
            dataclasses.replace(encoder, **{field: torch.from_numpy(array)})
            for encoder, array in zip(encoders, places, strict=True)
        ]
        plans[kind] = rows
    batches: list[Batch] = [
        dataclasses.replace(batch, encoder=encoder)
        for batch, encoder in zip(step.micro_batches, encoders, strict=True)
    ]
    return dataclasses.replace(step, micro_batches=batches, id_rows=plans)


class IdTables:
    """User and item tables, their rows spread over the ranks. Empty for a model that has its tables
    within."""

    def __init__(self, config: GenRecConfig, seed: int, ranks: Ranks, device: torch.device):
        self.ranks, self.device = ranks, device
        width = config.id_dim or config.d_model
        sizes: dict[Kind, int] = (
            {"user": config.num_users, "item": config.num_items} if config.ids_outside else {}
        )
        self.tables: dict[Kind, RowTable] = {
            kind: RowTable(
                num_rows,
                width,
                init_std=config.init_std,
                key=mixed_key(seed, 0x1D5, number),
                rank=ranks.rank,
                world_size=ranks.size,
                device=device,
            )
            for number, (kind, num_rows) in enumerate(sizes.items())
            if num_rows
        }
        self.leaves: dict[Kind, Tensor] = {}

    def begin_with(self, rows: Mapping[Kind, Tensor]) -> None:
        """Let the first rows of tables be these, float32 [n, D], the same on each rank; the others
        keep what they drew."""
        for kind, table in self.tables.items():
            if kind in rows:
                table.begin_with(rows[kind])

    @property
    def num_parameters(self) -> int:
        return sum(table.num_rows * table.dim for table in self.tables.values())

    def attach(self, model: GenRecForConditionalGeneration, step: RankStep) -> None:
        """Fetch a step's rows and put them where its micro-batches look for them. Collective."""
        for kind, table in self.tables.items():
            self.leaves[kind] = table.fetch(step.id_rows[kind], zero_row=True).requires_grad_()
            _place_of(model, kind).weight = self.leaves[kind]
            _place_of(model, kind).rows = None

    def learn(self, learning_rate: float) -> None:
        """Give the rows of the attached step their gradients. Collective."""
        for kind, table in self.tables.items():
            leaf = self.leaves.pop(kind)
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            # The loss went times the number of ranks into the backward pass, for those who average
            # over them.
            table.update(gradient[1:], learning_rate=learning_rate, scale=1 / self.ranks.size)

    @contextlib.contextmanager
    def serving(
        self, model: GenRecForConditionalGeneration, view: SplitView, users_U: np.ndarray
    ) -> Iterator[None]:
        """A model that can read these users' histories: their rows are fetched once. Collective."""
        items, _ = ragged(view.starts[users_U], (view.ends - view.starts)[users_U])
        wanted: dict[Kind, np.ndarray] = {"user": users_U, "item": view.items[items]}
        for kind, table in self.tables.items():
            rows_u = torch.from_numpy(np.unique(wanted[kind]).astype(np.int64))
            place = _place_of(model, kind)
            place.weight, place.rows = table.fetch(rows_u, zero_row=True), rows_u.to(self.device)
        yield

    def whole(self, model: GenRecForConditionalGeneration) -> GenRecForConditionalGeneration | None:
        """The model with its tables within, on rank 0's CPU; None elsewhere. Collective."""
        if not self.tables:
            return model if self.ranks.is_main else None
        rows = {f"{kind}_embedding.weight": table.full() for kind, table in self.tables.items()}
        if not self.ranks.is_main:
            return None
        config = GenRecConfig(**{**model.config.to_dict(), "ids_outside": False})
        with torch.device("meta"):
            complete = GenRecForConditionalGeneration(config)
        tables = {name: _with_zero_row(table) for name, table in rows.items() if table is not None}
        inside = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        complete.load_state_dict({**inside, **tables}, assign=True)
        complete.tie_weights()
        complete.generation_config = model.generation_config
        return complete.eval()

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's rows into a checkpoint's folder; the files written."""
        return [table.save(folder, f"ids-{kind}") for kind, table in self.tables.items()]

    def load(self, folder: Path) -> None:
        """Read this rank's rows from a checkpoint of any number of ranks. Raises ValueError naming
        a file that does not fit."""
        for kind, table in self.tables.items():
            table.load(folder, f"ids-{kind}")


def _with_zero_row(rows_uD: Tensor) -> Tensor:
    """The zero row before them, at which all places without an id point."""
    return torch.cat([rows_uD.new_zeros(1, rows_uD.shape[1]), rows_uD])


def _place_of(model: GenRecForConditionalGeneration, kind: Kind) -> FetchedRows:
    place = model.user_embedding if kind == "user" else model.item_embedding
    assert isinstance(place, FetchedRows)
    return place
