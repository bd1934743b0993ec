"""The benchmark of decoding on small sizes: the rivals have the same rules, and every claim is made
of what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from torch.utils.flop_counter import FlopCounterMode

from genrec_dist.bench import beam as bench
from genrec_dist.bench.beam import (
    GENERATE,
    PLAIN,
    TENSOR_MASK,
    Sizes,
    TensorMask,
    allowed_tokens,
    bench_beam,
    compare_lists,
    evaluate_share,
    flop_a_user,
    format_curves,
    make_rivals,
    measure_trie,
    measure_trie_share,
    steps_of_an_epoch,
)
from genrec_dist.bench.beam_fixture import (
    EOS,
    MASK,
    VOCABULARY,
    Shape,
    World,
    make_users,
    make_words,
    spell,
    users_of,
)
from genrec_dist.bench.measure import Claim, format_claims, write_table
from genrec_dist.cli.app import run_command
from genrec_dist.data.collate import target_batch
from genrec_dist.decoding import beam_search as trie_walk
from genrec_dist.decoding.searcher import TopItems
from genrec_dist.decoding.trie import build_trie

TINY = Shape(
    "tiny",
    32,
    2,
    2,
    64,
    batches=(1, 3),
    headline=3,
    exact_goal=1,
    compact_goal=2,
    spelling_steps=400,
)
SMALL = Sizes(shapes=(TINY,), items=5000, users=80, beam=6, repeats=2, trie_items=3000)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> World:
    return World(TINY, make_users(80, 5000), 5000, CPU)


def test_codes_are_spelled_in_groups_of_three_digits_from_the_right() -> None:
    codes = np.array(
        [1, 9, 99, 100, 999, 1000, 1001, 12_099, 12_101, 999_999, 1_000_000, 7_020_300, 123_456_789]
    )
    pieces = np.arange(5000, 6100)
    text_of = {int(pieces[n]): str(n) if n < 1000 else f"{n - 1000:03d}" for n in range(1, 1100)}
    tokens, offsets = spell(codes, (7, 8), pieces)
    assert tokens.dtype == np.int32
    for code, start, end in zip(codes, offsets[:-1], offsets[1:], strict=True):
        assert tokens[start : start + 2].tolist() == [7, 8]
        assert [text_of[token] for token in tokens[start + 2 : end].tolist()] == f"{code:,}".split(
            ","
        )


def test_the_catalogue_is_that_of_beauty_in_barts_sub_words() -> None:
    """With an `</s>` an item as a node and `<s>` before the root: 24,206 nodes; with these two:
    1,103 tokens."""
    words = make_words(12_101, 10)
    trie = build_trie(*words.tokens_of_items())
    assert trie.num_nodes + 12_101 + 1 == 24_206
    assert len(np.unique(trie.token[1:])) + 2 == 1103
    assert trie.depth == 4
    assert words.tokens.max() == MASK


def test_a_batch_is_neither_a_short_nor_a_long_one(world: World) -> None:
    lengths = np.diff(world.words.offsets)[world.words.item_words(world.users.items)]
    tokens = [int(lengths[start:end].sum()) for start, end in pairwise(world.users.offsets)]
    dice = np.random.default_rng(7)
    longest = np.sort([max(tokens[user] for user in dice.permutation(80)[:4]) for _ in range(400)])
    rows = world.typical_users(4)
    assert longest[100] <= max(tokens[user] for user in rows) <= longest[300]
    assert len(set(rows)) == 4
    assert world.typical_users(4).tolist() == rows.tolist()


def test_the_tensor_mask_allows_what_the_dict_allows(world: World) -> None:
    after = allowed_tokens(world.words)
    mask = TensorMask(world.trie, CPU)
    dice = np.random.default_rng(3)
    prefixes = list(after)
    tokens, offsets = world.words.tokens_of_items()
    whole = tuple(tokens[offsets[5] : offsets[6]].tolist())
    for length in range(world.trie.depth + 1):
        rows = [prefix for prefix in prefixes if len(prefix) == length]
        rows = [rows[n] for n in dice.permutation(len(rows))[:20]]
        if length == len(whole) + 1:
            rows.append((*whole, EOS))  # behind the end of an item
        if length == 3:
            rows.append((*rows[0][:2], MASK))  # no node
        ids = torch.tensor([[MASK, *row] for row in rows])
        scores = torch.randn(len(rows), VOCABULARY)
        masked = mask(ids, scores)
        for row, prefix in enumerate(rows):
            allowed = torch.isfinite(masked[row]).nonzero()[:, 0].tolist()
            assert allowed == sorted(after.get(prefix, [EOS]))
            assert torch.equal(masked[row, allowed], scores[row, allowed])


def test_the_model_has_learned_to_spell(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All beams live to the last step, or it would be measured without its work; behind an item
    comes `</s>`."""
    opened: list[tuple[int, int]] = []
    count = trie_walk.num_open_beams

    def watched(scores_BK: torch.Tensor, *more: Any) -> int:
        opened.append((count(scores_BK, *more), scores_BK.shape[1]))
        return opened[-1][0]

    monkeypatch.setattr(trie_walk, "num_open_beams", watched)
    encoder, _ = world.batch(40)
    found = world.searcher.search(encoder, beam=6, top=6)
    assert opened == [(6, 6)] * 2
    assert (found.items >= 0).all()
    assert len({tuple(items) for items in found.items.tolist()}) > 5  # users differ
    batch = target_batch(encoder, found.items[:, 0], world.layout)
    with torch.inference_mode():
        hidden = world.model.decode(
            batch.decoder_input_ids, world.model.encode(encoder), encoder.attention_mask
        )
        shares = (
            world.model.lm_head(hidden)
            .softmax(-1)
            .gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]
        )
    assert shares[batch.labels == EOS].mean() > 0.9
    assert shares[:, :2].min() > 0.9  # ` item` and `_`
    assert float(shares[:, :2].max()) < 1


