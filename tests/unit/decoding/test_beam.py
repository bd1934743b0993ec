"""The beam against brute force over the whole catalogue, and against Hugging Face's own constrained
search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from beam_oracle import (
    ALPHABET,
    BOS,
    EOS,
    FIRST,
    MASK,
    MOST_ITEMS,
    NUM_USERS,
    PAD,
    PREFIXES,
    History,
    Word,
    World,
    all_pairs,
    best_first,
    catalogues,
    histories_of,
    hugging_face,
    random_histories,
    sharp_model,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from genrec_dist.config.recipe import Model
from genrec_dist.decoding import beam_search as trie_walk
from genrec_dist.decoding.beam_search import best_of, best_static, num_open_beams
from genrec_dist.decoding.decoder_state import DecoderState
from genrec_dist.model.build import ModelSizes, build_model
from genrec_dist.model.genrec import GenRecForConditionalGeneration


def assert_equals_brute_force(
    world: World, histories: list[History], exclude: bool, top: int
) -> None:
    truth_BN = world.brute_force(histories)
    lists = world.search(histories, beam=world.widest_level, top=top, exclude=exclude)
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        assert [item for item, _ in found] == best_first(truth_N, history if exclude else [])[:top]
        np.testing.assert_allclose(
            [score for _, score in found], [truth_N[item] for item, _ in found], rtol=1e-6
        )


@settings(max_examples=40, deadline=None)
@given(
    catalogues,
    histories_of,
    st.booleans(),
    st.sampled_from([1, 2, 3, 5, 10, MOST_ITEMS]),
    st.booleans(),
)
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, 7, True)
@example(PREFIXES, [list(range(7)), [6]], True, 7, False)
def test_a_wide_beam_equals_brute_force(
    items: list[Word], draws: list[History], exclude: bool, top: int, by_table: bool
) -> None:
    """The best items or all of them, in order, with their scores; shorter lists where the history
    is excluded. Children are found by a table or by their numbers."""
    histories = [[draw % len(items) for draw in history] for history in draws]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_walk, "TABLE_ENTRIES", 2**22 if by_table else 0)
        assert_equals_brute_force(World(items, sharp_model()), histories, exclude, top)


@settings(max_examples=40, deadline=None)
@given(catalogues, histories_of, st.integers(1, 8), st.integers(1, 8), st.booleans(), st.booleans())
def test_a_narrow_beam_lists_valid_items_in_full(
    items: list[Word], draws: list[History], beam: int, top: int, exclude: bool, by_table: bool
) -> None:
    """Scores are those of brute force; as long as asked for wherever no dead end can eat a beam."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_walk, "TABLE_ENTRIES", 2**22 if by_table else 0)
        world = World(items, sharp_model())
    histories = [[draw % len(items) for draw in history] for history in draws]
    truth_BN = world.brute_force(histories)
    lists = world.search(histories, beam=beam, top=top, exclude=exclude)
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        left = len(items) - (len(set(history)) if exclude else 0)
        assert len(found) == min(top, left)
        assert not exclude or not {item for item, _ in found} & set(history)
        np.testing.assert_allclose(
            [score for _, score in found], [truth_N[item] for item, _ in found], rtol=1e-6
        )


def test_more_asked_for_than_there_is_gives_all_then_nothing() -> None:
    world = World(PREFIXES, sharp_model())
    (found,) = world.search([[0]], beam=3, top=20)
    assert sorted(item for item, _ in found) == list(range(len(PREFIXES)))


@pytest.mark.parametrize("beam", [20, 64])
def test_a_user_who_has_all_but_three_gets_these_three(beam: int) -> None:
    world = World(all_pairs(), sharp_model())
    left = {4, 17, 38}
    history = [item for item in range(len(world.items)) if item not in left]
    truth_BN = world.brute_force([history, [1]])
    lists = world.search([history, [1]], beam=beam, top=20, exclude=True)
    assert [item for item, _ in lists[0]] == best_first(truth_BN[0], history)
    assert {item for item, _ in lists[0]} == left
    assert len(lists[1]) == 20


