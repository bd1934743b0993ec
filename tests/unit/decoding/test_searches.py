"""Every search against brute force over the whole catalogue, with its switches as parameters."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from beam_oracle import (
    ALPHABET,
    CHAIN,
    FIRST,
    GRID,
    MASK,
    MOST_ITEMS,
    NUM_USERS,
    ONE_TOKEN,
    PREFIXES,
    History,
    Switches,
    Word,
    World,
    all_pairs,
    assert_equals_truth,
    best_first,
    catalogues,
    draws_of_histories,
    histories_from,
    hugging_face,
    items_of,
    random_histories,
    sharp_model,
    switches,
)
from genrec_shards.sequences import Sequences
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec_dist.data.item_graph import Graph, KnnSettings
from genrec_dist.data.repeat_model import RepeatModel
from genrec_dist.decoding import exhaustive
from genrec_dist.decoding.beam_search import best_of, best_static, open_beams
from genrec_dist.decoding.decoder_state import DecoderState
from genrec_dist.decoding.rescoring import HistoryProbabilities
from genrec_dist.evaluation.score_mixture import Mixture, TextTerm

HISTORIES = [[0, 3], [], [1, 1, 2]]
EVERYTHING = Switches(forced=True, trimmed=True, unit="item", start="state", head=True)


REPEATS = RepeatModel(intercept=-1.0, age=-0.5, user_rate=0.5)


def graph_among(items: list[Word]) -> Graph:
    """Of random sequences over these items, some of which nobody ever took."""
    rng = np.random.default_rng(5)
    draws = rng.integers(0, max(1, len(items) - 1), 60).astype(np.int32)
    ids = [f"{row:03}" for row in range(len(items))]
    sequences = Sequences(draws, np.arange(0, 61, 6), [f"u{user}" for user in range(10)], ids)
    return Graph.of(sequences, "test", "n-2", KnnSettings(window=2, recent=3))


def graph_probabilities(items: list[Word], histories: list[History]) -> torch.Tensor:
    flat = np.array(list(chain(*histories)), np.int32)
    return graph_among(items).probabilities(flat, np.cumsum([0, *map(len, histories)]))


def repeat_probabilities(items: list[Word], histories: list[History]) -> torch.Tensor:
    flat = np.array(list(chain(*histories)), np.int32)
    return REPEATS.probabilities(flat, np.cumsum([0, *map(len, histories)]), len(items))


def text_probabilities(items: list[Word], histories: list[History]) -> torch.Tensor:
    """Any shares that sum to one, some of them zero, as of texts."""
    prob_BN = np.random.default_rng(6).random((len(histories), len(items))) ** 3
    prob_BN[:, ::3] = 0
    return torch.from_numpy(prob_BN / np.maximum(prob_BN.sum(1, keepdims=True), 1e-9))


def case(items: list[Word], draws: list[History], how: Switches, nodes_at_once: int) -> example:
    values = {"items": items, "draws": draws, "how": how, "nodes_at_once": nodes_at_once}
    return example(exclude=True, top=7, weights=(1.0, 1.0, 0.5), **values)


@pytest.mark.parametrize(
    "mode",
    [
        "exact",
        "compact",
        "all",
        "items",
        "hybrid",
        "hybrid, graph",
        "hybrid, repeat",
        "hybrid, text",
    ],
)
@settings(max_examples=20, deadline=None)
@given(
    items=catalogues,
    draws=draws_of_histories,
    how=switches,
    exclude=st.booleans(),
    top=st.sampled_from([1, 2, 3, 5, 10, MOST_ITEMS]),
    nodes_at_once=st.sampled_from([1, 3, 2048]),
    weights=st.sampled_from([(0.0, 0.3, 0.1), (0.5, 2.0, 0.9), (2.0, 1.0, 1e-6)]),
)
@case(PREFIXES, HISTORIES, Switches(), nodes_at_once=2)
@case(PREFIXES, [list(range(7)), [6]], EVERYTHING, nodes_at_once=1)
@case(PREFIXES, [list(range(7))], Switches(), nodes_at_once=1)
@case(ONE_TOKEN, [[0, 3], []], Switches(forced=True), nodes_at_once=2048)
@case(CHAIN, [[0], []], Switches(forced=True), nodes_at_once=1)
@case(PREFIXES, HISTORIES, Switches(architecture="t5"), nodes_at_once=2)
@case(PREFIXES, [list(range(7)), [6]], replace(EVERYTHING, architecture="t5"), nodes_at_once=1)
def test_search_equals_brute_force(
    items: list[Word],
    draws: list[History],
    how: Switches,
    exclude: bool,
    top: int,
    nodes_at_once: int,
    weights: tuple[float, float, float],
    mode: str,
) -> None:
    """With a beam as wide as the trie; `all` in any slices of the trie; hybrid with an item head, a
    graph, a repeat model, texts or several of these. A user who has everything gets an empty list, alone
    and beside others."""
    histories, parts = histories_from(draws, len(items)), {}
    mode, _, part = mode.partition(", ")
    if mode == "items" or (mode == "hybrid" and not part):
        how = replace(how, head=True)
    if mode == "hybrid":
        top = len(items)
        term = TextTerm(weight=0.7, epsilon=0.2)
        parts["mixture"] = Mixture(*weights, repeat_weight=1.5, repeat=REPEATS, text=term)
        parts["known"] = HistoryProbabilities(
            graph=graph_probabilities(items, histories) if part else None,
            text=text_probabilities(items, histories) if part == "text" else None,
            repeat=repeat_probabilities(items, histories) if part == "repeat" else None,
        )
    world = World(items, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exhaustive, "NODES_AT_ONCE", nodes_at_once)
        patch.setattr(exhaustive, "ROWS_AT_ONCE", 2 * nodes_at_once)
        beam = 1 if mode in ("all", "items") else world.widest_level
        assert_equals_truth(
            world, histories, exclude=exclude, beam=beam, top=top, mode=mode, **parts
        )


@settings(max_examples=20, deadline=None)
@given(
    catalogues, draws_of_histories, switches, st.integers(1, 8), st.integers(1, 8), st.booleans()
)
@example(PREFIXES, [[0]], Switches(), 3, 20, False)
def test_narrow_beam_lists_valid_items_in_full(
    items: list[Word], draws: list[History], how: Switches, beam: int, top: int, exclude: bool
) -> None:
    """Scores are those of brute force; lists are as long as they may be."""
    world, histories = World(items, how), histories_from(draws, len(items))
    truth_BN = world.truth(histories)
    lists = world.search(histories, beam=beam, top=top, exclude=exclude)
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        left = len(items) - (len(set(history)) if exclude else 0)
        assert len(found) == min(top, left)
        assert not exclude or not set(items_of(found)) & set(history)
        scores = [score for _, score in found]
        np.testing.assert_allclose(scores, truth_N[items_of(found)], rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(catalogues, draws_of_histories, switches, st.integers(0, 10**6))
@example(PREFIXES, HISTORIES, Switches(forced=True), 5)
@example(CHAIN, [[0], []], Switches(forced=True), 0)
@example(PREFIXES, HISTORIES, Switches(head=True), 5)
@example([(5, 6), (7,)], [[0], []], Switches(), 0)
def test_among_some_items_scores_stay_those_of_the_whole_catalogue(
    items: list[Word], draws: list[History], how: Switches, kept: int
) -> None:
    world, histories = World(items, how), histories_from(draws, len(items))
    rows = sorted({kept % len(items), kept // 7 % len(items)})
    world.searcher = world.searcher.among(np.array(rows))
    for mode in ("exact", "compact", "all", *(["items", "hybrid"] if how.head else [])):
        parts = {"mixture": Mixture()} if mode == "hybrid" else {}
        assert_equals_truth(
            world, histories, exclude=True, beam=60, top=2, mode=mode, allowed=rows, **parts
        )


@pytest.mark.parametrize("beam", [20, 64])
def test_search_finds_the_three_items_that_a_user_lacks(beam: int) -> None:
    world, left = World(all_pairs()), {4, 17, 38}
    history = [item for item in range(len(world.items)) if item not in left]
    lists = world.search([history, [1]], beam=beam, top=20, exclude=True)
    assert items_of(lists[0]) == best_first(world.truth([history])[0], history)
    assert set(items_of(lists[0])) == left
    assert len(lists[1]) == 20


@pytest.mark.parametrize("part", ["item head", "graph", "repeat", "text"])
def test_hybrid_lists_what_only_one_part_finds(part: str) -> None:
    """A narrow beam and few of the other part's: the best of each are among the candidates."""
    world = World(GRID, Switches(head=part == "item head"))
    (by_decoder,) = world.search([[1, 2]], beam=2, top=2)
    if part == "repeat":
        prob_BN = repeat_probabilities(GRID, [[1, 2]])
        heavy, parts = (
            Mixture(repeat_weight=1000.0, repeat=REPEATS),
            {"known": HistoryProbabilities(repeat=prob_BN)},
        )
        by_other = [1, 2]
    elif part == "graph":
        prob_BN = graph_probabilities(GRID, [[1, 2]])
        heavy, parts = Mixture(graph_weight=1000.0), {"known": HistoryProbabilities(graph=prob_BN)}
        by_other = prob_BN[0].topk(2).indices.tolist()
    elif part == "text":
        prob_BN = text_probabilities(GRID, [[1, 2]])
        heavy, parts = (
            Mixture(text=TextTerm(weight=1000.0)),
            {"known": HistoryProbabilities(text=prob_BN)},
        )
        by_other = prob_BN[0].topk(2).indices.tolist()
    else:
        heavy, parts = Mixture(1000.0), {}
        by_other = items_of(world.search([[1, 2]], beam=2, top=2, mode="items")[0])
    options = {"beam": 2, "top": 2, "mode": "hybrid", **parts}
    (found,) = world.search([[1, 2]], mixture=heavy, **options)
    assert set(items_of(by_decoder)) != set(by_other)
    assert set(items_of(found)) == set(by_other)
    (light,) = world.search([[1, 2]], mixture=Mixture(0.0), **options)
    candidates = {*items_of(by_decoder), *by_other}
    assert (
        items_of(light)
        == [item for item in best_first(world.truth([[1, 2]])[0], []) if item in candidates][:2]
    )