def test_lists_may_differ_only_where_scores_are_all_but_equal() -> None:
    scores = np.array([[-1.0, -2.0, -2.000004]], np.float32)
    ours = TopItems(np.array([[4, 5, 6]], np.int32), scores)
    swapped = TopItems(np.array([[4, 6, 5]], np.int32), scores)
    found = compare_lists(ours, swapped)
    assert found["items that differ"] == 2
    assert found["items compared"] == 3
    shifted = compare_lists(ours, TopItems(swapped.items, scores + np.float32(1e-4)))
    assert shifted["largest common shift of a user's scores"] == pytest.approx(1e-4, rel=0.01)
    with pytest.raises(AssertionError, match="rank 0"):
        compare_lists(ours, TopItems(ours.items, scores + np.float32(1e-3)))
    with pytest.raises(
        AssertionError, match="user 0 of the batch, rank 0: item 4 at -1, not 5 at -2"
    ):
        compare_lists(
            ours,
            TopItems(np.array([[5, 4, 6]], np.int32), np.array([[-2, -1, -2.000004]], np.float32)),
        )
    short = TopItems(np.array([[4, 5, -1]], np.int32), np.array([[-1, -2, -np.inf]], np.float32))
    with pytest.raises(AssertionError, match="rank 2: item 6"):
        compare_lists(ours, short)
    other = compare_lists(
        ours, TopItems(np.array([[4, 5, 9]], np.int32), scores)
    )  # another last item, as good
    assert other["items that differ"] == 1
    with pytest.raises(AssertionError, match="rank 2: item 6"):
        compare_lists(
            ours, TopItems(np.array([[4, 5, 9]], np.int32), scores - np.float32([0, 0, 1e-3]))
        )


@pytest.fixture(scope="module")
def measured() -> tuple[list[Claim], dict[str, Any]]:
    return bench_beam(sizes=SMALL)


