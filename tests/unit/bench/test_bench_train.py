"""The training benchmark: rivals take the very same samples and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from claims import check_claims
from genrec_shards.dataset import load_dataset

from genrec_dist.bench.peers.train import PlainGenRec, TokenizingCollate, pad_samples, samples_of
from genrec_dist.bench.train import (
    CAPPED_ITEMS,
    LONG,
    Sizes,
    bench_train,
    format_rivals,
    make_setting,
    process,
    tokens_of,
)
from genrec_dist.bench.train_process import (
    DEFAULT,
    OURS,
    PUBLISHED,
    TRIMMED,
    TUNED,
    Setting,
    World,
    facts,
    make_rival,
)
from genrec_dist.data.batch import IGNORED

SHAPE = (
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=16",
    "micro_batch_tokens=512",
    "precision=fp32",
)
SIZES = Sizes(
    setting=Setting("", "", "", samples=48, batch_size=12, max_tokens=48, shape=SHAPE, threads=1),
    vocabulary=400,
    repeats=2,
    rivals=(OURS, TRIMMED, DEFAULT, PUBLISHED),
)


@pytest.fixture(scope="module")
def setting(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(load_dataset(tiny_data), tmp_path_factory.mktemp("train"), SIZES)


def test_tokenizing_anew_gives_the_stored_samples_to_the_token(setting: Setting) -> None:
    assert any(batch.encoder.input_ids.shape[1] > 20 for batch in World(setting).padded())
    world = World(replace(setting, max_tokens=20))  # some are cut to length
    pad = int(world.model.config.pad_token_id)
    stored = [sample for batch in world.padded() for sample in samples_of(batch)]
    collate = TokenizingCollate(world.setup.tokenizer, pad)
    texts = [{**collate.with_texts(sample), "input_ids": None, "labels": None} for sample in stored]
    assert texts[0]["text"].startswith(" user_")
    assert texts[0]["target"].startswith(" item_")
    anew, whole = collate(texts), pad_samples(stored, pad)
    assert len(stored) == 48
    for name, expected in whole.items():
        assert torch.equal(anew[name], expected), name


def test_tokenizer_has_rows_that_no_word_uses(setting: Setting) -> None:
    world = World(setting)
    assert world.model.config.vocab_size == 400
    assert world.setup.words.tokens.max() < 300
    dataset = world.setup.dataset
    words = world.setup.words
    expected = 3 + words.longest_user + CAPPED_ITEMS * words.longest_item
    assert tokens_of(CAPPED_ITEMS, dataset, setting.tokenizer) == expected


def test_plain_model_has_our_loss(setting: Setting) -> None:
    world = World(setting)
    plain = PlainGenRec(world.model).eval()
    pad = int(world.model.config.pad_token_id)
    for batch in world.padded():
        inputs = pad_samples(samples_of(batch), pad, multiple=8)
        assert inputs["input_ids"].shape[1] % 8 == 0
        ours = world.model(
            **vars(batch.encoder),
            encoder_row=batch.encoder_row,
            decoder_input_ids=batch.decoder_input_ids,
            labels=batch.labels,
        )
        theirs = plain(**inputs)["loss"] * (batch.labels != IGNORED).sum()
        assert float(theirs.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "name", [OURS, DEFAULT, PUBLISHED, pytest.param(TUNED, marks=pytest.mark.slow)]
)
def test_rival_learns_from_every_sample(setting: Setting, name: str, tmp_path: Path) -> None:
    rival, world = make_rival(name, setting, tmp_path)
    assert hasattr(getattr(rival, "model", None), "_orig_mod") == (name == TUNED)  # compiled
    tokens = sum(batch.num_tokens for batch in world.padded())
    assert facts(rival, world)["tokens"] == tokens
    before = [parameter.clone() for parameter in world.model.parameters()]
    assert rival.train(1000) == tokens
    assert 0 < rival.train(1) < tokens
    pairs = zip(before, world.model.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs if new.ndim > 1)


@pytest.mark.slow
@pytest.mark.dist
def test_claims_are_made_of_what_was_measured(setting: Setting, tmp_path: Path) -> None:
    claims, table = bench_train(Path(setting.data), SIZES)
    check_claims(claims, table, tmp_path / "train.json")
    assert [claim.peer for claim in claims] == [TRIMMED, DEFAULT, PUBLISHED] * 2
    assert [claim.goal for claim in claims] == ["none", ">= 5x", ">= 8x"] + ["none"] * 3
    for found in table["measured"].values():
        for rival in found.values():
            assert len(rival["of each turn"]) == 2
            assert min(rival["of each turn"]) > 0
        assert found[OURS]["padding share"] < found[DEFAULT]["padding share"]
    long = table["measured"][LONG]
    assert long[TRIMMED]["parameters"] < long[OURS]["parameters"]
    assert PUBLISHED in format_rivals(table)


@pytest.mark.dist
@pytest.mark.ranks
def test_rival_that_ends_by_itself_is_named_with_its_last_words(setting: Setting) -> None:
    with (
        process("nobody", setting) as rival,
        pytest.raises(ValueError, match=r"(?s)nobody: ended by itself: .*no such rival"),
    ):
        rival.answer()
    assert rival.process.returncode is not None


def test_collation_pads_to_the_longest() -> None:
    rows = {"position_ids": [0, 1], "user_rows": [0, 0], "item_rows": [0, 3], "labels": [5, 2]}
    short = {**rows, "input_ids": [7, 8], "start": [4]}
    long = {**{name: values * 2 for name, values in rows.items()}, "input_ids": [7, 8, 9, 10]}
    made = pad_samples([short, {**long, "start": [4]}], pad_token=1)
    assert made["input_ids"].tolist() == [[7, 8, 1, 1], [7, 8, 9, 10]]
    assert made["attention_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert made["decoder_input_ids"].tolist() == [[4, 5, 2, 1], [4, 5, 2, 5]]
    assert made["labels"].tolist() == [[5, 2, IGNORED, IGNORED], [5, 2, 5, 2]]
