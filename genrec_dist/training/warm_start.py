"""A run that starts from another's weights: what it takes over, what must match, and how new rows
are initialised."""

# V tokens, U users, N items, n known ones, M new ones, D width

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from genrec_shards.dataset import Dataset
from genrec_shards.numbering.cooccurrence import WINDOW, cooccurrences
from genrec_shards.sequences import Sequences
from genrec_shards.storage.manifest import file_sha256
from torch import Tensor

from genrec_dist.config.paths import is_pushed, origin_folder, recipe_of
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.trie import TRIE_FILE
from genrec_dist.inference.load import LoadedRun, load_model
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.model.seq2seq.t5 import GenRecT5ForConditionalGeneration
from genrec_dist.training.id_tables import Kind


@dataclass(frozen=True)
class Origin:
    """The model that a run starts from."""

    path: str
    """As the recipe has it."""
    best: LoadedRun
    weights_hash: str
    """sha256 (hex) of the files of its weights."""
    trained_through: str | None
    """None where there is no recipe beside the model."""

    @property
    def config(self) -> GenRecConfig:
        """Of the model."""
        return self.best.model.config


@dataclass(frozen=True)
class WarmStart:
    """What a run has taken over, and what of it is new."""

    path: str
    weights_hash: str
    users: int
    """New ones, without a row in the origin; 0 where the model has no user ids."""
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
    folder = origin_folder(path)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != TRIE_FILE:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    recipe = recipe_of(folder if is_pushed(folder) else folder.parent)
    trained_through = recipe.trained_through if recipe else None
    best = load_model(folder)
    if isinstance(best.model, GenRecT5ForConditionalGeneration):
        raise ValueError(f"init_from {path}: a T5, from which no run can start: set it to null")
    if not isinstance(best.model, GenRecForConditionalGeneration):
        raise ValueError(
            f"init_from {path}: a model that reads titles; set model.backbone to "
            f"{folder} in a recipe with a prompt"
        )
    return Origin(path, best, digest.hexdigest(), trained_through)


def check_origin(origin: Origin, recipe: Recipe, dataset: Dataset) -> None:
    """Check that recipe and data continue those of the origin. Raises ValueError in one line, for
    the first thing that does not match."""
    problem = _mismatch(origin, recipe, dataset) or _catalogue_mismatch(origin, dataset)
    if problem:
        raise ValueError(f"init_from {origin.path}: {problem}")


def _mismatch(origin: Origin, recipe: Recipe, dataset: Dataset) -> str:
    """The first setting that differs and the way out; "" where all match."""
    config, model = origin.config, recipe.model
    id_dim = config.id_dim or config.d_model
    must_match: dict[str, tuple[Any, Any]] = {
        "model.user_ids": (model.user_ids, config.num_users > 0),
        "model.item_ids": (model.item_ids, config.num_items > 0),
        "model.id_dim": (model.id_dim or config.d_model, id_dim),
        "model.encoder_unit": (model.encoder_unit, config.encoder_unit),
        "model.encoder_attention": (model.encoder_attention, config.encoder_attention),
        "model.positions": (model.positions, config.encoder_positions),
        "model.decoder_start": (model.decoder_start, config.decoder_start),
        "tokens.trim": (recipe.tokens.trim, config.spoken_tokens > 0),
        "tokens.forced": (recipe.tokens.forced, config.certain_tokens),
        "tokens.softmax": (recipe.tokens.softmax, config.softmax),
        "model.item_output": (model.item_output, config.item_output),
    }
    if model.backbone is None:  # a backbone has set these, and the origin has them from it
        must_match |= {
            "model.d_model": (model.d_model, config.d_model),
            "model.encoder_layers": (model.encoder_layers, config.encoder_layers),
            "model.decoder_layers": (model.decoder_layers, config.decoder_layers),
            "model.heads": (model.heads, config.encoder_attention_heads),
            "model.ffn": (model.ffn, config.encoder_ffn_dim),
            "model.scale_embedding": (model.scale_embedding, config.scale_embedding),
        }
    for key, pair in must_match.items():
        if pair[0] != pair[1]:
            ours, theirs = (str(v).lower() if isinstance(v, bool) else str(v) for v in pair)
            return (
                f"{key} is {ours} in the recipe and {theirs} in its model: set {key}={theirs}, or "
                "train without init_from"
            )
    if model.max_tokens > config.max_position_embeddings:
        positions = config.max_position_embeddings
        return f"model.max_tokens {model.max_tokens}: its model has {positions} positions"
    if recipe.num_masks > config.num_masks:
        return (
            f"mask.k {recipe.num_masks}: its tokenizer has {config.num_masks} masks: lower it, or "
            "train without init_from"
        )
    if origin.trained_through == "n-1" and recipe.trained_through == "n-2":
        return (
            "trained_through n-2, and its weights have learned validation items (n-1): set "
            "trained_through=n-1, or start from a run of n-2"
        )
    if origin.config.split != dataset.info.split_name:
        return (
            f"its weights were learned under the split {origin.config.split}, {dataset.path} has "
            f"{dataset.info.split_name}: they may know what is held out here; start from a run on "
            "this split"
        )
    return ""