def test_a_user_who_has_everything_gets_an_empty_list() -> None:
    """Alone and beside others, whose lists she must not change: her beams stand at the root with
    -inf for good."""
    world = World(all_pairs(), sharp_model())
    everything = list(range(len(world.items)))
    assert world.search([everything], beam=20, top=20, exclude=True) == [[]]
    both = world.search([everything, [3, 5]], beam=20, top=20, exclude=True)
    alone = world.search([[3, 5]], beam=20, top=20, exclude=True, users=[1])
    assert both[0] == []
    assert [item for item, _ in both[1]] == [item for item, _ in alone[0]]
    assert len(both[1]) == 20


@pytest.mark.parametrize("prefix", [[MASK], [MASK, 6, 5]])
def test_the_incremental_decoder_equals_whole_sequences(prefix: list[int]) -> None:
    """Keys and values step by step, behind a shared prefix and through a reordering of beams, to
    1e-10."""
    model, generator = sharp_model(), torch.Generator().manual_seed(0)
    world = World(all_pairs(), model)
    encoder = world.encoder([[0, 1, 2], [3], []])
    num_users, num_beams, steps = 3, 4, 4
    with torch.inference_mode():
        memory = model.encode(encoder)
        state = DecoderState(model, memory, encoder.attention_mask)
        past = torch.tensor(prefix).expand(num_users, 1, -1)
        hidden = state.start(torch.tensor(prefix))
        assert (
            hidden - causal_states(model, past[:, 0], memory, encoder.attention_mask)
        ).abs().max() < 1e-10
        for _ in range(steps):
            parents = torch.randint(past.shape[1], (num_users, num_beams), generator=generator)
            tokens = torch.randint(
                FIRST, FIRST + ALPHABET, (num_users, num_beams, 1), generator=generator
            )
            past = torch.cat([past[torch.arange(num_users)[:, None], parents], tokens], dim=2)
            before = [pair and pair[0].clone() for pair in state.own]
            other = state.fork(parents)
            state.follow(parents)
            hidden = state.step(tokens[..., 0])
            rows = past.flatten(0, 1)
            whole = causal_states(
                model,
                rows,
                memory.repeat_interleave(num_beams, 0),
                encoder.attention_mask.repeat_interleave(num_beams, 0),
            )
            assert (hidden - whole[:, -1].unflatten(0, (num_users, num_beams))).abs().max() < 1e-10
            assert torch.equal(other.step(tokens[..., 0]), hidden)
            assert all(
                (then is None) or then.shape[3] + 1 == now[0].shape[3]
                for then, now in zip(before, state.own, strict=True)
            )


def causal_states(
    model: GenRecForConditionalGeneration, rows_RT: Tensor, memory: Tensor, mask: Tensor
) -> Tensor:
    return model.decode(rows_RT, memory, mask)


@pytest.fixture(scope="module")
def large_world() -> World:
    """300 items of 2 or 3 sub-words behind a common prefix, as words have, some prefixes of
    others."""
    rng = np.random.default_rng(0)
    stem, letters = FIRST, range(FIRST + 1, FIRST + 25)
    pairs = [(stem, a, b) for a in letters for b in letters]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:180]]
    longer = [(*chosen[i], FIRST + 1 + int(rng.integers(24))) for i in range(120)]
    return World(chosen + longer, sharp_model(FIRST + 25, 300))


def test_hugging_face_finds_the_same_lists() -> None:
    """Items of one length: the two searches have the same rules, so all 20 agree, in order."""
    letters = range(FIRST + 1, FIRST + 25)
    pairs = [(FIRST, a, b) for a in letters for b in letters if (7 * a + 3 * b) % 5 < 2]
    world = World(pairs, sharp_model(FIRST + 25, 300))
    histories = random_histories(world, 50)
    lists = world.search(histories, beam=20, top=20)
    for (items, scores), found in zip(hugging_face(world, histories, 20), lists, strict=True):
        assert len(items) == 20
        assert items == [item for item, _ in found]
        np.testing.assert_allclose(scores, [score for _, score in found], rtol=1e-6)


def test_what_hugging_face_finds_is_in_our_list_and_what_it_misses_scores_higher(
    large_world: World,
) -> None:
    """Items of several lengths: `generate` drops an end that stands below `num_beams` other
    candidates of its step, ours keeps it. So ours holds its items in its order, and between them
    only items whose true score belongs there."""
    histories = random_histories(large_world, 50)
    truth_BN = large_world.brute_force(histories)
    lists = large_world.search(histories, beam=20, top=20)
    for (items, scores), found, truth_N in zip(
        hugging_face(large_world, histories, 20), lists, truth_BN, strict=True
    ):
        assert len(items) >= 15
        np.testing.assert_allclose(scores, truth_N[items], rtol=1e-6)
        ours = [item for item, _ in found]
        assert ours == sorted(ours, key=lambda item: -truth_N[item])
        assert [item for item in ours if item in items] == items[
            : sum(truth_N[items] >= truth_N[ours[-1]])
        ]