def test_hybrid_in_parts_lists_what_it_lists_of_all_users_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    histories, mixture = [[1, 2], [], [3]], Mixture(graph_weight=2.0, text=TextTerm(weight=3.0))
    known = HistoryProbabilities(
        graph=graph_probabilities(GRID, histories), text=text_probabilities(GRID, histories)
    )
    options = {"beam": 4, "top": 6, "mode": "hybrid", "mixture": mixture, "known": known}
    world = World(GRID)
    whole = world.search(histories, **options)
    monkeypatch.setattr(type(world.searcher), "_users_at_once", lambda self, encoder: 1)
    assert world.search(histories, **options) == whole


def test_hybrid_without_any_other_part_lists_what_the_decoder_does() -> None:
    world = World(GRID)
    options = {"beam": 20, "top": 7}
    assert world.search([[1, 2], [3]], mode="hybrid", **options) == world.search(
        [[1, 2], [3]], **options
    )


@pytest.mark.parametrize("prefix", [[MASK], [MASK, 6, 5]])
def test_decoder_state_equals_whole_sequences(prefix: list[int]) -> None:
    """Keys and values step by step, after a shared prefix and through a reordering of beams, to
    1e-10; a fork leaves the state as it is."""
    model, generator = sharp_model(), torch.Generator().manual_seed(0)
    encoder = World(all_pairs()).encoder([[0, 1, 2], [3], []])
    mask, shape, rows_B1 = encoder.attention_mask, (3, 4), torch.arange(3)[:, None]
    with torch.inference_mode():
        memory = model.encode(encoder)
        state = DecoderState(model, memory, mask)
        past = torch.tensor(prefix).expand(3, 1, -1)
        hidden = state.start(torch.tensor(prefix))
        assert (hidden - model.decode(past[:, 0], memory, mask)).abs().max() < 1e-10
        for _ in range(4):
            parents = torch.randint(past.shape[1], shape, generator=generator)
            tokens = torch.randint(FIRST, FIRST + ALPHABET, (*shape, 1), generator=generator)
            past = torch.cat([past[rows_B1, parents], tokens], dim=2)
            before = [pair and pair[0].clone() for pair in state.own]
            other = state.fork(parents)
            state.reorder_beams(parents)
            hidden = state.step(tokens[..., 0])
            copies = [tensor.repeat_interleave(4, 0) for tensor in (memory, mask)]
            whole = model.decode(past.flatten(0, 1), *copies)[:, -1].unflatten(0, shape)
            assert (hidden - whole).abs().max() < 1e-10
            assert torch.equal(other.step(tokens[..., 0]), hidden)
            assert all(
                (then is None) or then.shape[3] + 1 == now[0].shape[3]
                for then, now in zip(before, state.own, strict=True)
            )