def _catalogue_mismatch(origin: Origin, dataset: Dataset) -> str:
    """Where the origin's rows are not the first ones of the data, why; else ""."""
    known, codes, sequences = origin.best.catalogue, dataset.numbering, dataset.sequences
    ours = {"item": list(zip(sequences.item_ids, codes.item_codes, strict=True))}
    theirs = {"item": list(zip(known.item_ids, known.item_codes, strict=True))}
    if origin.config.num_users:
        ours["user"] = list(zip(sequences.user_ids, codes.user_codes, strict=True))
        theirs["user"] = list(zip(known.user_ids, known.user_codes, strict=True))
    for kind, before in theirs.items():
        now = ours[kind]
        if now[: len(before)] == before:
            continue
        if len(now) < len(before):
            reason = f"it has {len(before):,} {kind}s, {dataset.path} has {len(now):,}"
        else:
            row = next(row for row, word in enumerate(before) if now[row] != word)
            old, new = (
                " with code ".join(
                    repr(text if len(text) <= 40 else f"{text[:40]}...") for text in pair
                )
                for pair in (before[row], now[row])
            )
            reason = f"its {kind} row {row} is {old}, in {dataset.path} it is {new}"
        return f"{reason}: give its own data, or what `genrec prepare --append` has made of them"
    return ""


def warm_start_model(
    origin: Origin,
    recipe: Recipe,
    dataset: Dataset,
    words: WordTable,
    vocab_size: int,
    special: dict[str, int],
) -> tuple[GenRecForConditionalGeneration, WarmStart]:
    """The origin's model with rows for the words of the data.

    Old rows are the origin's to the bit. New rows: an item's (of the id table, and of its token
    where each item is one token) the mean of the rows of its neighbours in the training parts,
    weighted by how near they are; of an item without neighbours, and of another new token that
    items use, the mean of the old rows in its place plus a fresh row; users' and all else fresh,
    drawn from torch's generator.

    Args:
        origin: what to start from; it has passed `check_origin`.
        recipe: of the run.
        dataset: of the run.
        words: of its items and users.
        vocab_size: rows that the tokenizer's ids need.
        special: ids of the tokenizer, as `build_model` takes them.

    Returns:
        The model, and what was taken over.
    """
    before = origin.best.model
    model = build_model(
        recipe.model,
        ModelSizes(
            vocab_size=max(vocab_size, before.config.vocab_size if words.vocabulary is None else 0),
            num_users=words.num_users,
            num_items=words.num_items,
            num_masks=words.num_masks,
            special=special,
            ids_outside=recipe.optimizer.id_tables != "dense",
            vocabulary=words.vocabulary,
        ),
        before.config,
    )
    known = len(origin.best.catalogue.item_ids)
    nearness_MN = neighbour_shares(dataset.sequences, known)
    old_V = _old_rows(origin, words, model.config.vocab_size)
    num_users, num_old_users = model.config.num_users, before.config.num_users
    return model, WarmStart(
        path=origin.path,
        weights_hash=origin.weights_hash,
        users=num_users - num_old_users if num_users else 0,
        items=words.num_items - known,
        tokens=int((old_V < 0).sum()),
        id_rows=_fill(model, before, words, old_V, nearness_MN),
    )