def test_excluded_items_are_replaced_by_the_next_best(large_world: World) -> None:
    """The first 20 of the plain list become the history: the pruned search is full without them."""
    plain = large_world.search([[]], beam=300, top=20, users=[0])
    history = [item for item, _ in plain[0]]
    truth_BN = large_world.brute_force([history])
    (found,) = large_world.search([history], beam=300, top=20, exclude=True)
    assert [item for item, _ in found] == best_first(truth_BN[0], history)[:20]
    (narrow,) = large_world.search([history], beam=20, top=20, exclude=True)
    assert len(narrow) == 20
    assert not {item for item, _ in narrow} & set(history)


def test_company_and_padding_change_nothing(large_world: World) -> None:
    histories = random_histories(large_world, 12)
    together = large_world.search(histories, beam=20, top=20, exclude=True)
    backwards = large_world.search(
        histories[::-1],
        beam=20,
        top=20,
        exclude=True,
        users=[n % NUM_USERS for n in range(12)][::-1],
    )
    assert [[item for item, _ in found] for found in backwards[::-1]] == [
        [i for i, _ in found] for found in together
    ]
    for number, history in enumerate(histories):
        (alone,) = large_world.search(
            [history], beam=20, top=20, exclude=True, users=[number % NUM_USERS]
        )
        assert [item for item, _ in alone] == [item for item, _ in together[number]]
        np.testing.assert_allclose(
            [s for _, s in alone], [s for _, s in together[number]], rtol=1e-6
        )


def test_a_beam_narrower_than_the_list_is_widened(large_world: World) -> None:
    assert large_world.search([[1]], beam=1, top=20) == large_world.search([[1]], beam=20, top=20)


def test_equal_scores_go_to_the_smaller_node() -> None:
    """A model without weights gives every token the same probability: only the rule orders items of
    one length."""
    model = build_model(
        Model(d_model=16, encoder_layers=1, decoder_layers=1, heads=2, ffn=32, max_tokens=64),
        ModelSizes(
            vocab_size=FIRST + ALPHABET,
            num_users=NUM_USERS,
            num_items=MOST_ITEMS,
            num_masks=1,
            special={"bos": BOS, "pad": PAD, "eos": EOS, "mask": MASK},
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    world = World(all_pairs()[::-1], model.double().eval())
    expected = sorted(
        range(len(world.items)), key=lambda row: (len(world.items[row]), world.items[row])
    )
    for beam in (20, 64):
        (found,) = world.search([[0]], beam=beam, top=20)
        assert [item for item, _ in found] == expected[:20]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -1.0, -2.0, float("-inf")]), min_size=1, max_size=30),
    st.integers(1, 8),
    st.data(),
)
def test_the_best_are_a_sort_by_score_then_node(
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


def test_beams_are_dropped_only_where_no_user_can_gain() -> None:
    beams = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -5.0, -5.0, -6.0]])
    assert num_open_beams(beams, torch.tensor([[-0.5, -2.9], [-0.5, -4.0]]), top=2) == 2
    assert num_open_beams(beams, torch.tensor([[-0.5, -2.9], [-0.5, -5.5]]), top=2) == 3
    assert (
        num_open_beams(beams, torch.tensor([[-0.1, -3.0], [-0.1, -1.0]]), top=2) == 2
    )  # a tie goes to what is found
    assert num_open_beams(beams, torch.tensor([[-0.1, -1.0], [-0.1, -1.0]]), top=2) == 0
    assert (
        num_open_beams(beams, torch.tensor([[-0.1, -1.0], [-0.1, -1.0]]), top=3) == 4
    )  # a list with room takes any
    assert num_open_beams(beams, torch.full((2, 2), -torch.inf), top=2) == 4
    assert (
        num_open_beams(torch.full((2, 4), -torch.inf), torch.full((2, 2), -torch.inf), top=2) == 0
    )
