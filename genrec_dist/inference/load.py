"""A trained run, loaded: model, words, trie and the user's own ids."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from genrec_shards.dataset import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from genrec_dist.data.encoder_input import Certain, Layout
from genrec_dist.data.word_table import (
    VOCABULARY_FILE,
    ItemTexts,
    WordTable,
    build_words,
    load_vocabulary,
    trim,
)
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import (
    TRIE_FILE,
    Trie,
    build_trie,
    certain_tokens,
    hash_of_words,
    load_trie,
)
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration


@dataclass(frozen=True)
class Catalogue:
    """Ids and codes by row."""

    item_ids: list[str]
    item_codes: list[str]
    user_ids: list[str]
    user_codes: list[str]

    @cached_property
    def item_row(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.item_ids)}

    @cached_property
    def user_row(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.user_ids)}


@dataclass(frozen=True)
class LoadedRun:
    path: Path
    model: GenRecForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    words: WordTable
    layout: Layout
    searcher: TrieSearcher
    catalogue: Catalogue


def make_layout(words: WordTable, config: GenRecConfig) -> Layout:
    """The encoder's input as this model was built to read it."""
    return Layout(
        words=words,
        pad_token=config.pad_token_id,
        max_tokens=config.max_input_tokens,
        user_ids=config.num_users > 0,
        positions=config.encoder_positions,  # type: ignore[arg-type]
        unit=config.encoder_unit,  # type: ignore[arg-type]
        causal=config.encoder_attention == "causal",
        certain=_certain(words) if config.certain_tokens == "given" else None,
    )


def _certain(words: WordTable) -> Certain:
    """Raises ValueError for a catalogue of one item, about which there is nothing to learn."""
    if words.num_items < 2:
        raise ValueError(
            "tokens.certain given: a catalogue of one item leaves nothing to learn: set it to learned"
        )
    tokens, ends = np.zeros(len(words.tokens), bool), np.zeros(len(words.lengths), bool)
    items = slice(words.first_item_word, words.first_user_word)
    first, last = words.offsets[items.start], words.offsets[items.stop]
    tokens[first:last], ends[items] = certain_tokens(build_trie(*words.tokens_of_items()))
    return Certain(tokens, ends)


def make_searcher(
    model: GenRecForConditionalGeneration,
    words: WordTable,
    device: torch.device | str,
    *,
    items: np.ndarray | None = None,
    texts: ItemTexts | None = None,
) -> TrieSearcher:
    """A searcher over all items, or over these rows alone; `texts` for mode `free`. Raises
    ValueError if no item is left or a row is no item's."""
    trie = build_trie(*words.tokens_of_items())
    searcher = TrieSearcher(model, trie, device, texts=texts)
    return searcher if items is None else searcher.among(items)


def load_run(run: str | Path, device: torch.device | str = "cpu") -> LoadedRun:
    """Load `best/` of a run directory for decoding. Raises ValueError naming what is missing,
    damaged or of another numbering."""
    path = Path(run)
    if not (path / "best" / "config.json").is_file():
        raise ValueError(f"{path}: no best/ in it: {_state_of(path)}")
    return replace(load_model(path / "best", device), path=path)


def load_model(best: Path, device: torch.device | str = "cpu") -> LoadedRun:
    """Load `best/` itself, or a copy of it; its own path stands for the run's. Raises ValueError as
    `load_run`."""
    logging.disable_progress_bar()  # of transformers: a bar for a file that loads in a second
    try:
        model = (
            GenRecForConditionalGeneration.from_pretrained(best, dtype=torch.float32)
            .to(device)
            .eval()
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(best)
        catalogue = _read_catalogue(best)
    except Exception as error:  # four libraries, each with errors of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{best}: damaged or incomplete ({reason}): copy it again, or train again"
        ) from None
    words = build_words(
        tokenizer, catalogue.item_codes, catalogue.user_codes, model.config.num_masks
    )
    if model.config.spoken_tokens:
        vocabulary = load_vocabulary(best / VOCABULARY_FILE, model.config.vocabulary_hash)
        words = trim(words, tokenizer.pad_token_id, vocabulary)
    layout = make_layout(words, model.config)
    texts = ItemTexts(tokenizer, catalogue.item_codes, words.vocabulary)
    searcher = TrieSearcher(model, _trie_of(best, words, model.config), device, texts=texts)
    return LoadedRun(best, model, tokenizer, words, layout, searcher, catalogue)


def _trie_of(best: Path, words: WordTable, config: GenRecConfig) -> Trie:
    """The trie beside the model, or a new one for a run that was saved without."""
    arrays = words.tokens_of_items()
    path = best / TRIE_FILE
    if not path.is_file():
        return build_trie(*arrays)
    return load_trie(path, numbering_hash=config.numbering_hash, words_hash=hash_of_words(*arrays))


def _read_catalogue(best: Path) -> Catalogue:
    items = pq.read_table(best / "items.parquet", columns=["id", "code"])
    users = pq.read_table(best / "users.parquet", columns=["id", "code"])
    return Catalogue(
        items.column("id").to_pylist(),
        items.column("code").to_pylist(),
        users.column("id").to_pylist(),
        users.column("code").to_pylist(),
    )


def _state_of(path: Path) -> str:
    try:
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError):
        return "is it a directory of `genrec train`?"
    return f"the run's status is {status!r}; it has not finished an epoch of finetuning yet"


def check_numbering(run: LoadedRun, dataset: Dataset) -> None:
    """Raise ValueError if the run was trained on other codes, or on equal codes that stand for
    other ids."""
    expected = run.model.config.numbering_hash
    found = dataset.numbering.numbering_hash()
    if expected != found:
        raise ValueError(
            f"{run.path} speaks numbering {expected[:12]}, {dataset.path} has {found[:12]}: "
            "give --data the directory the run was trained on"
        )
    # Codes are 1..N of a seeded order: two catalogues of equal size share them.
    for kind, ours, theirs in (
        ("item", run.catalogue.item_ids, dataset.sequences.item_ids),
        ("user", run.catalogue.user_ids, dataset.sequences.user_ids),
    ):
        if ours != theirs:
            mine, other = next(
                pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]
            )
            raise ValueError(
                f"{run.path} knows {kind} {mine!r} where {dataset.path} has {other!r}: "
                "give --data the directory the run was trained on"
            )


def check_split(run: LoadedRun, dataset: Dataset) -> None:
    """Raise ValueError where what the run has learned may be what is asked here."""
    learned, asked = run.model.config.split, dataset.info.split_name
    if learned != asked:
        raise ValueError(
            f"{run.path} was trained under the split {learned}, {dataset.path} has {asked}: it may have learned what is held out "
            "here; give --data of its own split"
        )


def best_device() -> torch.device:
    """This process's GPU, or the CPU where there is none or the launcher wants it."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
    ):
        return torch.device("cpu")
    # A launcher either shows each process one GPU, or all of them.
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
