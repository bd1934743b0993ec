"""The repeat model: its distribution, its fit, and that it knows no held-out item."""

from __future__ import annotations

import math

import numpy as np
from genrec_shards.histories import histories
from genrec_shards.sequences import Sequences
from random_sequences import changed

from genrec_dist.data.repeat_model import MOST_REPEATED, RepeatModel, fit_repeats

NUM_ITEMS = 40


def repeating(num_users: int, seed: int, share: float = 0.5) -> Sequences:
    """Users who take again, with probability `share`, one of their last two items."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_users):
        row = [int(rng.integers(NUM_ITEMS)) for _ in range(2)]
        for _ in range(14):
            again = rng.random() < share
            row.append(row[-int(rng.integers(1, 3))] if again else int(rng.integers(NUM_ITEMS)))
        rows.append(row)
    ids = [f"i{item}" for item in range(NUM_ITEMS)]
    offsets = np.arange(0, 16 * num_users + 1, 16)
    items = np.array(rows, np.int32).ravel()
    return Sequences(items, offsets, [f"u{user}" for user in range(num_users)], ids)


def test_probabilities_are_those_of_the_logistic_regression() -> None:
    """The history 5 6 5 by hand: item 5 is the last of three, taken twice; one repeat, two distinct
    items."""
    model = RepeatModel(-2.0, -0.5, 0.25, 0.75, 0.1, 0.3)
    prob_BN = model.probabilities(np.array([5, 6, 5, 7]), np.array([0, 3, 4]), 10).numpy()
    rate = math.log(1.5 / 4)
    five = -2.0 + 0.25 + 0.75 * math.log(2) + 0.1 * math.log(3) + 0.3 * rate
    six = -2.0 - 0.5 * math.log(2) + 0.1 * math.log(3) + 0.3 * rate
    expected = [1 / (1 + math.exp(-odds)) for odds in (five, six)]
    np.testing.assert_allclose(prob_BN[0, [5, 6]], expected)
    np.testing.assert_allclose(np.delete(prob_BN[0], [5, 6]), (1 - sum(expected)) / 8)
    np.testing.assert_allclose(prob_BN.sum(1), 1.0)


def test_a_history_of_sure_repeats_leaves_something_to_the_others() -> None:
    prob_BN = RepeatModel(intercept=9.0).probabilities(np.arange(6), np.array([0, 6]), 8).numpy()
    np.testing.assert_allclose(prob_BN[0, :6], MOST_REPEATED / 6)
    np.testing.assert_allclose(prob_BN[0, 6:], (1 - MOST_REPEATED) / 2)


def test_a_fitted_model_foretells_how_often_targets_repeat() -> None:
    """On other users than it was fitted to, within three standard errors; the likeliest item is one of the
    last two."""
    model = fit_repeats(repeating(400, seed=1), "n-2")
    assert model is not None
    others = repeating(400, seed=2)
    past = histories(others, "test")
    prob_UN = model.probabilities(past.items, past.offsets, NUM_ITEMS).numpy()
    users = np.arange(past.num_users)
    in_history_UN = past.holds(users[:, None], np.arange(NUM_ITEMS)[None])
    repeats = past.holds(users, past.targets_U).mean()
    foretold = (prob_UN * in_history_UN).sum(1).mean()
    assert abs(foretold - repeats) < 3 * math.sqrt(0.25 / past.num_users)
    likeliest = prob_UN.argmax(1)
    last_two = past.items[past.offsets[1:] - 1], past.items[past.offsets[1:] - 2]
    assert ((likeliest == last_two[0]) | (likeliest == last_two[1])).mean() > 0.95
    at_target = prob_UN[users, past.targets_U]
    uniform = np.full(past.num_users, 1 / NUM_ITEMS)
    assert np.log(at_target).mean() > np.log(uniform).mean() + 0.3


def test_no_repeat_no_model_and_no_held_out_item_in_it() -> None:
    sequences = repeating(60, seed=3)
    fitted = fit_repeats(sequences, "n-2")
    assert fitted == fit_repeats(changed(sequences, 2), "n-2")
    assert fitted != fit_repeats(changed(sequences, 3), "n-2")
    items = np.concatenate([np.arange(16) + user for user in range(20)]).astype(np.int32)
    never = Sequences(
        items, np.arange(0, 321, 16), [f"u{user}" for user in range(20)], sequences.item_ids
    )
    assert fit_repeats(never, "n-2") is None