# Hugging Face's constrained generate.


@pytest.fixture(scope="module")
def large_world() -> World:
    """300 items of 2 or 3 sub-words after a common prefix, as words have, some prefixes of
    others."""
    rng = np.random.default_rng(0)
    letters = range(FIRST + 1, FIRST + 25)
    pairs = [(FIRST, a, b) for a in letters for b in letters]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:180]]
    longer = [(*chosen[i], FIRST + 1 + int(rng.integers(24))) for i in range(120)]
    return World(chosen + longer, model=sharp_model(Switches(), FIRST + 25, 300))


@pytest.mark.parametrize(
    ("lengths", "beam", "ends"), [("one", 20, "kept"), ("all", 5, "ranked"), ("all", 20, "ranked")]
)
def test_beam_search_equals_constrained_generate(lengths: str, beam: int, ends: str) -> None:
    """For items of one length, and for all of them by `generate`'s rule for ends; the two rules do
    differ there."""
    letters = range(FIRST + 1, FIRST + 25)
    pairs = [(FIRST, a, b) for a in letters for b in letters if (7 * a + 3 * b) % 5 < 2]
    one = lengths == "one"
    world = (
        World(pairs, model=sharp_model(Switches(), FIRST + 25, 300)) if one else World(all_pairs())
    )
    encoder = world.encoder(random_histories(world, 40))
    found = world.searcher.search(encoder, beam=beam, top=beam, ends=ends)
    for row, (items, scores) in enumerate(
        hugging_face(world.model, world.layout.words, encoder, beam)
    ):
        assert len(items) == beam or not one
        assert found.items[row].tolist()[: len(items)] == items
        np.testing.assert_allclose(found.scores[row, : len(items)], scores, rtol=1e-6)
    kept = world.searcher.search(encoder, beam=beam, top=beam)
    assert (found.items != kept.items).any() == (not one)