def neighbour_shares(sequences: Sequences, known: int) -> sp.csr_matrix:
    """How much each known item counts for a new one, from the training parts t_1..t_{n-2} alone.

    Steps apart and mass of the known item as in `neighbour_vectors`.

    Args:
        sequences: whose first `known` items are in the origin.
        known: their number, n.

    Returns:
        float64 [M, n], rows of sum 1, or of zeros for an item without known neighbours.
    """
    if known == sequences.num_items:
        return sp.csr_matrix((0, known))
    # An example, two known items and one new one, i2, that was 3 times near i0 and once near i1:
    #   weights_NN[2:, :2] = [[3, 1]], mass_N[:2] = [8, 3]
    #   near_MN  = [[3 / sqrt(9), 1 / sqrt(4)]] = [[1, .5]]: a frequent neighbour counts less
    #   result   = [[2/3, 1/3]]
    weights_NN = cooccurrences(sequences, WINDOW)
    mass_N = np.asarray(weights_NN.sum(axis=1)).ravel()
    near_MN = (weights_NN[known:, :known] @ sp.diags(1 / np.sqrt(mass_N[:known] + 1))).tocsr()
    total_M = np.asarray(near_MN.sum(axis=1)).ravel()
    share_M = np.divide(1, total_M, out=np.zeros_like(total_M), where=total_M > 0)
    return (sp.diags(share_M) @ near_MN).tocsr()


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
    """Copy the origin's weights and initialise new rows, in place; returns the first rows of id
    tables that are outside the model."""
    theirs, inside = dict(before.named_parameters()), dict(model.named_parameters())
    kinds: tuple[Kind, ...] = ("user", "item")
    tables: dict[Kind, str] = {kind: f"{kind}_embedding.weight" for kind in kinds}
    for name, parameter in inside.items():
        if name == "model.shared.weight":
            _fill_tokens(parameter, theirs[name], words, old_V, nearness_MN)
        elif name not in tables.values():
            parameter.copy_(theirs[name])
    outside: dict[Kind, Tensor] = {}
    for kind, name in tables.items():
        if name not in theirs:
            continue
        rows = theirs[name].detach()
        if kind == "item" and name in inside:
            rows = torch.cat([rows, _new_rows(rows[1:], nearness_MN, inside[name][len(rows) :])])
        elif kind == "item":
            fresh = torch.randn(nearness_MN.shape[0], rows.shape[1]) * before.config.init_std
            rows = torch.cat([rows, _new_rows(rows[1:], nearness_MN, fresh)])
        if name in inside:
            inside[name][: len(rows)] = rows
        else:
            outside[kind] = rows[1:].clone()
    return outside


def _fill_tokens(
    table_VD: Tensor,
    theirs: Tensor,
    words: WordTable,
    old_V: np.ndarray,
    nearness_MN: sp.csr_matrix,
) -> None:
    """Copy the old rows of the token table and initialise the new ones, in place."""
    # An example: three known items and a new one of the sub-words a1, a2, a3 | b1, b2, b3 each, in
    # their order a1 b1, a2 b1, a1 b2 and, new, a3 b2. Of place 0, {a1, a2, a3}, a3 is new: its
    # fresh row gets the mean of a1's and a2's added. Of place 1, {b1, b2}, none is new.
    kept = torch.from_numpy(old_V >= 0)
    table_VD[kept] = theirs[torch.from_numpy(old_V[old_V >= 0])]
    tokens, offsets = words.tokens_of_items()
    lengths, known = np.diff(offsets), nearness_MN.shape[1]
    if (lengths == 1).all():  # each item is one token, so that its row is the item's
        rows_N = torch.from_numpy(tokens.astype(np.int64))
        rows_M, is_new_M = rows_N[known:], ~kept[rows_N[known:]]
        new_MD = _new_rows(table_VD[rows_N[:known]], nearness_MN, table_VD[rows_M])
        table_VD[rows_M[is_new_M]] = new_MD[is_new_M]
        return
    places = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    for place in range(int(lengths.max(initial=0))):
        here = np.unique(tokens[places == place]).astype(np.int64)
        new, old = here[old_V[here] < 0], here[old_V[here] >= 0]
        if len(new) and len(old):
            table_VD[torch.from_numpy(new)] += table_VD[torch.from_numpy(old)].mean(0)


def _new_rows(known_ND: Tensor, nearness_MN: sp.csr_matrix, fresh_MD: Tensor) -> Tensor:
    """[M, D]: the weighted mean of the neighbours' rows; without neighbours, the mean of all rows
    plus a fresh one, so that no two are equal."""
    new_MD = torch.from_numpy(nearness_MN @ known_ND.double().numpy()).to(fresh_MD.dtype)
    alone_M = torch.from_numpy(np.diff(nearness_MN.indptr) == 0)
    new_MD[alone_M] = known_ND.mean(0) + fresh_MD[alone_M]
    return new_MD
