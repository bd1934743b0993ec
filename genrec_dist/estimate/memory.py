"""The bytes a training rank holds, by formula: state under DDP and each ZeRO stage, and activations
of a micro-batch.

The formulas follow what torch 2.13 and DeepSpeed 0.19.8 allocate;
tests/unit/estimate/test_memory.py holds them against measured storages."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, F feed-forward width, V
# vocabulary, N parameters

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from genrec_kernels.sharded_rows import BLOCK
from torch import nn

from genrec_dist.config.recipe import HeadLoss, Recipe
from genrec_dist.data.batch import Work
from genrec_dist.estimate.flops import flops
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

_BART_BASE = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "heads": 12, "ffn": 3072}
_BART_LARGE = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "heads": 16,
    "ffn": 4096,
}
_KNOWN_BACKBONES = {"facebook/bart-base": _BART_BASE, "facebook/bart-large": _BART_LARGE}
_BART_VOCABULARY, _BART_POSITIONS = 50265, 1024


@dataclass(frozen=True)
class Sizes:
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
    """Whether the tables lie outside the dense parameters, their rows spread over the ranks
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
    """Bytes of a rank, activations apart. All lie on the GPU but for `host`."""

    weights: int
    """What forward and backward read; at stage 3 this rank's part and the small ones that stay
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
    """Copies made when the backward is through, to sum gradients over ranks or to step; no
    activations lie beside them."""
    validation_extra: int
    """The whole float32 model that DeepSpeed's ranks decode with; no gradients or activations lie
    beside it."""
    host: int
    """Bytes in host memory, outside the GPU."""

    @property
    def held(self) -> int:
        """Weights, masters, moments, average and sharded ids: what lies there at any time."""
        return self.weights + self.masters + self.moments + self.average + self.id_rows

    @property
    def total(self) -> int:
        """Everything on the GPU beside activations, between backward and step."""
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
    rows_a_sample: int = 1


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch."""

    saved: int
    """What autograd keeps between forward and backward, the logarithms of the softmax included."""
    encoder: int
    """Of that, what still lies there when the decoder's backward is through."""
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
    """The model's configuration without weights or network. `vocabulary`: tokens; None: the
    backbone's or the recipe's. `spoken`: those of them that a trimmed vocabulary speaks.

    Raises ValueError for a backbone that is neither BART-base, BART-large nor a directory with a
    BART config.json."""
    model, positions = recipe.model, recipe.model.max_tokens
    tokens = recipe.tokens.vocab_size
    if model.backbone is not None:
        shape = _backbone_shape(model.backbone)
        positions, tokens = shape.pop("positions"), shape.pop("vocabulary") + recipe.num_masks - 1
        model = dataclasses.replace(model, backbone=None, **shape)  # type: ignore[arg-type]
    special = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
    config = make_config(
        model,
        ModelSizes(
            vocab_size=vocabulary or tokens,
            num_users=users,
            num_items=items,
            num_masks=recipe.num_masks,
            special=special,
            ids_outside=recipe.optimizer.id_tables == "row-adagrad",
        ),
    )
    config.max_position_embeddings = positions
    config.spoken_tokens = spoken
    return config


def _backbone_shape(backbone: str) -> dict[str, int]:
    if backbone in _KNOWN_BACKBONES:
        return {
            **_KNOWN_BACKBONES[backbone],
            "positions": _BART_POSITIONS,
            "vocabulary": _BART_VOCABULARY,
        }
    path = Path(backbone) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.backbone {backbone}: its shape is not known here; give a directory with its config.json, or one of "
            + ", ".join(_KNOWN_BACKBONES)
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    names = {
        "d_model": "d_model", "encoder_layers": "encoder_layers", "decoder_layers": "decoder_layers",
        "heads": "encoder_attention_heads", "ffn": "encoder_ffn_dim", "positions": "max_position_embeddings",
        "vocabulary": "vocab_size",
    }  # fmt: skip
    missing = [name for name in names.values() if not isinstance(values.get(name), int)]
    if missing:
        raise ValueError(
            f"{path}: {missing[0]} is missing: is it the configuration of a BART model?"
        )
    return {ours: values[theirs] for ours, theirs in names.items()}


