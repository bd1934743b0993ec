"""Searches that a graph can capture, decoding without a trie, and the softmax's normaliser."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from beam_oracle import (
    CHAIN,
    EOS,
    MASK,
    ONE_TOKEN,
    PREFIXES,
    History,
    Switches,
    Word,
    World,
    all_pairs,
    catalogues,
    draws_of_histories,
    histories_from,
    pairs_of,
    switches,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import ItemTexts, item_text
from genrec_dist.decoding import output_head
from genrec_dist.decoding.output_head import Softmax
from genrec_dist.decoding.searcher import TrieSearcher, encode_by_length, in_static_shape


def in_float32(world: World, **options: Any) -> TrieSearcher:
    return TrieSearcher(copy.deepcopy(world.model).float(), world.trie, **options)


# Shapes.


class Operators(TorchDispatchMode):
    """Names and shapes of all operators, none of which may hand a value to Python or make a shape
    of one."""

    FORBIDDEN = (
        "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique",
        "repeat_interleave",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        assert not any(name.startswith(word) for word in self.FORBIDDEN), f"{name} looks at values"
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(tuple(value.shape) for value in _tensors(result))))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def operators_of(world: World, searcher: TrieSearcher, histories: list[History]) -> list[Any]:
    """What the search does after the encoder, which is where a captured graph would begin."""
    seen: list[Any] = []
    search = searcher._search_trie

    def watched(*arguments: Any) -> Any:
        with Operators() as operators:
            result = search(*arguments)
        seen.extend(operators.seen)
        return result

    searcher._search_trie = watched
    try:
        searcher.search(world.encoder(histories), beam=20, top=20, excluded=pairs_of(histories))
    finally:
        searcher._search_trie = search
    return seen


def test_static_search_is_the_same_operators_in_the_same_shapes_for_all_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a CUDA graph needs: no value of a tensor decides anything. The dynamic search does look
    at values."""
    world = World(all_pairs())
    monkeypatch.setattr(Softmax, "_bounded", lambda *_: False)  # of the CPU alone
    searcher = in_float32(world, static=True)
    first = operators_of(world, searcher, [[0, 1, 2], [5], [7, 7]])
    second = operators_of(world, searcher, [[9], [40, 41], [3, 4]])
    assert first == second
    assert len(first) > 100
    with pytest.raises(AssertionError, match="looks at values"):
        operators_of(world, in_float32(world, static=False), [[0, 1, 2]])


@settings(max_examples=15, deadline=None)
@given(
    catalogues, draws_of_histories, switches, st.integers(1, 8), st.integers(1, 8), st.booleans()
)
@example(PREFIXES, [[0, 3], [], [1, 1, 2], list(range(7))], Switches(), 3, 7, True)
@example(PREFIXES, [[0, 1], [1]], Switches(forced=True, start="state"), 5, 4, True)
@example(ONE_TOKEN, [[0, 1], [1]], Switches(forced=True), 5, 4, True)
@example(CHAIN, [[0, 1], [1]], Switches(forced=True, unit="item"), 5, 4, True)
def test_static_search_finds_what_a_dynamic_one_does(
    items: list[Word], draws: list[History], how: Switches, beam: int, top: int, exclude: bool
) -> None:
    world, histories = World(items, how), histories_from(draws, len(items))
    excluded = pairs_of(histories) if exclude else None
    static, dynamic = (
        in_float32(world, static=static).search(
            world.encoder(histories), beam=beam, top=top, excluded=excluded
        )
        for static in (True, False)
    )
    assert (static.items == dynamic.items).all()
    np.testing.assert_allclose(static.scores, dynamic.scores, rtol=1e-5, atol=1e-5)


def test_static_shapes_repeat_the_last_user_and_pad_the_text() -> None:
    world = World(all_pairs())
    encoder = world.encoder([[1, 2], [3], [4, 5, 6]])
    padded = in_static_shape(encoder)
    assert padded.input_ids.shape == (4, 32)
    width = encoder.input_ids.shape[1]
    assert (padded.input_ids[:3, :width] == encoder.input_ids).all()
    assert (padded.input_ids[3] == padded.input_ids[2]).all()
    assert not padded.attention_mask[:, width:].any()
    assert in_static_shape(padded).input_ids.shape == (4, 32)


@pytest.mark.ranks
def test_search_trie_compiles_into_one_graph() -> None:
    """`torch.compile(fullgraph=True)`: no break, and the lists of the plain search. The backend is
    AOT autograd's, which traces and lowers as inductor does and needs no compiler of C++."""
    world = World(all_pairs())
    plain = in_float32(world, static=True)
    compiled = plain.compiled(backend="aot_eager")
    for histories in ([[0, 1, 2], [5], [7, 7]], [[9], [40, 41], []]):
        encoder, excluded = world.encoder(histories), pairs_of(histories)
        expected = plain.search(encoder, beam=10, top=10, excluded=excluded)
        found = compiled.search(encoder, beam=10, top=10, excluded=excluded)
        assert (found.items == expected.items).all()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_float64_has_no_static_search() -> None:
    world = World(PREFIXES)
    with pytest.raises(ValueError, match=r"in float32, the model's weights are torch\.float64"):
        TrieSearcher(world.model, world.trie, static=True)


