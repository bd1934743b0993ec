"""The bytes of a training rank, by formula: state under DDP and each ZeRO stage, and activations of
a micro-batch.

Parameters are counted on a model built on the meta device. The formulas follow what torch 2.13 and
DeepSpeed 0.19.8 allocate; tests/unit/estimate/test_memory.py compares them with measured
storages."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, F feed-forward width, V
# vocabulary

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from genrec_kernels.sharded_rows import BLOCK
from genrec_shards.readers.documents import read_object
from torch import nn

from genrec_dist.config.recipe import HeadLoss, Recipe
from genrec_dist.model.build import ModelSizes, make_config
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.model.head_loss import chunk_rows, exact_rows
from genrec_dist.model.optimizer import build_optimizer

Method = Literal["ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
METHODS: tuple[Method, ...] = get_args(Method)
Compute = Literal["fp32", "autocast", "bf16"]
"""float32; float32 weights under autocast to 16 bits (DDP); bfloat16 weights (DeepSpeed)."""

ALLREDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed copies into one buffer to sum them, where it has not partitioned
them."""


@dataclass(frozen=True)
class BackboneSizes:
    """The shape of a BART model: width, layers, heads and feed-forward width as in a recipe."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn: int
    positions: int = 1024
    vocabulary: int = 50_265

    @property
    def shape(self) -> dict[str, Any]:
        """The keys of a recipe's `model` section that make a model of this shape."""
        values = dataclasses.asdict(self)
        return {key: values[key] for key in values if key not in ("positions", "vocabulary")}


BACKBONES = {
    "facebook/bart-base": BackboneSizes(768, 6, 6, 12, 3072),
    "facebook/bart-large": BackboneSizes(1024, 12, 12, 16, 4096),
}
"""The backbones of the paper; of others the configuration has to be at hand."""


@dataclass(frozen=True)
class ParameterCounts:
    """What a model is made of, as far as memory is concerned."""

    groups: tuple[tuple[int, ...], ...]
    """Elements of each dense parameter, by optimiser group, in the optimiser's order."""
    matmul: int
    """Elements of the weights of linear layers, the tied head's included: what autocast casts."""
    id_tables: tuple[int, ...]
    """Rows of each id table."""
    id_dim: int
    """Width of an id row."""
    ids_outside: bool
    """Whether the tables are outside the dense parameters, their rows spread over the ranks
    (row-adagrad)."""

    @property
    def dense(self) -> int:
        """Elements of all dense parameters."""
        return sum(map(sum, self.groups))

    @property
    def ids(self) -> int:
        """Elements of the id tables, whether they are among the dense parameters or not."""
        return sum(self.id_tables) * self.id_dim

    @property
    def parameters(self) -> int:
        return self.dense + (self.ids if self.ids_outside else 0)

    @property
    def largest(self) -> int:
        return max(max(group) for group in self.groups)


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
    """Bytes in host memory."""

    @property
    def held(self) -> int:
        """What is there at any time: weights, masters, moments, average and sharded ids."""
        return self.weights + self.masters + self.moments + self.average + self.id_rows

    @property
    def total(self) -> int:
        """Everything on the GPU but activations, between backward and step."""
        return self.held + self.gradients + self.buffers

    def peak(self, activations: int) -> int:
        """The largest of: a micro-batch of so many bytes, the optimiser's step, a validation
        (decoding apart)."""
        step = self.held + self.gradients + self.step_extra
        return max(self.total + activations, step, self.held + self.validation_extra)


@dataclass(frozen=True)
class MicroBatch:
    samples: int
    input_tokens: int
    """L, padding included."""
    target_tokens: int
    """T, labels of a decoder row."""
    rows_per_sample: int = 1


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch."""

    saved: int
    """What autograd keeps between forward and backward, the logarithms of the softmax included."""
    encoder: int
    """Of that, what is still there after the decoder's backward."""
    logits: int
    """Logits and their gradients, or chunks of them, beside it where the backward begins."""
    in_flight: int
    """Gradients of the shared embedding that are added up, after the decoder's backward."""

    @property
    def total(self) -> int:
        return max(self.saved + self.logits, self.encoder + self.in_flight)


