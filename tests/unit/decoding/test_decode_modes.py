"""The other ways to decode, each against brute force: compact, all, free; and the search in shapes
that a graph can capture."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from beam_oracle import (
    EOS,
    MASK,
    MOST_ITEMS,
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
from torch.utils._python_dispatch import TorchDispatchMode

from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import ItemTexts, item_text
from genrec_dist.decoding import beam_search as trie_walk
from genrec_dist.decoding import exhaustive as score_all
from genrec_dist.decoding import output_head as head
from genrec_dist.decoding.output_head import Softmax
from genrec_dist.decoding.searcher import TrieSearcher, encode_by_length, in_static_shape


def pairs_of(histories: list[History]) -> tuple[np.ndarray, np.ndarray]:
    index = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return index, np.array([item for history in histories for item in history], np.int32)


def in_float32(world: World, **options: Any) -> TrieSearcher:
    model = sharp_model(world.model.config.vocab_size, world.model.config.num_items)
    return TrieSearcher(copy.deepcopy(model).float(), world.searcher.trie, **options)


# all: the oracle.


@settings(max_examples=30, deadline=None)
@given(
    catalogues,
    histories_of,
    st.booleans(),
    st.sampled_from([1, 5, MOST_ITEMS]),
    st.sampled_from([1, 3, 2048]),
)
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, 7, 2)
def test_all_scores_the_whole_catalogue(
    items: list[Word], draws: list[History], exclude: bool, top: int, nodes_at_once: int
) -> None:
    """As brute force does, whatever slices of the trie go down together."""
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = World(items, sharp_model())
    truth_BN = world.brute_force(histories)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_all, "NODES_AT_ONCE", nodes_at_once)
        patch.setattr(score_all, "ROWS_AT_ONCE", 2 * nodes_at_once)
        lists = world.search(histories, beam=1, top=top, exclude=exclude, mode="all")
    for history, found, truth_N in zip(histories, lists, truth_BN, strict=True):
        assert [item for item, _ in found] == best_first(truth_N, history if exclude else [])[:top]
        np.testing.assert_allclose(
            [score for _, score in found], truth_N[[item for item, _ in found]], rtol=1e-6
        )


@settings(max_examples=40, deadline=None)
@given(catalogues, histories_of, st.booleans(), st.integers(1, MOST_ITEMS))
@example(PREFIXES, [[0, 3], [], [1, 1, 2]], True, 7)
def test_a_beam_as_wide_as_the_trie_is_the_oracle(
    items: list[Word], draws: list[History], exclude: bool, top: int
) -> None:
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = World(items, sharp_model())
    wide = world.search(histories, beam=world.widest_level, top=top, exclude=exclude)
    oracle = world.search(histories, beam=1, top=top, exclude=exclude, mode="all")
    assert [[item for item, _ in found] for found in wide] == [
        [item for item, _ in found] for found in oracle
    ]


# compact: the softmax over the trie's tokens.


@settings(max_examples=30, deadline=None)
@given(catalogues, histories_of, st.booleans())
@example(PREFIXES, [[0, 3], []], False)
def test_compact_normalises_over_the_trie_alone(
    items: list[Word], draws: list[History], exclude: bool
) -> None:
    """Equal to `exact` with a model that gives all other tokens no probability, as one does that
    was trained without them."""
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = World(items, sharp_model())
    used = sorted({EOS, *(token for item in items for token in item)})
    beam = world.widest_level
    found = world.search(histories, beam=beam, top=20, exclude=exclude, mode="compact")
    truth_BN = brute_force_over(world, histories, used)
    for history, listed, truth_N in zip(histories, found, truth_BN, strict=True):
        assert [item for item, _ in listed] == best_first(truth_N, history if exclude else [])[:20]
        np.testing.assert_allclose(
            [score for _, score in listed], truth_N[[i for i, _ in listed]], rtol=1e-6, atol=1e-9
        )


def brute_force_over(world: World, histories: list[History], tokens: list[int]) -> np.ndarray:
    """As `World.brute_force`, the logits of all other tokens at -inf."""
    others = torch.ones(world.model.config.vocab_size, dtype=torch.bool)
    others[tokens] = False
    hook = world.model.lm_head.register_forward_hook(
        lambda *call: call[2].masked_fill(others, -torch.inf)
    )
    try:
        return world.brute_force(histories)
    finally:
        hook.remove()


def test_compact_and_exact_differ_where_the_softmaxes_do() -> None:
    world = World([(5,), (6,)], sharp_model())
    exact, compact = (
        world.search([[0]], beam=2, top=2, mode=mode)[0] for mode in ("exact", "compact")
    )
    assert all(c > e for (_, e), (_, c) in zip(sorted(exact), sorted(compact), strict=True))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match="decode mode 'greedy': choose one of exact, compact, free, all"
    ):
        World(PREFIXES, sharp_model()).search([[0]], beam=1, top=1, mode="greedy")


# free: no trie.


class Letters:
    """Reads the words of a small world."""

    def __init__(self, items: list[Word]):
        self.row_of = {item: row for row, item in enumerate(items)}

    def rows(self, strings: list[np.ndarray]) -> np.ndarray:
        return np.array(
            [self.row_of.get(tuple(string.tolist()), -2) for string in strings], np.int32
        )


def free_searcher(world: World) -> TrieSearcher:
    return TrieSearcher(world.model, world.searcher.trie, texts=Letters(world.items))  # type: ignore[arg-type]


@torch.inference_mode()
def strings_best_first(
    world: World, history: History, user: int, longest: int
) -> list[tuple[Word, float]]:
    """Every token string there is, by log-probability, `</s>` included."""
    encoder = world.encoder([history], [user])
    memory = world.model.encode(encoder)
    vocabulary = [token for token in range(world.model.config.vocab_size) if token != EOS]
    scored = []
    for length in range(longest + 1):
        strings = torch.tensor(list(itertools.product(vocabulary, repeat=length)), dtype=torch.long)
        rows = torch.cat([torch.full((len(strings), 1), MASK), strings], 1)
        hidden = world.model.decode(
            rows, memory.expand(len(rows), -1, -1), encoder.attention_mask.expand(len(rows), -1)
        )
        logprobs = world.model.lm_head(hidden).log_softmax(-1)
        wanted = torch.cat([strings, torch.full((len(strings), 1), EOS)], 1)
        scores = logprobs.gather(2, wanted[..., None])[..., 0].sum(1)
        scored += list(zip(map(tuple, strings.tolist()), scores.tolist(), strict=True))
    return sorted(scored, key=lambda pair: -pair[1])


def test_free_finds_the_best_of_all_strings_and_says_which_are_items() -> None:
    items = [(5,), (6, 7), (8, 8), (5, 6)]
    world = World(items, sharp_model())
    found = free_searcher(world).search(world.encoder([[0], [2, 1]]), beam=81, top=30, mode="free")
    row_of = {item: row for row, item in enumerate(items)}
    for row, history in enumerate([[0], [2, 1]]):
        truth = strings_best_first(world, history, row, longest=2)[:30]
        assert found.items[row].tolist() == [row_of.get(string, -2) for string, _ in truth]
        np.testing.assert_allclose(found.scores[row], [score for _, score in truth], rtol=1e-5)
    assert (found.items == -2).any()


def test_free_strikes_excluded_items_out_and_the_list_closes_up() -> None:
    items = [(5,), (6, 7), (8, 8), (5, 6)]
    world, searcher = World(items, sharp_model()), free_searcher(World(items, sharp_model()))
    encoder = world.encoder([[0], [2, 1]])
    plain = searcher.search(encoder, beam=81, top=81, mode="free")
    struck = searcher.search(
        encoder, beam=81, top=81, mode="free", excluded=pairs_of([[0], [2, 1]])
    )
    for row, history in enumerate([[0], [2, 1]]):
        kept = [
            (i, s)
            for i, s in zip(plain.items[row].tolist(), plain.scores[row].tolist(), strict=True)
            if i not in history
        ]
        assert struck.items[row].tolist() == [i for i, _ in kept] + [-1] * (81 - len(kept))
        assert struck.scores[row].tolist()[: len(kept)] == [s for _, s in kept]
        assert np.isneginf(struck.scores[row, len(kept) :]).all()
        assert len(kept) < 81


def test_free_without_a_tokenizer_is_refused() -> None:
    world = World(PREFIXES, sharp_model())
    with pytest.raises(ValueError, match="needs the run's tokenizer"):
        world.search([[0]], beam=1, top=1, mode="free")


def test_texts_are_read_by_the_numbering_and_to_the_letter() -> None:
    """Other cuts of an item's word are that item, and so may stand twice; digits inside another
    text are none."""
    codes = [str(number) for number in range(120)]
    tokenizer = train_tokenizer(codes, 280)
    texts = ItemTexts(tokenizer, codes)

    def spelled(*parts: str) -> list[int]:
        return [
            token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)
        ]

    word = item_text("117")
    assert texts.rows([spelled(word), spelled(*word)]).tolist() == [117, 117]
    assert spelled(word) != spelled(*word)
    wrong = [" item_0117", "item_117", " user_117", " item_117 item_3", " item_", "117", ""]
    assert texts.rows([spelled(text) for text in wrong]).tolist() == [-2] * len(wrong)
    assert texts.rows([[*spelled(item_text("5")), tokenizer.mask_token_id]]).tolist() == [-2]


# Ends by the rule of `generate`.


@pytest.mark.parametrize("beam", [5, 20])
def test_ranked_ends_give_the_lists_of_hugging_face_for_items_of_all_lengths(beam: int) -> None:
    world = World(all_pairs(), sharp_model())
    histories = random_histories(world, 40)
    searcher, encoder = world.searcher, world.encoder(histories)
    found = searcher.search(encoder, beam=beam, top=beam, ends="ranked")
    kept = searcher.search(encoder, beam=beam, top=beam)
    for row, (items, scores) in enumerate(hugging_face(world, histories, beam)):
        assert found.items[row].tolist()[: len(items)] == items
        np.testing.assert_allclose(found.scores[row, : len(items)], scores, rtol=1e-6)
    assert (found.items != kept.items).any()  # the two rules do differ here


# The normaliser.


@pytest.mark.parametrize("columns", [1024, 5000])
@pytest.mark.parametrize("scale", [0.05, 30.0])
def test_the_normaliser_is_that_of_the_whole_softmax(
    columns: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, with and without the pass for the largest logit; logits in the hundreds do not
    overflow."""
    monkeypatch.setattr(head, "CPU_LOGITS_AT_ONCE", 7 * columns)
    torch.manual_seed(0)
    weight, hidden = scale * torch.randn(3000, 16), torch.randn(7, 1, 16)
    softmax = Softmax(weight, 2047)
    assert softmax._bounded(hidden[:, 0]) == (scale < 1)
    eos = hidden @ weight[2047]
    expected = (hidden.double() @ weight.double().T).logsumexp(-1)
    torch.testing.assert_close(
        softmax.log_normaliser(hidden, eos).double(), expected, rtol=1e-6, atol=1e-6
    )
    other = softmax.log_normaliser(hidden, eos + 20 * scale)
    assert (other > expected).all()  # the logit of </s> is the one that was given


