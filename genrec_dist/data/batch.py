"""The tensors of a micro-batch, and a rank's share of a step."""

# B samples, R decoder rows, L input tokens, T target tokens; packed: n input tokens, m target
# tokens

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from genrec_kernels import GradientOrder
from genrec_shards.sequences import offsets_of
from torch import Tensor

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.packing import Packing

IGNORED = -100
"""Label of positions that are not in the loss."""

_ALIGN = 16  # bytes: what a kernel reads in its widest loads
T = TypeVar("T")


class Place(NamedTuple):
    """Where a tensor is in a buffer."""

    first: int
    """Its first byte."""
    shape: torch.Size
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, a view of a buffer of bytes."""
        numbers = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.first : self.first + numbers].view(self.dtype).view(self.shape)


def in_one_buffer(value: T) -> tuple[Tensor, T]:
    """The bytes of all tensors of nested dataclasses in one tensor of the CPU, and the dataclasses
    with a `Place` instead of each tensor."""
    tensors: list[tuple[Place, Tensor]] = []

    def put(tensor: Tensor) -> Place:
        first = 0
        if tensors:
            last, before = tensors[-1]
            first = last.first + -(-before.nbytes // _ALIGN) * _ALIGN
        tensors.append((Place(first, tensor.shape, tensor.dtype), tensor))
        return tensors[-1][0]

    placed = _mapped(value, Tensor, put)
    size = tensors[-1][0].first + tensors[-1][1].nbytes if tensors else 0
    buffer = torch.empty(size, dtype=torch.uint8)
    for place, tensor in tensors:
        place.of(buffer).copy_(tensor)
    return buffer, placed


def out_of_buffer(buffer: Tensor, placed: T) -> T:
    """What `in_one_buffer` was given, its tensors views of the buffer, wherever that is now."""
    return _mapped(placed, Place, lambda place: place.of(buffer))


def places_of(placed: Any) -> tuple[Place, ...]:
    """The places in nested dataclasses, in order: equal for values of the same shapes."""
    found: list[Place] = []
    _mapped(placed, Place, found.append)
    return tuple(found)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of nested dataclasses with each value of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {item.name: getattr(value, item.name) for item in fields(value)}
    return replace(value, **{name: _mapped(one, kind, change) for name, one in held.items()})


@dataclass(frozen=True)
class ItemTargets:
    """What the item head predicts: for each decoder row an item, from the encoder's state at the
    row's mask."""

    places_R: Tensor
    """int64 [R], index of the mask among the encoder's tokens, [B x L] or packed [n]."""
    items_R: Tensor
    """int64 [R], item rows, IGNORED where a row is not in the loss; of several items for one mask
    the first."""
    learned: Tensor
    """int64, the rows that are in the loss."""


@dataclass(frozen=True)
class SoftTargets:
    """Tokens that take a part of the targets' probability in the loss."""

    tokens_nK: Tensor
    """int64, for each label that is in the loss, in their order; for a softmax over siblings the
    nodes that they lead to."""
    shares_nK: Tensor
    """float32, of each token; what is left of 1 is the label's."""


@dataclass(frozen=True)
class SampleRows:
    """Where decoder rows are among places for equally many rows of each sample."""

    places_R: Tensor
    """int64 [R]: sample x most + number of the row in its sample."""
    most: int
    """Rows of the sample that has most."""

    @staticmethod
    def of(row_sample: np.ndarray) -> SampleRows:
        """Of decoder rows numbered by sample: int64 [R], the sample of each, ascending."""
        # Rows of samples 0 0 0 2: counts [3 0 1], most 3, numbers in their samples 0 1 2 0, places
        # 0 1 2 6.
        counts = np.bincount(row_sample)
        numbers = np.arange(len(row_sample)) - offsets_of(counts)[row_sample]
        most = int(counts.max(initial=0))
        return SampleRows(torch.from_numpy(row_sample * most + numbers), most)


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
    learned: Tensor | None = None
    """int64, indices in the flat labels of those that are in the loss. None: they are looked for,
    for which a device is waited for."""
    children: Tensor | None = None
    """int64 [n], the node of the trie that each label in the loss leads to; None: the softmax is
    not one over siblings."""
    item_targets: ItemTargets | None = None
    """Of the item head; None: the model has none."""
    soft: SoftTargets | None = None
    """None: the labels alone are learned."""
    visible: Tensor | None = None
    """int64 [R], how many of its sample's encoder tokens a decoder row attends to, from the first
    on; None: all."""
    rows: SampleRows | None = None
    """Of padded inputs with `visible`."""
    packing: Packing | None = None
    """Where the sequences of packed arrays start and end; None: the arrays are padded."""
    plan: GradientOrder | None = None
    """For the backward pass of the embedding kernel, where that is used."""

    def learned_places(self) -> Tensor:
        """`learned`, whoever made these inputs."""
        if self.learned is not None:
            return self.learned
        return (self.labels.flatten() != IGNORED).nonzero()[:, 0]


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

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Tensor, dict[str, Any]]]:
        # Another process is sent the handle of one tensor instead of those of ten and more.
        buffer, placed = in_one_buffer(self)
        return _received, (buffer, {item.name: getattr(placed, item.name) for item in fields(self)})

    def to(self, device: torch.device) -> Batch:
        """The batch with all tensors on a device: one copy, from pinned memory where that is a
        GPU, and nobody waits for it."""
        if device.type == "cpu":
            return self
        buffer, placed = self.__dict__.get("_buffered") or in_one_buffer(self)
        if device.type == "cuda":
            buffer = buffer.pin_memory()
        return out_of_buffer(buffer.to(device, non_blocking=True), placed)


def _received(buffer: Tensor, placed: dict[str, Any]) -> Batch:
    """A batch that another process has sent."""
    batch = out_of_buffer(buffer, Batch(**placed))
    batch.__dict__["_buffered"] = buffer, Batch(**placed)  # `to` takes it as it is
    return batch


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
    zero, nothing = torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long)
    return Batch(
        encoder=encoder,
        encoder_row=zero,
        decoder_input_ids=batch.decoder_input_ids[targets],
        labels=labels,
        learned=nothing,
        children=None if batch.children is None else nothing,
        item_targets=None
        if batch.item_targets is None
        else ItemTargets(zero, zero + IGNORED, nothing),
        visible=None if batch.visible is None else zero + 1,
        rows=None if batch.rows is None else SampleRows(zero, most=1),
        packing=packing,
        num_slots=encoder.input_ids.numel() + labels.numel(),
    )
