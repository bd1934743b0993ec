"""Settings that nothing reads are left out, and no others."""

from typing import Any

import pytest

from genrec_dist.config.load import load_recipe
from genrec_dist.config.meanings import meanings
from genrec_dist.config.used_settings import used_settings

MASKED = ("pretrain.epochs=1", "finetune.epochs=0")
MULTI, RECENCY = "pretrain.mask.strategy=multi", "pretrain.mask.strategy=recency"
ROWS, CAUSAL = "optimizer.id_tables=row-adagrad", "model.encoder_attention=bidirectional"
SHAPE = {f"model.{key}" for key in ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn")}


def keys_of(values: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        inner = keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else set()
        found |= inner or {f"{prefix}{name}"}
    return found


@pytest.mark.parametrize(
    ("overrides", "kept", "left_out"),
    [
        ([], {"finetune.warmup_fraction", "model.heads"}, {"pretrain.warmup_fraction", "shards"}),
        ([], {"pretrain.epochs", "tokens.vocab_size"}, {"finetune.mask.strategy", "init_from"}),
        ([*MASKED, MULTI], {"pretrain.mask.k"}, {"pretrain.mask.p", "validation.beam"}),
        ([*MASKED, RECENCY], {"pretrain.mask.p"}, {"pretrain.mask.k", "finetune.targets"}),
        ([*MASKED], {"pretrain.mask.strategy"}, {"pretrain.mask.k", "pretrain.mask.p"}),
        ([ROWS, "model.init_items=random"], {"optimizer.id_learning_rate"}, set()),
        ([], {"optimizer.id_tables"}, {"optimizer.id_learning_rate"}),
        (["model.backbone=bart"], {"model.max_tokens"}, {*SHAPE, "tokens.vocab_size"}),
        (["tokens.tokenizer=bart"], SHAPE, {"tokens.vocab_size"}),
        (["validation.decode=items", "model.item_loss=1"], {"model.id_dim"}, {"validation.beam"}),
        (["model.item_ids=false"], {"model.dropout"}, {"model.embedding_dropout", "model.id_dim"}),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_left_out(
    overrides: list[str], kept: set[str], left_out: set[str]
) -> None:
    causal = [] if not any("pretrain.epochs" in each for each in overrides) else [CAUSAL]
    found = keys_of(used_settings(load_recipe("best", [*overrides, *causal]).as_dict()))
    assert kept <= found
    assert not left_out & found
    assert found | kept | left_out <= set(meanings())


def test_a_recipe_of_another_shape_breaks_nothing() -> None:
    assert used_settings({"model": 3, "pretrain": None, "optimizer": []}) == {
        "model": 3,
        "optimizer": [],
    }
