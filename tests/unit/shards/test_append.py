"""A data directory grows: old rows and codes stay, every new row is counted, nothing doubles, and
no held-out item tells."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.append import append, appended_told
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.errors import DataError
from genrec_shards.numbering.extend import continued, nearest_leaves
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.numbering import number
from genrec_shards.prepare import cleaning_told, prepare
from genrec_shards.sequences import Sequences
from genrec_shards.storage.write import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp

from genrec_dist.cli.app import run_command
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words
from genrec_dist.decoding.trie import build_trie

Row = tuple[str, str, int]
NUMBERINGS = ["random", "given", "train-order", "collaborative", "semantic"]
START = 1_400_000_000


def log_rows(seed: int = 0) -> list[Row]:
    """1,500 rows of distinct times in their order; behind row 900 there are new users and new
    items."""
    dice = random.Random(seed)
    early = [
        (f"u{dice.randrange(60)}", f"i{int(40 * dice.random() ** 1.5)}", START + n)
        for n in range(900)
    ]
    return early + [
        (f"u{dice.randrange(80)}", f"i{int(60 * dice.random())}", START + n)
        for n in range(900, 1500)
    ]


def csv(path: Path, rows: list[Row]) -> Path:
    path.write_text(
        "user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    )
    return path


def meta(path: Path, ids: list[str]) -> Path:
    """Items whose numbers have one last digit share a word."""
    path.write_text("item,title\n" + "".join(f"{id_},kind{id_[-1]} thing {id_}\n" for id_ in ids))
    return path


def by_user(data: Dataset) -> dict[str, list[tuple[str, int]]]:
    told, times = data.sequences, data.timestamps
    if times is None:
        times = np.zeros(told.num_interactions, np.int64)
    parts = [slice(*told.offsets[user : user + 2]) for user in range(told.num_users)]
    return {
        id_: [
            (told.item_ids[item], int(time))
            for item, time in zip(told.items[part], times[part], strict=True)
        ]
        for id_, part in zip(told.user_ids, parts, strict=True)
    }


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def old_and_new(tmp_path: Path, numbering: str = "random", **rules: int) -> tuple[Dataset, Dataset]:
    rows = log_rows()
    ids = sorted({row[1] for row in rows})
    texts = {"items": meta(tmp_path / "meta.csv", ids)} if numbering == "semantic" else {}
    old = prepare(
        csv(tmp_path / "old.csv", rows[:900]), tmp_path / "old", numbering=numbering, **texts
    )  # type: ignore[arg-type]
    new = append(
        csv(tmp_path / "new.csv", rows[900:]),
        tmp_path / "old",
        tmp_path / "grown",
        **rules,
        **texts,
    )  # type: ignore[arg-type]
    return old, new


def sequence_file(path: Path, users: dict[str, str]) -> Path:
    lines = "".join(f"{user} {items}\n" for user, items in users.items())
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


OLD_LINES = {"a": "x y z", "b": "y z x w", "c": "z w x"}


def test_a_log_in_two_parts_gives_what_the_whole_gives(tmp_path: Path) -> None:
    rows = log_rows()
    # The newer part also holds late rows, which belong among the old ones.
    late = set(random.Random(1).sample(range(900), 90))
    parts = (
        [row for n, row in enumerate(rows) if n < 900 and n not in late],
        [row for n, row in enumerate(rows) if n >= 900 or n in late],
    )
    random.Random(2).shuffle(parts[1])
    whole = prepare(csv(tmp_path / "whole.csv", rows), tmp_path / "whole", k_core=0)
    prepare(csv(tmp_path / "one.csv", parts[0]), tmp_path / "data", k_core=0)
    grown = append(csv(tmp_path / "two.csv", parts[1]), tmp_path / "data", k_core=0)
    assert by_user(grown) == by_user(whole)
    assert by_user(load_dataset(tmp_path / "data")) == by_user(whole)


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_old_rows_and_codes_stay_and_new_codes_are_words(tmp_path: Path, numbering: str) -> None:
    old, new = old_and_new(tmp_path, numbering)
    assert new.info.users > old.info.users
    assert new.info.items > old.info.items
    for kind in ("item", "user"):
        before, after = (getattr(data.sequences, f"{kind}_ids") for data in (old, new))
        codes, more = (getattr(data.numbering, f"{kind}_codes") for data in (old, new))
        assert after[: len(before)] == before
        assert more[: len(codes)] == codes
        assert len(set(more)) == len(more)
        assert after[len(before) :] == sorted(
            after[len(before) :], key=lambda id_: int(id_[1:]) if id_.isdigit() else id_
        )
        if numbering in ("random", "train-order"):
            assert sorted(map(int, more)) == list(range(1, len(more) + 1))
    if numbering == "given":
        assert new.numbering.item_codes == new.sequences.item_ids
    again = load_dataset(tmp_path / "grown")
    assert again.numbering == new.numbering
    assert again.info == new.info
    tokenizer = train_tokenizer(old.numbering.item_codes, 400)
    trie = build_trie(
        *build_words(
            tokenizer, new.numbering.item_codes, new.numbering.user_codes
        ).tokens_of_items()
    )
    assert (trie.item_node > 0).all()


def test_the_same_bytes_whatever_the_order_of_the_new_log(tmp_path: Path) -> None:
    rows = [
        (user, item, START + (time - START) // 7) for user, item, time in log_rows()
    ]  # with ties
    prepare(csv(tmp_path / "old.csv", rows[:896]), tmp_path / "old")
    append(csv(tmp_path / "new.csv", rows[896:]), tmp_path / "old", tmp_path / "one")
    shuffled = rows[896:]
    random.Random(3).shuffle(shuffled)
    append(csv(tmp_path / "new.csv", shuffled), tmp_path / "old", tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    for found in (one, two):
        found["dataset.json"] = json.dumps(
            json.loads(found["dataset.json"]) | {"appended": None}
        ).encode()
    assert one == two


def test_every_row_is_counted_and_told(tmp_path: Path) -> None:
    rows = log_rows()
    prepare(csv(tmp_path / "old.csv", rows[:900]), tmp_path / "data")
    kept = load_dataset(tmp_path / "data")
    there = next(
        row
        for row in rows[:900]
        if row[1] in kept.sequences.item_ids and row[0] in kept.sequences.user_ids
    )
    known_user, known_item = there[:2]
    more = [
        *rows[900:],
        *[there, rows[1000], rows[1000]],  # there, and twice more
        *[(known_user, "rare", START + 5000 + n) for n in range(4)],
        *[("brief", known_item, START + 5000), ("brief", known_item, START + 5001)],
        (known_user, known_item, START - 10**6),
    ]
    path = csv(tmp_path / "new.csv", more)
    path.write_text(path.read_text() + "broken,line,\n")
    new = append(path, tmp_path / "data", since="2014-05-13", on_error="skip")
    assert new.info.appended is not None
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
    assert (new.info.users, new.info.items) == (
        kept.info.users + entry.users,
        kept.info.items + entry.items,
    )
    first, *others = appended_told(new)
    assert f"{entry.read:,} rows read, {entry.interactions:,} appended" in first
    assert "3 duplicates" in first
    assert any("new.csv:" in line for line in others)
    again = prepare(tmp_path / "data", tmp_path / "anew", numbering="train-order")
    assert again.info.appended == new.info.appended
    assert f"{kept.info.interactions:,} kept" in cleaning_told(again)[0]


def test_new_ones_need_each_other_until_all_have_enough(tmp_path: Path) -> None:
    """The user who falls short takes the item with her that had enough rows by her alone."""
    rows = [
        (user, item, START + 10 * n + m)
        for n, (user, item) in enumerate([("a", "x"), ("b", "y")])
        for m in range(5)
    ]
    prepare(csv(tmp_path / "old.csv", rows), tmp_path / "data", k_core=0)
    new = [
        ("a", "n", START + 100),
        ("d", "n", START + 101),
        ("d", "lone", START + 102),
        ("d", "x", START + 103),
    ]
    with pytest.raises(
        DataError,
        match=r"nothing .*\(1 duplicates|3 new_items_below_k, 1 new_users_below_min_length",
    ):
        append(csv(tmp_path / "new.csv", new), tmp_path / "data", k_core=2)
    grown = append(csv(tmp_path / "new.csv", new), tmp_path / "data", k_core=1)
    assert grown.sequences.item_ids == ["x", "y", "lone", "n"]
    assert grown.sequences.user_ids == ["a", "b", "d"]


def test_the_same_log_twice_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    rows = log_rows()
    prepare(csv(tmp_path / "old.csv", rows[:900]), tmp_path / "data")
    new = csv(tmp_path / "new.csv", rows[900:])
    append(new, tmp_path / "data")
    before = files(tmp_path / "data")
    random_order = rows[900:]
    random.Random(1).shuffle(random_order)
    for again in (
        new,
        csv(tmp_path / "resaved.csv", random_order),
        csv(tmp_path / "part.csv", rows[1000:1100]),
    ):
        with pytest.raises(
            DataError, match=r"nothing in it that .* lacks and may take .*duplicates"
        ) as caught:
            append(again, tmp_path / "data")
        assert "\n" not in str(caught.value)
        assert files(tmp_path / "data") == before
    # With a new row in it, that row alone is taken.
    grown = append(
        csv(tmp_path / "more.csv", [*rows[900:], ("u1", "i1", START + 9000)]), tmp_path / "data"
    )
    assert grown.info.appended is not None
    assert [entry.interactions for entry in grown.info.appended][1:] == [1]


def test_in_place_the_shards_go_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = log_rows()
    data = tmp_path / "data"
    write_shards(prepare(csv(tmp_path / "old.csv", rows[:900]), data), data / "shards")
    new = csv(tmp_path / "new.csv", rows[900:])
    assert run_command(["prepare", "--append", str(new), "--to", str(data)]) == 0
    said = capsys.readouterr().out
    assert f"next: genrec shard {data}" in said
    assert "600 rows read" in said
    assert {path.name for path in data.iterdir()} == {
        *("sequences.parquet", "items.parquet", "users.parquet", "dataset.json", "audit.json")
    }
    assert json.loads((data / "audit.json").read_text())["users"] == load_dataset(data).info.users
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_not_ours_is_not_taken_along(tmp_path: Path) -> None:
    rows = log_rows()
    data = tmp_path / "data"
    prepare(csv(tmp_path / "old.csv", rows[:900]), data)
    (data / "notes.txt").write_text("mine")
    new = csv(tmp_path / "new.csv", rows[900:])
    with pytest.raises(
        ValueError, match=r"notes\.txt is no part of a data directory and would be lost: .* --out"
    ):
        append(new, data)
    assert append(new, data, tmp_path / "other").info.users
    assert (data / "notes.txt").read_text() == "mine"


def test_the_old_one_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = log_rows()
    data = tmp_path / "data"
    prepare(csv(tmp_path / "old.csv", rows[:900]), data)
    before = files(data)

    def full(dataset: Dataset, folder: Path) -> None:
        (folder / "sequences.parquet").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genrec_shards.append.write_dataset", full)
    with pytest.raises(OSError, match="No space"):
        append(csv(tmp_path / "new.csv", rows[900:]), data)
    assert files(data) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "new.csv", "old.csv"]


def test_sequences_go_behind_the_old_ones(tmp_path: Path) -> None:
    old = prepare(sequence_file(tmp_path / "old.txt", OLD_LINES), tmp_path / "data")
    new = sequence_file(tmp_path / "new.txt", {"b": "n", "f": "x n m", "a": "w w", "e": "y x z"})
    grown = append(new, tmp_path / "data")
    found = {user: " ".join(item for item, _ in row) for user, row in by_user(grown).items()}
    assert found == {"a": "x y z w w", "b": "y z x w n", "c": "z w x", "f": "x n m", "e": "y x z"}
    assert grown.sequences.user_ids == ["a", "b", "c", "f", "e"]
    assert grown.sequences.item_ids == [*old.sequences.item_ids, "m", "n"]
    assert grown.info.appended is not None
    assert (grown.info.appended[0].interactions, grown.info.appended[0].read) == (9, None)


def test_a_new_user_of_sequences_needs_three_items(tmp_path: Path) -> None:
    prepare(sequence_file(tmp_path / "old.txt", OLD_LINES), tmp_path / "data")
    new = sequence_file(tmp_path / "new.txt", {"a": "w", "new": "x y"})
    with pytest.raises(
        DataError, match=r"new\.txt:2: user 'new' has 2 items, at least 3 are needed"
    ):
        append(new, tmp_path / "data")
    grown = append(new, tmp_path / "data", on_error="skip")
    assert grown.info.appended is not None
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
    tmp_path: Path, name: str, lines: dict[str, str], said: str
) -> None:
    prepare(sequence_file(tmp_path / "old.txt", OLD_LINES), tmp_path / "data")
    if said != "begin what":
        append(sequence_file(tmp_path / "new.txt", {"a": "w w", "f": "x n m"}), tmp_path / "data")
    before = files(tmp_path / "data")
    with pytest.raises(DataError, match=said) as caught:
        append(sequence_file(tmp_path / name, lines), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "data") == before


def test_times_and_no_times(tmp_path: Path) -> None:
    rows = log_rows()
    prepare(csv(tmp_path / "old.csv", rows[:900]), tmp_path / "timed")
    plain = sequence_file(tmp_path / "plain.txt", {"u1": "i1 i2 i3"})
    with pytest.raises(DataError, match=r"plain\.txt: no times, and the rows of .*timed have some"):
        append(plain, tmp_path / "timed")
    prepare(sequence_file(tmp_path / "old.txt", OLD_LINES), tmp_path / "plain")
    grown = append(
        csv(tmp_path / "new.csv", [("a", "w", 30), ("a", "y", 20), ("a", "y", 20)]),
        tmp_path / "plain",
    )
    assert [item for item, _ in by_user(grown)["a"]] == ["x", "y", "z", "y", "w"]
    assert grown.timestamps is None
    assert grown.info.appended is not None
    assert grown.info.appended[0].dropped["duplicates"] == 1
    with pytest.raises(DataError, match="the same sha256"):
        append(tmp_path / "new.csv", tmp_path / "plain")


def test_a_data_directory_is_a_source_too(tmp_path: Path) -> None:
    rows = log_rows()
    whole = prepare(csv(tmp_path / "whole.csv", rows), tmp_path / "whole", k_core=0)
    prepare(csv(tmp_path / "old.csv", rows[:900]), tmp_path / "data", k_core=0)
    grown = append(tmp_path / "whole", tmp_path / "data")
    assert by_user(grown) == by_user(whole)
    assert grown.info.appended is not None
    assert grown.info.appended[0].dropped == {"duplicates": 900}
    assert grown.info.appended[0].source == whole.info.source


def test_a_split_by_time_is_refused(tmp_path: Path) -> None:
    rows = log_rows()
    dates = "2014-05-13T17:30:00,2014-05-13T17:50:00"
    path = csv(
        tmp_path / "log.csv",
        [(user, item, START + 3 * (time - START)) for user, item, time in rows],
    )
    prepare(path, tmp_path / "data", split="global-time", cutoff=dates)
    with pytest.raises(DataError, match=r"split global-time: .* prepare the whole log again"):
        append(path, tmp_path / "data")


def test_texts_come_from_the_table_and_old_ones_stay(tmp_path: Path) -> None:
    old, _ = old_and_new(tmp_path, "semantic")
    assert old.descriptions is not None
    other = tmp_path / "other.csv"
    other.write_text("item,title\n" + "".join(f"i{n},other {n}\n" for n in range(60)))
    new = append(tmp_path / "new.csv", tmp_path / "old", tmp_path / "second", items=other)
    assert new.descriptions is not None
    assert new.descriptions.texts[: old.info.items] == old.descriptions.texts
    assert all(text.startswith("other") for text in new.descriptions.texts[old.info.items :])
    assert new.descriptions.titles is not None
    assert new.info.described_by == old.info.described_by
    assert new.info.appended is not None
    assert new.info.appended[0].described_by is not None
    assert new.info.appended[0].described_by.name == "other.csv"
    without = append(tmp_path / "new.csv", tmp_path / "old", tmp_path / "third")
    assert without.descriptions is not None
    assert without.descriptions.texts[old.info.items :] == [""] * (
        without.info.items - old.info.items
    )


def words(codes: list[str]) -> list[str]:
    return [code.rpartition("-")[0] for code in codes]


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
        return Sequences(
            flat, np.cumsum([0, *map(len, lists)]), [str(n) for n in range(len(lists))], catalogue
        )

    before = sequences(users, ids)
    more = [
        [*items[:3], "new", *items[3:]] if n % 4 == 1 else items for n, items in enumerate(users)
    ]
    after = sequences(more, [*ids, "new"])
    taken = continued(number(before, "collaborative", 0, levels=[4]), after)
    leaf = dict(zip([*ids, "new"], words(taken.item_codes), strict=True))
    assert leaf["new"] == leaf["11"]
    assert taken.hierarchy is not None
    assert (taken.hierarchy.unseen, taken.hierarchy.placed_at_random) == (0, 0)
    told = Descriptions([*texts, "the word2 of kind2"], "meta", "0")
    described = number(
        before, "semantic", 0, levels=[4], descriptions=Descriptions(texts, "meta", "0")
    )
    leaf = dict(
        zip([*ids, "new"], words(continued(described, after, told).item_codes), strict=True)
    )
    assert leaf["new"] == leaf["21"]
    told.texts[-1] = ""  # no text: as it is taken, whatever the codes are made of
    near = [leaf_ for leaf_, n in zip(words(described.item_codes), ids, strict=True) if n[0] == "1"]
    assert words(continued(described, after, told).item_codes)[-1] in near
    nobody = continued(
        number(before, "collaborative", 0, levels=[4]), sequences(users, [*ids, "new"])
    )
    assert nobody.hierarchy is not None
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
    texts = Descriptions(
        [f"kind{n % 3} word{n}" if n % 4 else "" for n in range(len(catalogue))], "meta", "0"
    )

    def sequences(lists: list[list[int]], num_items: int) -> Sequences:
        flat = np.array([item for items in lists for item in items], np.int32)
        ids = [f"u{n}" for n in range(len(lists))]
        return Sequences(flat, np.cumsum([0, *map(len, lists)]), ids, catalogue[:num_items])

    known = users[: dice.randint(1, num_users)]
    before = number(
        sequences([[item % num_old for item in items] for items in known], num_old), numbering, 0,  # type: ignore[arg-type]
        descriptions=Descriptions(texts.texts[:num_old], "meta", "0") if numbering == "semantic" else None,
    )  # fmt: skip
    found = []
    for _ in range(2):
        lists = [
            [*items[:-2], dice.randrange(len(catalogue)), dice.randrange(len(catalogue))]
            for items in users
        ]
        longer = sequences(lists, len(catalogue))
        found.append(continued(before, longer, texts if numbering == "semantic" else None))
    assert found[0].numbering_hash() == found[1].numbering_hash()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--append", "n", "--out", "o"], "--append n needs --to DATA"),
        (["s", "--append", "n", "--to", "d"], "give SOURCE s or --append n, not both"),
        (["s", "--to", "d", "--out", "o"], "--to DATA belongs to --append NEW"),
        (
            ["--append", "n", "--to", "d", "--numbering", "given"],
            "--numbering with --append: d has settled it",
        ),
        (["--append", "n", "--to", "d", "--seed", "0"], "--seed with --append"),
        (["--append", "n", "--to", "d", "--ties", "keep"], "--ties with --append"),
        (["s"], "give --out"),
        (["--out", "o"], "give SOURCE, or --append NEW --to DATA"),
    ],
)
def test_wrong_combinations_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run_command(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"k_core": -1}, "k_core is -1"),
        ({"min_length": 2}, "min_length is 2: at least 3"),
        ({"since": "2020-01-01", "until": "2019-01-01"}, "since lies after until"),
        ({"item_column": "x"}, "give --items META"),
        ({"format": "none"}, "format 'none' is not supported"),
        ({"format": "sequences", "k_core": 3}, "k_core and min_length are a log's"),
        ({"format": "sequences", "since": "2020-01-01"}, "are a log's"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, rules: dict, said: str) -> None:
    rows = log_rows()
    prepare(csv(tmp_path / "old.csv", rows[:900]), tmp_path / "data")
    before = files(tmp_path / "data")
    with pytest.raises(ValueError, match=said):
        append(csv(tmp_path / "new.csv", rows[900:]), tmp_path / "data", **rules)
    assert files(tmp_path / "data") == before


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    rows = log_rows()
    prepare(csv(tmp_path / "old.csv", rows[:900]), tmp_path / "data")
    with pytest.raises(DataError, match=r"absent\.csv: no such file"):
        append(tmp_path / "absent.csv", tmp_path / "data")
    with pytest.raises(DataError, match=r"dataset\.json: no such file"):
        append(tmp_path / "old.csv", tmp_path / "nowhere")
    (tmp_path / "empty.csv").write_text("user,item,timestamp\n")
    with pytest.raises(DataError, match=r"empty\.csv: nothing in it .* \(no rows\)"):
        append(tmp_path / "empty.csv", tmp_path / "data")
    with pytest.raises(ValueError, match="exists: choose another output"):
        append(csv(tmp_path / "new.csv", rows[900:]), tmp_path / "data", tmp_path / "data" / "..")
