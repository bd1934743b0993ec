"""Every way a log may be written reads alike, and a bad row is reported with its line."""

import ast
import datetime
import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers import text_blocks
from genrec_shards.readers.python_literals import parsed_line
from genrec_shards.readers.read_log import LogOptions, read_log
from genrec_shards.readers.recognise import guess_format
from hypothesis import given, settings
from hypothesis import strategies as st

SECOND = 1_000_000
AT = 1_400_000_000
ROWS = [
    ("u1", "i9", AT),
    ("u1", "i7", AT + 5),
    ("u 2", 'say "x"', AT + 6),
    ("é.3", "日本,1", AT + 7),
]
WANTED = [(user, item, time * SECOND) for user, item, time in ROWS]
TIMES = [time for _, _, time in ROWS]
CSV = 'user,item,timestamp\nu1,i9,{}\nu1,i7,{}\nu 2,"say ""x""",{}\né.3,"日本,1",{}\n'.format(
    *TIMES
)
TABS = CSV.replace(",", "\t").replace("日本\t", "日本,")
QUOTED = [(user, item.replace('say "x"', '"say ""x"""'), time) for user, item, time in ROWS]
KEYS = ("userId", "item", "ts")
_BUFFER = io.BytesIO()
with zipfile.ZipFile(_BUFFER, "w") as _archive:
    _archive.writestr("folder/", "")
    _archive.writestr("folder/log.csv", CSV)
    _archive.writestr("__MACOSX/folder/._log.csv", "x")
ZIPPED = _BUFFER.getvalue()
PACKED = gzip.compress(CSV.encode() * 50)


def read(path, columns=None, on_error="stop", unit="auto", format="interactions"):
    bad = BadLines(on_error)
    frames = list(read_log(path, format, bad, LogOptions(columns, unit)))
    return [row for frame in frames for row in frame.rows()], bad


def put(tmp_path, content, name="log.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def check_bad_line(path, line, reason, wanted, **options):
    """Stopped at, in one line; left out and counted, the others read."""
    with pytest.raises(DataError, match=f"{path.name}:{line}: .*({reason})") as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    found, bad = read(path, on_error="skip", **options)
    assert found == wanted
    assert bad.count == 1
    assert bad.shown[0].startswith(f"{path}:{line}: ")


# Text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", CSV),
        ("log.csv.gz", gzip.compress(CSV.encode())),
        ("named_plain.csv", gzip.compress(CSV.encode())),
        ("bom.csv", "\ufeff" + CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("no_last_end.csv", CSV.rstrip("\n")),
        ("blank_lines.csv", CSV.replace("\n", "\n\n  \n")),
        ("capitals.csv", CSV.replace("user,item,timestamp", "UserId,movieId,Date")),
        ("recbole.inter", TABS.replace("user", "user_id:token", 1)),
        ("zipped.csv", ZIPPED),
        ("bars.csv", CSV.replace(",", "|").replace("日本|1", "日本,1")),
        ("colons.csv", CSV.replace(",", "::").replace("日本::1", "日本,1")),
        ("colons.dat", "".join(f"{u}::{i}::5::{t}\n" for u, i, t in QUOTED)),
        (
            "objects.csv",
            "".join(json.dumps(dict(zip(KEYS, row, strict=True))) + "\n" for row in ROWS),
        ),
        ("semicolons.csv", CSV.replace(",", ";").replace("日本;1", "日本,1")),
    ],
)
def test_ways_to_write_text_read_alike(tmp_path, name, content):
    assert read(put(tmp_path, content, name))[0] == WANTED


def iso(time: int) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.UTC).isoformat()


@pytest.mark.parametrize(
    ("write", "unit"),
    [
        (lambda time: str(time), "auto"),
        (lambda time: f"{time}.0", "auto"),
        (lambda time: str(time * 1000), "auto"),
        (lambda time: str(time * SECOND), "auto"),
        (lambda time: str(time * 1000), "ms"),
        (lambda time: iso(time), "auto"),
        (lambda time: iso(time).replace("+00:00", "Z"), "auto"),
        (lambda time: iso(time).replace("+00:00", ""), "auto"),
        (lambda time: iso(time).replace("+00:00", "").replace("T", " "), "auto"),
        (lambda time: iso(time + 7200).replace("+00:00", "+02:00"), "auto"),
        (lambda time: iso(time) if time % 2 else str(time), "auto"),
    ],
)
def test_times_in_every_form(tmp_path, write, unit):
    text = CSV
    for time in TIMES:
        text = text.replace(str(time), write(time))
    assert read(put(tmp_path, text), unit=unit)[0] == WANTED


