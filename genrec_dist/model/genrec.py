"""GenRec: a BART encoder-decoder whose encoder adds user and item id embeddings to tokens and
positions."""

# B users, R decoder rows, L input tokens, T target tokens, D width, V vocabulary

from __future__ import annotations

from typing import Any, Literal

import torch
from genrec_kernels import EmbeddingTables, GradientOrder, embedding_sum
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import IGNORED, AskedItems
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.packing import Packing
from genrec_dist.model.dropout import drop
from genrec_dist.model.head_loss import head_loss, resolve_head
from genrec_dist.model.packed_layers import LayerRunner, lowered

POSITION_OFFSET = 2
"""BART's learned positions start at row 2 of their table."""


class GenRecConfig(BartConfig):
    """BART's configuration and the id tables.

    num_users, num_items: rows of the tables without the zero row; 0 leaves a table out. id_dropout:
    dropout of the id terms alone. encoder_positions: "from-start" (BART) or "from-end".
    max_input_tokens: where the text is cut. numbering_hash: the numbering this model speaks. split:
    what was held out of its training, with dates. exclude_history: whether its lists leave out the
    history by default. encoder_unit: "subword" or "item", what an encoder position stands for.
    encoder_attention: "bidirectional" or "causal". decoder_start: "mask" or "state", what the
    decoder's first input is. item_loss: weight of the item head; 0: there is none. id_dim: width of
    the id tables, then projected to d_model; 0: d_model, no projection. ids_outside: the tables
    live outside the model (`tables.py`), which sees the rows of a step alone; never so in what is
    saved as `best`. spoken_tokens: the first so many tokens share the probability, the others are
    read alone (a trimmed vocabulary, `vocabulary_hash`); 0: all. certain_tokens: "learned", or
    "given": those that the trie alone decides have probability 1."""

    model_type = "genrec"

    num_users: int = 0
    num_items: int = 0
    id_dropout: float = 0.0
    encoder_positions: str = "from-start"
    encoder_unit: str = "subword"
    encoder_attention: str = "bidirectional"
    decoder_start: str = "mask"
    item_loss: float = 0.0
    num_masks: int = 1
    max_input_tokens: int = 512
    numbering_hash: str = ""
    split: str = "leave-one-out"
    exclude_history: bool = True
    id_dim: int = 0
    ids_outside: bool = False
    spoken_tokens: int = 0
    vocabulary_hash: str = ""
    certain_tokens: str = "learned"


class IdEmbedding(nn.Embedding):
    """An id table whose row 0 is zero and stays zero."""

    def __init__(self, num_ids: int, width: int):
        super().__init__(num_ids + 1, width, padding_idx=0)

    def places(self, rows_BL: Tensor) -> Tensor:
        """Where in `weight` these rows lie."""
        return rows_BL


class FetchedRows(nn.Module):
    """The rows of an id table that a step or an evaluation touches, put here from outside; no
    parameter."""

    weight: Tensor
    """float32 [u + 1, width]: the zero row and the fetched ones."""
    rows: Tensor | None = None
    """int64 [u], ascending: which rows they are. None: the batch's numbers are places already."""

    def places(self, rows_BL: Tensor) -> Tensor:
        if self.rows is None:
            return rows_BL
        return torch.where(rows_BL > 0, torch.searchsorted(self.rows, rows_BL - 1) + 1, 0)


class IdProjection(nn.Linear):
    """From the width of a factorised id table to the model's; keeps the scale of what goes
    through."""

    def __init__(self, id_dim: int, width: int):
        super().__init__(id_dim, width, bias=False)


