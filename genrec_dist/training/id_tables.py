"""Id tables outside the model: a step fetches, updates and stores only the rows that it uses."""

# D width of the tables, u rows of a step

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from genrec_kernels.distinct_rows import distinct_rows
from genrec_kernels.sharded_rows import RowTable
from genrec_shards.keyed_random import mixed_key
from genrec_shards.sequences import SplitView
from torch import Tensor

from genrec_dist.data.batch import Batch, RankStep
from genrec_dist.data.encoder_input import ragged
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.model.build import CodedConfig
from genrec_dist.model.causal.config import PromptedConfig
from genrec_dist.model.causal.kinds import AnyConfig, AnyModel
from genrec_dist.model.network import FetchedRows
from genrec_dist.model.seq2seq.base import EncoderDecoder
from genrec_dist.training.saving.tensor_file import TensorFile

Kind = Literal["user", "item"]


def with_ids_outside(config: AnyConfig) -> CodedConfig | None:
    """The configuration of a model whose id tables are outside it, else None."""
    return config if not isinstance(config, PromptedConfig) and config.ids_outside else None


def plan_ids(step: RankStep, config: CodedConfig) -> RankStep:
    """The step with its ids as indices into its distinct rows. Data workers do this, so that the
    loop never sorts.

    An example: two micro-batches have the item rows [7, 3] and [3, 0, 9], where 0 means no item.
    `id_rows["item"]` is [2, 6, 8], the table rows of the ids 3, 7 and 9, and the micro-batches
    get [2, 1] and [1, 0, 3]: index 0 is the zero row."""
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
    """User and item tables, their rows sharded over the ranks. Empty for a model that has them
    inside."""

    def __init__(self, config: AnyConfig, seed: int, ranks: Ranks, device: torch.device):
        self.ranks, self.device = ranks, device
        width, init_std, sizes = 0, 0.0, dict[Kind, int]()
        outside = with_ids_outside(config)
        if outside is not None:
            width, init_std = outside.id_dim or outside.d_model, outside.init_std
            sizes = {"user": outside.num_users, "item": outside.num_items}
        self.tables: dict[Kind, RowTable] = {
            kind: RowTable(
                num_rows,
                width,
                init_std=init_std,
                key=mixed_key(seed, 0x1D5, number),
                rank=ranks.rank,
                world_size=ranks.size,
                host_group=ranks.group,
                device=device,
            )
            for number, (kind, num_rows) in enumerate(sizes.items())
            if num_rows
        }
        self.leaves: dict[Kind, Tensor] = {}

    def begin_with(self, rows: Mapping[Kind, Tensor]) -> None:
        """Set the first rows of tables, float32 [n, D], the same on each rank; the others keep
        their random values."""
        for kind, table in self.tables.items():
            if kind in rows:
                table.begin_with(rows[kind])

    @property
    def num_parameters(self) -> int:
        """Of the tables of all ranks."""
        return sum(table.num_rows * table.dim for table in self.tables.values())

    def attach(self, model: AnyModel, step: RankStep) -> None:
        """Fetch a step's rows and put them into the model, for its micro-batches. Collective."""
        for kind, table in self.tables.items():
            self.leaves[kind] = table.fetch(step.id_rows[kind], zero_row=True).requires_grad_()
            module = _module_of(model, kind)
            module.weight, module.rows = self.leaves[kind], None

    def learn(self, learning_rate: float) -> None:
        """Update the rows of the attached step by their gradients. Collective."""
        for kind, table in self.tables.items():
            leaf = self.leaves.pop(kind)
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            # Engines multiply the loss by the number of ranks before the backward pass, since DDP
            # and DeepSpeed average over ranks.
            table.update(gradient[1:], learning_rate=learning_rate, scale=1 / self.ranks.size)

    @contextlib.contextmanager
    def serving(self, model: AnyModel, view: SplitView, users_U: np.ndarray) -> Iterator[None]:
        """Context in which the model can encode these users' histories. Collective.

        Args:
            model: without tables inside.
            view: histories of all users.
            users_U: int64 [U], whose rows are fetched, once.
        """
        items, _ = ragged(view.starts[users_U], (view.ends - view.starts)[users_U])
        used: dict[Kind, np.ndarray] = {"user": users_U, "item": view.items[items]}
        for kind, table in self.tables.items():
            rows_u = torch.from_numpy(np.unique(used[kind]).astype(np.int64))
            module = _module_of(model, kind)
            module.weight, module.rows = table.fetch(rows_u, zero_row=True), rows_u.to(self.device)
        yield

    def whole(self, model: AnyModel) -> AnyModel | None:
        """The model with its tables inside, on rank 0's CPU; None elsewhere. Collective."""
        if not self.tables or not isinstance(model, EncoderDecoder):
            return model if self.ranks.is_main else None
        rows = {f"{kind}_embedding.weight": table.full() for kind, table in self.tables.items()}
        if not self.ranks.is_main:
            return None
        config = type(model.config)(**{**model.config.to_dict(), "ids_outside": False})
        with torch.device("meta"):
            complete: Any = type(model)(config)
        # Before the rows is the zero row, which all positions without an id use.
        tables = {
            name: torch.cat([table.new_zeros(1, table.shape[1]), table])
            for name, table in rows.items()
            if table is not None
        }
        inside = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        complete.load_state_dict({**inside, **tables}, assign=True)
        complete.tie_weights()
        complete.generation_config = model.generation_config
        return complete.eval()

    def files(self) -> list[TensorFile]:
        """What this rank stores of them in a checkpoint."""
        return [TensorFile(*table.contents(f"ids-{kind}")) for kind, table in self.tables.items()]

    def load(self, folder: Path) -> None:
        """Read this rank's rows from a checkpoint of any number of ranks. Raises ValueError naming
        a file that does not fit."""
        for kind, table in self.tables.items():
            table.load(folder, f"ids-{kind}")


def _module_of(model: AnyModel, kind: Kind) -> FetchedRows:
    assert isinstance(model, EncoderDecoder)
    module = model.user_embedding if kind == "user" else model.item_embedding
    assert isinstance(module, FetchedRows)
    return module
