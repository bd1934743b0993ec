"""Operations of forward and backward, of real tokens: what FLOP/s and MFU mean here."""

from __future__ import annotations

from genrec_dist.data.batch import Work
from genrec_dist.model.causal.config import PromptedConfig
from genrec_dist.model.causal.kinds import AnyConfig
from genrec_dist.model.seq2seq.config import GenRecT5Config

FORMULA = (
    "3 x 2 x [inputs x E x (4 d^2 + 2 d f_e) + 2 E d x sum(L^2)]  encoder\n"
    "+ 3 x 2 x [targets x N x (4 d^2 + 2 d f_d) + 2 N d x sum(T^2)]  decoder\n"
    "+ 3 x 2 x [(inputs + targets) x N x 2 d^2 + 2 N d x sum(T L)]  cross-attention\n"
    "+ 3 x 2 x labels x d x V  head\n"
    "inputs, targets: real tokens, labels: those of the targets that are learned; L, T: tokens of "
    "a sample's history and of a decoder row (of a causal encoder L (L + 1) / 2 for L^2, and of "
    "T L what the row sees); E, N: layers; d: width; f: feed-forward; V: tokens that share the "
    "probability; 2 for multiply and add, 3 for forward and backward; of a T5 d^2 is d times the "
    "width of its heads, 2 d f with a gate 3 d f"
)
"""Matrix products and attention; the embedding sum, norms and the optimiser are left out, as is
usual."""


FORMULA_OF_PROMPTS = (
    "3 x 2 x [(inputs + targets) x N x w + 2 N d x sum(L (L + 1) / 2 + T^2 + T L)]  layers\n"
    "+ 3 x 2 x labels x d x V  head\n"
    "inputs, targets: tokens of prompts and of answers with the prompts' tails, of a history once "
    "for all its answers; labels: those of the answers; w: elements of a layer's matrices; the "
    "rest as of an encoder-decoder"
)
"""The same of a prompted model. With adapters, whose backward pass is shorter, too much."""


def flops(config: AnyConfig, work: Work) -> float:
    """Floating-point operations of forward and backward (`FORMULA`, `FORMULA_OF_PROMPTS`)."""
    if isinstance(config, PromptedConfig):
        tokens, pairs = work.inputs + work.targets, work.encoder_pairs + work.decoder_pairs
        in_layer = tokens * config.layer_weights
        in_layer += 2 * config.d_model * (pairs + work.cross_pairs)
        head = work.labels * config.d_model * config.vocab_size
        return 6.0 * (config.num_layers * in_layer + head)
    width, vocabulary = config.d_model, config.spoken_tokens or config.vocab_size
    heads, matrices = width, 2  # width of all heads together, matrices of a feed-forward layer
    if isinstance(config, GenRecT5Config):
        heads, matrices = config.num_heads * config.d_kv, 3 if config.is_gated_act else 2
    in_encoder = 4 * width * heads + matrices * width * config.encoder_ffn_dim
    in_decoder = 4 * width * heads + matrices * width * config.decoder_ffn_dim
    encoder = work.inputs * in_encoder + 2 * heads * work.encoder_pairs
    decoder = work.targets * in_decoder + 2 * heads * work.decoder_pairs
    across = (work.inputs + work.targets) * 2 * width * heads + 2 * heads * work.cross_pairs
    head = work.labels * width * vocabulary
    layers = config.encoder_layers * encoder + config.decoder_layers * (decoder + across)
    return 6.0 * (layers + head)
