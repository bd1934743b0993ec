"""SASRec: a causal transformer over a user's items that scores every item as the next one."""

# U users, B users of a batch, n positions of a batch, I items, d width, H heads, N list

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from genrec_shards.histories import windows
from genrec_shards.sequences import Sequences, SplitView, flat_ranges
from genrec_shards.splits import Split
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_dist.config.native_precision import native_precision
from genrec_dist.config.recipe import Distill
from genrec_dist.data.batch import SoftTargets
from genrec_dist.data.packing import Attended, segments_of
from genrec_dist.evaluation.metrics import EMPTY, TOP
from genrec_dist.evaluation.ranked_lists import Lists, Rule, empty_lists, tie_order, without_last
from genrec_dist.model.dropout import add_dropped, drop
from genrec_dist.model.head_loss import head_loss, soft_difference
from genrec_dist.model.network import ItemText
from genrec_dist.model.packed_attention import attend

ROWS_AT_A_TIME = 64
"""Positions are filled up to a multiple of these in the softmax of training."""
SCORES_AT_ONCE = 2**23
"""Scores (users x items) held at a time when lists are made; it changes memory, not lists."""


@dataclass(frozen=True)
class SasrecSettings:
    """Every knob of model and training; the defaults are chosen on Beauty's validation part
    (docs/log.md)."""

    d_model: int = 128
    """Width of item embeddings and layers."""
    layers: int = 2
    heads: int = 1
    ffn: int = 1
    """Width of the feed-forward layer in multiples of d_model; 1 in the paper."""
    norm: Literal["paper", "pre", "post"] = "pre"
    """Where layers normalise. paper: the query and the feed-forward layer's input, each with the
    residual on the normalised side; pre: the usual pre-norm; post: after each residual sum."""
    positions: Literal["from-start", "from-end"] = "from-start"
    """Count positions from the sequence's start, or back from its end, as the paper's left padding
    does."""
    max_length: int = 50
    """Longest input in items; older ones are dropped."""
    dropout: float = 0.5
    """Of the embedding sum, the feed-forward layer's inside and what each layer adds."""
    attention_dropout: float = 0.0
    """Of the attention weights."""
    init_std: float = 0.02
    """Standard deviation of the initial weights. Small, so that what layers add does not drown the
    embeddings at first: with Glorot's projections the first ten epochs are lost (docs/log.md)."""
    init_items: Literal["random", "cooccurrence"] = "random"
    """What the item embeddings start from; cooccurrence as in GenRec's recipes
    (`model.init_items`): its control."""
    item_text: Literal["none", "add"] = "none"
    """add: a learned projection of the item's text is added to its embedding, in the input and in
    the output, as `model.item_text` of GenRec's recipes does: its control."""
    item_text_source: str = "factors"
    """The vectors, as `model.item_text_source`."""
    distill: Distill = field(default_factory=Distill)
    """Soft targets of the transition graph and the texts beside each label, as `finetune.distill`
    of GenRec's recipes: its control."""
    text: str = "words"
    """Which texts soft targets compare, as in a recipe; none: the graph alone."""
    label_smoothing: float = 0.0
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.0
    """AdamW's, of all parameters."""
    average: float = 0.99
    """Decay of the running average of the weights that is validated and kept; 0 keeps the weights
    themselves."""
    batch_size: int = 256
    """Users of a step; each has a target for every position of the training part but the first."""
    epochs: int = 100
    """Most passes over the users; as many as this where nothing is left to validate on
    (trained_through n-1)."""
    patience: int = 3
    """Stop after this many epochs without a better NDCG@10 on validation; 0 never stops."""
    validation_users: int = 4000
    """Users of the seeded sample that is scored after each epoch; 0: all."""
    precision: Literal["bf16", "fp32"] = field(default_factory=native_precision)
    """Of the products of the softmax over all items, nine tenths of the work; all else is float32.
    By default what this machine computes fastest; a trained SASRec keeps its own."""
    seed: int = 0
    """Of initial weights, order, dropout and validation users."""


LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "d_model layers heads ffn max_length batch_size epochs c distill.top": (
        "1 or above",
        lambda value: value >= 1,
    ),
    "dropout attention_dropout label_smoothing average distill.weight": (
        "0 or above and below 1",
        lambda value: 0 <= value < 1,
    ),
    "alpha": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "init_std learning_rate distill.temperature": ("above 0", lambda value: 0 < value < math.inf),
    "weight_decay patience validation_users": (
        "0 or above",
        lambda value: 0 <= value < math.inf,
    ),
}
"""Keys of the settings -> what they may be, in words and as a test."""


def check_settings(settings: SasrecSettings, source: str) -> None:
    """Refuse what no model can have. Raises ValueError with `source`, the key, its value and what
    it may be."""
    values = vars(settings) | {f"distill.{k}": v for k, v in vars(settings.distill).items()}
    for keys, (text, holds) in LIMITS.items():
        for key in keys.split():
            value = values.get(key)  # alpha and c are BSARec's
            if value is not None and not holds(value):
                raise ValueError(f"{source}: {key} is {value}: it has to be {text}")
    if settings.d_model % settings.heads:
        raise ValueError(
            f"{source}: d_model {settings.d_model} is no multiple of heads {settings.heads}"
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """Inputs of some users one after another, short ones first."""

    items_n: Tensor
    """int64 [n], item rows."""
    positions_n: Tensor
    """int64 [n], rows of the position table."""
    attended: Attended
    places_n: np.ndarray
    """int64 [n], index of each input in the data's flat array of items."""
    last_B: Tensor
    """int64 [B], the last position of each user, in the order in which the users were given."""


def pack(
    items: np.ndarray, ends_B: np.ndarray, lengths_B: np.ndarray, settings: SasrecSettings
) -> Packed:
    """The last `max_length` of the `lengths_B` items before `ends_B` (exclusive) of each user. Of
    an empty one `last_B` means nothing."""
    lengths_B = np.minimum(lengths_B, settings.max_length)
    # Neighbours of one length share an attention without padding.
    order_B = np.argsort(lengths_B, kind="stable")
    lengths, ends = lengths_B[order_B], ends_B[order_B]
    places_n = flat_ranges(ends - lengths, lengths)
    spans = segments_of(lengths)
    positions_n = np.arange(len(places_n)) - np.repeat(spans.offsets[:-1], lengths)
    if settings.positions == "from-end":
        positions_n = np.repeat(lengths, lengths) - 1 - positions_n
    last_B = np.empty(len(order_B), np.int64)
    last_B[order_B] = spans.offsets[1:] - 1
    return Packed(
        torch.from_numpy(items[places_n].astype(np.int64)),
        torch.from_numpy(positions_n.astype(np.int64)),
        Attended(spans, spans, causal=True),
        places_n,
        torch.from_numpy(last_B),
    )


class SASRec(nn.Module):
    """Kang and McAuley, 2018, with the softmax over all items in place of one sampled negative."""

    def __init__(self, num_items: int, settings: SasrecSettings):
        super().__init__()
        self.settings = settings
        width = settings.d_model
        self.item_embedding = nn.Embedding(num_items, width)
        self.position_embedding = nn.Embedding(settings.max_length, width)
        self.blocks = nn.ModuleList(self.block(settings) for _ in range(settings.layers))
        # Post-norm blocks end with a norm of their own; there, this one belongs to the embedding
        # sum.
        self.norm = nn.LayerNorm(width)
        for table in (self.item_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=settings.init_std)
        self.item_text: ItemText | None = None  # while it is trained; never in what is saved

    def block(self, settings: SasrecSettings) -> Block:
        """A layer."""
        return Block(settings)

    def item_rows(self) -> Tensor:
        """float32 [I, d]: what items are in the input and in the output."""
        rows_Id: Tensor = self.item_embedding.weight
        if self.item_text is None:
            return rows_Id
        return self.item_text(rows_Id) if self.training else self.item_text.whole(rows_Id)

    @torch.no_grad()
    def take_texts_in(self) -> None:
        """Make the texts a part of the item embeddings."""
        if self.item_text is not None:
            self.item_embedding.weight.copy_(self.item_text.whole(self.item_embedding.weight))
            self.item_text = None

    def states(self, packed: Packed, items_Id: Tensor) -> Tensor:
        """The state after each position, float32 [n, d]; it sees no later one. `items_Id`: of
        `item_rows`."""
        hidden_nd = F.embedding(packed.items_n, items_Id) * self.settings.d_model**0.5
        hidden_nd = hidden_nd + self.position_embedding(packed.positions_n)
        post = self.settings.norm == "post"
        hidden_nd = drop(
            self.norm(hidden_nd) if post else hidden_nd, self.settings.dropout, self.training
        )
        for block in self.blocks:
            hidden_nd = block(hidden_nd, packed.attended)
        return hidden_nd if post else self.norm(hidden_nd)

    def loss(self, packed: Packed, labels_n: Tensor, soft: SoftTargets | None = None) -> Tensor:
        """The mean cross-entropy of `labels_n` (int64 [n], item rows), of which soft targets take
        their shares, over the softmax of all items; a scalar."""
        # oneDNN prepares a product of each new shape, and keeps it: few shapes cost a tenth less
        # time, and no growing memory. A state of zeros adds log(I) to the sum and nothing to a
        # gradient.
        padding = -len(labels_n) % ROWS_AT_A_TIME
        items_Id, smoothing = self.item_rows(), self.settings.label_smoothing
        states_nd = self.states(packed, items_Id)
        states_md, labels_m = F.pad(states_nd, (0, 0, 0, padding)), F.pad(labels_n, (0, padding))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16"):
            total = head_loss(states_md, items_Id, labels_m, smoothing, "chunked")
            if soft is not None:
                total = total + soft_difference(states_nd, items_Id, labels_n, soft)
        return (total - padding * math.log(len(items_Id))) / len(labels_n)

    def scores(self, packed: Packed) -> Tensor:
        """Of every item after each user's last position, float32 [B, I]."""
        items_Id = self.item_rows()
        return self.states(packed, items_Id)[packed.last_B] @ items_Id.T


class Block(nn.Module):
    """Self-attention and a feed-forward layer."""

    def __init__(self, settings: SasrecSettings):
        super().__init__()
        width, inner = settings.d_model, settings.ffn * settings.d_model
        self.settings = settings
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        for linear in (self.query, self.key, self.value, self.out, self.widen, self.narrow):
            nn.init.normal_(linear.weight, std=settings.init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_nd: Tensor, attended: Attended) -> Tensor:
        if self.settings.norm == "post":
            hidden_nd = self.attention_norm(
                self._add(hidden_nd, self._attention(hidden_nd, hidden_nd, attended))
            )
            return self.ffn_norm(self._add(hidden_nd, self._feed_forward(hidden_nd)))
        normed_nd = self.attention_norm(hidden_nd)
        if self.settings.norm == "pre":
            hidden_nd = self._add(hidden_nd, self._attention(normed_nd, normed_nd, attended))
            return self._add(hidden_nd, self._feed_forward(self.ffn_norm(hidden_nd)))
        normed_nd = self.ffn_norm(
            self._add(normed_nd, self._attention(normed_nd, hidden_nd, attended))
        )
        return self._add(normed_nd, self._feed_forward(normed_nd))

    def _attention(self, from_nd: Tensor, to_nd: Tensor, attended: Attended) -> Tensor:
        """What the positions of `from_nd` read of those of `to_nd`."""
        by_head = (self.settings.heads, -1)
        query = self.query(from_nd).unflatten(-1, by_head)
        key, value = (project(to_nd).unflatten(-1, by_head) for project in (self.key, self.value))
        dropout = self.settings.attention_dropout if self.training else 0.0
        mixed_nHd = attend(query, key, value, attended, query.shape[-1] ** -0.5, dropout)
        projected: Tensor = self.out(mixed_nHd.flatten(1))
        return projected

    def _feed_forward(self, hidden_nd: Tensor) -> Tensor:
        inner = F.relu(self.widen(hidden_nd))
        fed: Tensor = self.narrow(drop(inner, self.settings.dropout, self.training))
        return fed

    def _add(self, base_nd: Tensor, values_nd: Tensor) -> Tensor:
        return add_dropped(base_nd, values_nd, self.settings.dropout, self.training)


def rule_of(model: SASRec, sequences: Sequences, split: Split, *, exclude_history: bool) -> Rule:
    """Top-20 lists by the scores of all items; the weights are used as they are when lists are
    made."""
    view, num_items = sequences.history_and_target(split), sequences.num_items

    def lists(users: np.ndarray) -> Lists:
        return listed(scored(model, view, users, exclude_history), len(users), num_items)

    return lists


def listed(parts: Iterable[tuple[np.ndarray, Tensor]], num_users: int, num_items: int) -> Lists:
    """Top-20 lists of users.

    Args:
        parts: (user rows, scores of all items float32 [B, I]), part after part; -inf: not to be
            listed.
        num_users: Number of users in all parts.
        num_items: Number of items.
    """
    place_of = np.argsort(tie_order(num_items))
    width = min(TOP + 1, num_items)
    lists = empty_lists(num_users, TOP + 1)
    first = 0
    for rows_B, scores_BI in parts:
        values_BN, items_BN = (part.numpy() for part in scores_BI.topk(width))
        order_BN = np.lexsort((place_of[items_BN], -values_BN))
        values_BN, items_BN = (
            np.take_along_axis(part, order_BN, axis=1) for part in (values_BN, items_BN)
        )
        part = slice(first, first + len(rows_B))
        lists.items_UN[part, :width] = np.where(np.isfinite(values_BN), items_BN, EMPTY)
        lists.scores_UN[part, :width] = values_BN
        first = part.stop
    return without_last(lists)


def target_places(
    model: SASRec, view: SplitView, users: np.ndarray, exclude_history: bool
) -> np.ndarray:
    """int64 [U]: the rank of each user's target among all items, 1 = first, those that tie with it
    above it."""
    places = [np.empty(0, np.int64)]
    for rows_B, scores_BI in scored(model, view, users, exclude_history):
        targets_B1 = torch.from_numpy(view.targets[rows_B].astype(np.int64))[:, None]
        places.append((scores_BI >= scores_BI.gather(1, targets_B1)).sum(1).numpy())
    return np.concatenate(places)


def taken_places(view: SplitView, rows_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """(place of the user in `rows_B`, item) int64 of all items of these users' histories."""
    lengths_B = (view.ends - view.starts)[rows_B]
    taken = view.items[flat_ranges(view.starts[rows_B], lengths_B)].astype(np.int64)
    of_whom = np.repeat(np.arange(len(rows_B)), lengths_B)
    return torch.from_numpy(of_whom), torch.from_numpy(taken)


def scored(
    model: SASRec, view: SplitView, users: np.ndarray, exclude_history: bool
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(user rows, scores float32 [B, I]) of some users after the other, in order; -inf where the
    history is left out.

    The whole history is left out, also what the model's input has no room for.
    """
    num_items = model.item_embedding.num_embeddings
    training = model.training
    model.eval()
    try:
        for rows_B in windows(users, max(1, SCORES_AT_ONCE // num_items)):
            ends_B, lengths_B = view.ends[rows_B], (view.ends - view.starts)[rows_B]
            with torch.inference_mode():
                scores_BI = model.scores(pack(view.items, ends_B, lengths_B, model.settings))
                if exclude_history:
                    scores_BI[taken_places(view, rows_B)] = float("-inf")
            yield rows_B, scores_BI
    finally:
        model.train(training)
