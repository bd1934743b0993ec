"""A run that begins with another's weights: what it takes over, what must agree, and how rows that
are new begin."""

# V tokens, U users, N items, n known ones, M new ones, D width

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.numbering.cooccurrence import WINDOW, cooccurrences
from genrec_shards.sequences import Sequences
from genrec_shards.storage.manifest import file_sha256
from torch import Tensor

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.trie import TRIE_FILE
from genrec_dist.inference.load import LoadedRun, load_model
from genrec_dist.model.build import like_before
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.training.id_tables import Kind


@dataclass(frozen=True)
class Origin:
    """What a run begins from."""

    path: str
    """As the recipe names it."""
    best: LoadedRun
    weights_hash: str
    """sha256 (hex) of its weights' files."""
    trained_through: str | None
    """None where no recipe lies beside the model."""

    @property
    def config(self) -> GenRecConfig:
        return self.best.model.config


@dataclass(frozen=True)
class Begun:
    """What a run has taken over, and what of it is new."""

    path: str
    weights_hash: str
    users: int
    """New ones, without a row in the origin; 0 where the model knows no users."""
    items: int
    tokens: int
    id_rows: dict[Kind, Tensor]
    """float32 [n, D], first rows of id tables that live outside the model."""

    def as_dict(self) -> dict[str, Any]:
        """For the start event."""
        return {
            "path": self.path,
            "weights_sha256": self.weights_hash,
            "new_users": self.users,
            "new_items": self.items,
            "new_tokens": self.tokens,
        }


def open_origin(path: str) -> Origin:
    """The model of a run directory (its `best/`), or of a directory like `best/`. Raises ValueError
    naming what is missing."""
    run = Path(path)
    folder = run / "best" if (run / "best").is_dir() else run
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"begin_from {path}: neither a run with best/ in it nor a model's directory: give a run of `genrec train` that has "
            "finished an epoch of finetuning"
        )
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != TRIE_FILE:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    recipe = folder.parent / "recipe.yaml"
    trained_through = load_recipe(recipe).trained_through if recipe.is_file() else None
    return Origin(path, load_model(folder), digest.hexdigest(), trained_through)


def check_origin(origin: Origin, recipe: Recipe, dataset: Dataset) -> None:
    """Raise ValueError, one line, where recipe or data do not go on from what the origin is."""
    config, model = origin.config, recipe.model
    told: dict[str, tuple[Any, Any]] = {
        "model.user_ids": (model.user_ids, config.num_users > 0),
        "model.item_ids": (model.item_ids, config.num_items > 0),
        "model.id_dim": (model.id_dim or config.d_model, config.id_dim or config.d_model),
        "model.encoder_unit": (model.encoder_unit, config.encoder_unit),
        "model.encoder_attention": (model.encoder_attention, config.encoder_attention),
        "model.positions": (model.positions, config.encoder_positions),
        "model.decoder_start": (model.decoder_start, config.decoder_start),
        "tokens.trim": (recipe.tokens.trim, config.spoken_tokens > 0),
        "tokens.certain": (recipe.tokens.certain, config.certain_tokens),
    }
    if model.backbone is None:  # else its weights have set these, and the origin has them
        told |= {
            "model.d_model": (model.d_model, config.d_model),
            "model.encoder_layers": (model.encoder_layers, config.encoder_layers),
            "model.decoder_layers": (model.decoder_layers, config.decoder_layers),
            "model.heads": (model.heads, config.encoder_attention_heads),
            "model.ffn": (model.ffn, config.encoder_ffn_dim),
            "model.scale_embedding": (model.scale_embedding, config.scale_embedding),
        }
    for key, (ours, theirs) in told.items():
        if ours != theirs:
            raise ValueError(
                f"begin_from {origin.path}: {key} is {_yaml(ours)} in the recipe and {_yaml(theirs)} in its model: set {key}="
                f"{_yaml(theirs)}, or begin anew"
            )
    if model.max_tokens > config.max_position_embeddings:
        raise ValueError(
            f"begin_from {origin.path}: model.max_tokens {model.max_tokens}: its model has "
            f"{config.max_position_embeddings} positions"
        )
    if recipe.num_masks > config.num_masks:
        raise ValueError(
            f"begin_from {origin.path}: mask.k {recipe.num_masks}: its tokenizer has {config.num_masks} masks: lower it, or "
            "begin anew"
        )
    if origin.trained_through == "n-1" and recipe.trained_through == "n-2":
        raise ValueError(
            f"begin_from {origin.path}: trained_through n-2, and its weights have learned validation items (n-1): set "
            "trained_through=n-1, or begin from a run of n-2"
        )
    if origin.config.split != dataset.info.split_name:
        raise ValueError(
            f"begin_from {origin.path}: its weights were learned under the split {origin.config.split}, {dataset.path} has "
            f"{dataset.info.split_name}: they may know what is held out here; begin from a run on this split"
        )
    _check_catalogue(origin, dataset)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_catalogue(origin: Origin, dataset: Dataset) -> None:
    """The origin's rows are the first ones of the data."""
    before, codes = origin.best.catalogue, dataset.numbering
    rows = [
        ("item", dataset.sequences.item_ids, codes.item_codes, before.item_ids, before.item_codes)
    ]
    if origin.config.num_users:
        rows.append(
            (
                "user",
                dataset.sequences.user_ids,
                codes.user_codes,
                before.user_ids,
                before.user_codes,
            )
        )
    for kind, ids, words, known_ids, known_words in rows:
        if ids[: len(known_ids)] == known_ids and words[: len(known_words)] == known_words:
            continue
        if len(ids) < len(known_ids):
            reason = f"it knows {len(known_ids):,} {kind}s, {dataset.path} has {len(ids):,}"
        else:
            ours, theirs = (
                list(zip(ids, words, strict=True)),
                list(zip(known_ids, known_words, strict=True)),
            )
            row = next(row for row, word in enumerate(theirs) if ours[row] != word)
            reason = f"its {kind} row {row} is {_word(theirs[row])}, in {dataset.path} it is {_word(ours[row])}"
        raise ValueError(
            f"begin_from {origin.path}: {reason}: give its own data, or what `genrec prepare --append` has made of them"
        )


