"""Hugging Face's `generate` as the peer of our decoding, and its lists beside ours."""

# B users, K beams, N list

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding.searcher import TopItems
from genrec_dist.model.genrec import GenRecForConditionalGeneration

GENERATE = "generate + prefix_allowed_tokens_fn"
SAME = 1e-4
"""Scores of one list that two implementations may differ by in float32."""


def allowed_tokens(words: WordTable, eos: int) -> dict[tuple[int, ...], list[int]]:
    """What may follow a prefix, as users of `prefix_allowed_tokens_fn` write it: a dict of
    tuples."""
    tokens, offsets = words.tokens_of_items()
    after: dict[tuple[int, ...], dict[int, None]] = {}
    for start, end in pairwise(offsets):
        whole = (*tokens[start:end].tolist(), eos)
        for length, token in enumerate(whole):
            after.setdefault(whole[:length], {})[token] = None
    return {prefix: list(tokens) for prefix, tokens in after.items()}


def make_generate(
    model: GenRecForConditionalGeneration,
    words: WordTable,
    encoder: EncoderInput,
    beam: int,
    after: dict[tuple[int, ...], list[int]] | None = None,
) -> Callable[..., Any]:
    """A function that lets `generate` decode this batch; `output_scores` is its own option.
    `after`: of `allowed_tokens`, where it is at hand."""
    eos = int(model.config.eos_token_id)
    after = allowed_tokens(words, eos) if after is None else after

    @torch.inference_mode()
    def generate(output_scores: bool = False) -> Any:
        return model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=model.encode(encoder)),
            attention_mask=encoder.attention_mask.long(),
            prefix_allowed_tokens_fn=lambda _, ids: after.get(tuple(ids[1:].tolist()), [eos]),
            decoder_start_token_id=model.config.decoder_start_token_id,
            num_beams=beam,
            num_return_sequences=beam,
            length_penalty=0.0,
            early_stopping="never",
            forced_bos_token_id=None,
            forced_eos_token_id=None,
            max_new_tokens=words.longest_item + 2,
            do_sample=False,
            output_scores=output_scores,
            return_dict_in_generate=True,
        )

    return generate


def item_rows(words: WordTable) -> dict[tuple[int, ...], int]:
    """The row of the item with these tokens."""
    tokens, offsets = words.tokens_of_items()
    return {tuple(tokens[a:b].tolist()): row for row, (a, b) in enumerate(pairwise(offsets))}


def generated_lists(
    output: Any,
    model: GenRecForConditionalGeneration,
    words: WordTable,
    num_users: int,
    row_of: dict[tuple[int, ...], int] | None = None,
) -> TopItems:
    """`generate`'s output as lists; -1 where a sequence is no item. `row_of`: of `item_rows`, where
    it is at hand."""
    ends = (model.config.eos_token_id, model.config.pad_token_id)
    row_of = item_rows(words) if row_of is None else row_of
    rows = [
        row_of.get(tuple(token for token in sequence[1:] if token not in ends), -1)
        for sequence in output.sequences.tolist()
    ]
    scores_BN = output.sequences_scores.view(num_users, -1).float().cpu().numpy()
    return TopItems(np.array(rows, np.int32).reshape(scores_BN.shape), scores_BN)


def compare_lists(ours: TopItems, theirs: TopItems, same: float = SAME) -> dict[str, Any]:
    """How many items differ, and the largest difference of scores at one rank.

    Both lists fall, so different items at a rank are a tie if and only if the scores there agree.
    Raises AssertionError where they do not, to `same`."""
    apart_BN = np.abs(ours.scores.astype(np.float64) - theirs.scores)
    wrong_BN = ~(apart_BN <= same) | (theirs.items < 0)
    if wrong_BN.any():
        user, rank = (int(values[0]) for values in np.nonzero(wrong_BN))
        mine, other = (
            f"{lists.items[user, rank]} at {lists.scores[user, rank]:.7g}"
            for lists in (ours, theirs)
        )
        raise AssertionError(f"user {user} of the batch, rank {rank}: item {mine}, not {other}")
    differ = int((ours.items != theirs.items).sum())
    return {"items that differ": differ, "largest difference of scores": float(apart_BN.max())}
