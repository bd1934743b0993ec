"""A trained run, loaded: model, words, trie and the user's own ids."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.readers.documents import read_object

from genrec_dist.config.hub import run_folder
from genrec_dist.config.model_config import REMEDY, ModelFileError, read_model_config
from genrec_dist.config.model_manifest import start_check
from genrec_dist.config.paths import best_folder
from genrec_dist.data.layout import ForcedTokens, Layout
from genrec_dist.data.light_tokenizer import light_tokenizer
from genrec_dist.data.word_table import (
    VOCABULARY_FILE,
    ItemTexts,
    WordTable,
    WordTokenizer,
    build_words,
    load_vocabulary,
    trim,
)
from genrec_dist.decoding.decoder_state import Searchable
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import TRIE_FILE, build_trie, forced_tokens, hash_of_words, load_trie
from genrec_dist.model.causal.config import PROMPT_FILE, PromptedConfig
from genrec_dist.model.light import WithoutInit, light_config, load_light
from genrec_dist.model.weights import WEIGHTS, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from genrec_dist.model.build import CodedConfig


@dataclass(frozen=True)
class Catalogue:
    """Ids and codes by row. A model without user ids has no users here: `best/` then names none."""

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
    model: Any
    """A `GenRecForConditionalGeneration`; where it is loaded for decoding alone, a `LightGenRec`
    with the same weights. Or a T5 with ids, or a `PromptedModel`."""
    tokenizer: WordTokenizer
    words: WordTable
    layout: Layout
    searcher: TrieSearcher
    catalogue: Catalogue


def forced_of(words: WordTable, certain_tokens: str) -> ForcedTokens | None:
    """The tokens of items that are the only continuation in the trie, where they are given. Raises
    ValueError where they are and there is one item, of which nothing can be learned."""
    if certain_tokens != "given":
        return None
    if words.num_items < 2:
        raise ValueError(
            "tokens.forced given: a catalogue of one item leaves nothing to learn: "
            "set it to learned"
        )
    tokens, ends = np.zeros(len(words.tokens), bool), np.zeros(len(words.lengths), bool)
    items = slice(words.first_item_word, words.first_user_word)
    first, last = words.offsets[items.start], words.offsets[items.stop]
    tokens[first:last], ends[items] = forced_tokens(build_trie(*words.tokens_of_items()))
    return ForcedTokens(tokens, ends)


def nodes_of(words: WordTable, softmax: str) -> np.ndarray | None:
    """`Layout.nodes`, where the softmax is over siblings."""
    if softmax != "siblings":
        return None
    nodes, trie = np.zeros(len(words.tokens), np.int64), build_trie(*words.tokens_of_items())
    first, last = words.offsets[[words.first_item_word, words.first_user_word]]
    paths_NT = trie.item_paths()
    nodes[first:last] = paths_NT[paths_NT >= 0]
    return nodes


def make_layout(words: WordTable, config: CodedConfig) -> Layout:
    """The encoder's input as this model was built to read it. Raises ValueError as `forced_of`."""
    return Layout(
        words=words,
        pad_token=config.pad_token_id,
        max_tokens=config.max_input_tokens,
        user_ids=config.num_users > 0,
        positions=config.encoder_positions,  # type: ignore[arg-type]
        unit=config.encoder_unit,  # type: ignore[arg-type]
        causal=config.encoder_attention == "causal",
        forced=forced_of(words, config.certain_tokens),
        nodes=nodes_of(words, config.softmax),
    )


def make_searcher(model: Searchable, words: WordTable, device: torch.device | str) -> TrieSearcher:
    """A searcher over all items, for all modes but `free`."""
    return TrieSearcher(model, build_trie(*words.tokens_of_items()), device)