def test_beam_search_holds_what_generate_finds_and_only_better_items(large_world: World) -> None:
    """Items of several lengths: `generate` drops an end that is below `num_beams` other candidates
    of its step, ours keeps it. So ours holds its items in its order, and between them only items
    whose true score belongs there."""
    histories = random_histories(large_world, 20)
    truth_BN = large_world.truth(histories)
    lists = large_world.search(histories, beam=20, top=20)
    encoder = large_world.encoder(histories)
    theirs = hugging_face(large_world.model, large_world.layout.words, encoder, 20)
    for (items, scores), found, truth_N in zip(theirs, lists, truth_BN, strict=True):
        assert len(items) >= 15
        np.testing.assert_allclose(scores, truth_N[items], rtol=1e-6)
        ours = items_of(found)
        assert ours == sorted(ours, key=lambda item: -truth_N[item])
        num_held = sum(truth_N[items] >= truth_N[ours[-1]])
        assert [item for item in ours if item in items] == items[:num_held]


def test_company_and_padding_change_nothing(large_world: World) -> None:
    histories, users = random_histories(large_world, 12), [n % NUM_USERS for n in range(12)]
    options = {"beam": 20, "top": 20, "exclude": True}
    together = large_world.search(histories, **options)
    backwards = large_world.search(histories[::-1], users=users[::-1], **options)
    assert list(map(items_of, backwards[::-1])) == list(map(items_of, together))
    for history, user, expected in zip(histories, users, together, strict=True):
        (alone,) = large_world.search([history], users=[user], **options)
        assert items_of(alone) == items_of(expected)
        np.testing.assert_allclose([s for _, s in alone], [s for _, s in expected], rtol=1e-6)


