"""The trimmed vocabulary: the same model with fewer rows, stored with its run, whose outputs are
items alone."""

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
from run_events import events
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
from genrec_dist.training.setup import TrainingSetup, build_setup

UNUSED_CODES = [
    f"Z{number}{letters}" for number, letters in enumerate(["QX", "KJ", "WV", "PLU"] * 40)
]
"""Codes of no item: a tokenizer trained on them too has tokens that no word of the catalogue
uses."""


@pytest.fixture(scope="module")
def backbone(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BART with a tokenizer that knows far more than the catalogue needs."""
    folder = tmp_path_factory.mktemp("bart")
    codes = load_dataset(tiny_data).numbering.item_codes
    tokenizer = train_tokenizer([*codes, *UNUSED_CODES], 600)
    torch.manual_seed(3)
    shape = {"max_position_embeddings": 64, "d_model": 16, "init_std": 0.3}
    for tower in ("encoder", "decoder"):
        shape |= {f"{tower}_layers": 1, f"{tower}_attention_heads": 2, f"{tower}_ffn_dim": 32}
    config = BartConfig(vocab_size=len(tokenizer), forced_bos_token_id=0, **shape)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def a_recipe(data: Path, run: Path, *overrides: str) -> Recipe:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(f"data: {data}\nrun: {run}\n{TINY_RECIPE}", encoding="utf-8")
    return load_recipe(path, list(overrides))


Opened = tuple[TrainingSetup, GenRecForConditionalGeneration]


@pytest.fixture(scope="module")
def pair(
    tiny_data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Opened, Opened]:
    """The backbone with the whole vocabulary and with the trimmed one, and the same id tables."""
    run = tmp_path_factory.mktemp("pair") / "run"
    sets = [f"model.backbone={backbone}", "model.dropout=0.0", "micro_batch_tokens=512"]
    whole, trimmed = (
        build_setup(a_recipe(tiny_data, run, *sets, f"tokens.trim={trim}"))
        for trim in ("false", "true")
    )
    for name in ("user_embedding", "item_embedding"):
        with torch.no_grad():
            getattr(trimmed[1], name).weight.copy_(getattr(whole[1], name).weight)
    return whole, trimmed


def steps_of(opened: TrainingSetup) -> StepBatches:
    return StepBatches(opened.stages, opened.reader, opened.layout, opened.recipe, 0, 1)


# Words.


def test_trim_keeps_sub_words_with_the_outputs_first(pair: tuple[Opened, Opened]) -> None:
    (whole, _), (trimmed, _) = pair
    words, ours, tokenizer = whole.words, trimmed.words, whole.tokenizer
    vocabulary = ours.vocabulary
    assert vocabulary is not None
    assert np.array_equal(vocabulary.tokens[ours.tokens], words.tokens)
    assert vocabulary.tokens[ours.tokens].dtype == np.int64
    assert ours.tokens.dtype == words.tokens.dtype
    outputs, read = np.split(vocabulary.tokens, [vocabulary.num_outputs])
    assert {*outputs} == {*words.tokens_of_items()[0].tolist(), tokenizer.eos_token_id}
    everything = {*words.tokens.tolist(), tokenizer.pad_token_id}
    assert {*vocabulary.tokens} == everything
    assert vocabulary.size == len(everything) < len(tokenizer) / 2
    # <s>, <pad>, the masks and what users alone use are read and never generated.
    assert {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id} < {*read}
    # Siblings in the trie keep their order, and with it ties between items.
    assert all(np.diff(outputs) > 0)
    fewer = Vocabulary(vocabulary.tokens[1:], vocabulary.num_outputs - 1)
    missing = rf"^token {vocabulary.tokens[0]} of the tokenizer has no row"
    with pytest.raises(ValueError, match=missing):
        trim(words, tokenizer.pad_token_id, fewer)


def test_load_vocabulary_returns_the_models_own_or_refuses(tmp_path: Path) -> None:
    vocabulary = Vocabulary(np.array([4, 9, 300, 0, 1]), 3)
    path = tmp_path / VOCABULARY_FILE
    vocabulary.save(path)
    loaded = load_vocabulary(path, vocabulary.hash())
    assert loaded.tokens.tolist() == vocabulary.tokens.tolist()
    assert loaded.num_outputs == 3
    for other in (Vocabulary(vocabulary.tokens, 4), Vocabulary(np.array([4, 9, 301, 0, 1]), 3)):
        with pytest.raises(ValueError, match=r"json: not the vocabulary of the model beside it"):
            load_vocabulary(path, other.hash())
    for damaged in ("", "[]", '{"tokens": ["x"], "num_spoken": 1}', '{"tokens": [1]}', None):
        path.unlink() if damaged is None else path.write_text(damaged)
        with pytest.raises(ValueError, match=r"json: missing or damaged .*: copy the run again"):
            load_vocabulary(path, vocabulary.hash())


def test_item_texts_reads_generated_numbers_through_the_vocabulary() -> None:
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


def test_the_trimmed_backbone_is_the_backbone_on_the_kept_tokens(
    pair: tuple[Opened, Opened],
) -> None:
    (whole, model), (trimmed, small) = pair
    vocabulary = trimmed.words.vocabulary
    kept = torch.from_numpy(vocabulary.tokens)
    outputs = kept[: vocabulary.num_outputs]
    model.eval()
    small.eval()
    shares = [steps_of(opened)[0].micro_batches for opened in (whole, trimmed)]
    for theirs, ours in zip(*shares, strict=True):
        assert torch.equal(kept[ours.encoder.input_ids], theirs.encoder.input_ids)
        with torch.no_grad():
            states = model.encode(theirs.encoder), small.encode(ours.encoder)
            logits, labels = model.target_logits(theirs)
            found, own = small.target_logits(ours)
        torch.testing.assert_close(states[1], states[0])
        torch.testing.assert_close(found, logits[:, outputs])
        assert torch.equal(outputs[own], labels)


def test_the_trimmed_embedding_stays_shared_also_when_saved(
    pair: tuple[Opened, Opened], tmp_path: Path
) -> None:
    _, (trimmed, small) = pair
    vocabulary, bart = trimmed.words.vocabulary, small.model
    shared = bart.shared.weight
    assert shared is small.lm_head.weight
    assert shared is bart.encoder.embed_tokens.weight is bart.decoder.embed_tokens.weight
    assert shared.requires_grad
    assert len(shared) == vocabulary.size == small.config.vocab_size
    assert bart.shared.padding_idx == small.config.pad_token_id
    small.save_pretrained(tmp_path)
    loaded = GenRecForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.spoken_tokens == vocabulary.num_outputs
    assert loaded.final_logits_bias.isneginf().sum() == vocabulary.size - vocabulary.num_outputs
    states, others = small.state_dict(), loaded.state_dict()
    assert states.keys() == others.keys()
    assert all(torch.equal(states[name], others[name]) for name in states)


def test_hugging_faces_generate_gives_output_tokens_alone(pair: tuple[Opened, Opened]) -> None:
    _, (trimmed, small) = pair
    words, num_outputs = trimmed.words, trimmed.words.vocabulary.num_outputs
    tokens = words.tokens[words.offsets[words.first_item_word] :][:6].astype(np.int64)
    ids = torch.from_numpy(tokens)[None]
    beams = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 5, "do_sample": False}
    made = small.generate(ids, **beams)
    logits = small(ids, decoder_input_ids=made).logits
    assert logits[..., num_outputs:].isneginf().all()
    assert logits[..., :num_outputs].isfinite().all()
    assert small.generation_config.forced_bos_token_id is None
    later = made[:, 1:]
    assert int(later[later != small.config.pad_token_id].max()) < num_outputs
    assert made[:, 0].eq(small.config.decoder_start_token_id).all()


def test_it_learns_what_a_whole_model_learns_whose_other_logits_are_left_out(
    pair: tuple[Opened, Opened],
) -> None:
    """Five steps of AdamW, label smoothing included (over the output tokens)."""
    (whole, model), (trimmed, small) = pair
    vocabulary = trimmed.words.vocabulary
    kept = torch.from_numpy(vocabulary.tokens)
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.0)
        for m in (model, small)
    ]
    data = [steps_of(opened) for opened in (whole, trimmed)]
    losses: tuple[list[float], list[float]] = ([], [])
    before = model.model.shared.weight.detach().clone()
    for step in range(5):
        for theirs, ours in zip(*(source[step].micro_batches for source in data), strict=True):
            logits, labels = model.target_logits(theirs)
            renumbered = torch.from_numpy(vocabulary.numbers(labels.numpy())).long()
            one = target_loss(logits[:, kept[: vocabulary.num_outputs]], renumbered, 100, 0.1)
            other = small(inputs=ours, label_smoothing=0.1) / 100
            for loss, listed in zip((one, other), losses, strict=True):
                loss.backward()
                listed.append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    moved = (model.model.shared.weight.detach() - before)[kept]
    ours_moved = small.model.shared.weight.detach() - before[kept]
    assert float(moved.norm()) > 0.1
    assert float((moved - ours_moved).norm()) < 1e-3 * float(moved.norm())


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


def lists(loaded: LoadedRun, data: Path, mode: str, top: int = 10):
    view = load_dataset(data).sequences.history_and_target("test")
    exclude = mode not in ("free", "all")
    decoding = Decoding(mode=mode, top=top, exclude_history=exclude)  # type: ignore[arg-type]
    return rank_batch(loaded.searcher, loaded.layout, view, np.arange(60), decoding)


def test_a_loaded_run_has_its_vocabulary(run: Path, loaded: LoadedRun, tiny_data: Path) -> None:
    words, config, catalogue = loaded.words, loaded.model.config, loaded.catalogue
    vocabulary = words.vocabulary
    assert vocabulary is not None
    stored = json.loads((run / "best" / VOCABULARY_FILE).read_text())
    assert stored["tokens"] == vocabulary.tokens.tolist()
    assert config.vocabulary_hash == vocabulary.hash()
    assert len(loaded.model.model.shared.weight) == vocabulary.size < len(loaded.tokenizer)
    assert config.num_masks == 2  # numbered masks are read, too
    again = build_words(loaded.tokenizer, catalogue.item_codes, catalogue.user_codes, 2)
    assert np.array_equal(vocabulary.tokens[words.tokens], again.tokens)
    assert np.isfinite(events(run, "validation")[-1]["loss"])
    # All of the probability is the items': an untrained softmax over the whole tokenizer would be
    # at the log of its size.
    view = load_dataset(tiny_data).sequences.history_and_target("validation")
    users = np.arange(words.num_users)
    loss = history_loss(loaded.model, loaded.layout, view, users, Ranks())
    assert loss < np.log(vocabulary.num_outputs) + 0.5


def test_compact_is_exact_over_a_trimmed_vocabulary_alone(
    loaded: LoadedRun, tiny_run: Path, tiny_data: Path
) -> None:
    """No token outside the trie has probability, in training or in decoding."""
    exact, compact = (lists(loaded, tiny_data, mode) for mode in ("exact", "compact"))
    assert np.array_equal(exact.items, compact.items)
    assert np.allclose(exact.scores, compact.scores, rtol=1e-6)
    whole = load_run(tiny_run)
    exact, compact = (lists(whole, tiny_data, mode) for mode in ("exact", "compact"))
    assert not np.allclose(exact.scores, compact.scores, rtol=1e-3)


def test_mode_free_reads_items_back(loaded: LoadedRun, tiny_data: Path) -> None:
    found = lists(loaded, tiny_data, "free")
    every = lists(loaded, tiny_data, "all", top=loaded.words.num_items)
    listed = list(zip(*np.nonzero(found.items >= 0), strict=True))
    assert listed
    # A text's score is that of the item's tokens, where its tokens are the item's own.
    differences = [
        abs(every.scores[row][every.items[row] == found.items[row, column]][0] - score)
        for row, column in listed
        for score in [found.scores[row, column]]
    ]
    assert min(differences) < 1e-4


def test_a_run_without_its_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "best", tmp_path / "run" / "best")
    (tmp_path / "run" / "best" / VOCABULARY_FILE).unlink()
    with pytest.raises(ValueError, match=r"json: no such file, and manifest\.json names it: copy"):
        load_run(tmp_path / "run")
    # A run of a version without a manifest.
    (tmp_path / "run" / "best" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"json: missing or damaged .*: copy the run again, or tr"):
        load_run(tmp_path / "run")


def test_a_resume_with_another_mapping_is_refused(run: Path, tiny_data: Path) -> None:
    """The tokenizer's directory is another one's now; its name, the data and the recipe are the
    same."""
    recipe = load_recipe(run / "recipe.yaml")
    opened, _ = build_setup(recipe)
    path = find_checkpoint(run, "latest")
    Checkpoint(path, opened.identity, Ranks())
    folder = Path(str(recipe.tokens.tokenizer))
    before = PreTrainedTokenizerFast.from_pretrained(folder)
    codes = [*UNUSED_CODES, *load_dataset(tiny_data).numbering.item_codes]
    try:
        train_tokenizer(codes, 420).save_pretrained(folder)
        other, _ = build_setup(recipe)
        assert other.identity["recipe"] == opened.identity["recipe"]
        with pytest.raises(ValueError, match="its vocabulary is not this run's"):
            Checkpoint(path, other.identity, Ranks())
    finally:
        before.save_pretrained(folder)
    whole = replace(recipe, tokens=replace(recipe.tokens, trim=False))
    with pytest.raises(ValueError, match="is not this run's"):
        Checkpoint(path, build_setup(whole)[0].identity, Ranks())


def test_plan_counts_the_smaller_head(tiny_data: Path, backbone: Path, tmp_path: Path) -> None:
    sets = (f"model.backbone={backbone}", "tokens.trim=true")
    recipe = a_recipe(tiny_data, tmp_path / "run", *sets)
    plan = forecast(recipe)
    _, model = build_setup(recipe)
    assert plan.sizes.parameters == sum(p.numel() for p in model.parameters())
    whole = forecast(a_recipe(tiny_data, tmp_path / "run", *sets[:1]))
    assert plan.sizes.parameters < whole.sizes.parameters
    assert plan.fits[0].peak < whole.fits[0].peak
    assert plan.step_flops["finetune"] < whole.step_flops["finetune"]