def load_run(
    run: str | Path,
    device: torch.device | str = "cpu",
    *,
    light: bool = False,
    checked: Future[None] | None = None,
) -> LoadedRun:
    """Load `best/` of a run directory for decoding.

    Args:
        run: the run directory, or `hf://owner/name[@revision]`.
        device: where the model is put.
        light: without transformers where that is possible, which loads 3 s of a core sooner; the
            lists are the same.
        checked: `start_check` of its `best/`, where that was begun earlier.

    Raises:
        ValueError: Naming what is missing, damaged or of another numbering.
    """
    path = run_folder(run)
    return replace(load_model(best_folder(path), device, light=light, checked=checked), path=path)


def load_model(
    best: Path,
    device: torch.device | str = "cpu",
    *,
    light: bool = False,
    checked: Future[None] | None = None,
) -> LoadedRun:
    """Load `best/` itself, or a copy of it; its own path is the run's. Raises ValueError as
    `load_run`."""
    checked = checked or start_check(best)
    try:
        loaded = _load_unchecked(best, device, light)
    except Exception:  # whatever a damaged file led to
        checked.result()  # names the file
        raise
    checked.result()
    return loaded


def _load_unchecked(best: Path, device: torch.device | str, light: bool) -> LoadedRun:
    """`load_model` without the manifest."""
    try:
        is_prompted = (best / PROMPT_FILE).is_file()
        if is_prompted:
            model, tokenizer = _prompted_parts(best)
        else:
            model, tokenizer = (light and _light_parts(best)) or _whole_parts(best)
        model = model.to(device).eval()
        items = _read_table(best, "items", ["id", "code", *(["title"] if is_prompted else [])])
        users: dict[str, list[str]] = {"id": [], "code": []}
        if model.config.num_users:
            users = _read_table(best, "users", ["id", "code"])
    except ModelFileError:
        raise
    except Exception as error:  # four libraries, each with errors of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{best}: damaged or incomplete ({reason}): copy it again, or train again"
        ) from None
    catalogue = Catalogue(
        item_ids=items["id"],
        item_codes=items["code"],
        user_ids=users["id"],
        user_codes=users["code"],
    )
    sizes = {"items": (items, model.config.num_items), "users": (users, model.config.num_users)}
    for name, (table, rows) in sizes.items():
        if rows and len(table["id"]) != rows:
            raise ModelFileError(
                f"{best / name}.parquet: {len(table['id']):,} rows, and the model has {rows:,}: "
                f"{REMEDY}"
            )
    if is_prompted:
        layout, texts = _title_layout(model.config, tokenizer, items["title"])
    else:
        layout, texts = _coded_layout(best, model.config, tokenizer, catalogue)
    config, words = model.config, layout.words
    arrays, trie_path = words.tokens_of_items(), best / TRIE_FILE
    if trie_path.is_file():
        words_hash = hash_of_words(*arrays)
        trie = load_trie(trie_path, numbering_hash=config.numbering_hash, words_hash=words_hash)
    else:  # a run that was saved without
        trie = build_trie(*arrays)
    searcher = TrieSearcher(model, trie, device, texts=texts)
    return LoadedRun(
        path=best,
        model=model,
        tokenizer=tokenizer,
        words=words,
        layout=layout,
        searcher=searcher,
        catalogue=catalogue,
    )


def _read_table(best: Path, name: str, columns: list[str]) -> dict[str, list[str]]:
    """Columns of `NAME.parquet` in a model's directory, of a pushed run of `NAME.json`."""
    if (best / f"{name}.json").is_file():
        held = read_object(best / f"{name}.json")
        return {column: list(map(str, held[column])) for column in columns}
    # Not `read_table`: that imports pandas where there is one, half a second.
    table: dict[str, list[str]] = (
        pq.ParquetFile(best / f"{name}.parquet").read(columns=columns).to_pydict()
    )
    return table


def _coded_layout(
    best: Path, config: CodedConfig, tokenizer: WordTokenizer, catalogue: Catalogue
) -> tuple[Layout, ItemTexts]:
    words = build_words(tokenizer, catalogue.item_codes, catalogue.user_codes, config.num_masks)
    if config.spoken_tokens:
        vocabulary = load_vocabulary(best / VOCABULARY_FILE, config.vocabulary_hash)
        words = trim(words, tokenizer.pad_token_id, vocabulary)
    texts = ItemTexts(tokenizer, catalogue.item_codes, words.vocabulary)
    return make_layout(words, config), texts


