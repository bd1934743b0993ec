"""The trimmed vocabulary: the same model with fewer rows, stored with its run, and speaking nothing
but items."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from tiny import TINY_RECIPE
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import (
    VOCABULARY_FILE,
    ItemTexts,
    Vocabulary,
    build_words,
    item_text,
    load_vocabulary,
    trim,
)
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.estimate.forecast import forecast
from genrec_dist.inference.load import LoadedRun, load_run
from genrec_dist.inference.rank_users import Decoding, rank_batch
from genrec_dist.inference.validation import history_loss
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.head_loss import target_loss
from genrec_dist.training.checkpoint import Checkpoint, find_checkpoint
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.run import train
from genrec_dist.training.setup import Workshop, open_workshop

UNUSED_CODES = [
    f"Z{number}{letters}" for number, letters in enumerate(["QX", "KJ", "WV", "PLU"] * 40)
]
"""Codes of no item: a tokenizer that has learned them, too, has tokens that no word of the
catalogue uses."""


@pytest.fixture(scope="module")
def backbone(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BART with a tokenizer that knows far more than the catalogue needs."""
    folder = tmp_path_factory.mktemp("bart")
    codes = load_dataset(tiny_data).numbering.item_codes
    tokenizer = train_tokenizer([*codes, *UNUSED_CODES], 600)
    torch.manual_seed(3)
    config = BartConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3,
        forced_bos_token_id=0,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def a_recipe(data: Path, run: Path, *overrides: str) -> Recipe:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(f"data: {data}\nrun: {run}\n{TINY_RECIPE}", encoding="utf-8")
    return load_recipe(path, list(overrides))


Shop = tuple[Workshop, GenRecForConditionalGeneration]


@pytest.fixture(scope="module")
def pair(
    tiny_data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Shop, Shop]:
    """The backbone under the whole vocabulary and under the trimmed one, with the same id
    tables."""
    folder = tmp_path_factory.mktemp("pair")
    sets = [
        f"model.backbone={backbone}",
        "model.dropout=0.0",
        "micro_batch_tokens=512",
        "tokens.trim=",
    ]
    whole, trimmed = (
        open_workshop(a_recipe(tiny_data, folder / "run", *sets[:-1], sets[-1] + trim))
        for trim in ("false", "true")
    )
    for name in ("user_embedding", "item_embedding"):
        theirs = getattr(whole[1], name).weight
        with torch.no_grad():
            getattr(trimmed[1], name).weight.copy_(theirs)
    return whole, trimmed


# Words.


def test_words_keep_their_sub_words_and_the_spoken_ones_come_first(pair: tuple[Shop, Shop]) -> None:
    (whole, _), (trimmed, _) = pair
    words, ours = whole.words, trimmed.words
    vocabulary = ours.vocabulary
    assert vocabulary is not None
    assert np.array_equal(vocabulary.tokens[ours.tokens], words.tokens)
    assert vocabulary.tokens[ours.tokens].dtype == np.int64
    assert ours.tokens.dtype == words.tokens.dtype
    outputs = {*words.tokens_of_items()[0].tolist(), whole.tokenizer.eos_token_id}
    assert set(vocabulary.tokens[: vocabulary.num_outputs].tolist()) == outputs
    everything = {*words.tokens.tolist(), whole.tokenizer.pad_token_id}
    assert set(vocabulary.tokens.tolist()) == everything
    assert vocabulary.size == len(everything) < len(whole.tokenizer) / 2
    # `</s>` is outputs; <s>, <pad>, the masks and what users alone use are not.
    read = set(vocabulary.tokens[vocabulary.num_outputs :].tolist())
    tokenizer = whole.tokenizer
    assert {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id} < read
    # Siblings in the trie keep their order, and with it ties between items.
    assert all(np.diff(vocabulary.tokens[: vocabulary.num_outputs]) > 0)


def test_a_token_that_was_not_kept_is_named(pair: tuple[Shop, Shop]) -> None:
    (whole, _), (trimmed, _) = pair
    vocabulary = trimmed.words.vocabulary
    assert vocabulary is not None
    fewer = Vocabulary(vocabulary.tokens[1:], vocabulary.num_outputs - 1)
    with pytest.raises(
        ValueError, match=rf"^token {vocabulary.tokens[0]} of the tokenizer has no row"
    ):
        trim(whole.words, whole.tokenizer.pad_token_id, fewer)