def test_every_claim_is_made_of_what_was_measured(
    measured: tuple[list[Claim], dict[str, Any]], tmp_path: Path
) -> None:
    claims, table = measured
    by_id = {claim.id: claim for claim in claims}
    assert list(by_id) == [
        "exact, tiny, batch 3",
        "compact, tiny, batch 3",
        "trie, tiny, batch 3",
        "trie of 3,000 items",
    ]
    shape = table["shapes"]["tiny"]
    point = shape["batches"]["3"]
    for mode, goal in (("exact", 1), ("compact", 2)):
        claim = by_id[f"{mode}, tiny, batch 3"]
        assert claim.peer == GENERATE
        assert claim.ours == np.median(point["seconds"][mode])
        assert claim.ratio == pytest.approx(np.median(point["seconds"][GENERATE]) / claim.ours)
        assert claim.holds == (claim.ratio >= goal)
        assert point["users a second"][mode] == pytest.approx(3 / claim.ours)
    share = by_id["trie, tiny, batch 3"]
    assert 0 < share.ratio < 1
    assert share.holds == (share.ratio <= 0.01)
    assert share.ours == np.median(shape["trie share"]["seconds of the trie"])
    for size, repeats in (("1", 1), ("3", 2)):
        seconds = shape["batches"][size]["seconds"]
        assert {name: len(values) for name, values in seconds.items()} == {
            "exact": 2, "compact": 2, PLAIN: 2, TENSOR_MASK: repeats, GENERATE: repeats,
        }  # fmt: skip
    write_table(table, tmp_path / "beam.json")
    assert json.loads((tmp_path / "beam.json").read_text())["name"] == "beam"
    assert GENERATE in format_claims(claims)
    assert len(format_curves(table).splitlines()) == 3


def test_the_lists_of_all_peers_were_compared(measured: tuple[list[Claim], dict[str, Any]]) -> None:
    for size, point in measured[1]["shapes"]["tiny"]["batches"].items():
        compared = point["lists compared with exact"]
        assert list(compared) == [GENERATE, TENSOR_MASK, PLAIN]
        assert all(found["items that differ"] == 0 for found in compared.values())
        assert (
            compared[GENERATE]["items compared"]
            == 6 * int(size) - point["items dropped where ends are ranked"]
        )
        assert compared[PLAIN]["items compared"] == 6 * int(size)
        assert point["gap between neighbours of a list"]["median"] > 0.01