def _title_layout(
    config: PromptedConfig, tokenizer: PreTrainedTokenizerFast, titles: list[str]
) -> tuple[Layout, ItemTexts]:
    from genrec_dist.data.prompt.title_words import (
        TitleTexts,
        build_title_words,
        distinct_titles,
        make_prompt_layout,
    )

    titles = distinct_titles(titles)
    words = build_title_words(tokenizer, titles, config.template, config.separator)
    layout = make_prompt_layout(
        words,
        config.pad_token_id,
        config.max_input_tokens,
        config.max_titles,
        forced_of(words, config.certain_tokens),
    )
    return layout, TitleTexts(tokenizer, titles)


def _light_parts(best: Path) -> tuple[Any, WordTokenizer] | None:
    """Model and tokenizer without transformers; None where they cannot be had so."""
    config, tokenizer = light_config(best), light_tokenizer(best)
    return None if config is None or tokenizer is None else (load_light(best, config), tokenizer)


def _whole_parts(best: Path) -> tuple[Any, WordTokenizer]:
    """Model and tokenizer as transformers' classes."""
    from transformers import PreTrainedTokenizerFast

    from genrec_dist.model.build import CLASSES

    fields = read_model_config(best)  # its messages name the file
    config_class, model_class = CLASSES[fields.get("model_type", "genrec")]
    # Not the model's `from_pretrained`: that fills missing weights with random ones, and reads
    # other files where there is no model.safetensors. The attention is ours to choose: transformers
    # would fetch a kernel that a configuration names.
    config = config_class.from_pretrained(best, attn_implementation="sdpa")
    with torch.device("meta"), WithoutInit():
        model = model_class(config)
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model.load_state_dict(read_weights(best / WEIGHTS, expected), strict=False, assign=True)
    model.tie_weights()
    return model, PreTrainedTokenizerFast.from_pretrained(best)


def _prompted_parts(best: Path) -> tuple[Any, Any]:
    """A prompted model and its tokenizer."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    from genrec_dist.model.causal.build import load_prompted

    logging.disable_progress_bar()
    return load_prompted(best), PreTrainedTokenizerFast.from_pretrained(best)


def check_numbering(run: LoadedRun, dataset: Dataset) -> None:
    """Refuse data with other codes than the run was trained on, or with equal codes of other ids.
    Raises ValueError naming what differs."""
    remedy = "give --data the directory the run was trained on"
    expected = run.model.config.numbering_hash
    found = dataset.numbering.numbering_hash()
    if expected != found:
        raise ValueError(
            f"{run.path} was trained with numbering {expected[:12]}, "
            f"{dataset.path} has {found[:12]}: {remedy}"
        )
    # Codes are 1..N of a seeded order: two catalogues of equal size share them.
    ids = [("item", run.catalogue.item_ids, dataset.sequences.item_ids)]
    if run.model.config.num_users:
        ids.append(("user", run.catalogue.user_ids, dataset.sequences.user_ids))
    for kind, ours, theirs in ids:
        if ours != theirs:
            mine, other = next(
                pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]
            )
            raise ValueError(
                f"{run.path} knows {kind} {mine!r} where {dataset.path} has {other!r}: {remedy}"
            )


def check_split(run: LoadedRun, dataset: Dataset) -> None:
    """Refuse data of another split than the run's. Raises ValueError where the run may have learned
    what is held out here."""
    learned, given = run.model.config.split, dataset.info.split_name
    if learned != given:
        raise ValueError(
            f"{run.path} was trained under the split {learned}, {dataset.path} has {given}: "
            "it may have learned what is held out here; give --data of its own split"
        )


def best_device() -> torch.device:
    """This process's GPU, or the CPU where there is none or the launcher wants it."""
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if wants_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher either shows each process one GPU, or all of them.
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