class GenRecForConditionalGeneration(BartForConditionalGeneration):
    """BART with equation (2) of the paper as its input; loads plain BART weights, the id tables
    then start fresh.

    `forward` takes Hugging Face's names, so `generate`, `save_pretrained` and `from_pretrained`
    work."""

    config_class = GenRecConfig
    config: GenRecConfig
    loss_by: HeadLoss = "full"
    """How `forward` computes the loss."""
    runner = LayerRunner()
    """How `forward` runs the layers of packed micro-batches."""

    def __init__(self, config: GenRecConfig):
        super().__init__(config)
        self.user_embedding, self.user_projection = _id_table(config, config.num_users)
        self.item_embedding, self.item_projection = _id_table(config, config.num_items)
        if config.spoken_tokens:
            # Hugging Face's `generate` adds this to the logits.
            self.final_logits_bias[:, config.spoken_tokens :] = float("-inf")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, IdProjection):
            init.normal_(module.weight, std=module.in_features**-0.5)

    def embed(
        self, encoder: EncoderInput, plan: GradientOrder | None = None, *, normed: bool = False
    ) -> Tensor:
        """The embedding sum before BART's layer norm, float [B, L, D]; `normed`: behind it. `plan`:
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
        """Encoder states, float [B, L, D]. `plan`: for the backward of the embedding kernel
        (`Batch.plan`)."""
        bart = self.model.encoder
        hidden_BLD = self.embed(encoder, plan, normed=True)
        hidden_BLD = F.dropout(hidden_BLD, bart.dropout, self.training)
        seen = encoder.attention_mask[:, None, None]
        if self.config.encoder_attention == "causal":
            seen = (
                seen
                & torch.ones(
                    seen.shape[-1], seen.shape[-1], dtype=torch.bool, device=seen.device
                ).tril()
            )
        bias = attention_bias(seen, hidden_BLD)
        for layer in bart.layers:
            hidden_BLD = layer(hidden_BLD, bias)
        return hidden_BLD

    def masked_states(self, memory_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """The encoder's states at the [MASK] behind each history, [B, D]; of a causal encoder at
        its last token."""
        behind = 1 if self.config.encoder_attention == "causal" else 2
        users_B = torch.arange(len(memory_BLD), device=memory_BLD.device)
        return memory_BLD[users_B, mask_BL.sum(1) - behind]

    def decode(
        self,
        decoder_input_ids_RT: Tensor,
        memory_RLD: Tensor,
        memory_mask_RL: Tensor,
        start_RD: Tensor | None = None,
    ) -> Tensor:
        """Decoder states of whole target sequences, float [R, T, D]. `start_RD`: added to the first
        input of each.

        Rows are padded on the right, so causality alone keeps padding out of sight.
        """
        bart = self.model.decoder
        hidden_RTD = bart.embed_tokens(decoder_input_ids_RT) + bart.embed_positions(
            decoder_input_ids_RT
        )
        if start_RD is not None:
            hidden_RTD = torch.cat([hidden_RTD[:, :1] + start_RD[:, None], hidden_RTD[:, 1:]], 1)
        hidden_RTD = F.dropout(bart.layernorm_embedding(hidden_RTD), bart.dropout, self.training)
        num_tokens = decoder_input_ids_RT.shape[1]
        causal_TT = torch.ones(
            num_tokens, num_tokens, dtype=torch.bool, device=hidden_RTD.device
        ).tril()
        causal_11TT = attention_bias(causal_TT[None, None], hidden_RTD)
        memory_bias_R11L = attention_bias(memory_mask_RL[:, None, None], hidden_RTD)
        for layer in bart.layers:
            hidden_RTD = layer(
                hidden_RTD,
                causal_11TT,
                memory_RLD,
                encoder_attention_mask=memory_bias_R11L,
                use_cache=False,
            )
        return hidden_RTD

    @property
    def head_weight(self) -> Tensor:
        """The head's rows of the tokens that can be spoken, [V, D] or, of a trimmed vocabulary, its
        first `spoken_tokens`."""
        weight_VD: Tensor = self.lm_head.weight
        return weight_VD[: self.config.spoken_tokens] if self.config.spoken_tokens else weight_VD

    def target_logits(
        self,
        encoder: EncoderInput,
        encoder_row_R: Tensor,
        decoder_input_ids_RT: Tensor,
        labels_RT: Tensor,
        visible_R: Tensor | None = None,
        places_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits float [n, V], labels int64 [n]) of the label tokens alone: padding never reaches
        the head."""
        hidden_nD, labels_n = self.target_states(
            self.encode(encoder),
            encoder,
            encoder_row_R,
            decoder_input_ids_RT,
            labels_RT,
            visible_R,
            places_R,
        )
        return F.linear(hidden_nD, self.head_weight), labels_n

    def target_states(
        self,
        memory_BLD: Tensor,
        encoder: EncoderInput,
        encoder_row_R: Tensor,
        decoder_input_ids_RT: Tensor,
        labels_RT: Tensor,
        visible_R: Tensor | None,
        places_R: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(decoder states float [n, D], labels int64 [n]) of the label tokens alone, behind encoded
        samples. `visible_R`: tokens of its sample that a row may look at; None: all. `places_R`: of
        the rows' masks among the encoder's tokens; None: the last."""
        mask_BL, start_RD = encoder.attention_mask, None
        if self.config.decoder_start == "state":
            if places_R is not None:
                start_RD = memory_BLD.flatten(0, 1)[places_R]
            else:
                start_RD = self.masked_states(memory_BLD, mask_BL)[encoder_row_R]
        if visible_R is not None or not _is_identity(encoder_row_R, len(memory_BLD)):
            memory_BLD, mask_BL = memory_BLD[encoder_row_R], mask_BL[encoder_row_R]
        if visible_R is not None:
            mask_BL = mask_BL & (
                torch.arange(mask_BL.shape[1], device=mask_BL.device) < visible_R[:, None]
            )
        hidden_RTD = self.decode(decoder_input_ids_RT, memory_BLD, mask_BL, start_RD)
        learned_RT = labels_RT != IGNORED
        return hidden_RTD[learned_RT], labels_RT[learned_RT]

    def item_logits(self, masked_RD: Tensor) -> Tensor:
        """The item head: logits [R, N] of the encoder's states at masks."""
        query_RF, table_NF = self._item_head(masked_RD)
        return F.linear(query_RF, table_NF)

    def _item_head(self, masked_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [R, F], rows of the items [N, F])."""
        assert isinstance(self.item_embedding, IdEmbedding)
        if self.item_projection is not None:  # (P e) . h = e . (P^T h)
            masked_RD = F.linear(masked_RD, self.item_projection.weight.T)
        return masked_RD, self.item_embedding.weight[1:]

    def item_loss(self, memory: Tensor, asked: AskedItems, label_smoothing: float) -> Tensor:
        """The summed cross-entropy of the item head; `memory`: encoder states [.., D]."""
        learned_R = asked.items_R != IGNORED
        query_RF, table_NF = self._item_head(memory.flatten(0, -2)[asked.places_R[learned_R]])
        return head_loss(
            query_RF, table_NF, asked.items_R[learned_R], label_smoothing, self.loss_by
        )

    def packed_states(
        self,
        encoder: EncoderInput,
        packing: Packing,
        decoder_input_ids_m: Tensor,
        plan: GradientOrder | None = None,
        places_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(decoder states of packed targets, float [m, D], encoder states, [n, D]): `encode` and
        `decode` in one."""
        bart = self.model
        hidden_nD = drop(
            self.embed(encoder, plan, normed=True), bart.encoder.dropout, self.training
        )
        for layer in bart.encoder.layers:
            hidden_nD = self.runner.encode(layer, hidden_nD, packing)
        memory_nD = lowered(hidden_nD)
        hidden_mD = bart.decoder.embed_tokens(decoder_input_ids_m)
        hidden_mD = (
            hidden_mD + bart.decoder.embed_positions(None, position_ids=packing.positions_m)[0]
        )
        if self.config.decoder_start == "state":
            assert places_R is not None
            first_R = torch.from_numpy(packing.rows.offsets[: len(places_R)]).to(hidden_mD.device)
            hidden_mD = hidden_mD.index_add(0, first_R, hidden_nD[places_R].to(hidden_mD.dtype))
        hidden_mD = drop(
            bart.decoder.layernorm_embedding(hidden_mD), bart.decoder.dropout, self.training
        )
        for layer in bart.decoder.layers:
            hidden_mD = self.runner.decode(layer, hidden_mD, memory_nD, packing)
        return hidden_mD, hidden_nD

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        user_rows: Tensor | None = None,
        item_rows: Tensor | None = None,
        further_ids: Tensor | None = None,
        encoder_row: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        plan: GradientOrder | None = None,
        packing: Packing | None = None,
        visible: Tensor | None = None,
        asked: AskedItems | None = None,
        tokens_a_target: float = 1.0,
        encoder_outputs: BaseModelOutput | None = None,
        **generation: Any,
    ) -> Any:
        """With `labels`: the summed cross-entropy of the label tokens, a float32 scalar; in here
        because under ZeRO-3 the head's weight is whole in here alone. Without: Hugging Face's
        decoder output.

        All integer arrays are [B, L] (encoder) or [R, T] (decoder); `encoder_row` [R] defaults to
        one row a sample. With `packing` they are [n] and [m] and it says which rows attend to what.
        `visible` [R]: how many of its encoder tokens a decoder row may look at. With `asked` the
        item head's loss is added, so many times as if its targets were tokens: `tokens_a_target`,
        of the whole step."""
        if labels is None:
            if self.config.decoder_start == "state":
                raise ValueError(
                    "Hugging Face's decoding gives the decoder no state to start from: search with genrec_dist"
                )
            if encoder_outputs is None:
                encoder = self.encoder_input(
                    input_ids, attention_mask, position_ids, user_rows, item_rows, further_ids
                )
                encoder_outputs = BaseModelOutput(last_hidden_state=self.encode(encoder))
                attention_mask = encoder.attention_mask
            output: Seq2SeqLMOutput = super().forward(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                encoder_outputs=encoder_outputs,
                **generation,
            )
            return output
        encoder = self.encoder_input(
            input_ids, attention_mask, position_ids, user_rows, item_rows, further_ids
        )
        if packing is not None:
            assert decoder_input_ids is not None
            hidden_mD, memory = self.packed_states(
                encoder, packing, decoder_input_ids, plan, None if asked is None else asked.places_R
            )
            learned_m = labels != IGNORED
            hidden_nD, labels_n = hidden_mD[learned_m], labels[learned_m]
        else:
            if encoder_row is None:
                encoder_row = torch.arange(len(encoder.input_ids), device=encoder.input_ids.device)
            assert decoder_input_ids is not None
            memory = self.encode(encoder, plan)
            hidden_nD, labels_n = self.target_states(
                memory,
                encoder,
                encoder_row,
                decoder_input_ids,
                labels,
                visible,
                None if asked is None else asked.places_R,
            )
        loss = head_loss(hidden_nD, self.head_weight, labels_n, label_smoothing, self.loss_by)
        if asked is None or not self.config.item_loss:
            return loss
        return loss + self.config.item_loss * tokens_a_target * self.item_loss(
            memory, asked, label_smoothing
        )

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        user_rows: Tensor | None = None,
        item_rows: Tensor | None = None,
        further_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **generation: Any,
    ) -> Any:
        """Hugging Face's `generate` behind our encoder; left to itself it would call BART's, which
        knows no ids."""
        if encoder_outputs is None:
            encoder = self.encoder_input(
                input_ids, attention_mask, position_ids, user_rows, item_rows, further_ids
            )
            with torch.no_grad():
                encoder_outputs = BaseModelOutput(last_hidden_state=self.encode(encoder))
            attention_mask = encoder.attention_mask
        return super().generate(
            encoder_outputs=encoder_outputs, attention_mask=attention_mask, **generation
        )

    def encoder_input(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        user_rows: Tensor | None = None,
        item_rows: Tensor | None = None,
        further_ids: Tensor | None = None,
    ) -> EncoderInput:
        """Fill in what a caller with plain Hugging Face inputs leaves out, and check the ranges of
        ids on CPU.

        Raises ValueError for input longer than the positions or ids outside their tables.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing")
        zeros = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        if position_ids is None:
            position_ids = positions(attention_mask, self.config.encoder_positions)
        encoder = EncoderInput(
            input_ids,
            attention_mask.bool(),
            position_ids,
            zeros if user_rows is None else user_rows,
            zeros if item_rows is None else item_rows,
            further_ids,
        )
        if input_ids.dim() == 2 and input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} input tokens, {self.config.max_position_embeddings} positions: lower model.max_tokens"
            )
        # Elsewhere the check would wait for the device; batches are checked when made.
        if input_ids.device.type == "cpu":
            check_ranges(encoder, self.config)
        return encoder


def _id_table(
    config: GenRecConfig, num_ids: int
) -> tuple[IdEmbedding | FetchedRows | None, IdProjection | None]:
    if num_ids == 0:
        return None, None
    width = config.id_dim or config.d_model
    table = FetchedRows() if config.ids_outside else IdEmbedding(num_ids, width)
    return table, IdProjection(width, config.d_model) if width != config.d_model else None


def sum_of_rows(ids_BLS: Tensor, table_VD: Tensor, pad_token_id: int) -> Tensor:
    """The sum of these rows over S, float [B, L, D]; `pad_token_id` adds nothing and learns
    nothing."""
    if not ids_BLS.shape[-1]:
        return table_VD.new_zeros(*ids_BLS.shape[:-1], table_VD.shape[1])
    flat_nS = ids_BLS.flatten(0, -2)
    summed_nD: Tensor = F.embedding_bag(flat_nS, table_VD, mode="sum", padding_idx=pad_token_id)
    return summed_nD.view(*ids_BLS.shape[:-1], -1)


def positions(attention_mask_BL: Tensor, counted: str) -> Tensor:
    """int64 [B, L], places from <s> ("from-start") or back from </s> ("from-end") in rows padded on
    the right."""
    columns_BL = torch.arange(
        attention_mask_BL.shape[1], device=attention_mask_BL.device
    ).expand_as(attention_mask_BL)
    if counted == "from-start":
        return columns_BL
    return (attention_mask_BL.sum(1, keepdim=True) - 1 - columns_BL).clamp(min=0)


def check_ranges(encoder: EncoderInput, config: GenRecConfig) -> None:
    """Raise ValueError naming the table if an index lies outside it."""
    limits = [
        ("token", encoder.input_ids, config.vocab_size),
        ("further token", encoder.further_ids, config.vocab_size),
        ("position", encoder.position_ids, config.max_position_embeddings),
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


def attention_bias(seen: Tensor, hidden: Tensor) -> Tensor:
    """0 where `seen` is True, -inf elsewhere, in the precision attention scores will have."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=hidden.device).masked_fill_(
        ~seen, float("-inf")
    )


