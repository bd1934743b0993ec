"""Recommending without transformers gives the same lists, and leaves it to transformers where it
must."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from genrec_shards.dataset import load_dataset
from two_ranks import environment

from genrec_dist.config.recipe import Model
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.decoding.decoder_state import DecoderState
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.recommend import Recommender
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.light import LightGenRec, light_config, load_light

HISTORIES = 3
VOCABULARY, USERS, ITEMS, LENGTH = 40, 6, 9, 12


def answers(recommender: Recommender) -> list[tuple[list[str], list[float]]]:
    items = recommender.run.catalogue.item_ids
    requests = [items[:number] for number in range(HISTORIES)]
    return [(each.items, each.scores) for each in recommender.recommend(requests)]


@pytest.mark.parametrize("mode", ["exact", "compact", "free", "all"])
def test_the_lists_are_the_same_to_the_last_bit(tiny_run: Path, mode: str) -> None:
    light, whole = load_run(tiny_run, light=True), load_run(tiny_run)
    assert isinstance(light.model, LightGenRec)
    assert isinstance(whole.model, GenRecForConditionalGeneration)
    ours, theirs = (Recommender(run, mode=mode) for run in (light, whole))  # type: ignore[arg-type]
    assert answers(ours) == answers(theirs)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"user_ids": False, "encoder_attention": "causal", "decoder_start": "state"},
        {"item_loss": 1.0, "id_dim": 4, "encoder_unit": "item", "positions": "from-end"},
        {"item_ids": False, "scale_embedding": True, "decoder_layers": 2, "encoder_layers": 1},
    ],
)
def test_each_kind_of_model_computes_the_same(tmp_path: Path, shape: dict[str, object]) -> None:
    torch.manual_seed(0)
    special = {"bos": 0, "pad": 1, "eos": 2, "mask": 4}
    sizes = ModelSizes(
        vocab_size=VOCABULARY, num_users=USERS, num_items=ITEMS, num_masks=1, special=special
    )
    tiny = {"d_model": 16, "heads": 2, "ffn": 32, "max_tokens": 32, "init_std": 0.3}
    whole = build_model(Model(**{**tiny, **shape}), sizes).eval()  # type: ignore[arg-type]
    whole.save_pretrained(tmp_path)
    light = load_light(tmp_path, light_config(tmp_path))
    # Drawn after loading, so that a value left uninitialised would differ.
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor([9, 4, LENGTH])[:, None]

    def draw(high: int) -> torch.Tensor:
        return torch.randint(1, high, mask.shape, generator=generator) * mask

    further = draw(VOCABULARY)[:, :, None] if shape.get("encoder_unit") == "item" else None
    fields = draw(VOCABULARY), mask, draw(LENGTH), draw(USERS), draw(ITEMS)
    encoder = EncoderInput(*fields, further_ids=further)
    with torch.inference_mode():
        states = [model.encode(encoder) for model in (light, whole)]
        assert torch.equal(*states)
        found = []
        for model, memory in zip((light, whole), states, strict=True):
            decoder = DecoderState(model, memory, mask)  # type: ignore[arg-type]
            started = decoder.start(torch.tensor([5]))
            stepped = decoder.step(torch.tensor([[6, 7]] * 3))
            heads = model.item_logits(states[0][:, 0]) if shape.get("item_loss") else started
            found.append((started, stepped, heads, stepped @ model.head_weight.T))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "activation_function", "gelu_new"),
        ("config.json", "tie_word_embeddings", False),
        ("config.json", "decoder_start", None),  # a field that the file lacks
        ("tokenizer_config.json", "tokenizer_class", "BartTokenizer"),
        ("tokenizer_config.json", "mask_token", {"content": "<mask>"}),
    ],
)
def test_what_it_has_no_modules_for_is_left_to_transformers(
    tiny_run: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    from genrec_dist.inference.load import _light_parts

    best = Path(shutil.copytree(tiny_run / "best", tmp_path / "best"))
    assert _light_parts(best) is not None
    fields = json.loads((best / file).read_text())
    fields[key] = value
    if value is None:
        del fields[key]
    (best / file).write_text(json.dumps(fields))
    assert _light_parts(best) is None


def test_a_damaged_model_is_named(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "best", run / "best")
    weights = run / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or changed") as caught:
        load_run(run, light=True)
    assert "\n" not in str(caught.value)


def test_a_recommendation_imports_neither_transformers_nor_scipy(tiny_run: Path) -> None:
    code = f"""
import sys
from genrec_dist.cli.app import run_command
assert run_command(["recommend", {str(tiny_run)!r}, "--history", "a", "--top", "3"]) == 0
unwanted = ["transformers", "scipy", "pandas", "polars", "torch._dynamo", "sympy"]
found = [name for name in unwanted if name in sys.modules]
assert not found, found
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert len(json.loads(done.stdout)["items"]) == 3


def test_an_evaluation_imports_no_transformers_and_lists_what_its_model_lists(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = ["evaluate", str(tiny_run), "--split", "validation", "--out", str(tmp_path / "cli")]
    code = f"""
import sys
from genrec_dist.cli.app import run_command
assert run_command({command!r}) == 0
found = [name for name in ["transformers", "accelerate", "deepspeed"] if name in sys.modules]
assert not found, found
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]
    whole, out = load_run(tiny_run), tmp_path / "whole"
    evaluate(whole, load_dataset(tiny_data), "validation", decoding=Decoding(), out_dir=out)
    name = "top20-validation.parquet"
    assert (tmp_path / "cli" / name).read_bytes() == (out / name).read_bytes()