def _word(word: tuple[str, str]) -> str:
    id_, code = (part if len(part) <= 40 else f"{part[:40]}..." for part in word)
    return f"{id_!r} with code {code!r}"


def begin_model(
    origin: Origin,
    recipe: Recipe,
    dataset: Dataset,
    words: WordTable,
    vocab_size: int,
    special: dict[str, int],
) -> tuple[GenRecForConditionalGeneration, Begun]:
    """The origin's model with room for the words of the data; a function of the seed torch stands
    at where rows are new.

    Old rows are the origin's to the bit. New rows: an item's (of the id table, and of its token
    where each item is one token) the mean of the rows of its neighbours in the training parts,
    weighted by how near they stand; an item without any, and another token that items speak, the
    mean of the old ones in its place and a fresh row; users' and all else fresh. `vocab_size`,
    `special`: in ids of the tokenizer, as `build_model` takes them."""
    before = origin.best.model
    model = like_before(
        before.config,
        recipe.model,
        vocab_size=max(vocab_size, before.config.vocab_size if words.vocabulary is None else 0),
        num_users=words.num_users,
        num_items=words.num_items,
        num_masks=words.num_masks,
        special=special,
        ids_outside=recipe.optimizer.id_tables != "dense",
        vocabulary=words.vocabulary,
    )
    known = len(origin.best.catalogue.item_ids)
    nearness_MN = neighbour_shares(dataset.sequences, known)
    old_V = _old_rows(origin, words, model.config.vocab_size)
    begun = Begun(
        origin.path,
        origin.weights_hash,
        users=model.config.num_users - before.config.num_users if model.config.num_users else 0,
        items=words.num_items - known,
        tokens=int((old_V < 0).sum()),
        id_rows=_fill(model, before, words, old_V, nearness_MN),
    )
    return model, begun


def neighbour_shares(sequences: Sequences, known: int) -> sp.csr_matrix:
    """float64 [M, n], how much each known item counts for a new one, rows of sum 1; of zeros where
    none stands near it.

    Steps apart and mass of the known item as in `neighbour_vectors`, over the training parts
    t_1..t_{n-2} alone."""
    if known == sequences.num_items:
        return sp.csr_matrix((0, known))
    weights_NN = cooccurrences(sequences, WINDOW)
    mass_N = np.asarray(weights_NN.sum(axis=1)).ravel()
    near_MN = (weights_NN[known:, :known] @ sp.diags(1 / np.sqrt(mass_N[:known] + 1))).tocsr()
    total_M = np.asarray(near_MN.sum(axis=1)).ravel()
    return (
        sp.diags(np.divide(1, total_M, out=np.zeros_like(total_M), where=total_M > 0)) @ near_MN
    ).tocsr()


