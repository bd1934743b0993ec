"""The order of samples: each once an epoch, the same steps at every world size, any step without a
replay."""

import pickle
import time

import numpy as np
import pytest
from genrec_shards.keyed_random import keyed_uniform
from genrec_shards.storage.sample_order import SampleOrder, StepSamples, split_among_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = np.random.default_rng(0).integers(3, 12, 500)
PARTS = ("sample_ids", "user_rows", "target_positions", "training_lengths", "is_padding")


def make_order(
    lengths=LENGTHS, users_per_record=16, space="every-prefix", batch_size=37, seed=1, **more
) -> SampleOrder:
    return SampleOrder(
        lengths, users_per_record, space=space, batch_size=batch_size, seed=seed, **more
    )


def expected_samples(lengths, space: str, held_out: int) -> list[tuple[int, int, int]]:
    """(sample id, user row, target position), one by one, from the definition."""
    samples, flat = [], 0
    for user, length in enumerate(lengths):
        training_length = length - held_out
        if space == "user" and training_length >= 1:
            samples.append((user, user, -1))
        if space == "last" and training_length >= 2:
            samples.append((user, user, training_length - 1))
        if space == "every-prefix":
            samples += [(flat + position, user, position) for position in range(1, training_length)]
        flat += int(length)
    return samples


def rows(samples: StepSamples) -> list[tuple[int, int, int]]:
    columns = samples.sample_ids, samples.user_rows, samples.target_positions
    return [tuple(row) for row in np.column_stack(columns).tolist()]


def epoch_of(order: SampleOrder, epoch: int) -> list[StepSamples]:
    return [order.step(epoch, step) for step in range(order.steps_per_epoch)]


def same(first: StepSamples, second: StepSamples) -> bool:
    return all(np.array_equal(getattr(first, part), getattr(second, part)) for part in PARTS)


@given(
    lengths=st.lists(st.integers(3, 9), min_size=1, max_size=60),
    users_per_record=st.integers(1, 9),
    batch_size=st.integers(1, 50),
    window_records=st.integers(1, 5),
    space=st.sampled_from(["user", "last", "every-prefix"]),
    trained_through=st.sampled_from(["n-2", "n-1"]),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=120, deadline=None)
def test_an_epoch_holds_every_sample_exactly_once(
    lengths, users_per_record, batch_size, window_records, space, trained_through, seed
):
    held_out = 2 if trained_through == "n-2" else 1
    expected = expected_samples(lengths, space, held_out)
    options = {"trained_through": trained_through, "window_records": window_records}

    def order_of() -> SampleOrder:
        return make_order(lengths, users_per_record, space, batch_size, seed, **options)

    if not expected:
        with pytest.raises(ValueError, match="no sample"):
            order_of()
        return
    order = order_of()
    steps = epoch_of(order, 3)
    assert sorted(row for step in steps for row in rows(step)) == sorted(expected)
    assert order.num_samples == len(expected)
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= batch_size
    assert order.users_without_samples == len(lengths) - len({user for _, user, _ in expected})
    for step in steps:
        assert np.array_equal(step.training_lengths, np.array(lengths)[step.user_rows] - held_out)
        assert (step.target_positions < step.training_lengths).all()
        assert not step.is_padding.any()


def test_dtypes_of_a_step():
    for space in ("user", "last", "every-prefix"):
        step = make_order(space=space).step(0, 0)
        dtypes = [getattr(step, part).dtype for part in PARTS]
        assert dtypes == [np.int64, np.int64, np.int32, np.int32, bool]