def measure_sizes(recipe: Recipe, config: GenRecConfig) -> Sizes:
    """Exact sizes, of a model built without memory."""
    with torch.device("meta"):
        model = GenRecForConditionalGeneration(config)
    outside = config.ids_outside
    tables = [rows for rows in (config.num_users, config.num_items) if rows]
    groups = [
        tuple(p.numel() for p in group["params"])
        for group in build_optimizer(model, recipe.optimizer).param_groups
    ]
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    return Sizes(
        groups=tuple(groups),
        matmul=sum(linear),
        id_tables=tuple(rows if outside else rows + 1 for rows in tables),
        id_dim=config.id_dim or config.d_model,
        ids_outside=outside,
    )


def read_settings(folder: Path | None, method: Method) -> ZeroSettings:
    """What `folder/METHOD.json` says, DeepSpeed's defaults for what it leaves out or where there is
    none."""
    path = folder / f"{method}.json" if folder else None
    found: dict[str, Any] = {}
    if path is not None and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
    default = ZeroSettings()

    def number(name: str, otherwise: int) -> int:
        value = found.get(name, otherwise)
        return otherwise if value == "auto" else int(value)

    return ZeroSettings(
        number("reduce_bucket_size", default.reduce_bucket_size),
        found.get("overlap_comm") is True,
        number("stage3_param_persistence_threshold", default.persistence_threshold),
    )


def state_bytes(
    sizes: Sizes,
    method: Method,
    world_size: int,
    bf16: bool,
    *,
    settings: ZeroSettings | None = None,
    average: bool = False,
    step_id_rows: int = 0,
) -> State:
    """Bytes of the fullest rank of `world_size` under AdamW.

    `step_id_rows`: distinct id rows a rank's share of a step touches; read where the tables lie
    outside the parameters."""
    settings = settings or ZeroSettings()
    masters_of = {"ddp": 0, "zero0": 4 * sizes.dense if bf16 else 0}
    parts = _parts(sizes, method, world_size)
    part = sum(parts)
    state = {
        "weights": 0, "masters": masters_of.get(method, 4 * part), "moments": 8 * part, "gradients": 0,
        "average": 4 * part if average else 0, "id_rows": _ids_outside(sizes, world_size, step_id_rows),
        "buffers": 0, "step_extra": 0, "validation_extra": 0 if method == "ddp" else 4 * sizes.dense, "host": 0,
    }  # fmt: skip
    if method == "ddp":
        state |= _ddp(sizes, world_size)
    elif method == "zero0":
        state |= _zero0(sizes, bf16)
    elif method == "zero1":
        state |= _zero1(sizes, bf16, parts, settings)
    elif method in ("zero2", "zero2_offload"):
        state |= _zero2(sizes, bf16, parts, settings, world_size)
    else:
        state |= _zero3(sizes, bf16, parts, settings, world_size)
    if method.endswith("_offload"):
        _offload(state, sizes, bf16, part, method)
    return State(**state)


