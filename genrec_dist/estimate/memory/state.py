"""The bytes of a training rank without activations, by formula: under DDP and each ZeRO stage.

The formulas follow what torch 2.13 and DeepSpeed 0.19.8 allocate;
tests/unit/estimate/test_memory.py compares them with measured storages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from genrec_kernels.row_blocks import BLOCK
from genrec_shards.readers.documents import read_object

from genrec_dist.estimate.sizes import ParameterCounts

Method = Literal["ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
METHODS: tuple[Method, ...] = get_args(Method)

ALLREDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed copies into one buffer to sum them, where it has not partitioned
them."""


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed file decides bytes; the defaults are DeepSpeed's own."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    persistence_threshold: int = 100_000
    """Stage 3: parameters of at most so many elements stay whole."""


@dataclass(frozen=True)
class State:
    """Bytes of a rank without activations. All are on the GPU but `host`."""

    weights: int
    """What forward and backward read; at stage 3 this rank's share and the small ones that stay
    whole."""
    masters: int
    """float32 copies that the optimiser steps; 0 where it steps the weights themselves."""
    moments: int
    """Both of AdamW, float32."""
    gradients: int
    """At their most, between backward and step."""
    average: int
    """The running average of the weights."""
    id_rows: int
    """Id tables outside the parameters: this rank's rows with their state, and those of a step with
    their gradients."""
    buffers: int
    """Copies for communication: bucket buffers, and stage 3's gathered weights."""
    step_extra: int
    """Copies made after the backward, to sum gradients over ranks or to step; the activations are
    gone by then."""
    validation_extra: int
    """The whole float32 model that DeepSpeed's ranks decode with; gradients and activations are
    gone by then."""
    host: int
    """Bytes in host memory that the optimiser's offload takes."""
    frozen: int = 0
    """Buffers of the items' texts, whole on each rank."""
    checkpoint_copies: int = 0
    """Host memory of the rank with most, pinned: copies of what it stores in a checkpoint."""
    soft_targets: int = 0
    """Host memory of each rank: those of all prefixes."""

    @property
    def held(self) -> int:
        """What is there at any time: weights, masters, moments, average and sharded ids."""
        kept = self.weights + self.masters + self.moments + self.average
        return kept + self.id_rows + self.frozen

    @property
    def host_total(self) -> int:
        """All that is foretold of a rank's host memory."""
        return self.host + self.checkpoint_copies + self.soft_targets

    @property
    def total(self) -> int:
        """Everything on the GPU but activations, between backward and step."""
        return self.held + self.gradients + self.buffers

    def peak(self, activations: int) -> int:
        """The largest of: a micro-batch of so many bytes, the optimiser's step, a validation
        (decoding apart)."""
        step = self.held + self.gradients + self.step_extra
        return max(self.total + activations, step, self.held + self.validation_extra)


def read_settings(folder: Path | None, method: Method) -> ZeroSettings:
    """The settings in `folder/METHOD.json`; DeepSpeed's defaults for what it leaves out, or where
    there is no such file."""
    path = folder / f"{method}.json" if folder else None
    return settings_in(read_object(path) if path is not None and path.is_file() else {})


def settings_in(config: dict[str, Any]) -> ZeroSettings:
    """The settings in the content of a DeepSpeed file."""
    found = config.get("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": found.get("reduce_bucket_size", "auto"),
        "persistence_threshold": found.get("stage3_param_persistence_threshold", "auto"),
    }
    given = {name: int(size) for name, size in sizes.items() if size != "auto"}
    return ZeroSettings(overlap_comm=found.get("overlap_comm") is True, **given)