def choose_attention(model: GenRecForConditionalGeneration, precision: str) -> None:
    """Pick the attention that is fast here; the results agree up to rounding.

    On CPU the backward of torch's fused attention takes 4 times as long in bf16 as plain matrix
    products do at 40 tokens (docs/log.md, 2026-11-21), in fp32 it is the faster one. On a GPU the
    fused one is taken, unmeasured so far."""
    plain = model.device.type == "cpu" and precision == "bf16"
    model.set_attn_implementation("eager" if plain else "sdpa")


def choose_packing(how: Literal["auto", "packed", "padded"], device: torch.device) -> bool:
    """Whether training batches for this device are packed."""
    return device.type == "cpu" if how == "auto" else how == "packed"


def choose_layers(model: GenRecForConditionalGeneration, compiled: bool, recompute: bool) -> None:
    """Let training run the layers so; of padded micro-batches only `recompute` is heard."""
    model.runner = LayerRunner(compiled, recompute)
    if recompute:
        # By its newer name where transformers has it.
        enable: Any = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})


def choose_loss(model: GenRecForConditionalGeneration, how: HeadLoss | Literal["auto"]) -> None:
    """Let `forward` compute the loss in this way. Raises ValueError where the model's device or the
    installation lacks it."""
    model.loss_by = resolve_head(how, model.device)


def _is_identity(rows_R: Tensor, num_rows: int) -> bool:
    # Decoder rows are numbered by sample, ascending: as many rows as samples means one each.
    return len(rows_R) == num_rows
