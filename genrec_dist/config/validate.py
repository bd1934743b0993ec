"""The limits of a recipe's values, checked before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from genrec_dist.config.recipe import MICRO_BATCH, Recipe, Stage

Rule = tuple[str, Callable[[Any], bool]]

MOST_WIDTH, MOST_LAYERS, MOST_FFN, MOST_POSITIONS = 65_536, 1_000, 2**20, 2**20
"""Sizes beyond those of any model, which are refused before memory is asked for."""

# A comparison with NaN is False: these refuse it too.
_POSITIVE: Rule = ("above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE: Rule = ("0 or above", lambda value: 0 <= value < math.inf)
_AT_LEAST_1: Rule = ("1 or above", lambda value: value >= 1)
_WIDTH: Rule = (f"from 1 to {MOST_WIDTH:,}", lambda value: 1 <= value <= MOST_WIDTH)
_LAYERS: Rule = (f"from 1 to {MOST_LAYERS:,}", lambda value: 1 <= value <= MOST_LAYERS)
_FFN: Rule = (f"from 1 to {MOST_FFN:,}", lambda value: 1 <= value <= MOST_FFN)
_ID_DIM: Rule = (f"from 0 to {MOST_WIDTH:,}", lambda value: 0 <= value <= MOST_WIDTH)
_POSITIONS: Rule = (f"from 16 to {MOST_POSITIONS:,}", lambda value: 16 <= value <= MOST_POSITIONS)
_SHARE: Rule = ("from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_1: Rule = ("0 or above and below 1", lambda value: 0 <= value < 1)
_PROBABILITY: Rule = ("above 0 and at most 1", lambda value: 0 < value <= 1)

# By section ("" is the recipe itself): keys, and the rule for all of them.
_RULES: dict[str, tuple[tuple[str, Rule], ...]] = {
    "": (
        ("micro_batch_tokens log_every keep_checkpoints", _AT_LEAST_1),
        ("workers checkpoint_minutes checkpoint_every", _NOT_NEGATIVE),
    ),
    "model": (
        ("d_model heads", _WIDTH),
        ("encoder_layers decoder_layers", _LAYERS),
        ("ffn", _FFN),
        ("max_tokens", _POSITIONS),
        ("dropout attention_dropout activation_dropout embedding_dropout", _BELOW_1),
        ("init_std", _POSITIVE),
        ("id_dim", _ID_DIM),
        ("item_loss", _NOT_NEGATIVE),
    ),
    "pretrain finetune": (
        ("epochs", _NOT_NEGATIVE),
        ("epoch_fraction mask.p", _PROBABILITY),
        ("batch_size mask.k distill.top", _AT_LEAST_1),
        ("learning_rate", _POSITIVE),
        ("warmup_fraction", _SHARE),
        ("label_smoothing distill.weight", _BELOW_1),
        ("distill.temperature", _POSITIVE),
    ),
    "prompt": (("max_titles", _AT_LEAST_1),),
    "lora": (("rank", _NOT_NEGATIVE), ("alpha", _POSITIVE), ("dropout", _BELOW_1)),
    "optimizer": (
        ("betas ema_decay", _BELOW_1),
        ("eps id_learning_rate", _POSITIVE),
        ("weight_decay max_grad_norm", _NOT_NEGATIVE),
    ),
    "validation": (("users patience", _NOT_NEGATIVE), ("beam every_epochs", _AT_LEAST_1)),
}

LIMITS: dict[str, Rule] = {
    f"{section}.{key}".lstrip("."): rule
    for sections, rules in _RULES.items()
    for section in sections.split() or [""]
    for keys, rule in rules
    for key in keys.split()
}
"""Dotted key -> what it has to be, in words and as a test."""


def check_recipe(recipe: Recipe, source: str = "recipe") -> None:
    """Refuse values that no run can have. Raises ValueError naming `source`, the key, its value and
    what it may be."""
    for key, (text, holds) in LIMITS.items():
        value: Any = functools.reduce(getattr, key.split("."), recipe)
        if not all(map(holds, value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{source}: {key} is {value}: it has to be {text}")
    problem = _contradiction(recipe)
    if problem:
        raise ValueError(f"{source}: {problem}")


def _contradiction(recipe: Recipe) -> str:
    """What two values of a recipe make impossible, with the way out; "" where all fit."""
    model, optimizer, decode = recipe.model, recipe.optimizer, recipe.validation.decode
    causal, tables_outside = model.encoder_attention == "causal", optimizer.id_tables != "dense"
    if problem := _prompt_problem(recipe) or _t5_problem(recipe):
        return problem
    causal |= bool(recipe.prompt.template)
    if model.d_model % model.heads:
        return f"model.d_model {model.d_model} is no multiple of model.heads {model.heads}"
    if MICRO_BATCH not in recipe.auto_keys and recipe.micro_batch_tokens < model.max_tokens:
        return (
            f"micro_batch_tokens {recipe.micro_batch_tokens} is below model.max_tokens "
            f"{model.max_tokens}: one sample has to fit"
        )
    if tables_outside and optimizer.decay == "all":
        return "optimizer.decay all: row-adagrad decays no ids; set it to matrices or none"
    if tables_outside and recipe.precision == "fp16":
        return (
            "precision fp16: row-adagrad would step by gradients that fp16's loss scale has "
            "multiplied or overflowed: set precision bf16, or optimizer.id_tables dense"
        )
    for name, stage in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        masks = stage.epochs and stage.targets == "mask"
        if _shares_prefixes(stage) and not causal:
            return (
                f"{name}.targets all-prefixes: set model.encoder_attention causal, or targets "
                "every-prefix"
            )
        if masks and causal:
            return (
                f"{name}.targets mask: a causal {'model' if recipe.prompt.template else 'encoder'} "
                "sees nothing after a mask: set others, or epochs 0"
            )
        if masks and stage.mask.strategy == "span" and recipe.tokens.forced == "given":
            return (
                f"{name}.mask.strategy span: an answer of several items has no trie: set "
                "tokens.forced learned"
            )
    if causal and model.positions == "from-end":
        return (
            "model.positions from-end: under causal attention a position would depend on what "
            "follows"
        )
    if decode != "exact" and not model.item_loss:
        return f"validation.decode {decode}: there is no item head: set model.item_loss"
    item_loss = f"model.item_loss {model.item_loss}"
    if model.item_loss and not model.item_ids:
        return f"{item_loss}: its head shares the item id table: set model.item_ids true"
    if model.item_loss and tables_outside:
        return (
            f"{item_loss}: its softmax runs over all items, which row-adagrad does not fetch: set "
            "optimizer.id_tables dense"
        )
    if model.init_items != "random" and tables_outside:
        return (
            f"model.init_items {model.init_items}: tables outside the model begin at random: set "
            "optimizer.id_tables dense"
        )
    if problem := _siblings_problem(recipe):
        return problem
    if model.item_text != "none" and model.item_text_source == "words":
        return (
            "model.item_text_source words: each word would be a dimension: set factors, their "
            "largest ones"
        )
    if model.item_text != "none" and recipe.init_from is not None:
        return (
            f"model.item_text {model.item_text}: init_from takes the rows of its model, which may "
            "have texts in them: set item_text none"
        )
    if recipe.pretrain.distill.weight:
        return "pretrain.distill.weight: finetuning alone has soft targets: set it to 0"
    if recipe.finetune.distill.weight and not (
        recipe.finetune.targets == "all-prefixes" and recipe.tokens.forced == "given"
    ):
        return (
            f"finetune.distill.weight {recipe.finetune.distill.weight}: set finetune.targets "
            "all-prefixes and tokens.forced given, or the weight to 0"
        )
    if "none" in recipe.tracker and len(recipe.tracker) > 1:
        return f"tracker {', '.join(recipe.tracker)}: none stands alone: leave out one or the other"
    if recipe.step_graph == "on" and (problem := _graph_problem(recipe)):
        return f"step_graph on: {problem}, or step_graph off"
    epochs = recipe.pretrain.epochs + recipe.finetune.epochs
    if not epochs and not (recipe.prompt.template and recipe.model.backbone):
        return (
            "pretrain.epochs and finetune.epochs are both 0: nothing to train, and only the "
            "backbone of a prompt (recipe llama) can be listed as it is"
        )
    return ""


def _siblings_problem(recipe: Recipe) -> str:
    """What of a recipe does not fit its softmax, with the way out; "" where all fits."""
    model, tokens = recipe.model, recipe.tokens
    if tokens.softmax == "vocabulary":
        return "model.item_output true: set tokens.softmax siblings" * model.item_output
    if tokens.forced != "given":
        return f"tokens.softmax siblings: tokens.forced is {tokens.forced}: set it to given"
    if recipe.pretrain.label_smoothing or recipe.finetune.label_smoothing:
        return "tokens.softmax siblings: it has no label smoothing: set label_smoothing to 0"
    if model.item_output and not model.item_ids:
        return "model.item_output true: its rows are the item ids': set model.item_ids true"
    if model.item_output and recipe.optimizer.id_tables != "dense":
        return (
            "model.item_output true: row-adagrad does not fetch the rows of siblings: set "
            "optimizer.id_tables dense"
        )
    return ""


MOST_MASKED = 4096
"""Tokens of a captured micro-batch up to which attention may go by one mask over all pairs."""


def most_graph_tokens(recipe: Recipe) -> float:
    """The most `micro_batch_tokens` of a step that is captured."""
    masked = recipe.precision == "fp32" or recipe.model.encoder_attention == "causal"
    return MOST_MASKED if masked or recipe.model.attention_dropout > 0 else math.inf


def _graph_problem(recipe: Recipe) -> str:
    """What of a recipe cannot be captured as a CUDA graph, with the way out but for `off`."""
    model, tokens = recipe.model, recipe.micro_batch_tokens
    found = {
        "prompt.template: a prompted model orders its tokens on the host: leave it out": bool(
            recipe.prompt.template
        ),
        "model.architecture t5: its micro-batches are padded: set bart": (
            model.architecture == "t5"
        ),
        "optimizer.id_tables row-adagrad: a step has as many rows as it touches: set dense": (
            recipe.optimizer.id_tables != "dense"
        ),
        "precision fp16: its loss scale is read on the host: set bf16": recipe.precision == "fp16",
        "packing padded: its shapes differ from step to step: set packed": (
            recipe.packing == "padded"
        ),
        f"head {recipe.head}: it passes over labels alone, which differ in number: set full": (
            recipe.head not in ("auto", "full")
        ),
        "model.item_text add: its sums are made anew in each step: set none": (
            model.item_text == "add"
        ),
        "tokens.softmax siblings: how many labels a level has differs: set vocabulary": (
            recipe.tokens.softmax == "siblings"
        ),
        "finetune.distill: soft targets differ in number: set its weight to 0": (
            recipe.finetune.distill.weight > 0
        ),
        "compile layers: set none": recipe.compile != "none",
        "activation_checkpointing: it reads the generator's state on the host: set false": (
            recipe.activation_checkpointing
        ),
        "model.encoder_unit item: its sub-words differ in number: set subword": (
            model.encoder_unit == "item"
        ),
        f"micro_batch_tokens {tokens:,}: in fp32, behind a causal encoder and with attention "
        f"dropout attention goes by one mask over all pairs: set {MOST_MASKED:,} or less": (
            MICRO_BATCH not in recipe.auto_keys and tokens > most_graph_tokens(recipe)
        ),
    }
    return next((text for text, is_there in found.items() if is_there), "")


HISTORY = "{history}"
"""Where a template has the titles."""


def _prompt_problem(recipe: Recipe) -> str:
    """What of a recipe does not fit its prompt, with the way out; "" where all fits."""
    prompt, model = recipe.prompt, recipe.model
    if not prompt.template:
        return "lora.rank: adapters need a model with a prompt: set it to 0" * (
            recipe.lora.rank > 0
        )
    before, _, after = prompt.template.partition(HISTORY)
    if prompt.template.count(HISTORY) != 1 or not before.strip() or not after:
        return "prompt.template: write text, {history} once, and text after it"
    if not prompt.separator:
        return "prompt.separator: it is empty: write what no title contains, such as a line's end"
    refused = {
        "model.architecture": model.architecture != "bart",
        "model.item_loss": model.item_loss > 0,
        "model.decoder_start": model.decoder_start != "mask",
        "model.init_items": model.init_items != "random",
        "finetune.distill.weight": recipe.finetune.distill.weight > 0,
        "model.item_text": model.item_text != "none",
        "model.encoder_unit": model.encoder_unit != "subword",
        "model.positions": model.positions != "from-start",
        "tokens.trim": recipe.tokens.trim,
        "tokens.softmax": recipe.tokens.softmax != "vocabulary",
        "model.item_output": model.item_output,
        "optimizer.id_tables": recipe.optimizer.id_tables != "dense",
        "compile": recipe.compile != "none",
        "init_from": recipe.init_from is not None,
        **dict.fromkeys(set(recipe.auto_keys) - {MICRO_BATCH}, True),
    }
    found = next((key for key, is_set in refused.items() if is_set), None)
    if found:
        return f"{found}: a model with a prompt cannot have it: leave it out"
    return ""


def _t5_problem(recipe: Recipe) -> str:
    """What of a recipe a T5 cannot have, with the way out; "" where all fits."""
    model = recipe.model
    if model.architecture != "t5":
        return ""
    refused = (
        ("pretrain.targets all-prefixes", _shares_prefixes(recipe.pretrain), "mask"),
        ("finetune.targets all-prefixes", _shares_prefixes(recipe.finetune), "every-prefix"),
        ("model.encoder_attention causal", model.encoder_attention == "causal", "bidirectional"),
        ("model.positions from-end", model.positions == "from-end", "from-start"),
        ("model.scale_embedding true", model.scale_embedding, "false"),
        ("model.init_items cooccurrence", model.init_items == "cooccurrence", "random"),
        ("model.decoder_start every-state", model.decoder_start == "every-state", "state"),
        (f"model.item_text {model.item_text}", model.item_text != "none", "none"),
        ("tokens.trim true", recipe.tokens.trim, "false"),
        ("tokens.softmax siblings", recipe.tokens.softmax == "siblings", "vocabulary"),
        ("packing packed", recipe.packing == "packed", "padded"),
        ("compile layers", recipe.compile == "layers", "none"),
        (f"init_from {recipe.init_from}", recipe.init_from is not None, "null"),
    )
    for setting, is_set, fitting in refused:
        if is_set:
            return f"{setting}: model.architecture t5 cannot have it: set {fitting}"
    return ""


def foretold_problem(recipe: Recipe) -> str:
    """Why memory and time of a recipe's model are not foretold; "" where they are."""
    which = "model.architecture t5" if recipe.model.architecture == "t5" else ""
    which = "prompt.template" if recipe.prompt.template else which
    return which and f"{which}: memory and time of such a model are not foretold"


def _shares_prefixes(stage: Stage) -> bool:
    return stage.epochs > 0 and stage.targets == "all-prefixes"
