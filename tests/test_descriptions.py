"""Items' texts: read from every kind of table, bad ones named by line, and vectors that bring like texts together."""

import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.descriptions import read_descriptions, text_vectors
from genrec_shards.sequences import DataError

IDS = ["B1", "B2", "B3"]
RECORDS = [
    {"asin": "B2", "title": 'Red "rose" soap', "brand": "Äther", "price": 3.5, "categories": [["Beauty", "Bath"]]},
    {"asin": "B9", "title": "of another catalogue", "brand": "x", "price": 1.0, "categories": []},
    {"asin": "B1", "title": "Comb\nof wood", "brand": None, "price": 2.0, "categories": []},
    {"asin": "B2", "title": "again", "brand": "y", "price": 9.0, "categories": []},
]
EXPECTED = ["Comb\nof wood 2.0", 'Red "rose" soap Äther 3.5 Beauty Bath', ""]


def csv_text() -> str:
    def cell(value: object) -> str:
        if isinstance(value, list):
            value = " ".join(name for path in value for name in path)
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"'

    return "\r\n".join(",".join(map(cell, row)) for row in [list(RECORDS[0]), *(r.values() for r in RECORDS)]) + "\r\n"


def written(folder, kind: str):
    path = folder / f"meta.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
        return path
    text = {
        "csv": csv_text(),
        "jsonl": "\n".join(json.dumps(record) for record in RECORDS) + "\n\n",
        "json": "\n".join(map(repr, RECORDS)),  # Amazon's 2014 release: Python's own literals
    }[kind.removesuffix(".gz")]
    data = ("\ufeff" + text).encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_kind_of_table_gives_the_same_texts(tmp_path, kind):
    path = written(tmp_path, kind)
    found = read_descriptions(path, IDS)
    assert found.texts == EXPECTED
    assert found.num_described == 2
    assert (found.name, found.sha256) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert read_descriptions(path, IDS, text_columns=["brand", "title"]).texts[1] == 'Äther Red "rose" soap'
    assert read_descriptions(path, ["Äther"], id_column="brand", text_columns=["asin"]).texts == ["B2"]


def test_whole_numbers_are_ids_as_well(tmp_path):
    path = tmp_path / "meta.jsonl"
    path.write_text('{"item": 12, "title": "twelve"}\n{"item": "7", "title": "seven"}')
    assert read_descriptions(path, ["7", "12", "112"]).texts == ["seven", "twelve", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"asin,title\nB1,x\nB2,y,z\n", "m.csv:3: more cells"),
        ("m.csv", b'asin,title\nB1,"x\n', "m.csv:1: not readable as CSV"),
        ("m.csv", b"", "empty"),
        ("m.csv", b"title,brand\nx,y\n", "m.csv:2: no column of item ids, only brand, title: .* --item-column"),
        ("m.csv", b"asin,title\nB7,x\n", "describes none of the 3 items"),
        ("m.csv", b"asin,title\nB1,\xff\n", "not UTF-8"),
        ("m.jsonl", b'{"asin": "B1", "title": "x"}\n{"asin": "B2", \n', "m.jsonl:2: not an object in JSON"),
        ("m.jsonl", b"[1]\n", "m.jsonl:1: not an object"),
        ("m.jsonl", b"__import__('os').system('true')\n", "m.jsonl:1: not an object"),
        ("m.jsonl", b"[" * 100_000, "m.jsonl:1: not an object"),
        ("m.jsonl.gz", gzip.compress(b'{"asin": "B1", "title": "x"}' * 99)[:-12], "cut off"),
        ("m.jsonl.gz", b"\x1f\x8b" + b"\x07" * 40, "damaged|cut off"),
        ("m.parquet", b"PAR1", "not readable as Parquet"),
        ("m.txt", b"B1 x", "neither .csv, .parquet"),
        ("m.csv", None, "no such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_descriptions(path, IDS)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there_are_named(tmp_path):
    path = written(tmp_path, "csv")
    with pytest.raises(DataError, match=r":2: no column sku, only asin, brand, categories, price, title"):
        read_descriptions(path, IDS, id_column="sku")
    with pytest.raises(DataError, match=r"no column colour, only asin.*--text-columns"):
        read_descriptions(path, IDS, text_columns=["title", "colour"])


def test_like_texts_have_like_vectors_and_empty_ones_none():
    texts = ["Rose soap, red", "red ROSE soap", "wooden comb", "comb, wooden", "", "..."]
    vectors = text_vectors(texts, 64, seed=0)
    assert vectors.shape == (6, 5)  # five words
    assert not vectors[4:].any()
    alike = vectors @ vectors.T
    assert alike[0, 1] == pytest.approx(alike[0, 0])
    assert alike[2, 3] == pytest.approx(alike[2, 2])
    assert abs(alike[0, 2]) < 1e-9
    assert np.array_equal(vectors, text_vectors(texts, 64, seed=0))


def test_a_word_that_all_share_tells_nothing():
    vectors = text_vectors([f"the {word}" for word in ("rose", "comb", "soap", "rose")], 64, seed=0)
    alike = vectors @ vectors.T
    assert alike[0, 3] == pytest.approx(alike[0, 0])
    assert abs(alike[0, 1]) < 0.02 * alike[0, 0]
