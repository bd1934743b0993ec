"""The report's examples: items and users out of a file of lists, with histories and titles."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.prepare import prepare
from html_page import Page

from genrec_dist.baselines.run import run_baseline
from genrec_dist.cli.app import run_command
from genrec_dist.report.list_examples import LATEST, LISTED, MOST, OF_EACH, read_list_examples
from genrec_dist.report.run_report import write_report

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def titled(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The tiny data once more; the first item's title is hostile, the second has none."""
    folder = tmp_path_factory.mktemp("titled")
    ids = load_dataset(tiny_data).sequences.item_ids
    records = [{"item": item, "title": f"Film of {item}"} for item in ids]
    records[0]["title"], records[1]["title"] = EVIL, ""
    (folder / "meta.jsonl").write_text("\n".join(map(json.dumps, records)))
    return prepare(tiny_data, folder / "data", format="data", items=folder / "meta.jsonl")


@pytest.fixture(scope="module")
def lists(titled: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Popularity's results. Copy them before writing."""
    folder = tmp_path_factory.mktemp("lists") / "run"
    run_baseline("popularity", titled, "test", folder, exclude_history=True)
    return folder


@pytest.fixture
def run(lists: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lists, tmp_path / "run"))


def test_examples_are_what_lists_and_data_hold(titled: Dataset, lists: Path) -> None:
    path, notes = lists / "top20-test.parquet", list[str]()
    rows = pq.read_table(path).to_pylist()
    found = read_list_examples(path, "test", [titled.path], notes)
    assert found is not None
    assert notes == []
    hits = [row for row in rows if 1 <= row["rank"] <= LISTED]
    assert (found.users, found.hits) == (len(rows), len(hits))
    listed = Counter(item for row in rows for item in row["items"][:LISTED])
    counts = [one.lists for one in found.most_listed]
    assert counts == sorted(listed.values(), reverse=True)[:MOST]
    targets = Counter(row["target"] for row in rows)
    for one in found.most_listed:
        assert (one.lists, one.targets) == (listed[one.item], targets[one.item])
    assert [one.is_hit for one in found.examples] == [True] * OF_EACH + [False] * OF_EACH
    assert len({one.row for one in found.examples}) == 2 * OF_EACH
    sequences = titled.sequences
    for one in found.examples:
        row = rows[one.row]
        assert (one.target, one.rank) == (row["target"], row["rank"])
        assert one.items == row["items"][:LISTED]
        user = sequences.user_ids.index(row["user"])
        start, end = sequences.offsets[user : user + 2]
        history = [sequences.item_ids[item] for item in sequences.items[start : end - 1]]
        assert (one.history, one.length) == (history[-LATEST:], len(history))
    assert found.titles[sequences.item_ids[0]] == EVIL
    assert sequences.item_ids[1] not in found.titles
    assert read_list_examples(path, "test", [titled.path], notes) == found


def test_the_page_shows_titles_and_no_user(titled: Dataset, run: Path) -> None:
    page = Page(write_report(run, titled.path).read_text(encoding="utf-8"))
    found = read_list_examples(run / "top20-test.parquet", "test", [titled.path], [])
    assert found is not None
    headings = (
        "Items that are listed most on test",
        "Users and their lists on test",
        "Hits",
        "Misses",
    )
    for words in headings:
        assert words in page.text
    for one in found.examples:
        place = f"next item at place {one.rank}" if one.rank else "next item not listed"
        assert f"Row {one.row:,}: {place} History, {one.length} items" in page.text
        for item in (one.target, *one.history, *one.items):
            assert found.titles.get(str(item), str(item)) in page.text
    assert page.text.count("taken next") == 1 + OF_EACH  # the table's head, and once per hit
    assert page.text.count("Taken next") == OF_EACH
    assert sum(tag == "script" for tag, _ in page.tags) == 0
    for user in titled.sequences.user_ids:
        assert user not in page.text