def build_config(
    recipe: Recipe, users: int, items: int, vocabulary: int | None = None, spoken: int = 0
) -> GenRecConfig:
    """The model's configuration, without weights or network.

    Args:
        recipe: Its `model` section, or its backbone's shape.
        users: Number of users.
        items: Number of items.
        vocabulary: Number of tokens; None: the backbone's or the recipe's.
        spoken: Tokens of a trimmed vocabulary that share the output's probability.

    Raises:
        ValueError: For a backbone that is neither BART-base, BART-large nor a directory with a BART
            config.json.
    """
    model, positions, tokens = recipe.model, recipe.model.max_tokens, recipe.tokens.vocab_size
    if model.backbone is not None:
        sizes = BACKBONES.get(model.backbone) or _read_sizes(model.backbone)
        positions, tokens = sizes.positions, sizes.vocabulary + recipe.num_masks - 1
        model = dataclasses.replace(model, backbone=None, **sizes.shape)
    config = make_config(
        model,
        ModelSizes(
            vocab_size=vocabulary or tokens,
            num_users=users,
            num_items=items,
            num_masks=recipe.num_masks,
            special={"bos": 0, "pad": 1, "eos": 2, "mask": 4},
            ids_outside=recipe.optimizer.id_tables == "row-adagrad",
        ),
    )
    assert isinstance(config, GenRecConfig)  # of a T5 nothing is foretold
    config.max_position_embeddings = positions
    config.spoken_tokens = spoken
    return config


def _read_sizes(backbone: str) -> BackboneSizes:
    path = Path(backbone) / "config.json"
    if not path.is_file():
        known = ", ".join(BACKBONES)
        raise ValueError(
            f"model.backbone {backbone}: its shape is not known here; give a directory with its "
            f"config.json, or one of {known}"
        )
    values = read_object(path)
    names = {"heads": "encoder_attention_heads", "ffn": "encoder_ffn_dim"}
    names |= {"positions": "max_position_embeddings", "vocabulary": "vocab_size"}
    sizes = {}
    for field in dataclasses.fields(BackboneSizes):
        name = names.get(field.name, field.name)
        if not isinstance(values.get(name), int):
            raise ValueError(f"{path}: {name} is missing: is it the configuration of a BART model?")
        sizes[field.name] = values[name]
    return BackboneSizes(**sizes)


def count_parameters(recipe: Recipe, config: GenRecConfig) -> ParameterCounts:
    """The exact counts, of a model built on the meta device."""
    with torch.device("meta"):
        model = GenRecForConditionalGeneration(config)
    outside = config.ids_outside
    tables = [rows for rows in (config.num_users, config.num_items) if rows]
    groups = build_optimizer(model, recipe.optimizer).param_groups
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    return ParameterCounts(
        groups=tuple(tuple(value.numel() for value in group["params"]) for group in groups),
        matmul=sum(linear),
        id_tables=tuple(rows if outside else rows + 1 for rows in tables),
        id_dim=config.id_dim or config.d_model,
        ids_outside=outside,
    )


def read_settings(folder: Path | None, method: Method) -> ZeroSettings:
    """The settings in `folder/METHOD.json`; DeepSpeed's defaults for what it leaves out, or where
    there is no such file."""
    path = folder / f"{method}.json" if folder else None
    found: dict[str, Any] = {}
    if path is not None and path.is_file():
        found = read_object(path).get("zero_optimization", {})
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
        id_rows = held * (4 * counts.id_dim + 4) + 2 * 4 * of_step * counts.id_dim
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


