"""What `prepare` says of what it made: rows left out in words, dates, and ties."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from genrec_shards.cleaning.left_out import left_out
from genrec_shards.cleaning.summary import prepare_summary, tie_summary
from genrec_shards.dataset import load_dataset
from genrec_shards.histories import tied_targets
from genrec_shards.prepare import prepare
from genrec_shards.sequences import sequences_from_ids
from logs import START, dated_rows, messy_rows, write_csv
from places import ROOT

from genrec_dist.cli.app import run_command


def test_what_was_left_out_is_said_in_words(tmp_path):
    # Items r1 and r2 and user d are below the core, e has enough for it and is below the length.
    rows = [(user, item, START + n) for user in "abc" for n, item in enumerate("wxyz")]
    rows += [("a", "r1", START + 9), ("b", "r2", START), ("d", "w", START + 1), ("d", "x", START)]
    rows += [("e", item, START + n) for n, item in enumerate("xyz")] + rows[:1]
    path = write_csv(tmp_path / "log.csv", rows)
    path.write_text(path.read_text() + "f,w,never\n")
    made = prepare(path, tmp_path / "data", k_core=3, min_length=4, on_error="skip")
    assert prepare_summary(made)[:2] == [
        "log.csv was read as interactions: text with commas between cells, users in column user, "
        "items in item, times in timestamp",
        "21 rows read, 12 kept (from 2014-05-13 to 2014-05-13); left out: 1 line that could not be "
        "read, 1 row there already with the same user, item and time, 2 rows of 2 items with fewer "
        "than 3 interactions, 2 rows of 1 user with fewer than 3 interactions, 3 rows of 1 user "
        "with fewer than 4 interactions",
    ]
    assert load_dataset(tmp_path / "data").info == made.info
    assert asdict(made.info.cleaned) == {
        **{"k_core": 3, "min_length": 4, "items_below_k_core": 2},
        **{"users_below_k_core": 1, "users_below_min_length": 1},
    }


@pytest.mark.parametrize(("k_core", "min_length"), [(6, 3), (4, 7), (3, 3)])
@pytest.mark.parametrize("cutoff", [None, "2015-04-01,2015-05-15"])
def test_items_and_users_are_counted_as_by_hand(tmp_path, k_core, min_length, cutoff):
    few = [("U0001", "rare", START), ("brief", "I001", START), ("U0001", "new", START + 34 * 10**6)]
    rows = sorted({*messy_rows(2), *few})
    split = {} if cutoff is None else {"split": "global-time", "cutoff": cutoff}
    options = {"k_core": k_core, "min_length": min_length, **split}
    made = prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", **options)
    end = np.inf if cutoff is None else np.datetime64("2015-04-01", "s").astype(int)
    training = [row for row in rows if row[2] < end]
    users, items = {user for user, _, _ in training}, {item for _, item, _ in training}
    gone, rare = {}, set()  # user -> whether they had enough rows for the core
    while True:
        staying = [row for row in training if row[0] not in gone and row[1] not in rare]
        by_user = Counter(user for user, _, _ in staying)
        by_item = Counter(item for _, item, _ in staying)
        under = {item for item in items - rare if by_item[item] < k_core}
        brief = {user for user in users - set(gone) if by_user[user] < max(k_core, min_length)}
        if not under and not brief:
            break
        gone |= {user: by_user[user] >= k_core for user in brief}
        rare |= under
    named = {user for user, item, _ in training if item not in rare and user in gone}
    found = made.info.cleaned
    assert found.items_below_k_core == len(rare) > 0
    assert found.users_below_k_core == sum(not gone[user] for user in named)
    assert found.users_below_min_length == sum(gone[user] for user in named)


def test_every_reason_has_words(tmp_path):
    path = write_csv(tmp_path / "log.csv", dated_rows())
    dates = {"split": "global-time", "cutoff": "2014-07-01,2014-10-01"}
    made = prepare(path, tmp_path / "data", k_core=2, **dates)
    new = ("new_items_below_k", "new_users_below_min_length")
    for reason in (*made.info.dropped, *new):
        assert reason not in left_out({reason: 1}, {})
        assert left_out({reason: 0}, {}) == ""
    assert left_out({"items_below_k_core": 1234}, {}) == (
        "1,234 rows of items with too few interactions"
    )


def test_a_directory_of_an_earlier_version_says_what_it_can():
    old = load_dataset(ROOT / "tests" / "fixtures" / "old_run" / "data")
    assert (old.info.cleaned, old.info.read_as) == (None, None)
    assert not any("read as" in line for line in prepare_summary(old))
    assert tie_summary(old)[0]


def test_a_directory_without_the_new_fields_is_loaded_and_summed_up(tmp_path):
    rows = [(f"u{n % 6}", f"i{n % 7}", START + n) for n in range(60)] + [("u1", "rare", START)]
    made = prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", k_core=2)
    place = tmp_path / "data" / "dataset.json"
    fields = json.loads(place.read_text())
    del fields["cleaned"], fields["read_as"]
    place.write_text(json.dumps(fields))
    old = load_dataset(tmp_path / "data")
    assert old.info.dropped == made.info.dropped
    (line,) = prepare_summary(old)
    assert line.endswith("left out: 1 row of items with too few interactions")


# Ties


def test_targets_that_share_their_time_are_counted_by_hand():
    sequences = sequences_from_ids(list("abcd"), [3, 4, 3, 3], list("1234567123456"))
    # a: none, though b begins when a ends. b: validation with the item before. c: both targets.
    # d: the two before the test target.
    times = np.array([*(1, 2, 3), *(3, 4, 4, 5), *(1, 2, 2), *(2, 2, 9)])
    assert tied_targets(sequences, times) == {"validation": 0.75, "test": 0.25}


@pytest.mark.parametrize(
    ("num_tied", "ties", "words"),
    [
        (0, "shuffle", "No user has held-out items that share a timestamp with others."),
        (2, "shuffle", "20 % of users have held-out items (test; validation: 20 %) that share a"),
        (2, "shuffle", "; their order is drawn at random (`--ties keep` takes the file's)."),
        (2, "keep", "; their order is the file's (`--ties shuffle` draws it at random)."),
        (4, "shuffle", "Warning: 40 % of users"),
    ],
)
def test_prepare_says_how_many_users_have_tied_targets(tmp_path, capfd, num_tied, ties, words):
    rows = [
        (f"u{user}", f"i{n}", START + (3 if user < num_tied and n == 4 else n))
        for user in range(10)
        for n in range(5)
    ]
    path = write_csv(tmp_path / "log.csv", rows)
    command = ["prepare", str(path), "--out", str(tmp_path / "data"), "--ties", ties]
    assert run_command(command) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert words in said
    assert ("Warning" in said) == (num_tied == 4)
    assert json.loads((tmp_path / "data" / "audit.json").read_text())["tied_targets"] == {
        "validation": num_tied / 10,
        "test": num_tied / 10,
    }


def test_sequences_have_no_times(tmp_path):
    (tmp_path / "log.txt").write_text("u1 1 2 3\nu2 3 2 1\n")
    words, many = tie_summary(prepare(tmp_path / "log.txt", tmp_path / "data"))
    assert (words, many) == ("No times: each user's items are in the order of the file.", False)
