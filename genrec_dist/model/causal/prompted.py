"""A causal language model that reads a prompt of titles and writes the next item's title."""

# B users, R answers, L prompt tokens, T answer tokens, S = L + T, s tokens of both packed, D width,
# V vocabulary, W keys and values of a token in all layers

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from genrec_dist.config.recipe import HeadLoss, Lora
from genrec_dist.data.batch import IGNORED, ModelInputs
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.model.causal.attention import (
    NAME,
    Attention,
    MaskedAttention,
    PackedAttention,
    PromptAttention,
)
from genrec_dist.model.causal.config import PromptedConfig
from genrec_dist.model.causal.lora import add_adapters, merged_weights, save_adapters
from genrec_dist.model.causal.packed_rows import PackedRows, num_shared
from genrec_dist.model.head_loss import head_loss


class PromptedModel(nn.Module):
    """Takes the batches of an encoder-decoder: the prompt before its tail is the encoder's input,
    tail and answer are decoder rows, and both go through one stack of layers.

    What an encoder keeps of a prompt are the keys and values of all layers, so that answers read
    them as often as there are beams and it runs once.
    """

    loss_by: HeadLoss = "full"
    """How `forward` computes the loss."""

    def __init__(self, lm: Any, config: PromptedConfig, lora: Lora = Lora()):
        """A model around a language model of transformers.

        Args:
            lm: with `genrec_dist`'s attention.
            config: of the prompt; gets the sizes of the language model.
            lora: of the adapters that are trained; rank 0: all weights are.
        """
        super().__init__()
        self.lm, self.config, self.lora = lm, config, lora
        layers = self.layers
        config.d_model, config.num_layers = lm.config.hidden_size, len(layers)
        config.vocab_size = lm.config.vocab_size
        config.memory_width = sum(
            module.out_features
            for name, module in layers.named_modules()
            if name.endswith((".k_proj", ".v_proj"))
        )
        config.layer_weights = sum(p.numel() for p in layers[0].parameters() if p.ndim == 2)
        # In a list: as a module it would give each parameter a second name.
        self._adapted = [add_adapters(lm, lora)] if lora.rank else []

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.lm.base_model.layers
        return layers

    @property
    def device(self) -> torch.device:
        device: torch.device = self.lm.device
        return device

    @property
    def lm_head(self) -> Any:
        return self.lm.get_output_embeddings()

    @property
    def head_weight(self) -> Tensor:
        """Of all tokens, [V, D]."""
        weight: Tensor = self.lm_head.weight
        return weight

    def tie_weights(self) -> None:
        """Let the head share the embedding where the language model does."""
        self.lm.tie_weights()

    def recompute_layers(self) -> None:
        """Keep only the input of each layer (`activation_checkpointing`)."""
        # By its newer name where transformers has it.
        lm = self.lm
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def save_pretrained(self, folder: Path) -> None:
        """Write the language model in its own form, adapters merged, and `prompt.json`; adapters
        also by themselves, in peft's form."""
        plain = self.lm
        if self._adapted:
            save_adapters(self._adapted[0], folder)
            plain = blank_lm(self.lm)
            plain.load_state_dict(merged_weights(self.lm), assign=True)
            plain.tie_weights()
            plain.generation_config = self.lm.generation_config
        plain.save_pretrained(folder)
        self.config.save(folder)

    def run(self, tokens_BS: Tensor, positions_BS: Tensor, attention: Attention) -> Tensor:
        """The states of tokens after all layers, float [B, S, D]."""
        output = self.lm.base_model(
            input_ids=tokens_BS,
            position_ids=positions_BS,
            use_cache=False,
            genrec_attention=attention,
        )
        states_BSD: Tensor = output.last_hidden_state
        return states_BSD

    def encode(self, encoder: EncoderInput) -> Tensor:
        """Keys and values of prompts, float [B, L, W]: of each token those of the first layer, then
        those of the next."""
        tokens_BL, real_BL = encoder.input_ids, encoder.attention_mask
        # The template's head, which all prompts begin with, is read once.
        rows = PackedRows.of(real_BL, num_shared(tokens_BL, real_BL))
        attention = PromptAttention(rows)
        self.run(rows.pack(tokens_BL)[None], rows.pack(encoder.position_ids)[None], attention)
        kept = torch.stack(attention.kept, 2)  # [B, L, layers, 2, G, d]
        return kept.flatten(2)

    def memory_shape(self, memory_BLW: Tensor) -> Tensor:
        """The keys and values as [layers, 2, B, G, L, d], a view."""
        heads = self.lm.config.num_key_value_heads
        by_layer = memory_BLW.unflatten(2, (self.config.num_layers, 2, heads, -1))
        return by_layer.permute(2, 3, 0, 4, 1, 5)

    def target_logits(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(logits float [n, V], labels int64 [n]) of the answers' tokens; no other token reaches
        the head."""
        hidden_nD, labels_n = self._answer_states(inputs)
        return nn.functional.linear(hidden_nD, self.head_weight), labels_n

    def forward(
        self, inputs: ModelInputs, label_smoothing: float = 0.0, tokens_per_target: float = 1.0
    ) -> Tensor:
        """The summed cross-entropy of the answers, a float32 scalar. Arguments are those of
        `GenRecForConditionalGeneration`."""
        hidden_nD, labels_n = self._answer_states(inputs)
        return head_loss(hidden_nD, self.head_weight, labels_n, label_smoothing, self.loss_by)

    def _answer_states(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(states float [n, D], labels int64 [n]) of the tokens that have a label."""
        learned = inputs.labels != IGNORED
        if inputs.packing is not None:
            joined = inputs.packing.joined
            tokens = torch.cat([inputs.encoder.input_ids, inputs.decoder_input_ids])
            order_s, device = joined.order_s.to(tokens.device), tokens.device
            attention = PackedAttention(joined.attended.to(device))
            states_sD = self.run(
                tokens[order_s][None], joined.positions_s.to(device)[None], attention
            )[0]
            places_n = joined.places_m.to(device)[learned]
            return states_sD[places_n], inputs.labels[learned]
        rows_R, encoder = inputs.encoder_row, inputs.encoder
        if len(rows_R) != len(encoder.input_ids):  # padded rows share nothing
            encoder = encoder.map(lambda values: values[rows_R])
        answers_RT = inputs.decoder_input_ids
        num_prompt, device = encoder.input_ids.shape[1], answers_RT.device
        visible_R = encoder.attention_mask.sum(1) if inputs.visible is None else inputs.visible
        columns_S = torch.arange(num_prompt + answers_RT.shape[1], device=device)
        # An answer sees what its row does of the prompt, not the padding after it.
        shown_RS = (columns_S < visible_R[:, None]) | (columns_S >= num_prompt)
        causal_SS = columns_S <= columns_S[:, None]
        states_RSD = self.run(
            torch.cat([encoder.input_ids, answers_RT], 1),
            torch.cat(
                [
                    encoder.position_ids,
                    visible_R[:, None] + torch.arange(answers_RT.shape[1], device=device),
                ],
                1,
            ),
            MaskedAttention(causal_SS & shown_RS[:, None]),
        )
        return states_RSD[:, num_prompt:][learned], inputs.labels[learned]


def blank_lm(lm: Any) -> Any:
    """A language model of the same form without values and adapters, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            lm.config, attn_implementation=NAME, dtype=torch.float32
        )


def blank_prompted(model: PromptedModel) -> PromptedModel:
    """A model of the same form without values, on the meta device."""
    lm = blank_lm(model.lm)
    with torch.device("meta"):
        return PromptedModel(lm, dataclasses.replace(model.config), model.lora)
