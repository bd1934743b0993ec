"""The readers of Amazon's and Yelp's reviews, on lines in the true shape of each release."""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest
from genrec_shards.dataset import load_dataset
from genrec_shards.errors import BadLines, DataError
from genrec_shards.prepare import cleaning_told, prepare
from genrec_shards.readers.detect_format import guess_format
from genrec_shards.readers.json_reviews import read_amazon, read_yelp
from genrec_shards.readers.python_literals import parsed_line
from genrec_shards.timestamps import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

DAY = 86_400_000_000


def review_2014(user: str, item: str, day: int) -> dict:
    return {
        "reviewerID": user,
        "asin": item,
        "reviewerName": 'Jo "the nose" O\'Hara',
        "helpful": [2, 3],
        "reviewText": "It's\n\tlovely, isn't it? \\o/ \u00e9",
        "overall": 5.0,
        "summary": "Smells fine",
        "unixReviewTime": day * 86_400,
        "reviewTime": "09 13, 2009",
    }


def review_2018(user: str, item: str, day: int) -> dict:
    return {
        "overall": 5.0,
        "vote": "2",
        "verified": True,
        "reviewTime": "09 1, 2016",
        "reviewerID": user,
        "asin": item,
        "style": {"Size:": " 7.0 oz", "Flavor:": " Classic"},
        "reviewerName": "Cá",
        "reviewText": "As advertised \ud83d\ude42",
        "summary": "Five Stars",
        "unixReviewTime": day * 86_400,
        "image": ["https://example.com/a.jpg"],
    }


def review_2023(user: str, item: str, day: int) -> dict:
    return {
        "rating": 5.0,
        "title": "Such a lovely scent",
        "text": 'This spray is really "nice".<br />',
        "images": [{"small_image_url": "https://example.com/s.jpg", "attachment_type": "IMAGE"}],
        "asin": f"variant-{item}",
        "parent_asin": item,
        "user_id": user,
        "timestamp": day * 86_400_000,
        "helpful_vote": 0,
        "verified_purchase": True,
    }


def review_yelp(user: str, item: str, day: int) -> dict:
    date = f"2019-{1 + day // 28:02d}-{1 + day % 28:02d} 00:00:00"
    return {
        "review_id": f"{user}-{item}-{day}",
        "user_id": user,
        "business_id": item,
        "stars": 4.0,
        "useful": 0,
        "funny": 0,
        "cool": 1,
        "text": 'Great "tacos", \u00e9t\u00e9.\nAgain.',
        "date": date,
    }


ROWS = [
    ("A3", "B001", 14_000),
    ("A3", "B002", 14_001),
    ("A1", "B001", 14_000),
    ("A_é", "0007", 14_500),
]
SHAPES = {"2014": review_2014, "2018": review_2018, "2023": review_2023}
WRITERS = {
    "2014": lambda row: json.dumps(row),
    "2014 in Python": repr,
    "2014 in Python 2": lambda row: repr(row).replace("'reviewText': \"", "'reviewText': u\""),
    "2018": lambda row: json.dumps(row),
    "2023": lambda row: json.dumps(row, ensure_ascii=False),
}


def written(tmp_path, lines, name="reviews.json.gz"):
    data = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return tmp_path / name


def read(reader, path, on_error="stop"):
    bad = BadLines(on_error)
    return [row for frame in reader(path, bad, Clock()) for row in frame.rows()], bad


@pytest.mark.parametrize("release", WRITERS)
@pytest.mark.parametrize("name", ["reviews.json.gz", "reviews.jsonl"])
def test_each_release_of_amazon_reads_alike(tmp_path, release, name):
    path = written(tmp_path, [WRITERS[release](SHAPES[release[:4]](*row)) for row in ROWS], name)
    assert guess_format(path) == "amazon"
    assert read(read_amazon, path)[0] == [(user, item, day * DAY) for user, item, day in ROWS]


def test_lines_of_json_and_of_python_may_stand_in_one_file(tmp_path):
    path = written(
        tmp_path, [(repr if n % 2 else json.dumps)(review_2014(*row)) for n, row in enumerate(ROWS)]
    )
    assert read(read_amazon, path)[0] == [(user, item, day * DAY) for user, item, day in ROWS]


