"""Lists of other systems: every form gives the same numbers, and a bad list is one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.errors import DataError
from genrec_shards.prepare import prepare
from genrec_shards.storage.export import export
from logs import DATES, Row, dated_rows, write_csv

from genrec_dist.baselines.run import run_baseline, score_lists
from genrec_dist.cli.app import run_command
from genrec_dist.evaluation.metrics import WEIGHTS

SplitLists = list[tuple[str, list[str], list[float]]]
"""User, items, scores."""
KNOWN = (*WEIGHTS, "ci95", "breakdown", "beside", "coverage@10", "gini@10", "protocol", "users")


@pytest.fixture(scope="module")
def made(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitLists, dict]:
    """kNN's lists and metrics; some are shorter than 20."""
    out = tmp_path_factory.mktemp("knn")
    metrics = run_baseline("knn", load_dataset(tiny_data), "test", out)
    table = pq.read_table(out / "top20-test.parquet").to_pylist()
    return [(row["user"], row["items"], row["scores"]) for row in table], metrics


def as_long(lists: SplitLists, columns: tuple[str, ...], sign: str = ",") -> str:
    rows = [
        {"user_id": user, "item_id": item, "rank": place, "score": score}
        for user, items, scores in lists
        for place, (item, score) in enumerate(zip(items, scores, strict=True), start=1)
    ]
    random.Random(0).shuffle(rows)
    lines = [sign.join(str(row[name]) for name in columns) for row in rows]
    return "\n".join([sign.join(columns), *lines]) + "\n"


def write_ranks(lists: SplitLists, folder: Path) -> Path:
    (path := folder / "l.csv").write_text(as_long(lists, ("user_id", "item_id", "rank")))
    return path


def write_scores(lists: SplitLists, folder: Path) -> Path:
    (path := folder / "l.tsv").write_text(as_long(lists, ("item_id", "score", "user_id"), "\t"))
    return path


def write_lines(lists: SplitLists, folder: Path) -> Path:
    lines = [json.dumps({"user": user, "items": items}) + "\n" for user, items, _ in lists]
    (path := folder / "l.jsonl").write_text("".join(lines))
    return path


def write_cells(lists: SplitLists, folder: Path) -> Path:
    lines = [f"{user};{' '.join(items)};{scores}" for user, items, scores in lists]
    (path := folder / "l.csv").write_text("\n".join(["user;Items;scores", *lines]))
    return path


def write_printed(lists: SplitLists, folder: Path) -> Path:
    (path := folder / "l.csv").write_text(
        "\n".join(["user,recs", *(f'{user},"{items}"' for user, items, _ in lists)])
    )
    return path


def write_places(lists: SplitLists, folder: Path) -> Path:
    """The columns in no order, and short lists filled up."""
    order = random.Random(0).sample(range(1, 21), 20)
    lines = [
        ",".join([user, *((items[at - 1] if at <= len(items) else "") for at in order)])
        for user, items, _ in lists
    ]
    header = ",".join(["user", *(f"top_{at}" for at in order)])
    (path := folder / "l.csv").write_text("\n".join([header, *lines]))
    return path


def write_parquet(lists: SplitLists, folder: Path) -> Path:
    users, items, scores = zip(*lists, strict=True)
    table = pa.table({"user": list(users), "items": list(items), "scores": list(scores)})
    pq.write_table(table, folder / "l.parquet")
    return folder / "l.parquet"


