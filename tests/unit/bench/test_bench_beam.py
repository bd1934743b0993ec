"""The benchmark of decoding on small sizes: `generate` searches by the same rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from claims import check_claims
from genrec_shards.dataset import load_dataset

from genrec_dist.bench import beam as bench
from genrec_dist.bench.beam import (
    TINY,
    World,
    bench_beam,
    evaluate_share,
    format_curves,
    steps_of_an_epoch,
)
from genrec_dist.bench.measure import Claim
from genrec_dist.bench.peers import beam as peers
from genrec_dist.bench.peers.beam import GENERATE, compare_lists, make_generate
from genrec_dist.bench.synthetic import EOS, MASK, PAD, make_words, spell
from genrec_dist.cli.app import run_command
from genrec_dist.decoding.searcher import TopItems
from genrec_dist.decoding.trie import build_trie


@pytest.fixture(scope="module")
def measured() -> tuple[list[Claim], dict[str, Any]]:
    return bench_beam(sizes=TINY)


def test_codes_are_spelled_in_groups_of_three_digits_from_the_right() -> None:
    codes = np.array([1000, 1001, 12_099, 12_101, 999_999])
    tokens, offsets = spell(codes, (7, 8), np.arange(5000, 7000))
    assert tokens.dtype == np.int32
    for code, start, end in zip(codes, offsets[:-1], offsets[1:], strict=True):
        leading, later = divmod(code, 1000)
        assert tokens[start:end].tolist() == [7, 8, 5000 + leading, 6000 + later]
    assert spell(np.array([1_002_003]), (7, 8), np.arange(2000), 3)[0].tolist() == [
        7, 8, 1, 1002, 1003,
    ]  # fmt: skip


def test_catalogue_has_beautys_size_and_every_item_four_sub_words() -> None:
    words = make_words(12_101, 10)
    trie = build_trie(*words.tokens_of_items())
    assert np.diff(trie.level_offsets).tolist() == [1, 1, 1, 13, 12_101]
    assert set(np.diff(words.offsets)[3:]) == {4}
    assert len(np.unique(words.tokens)) == len(set(words.tokens.tolist()) | {EOS, MASK})
    assert PAD not in words.tokens


def test_generate_is_left_out_where_a_batch_is_too_large_for_it(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MOST_OF_GENERATE", 2)
    world = World(TINY.shapes[0], load_dataset(tiny_data).sequences, torch.device("cpu"))
    rates = [set(bench.measure_batch(world, size, TINY)["users a second"]) for size in (2, 3)]
    assert rates == [{"exact", "compact", GENERATE}, {"exact", "compact"}]


def test_typical_batch_is_neither_short_nor_long(tiny_data: Path) -> None:
    sequences = load_dataset(tiny_data).sequences
    world = World(TINY.shapes[0], sequences, torch.device("cpu"))
    users = world.histories.typical_users(4)
    lengths = np.sort(sequences.lengths)
    assert len(set(users)) == 4
    assert lengths[len(lengths) // 2] <= sequences.lengths[users].max() <= lengths[-1]
    encoder = world.batch(200)  # more than there are users: they come again
    assert len(encoder.input_ids) == 200
    assert int(encoder.attention_mask.sum(1).max()) == encoder.input_ids.shape[1]
    row = encoder.item_rows[0]
    view, user = sequences.history_and_target("test"), world.histories.typical_users(200)[0]
    history = view.items[view.starts[user] : view.ends[user]]
    assert row[row > 0].tolist() == np.repeat(history + 1, 4).tolist()
    # While rivals are timed no scores are requested.
    assert make_generate(world.model, world.words, world.batch(1), 4)().scores is None


def test_lists_may_differ_only_where_scores_tie() -> None:
    scores = np.array([[-1.0, -2.0, -2.00004]], np.float32)
    ours = TopItems(np.array([[4, 5, 6]], np.int32), scores)

    def theirs(items: list[int], shift: float = 0, at: int = 2) -> TopItems:
        moved = scores.copy()
        moved[0, at] += shift
        return TopItems(np.array([items], np.int32), moved)

    assert compare_lists(ours, theirs([4, 6, 5]))["items that differ"] == 2
    assert compare_lists(ours, theirs([4, 5, 9]))["items that differ"] == 1  # as good a last one
    for other, rank in (
        (theirs([4, 5, 6], 1e-3, at=0), 0),
        (theirs([4, 5, 9], -1e-3), 2),
        (theirs([4, 5, -1]), 2),
        (theirs([4, 5, 6], -np.inf), 2),
    ):
        with pytest.raises(AssertionError, match=f"user 0 of the batch, rank {rank}: item"):
            compare_lists(ours, other)


def test_claims_are_made_of_what_was_measured(
    measured: tuple[list[Claim], dict[str, Any]], tmp_path: Path
) -> None:
    claims, table = measured
    check_claims(claims, table, tmp_path / "beam.json")
    names = ["exact, tiny, batch 3", "compact, tiny, batch 3", "trie of 3,000 items"]
    assert [claim.id for claim in claims] == names
    batches = table["shapes"]["tiny"]["batches"]
    for claim, mode, goal in zip(claims, ("exact", "compact"), (1, 2), strict=False):
        seconds = batches["3"]["seconds"]
        assert (claim.ours, claim.theirs) == tuple(np.median(seconds[n]) for n in (mode, GENERATE))
        assert claim.goal == f">= {goal}x"
        assert batches["3"]["users a second"][mode] == pytest.approx(3 / claim.ours)
    for size, repeats in (("1", 1), ("3", 2)):
        counts = {name: len(values) for name, values in batches[size]["seconds"].items()}
        assert counts == {"exact": 2, "compact": 2, GENERATE: repeats}
    assert len(format_curves(table).splitlines()) == 3
    assert claims[2].ours == table["trie"]["seconds"]["build"]
    assert set(table["trie"]["seconds"]) == {"build", "save", "hash words and load"}
    # 32 bytes a node and 8 an item; and the offsets of six levels and the end.
    assert table["trie"]["bytes"] == 32 * table["trie"]["nodes"] + 8 * 3000 + 8 * 7


def test_exact_search_equals_generate(measured: tuple[list[Claim], dict[str, Any]]) -> None:
    for point in measured[1]["shapes"]["tiny"]["batches"].values():
        assert point["lists compared with exact"]["items that differ"] == 0


@pytest.mark.parametrize("broken", ["no item at all", "a branch cut off"])
def test_peer_with_other_lists_stops_the_measurement(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = peers.allowed_tokens

    def changed(words: Any, eos: int) -> Any:
        after = whole(words, eos)
        if broken == "no item at all":
            return {**after, (): [EOS]}
        widest = max(after, key=lambda prefix: len(after[prefix]) if len(prefix) == 3 else 0)
        return {**after, widest: after[widest][:1]}

    monkeypatch.setattr(peers, "allowed_tokens", changed)
    with pytest.raises(AssertionError, match=r"user \d of the batch, rank \d"):
        bench_beam(sizes=TINY)


@pytest.mark.dist
@pytest.mark.ranks
def test_evaluating_is_compared_with_an_epoch(tiny_run: Path, tiny_data: Path) -> None:
    """A real training in a process of its own, watched for some steps and ended."""
    files = sorted(path.name for path in tiny_run.iterdir())
    sizes = replace(TINY, watched_steps=6, repeats_of_evaluating=1)
    (claim,), more = evaluate_share(tiny_run, tiny_data, sizes)
    assert more["users"] == 120
    whole = more["seconds with baselines, intervals and files"]
    assert whole[0] > more["seconds of decoding"][0] == claim.ours > 0
    assert claim.theirs == more["seconds an epoch"][0] > 0
    assert sorted(path.name for path in tiny_run.iterdir()) == files


def test_epoch_has_the_steps_up_to_its_validation(tmp_path: Path) -> None:
    def event(kind: str, number: int, stage: str = "finetune") -> dict[str, Any]:
        return {"event": kind, "step": number, "stage": stage}

    before = [event("step", 0, "pretrain"), event("validation", 9, "pretrain")]
    epoch = [event("step", 10), event("step", 20), event("validation", 29), event("step", 30)]
    path = tmp_path / "events.jsonl"
    for events, steps in ((before + epoch, 20), (before + epoch[:2], None), ([], None)):
        path.write_text("".join(json.dumps(line) + "\n" for line in events), encoding="utf-8")
        if steps:
            assert steps_of_an_epoch(path) == steps
            continue
        with pytest.raises(ValueError, match=r"events\.jsonl: no finished epoch of finetuning"):
            steps_of_an_epoch(path)


def test_run_needs_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "beam", "--run", str(tmp_path)]) == 1
    expected = "genrec: --run: give --data too, the directory the run was trained on\n"
    assert capsys.readouterr().err == expected
