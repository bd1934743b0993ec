"""The time of a step: that of arithmetic, memory or the host, whichever is the longest, and of the
optimiser."""

# B samples, R decoder rows, L input tokens, T target tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from genrec_dist.data.batch import Work
from genrec_dist.data.collate import padding_worth_a_batch
from genrec_dist.data.packing import Attended, segments_of
from genrec_dist.data.samples.step import split_packed, split_padded
from genrec_dist.estimate.flops import flops
from genrec_dist.estimate.launches import STEP, Rectangles, launches
from genrec_dist.estimate.memory.activations import MicroBatch, activation_bytes
from genrec_dist.estimate.rates import PASSES, Rates
from genrec_dist.estimate.sizes import ParameterCounts
from genrec_dist.model.genrec import GenRecConfig
from genrec_dist.model.head_loss import resolve_head

LOGIT_BYTES = 32
"""Of a logit: eight passes over float32 in the loss and its gradient."""
OPTIMISER_BYTES = 40
"""Of a parameter in a step: AdamW reads four float32 numbers and writes three, clipping reads the
gradient twice and writes it."""
AVERAGE_BYTES = 12
GRADIENT_BYTES = 12
"""Of a parameter in each further micro-batch of a step, which adds to its gradient."""
NUM_DRAWN = 8
"""Steps whose samples are drawn to represent all."""
WORDS = {
    "arithmetic": "matrix products",
    "memory": "memory between matrix products",
    "host": "the host, which launches operators one by one",
    "optimiser": "the optimiser's memory",
}


@dataclass(frozen=True)
class Rows:
    """The decoder rows of a stage, on average."""

    per_sample: float
    """Of an encoded sequence."""
    target_tokens: float
    """Of a row."""
    labels: float
    """Of them, those in the loss."""
    shares_memory: bool
    """As `MicroBatch.shares_memory`."""


@dataclass(frozen=True)
class StepSetup:
    """What decides a step's time, beside lengths and rates."""

    config: GenRecConfig
    counts: ParameterCounts
    bf16: bool
    packed: bool
    on_cpu: bool
    """Attention then goes by rectangles, and the head by chunks."""
    micro_batch_tokens: int
    average: bool