def _parts(sizes: Sizes, method: Method, world_size: int) -> list[int]:
    """Elements a rank steps, by optimiser group."""
    if method in ("ddp", "zero0"):
        return [sum(group) for group in sizes.groups]
    if method.startswith("zero3"):  # cuts each parameter
        return [sum(-(-numel // world_size) for numel in group) for group in sizes.groups]
    # Stages 1 and 2 cut each group as a whole, aligned to two elements a rank.
    return [2 * -(-sum(group) // (2 * world_size)) for group in sizes.groups]


def _ids_outside(sizes: Sizes, world_size: int, step_id_rows: int) -> int:
    if not sizes.ids_outside:
        return 0
    held = sum(BLOCK * -(-rows // (BLOCK * world_size)) for rows in sizes.id_tables)
    step = min(step_id_rows, sum(sizes.id_tables))
    return held * (4 * sizes.id_dim + 4) + 2 * 4 * step * sizes.id_dim


def _ddp(sizes: Sizes, world_size: int) -> dict[str, int]:
    buckets = 4 * sizes.dense if world_size > 1 else 0
    return {"weights": 4 * sizes.dense, "gradients": 4 * sizes.dense, "buffers": buckets}


def _zero0(sizes: Sizes, bf16: bool) -> dict[str, int]:
    each = 2 if bf16 else 4
    return {
        "weights": each * sizes.dense,
        "gradients": each * sizes.dense,
        # The sum over ranks is taken in a copy; in bf16 float32 gradients of the masters then stand
        # beside the others.
        "step_extra": max(
            each * min(sizes.dense, ALLREDUCE_ELEMENTS), 4 * sizes.dense if bf16 else 0
        ),
    }


def _zero1(sizes: Sizes, bf16: bool, parts: list[int], settings: ZeroSettings) -> dict[str, int]:
    if bf16:
        # DeepSpeed's BF16_Optimizer keeps the whole float32 gradient beside the bfloat16 one. It is
        # summed over ranks in a bfloat16 copy, of a float32 copy where there are several groups.
        return {
            "weights": 2 * sizes.dense,
            "gradients": (4 + 2) * sizes.dense,
            "step_extra": (6 if len(sizes.groups) > 1 else 2)
            * min(sizes.dense, ALLREDUCE_ELEMENTS),
        }
    return {
        "weights": 4 * sizes.dense,
        "gradients": 4 * sizes.dense,
        "buffers": 4 * _buckets(settings),
        "step_extra": _norm_and_flat(parts, min(sizes.largest, max(parts))),
    }


def _zero2(
    sizes: Sizes, bf16: bool, parts: list[int], settings: ZeroSettings, world_size: int
) -> dict[str, int]:
    each = 2 if bf16 else 4
    return {
        "weights": each * sizes.dense,
        # In float32 DeepSpeed keeps whole each parameter that reaches into the partition.
        "gradients": 4 * sum(parts) if bf16 else 4 * _reaching_in(sizes, world_size),
        "buffers": each * _buckets(settings),
        "step_extra": _norm_and_flat(parts, min(sizes.largest, max(parts))),
    }


def _zero3(
    sizes: Sizes, bf16: bool, parts: list[int], settings: ZeroSettings, world_size: int
) -> dict[str, int]:
    each = 2 if bf16 else 4
    small = sum(n for group in sizes.groups for n in group if n <= settings.persistence_threshold)
    return {
        "weights": each * (sum(parts) + small),
        "gradients": 4 * sum(parts),
        "buffers": each * (settings.reduce_bucket_size + gathered_elements(sizes, settings)),
        "step_extra": _norm_and_flat(parts, -(-sizes.largest // world_size)),
    }


def _norm_and_flat(parts: list[int], largest_piece: int) -> int:
    """The norm is taken of float64 copies, one parameter at a time; then each group's gradient is
    put in one piece."""
    return max(8 * largest_piece, 4 * max(parts))


def gathered_elements(sizes: Sizes, settings: ZeroSettings) -> int:
    """Stage 3: elements that stand whole between forward and backward, beside the small ones that
    always do.

    All of them: DeepSpeed's `stage3_max_live_parameters` releases none (measured), and
    `stage3_max_reuse_distance` only layers, not the embeddings, which the model reads directly."""
    return sum(n for group in sizes.groups for n in group if n > settings.persistence_threshold)


def _buckets(settings: ZeroSettings) -> int:
    return settings.reduce_bucket_size * (2 if settings.overlap_comm else 1)


def _reaching_in(sizes: Sizes, world_size: int) -> int:
    """Elements of the parameters that lie in a rank's partitions at least in part, of the rank with
    the most."""
    return max(
        sum(
            _elements_reaching_in(group, 2 * -(-sum(group) // (2 * world_size)), rank)
            for group in sizes.groups
        )
        for rank in range(world_size)
    )


def _elements_reaching_in(group: Sequence[int], partition: int, rank: int) -> int:
    total = offset = 0
    for numel in group:
        if offset < (rank + 1) * partition and offset + numel > rank * partition:
            total += numel
        offset += numel
    return total


def _offload(state: dict[str, int], sizes: Sizes, bf16: bool, part: int, method: Method) -> None:
    """Move to the host what DeepSpeed offloads, with the copies it makes for it."""
    each = 2 if bf16 else 4
    largest = each * sizes.largest
    host = (
        state["masters"] + state["moments"] + state["average"] + 4 * part
    )  # and the masters' gradients
    state |= {
        "masters": 0,
        "moments": 0,
        "average": 0,
        "step_extra": 0,
    }  # the step is taken on the host
    if method == "zero2_offload":
        host += (
            each * part + largest
        )  # a partition on its way to the GPU; a gradient on its way from it
        state["buffers"] += largest
        if not bf16:
            host += state["gradients"]  # accumulated over micro-batches
            state["gradients"] = 0
    else:
        small = state["weights"] - each * part
        host += each * part + state["gradients"]
        state |= {"weights": small, "gradients": 0}
    state["host"] = host


def activation_bytes(
    config: GenRecConfig,
    sizes: Sizes,
    batch: MicroBatch,
    compute: Compute,
    *,
    mask_bytes: int | None = 1,
    head: HeadLoss = "full",
) -> Activations:
    """What a micro-batch adds, with torch's fused attention.

    `mask_bytes` an element that dropout keeps of what it dropped: 1 on a GPU; None: as on a CPU, an
    element of the input. Attention dropout and ragged shapes are left out: B x L and R x T
    rectangles. `head` liger is taken to hold what chunked does."""
    linear = 4 if compute == "fp32" else 2
    residual = 2 if compute == "bf16" else 4
    rows = batch.samples * batch.rows_a_sample
    inputs, targets = batch.samples * batch.input_tokens, rows * batch.target_tokens
    per_token = _TokenBytes(config, linear, residual, compute == "autocast", mask_bytes)
    device = torch.device("cpu" if mask_bytes is None else "cuda")
    loss = _loss_bytes(config, targets, head, compute, device)
    encoder = inputs * (
        per_token.encoder_embedding() + config.encoder_layers * per_token.encoder_layer()
    )
    decoder = (
        targets
        * (per_token.decoder_embedding() + config.decoder_layers * per_token.decoder_layer())
        + rows * batch.input_tokens * config.decoder_layers * per_token.memory()
        + loss.saved
    )
    if compute == "autocast":  # the weights, cast
        in_encoder = config.encoder_layers * (
            4 * config.d_model**2 + 2 * config.d_model * config.encoder_ffn_dim
        )
        encoder += 2 * in_encoder
        decoder += 2 * (sizes.matmul - in_encoder)
    elif batch.rows_a_sample > 1:  # the encoder's output, repeated; autocast saves its casts alone
        decoder += rows * batch.input_tokens * config.d_model * residual
    # The head's gradient of the shared embedding waits for the decoder's; their sum is a third.
    shared = config.vocab_size * config.d_model
    in_flight = residual * max(3 * shared, shared + sizes.largest)
    return Activations(encoder + decoder, encoder, loss.beside, in_flight)


@dataclass(frozen=True)
class _LossBytes:
    """Of the cross-entropy over the head's logits."""

    saved: int
    """Between forward and backward; beyond what a full head saves of its weight and input, or
    less."""
    beside: int
    """Beside all that is saved, at their most."""


def _loss_bytes(
    config: GenRecConfig, targets: int, head: HeadLoss, compute: Compute, device: torch.device
) -> _LossBytes:
    tokens, width = config.spoken_tokens or config.vocab_size, config.d_model
    if head == "full":
        # The softmax's logarithms; the gradients of the loss by them and by the logits.
        return _LossBytes(targets * tokens * 4, targets * tokens * (4 + 4))
    rows = min(targets, chunk_rows(tokens, width, device))
    gradients = 4 * (tokens + targets) * width
    # A full head saves its input, and under autocast its weight, cast; this one the gradients of
    # both, in float32.
    spared = {"fp32": 4 * targets, "autocast": 2 * (targets + tokens), "bf16": 2 * targets}[
        compute
    ] * width
    # A chunk of logits; in 16 bits also those in float32, a product of the weight's size, and under
    # autocast the weight, cast.
    chunk = (
        rows * tokens * 4
        if compute == "fp32"
        else (2 * rows + 4 * exact_rows(rows, tokens, device)) * tokens
    )
    chunk += {"fp32": 0, "autocast": 4, "bf16": 2}[compute] * tokens * width
    # On the way back the gradients are scaled, and where the weights have 16 bits rounded.
    passed_on = gradients + (gradients // 2 if compute == "bf16" else 0)
    return _LossBytes(gradients - spared, max(chunk, passed_on))


@dataclass(frozen=True)
class _TokenBytes:
    """Bytes autograd saves a token: `linear` an element that matrix products see, `residual` one
    between them."""

    config: GenRecConfig
    linear: int
    residual: int
    casts: bool
    """Whether each linear layer saves a cast copy of its own of its input (autocast), or the input
    itself."""
    mask_bytes: int | None

    def encoder_embedding(self) -> int:
        width = self.config.d_model
        tables = (self.config.num_users > 0) + (self.config.num_items > 0)
        ids = tables * width * self._mask(self.config.id_dropout, self.residual)
        projected = (
            tables * self.config.id_dim * self.linear if self.config.id_dim not in (0, width) else 0
        )
        return self._embedding() + ids + projected + 2 * 8

    def decoder_embedding(self) -> int:
        # Under autocast the head, too, saves a copy of its input; otherwise it takes the last
        # layer's place.
        return self._embedding() + (self.config.d_model * self.linear if self.casts else 0)

    def _embedding(self) -> int:
        width = self.config.d_model
        dropped = width * self._mask(self.config.dropout, self.residual)
        output = 0 if self.casts else width * self.residual
        return self._norms(1) + output + dropped + 2 * 8

    def encoder_layer(self) -> int:
        width = self.config.d_model
        attention = 4 * width * self.linear + 4 * self.config.encoder_attention_heads
        inputs = 4 * width * self.linear if self.casts else 2 * width * self.residual
        dropped = 2 * width * self._mask(self.config.dropout, self.linear)
        return (
            attention
            + inputs
            + dropped
            + self._norms(2)
            + self._feed_forward(self.config.encoder_ffn_dim)
        )

    def decoder_layer(self) -> int:
        width = self.config.d_model
        attention = 6 * width * self.linear + 2 * 4 * self.config.decoder_attention_heads
        inputs = 5 * width * self.linear if self.casts else 3 * width * self.residual
        dropped = 3 * width * self._mask(self.config.dropout, self.linear)
        return (
            attention
            + inputs
            + dropped
            + self._norms(3)
            + self._feed_forward(self.config.decoder_ffn_dim)
        )

    def memory(self) -> int:
        """An encoder token as a decoder layer sees it: its key and value, and what they were made
        of."""
        return self.config.d_model * self.linear * (4 if self.casts else 2)

    def _norms(self, count: int) -> int:
        return count * (self.config.d_model + 2) * self.residual

    def _feed_forward(self, width: int) -> int:
        return width * (2 * self.linear + self._mask(self.config.activation_dropout, self.linear))

    def _mask(self, dropout: float, element: int) -> int:
        if not dropout:
            return 0
        return element if self.mask_bytes is None else self.mask_bytes


def compute_of(method: Method, bf16: bool) -> Compute:
    """What a method computes in: only DeepSpeed holds bfloat16 weights."""
    if not bf16:
        return "fp32"
    return "autocast" if method == "ddp" else "bf16"


def step_flops(config: GenRecConfig, batch: MicroBatch) -> float:
    """Floating-point operations of forward and backward of full rectangles."""
    rows, length, targets = (
        batch.samples * batch.rows_a_sample,
        batch.input_tokens,
        batch.target_tokens,
    )
    counts = Work(
        inputs=batch.samples * length,
        targets=rows * targets,
        labels=rows * targets,
        encoder_pairs=batch.samples * length**2,
        decoder_pairs=rows * targets**2,
        cross_pairs=rows * targets * length,
    )
    return flops(config, counts)
