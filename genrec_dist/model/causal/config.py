"""What a prompted model is, beside the language model's own configuration."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_origin, get_type_hints

PROMPT_FILE = "prompt.json"
"""Its name beside the language model."""
FORMAT_VERSION = 1


@dataclass
class PromptedConfig:
    """The prompt and the data that a model was trained with, and what the house asks of any model's
    configuration: a prompted one has no ids, one kind of answer and a whole vocabulary."""

    template: str
    separator: str
    max_titles: int
    max_input_tokens: int
    """Of the prompt before its tail."""
    tail_tokens: list[int]
    """The template after the history."""
    eos_token_id: int
    """Ends an answer."""
    pad_token_id: int
    numbering_hash: str = ""
    split: str = "leave-one-out"
    exclude_history: bool = True
    certain_tokens: str = "learned"
    """As `GenRecConfig`."""

    num_users: ClassVar[int] = 0
    num_items: ClassVar[int] = 0
    item_loss: ClassVar[float] = 0.0
    id_dim: ClassVar[int] = 0
    ids_outside: ClassVar[bool] = False
    spoken_tokens: ClassVar[int] = 0
    decoder_start: ClassVar[str] = "mask"
    softmax: ClassVar[str] = "vocabulary"

    d_model: int = dataclasses.field(default=0, init=False, repr=False)
    num_layers: int = dataclasses.field(default=0, init=False, repr=False)
    memory_width: int = dataclasses.field(default=0, init=False, repr=False)
    """Keys and values of a token in all layers."""
    vocab_size: int = dataclasses.field(default=0, init=False, repr=False)
    layer_weights: int = dataclasses.field(default=0, init=False, repr=False)
    """Elements of a layer's matrices: what its operations are counted by."""

    def save(self, folder: Path) -> None:
        """Write `prompt.json`."""
        fields = {field.name: getattr(self, field.name) for field in _saved()}
        text = json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=1)
        (folder / PROMPT_FILE).write_text(text + "\n", encoding="utf-8")


def _saved() -> list[dataclasses.Field[object]]:
    return [field for field in dataclasses.fields(PromptedConfig) if field.init]


def load_prompted_config(folder: Path) -> PromptedConfig:
    """What `PromptedConfig.save` wrote. Raises ValueError naming the file and what of it does not
    fit."""
    path = folder / PROMPT_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or fields.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError(f"{path}: not of format {FORMAT_VERSION}")
    hints = get_type_hints(PromptedConfig)
    for field in _saved():
        kind = get_origin(hints[field.name]) or hints[field.name]
        if type(fields.get(field.name)) is not kind:
            raise ValueError(f"{path}: {field.name} is {fields.get(field.name)!r}")
    unknown = sorted(set(fields) - {field.name for field in _saved()})
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is unknown")
    return PromptedConfig(**fields)
