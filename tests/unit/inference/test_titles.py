"""Titles from the table of items into the data directory, and from there beside the
recommendations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from genrec_shards.cleaning.summary import text_summary
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.prepare import prepare

from genrec_dist.cli.app import run_command
from genrec_dist.inference.recommend import Recommendation, Request
from genrec_dist.inference.titles import LATEST, LONGEST, Titles


@pytest.fixture(scope="module")
def titled(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The tiny catalogue once more, under its own codes, every item but the first with a title."""
    folder = tmp_path_factory.mktemp("titled")
    plain = load_dataset(tiny_data)
    records = [
        {"item": item, "title": f"A  thing\ncalled {item}"} for item in plain.sequences.item_ids[1:]
    ]
    meta = folder / "meta.jsonl"
    meta.write_text("\n".join(map(json.dumps, records)))
    info = plain.info
    options = {"format": "data", "numbering": info.numbering, "seed": info.seed, "items": meta}
    return prepare(tiny_data, folder / "data", **options)


def test_titles_are_in_the_data_directory_and_the_codes_are_what_they_were(
    titled: Dataset, tiny_data: Path
) -> None:
    rows = pq.read_table(titled.path / "items.parquet").to_pylist()
    count = len(rows)
    assert json.loads((titled.path / "dataset.json").read_text())["items_with_text"] == count - 1
    share = f"{count - 1} (98 %) of {count} items have a text, {count - 1} a title"
    assert text_summary(titled) == f"meta.jsonl: {share}"
    assert rows[0]["title"] == ""
    assert rows[1]["title"] == f"A thing called {rows[1]['id']}"
    loaded = load_dataset(titled.path)
    assert loaded.descriptions is not None
    assert loaded.descriptions.titles == [row["title"] for row in rows]
    assert loaded.info.numbering_hash == load_dataset(tiny_data).info.numbering_hash
    again = prepare(titled.path, titled.path.parent / "again", format="data", seed=9)
    assert again.descriptions is not None
    assert again.descriptions.titles == loaded.descriptions.titles


def test_lists_are_those_of_the_json_with_titles_beside_them(
    titled: Dataset, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user = titled.sequences.user_ids[3]
    ask = ["recommend", str(tiny_run), "--user", user, "--top", "5", "--data", str(titled.path)]
    assert run_command(ask) == 0
    answer = json.loads(capsys.readouterr().out)
    assert run_command([*ask, "--titles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start, end = titled.sequences.offsets[3:5]
    history = [titled.sequences.item_ids[row] for row in titled.sequences.items[start:end]]
    called = Titles.of_data(titled)
    assert lines[0] == f"user {user} of {len(history)} items"
    shown = [line.split(maxsplit=1) for line in lines[1:] if line.strip() not in ("", "...")]
    latest = history[-LATEST:]
    assert shown[: len(latest)] == [[item, called.of(item)] for item in latest]
    listed = [line.split(maxsplit=3) for line in lines if line[:4].strip().isdigit()]
    assert [(place, item) for place, _, item, _ in listed] == [
        (str(i), item) for i, item in enumerate(answer["items"], 1)
    ]
    assert [title for *_, title in listed] == [called.of(item) for item in answer["items"]]
    for (_, probability, _, _), score in zip(listed, answer["scores"], strict=True):
        assert float(probability) == pytest.approx(math.exp(score), abs=6e-6)


def test_titles_that_are_long_or_missing(titled: Dataset) -> None:
    called = Titles.of_data(titled)
    first, second = titled.sequences.item_ids[:2]
    called.of_item[second] = "long " * 40
    assert called.of(first) == "(no title)"
    assert called.of("nothing we sell") == "(not in the catalogue)"
    assert len(called.of(second)) == LONGEST
    assert called.of(second).endswith("...")
    page = called.page(Request([]), Recommendation(None, [], [], []))
    assert page == "a history of 0 items\n"


def test_data_without_titles_says_how_to_get_them(
    tiny_run: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    item = load_dataset(tiny_data).sequences.item_ids[0]
    assert (
        run_command(
            ["recommend", str(tiny_run), "--history", item, "--data", str(tiny_data), "--titles"]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert "its items have no titles" in said
    assert "--items META" in said
    assert run_command(["recommend", str(tiny_run), "--all-users", "--out", "x", "--titles"]) == 2
    assert "items.parquet" in capsys.readouterr().err
