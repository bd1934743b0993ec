"""The settings of a recipe that its run read: without those of parts that are off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Get = Callable[[str], Any]
"""The value of a dotted key; None where there is none."""

_STAGES = ("pretrain", "finetune")
_SHAPE = ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn")
_ENCODER_DECODER = (
    "architecture",
    "encoder_layers",
    "dropout",
    "activation_dropout",
    "embedding_dropout",
    "user_ids",
    "item_ids",
    "decoder_start",
    "item_output",
    "item_loss",
    "id_dim",
    "encoder_unit",
    "encoder_attention",
    "positions",
    "scale_embedding",
    "init_items",
    "item_text",
    "item_text_source",
)
"""Keys of `model` that a model with a prompt does not have."""


def used_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested recipe without the keys that nothing reads, and without nulls. `values`:
    as in `recipe.yaml`; what it lacks counts as off."""

    def get(key: str) -> Any:
        value: Any = values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return _without(values, "", _unused(get))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _without(values: Mapping[str, Any], prefix: str, unused: set[str]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in unused or value is None:
            continue
        if isinstance(value, Mapping):
            value = _without(value, f"{key}.", unused)
            if not value:
                continue
        kept[str(name)] = value
    return kept


def _unused(get: Get) -> set[str]:
    """Dotted keys and sections that nothing reads under these settings."""
    unused = set()
    for stage in _STAGES:
        section = get(stage)
        if isinstance(section, Mapping) and not get(f"{stage}.epochs"):
            unused |= {f"{stage}.{key}" for key in section if key != "epochs"}
        strategy = get(f"{stage}.mask.strategy")
        if get(f"{stage}.targets") != "all-prefixes":
            unused.add(f"{stage}.windows")
        if not get(f"{stage}.distill.weight"):
            unused.add(f"{stage}.distill")
        if get(f"{stage}.targets") != "mask":
            unused.add(f"{stage}.mask")
        if strategy not in ("last-biased", "recency"):
            unused.add(f"{stage}.mask.p")
        if strategy not in ("span", "multi"):
            unused.add(f"{stage}.mask.k")
    if not get("finetune.epochs"):
        unused.add("validation")
    if get("validation.decode") == "items":
        unused.add("validation.beam")
    if get("prompt.template"):
        unused |= {f"model.{key}" for key in _ENCODER_DECODER}
        unused |= set() if get("lora.rank") else {"lora"}
    else:
        unused |= {"prompt", "lora"}
    if get("model.item_text") in (None, "none"):
        unused.add("model.item_text_source")
    if get("model.backbone"):
        unused |= {f"model.{key}" for key in _SHAPE}
    if get("model.backbone") or get("tokens.tokenizer"):
        unused.add("tokens.vocab_size")
    if get("prompt.template") or not (get("model.user_ids") or get("model.item_ids")):
        unused |= {"model.embedding_dropout", "model.id_dim", "optimizer.id_tables"}
    if get("optimizer.id_tables") != "row-adagrad":
        unused.add("optimizer.id_learning_rate")
    if get("step_graph") != "on":
        unused.add("step_graph")
    return unused
