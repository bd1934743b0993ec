"""Checkpoints that are complete or absent, and the best model in Hugging Face's form. No pickle
anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from genrec_shards.atomic import atomic_directory, atomic_file
from genrec_shards.storage.manifest import file_sha256
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from genrec_dist.data.word_table import VOCABULARY_FILE, WordTable
from genrec_dist.decoding.trie import TRIE_FILE, Trie, hash_of_words, save_trie
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.optimizer import AveragedWeights
from genrec_dist.training.engine import Engine, Fragment
from genrec_dist.training.id_tables import IdTables

FORMAT_VERSION = 2
FRESH = "fresh"
"""Origin of a run that begins with no other's weights."""


@dataclass
class Progress:
    """Where a run stands; with weights, optimiser and average, all a resume needs: order, masks and
    dropout are functions."""

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

    engine: Engine
    average: AveragedWeights | None
    tables: IdTables
    progress: Progress
    identity: dict[str, str]
    """Hashes of sequences, numbering, recipe, vocabulary and origin that a resume must meet
    again."""


def checkpoint_dir(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(run: Path, state: State, keep: int, ranks: Ranks) -> Path:
    """Write `checkpoints/step-N/` whole under a temporary name, give it its own, and only then drop
    the oldest.

    Collective. Each rank writes the stretches of weights and moments it owns, so nothing is
    gathered, and any number of ranks at any ZeRO stage can read them. If one rank cannot write, all
    raise and nothing is left."""
    path = checkpoint_dir(run, state.progress.step)
    with contextlib.ExitStack() as stack:
        folder = ranks.broadcast_str(
            ranks.run_on_all(
                lambda: (
                    str(stack.enter_context(atomic_directory(path, overwrite=True)))
                    if ranks.is_main
                    else ""
                )
            )
        )
        written = ranks.all_gather_str(
            ranks.run_on_all(lambda: _write_rank(Path(folder), state, ranks))
        )
        ranks.run_on_all(lambda: _write_facts(Path(folder), state, written, ranks))
        ranks.run_on_all(stack.close)  # the directory takes its name
    if ranks.is_main:
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return path


def _write_rank(folder: Path, state: State, ranks: Ranks) -> str:
    """Write this rank's files and give their lines of `state.json`; none if others hold all that it
    holds."""
    files = state.tables.save(folder)
    if state.engine.fragments:
        files.append(_write_fragments(folder, state, ranks))
    return json.dumps(
        [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        ]
    )


def _write_fragments(folder: Path, state: State, ranks: Ranks) -> Path:
    path = folder / f"rank-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
    held = sorted({fragment.master for fragment in state.engine.fragments})
    tensors = {
        f"{kind}.{master}": values[master].detach().reshape(-1).contiguous()
        for kind, values in _kinds(state).items()
        for master in held
    }
    table = [dataclasses.astuple(fragment) for fragment in state.engine.fragments]
    save_file(tensors, path, metadata={"fragments": json.dumps(table)})
    return path


def _kinds(state: State) -> dict[str, list[Tensor]]:
    """What is stored of each master: its values, the optimiser's moments, the running average."""
    engine = state.engine
    kinds = {"weight": engine.masters}
    moments = engine.optimizer.state.get(engine.masters[0], {})
    for key in moments:
        if key != "step":
            kinds[key] = [engine.optimizer.state[master][key] for master in engine.masters]
    if state.average is not None:
        kinds["average"] = state.average.values
    return kinds


def _write_facts(folder: Path, state: State, lines: list[str], ranks: Ranks) -> None:
    if not ranks.is_main:
        return
    files = [file for line in lines for file in json.loads(line)]
    for file in files:
        path = folder / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise ValueError(
                f"{path}: written by its rank, not seen by rank 0: the run has to lie where all nodes see it"
            )
    moments = state.engine.optimizer.state.get(state.engine.masters[0], {})
    facts = {
        "format_version": FORMAT_VERSION,
        "progress": dataclasses.asdict(state.progress),
        "identity": state.identity,
        "optimizer_step": int(moments["step"]) if "step" in moments else 0,
        "files": files,
    }
    (folder / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first; directories under temporary names are none."""
    found = [
        path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(run: Path, resume: str) -> Path:
    """`latest` or a path. Raises ValueError naming what is missing."""
    if resume != "latest":
        path = Path(resume)
        if not (path / "state.json").is_file():
            raise ValueError(
                f"--resume {resume}: not a checkpoint directory (it has no state.json)"
            )
        return path
    found = list_checkpoints(run)
    if not found:
        raise ValueError(
            f"--resume latest: {run / 'checkpoints'} holds no checkpoint; start without --resume"
        )
    return found[-1]


@dataclass(frozen=True)
class _Piece:
    """A fragment of a parameter in a file."""

    file: str
    fragment: Fragment


class Checkpoint:
    """A checkpoint that all ranks have found whole, open for reading."""

    def __init__(self, path: Path, identity: dict[str, str], ranks: Ranks):
        """Collective; ranks share the reading that the check takes. Raises ValueError, on all
        ranks, if it is damaged or belongs to other data or another recipe."""
        self.path = path
        self.facts: dict[str, Any] = ranks.run_on_all(lambda: _read_facts(path, identity))
        ranks.run_on_all(lambda: self._check_files(self.facts["files"][ranks.rank :: ranks.size]))
        self.pieces: dict[str, list[_Piece]] = ranks.run_on_all(self._index)

    @property
    def progress(self) -> Progress:
        return Progress(**self.facts["progress"])

    def _check_files(self, files: list[dict[str, Any]]) -> None:
        for file in files:
            path = self.path / file["name"]
            if (
                not path.is_file()
                or path.stat().st_size != file["bytes"]
                or file_sha256(path) != file["sha256"]
            ):
                raise ValueError(f"{path}: damaged or missing; resume from an older checkpoint")

    def _index(self) -> dict[str, list[_Piece]]:
        pieces: dict[str, list[_Piece]] = {}
        for file in self.facts["files"]:
            if not file["name"].startswith("rank-"):
                continue
            with safe_open(self.path / file["name"], "pt") as tensors:
                for values in json.loads(tensors.metadata()["fragments"]):
                    piece = _Piece(file["name"], Fragment(*values))
                    pieces.setdefault(piece.fragment.name, []).append(piece)
        return pieces

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """float32 [numel] of a flattened parameter from `start` on, whoever wrote it. Raises
        ValueError for a gap."""
        values = torch.empty(numel)
        found = 0
        for piece in self.pieces.get(name, []):
            part = piece.fragment
            low, high = max(start, part.start), min(start + numel, part.start + part.numel)
            if low >= high:
                continue
            with safe_open(self.path / piece.file, "pt") as tensors:
                at = part.offset + low - part.start
                values[low - start : high - start] = tensors.get_slice(f"{kind}.{part.master}")[
                    at : at + high - low
                ]
            found += high - low
        if found != numel:
            raise ValueError(
                f"{self.path}: {found} of {numel} values of {name} ({kind}) in it: another model's, or damaged"
            )
        return values

    def weights(self, kind: str = "weight") -> dict[str, Tensor]:
        """Each parameter whole and flat, by name: what a checkpoint of any number of ranks
        holds."""
        lengths = {
            name: max(p.fragment.start + p.fragment.numel for p in parts)
            for name, parts in self.pieces.items()
        }
        return {name: self.read(kind, name, 0, length) for name, length in lengths.items()}

    @torch.no_grad()
    def fill_model(self, model: torch.nn.Module) -> None:
        """Before an engine is made of it, which then rounds or spreads the right values."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read("weight", name, 0, parameter.numel()).view_as(parameter))

    @torch.no_grad()
    def restore(self, state: State) -> Progress:
        """Fill moments and average of an engine that was made of a filled model, and the id tables
        outside it."""
        state.tables.load(self.path)
        engine, step = state.engine, self.facts["optimizer_step"]
        kinds: dict[str, list[Tensor]] = {}
        if step > 0:
            for master in engine.masters:
                engine.optimizer.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    **{key: torch.zeros_like(master, requires_grad=False) for key in _MOMENTS},
                }
            kinds = {
                key: [engine.optimizer.state[m][key] for m in engine.masters] for key in _MOMENTS
            }
        if state.average is not None:
            kinds["average"] = state.average.values
        # Where ranks hold the same, one writes and all read.
        for fragment in engine.fragments_read:
            for kind, values in kinds.items():
                flat = values[fragment.master].detach().view(-1)
                flat[fragment.offset : fragment.offset + fragment.numel] = self.read(
                    kind, fragment.name, fragment.start, fragment.numel
                ).to(flat.device)
        return self.progress


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _read_facts(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = facts.get("format_version")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path / 'state.json'}: damaged ({error}); resume from an older checkpoint"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {version}, this version reads {FORMAT_VERSION}: start without --resume"
        )
    # Checkpoints from before runs could begin from another have no origin.
    found = {"origin": FRESH, **facts["identity"]}
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path}: its {key} is not this run's: it was trained on other data or with another recipe"
            )
    return facts


def save_best(
    run: Path,
    model: GenRecForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    words: WordTable,
    trie: Trie,
    data: Path,
    step: int,
) -> Path:
    """Write `best/`: what `from_pretrained` loads, the trie of the words, and the catalogue that
    turns rows into the user's own ids."""
    path = run / "best"
    logging.disable_progress_bar()  # of transformers: a bar for a file that is written in a moment
    with atomic_directory(path, overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if words.vocabulary is not None:
            words.vocabulary.save(folder / VOCABULARY_FILE)
        for name in ("items.parquet", "users.parquet"):
            shutil.copyfile(data / name, folder / name)
        words_hash = hash_of_words(*words.tokens_of_items())
        save_trie(
            trie,
            folder / TRIE_FILE,
            numbering_hash=model.config.numbering_hash,
            words_hash=words_hash,
        )
        (folder / "step.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    return path


def write_status(run: Path, status: str, **facts: object) -> None:
    """`status.json`: the truth about a run whatever its launcher returned."""
    with atomic_file(run / "status.json") as temporary:
        temporary.write_text(
            json.dumps({"status": status, "pid": os.getpid(), **facts}, indent=1), encoding="utf-8"
        )
