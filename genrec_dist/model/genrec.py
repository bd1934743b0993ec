"""GenRec: a BART encoder-decoder whose encoder adds user and item id embeddings to tokens and
positions (the paper's equation 2)."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, V output vocabulary, N items,
# F width of the id tables; packed: n input tokens, m target tokens

from __future__ import annotations

from typing import Any, Literal

import torch
from genrec_kernels import EmbeddingTables, GradientOrder, embedding_sum
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import IGNORED, ItemTargets, ModelInputs
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.dropout import drop
from genrec_dist.model.head_loss import head_loss, resolve_head
from genrec_dist.model.packed_layers import LayerRunner, lowered, product_dtype

POSITION_OFFSET = 2
"""BART's learned positions start at row 2 of their table."""

ENCODER_FIELDS = ("position_ids", "user_rows", "item_rows", "further_ids")
"""Fields of `EncoderInput` that callers with plain Hugging Face inputs may leave out."""


class GenRecConfig(BartConfig):
    """BART's configuration and the id tables.

    Attributes:
        num_users: rows of the user table without its zero row; 0: there is no table.
        num_items: the same of the item table.
        id_dropout: dropout of the id terms alone.
        encoder_positions: "from-start" (BART) or "from-end".
        encoder_unit: "subword" or "item", what an encoder position is.
        encoder_attention: "bidirectional" or "causal".
        decoder_start: "mask" or "state", the decoder's first input.
        item_loss: weight of the item head; 0: there is none.
        num_masks: numbered mask tokens.
        max_input_tokens: where the input is cut.
        numbering_hash: of the numbering that the tokens follow.
        split: what was held out of training, with dates.
        exclude_history: whether lists leave out the history by default.
        id_dim: F, then projected to d_model; 0: d_model without a projection.
        ids_outside: the tables are outside the model, which is given the rows of a step. Never so
            in what is saved as `best`.
        spoken_tokens: size of the output vocabulary, the first tokens; the others are read alone.
            0: all tokens.
        vocabulary_hash: of the trimmed vocabulary.
        certain_tokens: "learned", or "given": tokens that are forced by the trie have probability
            1.
    """

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


