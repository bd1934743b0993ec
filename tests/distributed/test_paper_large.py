"""`paper-large` for real: BART-large's shape, two steps on two CPU ranks under ZeRO-3."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import make_process
from places import ROOT
from run_events import events
from transformers import BartConfig, BartForConditionalGeneration

from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.training.checkpoint import list_checkpoints


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """BART-large's configuration with random weights: the published ones need a network, the sizes
    are the same."""
    write_sequences(
        make_process(num_items=256, num_groups=16).sample(32, 5, 12, seed=1), tmp_path / "log.txt"
    )
    dataset = prepare(tmp_path / "log.txt", tmp_path / "data")
    write_shards(dataset, tmp_path / "data" / "shards")
    config = BartConfig()  # its defaults are BART-large
    assert (config.d_model, config.encoder_layers, config.vocab_size) == (1024, 12, 50265)
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart-large")
    codes = load_dataset(tmp_path / "data").numbering.item_codes
    train_tokenizer(codes, 1024, 1).save_pretrained(tmp_path / "bart-large")
    return tmp_path / "bart-large"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(3600)
def test_two_steps_of_bart_large_under_zero_3(backbone: Path) -> None:
    folder = backbone.parent
    sets = [f"data={folder / 'data'}", f"run={folder / 'run'}", f"model.backbone={backbone}"]
    sets += ["pretrain.epochs=0", "finetune.epochs=1", "log_every=1", "keep_checkpoints=1"]
    sets += ["workers=0", "validation.users=2"]
    command = [ROOT / "launch" / "cpu_two_ranks_zero.sh", "3", "paper-large"]
    for override in sets:
        command += ["--set", override]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr[-3000:]
    (started,) = events(folder / "run", "start")
    assert started["distributed_type"] == "DistributedType.DEEPSPEED"
    assert (started["zero_stage"], started["processes"]) == (3, 2)
    assert started["parameters"] > 400e6
    steps = events(folder / "run", "step")
    assert [event["samples"] for event in steps] == [16, 16]
    assert list_checkpoints(folder / "run")
    assert (folder / "run" / "best" / "model.safetensors").stat().st_size > 4 * 400e6
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    between = steps[1]["time"] - steps[0]["time"]
    print(
        f"{started['parameters']:,} parameters; {seconds:.0f} s in all, {between:.0f} s per step, "
        f"{largest:.1f} GiB per rank"
    )