WRITERS = [
    *(write_ranks, write_scores, write_lines, write_cells, write_printed),
    *(write_places, write_parquet),
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_form_of_lists_gives_the_numbers_of_the_system_itself(
    write: Callable[[SplitLists, Path], Path],
    tiny_data: Path,
    made: tuple[SplitLists, dict],
    tmp_path: Path,
) -> None:
    lists, expected = made
    path = write(lists, tmp_path)
    found, given = score_lists(path, load_dataset(tiny_data), "test", tmp_path / "out")
    assert {key: found[key] for key in KNOWN} == {key: expected[key] for key in KNOWN}
    assert found["system"] == "l"
    assert found["lists"] == {
        "name": path.name,
        "sha256": given.source.sha256,
        "shorter": sum(len(items) < 20 for _, items, _ in lists),
    }
    assert found["lists"]["shorter"] > 0
    table = pq.read_table(tmp_path / "out" / "top20-test.parquet").to_pylist()
    assert [(row["user"], row["items"]) for row in table] == [row[:2] for row in lists]


def test_whole_numbers_are_ids_however_a_file_holds_them(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("1 10 11 12 13\n2 12 10 13 11\n3 13 12 11 10\n")
    dataset = prepare(tmp_path / "log.txt", tmp_path / "data")
    # The targets of users 1, 2, 3 are 13, 11, 10.
    items = [[12, 10], [13], [10, 13, 11]]
    pq.write_table(pa.table({"user": [3, 1, 2], "items": items}), tmp_path / "l.parquet")
    found, _ = score_lists(
        tmp_path / "l.parquet", dataset, "test", tmp_path / "out", exclude_history=False
    )
    assert (found["HR@1"], found["HR@5"]) == (1 / 3, 1)


def test_scores_tie_only_where_the_file_has_them_equal(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("u a b c d\n")
    dataset = prepare(tmp_path / "log.txt", tmp_path / "data")
    for scores, rank in (("1.0000000001 1", 1), ("1 1", 2)):
        (tmp_path / "l.csv").write_text(f"user,items,scores\nu,d a,{scores}\n")
        score_lists(tmp_path / "l.csv", dataset, "test", tmp_path, exclude_history=False)
        assert pq.read_table(tmp_path / "top20-test.parquet")["rank"].to_pylist() == [rank]


# Lists of an exported training part.


def popularity_lists(train: pl.DataFrame, known: pl.DataFrame, path: Path, excluded: bool) -> None:
    """The 60 items with the most rows of `train` for each user of `known`, without those that the
    user has there."""
    user, item = known.columns[:2]
    counts = train.group_by(item).len("score").sort(item, descending=True)
    lists = known.select(user).unique().join(counts, how="cross")
    if excluded:
        lists = lists.join(known.select(user, item).unique(), on=[user, item], how="anti")
    lists.sort("score", descending=True).group_by(user).head(60).write_csv(path)


def log_of(repeats: bool) -> list[Row]:
    rows = dated_rows(num_items=50)
    rows += [(f"u{at % 36:02}", item, time + 7) for at, (_, item, time) in enumerate(rows)]
    if repeats:
        return rows
    return [*{(user, item): (user, item, time) for user, item, time in rows}.values()]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("form", ["csv", "rectools", "recbole"])
@pytest.mark.parametrize(
    "options",
    [
        {"min_length": 3},
        {"min_length": 3, "repeats": True},
        {"split": "global-time", "cutoff": DATES, "repeats": True},
    ],
)
def test_popularity_of_an_exported_training_part_scores_as_the_baseline(
    options: dict[str, Any], form: Any, split: Any, tmp_path: Path
) -> None:
    repeats = options.get("repeats", False)
    by_time = "cutoff" in options
    log = write_csv(tmp_path / "log.csv", dated_rows(num_items=50) if by_time else log_of(repeats))
    cleaning = {key: value for key, value in options.items() if key != "repeats"}
    dataset = prepare(log, tmp_path / "data", k_core=2, **cleaning)
    export(dataset, tmp_path / "split", form)

    def read(name: str) -> pl.DataFrame:
        if form == "recbole":
            return pl.read_csv(tmp_path / "split" / f"split.{name[:5]}.inter", separator="\t")
        return pl.read_csv(tmp_path / "split" / f"{name}.csv")

    train = read("train")
    known = train if split == "validation" else pl.concat([train, read("validation")])
    popularity_lists(train, known, tmp_path / "lists.csv", excluded=not repeats)
    expected = run_baseline("popularity", dataset, split, tmp_path / "out")
    found, given = score_lists(tmp_path / "lists.csv", dataset, split, tmp_path / "scored")
    assert expected["protocol"]["exclude_history"] is not repeats
    for key in (*WEIGHTS, "ci95", "breakdown", "beside", "users", "protocol"):
        assert found[key] == expected[key], key
    assert expected["HR@20"] > 0.1
    assert given.longest > 20
    # Order alone, without the scores, is another matter: there are ties, and one order is luck.
    ranks = [
        pq.read_table(tmp_path / out / f"top20-{split}.parquet")["rank"].to_pylist()
        for out in ("out", "scored")
    ]
    assert ranks[0] == ranks[1]


# What is refused.

BAD = [
    ("user,item,rank\nuser-0,{0},1\nuser-0,nope,2\n", "l.csv:3: user 'user-0': item 'nope' is not"),
    ("user,item,rank\nuser-0,{0},1\nwho,{0},1\n", "l.csv:3: user 'who' is not among the 120"),
    ("user,item,rank\nuser-0,{0},1\nuser-0,{0},2\n", "l.csv:3: user 'user-0' lists item '{0}' tw"),
    ("user,item,rank\nuser-0,{0},1\nuser-0,{1},1\n", "l.csv:3: user 'user-0' has two items of ra"),
    ("user,item,rank\nuser-0,{0},one\n", "l.csv:2: rank is 'one': give a number"),
    ("user,item,score\nuser-0,{0},nan\n", "l.csv:2: score is 'nan': give a number"),
    ("user,item,rank,score\nuser-0,{0},1,.1\nuser-0,{1},2,.2\n", "l.csv:3: user 'user-0' has a sc"),
    ("user,items\nuser-0,{0} {1}\nuser-0,{1}\n", "l.csv:3: user 'user-0' came before in line 2"),
    ("user,items,scores\nuser-0,{0} {1},.5\n", "l.csv:2: user 'user-0' has 2 items and 1 scores"),
    ("user,items\nuser-0,{history}\n", "l.csv:2: user 'user-0': item '{history}' is in the histo"),
    ("name,what\na,b\n", "l.csv:2: no lists in columns name, what: name the columns user, item"),
    ("user,item,rank\n", "l.csv: empty: expected a list of each user"),
    ("", "l.csv: empty: expected a list of each user"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_list_is_named_by_file_line_and_user(
    text: str, message: str, tiny_data: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(tiny_data)
    sequences = dataset.sequences
    names = {"history": sequences.item_ids[sequences.items[0]]}
    theirs = set(sequences.items[: sequences.offsets[1]].tolist())
    fine = [name for row, name in enumerate(sequences.item_ids) if row not in theirs]
    body = text.format(*fine, **names)
    if body.count("\n") > 1 and body.startswith("user,"):
        body += others(body.partition("\n")[0].split(","), dataset)
    (tmp_path / "l.csv").write_text(body)
    with pytest.raises(DataError) as error:
        score_lists(tmp_path / "l.csv", dataset, "test", tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path}/{message.format(*fine, **names)}")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def others(columns: list[str], dataset: Dataset) -> str:
    """Rows of all users but the first: one item each that is not in the history."""
    sequences, rows = dataset.sequences, []
    for user in range(1, sequences.num_users):
        had = set(
            sequences.items[sequences.offsets[user] : sequences.offsets[user + 1] - 1].tolist()
        )
        item = next(name for row, name in enumerate(sequences.item_ids) if row not in had)
        cells = {"user": sequences.user_ids[user], "item": item, "items": item}
        rows.append(",".join(cells.get(column, "1") for column in columns) + "\n")
    return "".join(rows)


def test_a_user_without_a_list_is_refused(
    tiny_data: Path, made: tuple[SplitLists, dict], tmp_path: Path
) -> None:
    path = write_ranks(made[0][1:], tmp_path)
    with pytest.raises(DataError, match=r"l\.csv: user 'user-0' has no list, and 120 users have"):
        score_lists(path, load_dataset(tiny_data), "test", tmp_path / "out")


# The command.


def test_score_shows_the_table_and_compares(
    tiny_data: Path,
    made: tuple[SplitLists, dict],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write_ranks(made[0], tmp_path)
    before = sorted(tmp_path.iterdir())
    command = ["score", str(path), "--data", str(tiny_data)]
    assert run_command([*command, "--name", "peer"]) == 0
    said = capfd.readouterr().out
    assert "of 120 lists have fewer than 20 items" in said
    assert "peer" in said
    assert "popularity" in said
    assert sorted(tmp_path.iterdir()) == before
    for seed in ("0", "1"):
        out = str(tmp_path / "peer" / seed)
        assert run_command([*command, "--out", out, "--seed", seed]) == 0
    assert run_command(["compare", str(tmp_path / "peer"), str(tmp_path / "peer" / "0")]) == 0
    assert "No difference" in capfd.readouterr().out
    # The lists that a result consists of are not replaced by themselves.
    own = tmp_path / "peer" / "0" / "top20-test.parquet"
    content = own.read_bytes()
    arguments = ["score", str(own), "--data", str(tiny_data), "--out", str(own.parent)]
    assert run_command(arguments) == 1
    assert "choose another --out" in capfd.readouterr().err
    assert own.read_bytes() == content


def test_users_without_a_target_are_left_out_and_said(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", dated_rows())
    dataset = prepare(log, tmp_path / "data", split="global-time", cutoff=DATES, k_core=2)
    num_asked = len(dataset.sequences.history_and_target("test").users)
    item = dataset.sequences.item_ids[0]
    lines = [f"{user},{item}\n" for user in dataset.sequences.user_ids]
    (tmp_path / "l.csv").write_text("".join(["user,items\n", *lines]))
    found, given = score_lists(tmp_path / "l.csv", dataset, "test", tmp_path / "out")
    assert found["users"] == num_asked < len(lines)
    assert given.left_out == len(lines) - num_asked
    assert f"{given.left_out} lists of users without a test target are left out" in given.notes(
        "test"
    )