@pytest.mark.parametrize("broken", ["no item at all", "a branch cut off"])
def test_a_peer_with_other_lists_stops_the_measurement(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.allowed_tokens

    def changed(words: Any) -> Any:
        after = whole(words)
        if broken == "no item at all":
            return {**after, (): [EOS]}
        likely = max(after, key=lambda prefix: len(after[prefix]) if len(prefix) == 3 else 0)
        return {**after, likely: [EOS]}

    monkeypatch.setattr(bench, "allowed_tokens", changed)
    with pytest.raises(AssertionError, match=r"user \d of the batch, rank \d"):
        bench_beam(sizes=SMALL)


def test_the_share_of_the_trie_puts_everything_back(world: World) -> None:
    before = [getattr(module, name) for module, name in bench.TRIE_FUNCTIONS]
    share, more = measure_trie_share(world, 3, SMALL)
    assert [getattr(module, name) for module, name in bench.TRIE_FUNCTIONS] == before
    assert 0 < share < 1
    assert all(seconds > 0 for seconds in more["by function"].values())


def test_operations_are_those_that_torch_counts(world: World) -> None:
    """A user alone, so that nothing is padded; torch counts the decoder's attention to its own
    tokens too, and logits that are looked up beside the normaliser they are part of."""
    encoder, _ = world.batch(1)
    expected = flop_a_user(TINY, encoder.attention_mask.sum(1).numpy(), 20, world.trie)
    for mode, more in (("exact", 0.1), ("compact", 0.2)):
        with FlopCounterMode(display=False) as counter:
            world.searcher.search(encoder, beam=20, top=20, mode=mode)
        assert expected[mode] <= counter.get_total_flops() <= (1 + more) * expected[mode]


def test_the_trie_is_built_saved_and_loaded() -> None:
    (claim,), more = measure_trie(2000)
    assert claim.holds
    assert more["bytes a node and an item"] == [32, 8]
    assert (
        more["bytes"] == 32 * more["nodes"] + 8 * 2000 + 8 * 6
    )  # codes below 20,000: no third group
    assert set(more["seconds"]) == {"build", "save", "hash words and load", "restrict to half"}


def test_histories_of_data_are_decoded(tiny_data: Path) -> None:
    users = users_of(load_dataset(tiny_data).sequences, 1300)
    world = World(TINY, users, 1300, CPU)
    encoder, (index, items) = world.batch(200)  # more than there are users: they come again
    assert len(encoder.input_ids) == 200
    assert np.bincount(index).tolist() == np.diff(users.offsets)[world.typical_users(200)].tolist()
    assert items.max() < 64
    assert encoder.attention_mask.sum(1).max() == encoder.input_ids.shape[1]
    with pytest.raises(ValueError, match="64 items in the data, 10 in the benchmark"):
        users_of(load_dataset(tiny_data).sequences, 10)


def test_rivals_ask_for_no_scores_while_they_are_timed(world: World) -> None:
    encoder, _ = world.batch(1)
    assert make_rivals(world, encoder, 4)[GENERATE]().scores is None
    assert make_rivals(world, encoder, 4, scored=True)[GENERATE]().sequences_scores.shape == (4,)


# Beside an epoch.


@pytest.mark.dist
def test_evaluating_is_set_beside_an_epoch(tiny_run: Path, tiny_data: Path) -> None:
    """A real training in a process of its own, watched for some steps and ended."""
    files = sorted(path.name for path in tiny_run.iterdir())
    (claim,), more = evaluate_share(
        tiny_run,
        tiny_data,
        replace(SMALL, watched_steps=6, repeats_of_evaluating=1, oracle_users=30),
    )
    assert more["users"] == 120
    assert (
        more["seconds with baselines, intervals and files"][0]
        > more["seconds of decoding"][0]
        == claim.ours
        > 0
    )
    assert claim.theirs == more["seconds an epoch"][0] > 0
    assert claim.ratio == pytest.approx(claim.ours / claim.theirs)
    error = more["search error"]
    assert error["users"] == 30
    # 64 items: a beam of 50 comes near to all of them, and never above what scoring all of them
    # ranks first.
    assert error["beam 50"]["missed"] <= error["beam 20"]["missed"] < 1
    assert error["beam 20"]["NDCG@10 lost"] == pytest.approx(
        error["all"]["NDCG@10"] - error["beam 20"]["NDCG@10"]
    )
    assert sorted(path.name for path in tiny_run.iterdir()) == files


def write_events(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def step(number: int, time: float, epoch: int, stage: str = "finetune") -> dict[str, Any]:
    return {"event": "step", "step": number, "time": time, "epoch": epoch, "stage": stage}


def test_an_epoch_has_the_steps_up_to_its_validation(tmp_path: Path) -> None:
    pretrained = [{"event": "start"}, step(0, 100, 0, "pretrain"), step(9, 110, 0, "pretrain")]
    validated = {"event": "validation", "step": 29, "epoch": 0, "stage": "finetune"}
    first = [
        step(10, 200, 0),
        step(20, 220, 0),
        {"event": "start"},
        step(21, 900, 0),
        validated,
        step(30, 1000, 1),
    ]
    assert steps_of_an_epoch(write_events(tmp_path / "events.jsonl", pretrained + first)) == 20
    with pytest.raises(ValueError, match=r"events\.jsonl: no finished epoch of finetuning"):
        steps_of_an_epoch(write_events(tmp_path / "events.jsonl", pretrained + first[:4]))
    with pytest.raises(ValueError, match="no finished epoch of finetuning"):
        steps_of_an_epoch(tmp_path / "none" / "events.jsonl")


def test_a_run_needs_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "beam", "--run", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == "genrec: --run: give --data too, the directory the run was trained on\n"
    )
