"""The bytes that a micro-batch adds to a rank's state, by formula.

The formulas follow what torch 2.13 saves; tests/unit/estimate/test_memory.py compares them with
measured storages."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, F feed-forward width, V
# vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from genrec_dist.config.recipe import HeadLoss
from genrec_dist.estimate.memory.state import Method
from genrec_dist.estimate.sizes import ParameterCounts
from genrec_dist.model.genrec import GenRecConfig
from genrec_dist.model.head_loss import chunk_rows, exact_rows

Compute = Literal["fp32", "autocast", "bf16"]
"""float32; float32 weights under autocast to 16 bits (DDP); bfloat16 weights (DeepSpeed)."""


@dataclass(frozen=True)
class MicroBatch:
    samples: int
    input_tokens: int
    """L, padding included."""
    target_tokens: int
    """T, labels of a decoder row."""
    rows_per_sample: int = 1
    shares_memory: bool = False
    """The rows of a sample are queries over one copy of its keys and values (`all-prefixes`)."""
    soft_items: int = 0
    """Items of the soft target of each label."""


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
    batch: int = 0
    """Of what came with it: the soft targets. (Its tokens are among what is saved.)"""

    @property
    def total(self) -> int:
        return self.batch + max(self.saved + self.logits, self.encoder + self.in_flight)


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
    read = inputs if batch.shares_memory else rows * batch.input_tokens
    decoder += read * config.decoder_layers * memory + loss_saved
    if batch.shares_memory:
        # The rows of a sample are put side by side and taken apart again; one mask for all layers.
        decoder += targets * (config.decoder_layers * width + batch.input_tokens) * linear
    if casts:  # the weights, cast
        in_layer = 4 * width**2 + 2 * width * config.encoder_ffn_dim
        encoder += 2 * config.encoder_layers * in_layer
        decoder += 2 * (counts.matmul - config.encoder_layers * in_layer)
    elif (
        batch.rows_per_sample > 1 and not batch.shares_memory
    ):  # the encoder's output, repeated; autocast saves casts alone
        decoder += rows * batch.input_tokens * width * residual
    # The head's gradient of the shared embedding waits for the decoder's; their sum is a third.
    shared = config.vocab_size * width
    in_flight = residual * max(3 * shared, shared + counts.largest)
    if counts.text is not None:
        # The head holds the table with the texts in it; in the end there is their gradient.
        decoder += 4 * shared
        in_flight += 4 * counts.text.items * width
    soft, batch_bytes = _soft_bytes(targets, batch.soft_items, width, casts, device)
    if batch.soft_items:
        # Their gradients of the shared embedding come first, and wait for the head's.
        logits = max(logits + 4 * shared, 3 * 4 * shared)
    return Activations(encoder + decoder + soft, encoder, logits, in_flight, batch_bytes)


def _soft_bytes(
    targets: int, items: int, width: int, casts: bool, device: torch.device
) -> tuple[int, int]:
    """(saved between forward and backward, of the batch itself) of soft targets of so many items
    for each target."""
    if not items:
        return 0, 0
    # The difference of rows, and the states in float32; a GPU numbers the bags.
    saved = targets * width * 4 * (2 if casts else 1)
    saved += 8 * targets * items if device.type == "cuda" else 0
    return saved, targets * items * (8 + 4)


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
