"""What an encoder-decoder of transformers becomes with id tables, whichever it is: the loss of
batches, the item head's, and the calls that transformers makes."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, V output vocabulary, N items,
# F width of the id tables; packed: n input tokens, m target tokens

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from genrec_dist.config.recipe import HeadLoss
from genrec_dist.data.batch import ItemTargets, ModelInputs
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.head_loss import head_loss, soft_difference
from genrec_dist.model.network import IdProjection, ItemText, Network, check_ranges, id_table
from genrec_dist.model.seq2seq.siblings import Siblings

ENCODER_FIELDS = ("position_ids", "user_rows", "item_rows", "further_ids")
"""Fields of `EncoderInput` that callers with plain Hugging Face inputs may leave out."""


class EncoderDecoder(Network):
    """A mixin before a model of transformers with an encoder, a decoder and a language-model head.

    `forward` also takes Hugging Face's names, so that `generate`, `save_pretrained` and
    `from_pretrained` work."""

    loss_by: HeadLoss = "full"
    """How `forward` computes the loss."""

    def add_id_tables(self) -> None:
        """Make the tables and projections that the configuration names."""
        config = self.config
        self.user_embedding, self.user_projection = id_table(config, config.num_users)
        self.item_embedding, self.item_projection = id_table(config, config.num_items)
        # While it is trained; never in what is saved.
        self.item_text: ItemText | None = None
        self.siblings: Siblings | None = None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, IdProjection):
            init.normal_(module.weight, std=module.in_features**-0.5)

    def decode(
        self,
        decoder_input_ids_RT: Tensor,
        memory_RLD: Tensor,
        memory_mask_RL: Tensor,
        start_RD: Tensor | None = None,
    ) -> Tensor:
        """Decoder states of whole target sequences, float [R, T, D], as the head takes them. Rows
        are padded on the right, so causality alone keeps them from attending to padding.

        Args:
            decoder_input_ids_RT: int64 [R, T].
            memory_RLD: encoder states of each row.
            memory_mask_RL: bool [R, L], False where a row does not attend.
            start_RD: added to the first input of each row.
        """
        raise NotImplementedError

    def target_logits(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(logits float [n, V], labels int64 [n]) of the label tokens of padded inputs; padding
        never reaches the head."""
        hidden_nD, labels_n = self.target_states(self.encode(inputs.encoder), inputs)
        return F.linear(hidden_nD, self.head_weight), labels_n

    def target_states(self, memory_BLD: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(decoder states float [n, D], labels int64 [n]) of the label tokens of padded inputs."""
        rows_R, visible_R = inputs.encoder_row, inputs.visible
        mask_BL, start_RD = inputs.encoder.attention_mask, self.start_states(memory_BLD, inputs)
        # Decoder rows are numbered by sample, ascending: as many rows as samples means one each.
        if visible_R is not None or len(rows_R) != len(memory_BLD):
            memory_BLD, mask_BL = memory_BLD[rows_R], mask_BL[rows_R]
        if visible_R is not None:
            columns_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
            mask_BL = mask_BL & (columns_L < visible_R[:, None])
        hidden_RTD = self.decode(inputs.decoder_input_ids, memory_BLD, mask_BL, start_RD)
        return learned_states(hidden_RTD, inputs)

    def start_states(self, memory_BLD: Tensor, inputs: ModelInputs) -> Tensor | None:
        """What is added to the first input of each decoder row of padded inputs, or to all of them,
        [R, D]; None: nothing."""
        if self.config.decoder_start == "mask":
            return None
        if inputs.item_targets is not None:
            return memory_BLD.flatten(0, 1)[inputs.item_targets.places_R]
        return self.masked_states(memory_BLD, inputs.encoder.attention_mask)[inputs.encoder_row]

    def learned_and_memory(self, inputs: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(decoder states float [n, D], labels int64 [n]) of the label tokens, and the encoder
        states."""
        memory_BLD = self.encode(inputs.encoder, inputs.plan)
        return *self.target_states(memory_BLD, inputs), memory_BLD

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
            with self.item_text.added(self) if self.item_text else contextlib.nullcontext():
                return self._loss(inputs, label_smoothing, tokens_per_target)
        if self.config.decoder_start != "mask":
            raise ValueError(
                "Hugging Face's decoding gives the decoder no state to start from: "
                "search with genrec_dist"
            )
        if encoder_outputs is None:
            encoder = self.encoder_input(input_ids, attention_mask, **fields)
            encoder_outputs = BaseModelOutput(last_hidden_state=self.encode(encoder))
            attention_mask = encoder.attention_mask
        output: Seq2SeqLMOutput = super().forward(  # type: ignore[misc]
            attention_mask=attention_mask, encoder_outputs=encoder_outputs, **others
        )
        return output

    def _loss(self, inputs: ModelInputs, smoothing: float, tokens_per_target: float) -> Tensor:
        self._check(inputs.encoder)
        hidden_nD, labels_n, memory = self.learned_and_memory(inputs)
        if self.siblings is not None:
            assert inputs.children is not None
            loss = self.siblings.loss(
                hidden_nD, inputs.children, self.output_rows(), inputs.soft, self.loss_by
            )
        else:
            loss = head_loss(hidden_nD, self.head_weight, labels_n, smoothing, self.loss_by)
        if inputs.soft is not None and self.siblings is None:
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
        """Hugging Face's `generate` after our encoder; by itself it would call the backbone's,
        which has no ids. Arguments as of `forward`."""
        fields = {name: others.pop(name, None) for name in ENCODER_FIELDS}
        if encoder_outputs is None:
            encoder = self.encoder_input(input_ids, attention_mask, **fields)
            with torch.no_grad():
                encoder_outputs = BaseModelOutput(last_hidden_state=self.encode(encoder))
            attention_mask = encoder.attention_mask
        return super().generate(  # type: ignore[misc]
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
        """Plain Hugging Face inputs, [B, L] each, with what a caller left out filled in. Raises
        ValueError where there is no input, it is longer than the positions, or ids are outside
        their tables (checked on a CPU)."""
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
        if limit and ids.dim() == 2 and ids.shape[1] > limit:
            raise ValueError(
                f"{ids.shape[1]} input tokens, {limit} positions: lower model.max_tokens"
            )
        # On a device the check would wait for it; batches are checked when they are made.
        if ids.device.type == "cpu":
            check_ranges(encoder, self.config)


def learned_states(hidden: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    """(decoder states [k, D], labels int64 [k]) of the labels that are in the loss."""
    learned = inputs.learned_places()
    flat_nD, labels_n = hidden.flatten(0, -2), inputs.labels.flatten()
    return flat_nD.index_select(0, learned), labels_n.index_select(0, learned)