def rows_behind_items(shares: list[float]) -> tuple[Softmax, torch.Tensor]:
    """A head of 3,000 tokens and rows [R, 1, D] after which all tokens but `</s>` together have
    these shares of probability."""
    torch.manual_seed(1)
    weight = 0.05 * torch.randn(3000, 32)
    weight[2] *= 10  # the longest, as `</s>` has it in a trained head
    softmax = Softmax(weight, 2)
    base = torch.randn(len(shares), 32)
    direction = weight[2] / weight[2].norm() ** 2
    hidden = base
    for _ in range(60):  # raise the logit of </s> until the others have what they shall
        logits = hidden.double() @ weight.double().T
        others = logits.index_fill(1, torch.tensor([2]), -torch.inf).logsumexp(1)
        wanted = others - torch.tensor(shares).double().log()
        hidden = hidden + 0.5 * (wanted - logits[:, 2]).float()[:, None] * direction
    return softmax, hidden[:, None]


@pytest.mark.parametrize("doubtful", [0, 20, 300])
def test_behind_items_bfloat16_moves_no_score(
    doubtful: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows where `</s>` is certain go through bfloat16, others through float32; all come out as
    float32 has them."""
    monkeypatch.setattr(head, "_has_bfloat16_units", lambda device: True)
    rng = np.random.default_rng(0)
    shares = rng.permutation([1e-6] * (320 - doubtful) + [0.3] * doubtful).tolist()
    softmax, hidden = rows_behind_items(shares)
    eos = hidden @ softmax.weight_VD[2]
    expected = (hidden.double() @ softmax.weight_VD.double().T).logsumexp(-1)
    found_shares = -torch.expm1((hidden.double() @ softmax.weight_VD[2].double()) - expected)[:, 0]
    np.testing.assert_allclose(found_shares, np.array(shares) / (1 + np.array(shares)), rtol=0.05)
    rough: list[int] = []
    in_bfloat16, in_full = softmax._sum_of_others_in_bfloat16, softmax.log_normaliser
    full: list[int] = []
    monkeypatch.setattr(
        softmax,
        "_sum_of_others_in_bfloat16",
        lambda rows: rough.append(len(rows)) or in_bfloat16(rows),
    )
    monkeypatch.setattr(
        softmax, "log_normaliser", lambda rows, eos: full.append(len(rows)) or in_full(rows, eos)
    )
    found = softmax.log_normaliser_behind_items(hidden, eos)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)
    if doubtful == 300:
        assert rough == []  # a look at a few rows tells that it is not worth it
    else:
        assert rough == [320]
        assert full[1:] == ([doubtful] if doubtful else [])
    unchecked = (
        eos + torch.log1p(in_bfloat16(hidden[:, 0])[:, None] * (-eos.double()).exp())
    ).float()
    if doubtful:
        assert (unchecked - expected).abs().max() > head.NEGLIGIBLE  # what the check keeps out


# Shapes.


def test_histories_of_like_length_are_encoded_together() -> None:
    world = World(all_pairs(), sharp_model())
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 56, rng.integers(0, 15)).tolist() for _ in range(40)]
    encoder = world.encoder(histories)
    with torch.inference_mode():
        whole, grouped = world.model.encode(encoder), encode_by_length(world.model, encoder)
    mask = encoder.attention_mask
    assert (whole - grouped)[mask].abs().max() < 1e-12


class Watch(TorchDispatchMode):
    """Names and shapes of all operators, none of which may hand a value to Python or make a shape
    of one."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "unique",
        "repeat_interleave",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        assert not any(name.startswith(word) for word in self.FORBIDDEN), f"{name} looks at values"
        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(value.shape) for value in _tensors(result))
        self.seen.append((str(func), shapes))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def static_walk(
    world: World, searcher: TrieSearcher, histories: list[History], **sizes: int
) -> list[Any]:
    """What the walk does after the encoder, which is where a captured graph would begin."""
    seen: list[Any] = []
    walk = searcher._walk

    def watched(*arguments: Any, **more: Any) -> Any:
        with Watch() as watch:
            result = walk(*arguments, **more)
        seen.extend(watch.seen)
        return result

    searcher._walk = watched
    try:
        searcher.search(
            world.encoder(histories), excluded=pairs_of(histories), mode="exact", **sizes
        )
    finally:
        searcher._walk = walk
    return seen


