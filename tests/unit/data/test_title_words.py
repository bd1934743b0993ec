"""Titles as words: distinct, checked, and laid out as prompts."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from genrec_dist.bench.titles import made_up_titles
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.layout import PromptLayout
from genrec_dist.data.prompt.title_words import (
    build_title_words,
    distinct_titles,
    make_prompt_layout,
    train_title_tokenizer,
)

TEMPLATE = "Seen:\n{history}\nNext:\n"
TITLES = ["Heat", "Toy Story", "Face/Off", "Alien"]


def tokenizer_of(titles: list[str]) -> PreTrainedTokenizerFast:
    return train_title_tokenizer(titles, TEMPLATE, 300)


def layout_of(titles: list[str], max_tokens: int = 60, max_titles: int = 3) -> PromptLayout:
    tokenizer = tokenizer_of(titles)
    words = build_title_words(tokenizer, titles, TEMPLATE, "\n")
    return make_prompt_layout(words, tokenizer.pad_token_id, max_tokens, max_titles)


def test_distinct_titles_numbers_equal_ones_by_row() -> None:
    titles = ["Heat", "Toy  Story", "Heat", "Heat (2)", "", "Heat", " "]
    found = distinct_titles(titles)
    assert found == [
        "Heat", "Toy Story", "Heat (3)", "Heat (2)", "untitled", "Heat (4)", "untitled (2)",
    ]  # fmt: skip
    assert len(set(distinct_titles(made_up_titles(500, np.random.default_rng(0))))) == 500
    # Items that come later change no earlier one.
    assert distinct_titles([*titles, "Toy Story"])[: len(titles)] == found


def test_prompts_hold_the_latest_titles_that_fit() -> None:
    layout, tokenizer = layout_of(TITLES), tokenizer_of(TITLES)
    items, offsets = np.array([0, 1, 2, 3, 1], np.int32), np.array([0, 4, 4, 5])
    encoder = encode_histories(items, offsets, np.full(3, -1), layout)
    texts = [
        tokenizer.decode(row[mask])
        for row, mask in zip(encoder.input_ids, encoder.attention_mask, strict=True)
    ]
    assert texts == ["Seen:\nToy Story\nFace/Off\nAlien", "Seen:\n", "Seen:\nToy Story"]
    assert tokenizer.decode(layout.tail) == "\nNext:\n"
    assert not encoder.item_rows.any()
    assert not encoder.user_rows.any()


def test_prompts_lose_whole_titles_oldest_first() -> None:
    tokenizer = tokenizer_of(TITLES)
    longest = layout_of(TITLES).words.longest_item
    items = np.array([0, 1, 2, 3, 1, 0], np.int32)
    seen = set()
    for max_tokens in range(longest + 3, longest + 20):
        layout = layout_of(TITLES, max_tokens=max_tokens, max_titles=20)
        encoder = encode_histories(items, np.array([0, 6]), np.array([-1]), layout)
        assert encoder.input_ids.shape[1] <= max_tokens
        *lines, _ = (tokenizer.decode(encoder.input_ids[0]) + "\n").split("\n")
        assert lines[0] == "Seen:"
        assert lines[1:] == [TITLES[item] for item in items][-len(lines[1:]) :]
        # One more title would not fit.
        more = [TITLES[item] for item in items][-len(lines) :]
        text = "Seen:\n" + "\n".join(more)
        if len(more) == len(lines):
            assert (
                sum(map(len, tokenizer(["Seen:\n", "\n".join(more)])["input_ids"])) > max_tokens
            ), text
        seen.add(len(lines))
    assert len(seen) > 2


def test_a_layout_needs_room_for_the_longest_title() -> None:
    with pytest.raises(ValueError, match=r"model\.max_tokens 4: too few .* longest title's"):
        layout_of(TITLES, max_tokens=4)


@pytest.mark.parametrize(
    ("titles", "separator", "message"),
    [
        (
            ["One, two", "b"],
            ", ",
            r"prompt\.separator ', ' is in the title 'One, two' \(item row 0\)",
        ),
        (["a", "b </s> c"], "\n", r"the title 'b </s> c' contains a special token"),
    ],
)
def test_build_title_words_refuses(titles: list[str], separator: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_title_words(tokenizer_of(titles), titles, TEMPLATE, separator)


def test_a_tokenizers_own_first_token_begins_the_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(TITLES)
    bos = tokenizer.bos_token_id
    plain = build_title_words(tokenizer, TITLES, TEMPLATE, "\n")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    framed = build_title_words(tokenizer, TITLES, TEMPLATE, "\n")
    assert framed.tokens.tolist() == [bos, *plain.tokens.tolist()]
    assert framed.lengths.tolist() == [plain.lengths[0] + 1, *plain.lengths[1:].tolist()]
