"""The tensors of a micro-batch, and a rank's share of a step."""

# B samples, R decoder rows, L input tokens, T target tokens; packed: n input tokens, m target
# tokens

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from genrec_kernels import GradientOrder
from torch import Tensor

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.packing import Packing

IGNORED = -100
"""Label of positions that are not in the loss."""


@dataclass(frozen=True)
class ItemTargets:
    """What the item head predicts: for each decoder row an item, from the encoder's state at the
    row's mask."""

    places_R: Tensor
    """int64 [R], index of the mask among the encoder's tokens, [B x L] or packed [n]."""
    items_R: Tensor
    """int64 [R], item rows, IGNORED where a row is not in the loss; of several items for one mask
    the first."""

    def to(self, device: torch.device) -> ItemTargets:
        places_R, items_R = (
            values.to(device, non_blocking=True) for values in (self.places_R, self.items_R)
        )
        return ItemTargets(places_R, items_R)


@dataclass(frozen=True)
class Work:
    """Counts of a batch from which its floating-point operations follow."""

    inputs: int = 0
    """Encoder tokens."""
    targets: int = 0
    """Decoder tokens."""
    labels: int = 0
    """Decoder tokens that are in the loss."""
    encoder_pairs: int = 0
    """Sum of L^2 over samples."""
    decoder_pairs: int = 0
    """Sum of T^2 over decoder rows."""
    cross_pairs: int = 0
    """Sum of T x L over decoder rows."""

    def __add__(self, other: Work) -> Work:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Work(**sums)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What the model reads to compute a loss."""

    encoder: EncoderInput
    encoder_row: Tensor
    """int64 [R], the encoder row that each decoder row attends to."""
    decoder_input_ids: Tensor
    """int64 [R, T], first the mask to fill; [m] where packed."""
    labels: Tensor
    """int64 [R, T], IGNORED on padding; [m] where packed."""
    item_targets: ItemTargets | None = None
    """Of the item head; None: the model has none."""
    visible: Tensor | None = None
    """int64 [R], how many of its sample's encoder tokens a decoder row attends to, from the first
    on; None: all."""
    packing: Packing | None = None
    """Where the sequences of packed arrays start and end; None: the arrays are padded."""
    plan: GradientOrder | None = None
    """For the backward pass of the embedding kernel, where that is used."""


@dataclass(frozen=True, kw_only=True)
class Batch(ModelInputs):
    """One micro-batch."""

    num_samples: int = 0
    """Samples that count; padding samples do not."""
    num_target_tokens: int = 0
    """Labels that are in the loss."""
    num_targets: int = 0
    """Decoder rows that count."""
    num_tokens: int = 0
    """Real tokens of encoder and decoder."""
    num_slots: int = 0
    """Tokens with padding: B x L + R x T, or n + m."""
    work: Work = field(default_factory=Work)
    """Of the samples that count."""

    def to(self, device: torch.device) -> Batch:
        """The batch with all tensors on a device."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
        return replace(self, **moved)


@dataclass(frozen=True)
class RankStep:
    """One rank's share of a step."""

    micro_batches: list[Batch]
    samples_digest: int
    """int64, the wrapping sum of hashes of (sample id, its targets) without padding samples. Ranks
    add theirs up: two runs with one sum took the same samples with the same masks, whatever the
    number of ranks."""
    num_samples: int
    """Samples that count."""
    num_padding: int
    """Repeated samples that only even out the ranks."""
    id_rows: dict[str, Tensor] = field(default_factory=dict)
    """`user`, `item` -> int64 [u], the step's distinct table rows, ascending, where id tables are
    outside the model; the micro-batches then hold indices into them."""

    @property
    def num_target_tokens(self) -> int:
        return sum(batch.num_target_tokens for batch in self.micro_batches)

    @property
    def num_targets(self) -> int:
        return sum(batch.num_targets for batch in self.micro_batches)


def dummy_batch(batch: Batch) -> Batch:
    """The last sequence of a batch with no label: a rank that has run out of micro-batches passes
    it through the layers, so that collectives stay aligned."""
    if batch.packing is None:
        tokens, targets, packing = slice(-1, None), slice(-1, None), None
    else:
        tokens, targets, packing = batch.packing.last_sequence()
    encoder = batch.encoder.map(lambda values: values[tokens])
    labels = torch.full_like(batch.labels[targets], IGNORED)
    zero = torch.zeros(1, dtype=torch.long)
    return Batch(
        encoder=encoder,
        encoder_row=zero,
        decoder_input_ids=batch.decoder_input_ids[targets],
        labels=labels,
        item_targets=None if batch.item_targets is None else ItemTargets(zero, zero + IGNORED),
        visible=None if batch.visible is None else zero + 1,
        packing=packing,
        num_slots=encoder.input_ids.numel() + labels.numel(),
    )
