"""The limits of a model's configuration, which is checked without torch and by its class alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from genrec_dist.config.model_config import check_model_config, read_model_config
from genrec_dist.model.genrec import GenRecConfig

BAD: dict[str, tuple[object, ...]] = {
    "d_model": (0, 10**9, 128.0, "128", True),
    "encoder_layers": (0, 10**6),
    "decoder_layers": (0, 10**6),
    "encoder_attention_heads": (0, 7),
    "decoder_attention_heads": (-1, 7),
    "encoder_ffn_dim": (0, 10**12),
    "vocab_size": (0, 2**31),
    "max_position_embeddings": (0, 10**9),
    "max_input_tokens": (0, 10**9),
    "num_users": (-1, 2**31),
    "num_items": (-1, 2**31),
    "num_masks": (0, 10**9),
    "spoken_tokens": (-1, 10**9),
    "id_dim": (-1, 10**9),
    "bos_token_id": (-1, 50_265, None, "0"),
    "pad_token_id": (-1, 50_265, None),
    "eos_token_id": (-1, 10**9, [2]),
    "decoder_start_token_id": (-7, 10**9, None),
    "encoder_positions": ("foo", None),
    "encoder_unit": ("foo", 1),
    "encoder_attention": ("foo", {}),
    "decoder_start": ("foo",),
    "certain_tokens": ("foo",),
    "exclude_history": ("no", 0, None),
    "scale_embedding": ("yes",),
    "ids_outside": ("no",),
    "item_loss": (-1.0, float("nan"), float("inf"), "0"),
    "id_dropout": (1.0, -0.1, float("nan")),
    "dropout": (1.5,),
    "numbering_hash": (7,),
    "attn_implementation": ("kernels-community/flash-attn", "paged|some/kernel"),
}
CASES = [(key, value) for key, values in BAD.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_the_class_and_the_file_refuse_the_same(key: str, value: object, tmp_path: Path) -> None:
    # Types of BART's own fields are checked by transformers before ours are.
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=f"{key}"):
        GenRecConfig(**{key: value})
    fields = GenRecConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**fields, key: value}))
    with pytest.raises(
        ValueError, match=f"^{tmp_path / 'config.json'}: ({key} is|not JSON) .*: copy"
    ):
        read_model_config(tmp_path)


def test_what_a_model_has_passes_and_missing_fields_are_those_of_older_ones(tmp_path: Path) -> None:
    GenRecConfig(vocab_size=40, spoken_tokens=30, num_masks=4).save_pretrained(tmp_path)
    assert read_model_config(tmp_path)["spoken_tokens"] == 30
    check_model_config({})


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 200_000, "\ud800"])
def test_a_file_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"^{path}: not JSON .*: copy the model again"):
        read_model_config(tmp_path)
