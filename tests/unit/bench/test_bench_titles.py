"""The measurement of titles, small: the lists of both are compared, also with a backbone's
weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genrec_dist.bench import titles as module
from genrec_dist.bench.titles import Sizes, bench_titles, made_up_titles, untrained_prompted
from genrec_dist.config.load import load_recipe
from genrec_dist.data.prompt.title_words import train_title_tokenizer

SETTINGS = ["model.d_model=16", "model.heads=2", "model.ffn=24", "prompt.max_titles=3"]
SIZES = Sizes(users=5, batch=2, beam=4, items=30, repeats=1, clock="processor")


def test_the_lists_that_were_timed_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    claims, table = bench_titles(sizes=SIZES, settings=SETTINGS)
    measured = table["measured"]
    assert (measured["users"], measured["items that differ"]) == (5, 0)
    assert measured["clock"] == "processor"
    assert "processor time" in claims[0].id
    assert [len(times) for times in measured["seconds"].values()] == [1, 1]
    assert claims[0].ratio == pytest.approx(claims[0].ours / claims[0].theirs)
    monkeypatch.setattr(module, "SAME_SCORE", -1.0)
    with pytest.raises(AssertionError, match="user 0 of the batch, rank 0"):
        bench_titles(sizes=SIZES, settings=SETTINGS)


def test_a_backbones_weights_are_taken(tmp_path: Path) -> None:
    titles = made_up_titles(30, np.random.default_rng(0))
    recipe = load_recipe("llama")
    train_title_tokenizer(titles, recipe.prompt.template, 320).save_pretrained(tmp_path)
    model, layout = untrained_prompted(titles, [*SETTINGS, "tokens.vocab_size=320"])
    model.lm.save_pretrained(tmp_path)
    again, same = untrained_prompted(titles, ["prompt.max_titles=3", f"model.backbone={tmp_path}"])
    for name, tensor in model.lm.state_dict().items():
        assert torch.equal(again.lm.state_dict()[name], tensor), name
    assert np.array_equal(same.words.tokens, layout.words.tokens)
    assert (same.pad_token, again.config.eos_token_id) == (
        layout.pad_token,
        model.config.eos_token_id,
    )