def test_a_stored_vocabulary_is_the_models_or_refused(tmp_path: Path) -> None:
    vocabulary = Vocabulary(np.array([4, 9, 300, 0, 1]), 3)
    path = tmp_path / VOCABULARY_FILE
    vocabulary.save(path)
    loaded = load_vocabulary(path, vocabulary.hash())
    assert loaded.tokens.tolist() == vocabulary.tokens.tolist()
    assert loaded.num_outputs == 3
    for other in (Vocabulary(vocabulary.tokens, 4), Vocabulary(np.array([4, 9, 301, 0, 1]), 3)):
        with pytest.raises(
            ValueError, match=r"vocabulary.json: not the vocabulary of the model beside it"
        ):
            load_vocabulary(path, other.hash())
    for damaged in ("", "[]", '{"tokens": ["x"], "num_spoken": 1}', '{"tokens": [1]}'):
        path.write_text(damaged)
        with pytest.raises(
            ValueError, match=r"vocabulary.json: missing or damaged .*: copy the run again"
        ):
            load_vocabulary(path, vocabulary.hash())
    with pytest.raises(ValueError, match="missing or damaged"):
        load_vocabulary(tmp_path / "nowhere", vocabulary.hash())


def test_generated_numbers_are_read_through_the_vocabulary() -> None:
    codes = ["17", "4", "170"]
    tokenizer = train_tokenizer([*codes, *UNUSED_CODES], 600)
    words = trim(build_words(tokenizer, codes, ["9"]), tokenizer.pad_token_id)
    tokens, offsets = words.tokens_of_items()
    strings = [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]
    texts = ItemTexts(tokenizer, codes, words.vocabulary)
    assert texts.rows([*strings, strings[0][:-1]]).tolist() == [0, 1, 2, -2]
    assert texts.rows([]).tolist() == []
    assert item_text("17") == tokenizer.decode(words.vocabulary.tokens[strings[0]])


# The model.


def test_the_trimmed_backbone_is_the_backbone_on_the_kept_tokens(pair: tuple[Shop, Shop]) -> None:
    (whole, model), (trimmed, small) = pair
    vocabulary = trimmed.words.vocabulary
    kept = torch.from_numpy(vocabulary.tokens)
    outputs = kept[: vocabulary.num_outputs]
    model.eval()
    small.eval()
    shares = [
        StepBatches(s.stages, s.reader, s.layout, s.recipe, 0, 1)[0] for s in (whole, trimmed)
    ]
    for theirs, ours in zip(*(share.micro_batches for share in shares), strict=True):
        assert torch.equal(kept[ours.encoder.input_ids], theirs.encoder.input_ids)
        with torch.no_grad():
            states = model.encode(theirs.encoder), small.encode(ours.encoder)
            logits, labels = model.target_logits(
                theirs.encoder, theirs.encoder_row, theirs.decoder_input_ids, theirs.labels
            )
            found, own = small.target_logits(
                ours.encoder, ours.encoder_row, ours.decoder_input_ids, ours.labels
            )
        torch.testing.assert_close(states[1], states[0])
        torch.testing.assert_close(found, logits[:, outputs])
        assert torch.equal(outputs[own], labels)


