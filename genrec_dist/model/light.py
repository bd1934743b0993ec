"""GenRec for decoding alone, from torch's own modules: those of transformers take longer to import
than all the rest of a recommendation."""

# D width, L input tokens

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from genrec_dist.config.model_config import read_model_config
from genrec_dist.model.network import POSITION_OFFSET, BartNetwork, id_table
from genrec_dist.model.weights import LOGITS_BIAS, WEIGHTS, read_weights

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
_FIELDS = (
    "activation_function", "bos_token_id", "certain_tokens", "d_model",
    "decoder_attention_heads", "decoder_ffn_dim", "decoder_layers", "decoder_start",
    "decoder_start_token_id", "encoder_attention", "encoder_attention_heads", "encoder_ffn_dim",
    "encoder_layers", "encoder_positions", "encoder_unit", "eos_token_id", "exclude_history",
    "id_dim", "id_dropout", "ids_outside", "item_loss", "max_input_tokens",
    "max_position_embeddings", "num_items", "num_masks", "num_users", "numbering_hash",
    "pad_token_id", "scale_embedding", "split", "spoken_tokens", "tie_word_embeddings",
    "vocab_size", "vocabulary_hash",
)  # fmt: skip
"""Fields of the configuration that decoding reads."""
_LATER = {"item_output": False, "softmax": "vocabulary"}
"""The same of fields that earlier versions did not write, with what they meant."""


class LightGenRec(BartNetwork, nn.Module):
    """A model that decodes as `GenRecForConditionalGeneration` does, with the names of its
    parameters."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.model = _Bart(config)
        self.lm_head = self.model.shared
        self.user_embedding, self.user_projection = id_table(config, config.num_users)
        self.item_embedding, self.item_projection = id_table(config, config.num_items)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        weight: Tensor = self.model.shared.weight
        return weight.device


def light_config(best: Path) -> Any | None:
    """The configuration of a saved model that `LightGenRec` can be, else None: where a field is
    missing, which an earlier version did not write, or says something that it has no modules for.
    Raises ModelFileError where the configuration is none of a model."""
    fields = _LATER | read_model_config(best)
    if any(field not in fields for field in _FIELDS):
        return None
    fits = fields["activation_function"] in _ACTIVATIONS and fields["tie_word_embeddings"]
    return SimpleNamespace(**fields) if fits and not fields["ids_outside"] else None


def load_light(best: Path, config: Any) -> LightGenRec:
    """The saved model in float32, on the CPU.

    Args:
        best: directory of the model.
        config: of `light_config`.

    Raises:
        ModelFileError: the weights are damaged or not those of this configuration.
    """
    with torch.device("meta"), WithoutInit():
        model = LightGenRec(config)
        bias_1V = torch.empty(1, config.vocab_size)  # of Hugging Face's `generate`
    expected = {**dict(model.named_parameters()), LOGITS_BIAS: bias_1V}
    weights = read_weights(best / WEIGHTS, expected)
    del weights[LOGITS_BIAS]
    for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        weights[f"{name}.weight"] = weights["model.shared.weight"]
    model.load_state_dict(weights, assign=True)
    return model.eval()


class WithoutInit(TorchFunctionMode):
    """Initial values are not drawn: on the meta device that imports torch's compiler, which takes
    as long as torch itself."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))


class _Bart(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.shared = _ScaledEmbedding(config.vocab_size, config.d_model, scale)
        self.encoder = _Tower(
            self.shared,
            config,
            [_EncoderLayer(config) for _ in range(config.encoder_layers)],
        )
        self.decoder = _Tower(
            self.shared,
            config,
            [_DecoderLayer(config) for _ in range(config.decoder_layers)],
        )


class _Tower(nn.Module):
    dropout = 0.0

    def __init__(self, tokens: nn.Module, config: Any, layers: list[nn.Module]):
        super().__init__()
        self.embed_tokens = tokens
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = nn.Embedding(positions, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(layers)


class _ScaledEmbedding(nn.Embedding):
    def __init__(self, num_tokens: int, width: int, scale: float):
        super().__init__(num_tokens, width)
        self.embed_scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_BLD: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            project(hidden_BLD).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=self.scaling
        )
        mixed_BLD: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return mixed_BLD


class _EncoderLayer(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        width, inner = config.d_model, config.encoder_ffn_dim
        self.self_attn = _Attention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation_fn = _ACTIVATIONS[config.activation_function]

    def forward(self, hidden_BLD: Tensor, bias: Tensor) -> Tensor:
        """States after the layer; `bias`: of `attention_bias`."""
        hidden_BLD = self.self_attn_layer_norm(hidden_BLD + self.self_attn(hidden_BLD, bias))
        inner = self.activation_fn(self.fc1(hidden_BLD))
        normed_BLD: Tensor = self.final_layer_norm(hidden_BLD + self.fc2(inner))
        return normed_BLD


class _DecoderLayer(nn.Module):
    """The weights; `DecoderState` runs them."""

    def __init__(self, config: Any):
        super().__init__()
        width, inner = config.d_model, config.decoder_ffn_dim
        heads = config.decoder_attention_heads
        self.self_attn, self.encoder_attn = _Attention(width, heads), _Attention(width, heads)
        self.self_attn_layer_norm, self.encoder_attn_layer_norm, self.final_layer_norm = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation_fn = _ACTIVATIONS[config.activation_function]
