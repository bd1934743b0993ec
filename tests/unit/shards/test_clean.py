"""From a log to sequences, by either split: nothing is lost unseen, the order of the log does not
count, core, histories and targets are those of a plain reference."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from genrec_shards.cleaning import buckets as buckets_module
from genrec_shards.cleaning.clean import Cleaning, CleanLog, clean
from genrec_shards.errors import DataError
from genrec_shards.splits import NO_TARGET, Cutoff
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import Row, by_user

CUTOFF = Cutoff(10, 20)
"""Times of these tests are 0 to 29."""


def cleaned(rows: list[Row], tmp_path_factory: pytest.TempPathFactory, **options) -> CleanLog:
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64}
    frames = [
        pl.DataFrame(rows[first : first + 7], schema=schema, orient="row")
        for first in range(0, len(rows), 7)
    ]
    return clean(frames, Cleaning(**options), tmp_path_factory.mktemp("rows"), "log.csv")


def core_of(rows: set[Row], k: int, min_length: int) -> set[Row]:
    """The plain way: throw out until nothing changes."""
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = {row for row in rows if users[row[0]] >= max(k, min_length) and items[row[1]] >= k}
        if kept == rows:
            return rows
        rows = kept


@dataclass
class Expected:
    """The plain way, user by user; items of one time are in no order here."""

    dropped: dict[str, int]
    users_without_history: int
    rows: dict[str, list[tuple[int, str]]]

    @classmethod
    def of(cls, log: list[Row], k: int, min_length: int, cutoff: Cutoff | None) -> "Expected":
        once = set(log)
        held_out = {row for row in once if cutoff is not None and row[2] >= cutoff.validation}
        core = core_of(once - held_out, k, min_length)
        users, items = {row[0] for row in core}, {row[1] for row in core}
        strangers = {row for row in held_out if row[0] not in users}
        unknown = {row for row in held_out - strangers if row[1] not in items}
        kept = core | (held_out - strangers - unknown)
        dropped = {"duplicates": len(log) - len(once)}
        if cutoff is not None:
            dropped["rows_of_users_without_history"] = len(strangers)
            dropped["rows_of_items_outside_the_catalogue"] = len(unknown)
        rows = {
            user: sorted((time, item) for who, item, time in kept if who == user)
            for user in sorted(users)
        }
        return cls(dropped, len({row[0] for row in strangers}), rows)

    def history_length(self, user: str, split: str, cutoff: Cutoff | None) -> tuple[int, bool]:
        """How many items the history has, and whether there is a target."""
        times = [time for time, _ in self.rows[user]]
        if cutoff is None:
            return len(times) - (2 if split == "validation" else 1), True
        first, end = (10, 20) if split == "validation" else (20, 99)
        return sum(time < first for time in times), any(first <= time < end for time in times)


logs = st.lists(
    st.tuples(
        st.sampled_from([f"u{n}" for n in range(8)]), st.sampled_from("abcdefg"), st.integers(0, 29)
    ),
    min_size=20,
    max_size=150,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=logs, k=st.integers(0, 4), longer=st.integers(0, 3), by_time=st.booleans(),
    ties=st.sampled_from(["shuffle", "keep"]), size=st.sampled_from([1, 3, 100]),
    again=st.integers(0, 9),
)  # fmt: skip
def test_clean_equals_the_plain_way(tmp_path_factory, rows, k, longer, by_time, ties, size, again):
    rows = rows + rows[:again]  # duplicates
    cutoff = CUTOFF if by_time else None
    fewest = (1 if by_time else 3) + longer
    wanted = Expected.of(rows, k, fewest, cutoff)
    options = {"k_core": k, "min_length": fewest, "cutoff": cutoff, "ties": ties}
    places = {
        split: {user: wanted.history_length(user, split, cutoff) for user in wanted.rows}
        for split in ("validation", "test")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets_module, "USERS_PER_BUCKET", size)
        if not all(any(has for _, has in found.values()) for found in places.values()):
            with pytest.raises(DataError, match=r"no user is left|none of .* has a row in the"):
                cleaned(rows, tmp_path_factory, **options)
            return
        found = cleaned(rows, tmp_path_factory, **options)
    sequences = found.sequences
    assert sequences.user_ids == list(wanted.rows)
    core_items = {
        item for seen in wanted.rows.values() for time, item in seen if cutoff is None or time < 10
    }
    assert sequences.item_ids == sorted(core_items)
    assert {key: found.dropped[key] for key in wanted.dropped} == wanted.dropped
    assert sum(found.dropped.values()) + sequences.num_interactions == found.num_read == len(rows)
    assert found.users_without_history == wanted.users_without_history
    for user, seen in by_user(sequences, found.timestamps).items():
        reported = [(time, item) for item, time in seen]
        assert sorted(reported) == wanted.rows[user]
        assert [time for time, _ in reported] == [time for time, _ in wanted.rows[user]]
    for split, of_users in places.items():
        view = sequences.history_and_target(split)
        with_target = [user for user, (_, has) in of_users.items() if has]
        assert [sequences.user_ids[user] for user in view.users] == with_target
        lengths = [length for length, _ in of_users.values()]
        assert (view.ends - view.starts).tolist() == lengths
        for user, (_, has) in enumerate(of_users.values()):
            target = sequences.items[view.ends[user]] if has else NO_TARGET
            assert view.targets[user] == target
            one = sequences.history_and_target(split, np.array([user]))
            here = (view.starts[user], view.ends[user], target)
            assert (one.starts[0], one.ends[0], one.targets[0]) == here
    for through, split in (("n-2", "validation"), ("n-1", "test")):
        lengths = [length for length, _ in places[split].values()]
        ends = sequences.training_ends(through) - sequences.offsets[:-1]
        assert ends.tolist() == lengths


@settings(max_examples=40, deadline=None)
@given(rows=logs, seed=st.integers(0, 3), shuffler=st.randoms(use_true_random=False))
def test_the_order_of_the_log_does_not_count_where_ties_are_shuffled(
    tmp_path_factory, rows, seed, shuffler
):
    rows += [(user, item, 50 + n) for user in ("u0", "u1") for n, item in enumerate("abc")]
    first = cleaned(rows, tmp_path_factory, k_core=0, seed=seed)
    mixed = list(rows)
    shuffler.shuffle(mixed)
    second = cleaned(mixed, tmp_path_factory, k_core=0, seed=seed)
    assert first.sequences.sequences_hash() == second.sequences.sequences_hash()
    assert first.timestamps.tolist() == second.timestamps.tolist()
    assert first.dropped == second.dropped


def items_of(found: CleanLog, user: str = "u") -> tuple[str, ...]:
    return tuple(item for item, _ in by_user(found.sequences, found.timestamps)[user])


def test_ties_are_kept_or_drawn_anew_by_each_seed(tmp_path_factory):
    items = tuple(f"i{n:02d}" for n in random.Random(0).sample(range(30), 30))
    rows = [("u", item, 5) for item in items]
    assert items_of(cleaned(rows, tmp_path_factory, k_core=0, ties="keep")) == items
    orders = {items_of(cleaned(rows, tmp_path_factory, k_core=0, seed=n)) for n in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == sorted(items) for order in orders)
    assert items not in orders


def test_ties_are_drawn_for_each_user_and_each_time(tmp_path_factory):
    """Ten items come together again and again, for each user and time in another order; and each of
    three comes first for about a third of 3,000 users."""
    items = [f"i{n}" for n in range(10)]
    rows = [(user, item, time) for user in ("u", "v") for time in (5, 6, 7) for item in items]
    found = cleaned(rows, tmp_path_factory, k_core=0)
    orders = {items_of(found, user)[10 * n : 10 * n + 10] for user in ("u", "v") for n in range(3)}
    assert len(orders) == 6
    assert all(sorted(order) == items for order in orders)
    many = cleaned(
        [(f"u{n}", i, 5) for n in range(3000) for i in "abc"], tmp_path_factory, k_core=0
    )
    first = Counter(many.sequences.items[::3].tolist())
    assert all(900 < first[item] < 1100 for item in range(3))


def test_dates_are_cut_before_all_else(tmp_path_factory):
    rows = [("u", "a", n) for n in range(6)] * 2
    found = cleaned(rows, tmp_path_factory, k_core=3, since=1, until=3)
    assert found.timestamps.tolist() == [1, 2, 3]
    assert (found.dropped["outside_dates"], found.dropped["duplicates"]) == (6, 3)
    assert found.num_read == 12


def test_each_reason_is_counted(tmp_path_factory):
    rows = [(f"u{n}", item, 5 + m) for n in range(3) for m, item in enumerate("abc")]
    rows += [("u0", "a", 5)]  # a duplicate
    rows += [("u1", "rare", 9)]  # an item below the core
    rows += [("lonely", "a", 1)]  # a user below the core
    rows += [("short", "a", 1), ("short", "b", 2)]  # enough for the core, too few for three parts
    found = cleaned(rows, tmp_path_factory, k_core=2)
    assert list(found.dropped.items()) == [
        ("outside_dates", 0),
        ("duplicates", 1),
        ("items_below_k_core", 1),
        ("users_below_k_core", 1),
        ("users_below_min_length", 2),
    ]
    assert found.num_read == len(rows) == 14
    assert cleaned(rows, tmp_path_factory, k_core=0, min_length=4).sequences.user_ids == ["u1"]


def test_users_are_in_numeric_order(tmp_path_factory):
    rows = [(user, item, n) for user in ("10", "9", "100") for n, item in enumerate("cab")]
    assert cleaned(rows, tmp_path_factory, k_core=0).sequences.user_ids == ["9", "10", "100"]


def test_nothing_left_names_the_remedy(tmp_path_factory):
    left = r"log.csv: no user is left of 1 with 4 rows \(.*\): lower --k-core 5 or --min-length 3"
    with pytest.raises(DataError, match=left) as caught:
        cleaned([("u", "a", n) for n in range(4)], tmp_path_factory)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"log\.csv: empty"):
        cleaned([], tmp_path_factory)
    for wrong, message in (
        ({"ties": "mix"}, "choose shuffle or keep"),
        ({"k_core": -1}, "k_core is -1"),
        ({"min_length": 2}, r"min_length is 2: at least 3 .*\(training, validation, test\)"),
        ({"min_length": 0, "cutoff": CUTOFF}, "at least 1 are needed .in the training period"),
        ({"since": 2, "until": 1}, "since lies after until"),
    ):
        with pytest.raises(ValueError, match=message):
            Cleaning(**wrong)  # type: ignore[arg-type]