def test_what_shares_the_embedding_still_shares_it(pair: tuple[Shop, Shop], tmp_path: Path) -> None:
    _, (trimmed, small) = pair
    vocabulary = trimmed.words.vocabulary
    shared = small.model.shared.weight
    assert shared is small.lm_head.weight
    assert (
        shared is small.model.encoder.embed_tokens.weight is small.model.decoder.embed_tokens.weight
    )
    assert shared.requires_grad
    assert len(shared) == vocabulary.size == small.config.vocab_size
    assert small.model.shared.padding_idx == small.config.pad_token_id
    small.save_pretrained(tmp_path)
    loaded = GenRecForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.spoken_tokens == vocabulary.num_outputs
    assert loaded.final_logits_bias.isneginf().sum() == vocabulary.size - vocabulary.num_outputs
    for (name, one), (_, other) in zip(
        small.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_hugging_faces_generate_speaks_no_other_token(pair: tuple[Shop, Shop]) -> None:
    _, (trimmed, small) = pair
    words = trimmed.words
    ids = torch.from_numpy(
        words.tokens[words.offsets[words.first_item_word] :][:6].astype(np.int64)
    )[None]
    made = small.generate(
        ids, num_beams=4, num_return_sequences=4, max_new_tokens=5, do_sample=False
    )
    logits = small(ids, decoder_input_ids=made).logits
    assert logits[..., words.vocabulary.num_outputs :].isneginf().all()
    assert logits[..., : words.vocabulary.num_outputs].isfinite().all()
    assert small.generation_config.forced_bos_token_id is None
    outputs = made[:, 1:]
    assert int(outputs[outputs != small.config.pad_token_id].max()) < words.vocabulary.num_outputs
    assert made[:, 0].eq(small.config.decoder_start_token_id).all()


def test_it_learns_what_a_whole_model_learns_whose_other_logits_are_closed(
    pair: tuple[Shop, Shop],
) -> None:
    """Five steps of AdamW, label smoothing included (over the outputs tokens)."""
    (whole, model), (trimmed, small) = pair
    vocabulary = trimmed.words.vocabulary
    outputs = torch.from_numpy(vocabulary.tokens[: vocabulary.num_outputs])
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.0)
        for m in (model, small)
    ]
    data = [StepBatches(s.stages, s.reader, s.layout, s.recipe, 0, 1) for s in (whole, trimmed)]
    losses: tuple[list[float], list[float]] = ([], [])
    before = model.model.shared.weight.detach().clone()
    for step in range(5):
        shares = [source[step].micro_batches for source in data]
        for theirs, ours in zip(*shares, strict=True):
            logits, labels = model.target_logits(
                theirs.encoder, theirs.encoder_row, theirs.decoder_input_ids, theirs.labels
            )
            renumbered = torch.from_numpy(vocabulary.numbers(labels.numpy())).long()
            one = target_loss(logits[:, outputs], renumbered, 100, 0.1)
            given = {**vars(ours.encoder), "encoder_row": ours.encoder_row, "labels": ours.labels}
            other = (
                small(**given, decoder_input_ids=ours.decoder_input_ids, label_smoothing=0.1) / 100
            )
            one.backward()
            other.backward()
            losses[0].append(float(one.detach()))
            losses[1].append(float(other.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    kept = torch.from_numpy(vocabulary.tokens)
    moved, ours = (
        (model.model.shared.weight - before)[kept],
        small.model.shared.weight - before[kept],
    )
    size = float(moved.detach().norm())
    assert size > 0.1
    assert float((moved - ours).detach().norm()) < 1e-3 * size


# A run.


@pytest.fixture(scope="module")
def run(tiny_data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed")
    shutil.copytree(backbone, folder / "tokenizer")
    sets = [
        f"tokens.tokenizer={folder / 'tokenizer'}",
        "tokens.trim=true",
        "pretrain.mask={strategy: multi, k: 2}",
    ]
    return train(a_recipe(tiny_data, folder / "run", *sets))


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


def lists(
    loaded: LoadedRun, data: Path, mode: str, users: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    view = load_dataset(data).sequences.history_and_target("test")
    decoding = Decoding(mode=mode, top=10, exclude_history=mode != "free")  # type: ignore[arg-type]
    found = rank_batch(loaded.searcher, loaded.layout, view, np.arange(users), decoding)
    return found.items, found.scores


def test_a_loaded_run_speaks_its_vocabulary(run: Path, loaded: LoadedRun, tiny_data: Path) -> None:
    words, config = loaded.words, loaded.model.config
    vocabulary = words.vocabulary
    assert vocabulary is not None
    stored = json.loads((run / "best" / VOCABULARY_FILE).read_text())
    assert stored["tokens"] == vocabulary.tokens.tolist()
    assert config.vocabulary_hash == vocabulary.hash()
    assert len(loaded.model.model.shared.weight) == vocabulary.size < len(loaded.tokenizer)
    assert config.num_masks == 2  # numbered masks are read, too
    again = build_words(
        loaded.tokenizer, loaded.catalogue.item_codes, loaded.catalogue.user_codes, 2
    )
    assert np.array_equal(vocabulary.tokens[words.tokens], again.tokens)
    validated = [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines())
                 if event["event"] == "validation"][-1]  # fmt: skip
    view = load_dataset(tiny_data).sequences.history_and_target("validation")
    users = np.arange(words.num_users)
    assert np.isfinite(validated["loss"])
    # All of the probability is the items': an untrained softmax over the whole tokenizer would be
    # at the log of its size.
    assert (
        history_loss(loaded.model, loaded.layout, view, users, Ranks())
        < np.log(vocabulary.num_outputs) + 0.5
    )


def test_compact_is_exact(loaded: LoadedRun, tiny_data: Path) -> None:
    """No token outside the trie has probability, in training or in decoding."""
    (items, scores), (found, their_scores) = (
        lists(loaded, tiny_data, mode) for mode in ("exact", "compact")
    )
    assert np.array_equal(items, found)
    assert np.allclose(scores, their_scores, rtol=1e-6)


def test_the_control_compact_is_not_exact_over_a_whole_vocabulary(
    tiny_run: Path, tiny_data: Path
) -> None:
    whole = load_run(tiny_run)
    assert not np.allclose(
        lists(whole, tiny_data, "exact")[1], lists(whole, tiny_data, "compact")[1], rtol=1e-3
    )


def test_mode_free_reads_items_back(loaded: LoadedRun, tiny_data: Path) -> None:
    items, scores = lists(loaded, tiny_data, "free")
    listed = items >= 0
    assert listed.any()
    # A text's score is that of the item's tokens, where its tokens are the item's own.
    every, their_scores = lists_of_all(loaded, tiny_data)
    for row, column in zip(*np.nonzero(listed), strict=True):
        place = np.flatnonzero(every[row] == items[row, column])
        if abs(their_scores[row, place[0]] - scores[row, column]) < 1e-4:
            return
    pytest.fail("no listed text has the score of its item")


def lists_of_all(loaded: LoadedRun, data: Path) -> tuple[np.ndarray, np.ndarray]:
    view = load_dataset(data).sequences.history_and_target("test")
    decoding = Decoding(mode="all", top=loaded.words.num_items, exclude_history=False)
    found = rank_batch(loaded.searcher, loaded.layout, view, np.arange(60), decoding)
    return found.items, found.scores


def test_a_run_without_its_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "best", tmp_path / "run" / "best")
    (tmp_path / "run" / "best" / VOCABULARY_FILE).unlink()
    with pytest.raises(
        ValueError,
        match=r"vocabulary.json: missing or damaged .*: copy the run again, or train again",
    ):
        load_run(tmp_path / "run")


def test_a_resume_with_another_mapping_is_refused(run: Path, tiny_data: Path) -> None:
    """The tokenizer's directory is another one's now; its name, the data and the recipe are the
    same."""
    recipe = load_recipe(run / "recipe.yaml")
    shop, _ = open_workshop(recipe)
    path = find_checkpoint(run, "latest")
    Checkpoint(path, shop.identity, Ranks())
    folder = Path(str(recipe.tokens.tokenizer))
    before = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        train_tokenizer(
            [*UNUSED_CODES, *load_dataset(tiny_data).numbering.item_codes], 420
        ).save_pretrained(folder)
        other, _ = open_workshop(recipe)
        assert other.identity["recipe"] == shop.identity["recipe"]
        with pytest.raises(ValueError, match="its vocabulary is not this run's"):
            Checkpoint(path, other.identity, Ranks())
    finally:
        before.save_pretrained(folder)
    whole = replace(recipe, tokens=replace(recipe.tokens, trim=False))
    with pytest.raises(ValueError, match="is not this run's"):
        Checkpoint(path, open_workshop(whole)[0].identity, Ranks())


# What it spares.


def test_plan_counts_the_smaller_head(tiny_data: Path, backbone: Path, tmp_path: Path) -> None:
    sets = (f"model.backbone={backbone}", "tokens.trim=true")
    recipe = a_recipe(tiny_data, tmp_path / "run", *sets)
    plan = forecast(recipe)
    _, model = open_workshop(recipe)
    assert plan.sizes.parameters == sum(p.numel() for p in model.parameters())
    whole = forecast(a_recipe(tiny_data, tmp_path / "run", *sets[:1]))
    assert plan.sizes.parameters < whole.sizes.parameters
    assert plan.fits[0].peak < whole.fits[0].peak
    assert plan.step_flops["finetune"] < whole.step_flops["finetune"]
