"""GenRec: a BART encoder-decoder whose encoder adds user and item id embeddings to tokens and
positions (the paper's equation 2)."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, V output vocabulary, N items,
# F width of the id tables; packed: n input tokens, m target tokens

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
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

from genrec_dist.config.model_config import check_model_config
from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import ItemTargets, ModelInputs, SampleRows
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.dropout import drop
from genrec_dist.model.head_loss import head_loss, resolve_head, soft_difference
from genrec_dist.model.network import (
    IdProjection,
    ItemText,
    Network,
    attention_bias,
    check_ranges,
    id_table,
    lower_triangle,
)
from genrec_dist.model.packed_layers import LayerRunner, lowered, rows_bias

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

    def __post_init__(self, **kwargs: Any) -> None:
        """Set what transformers sets, and check the values.

        Raises:
            ModelFileError: naming a key, its value and what it has to be.
        """
        check_model_config({**vars(self), **kwargs})
        super().__post_init__(**kwargs)


class GenRecForConditionalGeneration(Network, BartForConditionalGeneration):
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
        self.user_embedding, self.user_projection = id_table(config, config.num_users)
        self.item_embedding, self.item_projection = id_table(config, config.num_items)
        self.item_text: ItemText | None = None  # while it is trained; never in what is saved
        if config.spoken_tokens:
            # Hugging Face's `generate` adds this to the logits.
            self.final_logits_bias[:, config.spoken_tokens :] = float("-inf")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, IdProjection):
            init.normal_(module.weight, std=module.in_features**-0.5)

    def decode(
        self,
        decoder_input_ids_RT: Tensor,
        memory_RLD: Tensor,
        memory_mask_RL: Tensor,
        start_RD: Tensor | None = None,
        shared: tuple[SampleRows, Tensor] | None = None,
    ) -> Tensor:
        """Decoder states of whole target sequences, float [R, T, D]. Rows are padded on the right,
        so causality alone keeps them from attending to padding.

        Args:
            decoder_input_ids_RT: int64 [R, T].
            memory_RLD: encoder states of each row.
            memory_mask_RL: bool [R, L], False where a row does not attend.
            start_RD: added to the first input of each row.
            shared: places of the rows, and `visible`; memory and mask are then those of samples.
        """
        bart = self.model.decoder
        ids_RT = decoder_input_ids_RT
        hidden_RTD = bart.embed_tokens(ids_RT) + bart.embed_positions(ids_RT)
        if start_RD is not None:
            hidden_RTD = torch.cat([hidden_RTD[:, :1] + start_RD[:, None], hidden_RTD[:, 1:]], 1)
        hidden_RTD = F.dropout(bart.layernorm_embedding(hidden_RTD), bart.dropout, self.training)
        causal_TT = lower_triangle(ids_RT.shape[1], hidden_RTD.device)
        bias_11TT = attention_bias(causal_TT[None, None], hidden_RTD)
        if shared is not None:
            memory_bias = rows_bias(*shared, ids_RT.shape[1], memory_RLD)
            inputs = (bias_11TT, memory_RLD, memory_bias, shared[0])
            for layer in bart.layers:
                hidden_RTD = self.runner.decode_rows(layer, hidden_RTD, *inputs)
            return hidden_RTD
        memory_bias = attention_bias(memory_mask_RL[:, None, None], hidden_RTD)
        options = {"encoder_attention_mask": memory_bias, "use_cache": False}
        for layer in bart.layers:
            hidden_RTD = layer(hidden_RTD, bias_11TT, memory_RLD, **options)
        return hidden_RTD

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
        if visible_R is not None and inputs.rows is not None:
            shared = (inputs.rows, visible_R)
            ids_RT = inputs.decoder_input_ids
            hidden_RTD = self.decode(ids_RT, memory_BLD, mask_BL, start_RD, shared)
            return _learned_states(hidden_RTD, inputs)
        # Decoder rows are numbered by sample, ascending: as many rows as samples means one each.
        if visible_R is not None or len(rows_R) != len(memory_BLD):
            memory_BLD, mask_BL = memory_BLD[rows_R], mask_BL[rows_R]
        if visible_R is not None:
            columns_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
            mask_BL = mask_BL & (columns_L < visible_R[:, None])
        hidden_RTD = self.decode(inputs.decoder_input_ids, memory_BLD, mask_BL, start_RD)
        return _learned_states(hidden_RTD, inputs)

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
            first_R = packing.rows.cu_seqlens[: len(places_R)]
            hidden_mD = hidden_mD.index_add(0, first_R, hidden_nD[places_R].to(hidden_mD.dtype))
        hidden_mD = bart.decoder.layernorm_embedding(hidden_mD)
        hidden_mD = drop(hidden_mD, bart.decoder.dropout, self.training)
        for layer in bart.decoder.layers:
            hidden_mD = self.runner.decode(layer, hidden_mD, memory_nD, packing)
        return hidden_mD, hidden_nD

    def item_loss(self, memory: Tensor, targets: ItemTargets, label_smoothing: float) -> Tensor:
        """The summed cross-entropy of the item head.

        Args:
            memory: encoder states, [B, L, D] or packed [n, D].
            targets: what it predicts.
            label_smoothing: of the stage.
        """
        places_R = targets.places_R.index_select(0, targets.learned)
        items_R = targets.items_R.index_select(0, targets.learned)
        query_RF, table_NF = self._item_head(memory.flatten(0, -2).index_select(0, places_R))
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
            bart = self.model
            tied = (bart.shared, bart.encoder.embed_tokens, bart.decoder.embed_tokens, self.lm_head)
            with self.item_text.added(tied) if self.item_text else contextlib.nullcontext():
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
            hidden_nD, labels_n = _learned_states(hidden_mD, inputs)
        else:
            memory = self.encode(inputs.encoder, inputs.plan)
            hidden_nD, labels_n = self._target_states(memory, inputs)
        loss = head_loss(hidden_nD, self.head_weight, labels_n, smoothing, self.loss_by)
        if inputs.soft is not None:
            loss = loss + soft_difference(hidden_nD, self.head_weight, labels_n, inputs.soft)
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


def _learned_states(hidden: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    """(decoder states [k, D], labels int64 [k]) of the labels that are in the loss."""
    learned = inputs.learned_places()
    flat_nD, labels_n = hidden.flatten(0, -2), inputs.labels.flatten()
    return flat_nD.index_select(0, learned), labels_n.index_select(0, learned)


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


def choose_loss(model: Any, how: HeadLoss | Literal["auto"]) -> None:
    """Set how `forward` computes the loss. Raises ValueError where device or installation lack
    it."""
    model.loss_by = resolve_head(how, model.device)


# `genrec_dist.auto_classes` imports this module when transformers' auto classes are loaded.
AutoConfig.register(GenRecConfig.model_type, GenRecConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(GenRecConfig, GenRecForConditionalGeneration, exist_ok=True)
