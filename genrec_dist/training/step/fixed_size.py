"""Packed micro-batches of one size: what a graph that is captured once can be replayed on."""

# S sequences, R decoder rows, n encoder tokens, m decoder tokens

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genrec_dist.data.batch import IGNORED, Batch, ItemTargets, RankStep
from genrec_dist.data.packing import FixedMarks, Packing, Segments, filled_size, segments_of

MARGIN = 1.125
"""Of the sizes over the largest micro-batch that was looked at."""


@dataclass(frozen=True)
class Sizes:
    """Of every micro-batch of a stage, padding included."""

    inputs: int
    """n."""
    targets: int
    """m."""
    sequences: int
    """S, the padding's among them."""
    rows: int
    """R, the padding's among them."""

    def hold(self, batch: Batch) -> bool:
        """Whether a packed micro-batch fits, with a token of padding on each side."""
        return all(
            has <= holds
            for has, holds in zip(
                dataclasses.astuple(_least(batch)), dataclasses.astuple(self), strict=True
            )
        )


def _least(batch: Batch) -> Sizes:
    """What a micro-batch takes, with one token of padding."""
    packing = batch.packing
    assert packing is not None, "a padded micro-batch has no fixed size"
    encoder, rows = packing.encoder.offsets, packing.rows.offsets
    # The last sequence and the last row are padding already.
    return Sizes(int(encoder[-2]) + 1, int(rows[-2]) + 1, len(encoder) - 1, len(rows) - 1)


def sizes_of(steps: Iterable[RankStep], longest: int) -> Sizes:
    """Sizes that hold most steps' micro-batches, and any sample alone.

    Args:
        steps: some of a stage, made with packed micro-batches.
        longest: `model.max_tokens`.
    """
    batches = [batch for step in steps for batch in step.micro_batches]
    least = [dataclasses.astuple(_least(batch)) for batch in batches]
    most = Sizes(*(max(column) for column in zip(*least, strict=True)))
    row_tokens = max(
        int(batch.packing.rows.lengths[:-1].max()) for batch in batches if batch.packing
    )
    row_counts = [int(np.bincount(batch.encoder_row.numpy()).max()) for batch in batches]
    # Behind a causal encoder a sample may have as many decoder rows as encoder tokens.
    causal = any(batch.packing.causal for batch in batches if batch.packing)
    rows = longest if causal else max(row_counts)
    alone = Sizes(longest + 1, rows * row_tokens + 1, 2, rows + 1)
    return Sizes(
        inputs=filled_size(max(int(MARGIN * most.inputs), alone.inputs)),
        targets=filled_size(max(int(MARGIN * most.targets), alone.targets)),
        sequences=max(int(MARGIN * most.sequences), alone.sequences) + 1,
        rows=max(int(MARGIN * most.rows), alone.rows) + 1,
    )


def fitted(make: Callable[[int], RankStep], sizes: Sizes, budget: int, pad_token: int) -> RankStep:
    """A step all of whose micro-batches have these sizes. Where one does not fit, the step is cut
    into more of them, which changes no gradient.

    Args:
        make: the step with micro-batches of at most so many encoder tokens.
        sizes: of the stage.
        budget: `micro_batch_tokens`.
        pad_token: of the tokenizer.

    Raises:
        ValueError: a sample alone does not fit.
    """
    budget = min(budget, sizes.inputs)
    while True:
        step = make(budget)
        if all(sizes.hold(batch) for batch in step.micro_batches):
            batches = [with_sizes(batch, sizes, pad_token) for batch in step.micro_batches]
            return dataclasses.replace(step, micro_batches=batches)
        if budget < 1:
            raise ValueError(
                "step_graph: a sample has more decoder tokens than a fixed micro-batch: set "
                "step_graph off"
            )
        budget //= 2


