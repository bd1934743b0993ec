"""GenRec: a BART encoder-decoder whose encoder adds user and item id embeddings to tokens and
positions (the paper's equation 2)."""

# B samples, R decoder rows, L input tokens, T target tokens, D width, V output vocabulary, N items,
# F width of the id tables; packed: n input tokens, m target tokens

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartForConditionalGeneration

from genrec_dist.config.recipe import HeadLoss, Recipe
from genrec_dist.data.batch import ModelInputs, SampleRows
from genrec_dist.model.dropout import drop
from genrec_dist.model.head_loss import resolve_head
from genrec_dist.model.network import BartNetwork, attention_bias, lower_triangle
from genrec_dist.model.packed_layers import LayerRunner, lowered, rows_bias
from genrec_dist.model.seq2seq.base import EncoderDecoder, learned_states
from genrec_dist.model.seq2seq.config import GenRecConfig


class GenRecForConditionalGeneration(EncoderDecoder, BartNetwork, BartForConditionalGeneration):
    """BART with the paper's equation (2) as its input. Loads plain BART weights; the id tables then
    start fresh."""

    config_class = GenRecConfig
    config: GenRecConfig
    runner = LayerRunner()
    """How `forward` runs the layers of packed micro-batches."""

    def __init__(self, config: GenRecConfig):
        super().__init__(config)
        self.add_id_tables()
        if config.spoken_tokens:
            # Hugging Face's `generate` adds this to the logits.
            self.final_logits_bias[:, config.spoken_tokens :] = float("-inf")
        self.post_init()

    def decode(
        self,
        decoder_input_ids_RT: Tensor,
        memory_RLD: Tensor,
        memory_mask_RL: Tensor,
        start_RD: Tensor | None = None,
        shared: tuple[SampleRows, Tensor] | None = None,
    ) -> Tensor:
        """As of any encoder-decoder. `shared`: places of the rows, and `visible`; memory and mask
        are then those of samples."""
        bart = self.model.decoder
        ids_RT = decoder_input_ids_RT
        hidden_RTD = bart.embed_tokens(ids_RT) + bart.embed_positions(ids_RT)
        if start_RD is not None and self.config.decoder_start == "every-state":
            hidden_RTD = hidden_RTD + start_RD[:, None]
        elif start_RD is not None:
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

    def target_states(self, memory_BLD: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """(decoder states float [n, D], labels int64 [n]) of the label tokens of padded inputs."""
        if inputs.visible is None or inputs.rows is None:
            return super().target_states(memory_BLD, inputs)
        mask_BL, start_RD = inputs.encoder.attention_mask, self.start_states(memory_BLD, inputs)
        shared = (inputs.rows, inputs.visible)
        ids_RT = inputs.decoder_input_ids
        return learned_states(self.decode(ids_RT, memory_BLD, mask_BL, start_RD, shared), inputs)

    def learned_and_memory(self, inputs: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """As of any encoder-decoder; the inputs may be packed."""
        if inputs.packing is None:
            return super().learned_and_memory(inputs)
        hidden_mD, memory_nD = self._packed_states(inputs)
        return *learned_states(hidden_mD, inputs), memory_nD

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
        if self.config.decoder_start != "mask":
            assert inputs.item_targets is not None
            places_R, cu_seqlens = inputs.item_targets.places_R, packing.rows.cu_seqlens
            if self.config.decoder_start == "every-state":
                lengths_R = cu_seqlens[: len(places_R) + 1].diff()
                places_R = places_R.repeat_interleave(lengths_R)
                tokens = torch.arange(len(places_R), device=places_R.device)
            else:
                tokens = cu_seqlens[: len(places_R)]
            hidden_mD = hidden_mD.index_add(0, tokens, hidden_nD[places_R].to(hidden_mD.dtype))
        hidden_mD = bart.decoder.layernorm_embedding(hidden_mD)
        hidden_mD = drop(hidden_mD, bart.decoder.dropout, self.training)
        for layer in bart.decoder.layers:
            hidden_mD = self.runner.decode(layer, hidden_mD, memory_nD, packing)
        return hidden_mD, hidden_nD


def choose_attention(model: Any, precision: str) -> None:
    """Set the attention that is fast on the model's device; results agree up to rounding.

    On a CPU the backward pass of torch's fused attention takes 4 times as long in bf16 as plain
    matrix products at 40 tokens (docs/log.md, 2026-11-21); in fp32 it is the faster one. On a GPU
    the fused one is taken, not measured so far."""
    plain = model.device.type == "cpu" and precision == "bf16"
    model.set_attn_implementation("eager" if plain else "sdpa")


def choose_packing(recipe: Recipe, device: torch.device) -> bool:
    """Whether training batches for this device are packed."""
    if recipe.packing == "auto":  # T5 has no packed attention
        return device.type == "cpu" and recipe.model.architecture == "bart"
    return recipe.packing == "packed"


def choose_layers(model: Any, compiled: bool, recompute: bool) -> None:
    """Set how training runs the layers; `compiled` concerns packed micro-batches alone."""
    if isinstance(model, GenRecForConditionalGeneration):
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