@pytest.mark.parametrize("sign", [" ", "T"])
def test_times_may_end_with_the_minute_and_take_the_fast_way(tmp_path, monkeypatch, sign):
    monkeypatch.setattr("genrec_shards.readers.tabular._rows", None)
    path = put(tmp_path, f"user,item,date\na,b,2021-03-01{sign}10:00\n")
    assert read(path)[0] == [("a", "b", 1_614_592_800 * SECOND)]


def test_dates_alone_are_midnight(tmp_path):
    path = put(tmp_path, "user,item,date\na,b,1970-01-02\n")
    assert read(path)[0] == [("a", "b", 86_400 * SECOND)]


def test_columns_are_named_where_they_have_other_names(tmp_path):
    path = put(tmp_path, CSV.replace("user,item,timestamp", "who,what,when"))
    missing = r":1: no column of users, only who, what, when: name .* --columns"
    with pytest.raises(DataError, match=missing):
        read(path)
    assert read(path, ("who", "what", "when"))[0] == WANTED
    with pytest.raises(DataError, match="no column whom"):
        read(path, ("whom", "what", "when"))


def test_whole_numbers_are_places_of_a_text_without_names(tmp_path):
    rows = CSV.split("\n", 1)[1]
    assert read(put(tmp_path, rows), ("0", "1", "2"))[0] == WANTED
    turned = "".join(f"{time}\tx\t{item}\t{user}\n" for user, item, time in ROWS[:2])
    assert read(put(tmp_path, turned), ("3", "2", "0"))[0] == WANTED[:2]
    with pytest.raises(DataError, match=r"log.csv:1: no column 7, only 0 to 2: mend --columns"):
        read(put(tmp_path, rows), ("0", "2", "7"))
    # A line with names is a row like the others, and its time is none.
    found, bad = read(put(tmp_path, CSV), ("0", "1", "2"), "skip")
    assert (found, bad.count) == (WANTED, 1)
    assert bad.shown[0].startswith(f"{tmp_path / 'log.csv'}:1: ")


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_the_size_of_blocks_changes_nothing(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", size)
    text = CSV + f'"two\nlines",i1,{AT}\n' * 3 + f"u5,i5,{AT}\n"
    more = [("two\nlines", "i1", AT * SECOND)] * 3 + [("u5", "i5", AT * SECOND)]
    assert read(put(tmp_path, text))[0] == WANTED + more


def test_many_rows_take_the_fast_way_and_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("genrec_shards.readers.tabular._rows", None)
    monkeypatch.setattr("genrec_shards.readers.json_reviews._rows", None)
    text = "user,item,timestamp\n" + "".join(f"{n},{n},{AT + n}\n" for n in range(5000))
    wanted = [(str(n), str(n), (AT + n) * SECOND) for n in range(5000)]
    assert read(put(tmp_path, text))[0] == wanted
    lines = [json.dumps(review("2018", f"A{n}", f"B{n}", n)) for n in range(500)]
    found = read(put(tmp_path, "\n".join(lines), "log.json"), format="amazon")[0]
    assert found == [(f"A{n}", f"B{n}", n * DAY) for n in range(500)]


BAD = [
    ("u1,i1,nan", "time is nan"),
    ("u1,i1,-5", "time -5 is negative"),
    ("u1,i1,99999999999", "far future"),
    ("u1,i1,2300-01-01", "far future"),
    ("u1,i1,1969-12-31", "negative"),
    ("u1,i1,soon", "neither a number nor a date"),
    ("u1,i1,", "no time"),
    ("u1,i1", "no time"),
    ("u1,,1400000000", "no item"),
    (",i1,1400000000", "no user"),
    ("u1,i1,1400000000,9", "4 cells, the first line has 3"),
    ('u1,i"1,1400000000,"', "not readable as CSV"),
    ('u1,"i1,1400000000', "not readable as CSV"),
    ("u1,i\x001,1400000000", "binary"),
    (b"u1,\xff,1400000000", "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_in_the_middle(tmp_path, line, reason):
    lines = CSV.encode().splitlines(keepends=True)
    lines.insert(3, (line if isinstance(line, bytes) else line.encode()) + b"\n")
    check_bad_line(put(tmp_path, b"".join(lines)), 4, reason, WANTED)


def test_the_first_ten_bad_lines_are_shown_and_all_are_counted(tmp_path):
    path = put(tmp_path, "user,item,timestamp\n" + "a,b,1400000000\nx,y,never\n" * 25)
    found, bad = read(path, on_error="skip")
    assert (len(found), bad.count, len(bad.shown)) == (25, 25, 10)
    assert [line.split(":")[1] for line in bad.shown] == [str(n) for n in range(3, 22, 2)]
    assert bad.summary()[0] == "25 lines could not be read and were left out; the first 10:"


def test_a_quote_within_a_plain_cell_is_a_quote(tmp_path):
    cells = ['12" disc', '5" or 7"', '"two\nlines"', "b"]
    path = put(tmp_path, "user,item,timestamp\n" + "".join(f"u,{cell},{AT}\n" for cell in cells))
    assert [row[1] for row in read(path)[0]] == [
        cell.strip('"') if "\n" in cell else cell for cell in cells
    ]


def test_strange_ids_stay_what_they_are(tmp_path):
    ids = ["x" * 10_000, "1" * 5_000, "a.b", "it's", "é", "🙂", "no\u00a0break", " edge ", "%,;"]
    ids += ["NULL", "nan", "007"]
    text = "user,item,time\n" + "".join(f'"{name}","{name}",{AT}\n' for name in ids)
    assert [row[0] for row in read(put(tmp_path, text))[0]] == ids


# Parquet


def table(**changes):
    columns = {
        "rating": pa.array([5.0] * 4),
        "timestamp": pa.array(TIMES),
        "item": pa.array([item for _, item, _ in ROWS]),
        "user": pa.array([user for user, _, _ in ROWS]),
    }
    return pa.table(columns | changes)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("rating", pa.array([1] * 4)),
        ("timestamp", pa.array([time * 1000 for time in TIMES], pa.timestamp("ms"))),
        ("timestamp", pa.array([t * 10**9 for t in TIMES], pa.timestamp("ns", "Europe/Berlin"))),
        ("timestamp", pa.array(map(float, TIMES))),
        ("timestamp", pa.array(TIMES, pa.uint32())),
        ("timestamp", pa.array(map(iso, TIMES))),
        ("item", pa.array([item for _, item, _ in ROWS]).dictionary_encode()),
        ("item", pa.array([item for _, item, _ in ROWS], pa.large_string())),
    ],
)
def test_parquet_of_every_type(tmp_path, column, values):
    pq.write_table(table(**{column: values}), tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet")[0] == WANTED


def test_whole_numbers_are_ids_also_as_floats(tmp_path):
    for kind in (pa.int64(), pa.uint8(), pa.float64()):
        pq.write_table(table(item=pa.array([3, 1, 2, 3], kind)), tmp_path / "log.parquet")
        assert [row[1] for row in read(tmp_path / "log.parquet")[0]] == ["3", "1", "2", "3"]


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("timestamp", pa.array([AT, None, AT, AT]), "no time"),
        ("timestamp", pa.array([float(AT), float("nan"), AT, AT]), "time is nan"),
        ("timestamp", pa.array([AT, -1, AT, AT]), "negative"),
        ("timestamp", pa.array([AT, AT * 1000, AT, AT]), "far future"),
        ("timestamp", pa.array([AT, -1, AT, AT], pa.timestamp("s")), "negative"),
        ("timestamp", pa.array([AT, 10**12, AT, AT], pa.timestamp("s")), "far future|neither"),
        ("item", pa.array(["a", None, "b", "c"]), "no item"),
        ("item", pa.array(["a", "", "b", "c"]), "no item"),
        ("user", pa.array([1.0, 2.5, 3.0, 4.0]), "user is '2.5', no id"),
    ],
)
def test_a_bad_row_of_parquet(tmp_path, column, values, reason):
    path = tmp_path / "log.parquet"
    pq.write_table(table(**{column: values}).slice(0, 1), tmp_path / "first.parquet")
    pq.write_table(table(**{column: values}).slice(2), tmp_path / "rest.parquet")
    wanted = read(tmp_path / "first.parquet")[0] + read(tmp_path / "rest.parquet")[0]
    pq.write_table(table(**{column: values}), path)
    check_bad_line(path, 2, reason, wanted)