def test_padded_batch_is_searched_under_autocast() -> None:
    """As validation in a bf16 run does: histories of several lengths, projections in bfloat16,
    scores near those of float32."""
    world = World(all_pairs())
    searcher, encoder = in_float32(world), world.encoder([[0], [1, 2, 3, 4, 5], [7, 8]])
    plain = searcher.search(encoder, beam=64, top=20)
    with torch.autocast("cpu", torch.bfloat16):
        rough = searcher.search(encoder, beam=64, top=20)
    assert (rough.items >= 0).all()
    np.testing.assert_allclose(rough.scores, plain.scores, atol=1.0)


@pytest.mark.parametrize("unit", ["subword", "item"])
def test_encode_by_length_equals_one_pass(unit: str) -> None:
    world, rng = World(all_pairs(), Switches(unit=unit)), np.random.default_rng(1)
    encoder = world.encoder([rng.integers(0, 56, rng.integers(0, 15)).tolist() for _ in range(40)])
    with torch.inference_mode():
        whole, grouped = world.model.encode(encoder), encode_by_length(world.model, encoder)
    assert (whole - grouped)[encoder.attention_mask].abs().max() < 1e-12


# free: no trie.


class Letters:
    """Reads the words of a small world."""

    def __init__(self, items: list[Word]):
        self.row_of = {item: row for row, item in enumerate(items)}

    def rows(self, strings: list[np.ndarray]) -> np.ndarray:
        found = [self.row_of.get(tuple(string.tolist()), -2) for string in strings]
        return np.array(found, np.int32)


@pytest.fixture(scope="module")
def free_world() -> World:
    world = World([(5,), (6, 7), (8, 8), (5, 6)])
    world.searcher = TrieSearcher(world.model, world.trie, texts=Letters(world.items))  # type: ignore[arg-type]
    return world


@torch.inference_mode()
def strings_best_first(
    world: World, history: History, user: int, longest: int
) -> list[tuple[Word, float]]:
    """Every token string there is, by log-probability, `</s>` included."""
    encoder = world.encoder([history], [user])
    memory, mask = world.model.encode(encoder), encoder.attention_mask
    vocabulary = [token for token in range(world.model.config.vocab_size) if token != EOS]
    scored = []
    for length in range(longest + 1):
        strings = torch.tensor(list(itertools.product(vocabulary, repeat=length)), dtype=torch.long)
        copies = len(strings)
        rows = torch.cat([torch.full((copies, 1), MASK), strings], 1)
        hidden = world.model.decode(rows, memory.expand(copies, -1, -1), mask.expand(copies, -1))
        logprobs = world.model.lm_head(hidden).log_softmax(-1)
        wanted = torch.cat([strings, torch.full((copies, 1), EOS)], 1)
        scores = logprobs.gather(2, wanted[..., None])[..., 0].sum(1)
        scored += list(zip(map(tuple, strings.tolist()), scores.tolist(), strict=True))
    return sorted(scored, key=lambda pair: -pair[1])


def test_free_finds_the_best_of_all_strings_and_which_are_items(free_world: World) -> None:
    histories = [[0], [2, 1]]
    encoder = free_world.encoder(histories)
    found = free_world.searcher.search(encoder, beam=81, top=30, mode="free")
    row_of = {item: row for row, item in enumerate(free_world.items)}
    for row, history in enumerate(histories):
        truth = strings_best_first(free_world, history, row, longest=2)[:30]
        assert found.items[row].tolist() == [row_of.get(string, -2) for string, _ in truth]
        np.testing.assert_allclose(found.scores[row], [score for _, score in truth], rtol=1e-5)
    assert (found.items == -2).any()


def test_free_takes_excluded_items_out_and_closes_the_list(free_world: World) -> None:
    histories = [[0], [2, 1]]
    encoder, options = free_world.encoder(histories), {"beam": 81, "top": 81, "mode": "free"}
    plain = free_world.searcher.search(encoder, **options)
    struck = free_world.searcher.search(encoder, excluded=pairs_of(histories), **options)
    for row, history in enumerate(histories):
        left = ~np.isin(plain.items[row], history)
        count = left.sum()
        assert count < 81
        assert struck.items[row].tolist() == [*plain.items[row][left], *[-1] * (81 - count)]
        assert struck.scores[row, :count].tolist() == plain.scores[row][left].tolist()
        assert np.isneginf(struck.scores[row, count:]).all()