def test_yelp_is_read_within_its_dates(tmp_path):
    rows = [(f"u{user}", f"b{item}", 28 * item + user) for user in range(5) for item in range(5)]
    path = written(
        tmp_path,
        [json.dumps(review_yelp(*row)) for row in rows],
        "yelp_academic_dataset_review.json",
    )
    assert guess_format(path) == "yelp"
    found = read(read_yelp, path)[0]
    assert [(user, item) for user, item, _ in found] == [row[:2] for row in rows]
    assert found[0][2] == 17_897 * DAY
    made = prepare(path, tmp_path / "data", since="2019-01-02", until="2019-04-30", k_core=2)
    # u0's first review is of January 1st, and all of the fifth business's are of May.
    assert made.info.dropped["outside_dates"] == 6
    assert made.info.interactions == 19
    with pytest.raises(ValueError, match="--since soon: give a date"):
        prepare(path, tmp_path / "other", since="soon")
    assert not (tmp_path / "other").exists()


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=literals)
def test_pythons_spelling_is_read_as_python_reads_it(value):
    line = repr({"a": value})
    try:
        json.dumps(value).encode()
        line.encode()
    except UnicodeEncodeError:
        return
    assert parsed_line(line) == ast.literal_eval(line)


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').system('true')",
        "{'a': open('x')}",
        "{'a': 1 + 1}",
        "{'a': [1,}",
        "'",
        "{'a': f'x'}",
        "(" * 5000,
        "[" * 5000,
    ],
)
def test_what_is_no_literal_is_nothing(line):
    assert parsed_line(line) is None


def test_every_escape_of_python_is_known():
    line = r"""{'t': '\x41\u00e9\U0001f642\n\t\\\'\"\a\101', "q": 'a"b'}"""
    assert parsed_line(line) == ast.literal_eval(line)


BAD = [
    ("", None),
    ("{", "no object in JSON"),
    ("[1, 2]", "no object in JSON"),
    ("nothing at all", "no object in JSON"),
    (
        '{"asin": "B1"}',
        "no review of --format amazon: fields reviewerID, asin, unixReviewTime are needed, it has asin",
    ),
    (json.dumps(review_2014("A1", "B1", 1) | {"unixReviewTime": None}), "no time"),
    (json.dumps(review_2014("A1", "B1", 1) | {"unixReviewTime": -5}), "negative"),
    (json.dumps(review_2014("A1", "B1", 1) | {"unixReviewTime": 10**12}), "far future"),
    (json.dumps(review_2014("A1", "B1", 1) | {"unixReviewTime": float("nan")}), "time is nan"),
    (json.dumps(review_2014("A1", "B1", 1) | {"reviewerID": ""}), "no user"),
    (json.dumps(review_2014("A1", "B1", 1) | {"asin": ["B1"]}), "no id"),
    (json.dumps(review_2014("A1", "B1", 1) | {"asin": "\ud800"}), "no id"),
    (json.dumps(review_2014("A1", "B1", 1))[:-40], "no object in JSON"),
    ("\x00" * 9, "binary"),
    (b"\xff\xfe", "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_review_in_the_middle(tmp_path, line, reason):
    lines = [json.dumps(review_2014(*row)).encode() for row in ROWS]
    lines[2:2] = [line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")]
    path = tmp_path / "reviews.json"
    path.write_bytes(b"\n".join(lines) + b"\n")
    wanted = [(user, item, day * DAY) for user, item, day in ROWS]
    if reason is None:
        assert read(read_amazon, path)[0] == wanted
        return
    with pytest.raises(DataError, match=f"reviews.json:3: .*{reason}") as caught:
        read(read_amazon, path)
    assert "\n" not in str(caught.value)
    found, bad = read(read_amazon, path, "skip")
    assert (found, bad.count) == (wanted, 1)
    assert bad.shown[0].startswith(f"{path}:3: ")


@pytest.mark.parametrize(("reader", "format"), [(read_amazon, "amazon"), (read_yelp, "yelp")])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x00\x01" * 50, ":1: binary"),
        (b"user,item,time\na,b,1\n", ":1: no object in JSON, and --format"),
        (b'{"stars": 5}\n', ":1: no review of --format .*it has stars"),
        (gzip.compress(b'{"a": 1}\n' * 500)[:-9], "cut off"),
        (gzip.compress(b"{}\n")[:-8] + b"12345678", "damaged"),
    ],
)
def test_files_that_are_no_reviews(tmp_path, reader, format, content, message):
    path = tmp_path / "reviews.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(reader, path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        read(reader, tmp_path / "absent.json")


def test_a_set_that_is_not_the_published_one_is_refused(tmp_path):
    path = written(
        tmp_path, [json.dumps(review_2014(f"u{n}", f"i{m}", m)) for n in range(5) for m in range(5)]
    )
    with pytest.raises(
        DataError, match=r"5 users and 5 items, the paper's Table 2 has 22,363 and 12,101 of beauty"
    ):
        prepare(path, tmp_path / "data", expect="beauty")
    assert not (tmp_path / "data").exists()


@pytest.mark.data
@pytest.mark.skipif("GENREC_DATA" not in os.environ, reason="GENREC_DATA is not set")
def test_the_published_counts_come_out_of_the_published_files(tmp_path):
    for name, file in (("beauty", "Beauty.txt.gz"), ("sports", "Sports_and_Outdoors.txt.gz")):
        made = prepare(Path(os.environ["GENREC_DATA"]) / file, tmp_path / name, expect=name)
        assert cleaning_told(made) == [
            f"{made.info.users:,} users and {made.info.items:,} items, as the paper's Table 2 has of {name}"
        ]
        assert load_dataset(tmp_path / name).info.expected == name