def _old_rows(origin: Origin, words: WordTable, vocab_size: int) -> np.ndarray:
    """int64 [V], the origin's row of each of the model's tokens, -1 for a new one."""
    tokens_V = np.arange(vocab_size) if words.vocabulary is None else words.vocabulary.tokens
    held = origin.best.words.vocabulary
    if held is None:
        return np.where(tokens_V < origin.config.vocab_size, tokens_V, -1)
    old_V = np.full(vocab_size, -1)
    kept = np.isin(tokens_V, held.tokens)
    old_V[kept] = held.numbers(tokens_V[kept])
    return old_V


@torch.no_grad()
def _fill(
    model: GenRecForConditionalGeneration,
    before: GenRecForConditionalGeneration,
    words: WordTable,
    old_V: np.ndarray,
    nearness_MN: sp.csr_matrix,
) -> dict[Kind, Tensor]:
    """Put the origin's weights in, begin the rows that are new; the first rows of tables that live
    outside."""
    theirs = dict(before.named_parameters())
    outside: dict[Kind, Tensor] = {}
    kinds: Sequence[Kind] = ("user", "item")
    tables = {f"{kind}_embedding.weight" for kind in kinds}
    for name, parameter in model.named_parameters():
        if name == "model.shared.weight":
            _fill_tokens(parameter, theirs[name], words, old_V, nearness_MN)
        elif name not in tables:
            parameter.copy_(theirs[name])
    inside = dict(model.named_parameters())
    for kind in kinds:
        name = f"{kind}_embedding.weight"
        if name not in theirs:
            continue
        rows = theirs[name].detach()
        if kind == "item":
            fresh = (
                inside[name][len(rows) :]
                if name in inside
                else _drawn(nearness_MN.shape[0], rows, before.config)
            )
            rows = torch.cat([rows, _begun(rows[1:], nearness_MN, fresh)])
        if name in inside:
            inside[name][: len(rows)] = rows
        else:
            outside[kind] = rows[1:].clone()
    return outside


def _drawn(num_rows: int, like: Tensor, config: GenRecConfig) -> Tensor:
    return torch.randn(num_rows, like.shape[1]) * config.init_std


def _fill_tokens(
    table_VD: Tensor,
    theirs: Tensor,
    words: WordTable,
    old_V: np.ndarray,
    nearness_MN: sp.csr_matrix,
) -> None:
    kept = torch.from_numpy(old_V >= 0)
    table_VD[kept] = theirs[torch.from_numpy(old_V[old_V >= 0])]
    tokens, offsets = words.tokens_of_items()
    lengths, known = np.diff(offsets), nearness_MN.shape[1]
    if (lengths == 1).all():
        rows_M = torch.from_numpy(tokens[known:].astype(np.int64))
        is_new_M = ~kept[rows_M]
        known_rows = table_VD[torch.from_numpy(tokens[:known].astype(np.int64))]
        begun_MD = _begun(known_rows, nearness_MN, table_VD[rows_M])
        table_VD[rows_M[is_new_M]] = begun_MD[is_new_M]
        return
    places = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    for place in range(int(lengths.max(initial=0))):
        here = np.unique(tokens[places == place]).astype(np.int64)
        new = here[old_V[here] < 0]
        there = here[old_V[here] >= 0]
        if len(new) and len(there):
            table_VD[torch.from_numpy(new)] += table_VD[torch.from_numpy(there)].mean(0)


def _begun(known_ND: Tensor, nearness_MN: sp.csr_matrix, fresh_MD: Tensor) -> Tensor:
    """[M, D]: the mean of the neighbours' rows, or of all rows and a fresh one, so that no two
    begin alike."""
    near_MD = torch.from_numpy(nearness_MN @ known_ND.double().numpy()).to(fresh_MD.dtype)
    alone_M = torch.from_numpy(np.diff(nearness_MN.indptr) == 0)
    near_MD[alone_M] = known_ND.mean(0) + fresh_MD[alone_M]
    return near_MD
