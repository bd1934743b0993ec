"""The configurations of the encoder-decoders: BART's and T5's, and the id tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import BartConfig, T5Config

from genrec_dist.config.model_config import check_model_config


@dataclass(kw_only=True)
class GenRecFields:
    """What both configurations have beside their backbone's own.

    Attributes:
        num_users: rows of the user table without its zero row; 0: there is no table.
        num_items: the same of the item table.
        id_dropout: dropout of the id terms alone.
        encoder_positions: "from-start" (BART) or "from-end".
        encoder_unit: "subword" or "item", what an encoder position is.
        encoder_attention: "bidirectional" or "causal".
        decoder_start: "mask", "state" or "every-state", the decoder's inputs.
        item_output: whether items' id rows are a part of the output rows.
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
        softmax: "vocabulary" or "siblings", what a token's probability is a share of.
    """

    num_users: int = 0
    num_items: int = 0
    id_dropout: float = 0.0
    encoder_positions: str = "from-start"
    encoder_unit: str = "subword"
    encoder_attention: str = "bidirectional"
    decoder_start: str = "mask"
    item_output: bool = False
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
    softmax: str = "vocabulary"

    def __post_init__(self, **kwargs: Any) -> None:
        """Set what transformers sets, and check the values. Raises ModelFileError naming a key, its
        value and what it has to be."""
        check_model_config({**vars(self), **kwargs})
        super().__post_init__(**kwargs)  # type: ignore[misc]


class GenRecConfig(GenRecFields, BartConfig):
    """BART's configuration and the id tables; `GenRecFields` has the attributes."""

    model_type = "genrec"


class GenRecT5Config(GenRecFields, T5Config):
    """T5's configuration and the id tables; `GenRecFields` has the further attributes.

    Attributes:
        attention_dropout: T5 itself has one dropout for all places.
        activation_dropout: of the feed-forward layers.
        init_std: of the id tables; the other weights begin as T5's do.
    """

    model_type = "genrec-t5"
    attribute_map: ClassVar[dict[str, str]] = {
        **T5Config.attribute_map,
        "encoder_layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "encoder_ffn_dim": "d_ff",
        "decoder_ffn_dim": "d_ff",
    }
    max_position_embeddings: ClassVar[int] = 0
    """There is no table of positions."""

    num_decoder_layers: int | None = None
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """As of `GenRecFields`."""
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        super().__post_init__(**kwargs)