@pytest.mark.parametrize("table_entries", [0, 2**22])
def test_a_static_search_is_the_same_operators_in_the_same_shapes_for_all_users(
    table_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph asks for: no value of a tensor decides anything. The dynamic search does
    look at values."""
    world = World(all_pairs(), sharp_model())
    monkeypatch.setattr(Softmax, "_bounded", lambda *_: False)  # of the CPU alone
    monkeypatch.setattr(trie_walk, "TABLE_ENTRIES", table_entries)
    searcher = in_float32(world, static=True)
    first = static_walk(world, searcher, [[0, 1, 2], [5], [7, 7]], beam=20, top=20)
    second = static_walk(world, searcher, [[9], [40, 41], [3, 4]], beam=20, top=20)
    assert first == second
    assert len(first) > 100
    with pytest.raises(AssertionError, match="looks at values"):
        static_walk(world, in_float32(world, static=False), [[0, 1, 2]], beam=20, top=20)


@settings(max_examples=25, deadline=None)
@given(catalogues, histories_of, st.integers(1, 8), st.integers(1, 8), st.booleans(), st.booleans())
@example(PREFIXES, [[0, 3], [], [1, 1, 2], list(range(7))], 3, 7, True, True)
@example(PREFIXES, [[0, 3], [], [1, 1, 2], list(range(7))], 3, 7, True, False)
def test_a_static_search_finds_what_a_dynamic_one_does(
    items: list[Word], draws: list[History], beam: int, top: int, exclude: bool, by_table: bool
) -> None:
    histories = [[draw % len(items) for draw in history] for history in draws]
    world = World(items, sharp_model())
    excluded = pairs_of(histories) if exclude else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_walk, "TABLE_ENTRIES", 2**22 if by_table else 0)
        searchers = [in_float32(world, static=static) for static in (True, False)]
    static, dynamic = (
        searcher.search(world.encoder(histories), beam=beam, top=top, excluded=excluded)
        for searcher in searchers
    )
    assert (static.items == dynamic.items).all()
    np.testing.assert_allclose(static.scores, dynamic.scores, rtol=1e-5, atol=1e-5)


def test_static_shapes_repeat_the_last_user_and_pad_the_text() -> None:
    world = World(all_pairs(), sharp_model())
    encoder = world.encoder([[1, 2], [3], [4, 5, 6]])
    padded = in_static_shape(encoder)
    assert padded.input_ids.shape == (4, 32)
    width = encoder.input_ids.shape[1]
    assert (padded.input_ids[:3, :width] == encoder.input_ids).all()
    assert (padded.input_ids[3] == padded.input_ids[2]).all()
    assert not padded.attention_mask[:, width:].any()
    assert in_static_shape(padded).input_ids.shape == (4, 32)


def test_the_walk_compiles_into_one_graph() -> None:
    """`torch.compile(fullgraph=True)`: no break, and the lists of the plain search. The backend is
    AOT autograd's, which traces and lowers as inductor does and needs no compiler of C++."""
    world = World(all_pairs(), sharp_model())
    plain = in_float32(world, static=True)
    compiled = plain.compiled(backend="aot_eager")
    for histories in ([[0, 1, 2], [5], [7, 7]], [[9], [40, 41], []]):
        encoder, excluded = world.encoder(histories), pairs_of(histories)
        expected = plain.search(encoder, beam=10, top=10, excluded=excluded)
        found = compiled.search(encoder, beam=10, top=10, excluded=excluded)
        assert (found.items == expected.items).all()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_float64_has_no_static_search() -> None:
    world = World(PREFIXES, sharp_model())
    with pytest.raises(
        ValueError, match=r"scores in float32, the model's weights are torch.float64"
    ):
        TrieSearcher(world.model, world.searcher.trie, static=True)


def test_under_autocast_a_padded_batch_is_searched_too() -> None:
    """As validation in a bf16 run does: histories of several lengths, projections in bfloat16,
    scores near those of float32."""
    world = World(all_pairs(), sharp_model())
    searcher, encoder = in_float32(world), world.encoder([[0], [1, 2, 3, 4, 5], [7, 8]])
    plain = searcher.search(encoder, beam=64, top=20)
    with torch.autocast("cpu", torch.bfloat16):
        rough = searcher.search(encoder, beam=64, top=20)
    assert (rough.items >= 0).all()
    np.testing.assert_allclose(rough.scores, plain.scores, atol=1.0)
