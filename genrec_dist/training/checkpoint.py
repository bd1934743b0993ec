"""Checkpoints that are complete or absent, and the best model in Hugging Face's form. No pickle
anywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from genrec_shards.atomic import atomic_directory
from genrec_shards.storage.manifest import file_sha256
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

from genrec_dist.config.model_manifest import write_model_manifest
from genrec_dist.data.word_table import VOCABULARY_FILE
from genrec_dist.decoding.trie import TRIE_FILE, Trie, hash_of_words, save_trie
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.model.causal.kinds import AnyModel, trained_parameters
from genrec_dist.model.optimizer import AveragedWeights
from genrec_dist.training.checkpoint_state import (
    STATE_FILE,
    Progress,
    StateFile,
    read_state,
    step_of,
)
from genrec_dist.training.engine import Engine, Segment
from genrec_dist.training.id_tables import IdTables
from genrec_dist.training.setup import TrainingSetup

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """What a checkpoint stores."""

    engine: Engine
    average: AveragedWeights | None
    tables: IdTables
    progress: Progress
    identity: dict[str, str]
    """Hashes of sequences, numbering, recipe, vocabulary and origin, which a resumed run must
    have too."""


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; directories under temporary or other names are not among
    them."""
    found = [path.parent for path in (run / "checkpoints").glob(f"step-*/{STATE_FILE}")]
    found = [path for path in found if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The directory that `resume` means: the newest one for `latest`, else a path.

    Returns:
        None for the latest of a run that has ended before its first checkpoint.

    Raises:
        ValueError: naming what is missing, or a folder that may be a checkpoint and is not named
            like one.
    """
    if resume != "latest":
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise ValueError(
                f"--resume {resume}: not a checkpoint directory (it has no state.json)"
            )
        return path
    for path in sorted((run / "checkpoints").glob("[!.]*")):
        if step_of(path) is None:
            raise ValueError(
                f"{path}: not a checkpoint's name (step-NUMBER), so the latest one is not known: "
                "move it elsewhere, or give --resume a directory"
            )
    found = list_checkpoints(run)
    if not found and not (run / "events.jsonl").is_file():
        raise ValueError(
            f"--resume latest: {run / 'checkpoints'} holds no checkpoint; start without --resume"
        )
    return found[-1] if found else None


class Checkpoint:
    """A checkpoint that all ranks have found undamaged, open for reading."""

    def __init__(
        self,
        path: Path,
        identity: dict[str, str],
        ranks: Ranks,
        setup: TrainingSetup | None = None,
    ):
        """Collective; the ranks share the reading that the check takes.

        Args:
            path: the checkpoint's directory.
            identity: what it has to have, as in `State.identity`; other keys are not compared.
            ranks: of the run.
            setup: of the run, to name the keys that differ, and how many steps it has.

        Raises:
            ValueError: on all ranks, if it is damaged or belongs to other data or another recipe.
        """
        self.path = path
        self.facts = ranks.run_on_all(lambda: read_state(path, identity, setup))
        ranks.run_on_all(lambda: self._check_files(self.facts["files"][ranks.rank :: ranks.size]))
        self.stored: dict[str, list[tuple[str, Segment]]] = ranks.run_on_all(self._index)
        """The segments of each parameter, and the files they are in."""

    @property
    def progress(self) -> Progress:
        """Of the run when it wrote this."""
        return Progress(**self.facts["progress"])

    def _check_files(self, files: list[StateFile]) -> None:
        for file in files:
            path = self.path / file["name"]
            is_whole = path.is_file() and path.stat().st_size == file["bytes"]
            if not is_whole or file_sha256(path) != file["sha256"]:
                raise ValueError(f"{path}: damaged or missing; resume from an older checkpoint")

    def _index(self) -> dict[str, list[tuple[str, Segment]]]:
        stored: dict[str, list[tuple[str, Segment]]] = {}
        for name in (file["name"] for file in self.facts["files"]):
            if not name.startswith("rank-"):
                continue
            with safe_open(self.path / name, "pt") as tensors:
                for values in json.loads(tensors.metadata()["fragments"]):
                    segment = Segment(*values)
                    stored.setdefault(segment.name, []).append((name, segment))
        return stored

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """A slice of a flattened parameter, from whatever ranks wrote it.

        Args:
            kind: `weight`, `exp_avg`, `exp_avg_sq` or `average`.
            name: of the parameter.
            start: first element.
            numel: number of elements.

        Returns:
            float32 [numel].

        Raises:
            ValueError: if not all of it is in the checkpoint.
        """
        # An example: two ranks wrote a parameter of 10 elements as [0, 6) and [6, 10), and 4 from
        # element 4 on are read: 2 from the first file, then 2 from the second.
        values, found = torch.empty(numel), 0
        for file, segment in self.stored.get(name, []):
            low = max(start, segment.start)
            high = min(start + numel, segment.start + segment.numel)
            if low >= high:
                continue
            first = segment.offset + low - segment.start
            with safe_open(self.path / file, "pt") as tensors:
                master = tensors.get_slice(f"{kind}.{segment.master}")
                values[low - start : high - start] = master[first : first + high - low]
            found += high - low
        if found != numel:
            raise ValueError(
                f"{self.path}: {found} of {numel} values of {name} ({kind}) in it: another "
                "model's, or damaged"
            )
        return values

    def weights(self, kind: str = "weight") -> dict[str, Tensor]:
        """Every parameter whole and flat, by name, whatever number of ranks wrote it."""
        lengths = {
            name: max(segment.start + segment.numel for _, segment in segments)
            for name, segments in self.stored.items()
        }
        return {name: self.read(kind, name, 0, length) for name, length in lengths.items()}

    @torch.no_grad()
    def fill_model(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model, before an engine rounds or shards them."""
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(self.read("weight", name, 0, parameter.numel()).view_as(parameter))

    @torch.no_grad()
    def restore(self, state: State) -> Progress:
        """Fill moments, average and id tables of an engine that was made of a filled model, and
        return the progress."""
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
        # Where ranks hold the same, one has written it and all read it.
        for segment in engine.segments_read:
            for kind, values in kinds.items():
                stored = self.read(kind, segment.name, segment.start, segment.numel)
                segment.of(values).copy_(stored)
        return self.progress


def save_best(setup: TrainingSetup, model: AnyModel, trie: Trie, step: int) -> Path:
    """Write the run's `best/`: what `from_pretrained` loads, the trie of the words, the catalogue
    that maps rows to the items' own ids, and to the users' where the model uses them, and the
    hashes of all files.

    Args:
        setup: of the run.
        model: whole, id tables inside.
        trie: of all items.
        step: global step that the weights are of.
    """
    path, words = setup.run / "best", setup.words
    logging.disable_progress_bar()  # transformers would show a bar for a moment's work
    with atomic_directory(path, overwrite=True) as folder:
        model.save_pretrained(folder)
        setup.tokenizer.save_pretrained(folder)
        if words.vocabulary is not None:
            words.vocabulary.save(folder / VOCABULARY_FILE)
        for name in ("items.parquet", *(["users.parquet"] if model.config.num_users else [])):
            shutil.copyfile(setup.dataset.path / name, folder / name)
        words_hash = hash_of_words(*words.tokens_of_items())
        numbering_hash = model.config.numbering_hash
        file = folder / TRIE_FILE
        save_trie(trie, file, numbering_hash=numbering_hash, words_hash=words_hash)
        (folder / "step.json").write_text(json.dumps({"step": step}), encoding="utf-8")
        # Not the trie: it has hashes of its own, and is built again where it was deleted.
        names = {each.name for each in folder.iterdir() if each.is_file()}
        write_model_manifest(folder, names - {TRIE_FILE})
    return path
