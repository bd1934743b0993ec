"""The limits of a model's `config.json`, checked before anything is built from it, and without
torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from genrec_shards.readers.documents import read_object

from genrec_dist.config.recipe import Model, Tokens
from genrec_dist.config.validate import MOST_FFN, MOST_LAYERS, MOST_POSITIONS, MOST_WIDTH

CONFIG = "config.json"
REMEDY = "copy the model again, or train again"
_MOST_ROWS = 2**31 - 1
_INTEGERS: dict[str, tuple[int, int]] = {
    "d_model": (1, MOST_WIDTH),
    "encoder_layers": (1, MOST_LAYERS),
    "decoder_layers": (1, MOST_LAYERS),
    "encoder_attention_heads": (1, MOST_WIDTH),
    "decoder_attention_heads": (1, MOST_WIDTH),
    "encoder_ffn_dim": (1, MOST_FFN),
    "decoder_ffn_dim": (1, MOST_FFN),
    "max_position_embeddings": (1, MOST_POSITIONS),
    "max_input_tokens": (1, MOST_POSITIONS),
    "num_layers": (1, MOST_LAYERS),  # from here on T5's
    "num_decoder_layers": (1, MOST_LAYERS),
    "num_heads": (1, MOST_WIDTH),
    "d_ff": (1, MOST_FFN),
    "d_kv": (1, MOST_WIDTH),
    "relative_attention_num_buckets": (4, MOST_POSITIONS),
    "relative_attention_max_distance": (4, MOST_POSITIONS),
    "vocab_size": (1, _MOST_ROWS),
    "num_users": (0, _MOST_ROWS),
    "num_items": (0, _MOST_ROWS),
    "id_dim": (0, MOST_WIDTH),
}
_TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
_BOOLEANS = (
    "exclude_history", "ids_outside", "is_encoder_decoder", "item_output", "scale_decoder_outputs",
    "scale_embedding", "tie_word_embeddings",
)  # fmt: skip
_TEXTS = ("activation_function", "numbering_hash", "split", "vocabulary_hash")
_SHARES = ("activation_dropout", "attention_dropout", "dropout", "dropout_rate", "id_dropout")


def _choices(kind: type, name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(kind)[name])


_CHOICES = {
    "model_type": ("genrec", "genrec-t5"),
    "feed_forward_proj": ("relu", "gated-gelu"),
    "encoder_positions": _choices(Model, "positions"),
    "encoder_unit": _choices(Model, "encoder_unit"),
    "encoder_attention": _choices(Model, "encoder_attention"),
    "decoder_start": _choices(Model, "decoder_start"),
    "certain_tokens": _choices(Tokens, "forced"),
    "softmax": _choices(Tokens, "softmax"),
}


class ModelFileError(ValueError):
    """A file of a saved model that is damaged or does not fit. The message names it."""


def read_model_config(folder: Path) -> dict[str, Any]:
    """The checked fields of a model's `config.json`. `folder`: directory of the model, as `best/`.
    Raises ModelFileError naming the file and the key for what is no model's configuration."""
    path = folder / CONFIG
    try:
        fields = read_object(path, remedy=REMEDY)
    except OSError as error:
        raise ModelFileError(f"{path}: not readable ({error}): {REMEDY}") from None
    except ValueError as error:
        raise ModelFileError(str(error)) from None
    check_model_config(fields, f"{path}: ")
    return fields


def check_model_config(fields: Mapping[str, Any], source: str = "") -> None:
    """Refuse a configuration that no model has. Fields that are missing are not looked at: older
    models lack some, and the class has a default for each.

    Args:
        fields: by name, as `GenRecConfig` has them.
        source: what comes before the key in messages.

    Raises:
        ModelFileError: naming the key, its value and what it has to be.
    """
    for key, (text, holds) in _rules(fields).items():
        if key in fields and not holds(fields[key]):
            value = repr(fields[key])
            shown = value if len(value) <= 60 else f"{value[:60]}..."
            raise ModelFileError(f"{source}{key} is {shown}: it has to be {text}: {REMEDY}")
    for side in ("encoder", "decoder"):
        heads, width = fields.get(f"{side}_attention_heads", 1), fields.get("d_model", 0)
        if width % heads:
            raise ModelFileError(
                f"{source}{side}_attention_heads is {heads}: d_model {width} is no multiple of it: "
                f"{REMEDY}"
            )


def _rules(fields: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Key -> what it has to be, in words and as a test. Sizes come first: tokens have to be below
    the vocabulary's."""
    rules = {key: _integer(*limits) for key, limits in _INTEGERS.items()}
    size = fields.get("vocab_size")
    vocabulary = size if isinstance(size, int) else _MOST_ROWS
    rules |= {key: _integer(0, vocabulary - 1) for key in _TOKENS}
    rules |= {"num_masks": _integer(1, vocabulary), "spoken_tokens": _integer(0, vocabulary)}
    rules |= {key: ("true or false", lambda value: isinstance(value, bool)) for key in _BOOLEANS}
    rules |= {key: ("a text", lambda value: isinstance(value, str)) for key in _TEXTS}
    rules |= {key: ("0 or above and below 1", _number(1.0)) for key in _SHARES}
    rules |= {key: ("0 or above", _number(math.inf)) for key in ("init_std", "item_loss")}
    for key, names in _CHOICES.items():
        rules[key] = " or ".join(names), _one_of(names)
    for key in ("attn_implementation", "_attn_implementation"):
        rules[key] = "no kernel of a hub", lambda value: "/" not in str(value)
    return rules


def _integer(low: int, high: int) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return f"a whole number from {low:,} to {high:,}", holds


def _number(below: float) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < below

    return holds


def _one_of(names: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names