def test_item_texts_read_by_the_numbering_and_to_the_letter() -> None:
    """Other cuts of an item's word are that item, and so may be listed twice; digits inside another
    text are none."""
    codes = [str(number) for number in range(120)]
    tokenizer = train_tokenizer(codes, 280)
    texts = ItemTexts(tokenizer, codes)

    def spelled(*parts: str) -> list[int]:
        cuts = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        return list(itertools.chain(*cuts))

    word = item_text("117")
    assert texts.rows([spelled(word), spelled(*word)]).tolist() == [117, 117]
    assert spelled(word) != spelled(*word)
    wrong = [" item_0117", "item_117", " user_117", " item_117 item_3", " item_", "117", ""]
    assert texts.rows([spelled(text) for text in wrong]).tolist() == [-2] * len(wrong)
    assert texts.rows([[*spelled(item_text("5")), tokenizer.mask_token_id]]).tolist() == [-2]


# The normaliser.


@pytest.mark.parametrize("columns", [1024, 5000])
@pytest.mark.parametrize("scale", [0.05, 30.0])
def test_log_normaliser_is_that_of_the_whole_softmax(
    columns: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, with and without the pass for the largest logit; logits in the hundreds do not
    overflow."""
    monkeypatch.setattr(output_head, "CPU_LOGITS_AT_ONCE", 7 * columns)
    torch.manual_seed(0)
    weight, hidden = scale * torch.randn(3000, 16), torch.randn(7, 1, 16)
    softmax = Softmax(weight, 2047)
    assert softmax._bounded(hidden[:, 0]) == (scale < 1)
    eos = hidden @ weight[2047]
    expected = (hidden.double() @ weight.double().T).logsumexp(-1)
    found = softmax.log_normaliser(hidden, eos).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    other = softmax.log_normaliser(hidden, eos + 20 * scale)
    assert (other > expected).all()  # the logit of </s> is the one that was given


def rows_after_items(shares: list[float]) -> tuple[Softmax, torch.Tensor]:
    """A head of 3,000 tokens and rows [R, 1, D] after which all tokens but `</s>` together have
    these shares of probability."""
    torch.manual_seed(1)
    weight = 0.05 * torch.randn(3000, 32)
    weight[2] *= 10  # the longest, as `</s>` has it in a trained head
    direction = weight[2] / weight[2].norm() ** 2
    hidden = torch.randn(len(shares), 32)
    for _ in range(60):  # raise the logit of </s> until the others have what they shall
        logits = hidden.double() @ weight.double().T
        others = logits.index_fill(1, torch.tensor([2]), -torch.inf).logsumexp(1)
        wanted = others - torch.tensor(shares).double().log()
        hidden = hidden + 0.5 * (wanted - logits[:, 2]).float()[:, None] * direction
    return Softmax(weight, 2), hidden[:, None]


@pytest.mark.parametrize("doubtful", [0, 20, 300])
def test_bfloat16_after_items_moves_no_score(
    doubtful: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows where `</s>` is certain go through bfloat16, others through float32; all come out as
    float32 has them."""
    monkeypatch.setattr(output_head, "_has_bfloat16_units", lambda device: True)
    shares = [1e-6] * (320 - doubtful) + [0.3] * doubtful
    shares = np.random.default_rng(0).permutation(shares)
    softmax, hidden = rows_after_items(shares.tolist())
    eos = hidden @ softmax.weight_VD[2]
    expected = (hidden.double() @ softmax.weight_VD.double().T).logsumexp(-1)
    found_shares = -torch.expm1((hidden.double() @ softmax.weight_VD[2].double()) - expected)[:, 0]
    np.testing.assert_allclose(found_shares, shares / (1 + shares), rtol=0.05)
    rough: list[int] = []
    full: list[int] = []
    in_bfloat16, in_full = softmax._sum_of_others_in_bfloat16, softmax.log_normaliser

    def watched_bfloat16(rows: torch.Tensor) -> torch.Tensor:
        rough.append(len(rows))
        return in_bfloat16(rows)

    def watched_full(rows: torch.Tensor, eos: torch.Tensor) -> torch.Tensor:
        full.append(len(rows))
        return in_full(rows, eos)

    monkeypatch.setattr(softmax, "_sum_of_others_in_bfloat16", watched_bfloat16)
    monkeypatch.setattr(softmax, "log_normaliser", watched_full)
    found = softmax.log_normaliser_after_items(hidden, eos)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)
    if doubtful == 300:
        assert rough == []  # a look at a few rows tells that it is not worth it
    else:
        assert rough == [320]
        assert full[1:] == ([doubtful] if doubtful else [])
    others = in_bfloat16(hidden[:, 0])[:, None] * (-eos.double()).exp()
    unchecked = (eos + torch.log1p(others)).float()
    if doubtful:
        assert (unchecked - expected).abs().max() > output_head.NEGLIGIBLE  # what the check stops
