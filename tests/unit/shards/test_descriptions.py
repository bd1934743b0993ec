"""Items' texts: read from every kind of table, bad ones named by line, and vectors that bring like
texts together."""

import gzip
import hashlib
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damaged
from genrec_shards.errors import DataError
from genrec_shards.numbering.item_text import read_descriptions, text_vectors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

IDS = ["B1", "B2", "B3"]
FIELDS = ("asin", "title", "brand", "price", "categories")
VALUES = [
    ("B2", 'Red "rose" soap', "Äther", 3.5, [["Beauty", "Bath"]]),
    ("B9", "of another catalogue", "x", 1.0, []),
    ("B1", "Comb\nof wood", None, 2.0, []),
    ("B2", "again", "y", 9.0, []),
]
RECORDS = [dict(zip(FIELDS, values, strict=True)) for values in VALUES]
EXPECTED = ["Comb\nof wood 2.0", 'Red "rose" soap Äther 3.5 Beauty Bath', ""]


def csv_text(sign: str = ",") -> str:
    def cell(value: object) -> str:
        if isinstance(value, list):
            value = " ".join(name for path in value for name in path)
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"'

    return "".join(sign.join(map(cell, row)) + "\r\n" for row in (FIELDS, *VALUES))


def written(folder, kind: str):
    path = folder / f"meta.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
        return path
    text = {
        "csv": csv_text(),
        "tsv": csv_text("\t"),
        "txt": csv_text(";"),
        "item": csv_text("\t").replace('"asin"', '"item_id:token"'),
        "jsonl": "\n".join(json.dumps(record) for record in RECORDS) + "\n\n",
        "json": "\n".join(map(repr, RECORDS)),  # Amazon's 2014 release: Python's own literals
    }[kind.removesuffix(".gz").removesuffix(".zip")]
    data = ("\ufeff" + text).encode()
    if kind.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("meta", data)
        return path
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("csv", "csv.gz", "csv.zip", "tsv", "tsv.gz", "txt", "item"),
        *("jsonl", "jsonl.gz", "json", "json.gz", "parquet"),
    ],
)
def test_every_kind_of_table_gives_the_same_texts(tmp_path, kind):
    path = written(tmp_path, kind)
    found = read_descriptions(path, IDS)
    assert found.texts == EXPECTED
    assert (found.name, found.sha256) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    chosen = read_descriptions(path, IDS, text_columns=["brand", "title"])
    assert chosen.texts[1] == 'Äther Red "rose" soap'
    ids = "item_id:token" if kind == "item" else "asin"  # RecBole's name has a type behind it
    by_brand = read_descriptions(path, ["Äther"], id_column="brand", text_columns=[ids])
    assert by_brand.texts == ["B2"]


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz", "json", "parquet"])
def test_titles_are_kept_apart_on_one_line(tmp_path, kind):
    found = read_descriptions(written(tmp_path, kind), IDS, text_columns=["brand"])
    assert found.titles == ["Comb of wood", 'Red "rose" soap', ""]
    other = read_descriptions(written(tmp_path, kind), IDS, title_column="brand")
    assert other.titles is not None
    assert other.titles[1] == "Äther"


MOVIES = """1::Toy Story (1995)::Animation|Children's
2::"Great" it's (1995)::Drama
3::a,b::War
"""


def test_movielens_titles_are_read_as_they_come(tmp_path):
    path = tmp_path / "movies.dat"
    path.write_text(MOVIES)
    found = read_descriptions(path, ["1", "2", "3"])
    assert found.titles == ["Toy Story (1995)", '"Great" it\'s (1995)', "a,b"]
    assert found.texts[0] == "Toy Story (1995) Animation|Children's"


def test_columns_may_be_places_of_a_text_without_names(tmp_path):
    path = tmp_path / "meta.txt"
    path.write_text("Comb;3.5;B1\nSoap;2;B2\n")
    with pytest.raises(DataError, match=r"name one of these with --item-column.* 0"):
        read_descriptions(path, IDS)
    found = read_descriptions(path, IDS, id_column="2", text_columns=["1"], title_column="0")
    assert (found.texts, found.titles) == (["3.5", "2", ""], ["Comb", "Soap", ""])


def test_table_may_have_no_titles_unless_a_column_is_named(tmp_path):
    path = tmp_path / "meta.csv"
    path.write_text("item,brand\nB1,x\n")
    assert read_descriptions(path, IDS).titles is None
    with pytest.raises(DataError, match="no column label, only brand, item: check --title-column"):
        read_descriptions(path, IDS, title_column="label")