@pytest.mark.parametrize("space", ["user", "last", "every-prefix"])
def test_ranks_see_the_dataset_once_in_equal_steps(space):
    order = make_order(space=space)
    expected = sorted(expected_samples(LENGTHS, space, 2))
    for world_size in (1, 2, 3, 4, 8):
        seen = []
        for step in epoch_of(order, 0):
            parts = [split_among_ranks(step, rank, world_size) for rank in range(world_size)]
            assert {len(part) for part in parts} == {-(-len(step) // world_size)}
            real = [row for part in parts for row in rows(part[~part.is_padding])]
            assert real == rows(step)  # contiguous parts: the very same order at every world size
            seen += real
        assert sorted(seen) == expected


def test_step_smaller_than_the_world_is_padded():
    step = make_order(batch_size=3).step(0, 0)
    parts = [split_among_ranks(step, rank, 8) for rank in range(8)]
    assert [part.is_padding.tolist() for part in parts] == [[False]] * 3 + [[True]] * 5
    assert {int(part.sample_ids[0]) for part in parts} == set(step.sample_ids.tolist())
    with pytest.raises(ValueError, match="rank 8 of 8"):
        split_among_ranks(step, 8, 8)


def test_the_order_itself_is_frozen():
    """A change here breaks every resume of an older run."""
    order = make_order(np.arange(100) % 5 + 3, users_per_record=8, batch_size=6, window_records=4)
    assert order.step(1, 2).sample_ids.tolist() == [497, 484, 271, 429, 414, 65]


def test_each_epoch_brings_other_records_together():
    order = make_order(window_records=4, batch_size=100)
    steps = [order.step(epoch, 0) for epoch in range(4)]
    first_windows = [frozenset((step.user_rows // 16).tolist()) for step in steps]
    assert len(set(first_windows)) == 4


def test_epochs_and_seeds_differ_and_are_well_mixed():
    order = make_order()
    epochs = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(make_order(seed=2), 0)]
    orders = [np.concatenate([step.sample_ids for step in epoch]) for epoch in epochs]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (orders[first] == orders[second]).mean() < 0.02
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.1
    assert len(set(order.step(0, 0).user_rows.tolist())) > 25


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 0.999)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_any_step_without_a_replay(jumps):
    order, walked = make_order(window_records=4), make_order(window_records=4)
    for epoch, share in jumps:
        step = int(share * order.steps_per_epoch)
        fresh = make_order(window_records=4).step(epoch, step)
        assert same(order.step(epoch, step), fresh)
        assert same(epoch_of(walked, epoch)[step], fresh)


def test_the_order_travels_to_another_process():
    order = make_order()
    order.step(0, 3)
    assert same(pickle.loads(pickle.dumps(order)).step(1, 5), order.step(1, 5))


def test_windows_keep_a_step_within_few_records():
    order = make_order(np.full(20_000, 8), users_per_record=100, window_records=10, batch_size=64)
    steps = [order.step(0, number) for number in range(0, 500, 50)]
    records = [len(set((step.user_rows // 100).tolist())) for step in steps]
    assert max(records) <= 20
    assert min(records) >= 8


WRONG = {"space": "all", "batch_size": 0, "users_per_record": 0, "trained_through": "n"}


@pytest.mark.parametrize(("name", "value"), [*WRONG.items(), ("window_records", 0)])
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{value}"):
        make_order(**{name: value})


def test_steps_outside_the_epoch_are_refused():
    order = make_order()
    for step in (-1, order.steps_per_epoch):
        with pytest.raises(ValueError, match=f"step {step}"):
            order.step(0, step)


def test_last_window_costs_no_more_than_the_first():
    order = make_order(np.full(1024 * 64 * 4, 9), users_per_record=1024, batch_size=512)
    seconds: dict[float, list[float]] = {0: [], 0.9: []}
    for epoch in range(3):
        for share, found in seconds.items():
            started = time.perf_counter()
            order.step(epoch, int(order.steps_per_epoch * share))
            found.append(time.perf_counter() - started)
    assert min(seconds[0.9]) < 3 * min(seconds[0]) + 0.02


def test_keyed_uniform_is_a_function_of_its_key_alone():
    ids = np.arange(1000, dtype=np.int64)
    whole = keyed_uniform(5, 2, ids, 0)
    shuffled = np.random.default_rng(0).permutation(ids)
    assert np.array_equal(keyed_uniform(5, 2, shuffled, 0), whole[shuffled])
    assert np.array_equal(keyed_uniform(5, 2, ids[7:8], 0), whole[7:8])
    # Frozen values: a change here breaks every resume of an older run.
    assert keyed_uniform(0, 0, np.array([0, 1, 2**40]), 0).tolist() == FROZEN


FROZEN = [0.4700622449899797, 0.1304593093080142, 0.573568917393873]


def test_keyed_uniform_is_uniform_and_independent_across_keys():
    ids = np.arange(100_000, dtype=np.int64)
    base = keyed_uniform(0, 0, ids, 0)
    assert base.min() >= 0
    assert base.max() < 1
    others = [
        keyed_uniform(0, 0, ids, 1),
        keyed_uniform(0, 1, ids, 0),
        keyed_uniform(1, 0, ids, 0),
        np.roll(base, 1),
    ]
    # Chi-square of 99 degrees of freedom: below 160 but for 1 in 10,000.
    for values in [base, *others]:
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        assert ((counts - 1000.0) ** 2 / 1000).sum() < 160
    for values in others:
        joint = np.histogram2d(base, values, bins=10, range=((0, 1), (0, 1)))[0]
        assert ((joint - 1000) ** 2 / 1000).sum() < 160
    low_bits = np.bincount((base * 2**53).astype(np.int64) & 255, minlength=256)
    assert ((low_bits - 390.625) ** 2 / 390.625).sum() < 350