@dataclass(frozen=True)
class Cost:
    """Of a micro-batch."""

    flops: float
    bytes: float
    """Of activations."""
    weight_bytes: float
    launches: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one process, and where they go."""

    seconds: float
    parts: dict[str, float]
    """`arithmetic`, `memory`, `host`, `optimiser`: the seconds each would take alone."""
    micro_batches: float
    launches: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def step_time(
    setup: StepSetup, rates: Rates, steps: list[list[np.ndarray]], rows: Rows
) -> StepTime:
    """The mean of some drawn steps.

    Args:
        setup: of the run.
        rates: of the device and its host.
        steps: lengths of encoded sequences by micro-batch (`draw`).
        rows: of the stage.
    """
    costs = [[cost(setup, part, rows) for part in step] for step in steps]
    parameters = setup.counts.parameters
    bytes_per_step = parameters * (OPTIMISER_BYTES + AVERAGE_BYTES * setup.average)
    seconds, parts = 0.0, dict.fromkeys(("arithmetic", "memory", "host", "optimiser"), 0.0)
    for step in costs:
        moved = bytes_per_step + GRADIENT_BYTES * parameters * (len(step) - 1)
        optimiser, issued = moved / rates.memory_bandwidth, STEP * rates.launch_seconds
        seconds += max(optimiser, issued) if rates.runs_ahead else optimiser + issued
        parts["optimiser"] += optimiser
        parts["host"] += issued
        for each in step:
            taken = {
                "arithmetic": each.flops / rates.flops,
                "memory": each.bytes / rates.bandwidth + each.weight_bytes / rates.memory_bandwidth,
                "host": each.launches * rates.launch_seconds,
            }
            # A CPU is its own host.
            seconds += max(taken.values()) if rates.runs_ahead else sum(taken.values())
            for name, one in taken.items():
                parts[name] += one
    number = len(costs)
    return StepTime(
        seconds=seconds / number,
        parts={name: one / number for name, one in parts.items()},
        micro_batches=sum(map(len, costs)) / number,
        launches=sum(each.launches for step in costs for each in step) / number + STEP,
    )


def draw(
    setup: StepSetup, lengths: np.ndarray, windows: np.ndarray, samples: int
) -> list[list[np.ndarray]]:
    """Some steps as lengths of the encoded sequences of their micro-batches, cut as training cuts
    them.

    Args:
        setup: of the run.
        lengths: int64, encoder tokens of the stage's samples, or of some that represent them.
        windows: int64, further sequences of the longest length for each of them.
        samples: of a step of this process.
    """
    most_padding = padding_worth_a_batch("cpu" if setup.on_cpu else "cuda", setup.config.d_model)
    split = split_packed if setup.packed else partial(split_padded, most_padding=most_padding)
    random, steps = np.random.default_rng(0), []
    for _ in range(NUM_DRAWN):
        chosen = random.choice(len(lengths), samples)
        further = np.full(windows[chosen].sum(), lengths.max())
        drawn = np.concatenate([lengths[chosen], further])
        steps.append([drawn[part] for part in split(drawn, setup.micro_batch_tokens)])
    return steps


def cost(setup: StepSetup, lengths_B: np.ndarray, rows: Rows) -> Cost:
    """Of a micro-batch of samples of these lengths."""
    config = setup.config
    num_rows = max(round(len(lengths_B) * rows.per_sample), 1)
    lengths_B = lengths_B.astype(np.int64)
    if not setup.packed:
        lengths_B = np.full_like(lengths_B, lengths_B.max())
    inputs, length = int(lengths_B.sum()), max(round(float(lengths_B.mean())), 1)
    targets = num_rows * rows.target_tokens
    work = Work(
        inputs=inputs,
        targets=round(targets),
        labels=round(num_rows * rows.labels),
        encoder_pairs=int((lengths_B**2).sum()),
        decoder_pairs=round(targets * rows.target_tokens),
        cross_pairs=round(rows.per_sample * rows.target_tokens * inputs),
    )
    batch = MicroBatch(
        samples=len(lengths_B),
        input_tokens=length,
        target_tokens=max(round(rows.target_tokens), 1),
        rows_per_sample=max(round(rows.per_sample), 1),
        shares_memory=rows.shares_memory or setup.packed,
    )
    device = torch.device("cpu" if setup.on_cpu else "cuda")
    head = "chunked" if setup.on_cpu else resolve_head("auto", device)
    kept = activation_bytes(
        config, setup.counts, batch, "autocast" if setup.bf16 else "fp32", head=head
    )
    # Weights are read twice and their gradients written; a cast is also made.
    casts = 2 * setup.counts.matmul if setup.bf16 else 0
    logits = work.labels * (config.spoken_tokens or config.vocab_size) * LOGIT_BYTES
    return Cost(
        flops=flops(config, work),
        bytes=PASSES * (kept.saved - casts) + logits,
        weight_bytes=12 * setup.counts.dense + 3 * casts,
        launches=sum(
            launches(config, setup.bf16, rectangles(setup, lengths_B, rows), rows.shares_memory)
        ),
    )


def rectangles(setup: StepSetup, lengths_B: np.ndarray, rows: Rows) -> Rectangles | None:
    """Of a packed micro-batch; None: it is padded."""
    if not setup.packed:
        return None
    if not setup.on_cpu and setup.bf16 and not rows.shares_memory:
        return Rectangles()
    keys = segments_of(lengths_B)
    per_sample = max(round(rows.per_sample * rows.target_tokens), 1)
    queries = segments_of(np.full(len(lengths_B), per_sample))
    of_rows = segments_of(
        np.full(max(round(len(lengths_B) * rows.per_sample), 1), max(round(rows.target_tokens), 1))
    )
    return Rectangles(
        encoder=len(Attended(keys, keys).groups),
        decoder=len(Attended(of_rows, of_rows, by_length=False).groups),
        cross=len(Attended(queries, keys).groups),
    )


def products(
    setup: StepSetup, steps: Sequence[Sequence[np.ndarray]], rows: Rows
) -> list[tuple[int, int, int, float]]:
    """What `cpu_rates` measures: the products of a typical micro-batch, most frequent first."""
    config = setup.config
    parts = [part for step in steps for part in step]
    inputs = round(float(np.mean([part.sum() for part in parts])))
    num_rows = round(float(np.mean([len(part) for part in parts])) * rows.per_sample)
    targets, labels = max(round(num_rows * rows.target_tokens), 1), num_rows * rows.labels
    width, vocabulary = config.d_model, config.spoken_tokens or config.vocab_size
    in_encoder = inputs * config.encoder_layers
    in_decoder = targets * config.decoder_layers
    across = (inputs + targets) * config.decoder_layers
    square = 4 * in_encoder + 4 * in_decoder + 2 * across
    found = [
        (inputs, width, width, float(square * width**2)),
        (inputs, width, config.encoder_ffn_dim, 2.0 * in_encoder * width * config.encoder_ffn_dim),
        (targets, width, config.decoder_ffn_dim, 2.0 * in_decoder * width * config.decoder_ffn_dim),
        (max(round(labels), 1), width, vocabulary, labels * width * vocabulary),
    ]
    return [each for each in found if each[-1]]