def with_sizes(batch: Batch, sizes: Sizes, pad_token: int) -> Batch:
    """The micro-batch with its padding sequence and its padding row made as long as these sizes
    require, behind empty ones. The loss and every gradient stay as they are."""
    # Two samples of 3 and 2 tokens in sizes of n = 8 and S = 4:
    #   cu_seqlens = [0 3 5 5 8], the third sequence empty, the fourth padding.
    # An empty row's first token is thus the padding row's, which exists.
    packing, encoder, items = batch.packing, batch.encoder, batch.item_targets
    assert packing is not None
    assert sizes.hold(batch), (_least(batch), sizes)
    sequences = _grown(packing.encoder, sizes.inputs, sizes.sequences)
    targets = _grown(packing.targets, sizes.targets, sizes.sequences)
    rows = _grown(packing.rows, sizes.targets, sizes.rows)
    num_inputs, num_targets = int(packing.encoder.offsets[-2]), int(packing.rows.offsets[-2])

    def filled(values: Tensor, real: int, size: int, fill: int) -> Tensor:
        grown = torch.full((size,), fill, dtype=values.dtype)
        grown[:real] = values[:real]
        return grown

    fixed = _marks(packing, sequences, targets, rows)
    if items is not None:
        num_rows, most = len(items.places_R), sizes.rows
        items = ItemTargets(
            places_R=filled(items.places_R, num_rows, most, 0),
            items_R=filled(items.items_R, num_rows, most, IGNORED),
            learned=torch.arange(most),
        )
    return dataclasses.replace(
        batch,
        encoder=dataclasses.replace(
            encoder,
            input_ids=filled(encoder.input_ids, num_inputs, sizes.inputs, pad_token),
            attention_mask=torch.ones(sizes.inputs, dtype=torch.bool),
            position_ids=filled(encoder.position_ids, num_inputs, sizes.inputs, 0),
            user_rows=filled(encoder.user_rows, num_inputs, sizes.inputs, 0),
            item_rows=filled(encoder.item_rows, num_inputs, sizes.inputs, 0),
        ),
        encoder_row=filled(batch.encoder_row, len(batch.encoder_row), sizes.rows, 0),
        decoder_input_ids=filled(batch.decoder_input_ids, num_targets, sizes.targets, pad_token),
        labels=filled(batch.labels, num_targets, sizes.targets, IGNORED),
        # All places: those without a label are ignored by the loss.
        learned=torch.arange(sizes.targets),
        item_targets=items,
        packing=Packing(
            encoder=sequences,
            targets=targets,
            rows=rows,
            positions_m=filled(packing.positions_m, num_targets, sizes.targets, 0),
            causal=packing.causal,
            fixed=fixed,
        ),
        num_slots=sizes.inputs + sizes.targets,
    )


def _grown(segments: Segments, size: int, number: int) -> Segments:
    """So many segments of so many tokens, of which the last is padding."""
    real = segments.lengths[:-1]
    empty = np.zeros(number - 1 - len(real), np.int64)
    lengths = np.concatenate([real, empty, [size - int(real.sum())]])
    return dataclasses.replace(segments_of(lengths), at_most=size)


def _marks(packing: Packing, sequences: Segments, targets: Segments, rows: Segments) -> FixedMarks:
    def owners(segments: Segments) -> np.ndarray:
        return np.repeat(np.arange(len(segments.lengths)), segments.lengths)

    sample_n = owners(sequences)
    place_n = np.arange(len(sample_n)) - np.repeat(sequences.offsets[:-1], sequences.lengths)
    visible_m = None
    if packing.visible_m is not None:
        num_targets = int(packing.rows.offsets[-2])
        visible = np.full(int(rows.offsets[-1]), int(sequences.lengths[-1]))
        visible[:num_targets] = packing.visible_m[:num_targets]
        visible_m = torch.from_numpy(visible.astype(np.int64))
    return FixedMarks(
        sample_n=torch.from_numpy(sample_n),
        place_n=torch.from_numpy(place_n),
        sample_m=torch.from_numpy(owners(targets)),
        row_m=torch.from_numpy(owners(rows)),
        visible_m=visible_m,
    )
