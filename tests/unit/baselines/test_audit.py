"""What the audit finds in small data whose answer is known, and in the real data sets."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.histories import exclude_history_default
from genrec_shards.numbering.numbering import Numbering, number
from genrec_shards.sequences import Sequences, read_sequences, sequences_from_ids

from genrec_dist.baselines.leak_audit import audit

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")


def fresh_items(num_users: int = 300) -> Sequences:
    """Numbered by first appearance, and every second user's last item is new to the corpus: the
    leak in its pure form."""
    rng = np.random.default_rng(0)
    ids: list[str] = []
    newest = 5
    for user in range(num_users):
        old = rng.choice(newest, 4, replace=False) + 1
        newest += user % 2
        ids += [str(item) for item in old[:3]] + [str(newest if user % 2 else old[3])]
    return sequences_from_ids([str(user) for user in range(num_users)], [4] * num_users, ids)


def with_codes(sequences: Sequences, codes: list[str]) -> Numbering:
    return Numbering("random", 0, codes, sequences.user_ids)


def test_the_ids_of_first_appearance_leak_and_a_random_numbering_does_not():
    sequences = fresh_items()
    found = audit(sequences, number(sequences, "random", seed=0))
    assert found.ids_leak
    assert not found.leaks
    ids, popular, codes = (
        f"{scores['test']['HR@5']:.4f}".removeprefix("0")
        for scores in (found.counting_of_ids, found.popularity, found.counting)
    )
    assert found.sentence() == (
        f"Your log's ids leak: a rule that learns nothing scores HR@5 {ids} with them (popularity "
        f"{popular}). The random codes used here: {codes}."
    )
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (written["sentence"], written["ids_leak"]) == (found.sentence(), True)
    assert (written["leaks"], written["tied_users"], written["tied_targets"]) == (False, None, None)
    splits = {"validation", "test"}
    assert set(written["counting"]) == set(written["popularity"]) == splits
    given = audit(sequences, number(sequences, "given", seed=0))
    assert given.leaks
    assert given.ids_leak
    assert given.counting == given.counting_of_ids == found.counting_of_ids
    assert given.sentence().endswith("They are the codes used here; use --numbering random.")


def test_ids_that_show_no_leak_are_no_proof():
    sequences = fresh_items()
    shuffled = number(sequences, "random", seed=0).item_codes
    order = np.argsort([int(code) for code in shuffled])
    items = np.argsort(order)[sequences.items].astype(np.int32)
    ids = [str(1 + n) for n in range(sequences.num_items)]
    renamed = Sequences(items, sequences.offsets, sequences.user_ids, ids)
    found = audit(renamed, with_codes(renamed, sequences.item_ids[::-1]))
    assert not found.ids_leak
    assert found.sentence().startswith("Your log's ids show no leak: ")
    assert "a lower bound on a leak, not a proof of its absence" in found.sentence()
    # Whatever the codes are called, they are examined too.
    back = [sequences.item_ids[old] for old in order]
    leaking = audit(renamed, with_codes(renamed, back))
    assert leaking.leaks
    assert leaking.sentence().endswith(", which leaks; use --numbering random.")


def test_a_handful_of_users_raises_no_alarm():
    ids = ["1", "2", "3", "9", "5", "40", "8", "4", "55", *map(str, range(6, 61))]
    sequences = sequences_from_ids(["a", "b", "c", "d"], [3, 3, 3, 55], ids)
    found = audit(sequences, with_codes(sequences, [str(code) for code in range(1, 61)]))
    assert found.counting["test"]["HR@5"] == 0.5
    assert found.popularity["test"]["HR@5"] == 0.25
    assert not found.leaks


def test_shares_of_repeated_and_unseen_targets_by_hand():
    # a: test repeats 1; b: validation repeats 4, test 5 unseen; c: test 6 unseen; d: neither.
    ids = [*("1", "2", "3", "1"), *("4", "1", "4", "5"), *("2", "4", "6"), *("1", "4", "2")]
    sequences = sequences_from_ids(["a", "b", "c", "d"], [4, 4, 3, 3], ids)
    found = audit(sequences, with_codes(sequences, sequences.item_ids))
    assert found.repeated_targets == {"validation": 0.25, "test": 0.25}
    # Training parts: 1 2, 4 1, 2, 1. Validation targets 3 4 4 4, test targets 1 5 6 2.
    assert found.unseen_targets == {"validation": 0.25, "test": 0.5}
    assert (found.users, found.items) == (4, 6)
    assert (found.tied_users, found.tied_held_out) == (None, None)


def test_ties_are_counted_within_users():
    sequences = sequences_from_ids(["a", "b", "c", "d"], [3, 4, 3, 4], list("12345123451234"))
    # b and d begin at the time at which the user before them ends: no tie of theirs.
    timestamps = np.array([*(1, 2, 3), *(3, 4, 5, 6), *(7, 8, 8), *(8, 9, 9, 10)])
    found = audit(sequences, with_codes(sequences, sequences.item_ids), timestamps)
    assert (found.tied_users, found.tied_held_out) == (0.5, 0.25)
    # c: both targets at 8; d: the validation target and the item before it at 9.
    assert found.tied_targets == {"validation": 0.5, "test": 0.25}


def test_history_is_excluded_by_default_only_where_no_target_repeats():
    assert exclude_history_default(fresh_items())
    # A test target, a validation target, and an item of the training part alone.
    for lengths, ids, excluded in (
        ([3, 3], "121345", False),
        ([3, 3], "112345", False),
        ([4, 3], "1123456", True),
    ):
        sequences = sequences_from_ids(["a", "b"], lengths, list(ids))
        assert exclude_history_default(sequences) == excluded


def test_audit_says_that_ids_or_codes_are_no_numbers():
    sequences = sequences_from_ids(["a"], [3], ["x", "y", "z"])
    found = audit(sequences, number(sequences, "given", seed=0))
    assert (found.counting, found.counting_of_ids) == (None, None)
    assert not found.leaks
    assert not found.ids_leak
    assert found.sentence() == (
        "Your log's ids are not distinct whole numbers, so the rule that counts on from the last "
        "id cannot tell whether they leak. They are the codes used here; --numbering random cannot "
        "leak."
    )
    coded = audit(sequences, number(sequences, "random", seed=0))
    assert coded.counting_of_ids is None
    assert coded.sentence().endswith(
        "The random codes used here: it scores HR@5 1.0000 with them (popularity 1.0000)."
    )
    numbers = sequences_from_ids(["a"], [3], ["7", "8", "9"])
    words = audit(numbers, Numbering("collaborative", 0, ["a1-b1", "a1-b2", "a2-b1"], ["1"]))
    assert words.counting is None
    assert words.counting_of_ids is not None
    assert words.sentence().endswith(
        "The collaborative codes used here are no whole numbers, and the rule does not apply to "
        "them."
    )


def test_audit_refuses_wrong_lengths():
    sequences = fresh_items()
    with pytest.raises(ValueError, match="2 item codes for"):
        audit(sequences, with_codes(sequences, ["1", "2"]))
    with pytest.raises(ValueError, match="3 timestamps for"):
        audit(sequences, with_codes(sequences, sequences.item_ids), np.arange(3))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("Beauty", (22363, 12101), [0.0530, 0.0424, 0.0549, 0.0430]),
        pytest.param(
            *("Sports_and_Outdoors", (35598, 18357), [0.0461, 0.0365, 0.0475, 0.0370]),
            marks=pytest.mark.ranks,
        ),
    ],
)
def test_audit_of_real_data(name, size, expected):
    path = Path(os.environ.get("GENREC_DATA", "data")) / f"{name}.txt.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set GENREC_DATA to the folder of the real data sets")
    sequences = read_sequences(path)
    start = time.process_time()
    found = audit(sequences, number(sequences, "given", seed=0))
    assert time.process_time() - start < 10  # 0.5 s
    assert (found.users, found.items) == size
    metrics = found.counting["test"]
    assert [metrics[key] for key in METRICS] == pytest.approx(expected, abs=6e-5)
    assert found.leaks
    assert f"scores HR@5 {expected[0]:.4f}".replace("0.", ".") in found.sentence()
    assert found.repeated_targets == {"validation": 0.0, "test": 0.0}
    found = audit(sequences, number(sequences, "random", seed=0))
    assert found.ids_leak
    assert max(found.counting["test"][key] for key in METRICS) < 0.002
    assert not found.leaks
    assert not audit(sequences, number(sequences, "train-order", seed=0)).leaks
