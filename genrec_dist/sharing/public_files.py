"""The files of a run that may be seen by all: weights, tokenizer, catalogue and settings; no data,
no user and no path."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from genrec_shards.readers.documents import read_object

from genrec_dist.config.load import dump_recipe
from genrec_dist.config.model_manifest import check_model_manifest, write_model_manifest
from genrec_dist.config.paths import best_folder, recipe_of
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.word_table import VOCABULARY_FILE
from genrec_dist.model.causal.config import PROMPT_FILE

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
"""Files of `best/` that go up without `FOREIGN_PATHS`, as far as they are there."""
AS_THEY_ARE = (
    "step.json", "tokenizer.json", "special_tokens_map.json", VOCABULARY_FILE, PROMPT_FILE,
    "model*.safetensors*",
)  # fmt: skip
"""Patterns of those that go up unchanged: weights are one file, or several with their index."""
USERS = ("user_embedding.", "user_projection.")
"""What the tensors of users begin with."""
FOREIGN_PATHS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""Keys in which transformers keeps where a model came from."""


def write_public_files(run: Path, folder: Path) -> None:
    """Write what of a run is uploaded.

    `best/` without the table of users: the model then answers everyone as it answers an unknown
    user. The catalogue as JSON, the recipe and the weights of hybrid without paths, and a manifest
    with the hashes of all files.

    Args:
        run: Directory of `genrec train`.
        folder: An empty directory.

    Raises:
        ValueError: There is no trained model or no recipe, or a file of the model is damaged.
    """
    best, recipe = best_folder(run), recipe_of(run)
    if best == run or recipe is None:
        raise ValueError(f"{run}: push takes a directory of `genrec train`, with its recipe.yaml")
    check_model_manifest(best)
    for path in (best / name for name in SETTINGS if (best / name).is_file()):
        fields = read_object(path)
        _write_json(
            folder / path.name, {key: fields[key] for key in fields if key not in FOREIGN_PATHS}
        )
    for path in (path for pattern in AS_THEY_ARE for path in sorted(best.glob(pattern))):
        (folder / path.name).symlink_to(path.resolve())
    if read_object(best / "config.json").get("num_users"):
        _remove_users(best, folder)
    columns = ["id", "code", *(["title"] if (best / PROMPT_FILE).is_file() else [])]
    catalogue = pq.ParquetFile(best / "items.parquet").read(columns=columns).to_pydict()
    _write_json(folder / "items.json", {"format_version": 1, **catalogue})
    (folder / "recipe.yaml").write_text(dump_recipe(public_recipe(recipe)), encoding="utf-8")
    if (run / "hybrid.json").is_file():
        _write_json(folder / "hybrid.json", _public_mixture(read_object(run / "hybrid.json")))
    write_model_manifest(folder, [path.name for path in folder.iterdir()])
    _refuse_paths(folder, run, recipe)


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the places of data, run and shards; of a directory with a backbone,
    tokenizer or text model its name alone."""
    return dataclasses.replace(
        recipe,
        data="",
        run="",
        shards=None,
        init_from=None,
        text=_name_of(recipe.text),
        model=dataclasses.replace(
            recipe.model, backbone=recipe.model.backbone and _name_of(recipe.model.backbone)
        ),
        tokens=dataclasses.replace(
            recipe.tokens, tokenizer=recipe.tokens.tokenizer and _name_of(recipe.tokens.tokenizer)
        ),
    )


def _name_of(place: str) -> str:
    """The last part of a path; a name on the hub, as facebook/bart-base, stays."""
    path = Path(place)
    is_path = path.is_absolute() or place.startswith((".", "~")) or path.exists()
    return path.name if is_path or place.count("/") > 1 else place


def _public_mixture(held: dict[str, Any]) -> dict[str, Any]:
    """`hybrid.json` without the table of what was tried."""
    names = ("origin", "mixture", "validation", "users")
    kept: dict[str, Any] = {name: held[name] for name in names if name in held}
    text = kept.get("mixture", {}).get("text")
    if text:
        text["source"] = _name_of(text["source"])
    return kept


def _remove_users(best: Path, folder: Path) -> None:
    """Write weights and configuration without the table of users."""
    from safetensors.torch import load_file, save_file

    name = "model.safetensors"
    tensors = {
        key: value for key, value in load_file(best / name).items() if not key.startswith(USERS)
    }
    (folder / name).unlink()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    config = read_object(folder / "config.json")
    _write_json(folder / "config.json", config | {"num_users": 0})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields, ensure_ascii=False, indent=1 if path.name != "items.json" else None)
    path.write_text(text + "\n", encoding="utf-8")


def _refuse_paths(folder: Path, run: Path, recipe: Recipe) -> None:
    """A last look: where the run and its data are is in no file. Raises ValueError naming the
    file."""
    places = [run, Path(recipe.data), *([Path(recipe.shards)] if recipe.shards else [])]
    texts = {str(place.resolve()).encode() for place in places if place.resolve().parent.name}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            continue
        held = path.read_bytes()
        if any(text in held for text in texts):
            raise ValueError(f"{run}: {path.name} would name a directory of this machine: no push")
