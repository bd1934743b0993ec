"""The arrays of a batch and the samples a rank takes in a step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from genrec_kernels import GradientOrder
from torch import Tensor

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.packing import Packing

IGNORED = -100
"""Label of positions that are not in the loss."""


@dataclass(frozen=True)
class AskedItems:
    """The item behind each decoder row's mask, which the item head names from the encoder's state
    there."""

    places_R: Tensor
    """int64 [R], the mask's among the encoder's tokens, [B x L] or [n]."""
    items_R: Tensor
    """int64 [R], item rows, IGNORED where nothing is to be learned; of several items behind one
    mask the first."""

    def to(self, device: torch.device) -> AskedItems:
        return AskedItems(
            self.places_R.to(device, non_blocking=True), self.items_R.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class Work:
    """Counts that the operations follow from."""

    inputs: int = 0
    """Encoder tokens."""
    targets: int = 0
    """Decoder tokens."""
    labels: int = 0
    """Those of them that are learned."""
    encoder_pairs: int = 0
    """Sum of L^2 over samples."""
    decoder_pairs: int = 0
    """Sum of T^2 over decoder rows."""
    cross_pairs: int = 0
    """Sum of T x L over decoder rows."""

    def __add__(self, other: Work) -> Work:
        return Work(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work))
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    encoder: EncoderInput
    encoder_row: Tensor
    """int64 [R], the encoder row each decoder row attends to."""
    decoder_input_ids: Tensor
    """int64 [R, T], first the mask to fill; [m] where packed."""
    labels: Tensor
    """int64 [R, T], IGNORED on padding; [m] where packed."""
    num_samples: int
    """Samples that count; padding samples do not."""
    num_target_tokens: int
    num_targets: int
    """Decoder rows that count."""
    num_tokens: int
    """Real tokens of encoder and decoder."""
    num_slots: int
    """Tokens with padding: B x L + R x T, or n + m."""
    plan: GradientOrder | None = None
    """For the backward of the embedding kernel, where that is used."""
    packing: Packing | None = None
    """Where the sequences lie in packed arrays; None: the arrays are padded."""
    work: Work = field(default_factory=Work)
    """What its operations follow from, of the samples that count."""
    asked: AskedItems | None = None
    """What the item head is asked, where there is one."""
    visible: Tensor | None = None
    """int64 [R], encoder tokens that a decoder row may look at, the first so many of its sample's;
    None: all."""

    def to(self, device: torch.device) -> Batch:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in (
            "encoder",
            "encoder_row",
            "decoder_input_ids",
            "labels",
            "plan",
            "packing",
            "asked",
            "visible",
        ):
            values[name] = None if values[name] is None else values[name].to(device)
        return Batch(**values)


@dataclass(frozen=True)
class RankStep:
    """One rank's share of a step."""

    micro_batches: list[Batch]
    samples_digest: int
    """int64, the wrapping sum of hashes of (sample id, its targets), padding left out: ranks add
    theirs up, and two runs that agree in it took the same samples with the same masks, whatever the
    number of ranks."""
    num_samples: int
    """Samples that count."""
    num_padding: int
    """Repeated samples that only even out the ranks."""
    id_rows: dict[str, Tensor] = field(default_factory=dict)
    """`user`, `item` -> int64 [u], the step's distinct table rows, ascending, where id tables live
    outside the model; the micro-batches then hold places among them."""

    @property
    def num_target_tokens(self) -> int:
        return sum(batch.num_target_tokens for batch in self.micro_batches)

    @property
    def num_targets(self) -> int:
        return sum(batch.num_targets for batch in self.micro_batches)


def idle_batch(batch: Batch) -> Batch:
    """One sample that teaches nothing: a rank that has run out of micro-batches goes through the
    layers with it."""
    if batch.packing is None:
        tokens, targets, packing = slice(-1, None), slice(-1, None), None
    else:
        tokens, targets, packing = batch.packing.last()
    one = batch.encoder.map(lambda values: values[tokens])
    labels = torch.full_like(batch.labels[targets], IGNORED)
    return Batch(
        encoder=one,
        encoder_row=torch.zeros(1, dtype=torch.long),
        decoder_input_ids=batch.decoder_input_ids[targets],
        labels=labels,
        num_samples=0,
        num_target_tokens=0,
        num_targets=0,
        num_tokens=0,
        num_slots=one.input_ids.numel() + labels.numel(),
        packing=packing,
        visible=None if batch.visible is None else torch.ones(1, dtype=torch.long),
        asked=batch.asked
        and AskedItems(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORED)),
    )