def test_buckets_are_drawn_where_they_have_users(run: Path) -> None:
    metrics = json.loads((run / "metrics-test.json").read_text())
    page = Page(write_report(run).read_text(encoding="utf-8"))
    drawn = [label for _, attributes in page.tags if (label := attributes.get("aria-label"))]
    for name in ("NDCG@10 by history length", "HR@10 by target popularity"):
        assert name in drawn
    for name, bucket in metrics["breakdown"]["history_length"].items():
        label = f"popularity, {name}: " + f"{bucket['HR@10'] or 0:.4f}".removeprefix("0")
        assert (label in page.text) == (bucket["users"] >= 10), label


def test_histories_of_a_split_by_time_end_at_the_target(tmp_path: Path) -> None:
    rows = [
        f"u{u},i{(u * 3 + day) % 11},2021-01-0{day + 1}"
        for u in range(30)
        for day in range(3 + u % 6)
    ]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    dataset = prepare(
        tmp_path / "log.csv", tmp_path / "data", split="global-time", cutoff="2021-01-04,2021-01-06", k_core=1, min_length=1,
    )  # fmt: skip
    run_baseline("popularity", dataset, "test", tmp_path / "run", exclude_history=False)
    found = read_list_examples(
        tmp_path / "run" / "top20-test.parquet", "test", [dataset.path], notes := []
    )
    assert found is not None
    assert notes == []
    assert {one.length for one in found.examples} == {5}


def test_what_is_not_at_hand_is_said_and_left_out(
    titled: Dataset, run: Path, tmp_path: Path
) -> None:
    path = run / "top20-test.parquet"
    missing = Page(write_report(run, tmp_path / "gone").read_text()).text
    assert "gone: no data directory there now" in missing
    assert "History" not in missing
    assert "Users and their lists" in missing
    assert "Film of " not in missing
    # Titles come from the run's own catalogue then.
    (run / "best").mkdir()
    shutil.copy(titled.path / "items.parquet", run / "best")
    assert "Film of " in Page(write_report(run).read_text()).text
    other = tmp_path / "other"
    (tmp_path / "log.txt").write_text("".join(f"user-{n} a b c d\n" for n in range(120)))
    prepare(tmp_path / "log.txt", other)
    text = Page(write_report(run, other).read_text()).text
    assert "other: no histories: its targets are not those of the lists" in text
    assert "History" not in text
    path.write_bytes(path.read_bytes()[:-9])
    text = Page(write_report(run, titled.path).read_text()).text
    assert "top20-test.parquet: " in text
    assert "evaluate again" in text
    assert "Users and their lists" not in text


def test_lists_of_free_decoding_may_hold_texts_that_are_no_item(run: Path) -> None:
    path = run / "top20-test.parquet"
    table = pq.read_table(path)
    lists = [[None, *row[1:]] for row in table["items"].to_pylist()]
    place = table.schema.get_field_index("items")
    pq.write_table(table.set_column(place, "items", pa.array(lists)), path)
    text = Page(write_report(run).read_text()).text
    assert "a text that is no item" in text
    assert "None" not in text


@pytest.mark.parametrize("column", ["user", "target", "items", "rank"])
def test_a_gap_in_the_lists_is_noted_and_breaks_no_page(
    titled: Dataset, run: Path, column: str
) -> None:
    path = run / "top20-test.parquet"
    table = pq.read_table(path)
    values = [None, *table[column].to_pylist()[1:]]
    place, kind = table.schema.get_field_index(column), table.schema.field(column).type
    pq.write_table(table.set_column(place, column, pa.array(values, kind)), path)
    text = Page(write_report(run, titled.path).read_text()).text
    assert f"top20-test.parquet: column {column} has gaps: evaluate again" in text
    assert "Users and their lists" not in text


def test_the_command_takes_the_data_directory(
    titled: Dataset, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["report", str(run), "--data", str(titled.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "History" in (run / "report.html").read_text()