def activation_bytes(
    config: GenRecConfig,
    counts: ParameterCounts,
    batch: MicroBatch,
    compute: Compute,
    *,
    mask_bytes: int | None = 1,
    head: HeadLoss = "full",
) -> Activations:
    """Bytes that a micro-batch adds, with torch's fused attention and full B x L and R x T
    rectangles; attention dropout is left out.

    Args:
        config: Of the model.
        counts: Of the model.
        batch: The micro-batch.
        compute: What is computed in.
        mask_bytes: Bytes per element that dropout keeps of what it dropped: 1 on a GPU; None: as on
            a CPU, an element of the input.
        head: How the loss is computed; liger is taken to hold what chunked does.
    """
    width, casts = config.d_model, compute == "autocast"
    # Bytes of an element that matrix products see, and of one between them.
    linear, residual = 4 if compute == "fp32" else 2, 2 if compute == "bf16" else 4
    rows = batch.samples * batch.rows_per_sample
    inputs, targets = batch.samples * batch.input_tokens, rows * batch.target_tokens

    def mask(dropout: float, element: int) -> int:
        return (element if mask_bytes is None else mask_bytes) if dropout else 0

    def layer(attentions: int, heads: int, ffn: int) -> int:
        """Per token: queries, keys, values and outputs; the normalisers; inputs of linear layers,
        of which autocast saves a cast copy each; what dropout and layer norms keep."""
        blocks = attentions + 1
        inputs = (3 + attentions) * linear if casts else blocks * residual
        attended = (2 + 2 * attentions) * linear * width + 4 * attentions * heads
        dropped = blocks * width * mask(config.dropout, linear)
        fed = ffn * (2 * linear + mask(config.activation_dropout, linear))
        return attended + inputs * width + dropped + blocks * (width + 2) * residual + fed

    embedding = (width + 2) * residual + (0 if casts else width * residual) + 2 * 8
    embedding += width * mask(config.dropout, residual)
    tables = (config.num_users > 0) + (config.num_items > 0)
    ids = tables * width * mask(config.id_dropout, residual) + 2 * 8
    ids += tables * config.id_dim * linear if config.id_dim not in (0, width) else 0
    encoder_layer = layer(1, config.encoder_attention_heads, config.encoder_ffn_dim)
    decoder_layer = layer(2, config.decoder_attention_heads, config.decoder_ffn_dim)
    # Under autocast the head, too, saves a copy of its input; else it takes the last layer's place.
    head_input = width * linear if casts else 0
    # An encoder token as a decoder layer sees it: its key and value, and what they were made of.
    memory = width * linear * (4 if casts else 2)
    device = torch.device("cpu" if mask_bytes is None else "cuda")
    loss_saved, logits = _loss_bytes(config, targets, head, compute, device)
    encoder = inputs * (embedding + ids + config.encoder_layers * encoder_layer)
    decoder = targets * (embedding + head_input + config.decoder_layers * decoder_layer)
    decoder += rows * batch.input_tokens * config.decoder_layers * memory + loss_saved
    if casts:  # the weights, cast
        in_layer = 4 * width**2 + 2 * width * config.encoder_ffn_dim
        encoder += 2 * config.encoder_layers * in_layer
        decoder += 2 * (counts.matmul - config.encoder_layers * in_layer)
    elif batch.rows_per_sample > 1:  # the encoder's output, repeated; autocast saves casts alone
        decoder += rows * batch.input_tokens * width * residual
    # The head's gradient of the shared embedding waits for the decoder's; their sum is a third.
    shared = config.vocab_size * width
    in_flight = residual * max(3 * shared, shared + counts.largest)
    return Activations(encoder + decoder, encoder, logits, in_flight)


def _loss_bytes(
    config: GenRecConfig, targets: int, head: HeadLoss, compute: Compute, device: torch.device
) -> tuple[int, int]:
    """Bytes of the cross-entropy: (saved between forward and backward, beyond what a full head
    saves of its weight and input, or less; beside all that is saved, at their most)."""
    tokens, width = config.spoken_tokens or config.vocab_size, config.d_model
    if head == "full":
        # The softmax's logarithms; the gradients of the loss by them and by the logits.
        return targets * tokens * 4, targets * tokens * (4 + 4)
    rows = min(targets, chunk_rows(tokens, width, device))
    gradients = 4 * (tokens + targets) * width
    # A full head saves its input, and under autocast its weight, cast; this one the gradients of
    # both, in float32. A chunk of logits; in 16 bits also those in float32, a product of the
    # weight's size, and under autocast the weight, cast.
    if compute == "fp32":
        spared, chunk = 4 * targets, rows * tokens * 4
    else:
        chunk = (2 * rows + 4 * exact_rows(rows, tokens, device)) * tokens
        chunk += (4 if compute == "autocast" else 2) * tokens * width
        spared = 2 * (targets + tokens) if compute == "autocast" else 2 * targets
    # On the way back the gradients are scaled, and where the weights have 16 bits rounded.
    passed_on = gradients + (gradients // 2 if compute == "bf16" else 0)
    return gradients - spared * width, max(chunk, passed_on)


def compute_of(method: Method, bf16: bool) -> Compute:
    """What a method computes in: only DeepSpeed holds bfloat16 weights."""
    if not bf16:
        return "fp32"
    return "autocast" if method == "ddp" else "bf16"
