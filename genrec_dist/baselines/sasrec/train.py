"""Training of SASRec: every position of the training parts, all items in the softmax, stopped by
validation."""

# U users, B users of a batch, n positions of a batch

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from genrec_shards.histories import sample_users, training_counts
from genrec_shards.keyed_random import keyed_permutation, mixed_key
from genrec_shards.numbering.cooccurrence import neighbour_vectors
from genrec_shards.sequences import Sequences, flat_ranges
from genrec_shards.splits import TrainedThrough
from torch import Tensor

from genrec_dist.baselines.sasrec.bsarec import BSARec, BsarecSettings
from genrec_dist.baselines.sasrec.model import Packed, SASRec, SasrecSettings, pack, target_places
from genrec_dist.config.recipe import Optimizer
from genrec_dist.data.batch import SoftTargets
from genrec_dist.data.samples.soft_targets import Teacher
from genrec_dist.distributed.signals import NotFinite
from genrec_dist.evaluation.metrics import (
    METRICS,
    as_written,
    metrics_from_histogram,
    rank_histogram,
)
from genrec_dist.model.item_rows import MOST_FACTORS, item_text_of, turn_rows
from genrec_dist.model.optimizer import AveragedWeights, build_optimizer

_INIT_STREAM, _ORDER_STREAM, _DROPOUT_STREAM = 0x5A50, 0x5A51, 0x5A52


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over."""

    epoch: int
    """Counted from 1."""
    step: int
    """Optimiser steps so far."""
    loss: float
    """Mean cross-entropy a target of the epoch, dropout on."""
    scores: dict[str, float]
    """`METRICS` on the validation users; empty where nothing is left to validate on."""
    users: int
    """Validated."""
    seconds: float
    """Since training began, validation included."""
    best: bool
    """The best epoch so far, whose weights are kept."""

    def __str__(self) -> str:
        names = ("HR@10", "NDCG@10") if self.scores else ()
        scores = "".join(f", {name} {as_written(self.scores[name])}" for name in names)
        best = " (best)" if self.best else ""
        return f"epoch {self.epoch}: loss {self.loss:.4f}{scores}{best}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Progress:
    """All that the rest of a training depends on, after an epoch."""

    last: Epoch
    best: Epoch
    tensors: dict[str, Tensor]
    """`weights.`, `average.`, `exp_avg.`, `exp_avg_sq.` and `steps.` of each parameter, and `best.`
    of each of the model's tensors. Order and dropout are functions of seed, epoch and step: no
    random state is among them. While the training goes on they are its own, not copies."""


@dataclass(frozen=True)
class Trained:
    model: SASRec
    """With the weights of the best epoch, out of training mode."""
    best: Epoch
    last: Epoch


def train(
    sequences: Sequences,
    settings: SasrecSettings,
    *,
    exclude_history: bool,
    trained_through: TrainedThrough = "n-2",
    texts_IF: np.ndarray | None = None,
    teacher: Teacher | None = None,
    on_epoch: Callable[[Epoch, SASRec], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train until NDCG@10 on validation has not been better for `patience` epochs; through n-1:
    `epochs` epochs, no validation.

    The same settings and training parts give the same weights at every epoch, bit for bit on one
    machine with one number of threads; held-out items only choose the epoch. The caller's random
    state is left as it was.

    Args:
        sequences: The data.
        settings: Of model and training.
        exclude_history: Whether lists leave out the history.
        trained_through: The last position that is trained on.
        texts_IF: Vectors of the items' texts, which `item_text` adds.
        teacher: Of soft targets.
        on_epoch: Called after each epoch with the weights that were validated.
        on_progress: Called after it with what a later call takes as `progress`.
        progress: Where to go on: the weights are the same as of a training that was never
            interrupted.

    Raises:
        ValueError: Where no user has two items to learn from.
        NotFinite: For a loss that is no number.
    """
    parts = TrainingParts(sequences, settings, trained_through, teacher)
    users_V = np.empty(0, np.int64)
    if trained_through == "n-2":
        users_V = sequences.history_and_target("validation").users
        users_V = users_V[sample_users(len(users_V), settings.validation_users, settings.seed)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_key(settings.seed, _INIT_STREAM) >> 1)
        model = model_of(sequences.num_items, settings)
        rows_I, table_Id = torch.arange(sequences.num_items), model.item_embedding.weight
        known_I = None
        if settings.init_items == "cooccurrence":
            factors = min(settings.d_model, MOST_FACTORS)
            vectors_IF = neighbour_vectors(sequences, factors, settings.seed)
            turn_rows(table_Id, rows_I, vectors_IF, settings.init_std)
            known_I = np.linalg.norm(vectors_IF, axis=1) > 0
        if texts_IF is not None:
            trained_I = training_counts(sequences, trained_through) > 0
            model.item_text = item_text_of(
                table_Id, rows_I, texts_IF, trained_I, known_I, settings.init_std
            )
        loop = _Loop(model, parts, settings)
        if progress is not None:
            loop.resume(progress)
        start = time.perf_counter() - (loop.last.seconds if loop.last else 0.0)
        while not loop.is_over():
            loss = loop.pass_over_users(loop.last.epoch + 1 if loop.last else 1)
            loop.swap_average()
            scores = {}
            if len(users_V):
                scores = validation_scores(model, sequences, users_V, exclude_history)
            epoch = loop.end_epoch(loss, scores, len(users_V), time.perf_counter() - start)
            if on_epoch is not None:
                on_epoch(epoch, model)
            loop.swap_average()
            if on_progress is not None:
                on_progress(loop.progress())
        return loop.finish()


