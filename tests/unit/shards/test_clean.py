"""From a log to sequences: nothing is lost unseen, no order of the log counts, the core is the
core."""

import random
from collections import Counter

import polars as pl
import pytest
from genrec_shards.cleaning import buckets as buckets_module
from genrec_shards.cleaning.clean import Cleaning, clean
from genrec_shards.errors import DataError
from hypothesis import given, settings
from hypothesis import strategies as st

Row = tuple[str, str, int]


def frames_of(rows: list[Row], size: int = 7) -> list[pl.DataFrame]:
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64}
    return [
        pl.DataFrame(rows[first : first + size], schema=schema, orient="row")
        for first in range(0, len(rows), size)
    ]


def cleaned(rows: list[Row], folder, **options):
    folder = folder.mktemp("rows")
    return clean(frames_of(rows), Cleaning(**options), folder, "log.csv")


def told(found) -> dict[str, list[tuple[str, int]]]:
    """user -> (item, time) in the order of the sequences."""
    sequences, result = found.sequences, {}
    for row, user in enumerate(sequences.user_ids):
        places = range(sequences.offsets[row], sequences.offsets[row + 1])
        result[user] = [
            (sequences.item_ids[sequences.items[at]], int(found.timestamps[at])) for at in places
        ]
    return result


def core_of(rows: list[Row], k: int, min_length: int) -> set[Row]:
    """The plain way: throw out until nothing changes."""
    left = set(rows)
    while True:
        users, items = Counter(row[0] for row in left), Counter(row[1] for row in left)
        kept = {row for row in left if users[row[0]] >= max(k, min_length) and items[row[1]] >= k}
        if kept == left:
            return left
        left = kept


def test_dates_are_cut_before_all_else(tmp_path_factory):
    rows = [("u", "a", n) for n in range(6)] * 2
    found = cleaned(rows, tmp_path_factory, k_core=3, since=1, until=3)
    assert [time for _, time in told(found)["u"]] == [1, 2, 3]
    assert (found.dropped["outside_dates"], found.dropped["duplicates"], found.num_read) == (
        6,
        3,
        12,
    )
    with pytest.raises(ValueError, match="since lies after until"):
        Cleaning(since=2, until=1)


logs = st.lists(
    st.tuples(
        st.sampled_from([f"u{n}" for n in range(9)]), st.sampled_from("abcdefg"), st.integers(0, 12)
    ),
    min_size=1,
    max_size=150,
)


@settings(max_examples=120, deadline=None)
@given(
    rows=logs,
    k=st.integers(0, 4),
    ties=st.sampled_from(["shuffle", "keep"]),
    size=st.sampled_from([1, 3, 100]),
)
def test_what_is_kept_and_what_is_dropped_add_up_to_the_log(tmp_path_factory, rows, k, ties, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets_module, "USERS_A_BUCKET", size)
        wanted = core_of(rows, k, 3)
        if not wanted:
            with pytest.raises(DataError, match="no user is left"):
                cleaned(rows, tmp_path_factory, k_core=k, ties=ties)
            return
        found = cleaned(rows, tmp_path_factory, k_core=k, ties=ties)
    assert {(user, *at) for user, row in told(found).items() for at in row} == wanted
    assert found.sequences.num_interactions == len(wanted)
    assert found.num_read == len(rows) == len(wanted) + sum(found.dropped.values())
    assert found.dropped["duplicates"] == len(rows) - len(set(rows))
    for row in told(found).values():
        assert [time for _, time in row] == sorted(time for _, time in row)
    assert found.sequences.item_ids == sorted({item for _, item, _ in wanted})


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


def test_ties_are_kept_or_drawn_anew_by_each_seed(tmp_path_factory):
    items = [f"i{n:02d}" for n in random.Random(0).sample(range(30), 30)]
    rows = [("u", item, 5) for item in items]
    kept = cleaned(rows, tmp_path_factory, k_core=0, ties="keep")
    assert [item for item, _ in told(kept)["u"]] == items
    orders = {
        tuple(item for item, _ in told(cleaned(rows, tmp_path_factory, k_core=0, seed=n))["u"])
        for n in range(5)
    }
    assert len(orders) == 5
    assert all(sorted(order) == sorted(items) for order in orders)
    assert tuple(items) not in orders


def test_ties_are_drawn_for_each_user_and_each_time(tmp_path_factory):
    """Ten items come together again and again, for each user and time in another order."""
    items = [f"i{n}" for n in range(10)]
    rows = [(user, item, time) for user in ("u", "v") for time in (5, 6, 7) for item in items]
    orders = set()
    for row in told(cleaned(rows, tmp_path_factory, k_core=0)).values():
        orders |= {tuple(item for item, at in row if at == time) for time in (5, 6, 7)}
    assert len(orders) == 6
    assert all(sorted(order) == items for order in orders)


def test_shuffled_ties_favour_no_item(tmp_path_factory):
    """Each of three items of one time comes first for about a third of 3,000 users."""
    rows = [(f"u{n}", item, 5) for n in range(3000) for item in "abc"]
    first = Counter(row[0][0] for row in told(cleaned(rows, tmp_path_factory, k_core=0)).values())
    assert all(900 < first[item] < 1100 for item in "abc")


def test_each_reason_is_counted(tmp_path_factory):
    rows = [(f"u{n}", item, 5 + m) for n in range(3) for m, item in enumerate("abc")]
    rows += [("u0", "a", 5)]  # a duplicate
    rows += [("u1", "rare", 9)]  # an item below the core
    rows += [("lonely", "a", 1)]  # a user below the core
    rows += [("short", "a", 1), ("short", "b", 2)]  # enough for the core, too few for three parts
    found = cleaned(rows, tmp_path_factory, k_core=2)
    assert found.dropped == {
        "outside_dates": 0,
        "duplicates": 1,
        "items_below_k_core": 1,
        "users_below_k_core": 1,
        "users_below_min_length": 2,
    }
    assert found.num_read == len(rows) == 14
    assert cleaned(rows, tmp_path_factory, k_core=0, min_length=4).sequences.user_ids == ["u1"]


def test_users_are_in_order_whatever_comes_first(tmp_path_factory):
    rows = [(user, item, n) for user in ("10", "9", "100") for n, item in enumerate("cab")]
    found = cleaned(rows, tmp_path_factory, k_core=0)
    assert found.sequences.user_ids == ["9", "10", "100"]


def test_nothing_left_names_the_way_out(tmp_path_factory):
    with pytest.raises(
        DataError, match=r"log.csv: no user is left of 1 with 4 rows \(.*\): lower --k-core 5"
    ) as caught:
        cleaned([("u", "a", n) for n in range(4)], tmp_path_factory)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"log\.csv: empty"):
        cleaned([], tmp_path_factory)


@pytest.mark.parametrize("wrong", [{"ties": "mix"}, {"k_core": -1}, {"min_length": 2}])
def test_wrong_choices(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Cleaning(**wrong)
