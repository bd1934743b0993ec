"""The training loop: epochs, steps, validation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from genrec_kernels import wants_gradient_order
from genrec_shards.histories import sample_users
from genrec_shards.keyed_random import mixed_key

from genrec_dist.config.recipe import Stage
from genrec_dist.console import say
from genrec_dist.data.batch import Batch, RankStep, dummy_batch
from genrec_dist.data.collate import padding_worth_a_batch
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.distributed.signals import NotFinite, Stopped, StopRequest
from genrec_dist.distributed.watch import RankWatch
from genrec_dist.estimate.flops import FORMULA, FORMULA_OF_PROMPTS
from genrec_dist.estimate.hardware import device_name, peak_of
from genrec_dist.evaluation.provenance import git_commit, versions
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.validation import validation_scores
from genrec_dist.model.causal.kinds import AnyModel
from genrec_dist.model.genrec import GenRecConfig, choose_packing
from genrec_dist.model.item_rows import texts_in_table
from genrec_dist.model.optimizer import AveragedWeights, peak_share, swapped
from genrec_dist.tracking.event_log import EventLog, log_of, write_status
from genrec_dist.training.checkpoint import State, save_best
from genrec_dist.training.checkpoint_state import Progress
from genrec_dist.training.engine import make_engine
from genrec_dist.training.id_tables import IdTables, with_ids_outside
from genrec_dist.training.loader import StepBatches, loaded
from genrec_dist.training.profiling import Meter, Trace
from genrec_dist.training.progress import EpochReport, TrainingDisplay, introduction
from genrec_dist.training.saving.checkpoints import Checkpoints
from genrec_dist.training.saving.writer import Saved
from genrec_dist.training.setup import TrainingSetup
from genrec_dist.training.stages import StageSteps, stage_of
from genrec_dist.training.step.graph import make_graph, wants_graph
from genrec_dist.training.step.totals import Pair, StepTotals, total


class Loop:
    """The training loop and its state between steps."""

    def __init__(
        self,
        setup: TrainingSetup,
        model: AnyModel,
        accelerator: Accelerator,
        ranks: Ranks | None = None,
    ):
        self.setup, self.recipe, self.accelerator = setup, setup.recipe, accelerator
        self.model, self.ranks = model, ranks or Ranks()
        # Counted before ZeRO-3 takes most of them away.
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.engine = make_engine(model, self.recipe, accelerator)
        self.graph = make_graph(self.engine, self.recipe)
        self.tables = IdTables(model.config, self.recipe.seed, self.ranks, accelerator.device)
        if setup.warm_start is not None:
            self.tables.begin_with(setup.warm_start.id_rows)
        decay = self.recipe.optimizer.ema_decay
        self.average = AveragedWeights(self.engine.masters, decay) if decay else None
        self.progress = Progress()
        self.trie = build_trie(*setup.words.tokens_of_items())
        self.stop = StopRequest()
        self.peak = peak_of(accelerator.device, self.recipe.precision)
        self.log = EventLog(setup.run, active=False)
        self.watch = RankWatch(setup.run, self.ranks.rank, self.ranks.size, self.note_stuck)
        self.checkpoints = Checkpoints(self.recipe, self.checked_state, self.note_saved)
        self.unchecked: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        """(step, loss, gradient norm) of the steps since `check_finite`."""

    def state(self) -> State:
        """What a checkpoint of now stores."""
        return State(self.engine, self.average, self.tables, self.progress, self.setup.identity)

    def checked_state(self) -> State:
        """The same, of finite losses and gradients alone; raises NotFinite."""
        self.check_finite()
        return self.state()

    @property
    def end_step(self) -> int:
        """Global step after the last one."""
        return self.setup.stages[-1].end_step

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done, or early stopping has ended the last stage."""
        return self.progress.step >= self.end_step or self.progress.stage_ended_early >= 0

    def start(self, resumed_from: str | None) -> None:
        """Open the event log and write the start event."""
        warm_start, stages = self.setup.warm_start, self.setup.stages
        plugin = self.accelerator.deepspeed_plugin
        self.log = log_of(self.recipe, self.ranks.is_main, say)
        self.log.write(
            "start",
            recipe=self.recipe.as_dict(),
            git=git_commit(),
            versions=versions(),
            parameters=self.num_parameters + self.tables.num_parameters,
            peak=dataclasses.asdict(self.peak) if self.peak else None,
            flops_formula=FORMULA_OF_PROMPTS if self.recipe.prompt.template else FORMULA,
            resumed_from=resumed_from,
            begun_from=None if warm_start is None else warm_start.as_dict(),
            device=device_name(self.accelerator.device),
            processes=self.ranks.size,
            distributed_type=str(self.accelerator.distributed_type),
            zero_stage=plugin.zero_stage if plugin else None,
            samples={s.name: s.plan.num_samples for s in stages},
            users_without_samples={s.name: s.plan.users_without_samples for s in stages},
        )
        self.write_status("running")

    def batches(self, one_size: bool | None = None) -> Iterator[tuple[int, RankStep]]:
        """(global step, this rank's share of it) from the run's next step on. `one_size`: whether
        micro-batches have one; None: as the recipe says."""
        one_size = wants_graph(self.recipe) if one_size is None else one_size
        config, device, workers = self.model.config, self.accelerator.device, self.recipe.workers
        data = StepBatches(
            self.setup.stages,
            self.setup.reader,
            self.setup.layout,
            self.recipe,
            self.ranks.rank,
            self.ranks.size,
            ids_outside=with_ids_outside(config),
            sums=config
            if isinstance(config, GenRecConfig) and wants_gradient_order(device.type)
            else None,
            packed=one_size or choose_packing(self.recipe, device),
            one_size=one_size,
            most_padding=padding_worth_a_batch(device.type, config.d_model),
            teacher=self.setup.teacher,
        )
        return loaded(data, range(self.progress.step, self.end_step), workers)

    def run(
        self, on_epoch: Callable[[EpochReport], None] | None = None, trace_steps: int = 0
    ) -> None:
        """The training loop.

        Args:
            on_epoch: called on rank 0 after each validated epoch, once its checkpoint is written.
            trace_steps: how many steps are recorded (`profiling.Trace`).

        Raises:
            Stopped: after a signal, once the checkpoint is written.
            NotFinite: naming the first step whose loss or gradient is not finite.
        """
        started = time.monotonic()
        stages, device = self.setup.stages, self.accelerator.device
        display = TrainingDisplay(stages, self.progress.step, active=self.ranks.is_main)
        parameters = self.num_parameters + self.tables.num_parameters
        about = introduction(self.setup, parameters, device, self.ranks.size, self.progress.step)
        display.say([" ".join(about)], wrap=True)
        self.stop.on_first = display.say_stopping
        meter = Meter(self.model.config, device, self.peak)
        trace = Trace(self.setup.run, self.ranks.rank, trace_steps, device)
        batches, finishing = self.batches(), self.checkpoints.finishing()
        with display, trace, contextlib.closing(batches), self.watch, finishing:  # type: ignore[type-var]
            while not self.has_ended:
                step_started = time.monotonic()
                self.watch.beat(self.progress.step, "waiting for a batch")
                with meter.waiting():
                    step, share = next(batches)
                self.watch.beat(step, "waiting for the other ranks")
                totals = self.step_totals(share)
                self.watch.beat(step, "computing")
                if totals.saving_ended:
                    self.checkpoints.finish()
                    meter.restart()
                if totals.stop:
                    self.watch.pause(step, "saving")
                    self.checkpoints.save_last()
                    raise Stopped(totals.stop)
                here = stage_of(stages, step)
                epoch, at_end = here.locate(step)[0], here.ends_epoch(step)
                share_of_peak = peak_share(here.stage, step - here.first_step, here.num_steps)
                loss, norm = self.take_step(step, share, totals, here.stage, share_of_peak)
                for batch in share.micro_batches:
                    meter.count(batch)
                self.progress.step = step + 1
                trace.step()

                if step % self.recipe.log_every == 0 or at_end:
                    self.check_finite()
                    fields = meter.read(self.ranks.size)
                    self.log.write(
                        "step",
                        stage=here.name,
                        epoch=epoch,
                        step=step,
                        loss=float(loss),
                        learning_rate=here.stage.learning_rate * share_of_peak,
                        gradient_norm=float(norm),
                        samples=totals.samples,
                        padding_samples=totals.padding_samples,
                        samples_digest=totals.samples_digest,
                        **fields,
                    )
                    display.show(float(loss), fields)
                self.watch.pause(step, "between steps")
                step_ended = time.monotonic()
                display.advance(here.name, step + 1, step_ended - step_started)
                scores = None
                if at_end and self.validates(here, step):
                    display.work = "validation"
                    scores = self.validate(here, step)
                    display.work = "step"
                    meter.restart()
                if at_end:
                    display.end_epoch(here.name, epoch, scores, time.monotonic() - step_ended)
                due = totals.save_due or self.checkpoints.is_due_by_steps(self.progress.step)
                if at_end or due:
                    self.checkpoints.save()
                    meter.restart()
                if scores is not None and on_epoch is not None and self.ranks.is_main:
                    epochs = here.stage.epochs
                    report = EpochReport(epoch + 1, epochs, step, scores, last=self.has_ended)
                    self.checkpoints.then = functools.partial(on_epoch, report)
        self.stop.on_first = None  # what follows waits for no step
        self.check_finite()
        seconds = time.monotonic() - started
        self.log.write(
            "end",
            status="finished",
            seconds=seconds,
            step=self.progress.step,
            best_step=self.progress.best_step,
            **{"best_NDCG@10": self.progress.best_ndcg},
        )
        self.write_status("finished", seconds=round(seconds, 1))

    def take_step(
        self, step: int, share: RankStep, totals: StepTotals, stage: Stage, share_of_peak: float
    ) -> Pair:
        """One optimiser step. Collective.

        Args:
            step: global step.
            share: this rank's samples.
            totals: of the step over all ranks.
            stage: whose learning rate and label smoothing count.
            share_of_peak: the learning rate, as a share of its peak.

        Returns:
            The loss per target token over all ranks, and the gradient norm: scalars on the device.
        """
        rate = stage.learning_rate * share_of_peak
        # Dropout is a function of the step too: a resumed run draws what an unbroken one draws.
        torch.manual_seed(mixed_key(self.recipe.seed, 0xD209, step, self.ranks.rank) >> 1)
        if self.graph is not None:
            found = self.graph.take(share.micro_batches, rate, totals, stage.label_smoothing)
            return self.taken(step, *found)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        micro_batches = self.micro_batches(share, totals)
        self.tables.attach(self.model, share)
        loss = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(micro_batches):
            there = batch.to(loss.device)
            with self.engine.micro_step(last=number == len(micro_batches) - 1):
                summed = self.engine.loss(there, stage.label_smoothing, totals.tokens_per_target)
                # Divided by the tokens of the step, not of the micro-batch: the gradient does not
                # depend on how the step is cut.
                term = summed / max(totals.target_tokens, 1)
                self.engine.backward(term)
            loss = loss + term.detach()
        norm = self.engine.step()
        self.tables.learn(self.recipe.optimizer.id_learning_rate * share_of_peak)
        if self.ranks.size > 1:
            dist.all_reduce(loss)
        return self.taken(step, loss, norm)

    def taken(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> Pair:
        """What follows every step: the running average, and the numbers to be checked later."""
        if self.average is not None:
            self.average.update(step)
        self.unchecked.append((step, loss, norm))
        return loss, norm

    def micro_batches(self, share: RankStep, totals: StepTotals) -> list[Batch]:
        """The share's micro-batches; where ranks must take equally many, dummy ones before them, so
        that collectives stay aligned."""
        missing = 0
        if self.engine.needs_equal_micro_steps:
            missing = totals.micro_steps - len(share.micro_batches)
        return [dummy_batch(share.micro_batches[-1])] * missing + share.micro_batches

    def step_totals(self, share: RankStep) -> StepTotals:
        """The totals of a step, before it is taken. Collective."""
        return total(
            share,
            self.stop.number,
            self.ranks,
            saving_ended=self.checkpoints.writer.has_ended,
            save_due=self.checkpoints.is_due_by_clock,
        )

    def check_finite(self) -> None:
        """Check the steps since the last call, together, so that no step waits for a device. Raises
        NotFinite naming the first step whose loss or gradient norm is not finite."""
        for step, loss, norm in self.unchecked:
            # fp16 overflows now and then by design: its scaler skips those steps.
            gradient = 0.0 if self.recipe.precision == "fp16" else float(norm)
            for what, value in (("loss", float(loss)), ("gradient norm", gradient)):
                if not math.isfinite(value):
                    raise NotFinite(
                        f"the {what} is {value} at step {step}: nothing was saved since; "
                        "lower learning_rate, raise warmup_fraction or set optimizer.max_grad_norm"
                    )
        self.unchecked.clear()

    def validates(self, here: StageSteps, step: int) -> bool:
        """Whether the epoch that `step` ends is validated."""
        epoch, every = here.locate(step)[0], self.recipe.validation.every_epochs
        is_due = (epoch + 1) % every == 0 or epoch == here.stage.epochs - 1
        return is_due and here is self.setup.stages[-1]

    def validate(self, here: StageSteps, step: int) -> dict[str, float]:
        """Score a seeded sample of users on validation, keep the best model, and decide on early
        stopping. Returns `loss`, `HR@5`, `HR@10`, `NDCG@5`, `NDCG@10`. Collective."""
        start, progress = time.perf_counter(), self.progress
        view = self.setup.dataset.sequences.history_and_target("validation")
        validation, users_U = self.recipe.validation, view.users
        users_U = users_U[sample_users(len(users_U), validation.users, self.recipe.seed)]
        with (
            swapped(self.average),
            self.engine.whole() as model,
            self.tables.serving(model, view, users_U),
            texts_in_table(model),
            torch.inference_mode(),
        ):
            # Made anew each time: a searcher holds rows of the weights, which under ZeRO-3 exist in
            # this context alone.
            searcher = TrieSearcher(model, self.trie, self.accelerator.device)
            decoding = Decoding(
                beam=validation.beam,
                mode=validation.decode,
                exclude_history=model.config.exclude_history,
            )
            loss, metrics = validation_scores(
                model, searcher, self.setup.layout, view, users_U, decoding, self.ranks,
                on_progress=functools.partial(self.watch.beat, step),
            )  # fmt: skip
            self.watch.pause(step, "between steps")
            gained = metrics["NDCG@10"] > progress.best_ndcg
            if gained:
                self.check_finite()
                complete = self.tables.whole(model)
                if complete is not None:
                    save_best(self.setup, complete, self.trie, step)
        kept = ("HR@5", "HR@10", "NDCG@5", "NDCG@10")
        scores = {"loss": loss, **{key: metrics[key] for key in kept}}
        self.log.write(
            "validation",
            stage=here.name,
            epoch=here.locate(step)[0],
            step=step,
            users=users_U.size,
            seconds=time.perf_counter() - start,
            **scores,
        )
        if gained:
            progress.best_step, progress.best_ndcg = step, scores["NDCG@10"]
            progress.validations_without_gain = 0
        else:
            progress.validations_without_gain += 1
            if 0 < validation.patience <= progress.validations_without_gain:
                progress.stage_ended_early = self.setup.stages.index(here)
        return scores

    def note_saved(self, saved: Saved) -> None:
        """Log a checkpoint that has its name."""
        path = str(saved.path.relative_to(self.setup.run))
        self.log.write("checkpoint", step=saved.step, path=path, seconds=round(saved.seconds, 3))
        self.write_status("running")

    def note_stuck(self, reason: str) -> None:
        """Write into `status.json` that a rank is stuck; any rank does, since it may be rank 0."""
        step, of = self.progress.step, self.end_step
        write_status(self.setup.run, "failed", step=step, of=of, reason=f"Stuck: {reason}")

    def write_status(self, status: str, **facts: Any) -> None:
        """Write `status.json`, on rank 0."""
        if self.ranks.is_main:
            facts = {"of": self.end_step, "best_step": self.progress.best_step, **facts}
            write_status(self.setup.run, status, step=self.progress.step, **facts)