def model_of(num_items: int, settings: SasrecSettings) -> SASRec:
    """The model that the settings are of, with new weights."""
    if isinstance(settings, BsarecSettings):
        return BSARec(num_items, settings)
    return SASRec(num_items, settings)


class TrainingParts:
    """The training parts as batches of inputs and labels; held-out items are never looked at.

    A row is a user, of BSARec a prefix of the user's last `max_length` items."""

    def __init__(
        self,
        sequences: Sequences,
        settings: SasrecSettings,
        trained_through: TrainedThrough,
        teacher: Teacher | None = None,
    ):
        self.items, self.settings, self.teacher = sequences.items, settings, teacher
        self.offsets = sequences.offsets
        ends_U = sequences.training_ends(trained_through)
        # The last item of a part is a label alone.
        lengths_U = ends_U - sequences.offsets[:-1] - 1
        rows = np.flatnonzero(lengths_U > 0)
        if not len(rows):
            raise ValueError(
                f"no user has two items to train on (through {trained_through}): SASRec needs "
                "longer histories"
            )
        self.input_ends_U, self.lengths_U = ends_U[rows] - 1, lengths_U[rows]
        self.prefixes = isinstance(settings, BsarecSettings)
        if self.prefixes:
            # Of 3 inputs that end at 10: lengths 0, 1, 2, 3 with the ends 7, 8, 9, 10. The empty
            # one has a first item to learn, of which no soft targets are made.
            least = 0 if teacher is None else 1
            num_U = np.minimum(self.lengths_U, settings.max_length - 1) + 1 - least
            self.lengths_U = flat_ranges(np.full(len(num_U), least, np.int64), num_U)
            self.input_ends_U = flat_ranges(self.input_ends_U - num_U + 1, num_U)

    def batches(self, epoch: int) -> Iterator[tuple[Packed, Tensor, SoftTargets | None]]:
        """(inputs, labels int64 [n], their soft targets if there is a teacher) of all users, in an
        order of this epoch."""
        order_U = keyed_permutation(len(self.lengths_U), self.settings.seed, _ORDER_STREAM, epoch)
        for start in range(0, len(order_U), self.settings.batch_size):
            users_B = order_U[start : start + self.settings.batch_size]
            ends_B, lengths_B = self.input_ends_U[users_B], self.lengths_U[users_B]
            packed = pack(self.items, ends_B, lengths_B, self.settings)
            places_n = packed.places_n
            if self.prefixes:  # one label behind each, in the order of `pack`
                places_n = ends_B[np.argsort(lengths_B, kind="stable")] - 1
            labels_n, soft = torch.from_numpy(self.items[places_n + 1].astype(np.int64)), None
            if self.teacher is not None:
                user_rows_n = np.searchsorted(self.offsets, places_n, "right") - 1
                soft = self.teacher.of_items(user_rows_n, places_n + 1 - self.offsets[user_rows_n])
            yield packed, labels_n, soft


class _Loop:
    """The state of a training, epoch by epoch."""

    def __init__(self, model: SASRec, parts: TrainingParts, settings: SasrecSettings):
        self.model, self.parts, self.settings = model, parts, settings
        decayed = Optimizer(weight_decay=settings.weight_decay, decay="all")
        self.optimizer = build_optimizer(model, decayed)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate
        self.average = None
        if settings.average:
            self.average = AveragedWeights(model.parameters(), settings.average)
        self.step = 0
        self.best: Epoch | None = None
        self.last: Epoch | None = None
        self.kept: dict[str, Tensor] = {}
        """The weights of the best epoch."""

    def end_epoch(self, loss: float, scores: dict[str, float], users: int, seconds: float) -> Epoch:
        """Note the epoch that is over, and keep its weights where it is the best so far."""
        best = self.best is None or not scores or scores["NDCG@10"] > self.best.scores["NDCG@10"]
        self.last = Epoch(
            epoch=self.last.epoch + 1 if self.last else 1,
            step=self.step,
            loss=loss,
            scores=scores,
            users=users,
            seconds=seconds,
            best=best,
        )
        if best:
            state = self.model.state_dict()
            self.best, self.kept = self.last, {name: state[name].clone() for name in state}
        return self.last

    def finish(self) -> Trained:
        """The model with the weights of the best epoch."""
        assert self.best is not None
        assert self.last is not None
        self.model.load_state_dict(self.kept)
        self.model.take_texts_in()
        return Trained(self.model.eval(), self.best, self.last)

    def is_over(self) -> bool:
        if self.last is None or self.best is None:
            return False
        stale, patience = self.last.epoch - self.best.epoch, self.settings.patience
        return self.last.epoch == self.settings.epochs or 0 < patience <= stale

    def progress(self) -> Progress:
        assert self.best is not None
        assert self.last is not None
        tensors = {f"best.{name}": value for name, value in self.kept.items()}
        for place, (name, parameter) in enumerate(self.model.named_parameters()):
            moments = self.optimizer.state[parameter]
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"steps.{name}"] = moments["step"]
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
            if self.average is not None:
                tensors[f"average.{name}"] = self.average.values[place]
        return Progress(self.last, self.best, tensors)

    @torch.no_grad()
    def resume(self, progress: Progress) -> None:
        tensors = progress.tensors
        self.last, self.best, self.step = progress.last, progress.best, progress.last.step
        self.kept = {name: tensors[f"best.{name}"] for name in self.model.state_dict()}
        for place, (name, parameter) in enumerate(self.model.named_parameters()):
            parameter.copy_(tensors[f"weights.{name}"])
            self.optimizer.state[parameter] = {
                "step": tensors[f"steps.{name}"],
                **{key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")},
            }
            if self.average is not None:
                self.average.values[place].copy_(tensors[f"average.{name}"])

    def pass_over_users(self, epoch: int) -> float:
        """One epoch: its mean loss a target."""
        self.model.train()
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for packed, labels_n, soft in self.parts.batches(epoch):
            torch.manual_seed(mixed_key(self.settings.seed, _DROPOUT_STREAM, self.step) >> 1)
            loss = self.model.loss(packed, labels_n, soft)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.step)
            self.step += 1
            total += loss.detach().double() * len(labels_n)
            targets += len(labels_n)
        mean = float(total) / targets
        if not math.isfinite(mean):
            rate = self.settings.learning_rate
            raise NotFinite(f"loss is {mean} in epoch {epoch}: lower learning_rate ({rate})")
        return mean

    def swap_average(self) -> None:
        if self.average is not None:
            self.average.swap()


def validation_scores(
    model: SASRec, sequences: Sequences, users: np.ndarray, exclude_history: bool
) -> dict[str, float]:
    """`METRICS` of these users' validation targets, as the metrics file counts them."""
    view = sequences.history_and_target("validation")
    places_U = target_places(model, view, users, exclude_history)
    metrics = metrics_from_histogram(rank_histogram(places_U))
    return {name: metrics[name] for name in METRICS}
