"""The search of titles: brute force over the catalogue, and Hugging Face's `generate`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from genrec_dist.bench.peers.beam import compare_lists
from genrec_dist.bench.titles import HuggingFace, made_up_titles, untrained_prompted
from genrec_dist.data.encoder_input import EncoderInput, encode_histories
from genrec_dist.data.layout import PromptLayout
from genrec_dist.decoding import searcher as searcher_module
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.evaluation.score_mixture import Mixture, TextTerm
from genrec_dist.model.causal.prompted import PromptedModel

SHAPE = ["model.d_model=32", "model.heads=4", "model.ffn=48", "model.max_tokens=96"]
SETTINGS = [*SHAPE, "tokens.vocab_size=320", "prompt.max_titles=6"]


def world(
    num_items: int, num_users: int, dtype: torch.dtype = torch.float64
) -> tuple[PromptedModel, PromptLayout, EncoderInput, tuple[np.ndarray, np.ndarray]]:
    """A model whose query heads share keys, and histories of 0 to 9 items."""
    dice = np.random.default_rng(2)
    model, layout = untrained_prompted(made_up_titles(num_items, dice), SETTINGS)
    config = LlamaConfig(**{**model.lm.config.to_dict(), "num_key_value_heads": 2})
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="genrec_dist")
    model = PromptedModel(lm, model.config).to(dtype).eval()
    lengths = dice.integers(0, 10, num_users)
    offsets = np.cumsum([0, *lengths])
    items = dice.integers(0, num_items, offsets[-1]).astype(np.int32)
    encoder = encode_histories(items, offsets, np.full(num_users, -1), layout)
    return model, layout, encoder, (np.repeat(np.arange(num_users), lengths), items)


def brute_force(model: PromptedModel, layout: PromptLayout, encoder: EncoderInput) -> np.ndarray:
    """float64 [B, N], log p of each title and its end, one plain forward pass of transformers'
    model each."""
    other, (table, offsets) = HuggingFace(model, layout).lm, layout.words.tokens_of_items()
    scores = []
    for row, mask in zip(encoder.input_ids, encoder.attention_mask, strict=True):
        prompt = [*row[mask].tolist(), *layout.tail.tolist()]
        for a, b in pairwise(offsets):
            answer = [*table[a:b].tolist(), model.config.eos_token_id]
            with torch.inference_mode():
                logits = other(input_ids=torch.tensor([prompt + answer])).logits[0]
            logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(logp[torch.arange(len(answer)), answer].sum()))
    return np.array(scores).reshape(len(encoder.input_ids), -1)


def test_titles_are_listed_by_their_log_probability() -> None:
    model, layout, encoder, (users, items) = world(num_items=30, num_users=6)
    searcher = TrieSearcher(model, build_trie(*layout.words.tokens_of_items()))
    expected_BN = brute_force(model, layout, encoder)
    for excluded in (None, (users, items)):
        left_BN = expected_BN.copy()
        if excluded is not None:
            left_BN[users, items] = -np.inf
        order_BN = np.argsort(-left_BN, axis=1)[:, :10]
        for mode in ("exact", "all"):
            found = searcher.search(encoder, beam=30, top=10, mode=mode, excluded=excluded)  # type: ignore[arg-type]
            assert np.array_equal(found.items, order_BN), mode
            best_BN = np.take_along_axis(left_BN, order_BN, 1)
            assert np.abs(found.scores - best_BN).max() < 1e-5


def test_lists_are_those_of_constrained_generate() -> None:
    # `generate` would sample: a generation config of the model may say so.
    model, layout, encoder, _ = world(num_items=150, num_users=20)
    searcher = TrieSearcher(model, build_trie(*layout.words.tokens_of_items()))
    ours = searcher.search(encoder, beam=20, top=20, ends="ranked")
    theirs = HuggingFace(model, layout).lists(encoder, 20)
    assert compare_lists(ours, theirs)["items that differ"] == 0


def test_no_user_pays_for_the_prompt_or_the_beams_of_another() -> None:
    model, layout, encoder, _ = world(num_items=150, num_users=6)
    searcher = TrieSearcher(model, build_trie(*layout.words.tokens_of_items()))
    run, passes = model.run, list[int]()

    def counted(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        passes.append(tokens.numel())
        return run(tokens, *others)

    model.run = counted  # type: ignore[method-assign]
    together = searcher.search(encoder, beam=20, top=20)
    # Prompts, in groups of like length; their tails; one token per beam and level.
    groups = passes.index(6 * len(layout.tail))
    in_prompts, in_beams = sum(passes[:groups]), sum(passes[groups + 1 :])
    prompts = beams = 0
    for user in range(6):
        passes.clear()
        alone = searcher.search(
            encoder.map(lambda rows, user=user: rows[user : user + 1]),  # type: ignore[misc]
            beam=20,
            top=20,
        )
        assert np.array_equal(alone.items[0], together.items[user])
        prompts, beams = prompts + passes[0], beams + sum(passes[2:])
    assert in_beams == beams
    assert in_prompts == prompts - (6 - groups) * layout.head


def test_no_list_depends_on_a_generation_config() -> None:
    model, layout, encoder, _ = world(num_items=30, num_users=3)
    searcher = TrieSearcher(model, build_trie(*layout.words.tokens_of_items()))
    before = searcher.search(encoder, beam=20, top=20)
    settings = model.lm.generation_config
    settings.do_sample, settings.temperature, settings.length_penalty = True, 5.0, 3.0
    after = searcher.search(encoder, beam=20, top=20)
    assert np.array_equal(before.items, after.items)
    assert np.array_equal(before.scores, after.scores)


def test_a_batch_that_is_too_large_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, encoder, excluded = world(num_items=60, num_users=9)
    searcher = TrieSearcher(model, build_trie(*layout.words.tokens_of_items()))
    shares_BN = torch.from_numpy(np.random.default_rng(4).dirichlet(np.full(60, 0.2), 9))
    mixture = Mixture(graph_weight=0.5, text=TextTerm(weight=0.5))
    hybrid: dict[str, Any] = {
        "mode": "hybrid",
        "mixture": mixture,
        "graph_prob_BN": shares_BN,
        "text_prob_BN": shares_BN.flip(0),
    }
    limit, per_user = searcher_module.MEMORY_AT_ONCE, encoder.input_ids.shape[1]
    for options in ({}, hybrid):
        found = []
        for most in (limit, 2 * per_user * model.config.memory_width):
            monkeypatch.setattr(searcher_module, "MEMORY_AT_ONCE", most)
            found.append(searcher.search(encoder, beam=20, top=20, excluded=excluded, **options))
        assert np.array_equal(found[0].items, found[1].items)
        assert np.abs(found[0].scores - found[1].scores).max() < 1e-6


def test_free_and_hybrid_modes_answer_too() -> None:
    model, layout, encoder, _ = world(num_items=30, num_users=3)
    trie = build_trie(*layout.words.tokens_of_items())
    searcher = TrieSearcher(model, trie)
    exact = searcher.search(encoder, beam=30, top=5)
    mixed = searcher.search(encoder, beam=30, top=5, mode="hybrid")
    assert np.array_equal(exact.items, mixed.items)
    with pytest.raises(ValueError, match="this model has no item head"):
        searcher.search(encoder, beam=5, top=5, mode="items")
