"""A data directory grows: old rows and codes stay, every new row is counted, nothing doubles, and
no held-out item moves a code."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.append import append
from genrec_shards.cleaning.summary import append_summary, prepare_summary
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.errors import DataError
from genrec_shards.numbering.extend import continued, nearest_leaves
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.numbering import number
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences
from genrec_shards.storage.write import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import START, Row, by_user, files, write_csv
from scipy import sparse as sp

from genrec_dist.cli.app import run_command
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words
from genrec_dist.decoding.trie import build_trie

NUMBERINGS = ["random", "given", "train-order", "collaborative", "semantic"]
OLD_LINES = {"a": "x y z", "b": "y z x w", "c": "z w x"}


def log_rows() -> list[Row]:
    """1,500 rows of distinct times in their order; after row 900 there are new users and items."""
    dice = random.Random(0)
    early = [
        (f"u{dice.randrange(60)}", f"i{int(40 * dice.random() ** 1.5)}", START + n)
        for n in range(900)
    ]
    return early + [
        (f"u{dice.randrange(80)}", f"i{int(60 * dice.random())}", START + n)
        for n in range(900, 1500)
    ]


ROWS = log_rows()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The first 900 rows prepared; the others are `new.csv` beside them."""
    write_csv(tmp_path / "new.csv", ROWS[900:])
    return prepare(write_csv(tmp_path / "old.csv", ROWS[:900]), tmp_path / "data").path