class GenRecForConditionalGeneration(BartForConditionalGeneration):
    """BART with the paper's equation (2) as its input. Loads plain BART weights; the id tables then
    start fresh.

    `forward` also takes Hugging Face's names, so that `generate`, `save_pretrained` and
    `from_pretrained` work."""

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
        """Encoder states, float [B, L, D]. `plan`: `ModelInputs.plan`."""
        bart = self.model.encoder
        hidden_BLD = self.embed(encoder, plan, normed=True)
        hidden_BLD = F.dropout(hidden_BLD, bart.dropout, self.training)
        seen = encoder.attention_mask[:, None, None]
        if self.config.encoder_attention == "causal":
            seen = seen & _lower_triangle(seen.shape[-1], seen.device)
        bias = attention_bias(seen, hidden_BLD)
        for layer in bart.layers:
            hidden_BLD = layer(hidden_BLD, bias)
        return hidden_BLD

    def masked_states(self, memory_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """The encoder's states at the [MASK] after each history, [B, D]; of a causal encoder at its
        last token."""
        from_end = 1 if self.config.encoder_attention == "causal" else 2
        users_B = torch.arange(len(memory_BLD), device=memory_BLD.device)
        return memory_BLD[users_B, mask_BL.sum(1) - from_end]

    def decode(
        self,
        decoder_input_ids_RT: Tensor,
        memory_RLD: Tensor,
        memory_mask_RL: Tensor,
        start_RD: Tensor | None = None,
    ) -> Tensor:
        """Decoder states of whole target sequences, float [R, T, D]. Rows are padded on the right,
        so causality alone keeps them from attending to padding.

        Args:
            decoder_input_ids_RT: int64 [R, T].
            memory_RLD: encoder states of each row.
            memory_mask_RL: bool [R, L], False where a row does not attend.
            start_RD: added to the first input of each row.
        """
        bart = self.model.decoder
        ids_RT = decoder_input_ids_RT
        hidden_RTD = bart.embed_tokens(ids_RT) + bart.embed_positions(ids_RT)
        if start_RD is not None:
            hidden_RTD = torch.cat([hidden_RTD[:, :1] + start_RD[:, None], hidden_RTD[:, 1:]], 1)
        hidden_RTD = F.dropout(bart.layernorm_embedding(hidden_RTD), bart.dropout, self.training)
        causal_TT = _lower_triangle(ids_RT.shape[1], hidden_RTD.device)
        bias_11TT = attention_bias(causal_TT[None, None], hidden_RTD)
        memory_bias = attention_bias(memory_mask_RL[:, None, None], hidden_RTD)
        options = {"encoder_attention_mask": memory_bias, "use_cache": False}
        for layer in bart.layers:
            hidden_RTD = layer(hidden_RTD, bias_11TT, memory_RLD, **options)
        return hidden_RTD

    @property
    def head_weight(self) -> Tensor:
        """The head's rows of the output vocabulary, [V, D]."""
        weight: Tensor = self.lm_head.weight
        return weight[: self.config.spoken_tokens] if self.config.spoken_tokens else weight

    def target_logits(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(logits float [n, V], labels int64 [n]) of the label tokens of padded inputs; padding
        never reaches the head."""
        hidden_nD, labels_n = self._target_states(self.encode(inputs.encoder), inputs)
        return F.linear(hidden_nD, self.head_weight), labels_n

    def _target_states(self, memory_BLD: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(decoder states float [n, D], labels int64 [n]) of the label tokens of padded inputs."""
        rows_R, visible_R = inputs.encoder_row, inputs.visible
        mask_BL, start_RD = inputs.encoder.attention_mask, None
        if self.config.decoder_start == "state":
            if inputs.item_targets is not None:
                start_RD = memory_BLD.flatten(0, 1)[inputs.item_targets.places_R]
            else:
                start_RD = self.masked_states(memory_BLD, mask_BL)[rows_R]
        # Decoder rows are numbered by sample, ascending: as many rows as samples means one each.
        if visible_R is not None or len(rows_R) != len(memory_BLD):
            memory_BLD, mask_BL = memory_BLD[rows_R], mask_BL[rows_R]
        if visible_R is not None:
            columns_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
            mask_BL = mask_BL & (columns_L < visible_R[:, None])
        hidden_RTD = self.decode(inputs.decoder_input_ids, memory_BLD, mask_BL, start_RD)
        learned_RT = inputs.labels != IGNORED
        return hidden_RTD[learned_RT], inputs.labels[learned_RT]

    def _packed_states(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(decoder states float [m, D], encoder states [n, D]) of packed inputs."""
        bart, packing = self.model, inputs.packing
        assert packing is not None
        hidden_nD = self.embed(inputs.encoder, inputs.plan, normed=True)
        hidden_nD = drop(hidden_nD, bart.encoder.dropout, self.training)
        for layer in bart.encoder.layers:
            hidden_nD = self.runner.encode(layer, hidden_nD, packing)
        memory_nD = lowered(hidden_nD)
        positions_mD = bart.decoder.embed_positions(None, position_ids=packing.positions_m)[0]
        hidden_mD = bart.decoder.embed_tokens(inputs.decoder_input_ids) + positions_mD
        if self.config.decoder_start == "state":
            assert inputs.item_targets is not None
            places_R = inputs.item_targets.places_R
            first_R = torch.from_numpy(packing.rows.offsets[: len(places_R)]).to(hidden_mD.device)
            hidden_mD = hidden_mD.index_add(0, first_R, hidden_nD[places_R].to(hidden_mD.dtype))
        hidden_mD = bart.decoder.layernorm_embedding(hidden_mD)
        hidden_mD = drop(hidden_mD, bart.decoder.dropout, self.training)
        for layer in bart.decoder.layers:
            hidden_mD = self.runner.decode(layer, hidden_mD, memory_nD, packing)
        return hidden_mD, hidden_nD

    def item_logits(self, masked_RD: Tensor) -> Tensor:
        """The item head: logits [R, N] of the encoder's states at masks."""
        return F.linear(*self._item_head(masked_RD))

    def _item_head(self, masked_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [R, F], rows of the items [N, F])."""
        assert isinstance(self.item_embedding, IdEmbedding)
        if self.item_projection is not None:  # (P e) . h = e . (P^T h)
            masked_RD = F.linear(masked_RD, self.item_projection.weight.T)
        return masked_RD, self.item_embedding.weight[1:]

    def item_loss(self, memory: Tensor, targets: ItemTargets, label_smoothing: float) -> Tensor:
        """The summed cross-entropy of the item head.

        Args:
            memory: encoder states, [B, L, D] or packed [n, D].
            targets: what it predicts.
            label_smoothing: of the stage.
        """
        learned_R = targets.items_R != IGNORED
        query_RF, table_NF = self._item_head(memory.flatten(0, -2)[targets.places_R[learned_R]])
        items_R = targets.items_R[learned_R]
        return head_loss(query_RF, table_NF, items_R, label_smoothing, self.loss_by)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: ModelInputs | None = None,
        label_smoothing: float = 0.0,
        tokens_per_target: float = 1.0,
        encoder_outputs: BaseModelOutput | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The loss of `inputs`, or Hugging Face's decoder output.

        The loss is computed in here because under ZeRO-3 the head's weight is whole in here alone.

        Args:
            input_ids: int64 [B, L], a Hugging Face caller's, with `decoder_input_ids` and the
                fields of `EncoderInput` in `others`.
            attention_mask: bool or int64 [B, L].
            inputs: what to compute the summed cross-entropy of, a float32 scalar.
            label_smoothing: of that loss.
            tokens_per_target: of the whole step; the item head's loss counts so many times, as if
                its targets were tokens.
            encoder_outputs: of an encoder that has run already.
            labels: int64 [R, T]; with `input_ids`, instead of `inputs`, whose other fields are then
                in `others`.
            others: Hugging Face's options of the decoder.

        Raises:
            ValueError: inputs are longer than the positions, or ids outside their tables (checked
                on a CPU).
        """
        fields = {name: others.pop(name, None) for name in ENCODER_FIELDS}
        if labels is not None:
            encoder = self.encoder_input(input_ids, attention_mask, **fields)
            others.setdefault("encoder_row", torch.arange(len(labels), device=labels.device))
            inputs = ModelInputs(encoder=encoder, labels=labels, **others)
        if inputs is not None:
            return self._loss(inputs, label_smoothing, tokens_per_target)
        if self.config.decoder_start == "state":
            raise ValueError(
                "Hugging Face's decoding gives the decoder no state to start from: "
                "search with genrec_dist"
            )
        if encoder_outputs is None:
            encoder = self.encoder_input(input_ids, attention_mask, **fields)
            encoder_outputs = BaseModelOutput(last_hidden_state=self.encode(encoder))
            attention_mask = encoder.attention_mask
        output: Seq2SeqLMOutput = super().forward(
            attention_mask=attention_mask, encoder_outputs=encoder_outputs, **others
        )
        return output

    def _loss(self, inputs: ModelInputs, smoothing: float, tokens_per_target: float) -> Tensor:
        self._check(inputs.encoder)
        if inputs.packing is not None:
            hidden_mD, memory = self._packed_states(inputs)
            learned_m = inputs.labels != IGNORED
            hidden_nD, labels_n = hidden_mD[learned_m], inputs.labels[learned_m]
        else:
            memory = self.encode(inputs.encoder, inputs.plan)
            hidden_nD, labels_n = self._target_states(memory, inputs)
        loss = head_loss(hidden_nD, self.head_weight, labels_n, smoothing, self.loss_by)
        if inputs.item_targets is None or not self.config.item_loss:
            return loss
        item_loss = self.item_loss(memory, inputs.item_targets, smoothing)
        return loss + self.config.item_loss * tokens_per_target * item_loss

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        encoder_outputs: BaseModelOutput | None = None,
        **others: Any,
    ) -> Any:
        """Hugging Face's `generate` after our encoder; by itself it would call BART's, which has no
        ids. Arguments as of `forward`."""
        fields = {name: others.pop(name, None) for name in ENCODER_FIELDS}
        if encoder_outputs is None:
            encoder = self.encoder_input(input_ids, attention_mask, **fields)
            with torch.no_grad():
                encoder_outputs = BaseModelOutput(last_hidden_state=self.encode(encoder))
            attention_mask = encoder.attention_mask
        return super().generate(
            encoder_outputs=encoder_outputs, attention_mask=attention_mask, **others
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
        """Plain Hugging Face inputs, [B, L] each, with what a caller left out filled in.

        Raises:
            ValueError: there is no input, it is longer than the positions, or ids are outside
                their tables (checked on a CPU).
        """
        if input_ids is None:
            raise ValueError("input_ids is missing")
        zeros = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        if position_ids is None:
            # From <s> on, or back from </s> in rows padded on the right.
            columns_BL = zeros + torch.arange(input_ids.shape[1], device=input_ids.device)
            back_BL = (attention_mask.sum(1, keepdim=True) - 1 - columns_BL).clamp(min=0)
            from_start = self.config.encoder_positions == "from-start"
            position_ids = columns_BL if from_start else back_BL
        encoder = EncoderInput(
            input_ids=input_ids,
            attention_mask=attention_mask.bool(),
            position_ids=position_ids,
            user_rows=zeros if user_rows is None else user_rows,
            item_rows=zeros if item_rows is None else item_rows,
            further_ids=further_ids,
        )
        self._check(encoder)
        return encoder

    def _check(self, encoder: EncoderInput) -> None:
        ids, limit = encoder.input_ids, self.config.max_position_embeddings
        if ids.dim() == 2 and ids.shape[1] > limit:
            raise ValueError(
                f"{ids.shape[1]} input tokens, {limit} positions: lower model.max_tokens"
            )
        # On a device the check would wait for it; batches are checked when they are made.
        if ids.device.type == "cpu":
            check_ranges(encoder, self.config)


def _id_table(
    config: GenRecConfig, num_ids: int
) -> tuple[IdEmbedding | FetchedRows | None, IdProjection | None]:
    if num_ids == 0:
        return None, None
    width = config.id_dim or config.d_model
    table = FetchedRows() if config.ids_outside else IdEmbedding(num_ids, width)
    return table, IdProjection(width, config.d_model) if width != config.d_model else None


def _lower_triangle(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def sum_of_rows(ids_BLS: Tensor, table_VD: Tensor, pad_token_id: int) -> Tensor:
    """The sum of these rows over S, float [B, L, D]; `pad_token_id` adds nothing and has no
    gradient."""
    if not ids_BLS.shape[-1]:
        return table_VD.new_zeros(*ids_BLS.shape[:-1], table_VD.shape[1])
    flat_nS = ids_BLS.flatten(0, -2)
    summed_nD: Tensor = F.embedding_bag(flat_nS, table_VD, mode="sum", padding_idx=pad_token_id)
    return summed_nD.view(*ids_BLS.shape[:-1], -1)


def check_ranges(encoder: EncoderInput, config: GenRecConfig) -> None:
    """Raise ValueError naming the table if an index is outside it."""
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
    """0 where `seen` is True, -inf elsewhere, in the precision of the attention scores."""
    bias = torch.zeros(seen.shape, dtype=product_dtype(hidden), device=hidden.device)
    return bias.masked_fill_(~seen, float("-inf"))


def choose_attention(model: GenRecForConditionalGeneration, precision: str) -> None:
    """Set the attention that is fast on the model's device; results agree up to rounding.

    On a CPU the backward pass of torch's fused attention takes 4 times as long in bf16 as plain
    matrix products at 40 tokens (docs/log.md, 2026-11-21); in fp32 it is the faster one. On a GPU
    the fused one is taken, not measured so far."""
    plain = model.device.type == "cpu" and precision == "bf16"
    model.set_attn_implementation("eager" if plain else "sdpa")


def choose_packing(how: Literal["auto", "packed", "padded"], device: torch.device) -> bool:
    """Whether training batches for this device are packed."""
    return device.type == "cpu" if how == "auto" else how == "packed"


def choose_layers(model: GenRecForConditionalGeneration, compiled: bool, recompute: bool) -> None:
    """Set how training runs the layers; `compiled` concerns packed micro-batches alone."""
    model.runner = LayerRunner(compiled, recompute)
    if recompute:
        # By its newer name where transformers has it.
        enable: Any = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})


def choose_loss(model: GenRecForConditionalGeneration, how: HeadLoss | Literal["auto"]) -> None:
    """Set how `forward` computes the loss. Raises ValueError where device or installation lack
    it."""
    model.loss_by = resolve_head(how, model.device)


# `genrec_dist.auto_classes` imports this module when transformers' auto classes are loaded.
AutoConfig.register(GenRecConfig.model_type, GenRecConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(GenRecConfig, GenRecForConditionalGeneration, exist_ok=True)
