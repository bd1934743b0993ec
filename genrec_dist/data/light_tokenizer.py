"""A saved tokenizer for decoding alone: what the word table asks of one, without transformers."""

from __future__ import annotations

from pathlib import Path

from genrec_shards.readers.documents import read_object
from tokenizers import Tokenizer

_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""What transformers calls a tokenizer that is its file and nothing more."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class LightTokenizer:
    """Has the members of transformers' fast tokenizers that `WordTokenizer` names."""

    def __init__(self, best: Path, special: dict[str, str], further: list[str]):
        """Read `tokenizer.json` of the directory.

        Args:
            best: where it is.
            special: the special tokens by name: bos, eos, pad, mask, ...
            further: special tokens without a name.
        """
        self.backend_tokenizer = Tokenizer.from_file(str(best / "tokenizer.json"))
        vocabulary = self.get_vocab()
        ids = {name: vocabulary[token] for name, token in special.items()}
        self.bos_token_id, self.eos_token_id = ids["bos"], ids["eos"]
        self.pad_token_id, self.mask_token_id = ids["pad"], ids["mask"]
        self.all_special_ids = [*ids.values(), *(vocabulary[token] for token in further)]

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab()
        return vocabulary


def light_tokenizer(best: Path) -> LightTokenizer | None:
    """The tokenizer that is saved in this directory; None where its class says that its file is not
    all of it. Raises OSError, ValueError where a file is missing or damaged."""
    fields = read_object(best / "tokenizer_config.json")
    further = fields.get("extra_special_tokens") or []
    special = {name: fields.get(f"{name}_token") for name in _SPECIAL}
    named = {name: token for name, token in special.items() if token is not None}
    texts = [*named.values(), *further] if isinstance(further, list) else [None]
    if fields.get("tokenizer_class") not in _CLASSES or not {"bos", "eos", "pad", "mask"} <= {
        *named
    }:
        return None
    if not all(isinstance(token, str) for token in texts):
        return None
    return LightTokenizer(best, named, further)
