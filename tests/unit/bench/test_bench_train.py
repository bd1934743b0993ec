"""The training benchmark: rivals take the very same samples and weights, and a rival that fails is
named."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from genrec_shards.dataset import load_dataset

from genrec_dist.bench.train import (
    DEFAULT,
    LONG,
    OURS,
    PADDED,
    PUBLISHED,
    SWITCHES,
    TRIMMED,
    TUNED,
    Process,
    Sizes,
    _process,
    bench_train,
    format_rivals,
)
from genrec_dist.bench.train_peers import PlainGenRec, TokenizingCollate, pad_samples, samples_of
from genrec_dist.bench.train_process import Setting, make_rival, make_world, words_of
from genrec_dist.data.batch import IGNORED

SHAPE = (
    "model.d_model=16",
    "model.heads=2",
    "model.ffn=16",
    "micro_batch_tokens=512",
    "precision=fp32",
)


@pytest.fixture
def setting(tiny_data: Path) -> Setting:
    return Setting(
        str(tiny_data),
        samples=48,
        batch_size=12,
        max_tokens=48,
        shape=SHAPE,
        vocabulary=400,
        threads=1,
    )


def test_tokenizing_anew_gives_the_stored_samples_to_the_token(setting: Setting) -> None:
    world = make_world(replace(setting, max_tokens=20))
    pad = int(world.model.config.pad_token_id)
    stored = [
        s for b in world.whole() for s in samples_of(b.encoder, b.decoder_input_ids, b.labels)
    ]
    anew = TokenizingCollate(world.tokenizer, pad)(words_of(world).samples)
    whole = pad_samples(stored, pad)

    def rows(arrays: dict[str, torch.Tensor]) -> list[tuple]:
        return sorted(
            tuple(tuple(arrays[name][row].tolist()) for name in sorted(arrays))
            for row in range(len(stored))
        )

    assert (
        max(batch.encoder.input_ids.shape[1] for batch in make_world(setting).whole()) > 20
    )  # some are cut to length
    assert rows(anew) == rows(whole)


def test_the_plain_model_has_our_loss(setting: Setting) -> None:
    world = make_world(setting)
    plain = PlainGenRec(world.model).eval()
    pad = int(world.model.config.pad_token_id)
    for batch in world.whole():
        (inputs,) = [
            pad_samples(
                samples_of(batch.encoder, batch.decoder_input_ids, batch.labels), pad, multiple=8
            )
        ]
        assert inputs["input_ids"].shape[1] % 8 == 0
        ours = world.model(
            **vars(batch.encoder), encoder_row=batch.encoder_row, decoder_input_ids=batch.decoder_input_ids, labels=batch.labels
        )  # fmt: skip
        theirs = plain(**inputs)["loss"] * (batch.labels != IGNORED).sum()
        assert float(theirs.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)


@pytest.mark.parametrize("name", [OURS, PADDED, DEFAULT, PUBLISHED])
def test_a_rival_learns_from_every_sample(setting: Setting, name: str, tmp_path: Path) -> None:
    rival, world = make_rival(name, setting, tmp_path)
    tokens = sum(batch.num_tokens for batch in world.whole())
    before = [parameter.clone() for parameter in world.model.parameters()]
    assert rival.train(1000) == tokens
    assert 0 < rival.train(1) < tokens
    assert all(
        not torch.equal(a, b)
        for a, b in zip(before, world.model.parameters(), strict=True)
        if b.ndim > 1
    )


@pytest.mark.slow
@pytest.mark.dist
def test_the_table_has_all_rivals_in_turn(tmp_path: Path, setting: Setting) -> None:
    rivals, ways = (OURS, TRIMMED, DEFAULT, PUBLISHED), (OURS, PADDED)
    sizes = Sizes(setting=setting, repeats=2, rivals=rivals, ways=ways)
    claims, table = bench_train(load_dataset(setting.data).path, sizes)
    assert [claim.peer for claim in claims] == [TRIMMED, DEFAULT, PUBLISHED] * 2 + [PADDED]
    for name, found in table["measured"].items():
        assert set(found) == set(ways if name == SWITCHES else rivals)
        assert all(
            len(rival["of each turn"]) == 2 and min(rival["of each turn"]) > 0
            for rival in found.values()
        )
        assert all(
            found[OURS]["padding share"] < found[peer]["padding share"]
            for peer in found
            if peer in (PADDED, DEFAULT)
        )
    assert (
        table["measured"][LONG][TRIMMED]["parameters"] < table["measured"][LONG][OURS]["parameters"]
    )
    assert "published collate" in format_rivals(table)


@pytest.mark.slow
def test_the_tuned_trainer_runs_compiled(setting: Setting, tmp_path: Path) -> None:
    rival, world = make_rival(TUNED, setting, tmp_path)
    assert hasattr(rival.model, "_orig_mod")  # type: ignore[attr-defined]
    assert rival.train(1000) == sum(batch.num_tokens for batch in world.whole())


@pytest.mark.dist
def test_a_rival_that_ends_by_itself_is_named_with_its_last_words(setting: Setting) -> None:
    with (
        _process("nobody", setting) as rival,
        pytest.raises(ValueError, match=r"(?s)nobody: ended by itself: .*no such rival"),
    ):
        rival.answer()
    assert isinstance(rival, Process)
    assert rival.process.returncode is not None


def test_collation_pads_to_the_longest() -> None:
    sample = {
        "position_ids": [0, 1],
        "user_rows": [0, 0],
        "item_rows": [0, 3],
        "labels": [5, 2],
        "start": [4],
    }
    long = {
        **{k: v * 2 for k, v in sample.items() if k != "start"},
        "start": [4],
        "input_ids": [7, 8, 9, 10],
    }
    made = partial(pad_samples, pad_token=1)([{**sample, "input_ids": [7, 8]}, long])
    assert made["input_ids"].tolist() == [[7, 8, 1, 1], [7, 8, 9, 10]]
    assert made["attention_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert made["decoder_input_ids"].tolist() == [[4, 5, 2, 1], [4, 5, 2, 5]]
    assert made["labels"].tolist() == [[5, 2, IGNORED, IGNORED], [5, 2, 5, 2]]