def state_bytes(
    counts: ParameterCounts,
    method: Method,
    world_size: int,
    bf16: bool,
    *,
    settings: ZeroSettings | None = None,
    average: bool = False,
    step_id_rows: int = 0,
    soft_targets: int = 0,
) -> State:
    """Bytes of the fullest rank under AdamW.

    Args:
        counts: Of the model.
        method: How the weights are spread.
        world_size: Number of ranks.
        bf16: Whether precision is 16 bits.
        settings: Of the DeepSpeed file.
        average: Whether a running average of the weights is kept.
        step_id_rows: Distinct id rows that a rank's share of a step touches; read where the tables
            are outside the parameters.
        soft_targets: Bytes of those of all prefixes.
    """
    settings = settings or ZeroSettings()
    dense, each = counts.dense, 2 if bf16 else 4
    if method in ("ddp", "zero0"):
        shares = [sum(group) for group in counts.groups]
    elif method.startswith("zero3"):  # partitions each parameter
        shares = [sum(-(-size // world_size) for size in group) for group in counts.groups]
    else:  # stages 1 and 2 partition each group as a whole, aligned to two elements per rank
        shares = [2 * -(-sum(group) // (2 * world_size)) for group in counts.groups]
    share = sum(shares)  # elements that this rank steps
    masters, buffers, step_extra, host = 4 * share, 0, 0, 0
    bucket = settings.reduce_bucket_size * (2 if settings.overlap_comm else 1)
    # Stages 2 and 3, and 1 in float32: the norm is taken of float64 copies, one parameter at a
    # time; then each group's gradient is put in one piece.
    piece = min(counts.largest, max(shares))
    if method.startswith("zero3"):
        piece = -(-counts.largest // world_size)
    norm_and_flat = max(8 * piece, 4 * max(shares))
    if method == "ddp":
        masters, weights, gradients = 0, 4 * dense, 4 * dense
        buffers = 4 * dense if world_size > 1 else 0
    elif method == "zero0":
        masters, weights, gradients = 4 * dense if bf16 else 0, each * dense, each * dense
        # The sum over ranks is taken in a copy; in bf16 the masters' float32 gradients are there
        # beside the others.
        step_extra = max(each * min(dense, ALLREDUCE_ELEMENTS), 4 * dense if bf16 else 0)
    elif method == "zero1" and bf16:
        # DeepSpeed's BF16_Optimizer keeps the whole float32 gradient beside the bfloat16 one. It is
        # summed over ranks in a bfloat16 copy, of a float32 copy where there are several groups.
        weights, gradients = 2 * dense, (4 + 2) * dense
        copies = 6 if len(counts.groups) > 1 else 2
        step_extra = copies * min(dense, ALLREDUCE_ELEMENTS)
    elif method == "zero1":
        weights, gradients, buffers, step_extra = 4 * dense, 4 * dense, 4 * bucket, norm_and_flat
    elif method in ("zero2", "zero2_offload"):
        # In float32 DeepSpeed keeps each parameter whole that overlaps with the partition.
        gradients = 4 * share if bf16 else 4 * _overlapping(counts, world_size)
        weights, buffers, step_extra = each * dense, each * bucket, norm_and_flat
    else:
        small = dense - gathered_elements(counts, settings)
        weights, gradients, step_extra = each * (share + small), 4 * share, norm_and_flat
        buffers = each * (settings.reduce_bucket_size + gathered_elements(counts, settings))
    moments, averaged = 8 * share, 4 * share if average else 0
    copies = 4 * share + moments + averaged
    if method.endswith("_offload"):  # the step is taken on the host, with masters' gradients
        host = masters + moments + averaged + 4 * share
        masters = moments = averaged = step_extra = 0
        if method == "zero2_offload":
            # A partition on its way to the GPU, and a gradient on its way from it.
            host += each * share + each * counts.largest
            buffers += each * counts.largest
            if not bf16:  # accumulated over micro-batches on the host
                host, gradients = host + gradients, 0
        else:
            host += each * share + gradients
            weights, gradients = weights - each * share, 0
    id_rows = 0
    if counts.ids_outside:
        held = sum(BLOCK * -(-rows // (BLOCK * world_size)) for rows in counts.id_tables)
        of_step = min(step_id_rows, sum(counts.id_tables))
        stored = held * (4 * counts.id_dim + 4)
        id_rows = stored + 2 * 4 * of_step * counts.id_dim
        copies += stored
    return State(
        weights=weights,
        masters=masters,
        moments=moments,
        gradients=gradients,
        average=averaged,
        id_rows=id_rows,
        buffers=buffers,
        step_extra=step_extra,
        validation_extra=0 if method == "ddp" else 4 * dense,
        host=host,
        frozen=counts.frozen,
        checkpoint_copies=copies,
        soft_targets=soft_targets,
    )


def gathered_elements(counts: ParameterCounts, settings: ZeroSettings) -> int:
    """Stage 3: elements that are whole between forward and backward, beside the small ones that
    always are.

    All of them: DeepSpeed's `stage3_max_live_parameters` releases none (measured), and
    `stage3_max_reuse_distance` only layers, not the embeddings, which the model reads directly."""
    large = settings.persistence_threshold
    return sum(size for group in counts.groups for size in group if size > large)


def _overlapping(counts: ParameterCounts, world_size: int) -> int:
    """Elements of the parameters that overlap with a rank's partitions, of the rank with the
    most."""
    totals = [0] * world_size
    for group in counts.groups:
        partition = 2 * -(-sum(group) // (2 * world_size))
        offset = 0
        for size in group:
            for rank in range(world_size):
                if offset < (rank + 1) * partition and offset + size > rank * partition:
                    totals[rank] += size
            offset += size
    return max(totals)