def sequence_file(path: Path, users: dict[str, str]) -> Path:
    lines = "".join(f"{user} {items}\n" for user, items in users.items())
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A data directory without times."""
    return prepare(sequence_file(tmp_path / "old.txt", OLD_LINES), tmp_path / "plain").path


def items_by_user(data: Dataset) -> dict[str, list[tuple[str, int]]]:
    return by_user(data.sequences, data.timestamps)


def check_refused(data: Path, new: Path, match: str, **options: object) -> None:
    """In one line, and nothing changes."""
    before = files(data)
    with pytest.raises(ValueError, match=match) as caught:
        append(new, data, **options)
    assert "\n" not in str(caught.value)
    assert files(data) == before


def test_a_log_in_two_parts_gives_what_the_whole_gives(tmp_path: Path) -> None:
    # The newer part also holds late rows, which belong among the old ones.
    late = set(random.Random(1).sample(range(900), 90))
    is_new = [n >= 900 or n in late for n in range(len(ROWS))]
    old, new = ([row for row, n in zip(ROWS, is_new, strict=True) if n == part] for part in (0, 1))
    random.Random(2).shuffle(new)
    whole = prepare(write_csv(tmp_path / "whole.csv", ROWS), tmp_path / "whole", k_core=0)
    prepare(write_csv(tmp_path / "one.csv", old), tmp_path / "data", k_core=0)
    grown = append(write_csv(tmp_path / "two.csv", new), tmp_path / "data", k_core=0)
    assert items_by_user(grown) == items_by_user(whole)
    assert items_by_user(load_dataset(tmp_path / "data")) == items_by_user(whole)


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_old_rows_and_codes_stay_and_new_codes_are_words(tmp_path: Path, numbering: str) -> None:
    """Texts come from the table, and old ones stay."""
    semantic = numbering == "semantic"
    ids = sorted({row[1] for row in ROWS})
    titles = [(id_, f"kind{id_[-1]} thing {id_}") for id_ in ids]
    meta = tmp_path / "meta.csv"
    meta.write_text("item,title\n" + "".join(f"{id_},{title}\n" for id_, title in titles))
    texts = {"items": meta} if semantic else {}
    log = write_csv(tmp_path / "old.csv", ROWS[:900])
    old = prepare(log, tmp_path / "old", numbering=numbering, **texts)
    more = write_csv(tmp_path / "new.csv", ROWS[900:])
    new = append(more, tmp_path / "old", tmp_path / "grown", **texts)
    assert new.info.users > old.info.users
    assert new.info.items > old.info.items
    for kind in ("item", "user"):
        before, after = (getattr(data.sequences, f"{kind}_ids") for data in (old, new))
        codes, longer = (getattr(data.numbering, f"{kind}_codes") for data in (old, new))
        assert after[: len(before)] == before
        assert longer[: len(codes)] == codes
        assert len(set(longer)) == len(longer)
        assert after[len(before) :] == sorted(after[len(before) :])
        if numbering in ("random", "train-order"):
            assert sorted(map(int, longer)) == list(range(1, len(longer) + 1))
    if numbering == "given":
        assert new.numbering.item_codes == new.sequences.item_ids
    again = load_dataset(tmp_path / "grown")
    assert (again.numbering, again.info) == (new.numbering, new.info)
    tokenizer = train_tokenizer(old.numbering.item_codes, 400)
    words = build_words(tokenizer, new.numbering.item_codes, new.numbering.user_codes)
    assert (build_trie(*words.tokens_of_items()).item_node > 0).all()
    if not semantic:
        return
    other = tmp_path / "other.csv"
    other.write_text("item,title\n" + "".join(f"i{n},other {n}\n" for n in range(60)))
    second = append(more, tmp_path / "old", tmp_path / "second", items=other)
    found, num_old = second.descriptions, old.info.items
    assert found.texts[:num_old] == old.descriptions.texts
    assert all(text.startswith("other") for text in found.texts[num_old:])
    assert found.titles is not None
    assert second.info.described_by == old.info.described_by
    assert second.info.appended[0].described_by.name == "other.csv"
    without = append(more, tmp_path / "old", tmp_path / "third").descriptions
    assert without.texts[num_old:] == [""] * (second.info.items - num_old)


def test_the_same_bytes_whatever_the_order_of_the_new_log(tmp_path: Path) -> None:
    rows = [(user, item, START + (time - START) // 7) for user, item, time in ROWS]  # with ties
    prepare(write_csv(tmp_path / "old.csv", rows[:896]), tmp_path / "old")
    found = []
    for seed in (3, 4):
        random.Random(seed).shuffle(new := rows[896:])
        write_csv(tmp_path / "new.csv", new)
        append(tmp_path / "new.csv", tmp_path / "old", tmp_path / f"{seed}")
        found.append(files(tmp_path / f"{seed}"))
        info = json.loads(found[-1]["dataset.json"])
        found[-1]["dataset.json"] = json.dumps(info | {"appended": None}).encode()
    assert found[0] == found[1]


def test_every_row_is_counted_and_told(data: Path, tmp_path: Path) -> None:
    kept = load_dataset(data)
    ids = kept.sequences
    there = next(row for row in ROWS if row[1] in ids.item_ids and row[0] in ids.user_ids)
    user, item, _ = there
    more = [
        *ROWS[900:],
        *[there, ROWS[1000], ROWS[1000]],  # there, and twice more
        *[(user, "rare", START + 5000 + n) for n in range(4)],
        *[("brief", item, START + 5000), ("brief", item, START + 5001)],
        (user, item, START - 10**6),
    ]
    path = write_csv(tmp_path / "new.csv", more)
    path.write_text(path.read_text() + "broken,line,\n")
    new = append(path, data, since="2014-05-13", on_error="skip")
    (entry,) = new.info.appended
    assert entry.read == len(more) + 1 == entry.interactions + sum(entry.dropped.values())
    assert entry.dropped["bad_lines"] == entry.dropped["outside_dates"] == 1
    assert entry.dropped["duplicates"] == 3
    assert entry.dropped["new_items_below_k"] >= 4
    assert entry.dropped["new_users_below_min_length"] >= 2
    assert "rare" not in new.sequences.item_ids
    assert "brief" not in new.sequences.user_ids
    assert new.info.interactions == kept.info.interactions + entry.interactions
    assert new.info.read == kept.info.read
    assert new.info.users == kept.info.users + entry.users
    assert new.info.items == kept.info.items + entry.items
    recognised, first, *others = append_summary(new)
    assert recognised.startswith("new.csv was read as interactions: text with commas")
    assert f"{entry.read:,} rows read, {entry.interactions:,} appended" in first
    assert "3 rows there already with the same user, item and time" in first
    fewest = f"new users with fewer than {entry.min_length} interactions"
    assert f"{entry.dropped['new_users_below_min_length']} rows of {fewest}" in first
    assert any("new.csv:" in line for line in others)
    again = prepare(data, tmp_path / "anew", numbering="train-order")
    assert again.info.appended == new.info.appended
    assert f"{kept.info.interactions:,} kept" in prepare_summary(again)[1]


def test_new_ones_need_each_other_until_all_have_enough(tmp_path: Path) -> None:
    """The user who falls short takes along the item that had enough rows by this user alone."""
    pairs = [("a", "x"), ("b", "y")]
    rows = [(*pair, START + 10 * n + m) for n, pair in enumerate(pairs) for m in range(5)]
    data = prepare(write_csv(tmp_path / "old.csv", rows), tmp_path / "data", k_core=0).path
    taken = [("a", "n"), ("d", "n"), ("d", "lone"), ("d", "x")]
    new = write_csv(
        tmp_path / "new.csv", [(*pair, START + 100 + n) for n, pair in enumerate(taken)]
    )
    check_refused(
        data,
        new,
        "3 rows of new items with fewer than 2 interactions, 1 row of new users with",
        k_core=2,
    )
    grown = append(new, data, k_core=1)
    assert grown.sequences.item_ids == ["x", "y", "lone", "n"]
    assert grown.sequences.user_ids == ["a", "b", "d"]


def test_the_same_log_twice_is_refused_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    append(tmp_path / "new.csv", data)
    random.Random(1).shuffle(mixed := ROWS[900:])
    for new in (
        tmp_path / "new.csv",
        write_csv(tmp_path / "resaved.csv", mixed),
        write_csv(tmp_path / "part.csv", ROWS[1000:1100]),
    ):
        check_refused(data, new, r"nothing in it that .* lacks and may take .*there already")
    # With a new row in it, that row alone is taken.
    more = write_csv(tmp_path / "more.csv", [*ROWS[900:], ("u1", "i1", START + 9000)])
    assert append(more, data).info.appended[1].interactions == 1


def test_in_place_the_shards_go_and_the_command_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(load_dataset(data), data / "shards")
    assert run_command(["prepare", "--append", str(tmp_path / "new.csv"), "--to", str(data)]) == 0
    said = capsys.readouterr().out
    assert f"next: genrec shard {data}" in said
    assert "600 rows read" in said
    kept = {"sequences.parquet", "items.parquet", "users.parquet", "dataset.json", "audit.json"}
    assert set(files(data)) == kept
    assert json.loads((data / "audit.json").read_text())["users"] == load_dataset(data).info.users
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_files_in_the_directory_are_not_lost(data: Path, tmp_path: Path) -> None:
    (data / "notes.txt").write_text("mine")
    lost = r"notes\.txt is no part of a data directory and would be lost: .* --out"
    check_refused(data, tmp_path / "new.csv", lost)
    assert append(tmp_path / "new.csv", data, tmp_path / "other").info.users
    assert (data / "notes.txt").read_text() == "mine"


def test_the_old_one_stays_until_the_new_one_is_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(data)

    def full(dataset: Dataset, folder: Path) -> None:
        (folder / "sequences.parquet").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genrec_shards.append.write_dataset", full)
    with pytest.raises(OSError, match="No space"):
        append(tmp_path / "new.csv", data)
    assert files(data) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "new.csv", "old.csv"]


# Other formats than logs


def test_sequences_come_after_the_old_ones(plain: Path, tmp_path: Path) -> None:
    old = load_dataset(plain)
    lines = {"b": "n", "f": "x n m", "a": "w w", "e": "y x z"}
    grown = append(sequence_file(tmp_path / "new.txt", lines), plain)
    found = {user: " ".join(i for i, _ in seen) for user, seen in items_by_user(grown).items()}
    assert found == {"a": "x y z w w", "b": "y z x w n", "c": "z w x", "f": "x n m", "e": "y x z"}
    assert grown.sequences.user_ids == ["a", "b", "c", "f", "e"]
    assert grown.sequences.item_ids == [*old.sequences.item_ids, "m", "n"]
    assert (grown.info.appended[0].interactions, grown.info.appended[0].read) == (9, None)


def test_a_new_user_of_sequences_needs_three_items(plain: Path, tmp_path: Path) -> None:
    new = sequence_file(tmp_path / "new.txt", {"a": "w", "new": "x y"})
    check_refused(plain, new, r"new\.txt:2: user 'new' has 2 items, at least 3 are needed")
    grown = append(new, plain, on_error="skip")
    assert grown.info.appended[0].dropped == {"bad_lines": 1}
    assert "new" not in grown.sequences.user_ids


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("new.txt", {"a": "w w", "f": "x n m"}, "the same sha256"),
        ("new.txt.gz", {"a": "w w", "f": "x n m"}, "end with what"),
        ("tail.txt", {"a": "w", "f": "n m"}, "end with what"),
        ("whole.txt", {user: f"{items} w" for user, items in OLD_LINES.items()}, "begin what"),
        ("old.txt", OLD_LINES, "the same sha256"),
    ],
)
def test_without_times_what_looks_like_an_old_source_is_refused(
    plain: Path, tmp_path: Path, name: str, lines: dict[str, str], said: str
) -> None:
    if said != "begin what":
        append(sequence_file(tmp_path / "new.txt", {"a": "w w", "f": "x n m"}), plain)
    check_refused(plain, sequence_file(tmp_path / name, lines), said)


def test_times_and_no_times(data: Path, plain: Path, tmp_path: Path) -> None:
    untimed = sequence_file(tmp_path / "plain.txt", {"u1": "i1 i2 i3"})
    check_refused(data, untimed, r"plain\.txt: no times, and the rows of .*data have some")
    rows = [("a", "w", 30), ("a", "y", 20), ("a", "y", 20)]
    grown = append(write_csv(tmp_path / "new.csv", rows), plain)
    assert [item for item, _ in items_by_user(grown)["a"]] == ["x", "y", "z", "y", "w"]
    assert grown.timestamps is None
    assert grown.info.appended[0].dropped["duplicates"] == 1
    check_refused(plain, tmp_path / "new.csv", "the same sha256")


def test_a_data_directory_is_a_source_too(tmp_path: Path) -> None:
    whole = prepare(write_csv(tmp_path / "whole.csv", ROWS), tmp_path / "whole", k_core=0)
    prepare(write_csv(tmp_path / "old.csv", ROWS[:900]), tmp_path / "data", k_core=0)
    grown = append(tmp_path / "whole", tmp_path / "data")
    assert items_by_user(grown) == items_by_user(whole)
    assert grown.info.appended[0].dropped == {"duplicates": 900}
    assert grown.info.appended[0].source == whole.info.source


# Codes


def test_a_new_item_goes_to_the_leaf_of_its_neighbours_and_of_its_words() -> None:
    """Items of one kind are taken together; the new one is taken with kind 1, and described as kind
    2."""
    dice = random.Random(0)
    kinds = [[f"{kind}{n}" for n in range(6)] for kind in range(4)]
    ids = [id_ for kind in kinds for id_ in kind]
    users = [[*dice.sample(kinds[n % 4], 5), "00", "10"] for n in range(80)]
    texts = [f"kind{id_[0]} word{id_[0]} {id_}" for id_ in ids]
    rows = {id_: row for row, id_ in enumerate([*ids, "new"])}

    def sequences(lists: list[list[str]], catalogue: list[str]) -> Sequences:
        flat = np.array([rows[id_] for items in lists for id_ in items], np.int32)
        offsets = np.cumsum([0, *map(len, lists)])
        return Sequences(flat, offsets, [str(n) for n in range(len(lists))], catalogue)

    def leaves(codes: list[str]) -> dict[str, str]:
        words = [code.rpartition("-")[0] for code in codes]
        return dict(zip([*ids, "new"], words, strict=False))

    before = sequences(users, ids)
    more = [
        [*items[:3], "new", *items[3:]] if n % 4 == 1 else items for n, items in enumerate(users)
    ]
    after = sequences(more, [*ids, "new"])
    collaborative = number(before, "collaborative", 0, levels=[4])
    taken = continued(collaborative, after)
    leaf = leaves(taken.item_codes)
    assert leaf["new"] == leaf["11"]
    assert (taken.hierarchy.unseen, taken.hierarchy.placed_at_random) == (0, 0)
    described = Descriptions([*texts, "the word2 of kind2"], "meta", "0")
    old_texts = Descriptions(texts, "meta", "0")
    semantic = number(before, "semantic", 0, levels=[4], descriptions=old_texts)
    leaf = leaves(continued(semantic, after, described).item_codes)
    assert leaf["new"] == leaf["21"]
    described.texts[-1] = ""  # no text: as it is taken, whatever the codes are made of
    leaf = leaves(continued(semantic, after, described).item_codes)
    assert leaf["new"] in {leaf[id_] for id_ in ids if id_[0] == "1"}
    nobody = continued(collaborative, sequences(users, [*ids, "new"]))
    assert nobody.hierarchy.placed_at_random == 1
    assert len(set(nobody.item_codes)) == len(nobody.item_codes)


def test_the_nearest_leaf_is_chosen_from_the_first_level_down() -> None:
    branches = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    profiles = sp.csr_matrix(np.array([[0, 2.0, 1, 1.9], [0, 0, 0, 0], [0, 0, 0, 1]]))
    found = nearest_leaves(profiles, sp.identity(4, format="csr"), branches)
    assert found.tolist() == [[1, 1], [-1, -1], [1, 1]]


@pytest.mark.parametrize("numbering", NUMBERINGS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), num_users=st.integers(3, 10), num_new=st.integers(1, 8))
def test_no_held_out_item_of_the_longer_sequences_moves_a_code(
    numbering: str, seed: int, num_users: int, num_new: int
) -> None:
    dice, num_old = random.Random(seed), 10
    catalogue = [f"i{n:02d}" for n in range(num_old + num_new)]
    users = [
        [dice.randrange(len(catalogue)) for _ in range(dice.randint(3, 8))]
        for _ in range(num_users)
    ]
    words = [f"kind{n % 3} word{n}" if n % 4 else "" for n in range(len(catalogue))]
    texts = Descriptions(words, "meta", "0")

    def sequences(lists: list[list[int]], num_items: int) -> Sequences:
        flat = np.array([item for items in lists for item in items], np.int32)
        ids = [f"u{n}" for n in range(len(lists))]
        return Sequences(flat, np.cumsum([0, *map(len, lists)]), ids, catalogue[:num_items])

    known = [[item % num_old for item in items] for items in users[: dice.randint(1, num_users)]]
    semantic = numbering == "semantic"
    old_texts = Descriptions(texts.texts[:num_old], "meta", "0") if semantic else None
    before = number(sequences(known, num_old), numbering, 0, descriptions=old_texts)
    found = []
    for _ in range(2):
        lists = [
            [*items[:-2], dice.randrange(len(catalogue)), dice.randrange(len(catalogue))]
            for items in users
        ]
        longer = sequences(lists, len(catalogue))
        found.append(continued(before, longer, texts if semantic else None))
    assert found[0].numbering_hash() == found[1].numbering_hash()
    assert found[0] == found[1]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--append n --out o", "--append n needs --to DATA"),
        ("s --append n --to d", "give SOURCE s or --append n, not both"),
        ("s --to d --out o", "--to DATA belongs to --append NEW"),
        ("--append n --to d --numbering given", "--numbering with --append: d has settled it"),
        ("--append n --to d --seed 0", "--seed with --append"),
        ("--append n --to d --ties keep", "--ties with --append"),
        ("--append n --to d --engine local", "--engine with --append: what is added is read by"),
        ("s", "give --out"),
        ("--out o", "give SOURCE, or --append NEW --to DATA"),
    ],
)
def test_wrong_combinations_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert run_command(["prepare", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_wrong_options_and_paths_are_refused(data: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.csv"
    for options, said in (
        ({"k_core": -1}, "k_core is -1"),
        ({"min_length": 2}, "min_length is 2: at least 3"),
        ({"since": "2020-01-01", "until": "2019-01-01"}, "since lies after until"),
        ({"item_column": "x"}, "give --items META"),
        ({"seed": 1}, "seed with append: .* has settled it"),
        ({"format": "none"}, "format 'none' is not supported"),
        ({"format": "sequences", "k_core": 3}, "k_core, min_length, .* are a log's"),
        ({"format": "sequences", "since": "2020-01-01"}, "are a log's"),
        ({"out": data / ".."}, "exists: choose another output"),
    ):
        check_refused(data, new, said, **options)
    check_refused(data, tmp_path / "absent.csv", r"absent\.csv: no such file")
    empty = write_csv(tmp_path / "empty.csv", [])
    check_refused(data, empty, r"empty\.csv: nothing in it .* \(no rows\)")
    empty.write_text("user,item,timestamp\nu,i,never\n")
    check_refused(
        data, empty, r"nothing in it .* \(1 line that could not be read\)", on_error="skip"
    )
    with pytest.raises(DataError, match=r"dataset\.json: no such file"):
        append(new, tmp_path / "absent")


def test_a_split_by_time_is_refused(tmp_path: Path) -> None:
    dates = "2014-05-13T17:30:00,2014-05-13T17:50:00"
    rows = [(user, item, START + 3 * (time - START)) for user, item, time in ROWS]
    log = write_csv(tmp_path / "log.csv", rows)
    prepare(log, tmp_path / "data", split="global-time", cutoff=dates)
    later = r"split global-time: .* prepare the whole log again"
    check_refused(tmp_path / "data", log, later)
    check = r"a split by time \(global-time\) cannot be appended: append its log"
    prepare(log, tmp_path / "whole")
    check_refused(tmp_path / "whole", tmp_path / "data", check)
