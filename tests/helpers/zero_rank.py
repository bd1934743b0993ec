"""One rank of tests/distributed/test_zero.py: works through a list of jobs, each with accelerate's
state made anew.

`zero_rank.py JOBS.json`: a list of {"name", "stage" (null: no DeepSpeed), "recipe" (path), "job":
"steps" | "train", ...}, perhaps with "environment", the variables that it sets. Each job leaves
NAME.json (rank 0) beside the list: losses, facts, or the errors of all ranks."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

import genrec_dist.training.engine
from genrec_dist.config.load import load_recipe
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.rank_users import Decoding, rank_windows
from genrec_dist.inference.validation import history_loss, target_histogram
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.optimizer import build_optimizer
from genrec_dist.training.engine import Spread
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.loop import Loop
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

LISTS_WINDOW = 70
"""Users per window of the lists: five batches and two, on two ranks."""


def main(path: Path) -> None:
    for job in json.loads(path.read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(job["stage"] is not None).lower()
        os.environ["ACCELERATE_USE_CPU"] = str(job["stage"] is None).lower()
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(job["stage"])
        os.environ.update(job.get("environment", {}))
        try:
            facts = {"steps": steps, "train": train_run}[job["job"]](job, path.parent)
        except ValueError as error:
            facts = {"error": str(error)}
        ranks = Ranks()
        facts["errors"] = ranks.all_gather_str(facts.get("error", ""))
        if ranks.is_main:
            (path.parent / f"{job['name']}.json").write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as genrec_dist.train does, and for the same reason


def steps(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Some steps of a run by an optimiser of the test's choice; the weights before and after are
    kept."""
    recipe = load_recipe(job["recipe"], job.get("set", []))
    if job["optimizer"] == "sgd":
        genrec_dist.training.engine.build_optimizer = lambda model, _: torch.optim.SGD(
            model.parameters(), lr=0.0
        )
    accelerator = make_accelerator(recipe)
    setup, model = build_setup(recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loop = Loop(setup, model, accelerator)
    genrec_dist.training.engine.build_optimizer = build_optimizer
    if job.get("leave_out") == loop.ranks.rank:
        backward = loop.engine.backward
        loop.engine.backward = lambda loss: backward(loss * 0.0)
    rank, world = loop.ranks.rank, loop.ranks.size
    data = StepBatches(setup.stages, setup.reader, setup.layout, recipe, rank, world)
    losses, digests, idle = [], [], 0
    for step in range(job["steps"]):
        # Not the first step: a finite norm of the step before must not be taken for this one's.
        if job.get("spoil") and step == job["steps"] - 1:
            spoil(loop.engine)
        share = data[step]
        totals = loop.step_totals(share)
        idle += len(loop.micro_batches(share, totals)) - len(share.micro_batches)
        stage = replace(recipe.finetune, learning_rate=job["rate"])
        loss, _ = loop.take_step(step, share, totals, stage, 1.0)
        losses.append(float(loss))
        digests.append(totals.samples_digest)
    loop.check_finite()
    with loop.engine.whole() as whole:
        after = {name: p.detach().float().clone() for name, p in whole.named_parameters()}
        found = lists(loop, whole, folder / job["name"]) if job.get("lists") else {}
    if loop.ranks.is_main:
        change = {name: after[name] - before[name] for name in after}
        save_file(change, folder / f"{job['name']}.safetensors")
    moments = loop.engine.optimizer.state.get(loop.engine.masters[0], {})
    return {
        "losses": losses,
        "optimizer_step": int(moments["step"]) if "step" in moments else None,
        "digests": digests,
        "idle": sum(row[0] for row in loop.ranks.exchange([idle])),
        "distributed_type": accelerator.distributed_type.value,
        "stage": loop.engine.engine.zero_optimization_stage()
        if isinstance(loop.engine, Spread)
        else None,
        "processes": accelerator.num_processes,
        **found,
    }


def lists(loop: Loop, whole: GenRecForConditionalGeneration, folder: Path) -> dict[str, Any]:
    """Lists, histogram and loss of 90 users in windows and batches that do not divide; the weights
    go to `folder`."""
    setup, view = loop.setup, loop.setup.dataset.sequences.history_and_target("validation")
    users, searcher = np.arange(90), TrieSearcher(whole, loop.trie)
    layout, ranks, decoding = setup.layout, loop.ranks, Decoding(batch_size=16)
    found = rank_windows(searcher, layout, view, users, decoding, ranks, window=LISTS_WINDOW)
    windows = list(found)
    counts = target_histogram(searcher, layout, view, users, decoding, ranks)
    loss = history_loss(whole, layout, view, users, ranks, batch_size=16)
    if loop.ranks.is_main:
        whole.save_pretrained(folder)
    return {
        "users": [window.user_rows.tolist() for window in windows],
        "items": [window.items.tolist() for window in windows],
        "scores": [window.scores.tolist() for window in windows],
        "counts": counts.tolist(),
        "validation_loss": loss,
    }


def spoil(engine: Any) -> None:
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * float("inf"))


def train_run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe = load_recipe(job["recipe"], job.get("set", []))
    return {"run": str(train(recipe, resume=job.get("resume")))}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