def test_whole_numbers_are_ids_as_well(tmp_path):
    path = tmp_path / "meta.jsonl"
    path.write_text('{"item": 12, "title": "twelve"}\n{"item": "7", "title": "seven"}')
    assert read_descriptions(path, ["7", "12", "112"]).texts == ["seven", "twelve", ""]


B1 = b'{"asin": "B1", "title": "x"}'
NO_ID = "m.csv:2: no column of item ids, only brand, title: .* --item-column"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"asin,title\nB1,x\nB2,y,z\n", "m.csv:3: more cells"),
        ("m.csv", b'asin,title\nB1,"x\n', "m.csv:2: not readable as CSV"),
        ("m.csv", b"", "empty"),
        ("m.csv", b"title,brand\nx,y\n", NO_ID),
        ("m.csv", b"asin,title\nB7,x\n", "describes none of the 3 items"),
        ("m.csv", b"asin,title\nB1,\xff\n", "not UTF-8"),
        ("m.jsonl", B1 + b'\n{"asin": "B2", \n', "m.jsonl:2: not an object in JSON"),
        ("m.jsonl", b"[1]\n", "m.jsonl:1: not an object"),
        ("m.jsonl", b"__import__('os').system('true')\n", "m.jsonl:1: not an object"),
        ("m.jsonl", b"[" * 100_000, "m.jsonl:1: not an object"),
        ("m.jsonl.gz", gzip.compress(B1 * 99)[:-12], "cut off"),
        ("m.jsonl.gz", b"\x1f\x8b" + b"\x07" * 40, "damaged|cut off"),
        ("m.parquet", b"PAR1", "not readable as Parquet"),
        ("m.txt", b"B1 x", "empty"),
        ("m.dat", b"1::Jos\xe9::Drama\n", "not UTF-8 text: save it as UTF-8, as `iconv"),
        ("m.csv", None, "no such file"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_descriptions(path, IDS)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


WORDS = b"asin,title B1,x \" ' \r \x00 \xff [[[ { } , 1e999 \xef\xbb\xbf \x1f\x8b PAR1".split(b" ")
NESTED = b'{"asin": "B1", "title": ' + b"[" * 900 + b"]" * 900 + b"}"
SURROGATES = (b'"\\ud800"', b'{"asin": "B1", "title": "\\ud800"}')
SET = b"{'asin': 'B1', 'title': {'x', 'y'}}"
SCRAPS = st.sampled_from([*WORDS, b"\n", b"9" * 5000, B1, SET, NESTED, *SURROGATES])
FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


def texts_or_message(path) -> list[str] | str:
    try:
        return read_descriptions(path, IDS).texts
    except DataError as error:
        return str(error)


@given(
    st.lists(SCRAPS | st.binary(max_size=8), max_size=9),
    st.sampled_from(["csv", "jsonl", "parquet"]),
    st.booleans(),
)
@settings(max_examples=500, **FIXTURE)
def test_whatever_a_file_holds_it_is_read_or_reported_in_one_line(tmp_path, scraps, kind, packed):
    path = tmp_path / f"meta.{kind}"
    path.write_bytes(gzip.compress(b"".join(scraps)) if packed else b"".join(scraps))
    found = texts_or_message(path)
    if isinstance(found, str):
        assert found.startswith(f"{path}:")
        assert "\n" not in found
    else:
        assert pa.array(found, pa.string()).to_pylist() == found
        assert text_vectors(found, 4, seed=0).shape[0] == 3


@given(st.data())
@settings(max_examples=200, derandomize=True, **FIXTURE)
def test_damaged_parquet_file_is_read_or_reported_in_one_line(tmp_path, data):
    whole = written(tmp_path, "parquet").read_bytes()
    found = texts_or_message(damaged(whole, tmp_path / "damaged.parquet", data))
    assert isinstance(found, list) or "\n" not in found


def test_columns_that_are_not_there_are_named(tmp_path):
    path = written(tmp_path, "csv")
    for options, message in (
        ({"id_column": "sku"}, ":2: no column sku, only asin, brand, categories, price, title"),
        ({"text_columns": ["title", "colour"]}, "no column colour, only asin.*--text-columns"),
    ):
        with pytest.raises(DataError, match=message):
            read_descriptions(path, IDS, **options)


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


def test_word_that_all_share_tells_nothing():
    vectors = text_vectors([f"the {word}" for word in ("rose", "comb", "soap", "rose")], 64, seed=0)
    alike = vectors @ vectors.T
    assert alike[0, 3] == pytest.approx(alike[0, 0])
    assert abs(alike[0, 1]) < 0.02 * alike[0, 0]
