"""GenRec's arithmetic, whatever modules hold the weights: from ids to encoder states, and from
states to items."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, V output vocabulary, N items,
# F width of the id tables

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from genrec_kernels import EmbeddingTables, GradientOrder, embedding_sum
from torch import Tensor, nn
from torch.nn import functional as F

from genrec_dist.data.encoder_input import EncoderInput

POSITION_OFFSET = 2
"""BART's learned positions start at row 2 of their table."""


class IdEmbedding(nn.Embedding):
    """An id table whose row 0 is zero and stays zero."""

    def __init__(self, num_ids: int, width: int):
        super().__init__(num_ids + 1, width, padding_idx=0)

    def places(self, rows_BL: Tensor) -> Tensor:
        """The rows' indices in `weight`."""
        return rows_BL


class FetchedRows(nn.Module):
    """The rows of an id table that a step or an evaluation reads, set from outside; not a
    parameter."""

    weight: Tensor
    """float32 [u + 1, F]: the zero row and the fetched ones."""
    rows: Tensor | None = None
    """int64 [u], ascending: which rows they are. None: the batch holds indices already."""

    def places(self, rows_BL: Tensor) -> Tensor:
        """The rows' indices in `weight`."""
        if self.rows is None:
            return rows_BL
        return torch.where(rows_BL > 0, torch.searchsorted(self.rows, rows_BL - 1) + 1, 0)


class IdProjection(nn.Linear):
    """From the width of a factorised id table to the model's; keeps the scale of its input."""

    def __init__(self, id_dim: int, width: int):
        super().__init__(id_dim, width, bias=False)


class ItemText(nn.Module):
    """What the items' texts add to the rows of their tokens, by a projection that is learned.

    An item that training never shows could only sink in the softmax. It has no row of its own, and
    none at all while training; in the end its row is what its text says."""

    rows_N: Tensor
    """int64 [N], each item's row of the token table."""
    vectors_NF: Tensor
    """float32, of length 1, or 0 without a text."""
    own_V1: Tensor
    """float32, 0 for a row that texts alone make, else 1."""

    def __init__(self, num_items: int, dims: int, num_rows: int, width: int):
        """Without values."""
        super().__init__()
        self.projection_FD = nn.Parameter(torch.empty(dims, width))
        # Not in the weights: they follow from the data, and `best` has what they come to.
        buffers = {
            "rows_N": torch.zeros(num_items, dtype=torch.int64),
            "vectors_NF": torch.zeros(num_items, dims),
            "own_V1": torch.ones(num_rows, 1),
        }
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, table_VD: Tensor) -> Tensor:
        """The token table with the texts in the items' rows, in float32, for training."""
        return self._sum(table_VD) * self.own_V1

    def whole(self, table_VD: Tensor) -> Tensor:
        """The same for decoding: with the rows of items that training never shows."""
        return self._sum(table_VD * self.own_V1)

    def _sum(self, table_VD: Tensor) -> Tensor:
        with torch.autocast(table_VD.device.type, enabled=False):
            text_ND = self.vectors_NF @ self.projection_FD
            return table_VD.index_add(0, self.rows_N, text_ND)

    def like(self) -> ItemText:
        """A module of the same form, without values, on torch's default device."""
        (num_items, dims), width = self.vectors_NF.shape, self.projection_FD.shape[1]
        return ItemText(num_items, dims, len(self.own_V1), width)

    @contextlib.contextmanager
    def added(self, model: Any) -> Iterator[None]:
        """Context in which BART's embeddings and head compute with the texts in their table;
        gradients reach the table itself and the projection."""
        bart = model.model
        tied = (bart.shared, bart.encoder.embed_tokens, bart.decoder.embed_tokens, model.lm_head)
        rows_VD = self(bart.shared.weight)
        for module in tied:
            # Found before the parameter of the same name, which stays where it is.
            module.__dict__["weight"] = rows_VD
        try:
            yield
        finally:
            for module in tied:
                module.__dict__.pop("weight", None)