def test_beam_narrower_than_the_list_is_widened(large_world: World) -> None:
    assert large_world.search([[1]], beam=1, top=20) == large_world.search([[1]], beam=20, top=20)


# Ties and the end of a search.


def test_equal_scores_go_to_the_smaller_node() -> None:
    """A model without weights gives every token the same probability: only the rule orders items of
    one length."""
    model = sharp_model.__wrapped__()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    world = World(all_pairs()[::-1], model=model)
    expected = sorted(
        range(len(world.items)), key=lambda row: (len(world.items[row]), world.items[row])
    )
    for mode, beam in (("exact", 20), ("exact", 64), ("all", 1)):
        (found,) = world.search([[0]], beam=beam, top=20, mode=mode)
        assert items_of(found) == expected[:20]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -1.0, -2.0, float("-inf")]), min_size=1, max_size=30),
    st.integers(1, 8),
    st.data(),
)
def test_best_of_and_best_static_sort_by_score_then_node(
    scores: list[float], count: int, data: st.DataObject
) -> None:
    nodes = data.draw(st.permutations(range(len(scores))))
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], nodes[place]))[:count]
    finite = [place for place in order if scores[place] > float("-inf")]
    for best in (best_of, best_static):
        kept, kept_nodes, places = best(
            torch.tensor([scores]), lambda places: torch.tensor(nodes)[places], count
        )
        assert places[0].tolist()[: len(finite)] == finite
        assert kept_nodes[0].tolist()[: len(finite)] == [nodes[place] for place in finite]
        assert kept[0].tolist() == [scores[place] for place in order]


BEAMS = [[-1.0, -2.0, -3.0, -4.0], [-1.0, -5.0, -5.0, -6.0]]
NO_SCORE = float("-inf")


@pytest.mark.parametrize(
    ("beams", "found", "top", "num_open"),
    [
        (BEAMS, [[-0.5, -2.9], [-0.5, -4.0]], 2, [2, 1]),
        (BEAMS, [[-0.5, -2.9], [-0.5, -5.5]], 2, [2, 3]),
        (BEAMS, [[-0.1, -3.0], [-0.1, -1.0]], 2, [2, 0]),  # a tie goes to what is found
        (BEAMS, [[-0.1, -1.0], [-0.1, -1.0]], 2, [0, 0]),
        (BEAMS, [[-0.1, -1.0], [-0.1, -1.0]], 3, [4, 4]),  # a list with room takes any
        (BEAMS, [[NO_SCORE] * 2] * 2, 2, [4, 4]),
        ([[NO_SCORE] * 4] * 2, [[NO_SCORE] * 2] * 2, 2, [0, 0]),
    ],
)
def test_open_beams_drops_beams_only_where_their_user_cannot_gain(
    beams: list[list[float]], found: list[list[float]], top: int, num_open: list[int]
) -> None:
    open_BK = open_beams(torch.tensor(beams), torch.tensor(found), top)
    assert open_BK.tolist() == [[beam < n for beam in range(4)] for n in num_open]


@pytest.mark.parametrize(
    ("how", "mode", "message"),
    [
        (Switches(), "greedy", "decode mode 'greedy': choose one of exact, compact, free, all"),
        (Switches(), "free", "needs the run's tokenizer"),
        (Switches(forced=True), "free", r"decode mode free: .* tokens\.forced learned"),
        (Switches(), "items", r"no item head: train with model\.item_loss"),
    ],
)
def test_search_refuses_what_it_cannot_do(how: Switches, mode: str, message: str) -> None:
    world = World(PREFIXES, how)
    world.searcher.texts = object() if how.forced else None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        world.search([[0]], beam=2, top=2, mode=mode)
