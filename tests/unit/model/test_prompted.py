"""A prompted model's loss: on answers alone, and the same however samples lie in memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from genrec_shards.storage.sample_order import StepSamples

from genrec_dist.bench.titles import HuggingFace, made_up_titles, untrained_prompted
from genrec_dist.data.batch import IGNORED, Batch, dummy_batch
from genrec_dist.data.collate import BatchOptions
from genrec_dist.data.layout import PromptLayout
from genrec_dist.data.samples.step import make_step
from genrec_dist.model.causal.prompted import PromptedModel

SMALL = ["model.d_model=16", "model.heads=2", "model.ffn=32", "model.max_tokens=160"]
SETTINGS = [*SMALL, "tokens.vocab_size=300", "prompt.max_titles=4"]
NUM_ITEMS = 40
Gradients = dict[str, torch.Tensor]


class Histories:
    """The items of a few users."""

    def __init__(self, lengths: list[int]):
        dice = np.random.default_rng(1)
        self.items = [dice.integers(0, NUM_ITEMS, n).astype(np.int32) for n in lengths]

    def gather(self, user_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.items[user] for user in user_rows]
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


HISTORIES = Histories([5, 2, 9, 3, 1, 7])


def model_of(
    settings: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PromptedModel, PromptLayout]:
    titles = made_up_titles(NUM_ITEMS, np.random.default_rng(0))
    model, layout = untrained_prompted(titles, [*SETTINGS, *(settings or [])])
    return model.to(dtype), layout


def batches_of(layout: PromptLayout, *, every: bool, **options: object) -> list[Batch]:
    """All targets of the histories, as samples of their own or of a user together."""
    lengths = [len(items) for items in HISTORIES.items]
    pairs = [(user, lengths[user] - 1) for user in range(len(lengths))]
    if every:
        pairs = [(user, place) for user in range(len(lengths)) for place in range(1, lengths[user])]
    users, places = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    samples = StepSamples(
        sample_ids=np.arange(len(users)),
        user_rows=users,
        target_positions=places.astype(np.int32),
        training_lengths=np.array([lengths[user] for user in users], np.int32),
        is_padding=np.zeros(len(users), bool),
    )
    settings = BatchOptions(micro_batch_tokens=400, all_prefixes=not every, **options)  # type: ignore[arg-type]
    return make_step(samples, HISTORIES, layout, settings, 0).micro_batches


def loss_and_gradients(model: PromptedModel, batches: list[Batch]) -> tuple[float, Gradients]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(batch)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours: tuple[float, Gradients], theirs: tuple[float, Gradients]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, gradient in theirs[1].items():
        assert float((ours[1][name] - gradient).abs().max()) <= 1e-5 * max(
            1.0, float(gradient.abs().max())
        ), name


def test_the_loss_is_that_of_hugging_face_on_the_answers_tokens() -> None:
    model, layout = model_of(dtype=torch.float64)
    (expected, num_labels), other = (0.0, 0), HuggingFace(model, layout).lm
    table, offsets = layout.words.tokens_of_items()
    titles = [table[a:b].tolist() for a, b in pairwise(offsets)]
    tokens = layout.words.tokens
    head = tokens[: layout.head].tolist()
    separator = tokens[layout.words.offsets[3] : layout.words.offsets[4]].tolist()
    for items in HISTORIES.items:
        for place in range(1, len(items)):
            prompt = list(head)
            for number, item in enumerate(items[max(0, place - 4) : place]):
                prompt += separator * (number > 0) + titles[item]
            prompt += layout.tail.tolist()
            answer = [*titles[items[place]], model.config.eos_token_id]
            labels = torch.tensor([[IGNORED] * len(prompt) + answer])
            logits = other(input_ids=torch.tensor([prompt + answer])).logits[0, :-1]
            expected += float(
                torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
            )
            num_labels += len(answer)
    for every in (True, False):
        for packed in (True, False):
            batches = batches_of(layout, every=every, packed=packed)
            with torch.inference_mode():
                found = sum(float(model(batch)) for batch in batches)
            assert found == pytest.approx(expected, rel=1e-6), (every, packed)
            assert sum(batch.num_target_tokens for batch in batches) == num_labels


@pytest.mark.parametrize("every", [True, False], ids=["every-prefix", "all-prefixes"])
def test_packed_samples_have_the_loss_and_gradients_of_padded_ones(every: bool) -> None:
    model, layout = model_of()
    padded = loss_and_gradients(model, batches_of(layout, every=every))
    assert_same(loss_and_gradients(model, batches_of(layout, every=every, packed=True)), padded)


def test_targets_that_share_a_prompt_have_the_loss_and_gradients_of_their_own() -> None:
    model, layout = model_of(["prompt.max_titles=20"])
    alone = loss_and_gradients(model, batches_of(layout, every=True, packed=True))
    batches = batches_of(layout, every=False, packed=True)
    assert any(batch.packing.joined.attended.branch is not None for batch in batches)
    assert_same(loss_and_gradients(model, batches), alone)


def test_shared_windows_show_no_more_titles_than_a_prompt_may() -> None:
    _, layout = model_of()
    separator = layout.words.tokens[layout.words.offsets[3]]
    tokens = []
    for shared in (False, True):
        batches = batches_of(layout, every=False, packed=True, share_windows=shared)
        titles = []
        for batch in batches:
            packing, samples = batch.packing, batch.encoder_row.numpy()
            assert packing is not None
            visible = packing.visible_m[packing.rows.offsets[: len(samples)]]
            for row, sample in enumerate(samples):
                first, end = packing.encoder.offsets[sample : sample + 2]
                assert visible[row] <= end - first
                stem = batch.encoder.input_ids[first : first + visible[row]].numpy()
                titles.append(int((stem[layout.head :] == separator).sum()) + 1)
        # A target after one item sees one title, the next two, and so on up to four.
        seen = [min(place, 4) for items in HISTORIES.items for place in range(1, len(items))]
        seen.append(1)  # the row of the history of one item, which has no target
        assert len(titles) == len(seen)
        if shared:
            assert max(titles) <= 4
            assert sum(titles) < sum(seen)
            assert sum(count == 1 for count in titles) == sum(count == 1 for count in seen)
        else:
            assert sorted(titles) == sorted(seen)
        tokens.append(sum(batch.num_tokens for batch in batches))
    assert tokens[1] < tokens[0]


def test_a_dummy_batch_has_no_loss_and_no_gradient() -> None:
    model, layout = model_of()
    for packed in (True, False):
        batch = batches_of(layout, every=False, packed=packed)[0]
        loss, gradients = loss_and_gradients(model, [dummy_batch(batch)])
        assert loss == 0.0
        assert all(not gradient.any() for gradient in gradients.values())


def test_recomputed_layers_have_the_same_gradients() -> None:
    model, layout = model_of()
    batches = batches_of(layout, every=False, packed=True)
    kept = loss_and_gradients(model.train(), batches)
    model.recompute_layers()
    assert_same(loss_and_gradients(model, batches), kept)


def test_bfloat16_stays_near() -> None:
    model, layout = model_of()
    batches = batches_of(layout, every=False, packed=True)
    exact = loss_and_gradients(model, batches)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = {
            packed: sum(
                float(model(batch)) for batch in batches_of(layout, every=False, packed=packed)
            )
            for packed in (True, False)
        }
    for value in rounded.values():
        assert value == pytest.approx(exact, rel=2e-2)
        assert value != exact