@dataclass(frozen=True)
class OutputRows:
    """What decoder states are multiplied with."""

    token_VD: Tensor
    """The head's rows of the output vocabulary."""
    item_NF: Tensor | None = None
    """The item id table with its zero row, where items' rows are a part of the output rows."""
    projection_DF: Tensor | None = None
    """From the width of that table to the model's, where it differs."""

    def detached(self) -> OutputRows:
        """The same values without gradients."""
        values = (self.token_VD, self.item_NF, self.projection_DF)
        return OutputRows(*(None if value is None else value.detach() for value in values))  # type: ignore[arg-type]


class Network:
    """What training and decoding compute alike, of any encoder-decoder with id tables."""

    config: Any
    """`GenRecConfig`, or an object with its fields; or another backbone's."""
    lm_head: Any
    user_embedding: IdEmbedding | FetchedRows | None
    user_projection: IdProjection | None
    item_embedding: IdEmbedding | FetchedRows | None
    item_projection: IdProjection | None
    training: bool
    device: torch.device

    def encode(self, encoder: EncoderInput, plan: GradientOrder | None = None) -> Tensor:
        """Encoder states, float [B, L, D]. `plan`: `ModelInputs.plan`."""
        raise NotImplementedError

    def masked_states(self, memory_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """The encoder's states at the [MASK] after each history, [B, D]; of a causal encoder at its
        last token."""
        from_end = 1 if self.config.encoder_attention == "causal" else 2
        users_B = torch.arange(len(memory_BLD), device=memory_BLD.device)
        return memory_BLD[users_B, mask_BL.sum(1) - from_end]

    @property
    def head_weight(self) -> Tensor:
        """The head's rows of the output vocabulary, [V, D]."""
        weight: Tensor = self.lm_head.weight
        return weight[: self.config.spoken_tokens] if self.config.spoken_tokens else weight

    def output_rows(self) -> OutputRows:
        """The rows that `Siblings` computes with."""
        if not self.config.item_output:
            return OutputRows(self.head_weight)
        assert self.item_embedding is not None
        projection = None if self.item_projection is None else self.item_projection.weight
        return OutputRows(self.head_weight, self.item_embedding.weight, projection)

    def item_logits(self, masked_RD: Tensor) -> Tensor:
        """The item head: logits [R, N] of the encoder's states at masks."""
        return F.linear(*self._item_head(masked_RD))

    def _item_head(self, masked_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [R, F], rows of the items [N, F])."""
        assert isinstance(self.item_embedding, IdEmbedding)
        if self.item_projection is not None:  # (P e) . h = e . (P^T h)
            masked_RD = F.linear(masked_RD, self.item_projection.weight.T)
        return masked_RD, self.item_embedding.weight[1:]


class BartNetwork(Network):
    """The same of BART, whose modules it has under Hugging Face's names."""

    model: Any
    """With `encoder` and `decoder`."""

    def embed(
        self, encoder: EncoderInput, plan: GradientOrder | None = None, *, normed: bool = False
    ) -> Tensor:
        """The embedding sum before BART's layer norm, float [B, L, D]; `normed`: after it. `plan`:
        the batch's."""
        bart = self.model.encoder
        norm = bart.layernorm_embedding
        tokens = bart.embed_tokens.weight
        users, items = self.user_embedding, self.item_embedding
        fused = normed and encoder.further_ids is None
        tables = EmbeddingTables(
            token=tokens,
            position=bart.embed_positions.weight,
            user=None if users is None else users.weight,
            item=None if items is None else items.weight,
            scale=bart.embed_tokens.embed_scale,
            position_offset=POSITION_OFFSET,
            pad_token_id=self.config.pad_token_id,
            id_dropout=self.config.id_dropout,
            user_projection=None if self.user_projection is None else self.user_projection.weight,
            item_projection=None if self.item_projection is None else self.item_projection.weight,
            norm_weight=norm.weight if fused else None,
            norm_bias=norm.bias if fused else None,
            norm_eps=norm.eps,
        )
        embedded_BLD = embedding_sum(
            encoder.input_ids,
            encoder.position_ids,
            encoder.user_rows if users is None else users.places(encoder.user_rows),
            encoder.item_rows if items is None else items.places(encoder.item_rows),
            tables,
            training=self.training,
            order=plan,
        )
        if encoder.further_ids is None:
            return embedded_BLD
        further_BLD = sum_of_rows(encoder.further_ids, tokens, self.config.pad_token_id)
        embedded_BLD = embedded_BLD + further_BLD * bart.embed_tokens.embed_scale
        return norm(embedded_BLD) if normed else embedded_BLD

    def encode(self, encoder: EncoderInput, plan: GradientOrder | None = None) -> Tensor:
        """As of any encoder-decoder."""
        bart = self.model.encoder
        hidden_BLD = self.embed(encoder, plan, normed=True)
        hidden_BLD = F.dropout(hidden_BLD, bart.dropout, self.training)
        seen = encoder.attention_mask[:, None, None]
        if self.config.encoder_attention == "causal":
            seen = seen & lower_triangle(seen.shape[-1], seen.device)
        bias = attention_bias(seen, hidden_BLD)
        for layer in bart.layers:
            hidden_BLD = layer(hidden_BLD, bias)
        return hidden_BLD


def id_table(
    config: Any, num_ids: int
) -> tuple[IdEmbedding | FetchedRows | None, IdProjection | None]:
    if num_ids == 0:
        return None, None
    width = config.id_dim or config.d_model
    table = FetchedRows() if config.ids_outside else IdEmbedding(num_ids, width)
    return table, IdProjection(width, config.d_model) if width != config.d_model else None


def lower_triangle(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def sum_of_rows(ids_BLS: Tensor, table_VD: Tensor, pad_token_id: int) -> Tensor:
    """The sum of these rows over S, float [B, L, D]; `pad_token_id` adds nothing and has no
    gradient."""
    if not ids_BLS.shape[-1]:
        return table_VD.new_zeros(*ids_BLS.shape[:-1], table_VD.shape[1])
    flat_nS = ids_BLS.flatten(0, -2)
    summed_nD: Tensor = F.embedding_bag(flat_nS, table_VD, mode="sum", padding_idx=pad_token_id)
    return summed_nD.view(*ids_BLS.shape[:-1], -1)


def check_ranges(encoder: EncoderInput, config: Any) -> None:
    """Raise ValueError naming the table if an index is outside it."""
    limits = [
        ("token", encoder.input_ids, config.vocab_size),
        ("further token", encoder.further_ids, config.vocab_size),
        ("position", encoder.position_ids, config.max_position_embeddings or None),
        ("user", encoder.user_rows, config.num_users + 1 if config.num_users else None),
        ("item", encoder.item_rows, config.num_items + 1 if config.num_items else None),
    ]
    for name, values, limit in limits:
        if limit is None or values is None or not values.numel():
            continue
        low, high = (int(value) for value in torch.aminmax(values))
        if low < 0 or high >= limit:
            bad = low if low < 0 else high
            raise ValueError(
                f"{name} id {bad} is outside its table of {limit} rows: prepare and shard again"
            )


def product_dtype(values: Tensor) -> torch.dtype:
    """The type of matrix products of these values: autocast's where it is on, else their own."""
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


def attention_bias(seen: Tensor, hidden: Tensor) -> Tensor:
    """0 where `seen` is True, -inf elsewhere, in the precision of the attention scores."""
    bias = torch.zeros(seen.shape, dtype=product_dtype(hidden), device=hidden.device)
    return bias.masked_fill_(~seen, float("-inf"))
