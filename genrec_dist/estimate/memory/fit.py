"""How large micro-batches may be in a GPU's memory."""

# T target tokens

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from genrec_dist.config.recipe import CPU_MICRO_BATCH, Recipe
from genrec_dist.config.validate import most_graph_tokens
from genrec_dist.estimate.memory.activations import activation_bytes, compute_of
from genrec_dist.estimate.memory.state import Method, State, ZeroSettings, state_bytes
from genrec_dist.estimate.samples import Samples
from genrec_dist.estimate.sizes import ParameterCounts
from genrec_dist.model.genrec import GenRecConfig

GIB = 2**30
RESERVE_GIB = 1.5
"""Kept free for the CUDA context, libraries' workspaces and fragmentation; not measured."""
MARGIN = 0.1
"""Share of a card's free memory that `micro_batch_tokens: auto` leaves besides: no figure of a
forecast has been checked on a GPU."""
LARGEST_SEARCHED = 1 << 24
_STEP = 256


@dataclass(frozen=True)
class Fit:
    """One way to spread the weights."""

    method: Method
    state: State
    peak: int
    """Bytes on the GPU at their most, with the recipe's micro-batches."""
    largest: int
    """The largest `micro_batch_tokens` that fits; 0: not even the longest sample."""

    def fits(self, limit: float) -> bool:
        return self.peak <= limit


@dataclass(frozen=True)
class RankMemory:
    """What of a run decides the memory of its ranks on GPUs."""

    recipe: Recipe
    config: GenRecConfig
    counts: ParameterCounts
    samples: list[Samples]
    gpus: int

    @property
    def step_tokens(self) -> int:
        """The most encoder tokens of a rank's share of a step."""
        return max(
            each.per_rank(self.gpus) * int(each.lengths[-1]) * (1 + int(each.windows.max()))
            for each in self.samples
        )

    def state(self, method: Method, settings: ZeroSettings | None = None) -> State:
        # At most one user per sample, and each token an item of its own.
        rows = [each.per_rank(self.gpus) * (1 + each.lengths.mean()) for each in self.samples]
        return state_bytes(
            self.counts,
            method,
            self.gpus,
            self.recipe.precision != "fp32",
            settings=settings,
            average=self.recipe.optimizer.ema_decay > 0,
            step_id_rows=int(max(rows)),
            soft_targets=sum(each.soft_bytes for each in self.samples),
        )

    def activations(self, method: Method, tokens: int, whole_steps: bool) -> int:
        """Bytes that micro-batches of so many tokens add at their most, of samples of one length
        each; `whole_steps`: with no more of them than a rank's share of a step has."""
        compute = compute_of(method, self.recipe.precision != "fp32")
        # What `auto` means on a GPU.
        head = "full" if self.recipe.head == "auto" else self.recipe.head
        most = 0
        for each in self.samples:
            for length in map(int, each.quantiles):
                count = max(1, tokens // length)
                if whole_steps:
                    count = min(count, each.per_rank(self.gpus))
                batch = each.micro_batch(count, length)
                found = activation_bytes(self.config, self.counts, batch, compute, head=head)
                most = max(most, found.total)
        return most

    def fit(self, method: Method, limit: float, settings: ZeroSettings | None = None) -> Fit:
        """What a method needs, and the largest micro-batch within `limit` bytes."""
        state = self.state(method, settings)
        largest = _largest(
            lambda tokens: state.peak(self.activations(method, tokens, False)) <= limit
        )
        used = self.activations(method, self.recipe.micro_batch_tokens, True)
        return Fit(method, state, state.peak(used), largest)

    def micro_batch_tokens(
        self, method: Method, free: float, settings: ZeroSettings | None = None
    ) -> int:
        """What `micro_batch_tokens: auto` is on a GPU: the largest number within its free memory
        but for `RESERVE_GIB` and `MARGIN`, and no more than a whole step has.

        Args:
            method: How the weights are spread.
            free: Bytes that are free on the card before the model is on it, the smallest of the
                ranks'.
            settings: Of the DeepSpeed file.

        Raises:
            ValueError: Where not one longest sample fits.
        """
        longest = self.recipe.model.max_tokens
        limit = usable(free)
        largest = self.fit(method, limit, settings).largest
        if largest < longest:
            needed = self.state(method, settings).peak(self.activations(method, longest, False))
            raise ValueError(
                f"micro_batch_tokens auto: one sample of model.max_tokens {longest} needs "
                f"{needed / GIB:.1f} GiB on a GPU, and of {free / GIB:.1f} GiB that are free on "
                f"the smallest card {max(limit, 0) / GIB:.1f} may be used: lower model.max_tokens, "
                "see genrec plan for methods that need less, or give a number"
            )
        whole = max(_STEP * -(-self.step_tokens // _STEP), longest)
        captured = most_graph_tokens(self.recipe) if self.recipe.step_graph == "on" else whole
        return int(min(largest, whole, max(captured, longest)))


def usual_micro_batch(recipe: Recipe) -> int:
    """What `auto` is where no memory decides it."""
    return max(CPU_MICRO_BATCH, recipe.model.max_tokens)


def usable(free: float) -> float:
    """Bytes that `auto` may fill of those that are free."""
    return (1 - MARGIN) * free - RESERVE_GIB * GIB


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest multiple of 256 that fits, which is monotone; 0 if none does."""
    low, high = 0, LARGEST_SEARCHED // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP
