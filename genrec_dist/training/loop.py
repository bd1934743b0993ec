"""The training loop: epochs, steps, validation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from genrec_kernels import wants_gradient_order
from genrec_shards.errors import DataError
from genrec_shards.histories import sample_users
from genrec_shards.keyed_random import mixed_key
from torch.utils.data import DataLoader

from genrec_dist.config.recipe import Stage
from genrec_dist.data.batch import Batch, RankStep, idle_batch
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import NotFinite, Stopped, StopRequest, ignore_signals
from genrec_dist.estimate.flops import FORMULA
from genrec_dist.estimate.hardware import peak_of
from genrec_dist.evaluation.metrics import metrics_from_histogram
from genrec_dist.evaluation.provenance import git_commit, versions
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.validation import history_loss, target_histogram
from genrec_dist.model.genrec import GenRecForConditionalGeneration, choose_packing
from genrec_dist.model.optimizer import AveragedWeights, peak_share
from genrec_dist.training.checkpoint import (
    Progress,
    State,
    save_best,
    save_checkpoint,
    write_status,
)
from genrec_dist.training.engine import make_engine
from genrec_dist.training.event_log import EventLog
from genrec_dist.training.id_tables import IdTables
from genrec_dist.training.loader import StepBatches, ahead
from genrec_dist.training.profiling import Meter, Trace
from genrec_dist.training.progress import TrainingDisplay
from genrec_dist.training.setup import Workshop
from genrec_dist.training.stages import StageSteps, stage_of


@dataclass(frozen=True)
class EpochReport:
    """An epoch that is over: validated, and in a checkpoint that a run can go on from."""

    epoch: int
    """Of the last stage, counted from 1."""
    epochs: int
    """That the stage has."""
    step: int
    """Global step it follows."""
    scores: dict[str, float]
    """`loss`, `HR@5`, `HR@10`, `NDCG@5`, `NDCG@10` on validation."""
    last: bool
    """Training is at its end, be it for want of patience."""


@dataclass(frozen=True)
class Agreed:
    """What the ranks know of a step together."""

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
    """Signal that any rank has caught, or 0."""


class Loop:
    """The loop and what it carries from step to step."""

    def __init__(
        self,
        workshop: Workshop,
        model: GenRecForConditionalGeneration,
        accelerator: Accelerator,
        ranks: Ranks | None = None,
    ):
        self.workshop, self.recipe, self.accelerator = workshop, workshop.recipe, accelerator
        self.ranks = ranks or Ranks()
        self.model = model
        self.num_parameters = sum(
            p.numel() for p in model.parameters()
        )  # before ZeRO-3 takes most of them away
        self.engine = make_engine(model, self.recipe, accelerator)
        self.tables = IdTables(model.config, self.recipe.seed, self.ranks, accelerator.device)
        if workshop.begun is not None:
            self.tables.begin_with(workshop.begun.id_rows)
        self.average = (
            AveragedWeights(self.engine.masters, self.recipe.optimizer.average)
            if self.recipe.optimizer.average
            else None
        )
        self.progress = Progress()
        self.trie = build_trie(*workshop.words.tokens_of_items())
        self.stop = StopRequest()
        self.peak = peak_of(self.accelerator.device, self.recipe.precision)
        self.log = EventLog(workshop.run, active=False)
        self.unchecked: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def state(self) -> State:
        return State(self.engine, self.average, self.tables, self.progress, self.workshop.identity)

    @property
    def end_step(self) -> int:
        return self.workshop.stages[-1].end_step

    def start(self, resumed_from: str | None) -> None:
        self.log = EventLog(self.workshop.run, active=self.ranks.is_main)
        self.log.write(
            "start",
            recipe=self.recipe.as_dict(),
            git=git_commit(),
            versions=versions(),
            parameters=self.num_parameters + self.tables.num_parameters,
            peak=dataclasses.asdict(self.peak) if self.peak else None,
            flops_formula=FORMULA,
            resumed_from=resumed_from,
            begun_from=None if self.workshop.begun is None else self.workshop.begun.as_dict(),
            processes=self.ranks.size,
            distributed_type=str(self.accelerator.distributed_type),
            zero_stage=self.accelerator.deepspeed_plugin.zero_stage
            if self.accelerator.deepspeed_plugin
            else None,
            samples={s.name: s.plan.num_samples for s in self.workshop.stages},
            users_without_samples={
                s.name: s.plan.users_without_samples for s in self.workshop.stages
            },
        )
        self.write_status("running")

    def batches(self) -> Iterator[tuple[int, RankStep]]:
        """(global step, this rank's share of it) from where the run stands."""
        data = StepBatches(
            self.workshop.stages,
            self.workshop.reader,
            self.workshop.layout,
            self.recipe,
            self.ranks.rank,
            self.ranks.size,
            self.model.config if self.model.config.ids_outside else None,
            self.model.config if wants_gradient_order(self.accelerator.device.type) else None,
            choose_packing(self.recipe.packing, self.accelerator.device),
        )
        steps = range(self.progress.step, self.end_step)
        loader = DataLoader(
            data,
            sampler=steps,
            batch_size=None,
            num_workers=self.recipe.workers,
            prefetch_factor=4 if self.recipe.workers else None,
            worker_init_fn=ignore_signals,
        )
        source = iter(loader)
        shares = ahead(source) if self.recipe.workers else source
        try:
            yield from zip(steps, shares, strict=True)
        except DataError as error:
            # A worker's error comes with its traceback for a message; the last line is what it
            # said.
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        finally:
            # Workers ignore signals: while an error keeps this generator alive, nobody else would
            # end them.
            if self.recipe.workers:
                shares.close()  # type: ignore[attr-defined]
                source._shutdown_workers()  # type: ignore[attr-defined]

    def run(
        self, on_epoch: Callable[[EpochReport], None] | None = None, trace_steps: int = 0
    ) -> None:
        """The training loop."""
        started = time.monotonic()
        display = TrainingDisplay(
            self.workshop.stages, self.progress.step, active=self.ranks.is_main
        )
        meter = Meter(self.model.config, self.accelerator.device, self.peak)
        batches = self.batches()
        trace = Trace(self.workshop.run, self.ranks.rank, trace_steps, self.accelerator.device)
        with display, trace, contextlib.closing(batches):  # type: ignore[type-var]
            while self.progress.step < self.end_step and self.progress.stage_ended_early < 0:
                with meter.waiting():
                    step, share = next(batches)
                here = stage_of(self.workshop.stages, step)
                share_of_peak = peak_share(here.stage, step - here.first_step, here.num_steps)
                agreed = self.agree(share)
                loss, norm = self.take_step(step, share, agreed, here.stage, share_of_peak)
                for batch in share.micro_batches:
                    meter.count(batch)
                self.progress.step = step + 1
                trace.step()
                display.advance(here.name, step + 1)

                at_end = here.ends_epoch(step)
                scores = None
                if step % self.recipe.log_every == 0 or at_end:
                    self.check_finite()
                    fields = meter.read(self.ranks.size)
                    self.log.write(
                        "step",
                        stage=here.name,
                        epoch=here.locate(step)[0],
                        step=step,
                        loss=float(loss),
                        learning_rate=here.stage.learning_rate * share_of_peak,
                        gradient_norm=float(norm),
                        samples=agreed.samples,
                        padding_samples=agreed.padding_samples,
                        samples_digest=agreed.samples_digest,
                        **fields,
                    )
                    display.show(float(loss), fields)
                if at_end and self.validates(here, step):
                    scores = self.validate(here, step)
                    display.show_validation(here.name, here.locate(step)[0], scores)
                    meter.restart()
                if agreed.stop or at_end or self.progress.step % self.recipe.checkpoint_every == 0:
                    self.save()
                    meter.restart()
                if scores is not None and on_epoch is not None and self.ranks.is_main:
                    on_epoch(self.report(here, step, scores))
                    meter.restart()
                if agreed.stop:
                    raise Stopped(agreed.stop)
        self.finish(time.monotonic() - started)

    def take_step(
        self, step: int, share: RankStep, agreed: Agreed, stage: Stage, share_of_peak: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step: (loss a target token over all ranks, gradient norm)."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = stage.learning_rate * share_of_peak
        # Dropout is a function of the step too: a resumed run draws what the unbroken one draws.
        torch.manual_seed(mixed_key(self.recipe.seed, 0xD209, step, self.ranks.rank) >> 1)
        micro_batches = self.micro_batches(share, agreed)
        self.tables.attach(self.model, share)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(micro_batches):
            with self.engine.micro_step(last=number == len(micro_batches) - 1):
                summed = self.engine.loss(
                    batch.to(self.accelerator.device),
                    stage.label_smoothing,
                    agreed.target_tokens / max(agreed.targets, 1),
                )
                # By the step's tokens, not the micro-batch's: the gradient does not depend on how
                # the step is cut.
                part = summed / max(agreed.target_tokens, 1)
                self.engine.backward(part)
            loss = loss + part.detach()
        norm = self.engine.step()
        self.tables.learn(self.recipe.optimizer.id_learning_rate * share_of_peak)
        if self.average is not None:
            self.average.update(step)
        if self.ranks.size > 1:
            dist.all_reduce(loss)
        self.unchecked.append((step, loss, norm))
        return loss, norm

    def micro_batches(self, share: RankStep, agreed: Agreed) -> list[Batch]:
        """The share's micro-batches; where ranks must take equally many, with idle ones before
        them."""
        missing = (
            agreed.micro_steps - len(share.micro_batches)
            if self.engine.needs_equal_micro_steps
            else 0
        )
        return [idle_batch(share.micro_batches[-1])] * missing + share.micro_batches

    def agree(self, share: RankStep) -> Agreed:
        """What all ranks have to know of the step before it: they divide by the same tokens and
        stop at the same step."""
        mine = [
            share.num_target_tokens,
            share.num_targets,
            share.num_samples,
            share.num_padding,
            share.samples_digest,
            len(share.micro_batches),
            self.stop.number,
        ]
        tokens, targets, samples, padding, digests, micro_steps, stops = zip(
            *self.ranks.exchange(mine), strict=True
        )
        return Agreed(
            target_tokens=sum(tokens),
            targets=sum(targets),
            samples=sum(samples),
            padding_samples=sum(padding),
            samples_digest=f"{sum(digests) % 2**64:016x}",
            micro_steps=max(micro_steps),
            stop=signal.SIGTERM if signal.SIGTERM in stops else max(stops),
        )

    def check_finite(self) -> None:
        """Raise NotFinite naming the first bad step. Steps are looked at together, so that none
        waits for a device."""
        for step, loss, norm in self.unchecked:
            # fp16 overflows now and then by design: its scaler skips those steps.
            gradient = 0.0 if self.recipe.precision == "fp16" else float(norm)
            for what, value in (("loss", float(loss)), ("gradient norm", gradient)):
                if not math.isfinite(value):
                    raise NotFinite(
                        f"the {what} is {value} at step {step}: nothing was saved since; "
                        "lower learning_rate, raise warmup_fraction or set optimizer.clip"
                    )
        self.unchecked.clear()

    def validates(self, here: StageSteps, step: int) -> bool:
        if here is not self.workshop.stages[-1]:
            return False
        epoch = here.locate(step)[0]
        return (
            epoch + 1
        ) % self.recipe.validation.every_epochs == 0 or epoch == here.stage.epochs - 1

    def validate(self, here: StageSteps, step: int) -> dict[str, float]:
        """Decode a seeded sample of users on validation, keep the best model, and see whether
        patience is over."""
        start = time.perf_counter()
        scores = self.score_validation()
        gained = scores["NDCG@10"] > self.progress.best_ndcg
        self.log.write(
            "validation",
            stage=here.name,
            epoch=here.locate(step)[0],
            step=step,
            users=self.validation_users().size,
            seconds=time.perf_counter() - start,
            **scores,
        )
        if gained:
            self.progress.best_step, self.progress.best_ndcg = step, scores["NDCG@10"]
            self.progress.validations_without_gain = 0
        else:
            self.progress.validations_without_gain += 1
            if 0 < self.recipe.validation.patience <= self.progress.validations_without_gain:
                self.progress.stage_ended_early = self.workshop.stages.index(here)
        return scores

    def report(self, here: StageSteps, step: int, scores: dict[str, float]) -> EpochReport:
        last = self.progress.step >= self.end_step or self.progress.stage_ended_early >= 0
        return EpochReport(here.locate(step)[0] + 1, here.stage.epochs, step, scores, last)

    def score_validation(self) -> dict[str, float]:
        """Loss and metrics; with a running average of the weights, it is the average that is scored
        and kept."""
        view = self.workshop.dataset.sequences.history_and_target("validation")
        users_U = self.validation_users()
        with (
            self.averaged(),
            self.engine.whole() as model,
            self.tables.serving(model, view, users_U),
            torch.inference_mode(),
        ):
            # Under a thousand users the loss is steady enough for a curve.
            loss = history_loss(model, self.workshop.layout, view, users_U[:1000], self.ranks)
            validation = self.recipe.validation
            decoding = Decoding(
                beam=validation.beam,
                mode=validation.decode,
                exclude_history=model.config.exclude_history,
            )
            # Made anew each time: a searcher holds rows of the weights, and amid ZeRO-3 a model has
            # none of its own.
            searcher = TrieSearcher(model, self.trie, self.accelerator.device)
            counts = target_histogram(
                searcher, self.workshop.layout, view, users_U, decoding, self.ranks
            )
            metrics = metrics_from_histogram(counts)
            if metrics["NDCG@10"] > self.progress.best_ndcg:
                self.save_best(model)
        return {
            "loss": loss,
            **{key: metrics[key] for key in ("HR@5", "HR@10", "NDCG@5", "NDCG@10")},
        }

    def save_best(self, model: GenRecForConditionalGeneration) -> None:
        self.check_finite()
        complete = self.tables.whole(model)
        if complete is not None:
            shop, step = self.workshop, self.progress.step - 1
            save_best(
                shop.run, complete, shop.tokenizer, shop.words, self.trie, shop.dataset.path, step
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def validation_users(self) -> np.ndarray:
        asked = self.workshop.dataset.sequences.history_and_target("validation").users
        return asked[sample_users(len(asked), self.recipe.validation.users, self.recipe.seed)]

    def save(self) -> None:
        """Write a checkpoint; its bytes are on the disk before an older one goes."""
        self.check_finite()
        path = save_checkpoint(
            self.workshop.run, self.state(), self.recipe.keep_checkpoints, self.ranks
        )
        self.log.write(
            "checkpoint", step=self.progress.step, path=str(path.relative_to(self.workshop.run))
        )
        self.write_status("running")

    def finish(self, seconds: float) -> None:
        self.check_finite()
        self.log.write(
            "end",
            status="finished",
            seconds=seconds,
            step=self.progress.step,
            best_step=self.progress.best_step,
            **{"best_NDCG@10": self.progress.best_ndcg},
        )
        self.write_status("finished", seconds=round(seconds, 1))

    def write_status(self, status: str, **facts: Any) -> None:
        if self.ranks.is_main:
            write_status(
                self.workshop.run,
                status,
                step=self.progress.step,
                of=self.end_step,
                best_step=self.progress.best_step,
                **facts,
            )
