"""Checkpoints that are complete or absent, and the best model in Hugging Face's form. No pickle anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from genrec_shards.atomic import atomic_directory, atomic_file
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from genrec_dist.model import GenRecForConditionalGeneration
from genrec_dist.optim import AveragedWeights

FORMAT_VERSION = 1


@dataclass
class Progress:
    """Where a run stands; with weights, optimiser and average, all a resume needs: order, masks and dropout are functions."""

    step: int = 0
    """Next global step."""
    best_step: int = -1
    best_ndcg: float = -1.0
    validations_without_gain: int = 0
    stage_ended_early: int = -1
    """Number of the stage that early stopping ended; -1 for none."""


@dataclass(frozen=True)
class State:
    """What a checkpoint stores."""

    model: GenRecForConditionalGeneration
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None
    progress: Progress
    identity: dict[str, str]
    """Hashes of sequences, numbering and recipe that a resume must meet again."""


def checkpoint_dir(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run: Path, state: State, keep: int) -> Path:
    """Write `checkpoints/step-N/` whole under a temporary name, give it its own, and only then drop the oldest."""
    path = checkpoint_dir(run, state.progress.step)
    names = _parameter_names(state.model)
    with atomic_directory(path, overwrite=True) as folder:
        save_file({name: p.detach().contiguous() for name, p in names.items()}, folder / "model.safetensors")
        save_file(_optimizer_tensors(state.optimizer, names), folder / "optimizer.safetensors")
        if state.average is not None:
            values = dict(zip(names, state.average.values, strict=True))
            save_file({name: value.contiguous() for name, value in values.items()}, folder / "average.safetensors")
        facts = {
            "format_version": FORMAT_VERSION,
            "progress": dataclasses.asdict(state.progress),
            "identity": state.identity,
        }
        (folder / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first; directories under temporary names are none."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(run: Path, resume: str) -> Path:
    """`latest` or a path. Raises ValueError naming what is missing."""
    if resume != "latest":
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise ValueError(f"--resume {resume}: not a checkpoint directory (it has no state.json)")
        return path
    found = list_checkpoints(run)
    if not found:
        raise ValueError(f"--resume latest: {run / 'checkpoints'} holds no checkpoint; start without --resume")
    return found[-1]


def load_checkpoint(path: Path, state: State) -> Progress:
    """Fill model, optimiser and average from a checkpoint. Raises ValueError if it belongs to other data or another recipe."""
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {facts.get('format_version')}, this version reads {FORMAT_VERSION}")
    for key, value in state.identity.items():
        if facts["identity"].get(key) != value:
            raise ValueError(
                f"{path}: its {key} is not this run's: it was trained on other data or with another recipe"
            )
    names = _parameter_names(state.model)
    try:
        _copy_into(names, load_file(path / "model.safetensors"))
        _load_optimizer(state.optimizer, names, load_file(path / "optimizer.safetensors"))
        if state.average is not None:
            _copy_into(dict(zip(names, state.average.values, strict=True)), load_file(path / "average.safetensors"))
    except (OSError, KeyError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({error}); resume from an older one") from None
    return Progress(**facts["progress"])


def _parameter_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Each parameter once, tied weights under their first name."""
    return dict(model.named_parameters())


@torch.no_grad()
def _copy_into(targets: dict[str, Tensor] | dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(tensors[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in names.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}|{key}"] = value.detach().contiguous()
    return tensors


def _load_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = names[name]
        on_device = tensor if key == "step" and parameter.device.type == "cpu" else tensor.to(parameter.device)
        optimizer.state[parameter][key] = on_device


def save_best(
    run: Path, model: GenRecForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: Path, step: int
) -> Path:
    """Write `best/`: what `from_pretrained` loads, and the catalogue that turns rows into the user's own ids."""
    path = run / "best"
    logging.disable_progress_bar()  # of transformers: a bar for a file that is written in a moment
    with atomic_directory(path, overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in ("items.parquet", "users.parquet"):
            shutil.copyfile(data / name, folder / name)
        (folder / "step.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    return path


def write_status(run: Path, status: str, **facts: object) -> None:
    """`status.json`: the truth about a run whatever its launcher returned."""
    with atomic_file(run / "status.json") as temporary:
        temporary.write_text(json.dumps({"status": status, "pid": os.getpid(), **facts}, indent=1), encoding="utf-8")
