"""A step as two CUDA graphs: forward and backward of a micro-batch of one size, and clipping with
AdamW. A host then launches two things in place of a thousand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genrec_dist.config.recipe import Recipe
from genrec_dist.data.batch import Batch, in_one_buffer, out_of_buffer, places_of
from genrec_dist.training.engine import Engine, Replicated
from genrec_dist.training.step.totals import StepTotals

WARM_UP = 3
"""Steps that are taken operator by operator before a capture: libraries choose their kernels and
AdamW makes its moments."""


def wants_graph(recipe: Recipe) -> bool:
    """Whether a run's steps are captured: `auto` is off until a GPU has shown that they can be."""
    return recipe.step_graph == "on"


def make_graph(engine: Engine, recipe: Recipe) -> StepGraph | None:
    """What takes the steps of a run whose recipe asks for it; None: operators are launched one by
    one. What a recipe itself forbids, `check_recipe` refuses. Raises ValueError naming what cannot
    be captured here, with the way out."""
    if not wants_graph(recipe):
        return None
    if not isinstance(engine, Replicated):
        problem = "DeepSpeed's engine reads values on the host: launch without it"
    elif engine.accelerator.num_processes > 1:
        processes = engine.accelerator.num_processes
        problem = f"{processes} processes: sums over ranks are not captured: train with one"
    elif engine.accelerator.device.type != "cuda":
        problem = (
            f"this run is on {engine.accelerator.device.type} and graphs are CUDA's: train on a GPU"
        )
    else:
        return StepGraph(engine)
    raise ValueError(f"step_graph on: {problem}, or set step_graph off")


@dataclass
class _Captured:
    """Of micro-batches of one layout, trained with one label smoothing."""

    inputs: Tensor
    """uint8, the buffer that each micro-batch is copied into."""
    placed: Batch
    """Where its tensors are in there."""
    steps: int = 0
    """Taken without graphs so far."""
    learn: Any = None
    """torch.cuda.CUDAGraph, once it is captured."""
    finish: Any = None


class StepGraph:
    """Takes a run's steps on tensors that stay where they are. Without `capture` the same
    operators run one by one, as on a CPU."""

    def __init__(self, engine: Replicated, capture: bool = True):
        device = engine.accelerator.device
        self.engine, self.capture = engine, capture
        self.parameters = [p for p in engine.model.parameters() if p.requires_grad]
        self.scale = torch.zeros(2, device=device)
        """1 / target tokens of the step, and target tokens per target."""
        self.rate = torch.zeros((), device=device)
        """The learning rate."""
        self.loss, self.norm = torch.zeros((), device=device), torch.zeros((), device=device)
        for group in engine.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True
        self.captured: dict[tuple[Any, ...], _Captured] = {}

    @property
    def is_captured(self) -> bool:
        """Whether steps have been captured."""
        return any(found.learn is not None for found in self.captured.values())

    def take(
        self,
        batches: list[Batch],
        learning_rate: float,
        totals: StepTotals,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step.

        Args:
            batches: micro-batches of one size, on the CPU.
            learning_rate: of this step.
            totals: of the step.
            label_smoothing: of the stage.

        Returns:
            The loss per target token and the gradient norm: scalars on the device.
        """
        share = 1 / max(totals.target_tokens, 1)
        values = torch.tensor([share, totals.tokens_per_target, learning_rate])
        if self.capture:
            values = values.pin_memory()
        self.scale.copy_(values[:2], non_blocking=True)
        self.rate.copy_(values[2], non_blocking=True)
        self.loss.zero_()
        found = self._of(batches[0], label_smoothing)
        if self.capture and found.learn is None and found.steps >= WARM_UP:
            self._load(found, batches[0])
            found.learn = self._captured(lambda: self._learn(found, label_smoothing))
            found.finish = self._captured(self._finish)
        with self._side_stream(found):
            for batch in batches:
                self._load(found, batch)
                if found.learn is None:
                    self._learn(found, label_smoothing)
                else:
                    found.learn.replay()
            if found.finish is None:
                self._finish()
            else:
                found.finish.replay()
        found.steps += 1
        return self.loss.clone(), self.norm.clone()

    def _of(self, batch: Batch, label_smoothing: float) -> _Captured:
        buffer, placed = in_one_buffer(batch)
        key = (label_smoothing, buffer.numel(), *places_of(placed))
        if key not in self.captured:
            inputs = torch.empty_like(buffer, device=self.engine.accelerator.device)
            self.captured[key] = _Captured(inputs, placed)
        return self.captured[key]

    def _load(self, found: _Captured, batch: Batch) -> None:
        buffer, placed = batch.__dict__.get("_buffered") or in_one_buffer(batch)
        assert places_of(placed) == places_of(found.placed), "micro-batches of two sizes in a step"
        source = buffer.pin_memory() if self.capture else buffer
        found.inputs.copy_(source, non_blocking=True)

    def _learn(self, found: _Captured, label_smoothing: float) -> None:
        """Forward and backward; the gradient is added where it is."""
        # Views made anew: a batch keeps masks that were made of it.
        batch = out_of_buffer(found.inputs, found.placed)
        with self.engine.micro_step(last=True):
            summed = self.engine.loss(batch, label_smoothing, self.scale[1])
            term = summed * self.scale[0]
            self.engine.backward(term)
        self.loss.add_(term.detach())

    def _finish(self) -> None:
        """Clip, step, and clear the gradients in place."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.engine.max_grad_norm)
        self.engine.optimizer.step()
        low = self.engine.low
        if low is not None:
            low.refresh()
        torch._foreach_zero_(grads)
        self.norm.copy_(norm)

    def _captured(self, run: Callable[[], None]) -> Any:
        """A graph of these operators, which do not run yet. CUDA's own generator is part of every
        graph: its seed and its offset are read at each replay."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def _side_stream(self, found: _Captured) -> Any:
        """Warm-up has to happen beside the default stream, on which nothing can be captured."""
        if not self.capture or found.learn is not None:
            return torch.autograd.set_grad_enabled(True)
        return _OnSideStream()


class _OnSideStream:
    """Context of a stream that begins after the current one and that the current one waits for."""

    def __enter__(self) -> None:
        self.before, self.stream = torch.cuda.current_stream(), torch.cuda.Stream()
        self.stream.wait_stream(self.before)
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_stream(self.before)
        self.before.wait_stream(self.stream)