def test_parquet_without_the_column_or_of_a_type_that_is_none(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(table().drop_columns(["item"]), path)
    with pytest.raises(DataError, match="no column of items, only rating, timestamp, user"):
        read(path)
    for strange in ([1], b"1", True, datetime.timedelta(1), {"a": 1}):
        pq.write_table(table(item=pa.array([strange] * 4)), path)
        with pytest.raises(DataError, match="the column of items is "):
            read(path)
    pq.write_table(table(item=pa.nulls(4)), path)
    with pytest.raises(DataError, match=r"log\.parquet:1: no item"):
        read(path)


def test_a_name_that_is_a_number_is_a_name_in_parquet(tmp_path):
    path, columns = tmp_path / "log.parquet", list(zip(*ROWS, strict=True))
    numbered = pa.table([pa.array(column) for column in columns], ["2", "0", "1"])
    pq.write_table(numbered, path)
    assert read(path, ("2", "0", "1"))[0] == WANTED
    assert read(path, ("0", "1", "2"), "skip")[0] != WANTED
    pq.write_table(numbered.rename_columns(["a", "b", "c"]), path)
    assert read(path, ("0", "1", "2"))[0] == WANTED


# Reviews

DAY = 86_400 * SECOND
REVIEWS = [
    ("A3", "B001", 14_000),
    ("A3", "B002", 14_001),
    ("A1", "B001", 14_000),
    ("A_é", "0007", 14_500),
]
WANTED_REVIEWS = [(user, item, day * DAY) for user, item, day in REVIEWS]
_SHAPES = {
    "2014": '{"reviewerName": "Jo \\"the nose\\" O\'Hara", "helpful": [2, 3], "overall": 5.0, '
    '"reviewText": "It\'s\\n\\tlovely, isn\'t it? \\\\o/ \\u00e9", "reviewTime": "09 13, 2009"}',
    "2018": '{"overall": 5.0, "vote": "2", "verified": true, "style": {"Size:": " 7.0 oz"}, '
    '"reviewerName": "Cá", "reviewText": "As advertised \\ud83d\\ude42", "image": '
    '["https://e.com/a.jpg"]}',
    "2023": '{"rating": 5.0, "text": "It is really \\"nice\\".<br />", "asin": "variant", '
    '"images": [{"attachment_type": "IMAGE"}], "verified_purchase": true}',
    "yelp": '{"review_id": "r", "stars": 4.0, "cool": 1, '
    '"text": "Great \\"tacos\\", \\u00e9t\\u00e9.\\nAgain."}',
}


def review(shape: str, user: str, item: str, day: int) -> dict:
    fields = {
        "2014": {"reviewerID": user, "asin": item, "unixReviewTime": day * 86_400},
        "2018": {"reviewerID": user, "asin": item, "unixReviewTime": day * 86_400},
        "2023": {"user_id": user, "parent_asin": item, "timestamp": day * 86_400_000},
        "yelp": {
            "user_id": user,
            "business_id": item,
            "date": iso(day * 86_400)[:19].replace("T", " "),
        },
    }
    return json.loads(_SHAPES[shape]) | fields[shape]


SPELLED = {
    "2014": json.dumps,
    "2014 in Python": repr,
    "2014 in Python 2": lambda row: repr(row).replace("'reviewText': \"", "'reviewText': u\""),
    "2014 mixed": lambda row: (repr if row["asin"] == "B002" else json.dumps)(row),
    "2018": json.dumps,
    "2023": lambda row: json.dumps(row, ensure_ascii=False),
    "yelp": json.dumps,
}


@pytest.mark.parametrize("release", SPELLED)
@pytest.mark.parametrize("name", ["reviews.json.gz", "reviews.jsonl"])
def test_each_release_of_reviews_reads_alike(tmp_path, release, name):
    lines = "".join(SPELLED[release](review(release[:4], *row)) + "\n" for row in REVIEWS).encode()
    path = put(tmp_path, gzip.compress(lines) if name.endswith(".gz") else lines, name)
    format = "yelp" if release == "yelp" else "amazon"
    assert guess_format(path) == format
    assert read(path, format=format)[0] == WANTED_REVIEWS


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(value=literals)
def test_parsed_line_reads_pythons_spelling_as_python_does(value):
    line = repr({"a": value})
    try:
        json.dumps(value).encode()
        line.encode()
    except UnicodeEncodeError:
        return
    assert parsed_line(line) == ast.literal_eval(line)


def test_parsed_line_knows_every_escape_and_runs_nothing():
    line = r"""{'t': '\x41\u00e9\U0001f642\n\t\\\'\"\a\101', "q": 'a"b'}"""
    assert parsed_line(line) == ast.literal_eval(line)
    lines = [
        "__import__('os').system('true')",
        "{'a': open('x')}",
        "{'a': 1 + 1}",
        "{'a': [1,}",
        "'",
    ]
    for line in [*lines, "{'a': f'x'}", "(" * 5000, "[" * 5000]:
        assert parsed_line(line) is None


def changed(**fields) -> str:
    return json.dumps(review("2014", "A1", "B1", 1) | fields)


NEEDED = "fields reviewerID, asin, unixReviewTime are needed, it has asin"
BAD_REVIEWS = [
    ("{", "no object in JSON"),
    ("[1, 2]", "no object in JSON"),
    ("nothing at all", "no object in JSON"),
    ('{"asin": "B1"}', f"no review of --format amazon: {NEEDED}"),
    (changed(unixReviewTime=None), "no time"),
    (changed(unixReviewTime=-5), "negative"),
    (changed(unixReviewTime=10**12), "far future"),
    (changed(unixReviewTime=float("nan")), "time is nan"),
    (changed(reviewerID=""), "no user"),
    (changed(asin=["B1"]), "no id"),
    (changed(asin="\ud800"), "no id"),
    (changed()[:-40], "no object in JSON"),
    ("\x00" * 9, "binary"),
    (b"\xff\xfe", "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_REVIEWS)
def test_a_bad_review_in_the_middle(tmp_path, line, reason):
    lines = [json.dumps(review("2014", *row)).encode() for row in REVIEWS]
    line = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    path = put(tmp_path, b"\n".join([*lines[:2], b"", line, *lines[2:]]), "log.json")  # one blank
    check_bad_line(path, 4, reason, WANTED_REVIEWS, format="amazon")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_the_time_of_a_row_without_a_user_settles_no_unit(tmp_path, ending):
    """It would make all times milliseconds."""
    if ending == "csv":
        text, format = f'user,item,timestamp\n"",i1,{AT * 1000}\nu1,i9,{AT}\n', "interactions"
    else:
        names, format = ("reviewerID", "asin", "unixReviewTime"), "amazon"
        rows = ("", "I1", AT * 1000), ("U1", "I9", AT)
        text = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    found, bad = read(put(tmp_path, text, f"log.{ending}"), None, "skip", format=format)
    assert ([time for _, _, time in found], bad.count) == ([AT * SECOND], 1)


# Files and folders


def test_a_folder_reads_as_its_files_by_name(tmp_path):
    with pytest.raises(DataError, match=r"no file that ends in \.csv"):
        read(tmp_path)
    first, *rest = CSV.splitlines(keepends=True)
    put(tmp_path, first + rest[0], "a.csv")
    put(tmp_path, gzip.compress((first + rest[1]).encode()), "b.csv.gz")
    put(tmp_path, "no log", "README.md")
    put(tmp_path, "no log", ".hidden.csv")
    pq.write_table(table().slice(2), tmp_path / "c.parquet")
    assert read(tmp_path)[0] == WANTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "empty"),
        ("log.csv", b"\x00\x01\x02" * 100, ":1: binary"),
        ("log.csv", b"\xff\xfe" * 100, ":1: not UTF-8"),
        ("log.csv", b'"user,item\n', ":1: the columns' names are not readable"),
        ("log.csv", b"user,item\na,b\n", ":1: no column of times, only user, item"),
        ("log.csv.gz", PACKED[:-9], "cut off"),
        ("log.csv.gz", PACKED[:-8] + b"12345678", "damaged"),
        ("log.parquet", b"PAR1 no, not really", "not readable as Parquet"),
        ("log.parquet", b"", "not readable as Parquet"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_files_that_are_no_log(tmp_path, name, content, message, on_error):
    path = put(tmp_path, content, name)
    with pytest.raises(DataError, match=message) as caught:
        read(path, on_error=on_error)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_small_file_that_unpacks_without_end_is_refused_and_read_unpacked(
    tmp_path, monkeypatch, kind
):
    content = CSV.encode() + CSV.encode().partition(b"\n")[2] * 40_000
    path = tmp_path / f"log.csv.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(content, 9))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("log.csv", content)
    rows, _ = read(path)
    assert len(content) > 100 * path.stat().st_size
    monkeypatch.setattr(text_blocks, "ALWAYS_UNPACKED", 1 << 20)
    with pytest.raises(DataError, match=f"log.csv.{kind}: unpacks to more than 1 MiB") as caught:
        read(path)
    assert "unpack it" in str(caught.value)
    assert read(put(tmp_path, content))[0] == rows


@pytest.mark.parametrize("format", ["amazon", "yelp"])
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
def test_files_that_are_no_reviews(tmp_path, format, content, message):
    path = put(tmp_path, content, "reviews.json")
    with pytest.raises(DataError, match=message) as caught:
        read(path, format=format)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.json", format=format)


# Times that no calendar has


@pytest.mark.parametrize(
    "time", ["1e302", "1.8e302", "1.7e308", "-1.8e302", "1e999", "12345-01-01"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_time_beyond_all_numbers_is_a_bad_line_that_settles_no_unit(tmp_path, time, first):
    rows = [("u1", "i1", time), ("u1", "i2", AT)]
    rows = rows if first else rows[::-1]
    line = 1 if first else 2
    wanted, reason = [("u1", "i2", AT * SECOND)], "far future|before 1970"
    csv = "".join(f"{user},{item},{at}\n" for user, item, at in rows)
    path = put(tmp_path, "user,item,time\n" + csv)
    check_bad_line(path, line + 1, reason, wanted)
    if "-01-" not in time and time != "1e999":
        lines = [f'{{"user": "{u}", "item": "{i}", "time": {at}}}\n' for u, i, at in rows]
        check_bad_line(put(tmp_path, "".join(lines), "log.json"), line, reason, wanted)
        times = pa.array([float(at) for _, _, at in rows])
        wanted = [("u1", f"i{3 - line}", AT * SECOND)]
        check_bad_line(put_parquet(tmp_path, times), line, reason, wanted)


def put_parquet(tmp_path, times):
    items = [f"i{number}" for number in range(1, len(times) + 1)]
    table = pa.table({"user": ["u1"] * len(times), "item": items, "time": times})
    pq.write_table(table, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


@pytest.mark.parametrize(
    ("kind", "far", "good"),
    [
        (pa.date32(), 2**31 - 1, 16_000),
        (pa.date32(), -(2**31), 16_000),
        (pa.timestamp("ms"), 2**62, 16_000 * 86_400_000),
        # A cast to microseconds wraps around, to a day of 2013.
        (pa.timestamp("ms"), (2**64 + 16_000 * 86_400_000_000) // 1000, 16_000 * 86_400_000),
        (pa.timestamp("us", "Europe/Berlin"), 2**63 - 1, 16_000 * 86_400_000_000),
        (pa.timestamp("ns", "+02:00"), 2**63 - 1, 16_000 * 86_400_000_000_000),
    ],
)
@pytest.mark.parametrize("line", [1, 2])
def test_a_parquet_date_that_no_calendar_has_is_a_bad_row(tmp_path, kind, far, good, line):
    values = [far, good] if line == 1 else [good, far]
    path = put_parquet(tmp_path, pa.array(values, kind))
    wanted = [("u1", f"i{3 - line}", 16_000 * 86_400 * SECOND)]
    check_bad_line(path, line, "far future|before 1970", wanted)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_parquet_column_in_a_zone_that_nobody_knows_is_refused(tmp_path, on_error):
    path = put_parquet(tmp_path, pa.array([AT], pa.timestamp("us", "Mars/Phobos")))
    with pytest.raises(DataError, match=r"log\.parquet: .* time zone 'Mars/Phobos', .*UTC$"):
        read(path, on_error=on_error)
