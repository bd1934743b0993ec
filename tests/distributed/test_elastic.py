"""A run that loses its ranks to SIGKILL goes on with another number of them, on the very same
samples."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from run_events import events
from shard_data import sharded_process
from two_ranks import environment, start_each

from genrec_dist.distributed.collectives import Ranks
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.training.checkpoint import Checkpoint, list_checkpoints

pytestmark = [pytest.mark.dist, pytest.mark.ranks]

RECIPE = """
data: {data}
run: {run}
micro_batch_tokens: 256
workers: 1
log_every: 1
checkpoint_every: 4
model: {{d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 16,
  max_tokens: 64, dropout: 0.0, id_dim: 8}}
tokens: {{vocab_size: 300}}
pretrain: {{epochs: 2, batch_size: 13, mask: {{strategy: multi, k: 2}}}}
finetune: {{epochs: 3, batch_size: 17, targets: every-prefix}}
optimizer: {{id_tables: row-adagrad, ema_decay: 0.9, eps: 1.0e-4}}
validation: {{users: 30, patience: 0}}
"""


def recipe(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(data=folder / "data", run=folder / name))
    return path


def killed(path: Path, run: Path, after: int) -> None:
    """Two ranks, all of whose processes get SIGKILL once this step is logged."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started = subprocess.Popen(
        [*launcher, "--nproc_per_node", "2", "-m", "genrec_dist.train", str(path)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log, deadline = run / "events.jsonl", time.monotonic() + 300
    try:
        while not log.exists() or f'"step": {after},' not in log.read_text():
            assert started.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        # torchrun gives each rank a session of its own: the group's end would leave the ranks at
        # work beside the next run.
        for process in family(started.pid):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.kill(process, signal.SIGKILL)
        started.wait()


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def weights(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return Checkpoint(list_checkpoints(run)[-1], {}, Ranks()).weights(kind)


def test_two_ranks_are_lost_and_three_go_on(tmp_path: Path) -> None:
    sharded_process(tmp_path, users_per_shard=64)  # fewer shards than ranks
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    alone = forked.run(
        ["-m", "genrec_dist.train", recipe(tmp_path, "unbroken")], environment(), timeout=300
    )
    assert alone.returncode == 0, alone
    last = events(unbroken, "step")[-1]["step"]
    killed(recipe(tmp_path, "broken"), broken, after=random.Random().randrange(5, last - 3))
    resumed = ["-m", "genrec_dist.train", tmp_path / "broken.yaml", "--resume", "latest"]
    done = start_each(resumed, tmp_path / "logs", 3, timeout=300)
    assert not any(rank.returncode for rank in done), done

    # Steps between the last checkpoint and the kill were taken twice, by two ranks and by three.
    found = events(broken, "step")
    for step, expected in enumerate(events(unbroken, "step")):
        taken = [event for event in found if event["step"] == step]
        assert {event["samples_digest"] for event in taken} == {expected["samples_digest"]}
        assert {event["samples"] for event in taken} == {expected["samples"]}
        assert np.allclose([event["loss"] for event in taken], expected["loss"], rtol=1e-3)
    for kind in ("weight", "average"):
        one, two = weights(unbroken, kind), weights(broken, kind)
        assert all(torch.allclose(one[name], two[name], atol=5e-4) for name in one)
    items = [
        GenRecForConditionalGeneration.from_pretrained(run / "best").item_embedding
        for run in (unbroken, broken)
    ]
    assert torch.allclose(items[0].weight, items[1].weight, atol=5e-4)
    status = json.loads((broken / "status.json").read_text())
    assert status["status"] == "finished"
