"""GenRec on T5's encoder and decoder: the paper's equation (2) without its position term, since
T5's layers have relative positions."""

# B samples, R decoder rows, L input tokens, T target tokens, D width

from __future__ import annotations

import torch
from genrec_kernels import GradientOrder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5DenseActDense,
    T5DenseGatedActDense,
)

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.network import sum_of_rows
from genrec_dist.model.seq2seq.base import EncoderDecoder
from genrec_dist.model.seq2seq.config import GenRecT5Config


class GenRecT5ForConditionalGeneration(EncoderDecoder, T5ForConditionalGeneration):
    """T5 whose encoder reads the sum of token and id embeddings. Loads plain T5 weights; the id
    tables then start fresh. With ids of zero it computes what T5 does."""

    config_class = GenRecT5Config
    config: GenRecT5Config

    def __init__(self, config: GenRecT5Config):
        super().__init__(config)
        self.add_id_tables()
        for module in self.modules():  # T5 has one dropout for all places
            if isinstance(module, T5Attention):
                module.dropout = config.attention_dropout
            elif isinstance(module, T5DenseActDense | T5DenseGatedActDense):
                module.dropout.p = config.activation_dropout
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.shared:  # transformers would take `init_std`, which is the id tables'
            init.normal_(module.weight, std=self.config.initializer_factor)

    def embed(self, encoder: EncoderInput) -> Tensor:
        """The sum of token and id embeddings, float [B, L, D]; the positions are not read."""
        tokens = self.shared.weight
        summed_BLD = F.embedding(encoder.input_ids, tokens)
        if encoder.further_ids is not None:
            pad = self.config.pad_token_id
            summed_BLD = summed_BLD + sum_of_rows(encoder.further_ids, tokens, pad)
        for table, projection, rows_BL in (
            (self.user_embedding, self.user_projection, encoder.user_rows),
            (self.item_embedding, self.item_projection, encoder.item_rows),
        ):
            if table is None:
                continue
            # Fetched rows are float32, the layers may not be.
            weight = table.weight.to(tokens.dtype)
            ids_BLD = F.embedding(table.places(rows_BL), weight, padding_idx=0)
            if projection is not None:
                ids_BLD = projection(ids_BLD)
            summed_BLD = summed_BLD + F.dropout(ids_BLD, self.config.id_dropout, self.training)
        return summed_BLD

    def encode(self, encoder: EncoderInput, plan: GradientOrder | None = None) -> Tensor:
        """As of any encoder-decoder; there is no `plan`."""
        states_BLD: Tensor = self.encoder(
            inputs_embeds=self.embed(encoder), attention_mask=encoder.attention_mask
        ).last_hidden_state
        return states_BLD

    def decode(
        self,
        decoder_input_ids_RT: Tensor,
        memory_RLD: Tensor,
        memory_mask_RL: Tensor,
        start_RD: Tensor | None = None,
    ) -> Tensor:
        """As of any encoder-decoder."""
        inputs_RTD = F.embedding(decoder_input_ids_RT, self.shared.weight)
        if start_RD is not None:
            inputs_RTD = torch.cat([inputs_RTD[:, :1] + start_RD[:, None], inputs_RTD[:, 1:]], 1)
        states_RTD = self.decoder(
            inputs_embeds=inputs_RTD,
            encoder_hidden_states=memory_RLD,
            encoder_attention_mask=memory_mask_RL,
            use_cache=False,
        ).last_hidden_state
        return self.for_head(states_RTD)

    def for_head(self, states: Tensor) -> Tensor:
        """The decoder's last states as the head takes them."""
        return states * self.model_dim**-0.5 if self.config.scale_decoder_outputs else states


# `genrec_dist.auto_classes` imports this module when transformers' auto classes are loaded.
AutoConfig.register(GenRecT5Config.model_type, GenRecT5Config, exist_ok=True)
AutoModelForSeq2SeqLM.register(GenRecT5Config, GenRecT5ForConditionalGeneration, exist_ok=True)
