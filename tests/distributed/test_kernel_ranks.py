"""The embedding kernel, interpreted, on two ranks under DDP and ZeRO-3: the steps that plain torch
takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from places import HELPERS
from run_events import events
from safetensors.torch import load_file
from two_ranks import deepspeed_environment, run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.ranks,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="is for the interpreter"),
]

RECIPE = """
data: {data}
run: {folder}/unset
micro_batch_tokens: 96
workers: 0
log_every: 1
model: {{
  d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 16, max_tokens: 20,
  dropout: 0.0, init_std: 0.1}}
tokens: {{vocab_size: 300}}
finetune: {{epochs: 1, batch_size: 30, targets: last}}
optimizer: {{max_grad_norm: 1.0, eps: 1.0e-4, ema_decay: 0.0}}
validation: {{users: 4}}
"""


def jobs(folder: Path, how: str) -> list[dict[str, Any]]:
    recipe = {"recipe": str(folder / "recipe.yaml"), "environment": {"GENREC_KERNELS": how}}
    sgd = {"job": "steps", "optimizer": "sgd", "rate": 0.05, "steps": 3}
    steps = []
    for stage, precision in ((None, "fp32"), (3, "fp32"), (3, "bf16")):
        overrides = [
            f"precision={precision}",
            "optimizer.max_grad_norm=0.0",
            "finetune.batch_size=6",
        ]
        name = f"{how}-{stage}-{precision}"
        steps.append({**recipe, **sgd, "name": name, "stage": stage, "set": overrides})
    # The whole loop: orders come with the batches, dummy micro-batches come without, validation
    # needs no gradient.
    overrides = [f"run={folder / how}", "finetune.batch_size=120", "pretrain.epochs=0"]
    overrides.append("optimizer.id_tables=row-adagrad")
    whole = {"name": f"{how}-train", "stage": None, "job": "train", "resume": None}
    return [*steps, {**recipe, **whole, "set": overrides}]


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel-ranks")
    (folder / "recipe.yaml").write_text(
        RECIPE.format(data=tiny_data, folder=folder), encoding="utf-8"
    )
    path = folder / "jobs.json"
    both = [*jobs(folder, "triton"), *jobs(folder, "reference")]
    path.write_text(json.dumps(both), encoding="utf-8")
    own = deepspeed_environment(TRITON_INTERPRET="1")
    done = run_ranks([HELPERS / "zero_rank.py", path], folder / "logs", 2, timeout=550, env=own)
    assert done.returncode == 0, done.stderr[0] + done.launcher
    return folder


@pytest.mark.parametrize("kind", ["None-fp32", "3-fp32", "3-bf16"])
def test_steps_with_the_kernel_are_steps_without(folder: Path, kind: str) -> None:
    ours, theirs = (
        json.loads((folder / f"{how}-{kind}.json").read_text()) for how in ("triton", "reference")
    )
    assert not any(ours["errors"])
    assert ours["digests"] == theirs["digests"]
    rounding = 1e-5 if kind.endswith("fp32") else 5e-3
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=rounding)
    paths = [folder / f"{how}-{kind}.safetensors" for how in ("triton", "reference")]
    moved, expected = map(load_file, paths)
    tables = ("model.shared", "model.encoder.embed_positions", "item_embedding")
    for name in (f"{table}.weight" for table in tables):
        difference = (moved[name] - expected[name]).abs().max()
        assert difference <= max(rounding, 1e-4) * 20 * expected[name].abs().max(), name
        assert expected[name].any()
    # Two implementations add in two orders; equal bits would be one that ran twice.
    assert not all(torch.equal(moved[name], expected[name]) for name in expected)


def test_a_run_with_the_kernel_learns_what_one_without_learns(folder: Path) -> None:
    losses = []
    for how in ("triton", "reference"):
        found = [event for kind in ("step", "validation") for event in events(folder / how, kind)]
        losses.append([event["loss"] for event in found])
    assert len(losses[0]) >= 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
