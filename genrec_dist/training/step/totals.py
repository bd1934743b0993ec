"""What the ranks must know of a step together."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from torch import Tensor

from genrec_dist.data.batch import RankStep
from genrec_dist.distributed.collectives import Ranks

Pair = tuple[Tensor, Tensor]
"""The loss per target token and the gradient norm of a step, scalars on the device."""


@dataclass(frozen=True)
class StepTotals:
    """What the ranks must know of a step together, summed over them."""

    target_tokens: int
    targets: int
    """Decoder rows."""
    samples: int
    padding_samples: int
    samples_digest: str
    """64 bits in hex: the same for the same samples with the same masks, on any number of ranks."""
    micro_steps: int
    """Most micro-batches that a rank has."""
    stop: int
    """Signal that any rank has received, or 0."""
    saving_ended: bool
    """Whether the writing of a checkpoint has ended on all ranks, well or not."""
    save_due: bool
    """Whether a checkpoint is to follow the step, by rank 0's clock."""

    @property
    def tokens_per_target(self) -> float:
        return self.target_tokens / max(self.targets, 1)


def total(
    share: RankStep, stop: int, ranks: Ranks, saving_ended: bool = True, save_due: bool = False
) -> StepTotals:
    """The totals of a step, before it is taken: all ranks divide by the same tokens and stop at the
    same step. Collective.

    Args:
        share: this rank's.
        stop: signal that this rank has received, or 0.
        ranks: that take the step.
        saving_ended: whether this rank writes no checkpoint.
        save_due: whether a checkpoint is to follow by this rank's clock.
    """
    mine = [
        share.num_target_tokens,
        share.num_targets,
        share.num_samples,
        share.num_padding,
        share.samples_digest,
        len(share.micro_batches),
        stop,
        saving_ended,
        save_due,
    ]
    columns = zip(*ranks.exchange(mine), strict=True)
    tokens, targets, samples, padding, digests, micro_steps, stops, ended, due = columns
    return StepTotals(
        target_tokens=sum(tokens),
        targets=sum(targets),
        samples=sum(samples),
        padding_samples=sum(padding),
        samples_digest=f"{sum(digests) % 2**64:016x}",
        micro_steps=max(micro_steps),
        stop=signal.SIGTERM if signal.SIGTERM in stops else max(stops),
        saving_ended=all(ended),
        save_due=bool(due[0]),
    )
