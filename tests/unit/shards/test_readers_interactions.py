"""The reader of interactions: every way a table may be written reads alike, and a bad row is told
with its line."""

import datetime
import gzip
import io

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers import text_blocks as blocks_module
from genrec_shards.readers.json_reviews import read_amazon
from genrec_shards.readers.tabular import read_interactions
from genrec_shards.timestamps import Clock

SECOND = 1_000_000
AT = 1_400_000_000
ROWS = [
    ("u1", "i9", AT),
    ("u1", "i7", AT + 5),
    ("u 2", 'say "x"', AT + 6),
    ("é.3", "日本,1", AT + 7),
]
TIMES = [str(time) for _, _, time in ROWS]
CSV = 'user,item,timestamp\nu1,i9,{}\nu1,i7,{}\nu 2,"say ""x""",{}\né.3,"日本,1",{}\n'.format(
    *TIMES
)


def rows_of(path, columns=None, on_error="stop", unit="auto"):
    bad = BadLines(on_error)
    frames = list(read_interactions(path, bad, Clock(unit), columns))
    return [row for frame in frames for row in frame.rows()], bad


def expected(factor=SECOND):
    return [(user, item, time * factor) for user, item, time in ROWS]


def put(tmp_path, content, name="log.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
        (
            "recbole.inter",
            CSV.replace(",", "\t").replace("日本\t1", "日本,1").replace("user", "user_id:token", 1),
        ),
        ("semicolons.csv", CSV.replace(",", ";").replace("日本;1", "日本,1")),
    ],
)
def test_ways_to_write_text_read_alike(tmp_path, name, content):
    assert rows_of(put(tmp_path, content, name))[0] == expected()


@pytest.mark.parametrize(
    ("write", "unit"),
    [
        (lambda time: str(time), "auto"),
        (lambda time: f"{time}.0", "auto"),
        (lambda time: str(time * 1000), "auto"),
        (lambda time: str(time * 1_000_000), "auto"),
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
    for _, _, time in ROWS:
        text = text.replace(str(time), write(time))
    assert rows_of(put(tmp_path, text), unit=unit)[0] == expected()


def iso(time: int) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.UTC).isoformat()


def test_dates_alone_are_midnight(tmp_path):
    path = put(tmp_path, "user,item,date\na,b,1970-01-02\n")
    assert rows_of(path)[0] == [("a", "b", 86_400 * SECOND)]


def test_columns_are_named_where_they_have_other_names(tmp_path):
    path = put(tmp_path, CSV.replace("user,item,timestamp", "who,what,when"))
    with pytest.raises(
        DataError, match=r":1: no column of users, only who, what, when: name .* --columns"
    ):
        rows_of(path)
    assert rows_of(path, ("who", "what", "when"))[0] == expected()
    with pytest.raises(DataError, match="no column whom"):
        rows_of(path, ("whom", "what", "when"))


def table(**changes):
    columns = {
        "rating": pa.array([5.0] * 4),
        "timestamp": pa.array([time for _, _, time in ROWS]),
        "item": pa.array([item for _, item, _ in ROWS]),
        "user": pa.array([user for user, _, _ in ROWS]),
    }
    return pa.table(columns | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"timestamp": pa.array([time * 1000 for _, _, time in ROWS], pa.timestamp("ms"))},
        {
            "timestamp": pa.array(
                [time * 10**9 for _, _, time in ROWS], pa.timestamp("ns", "Europe/Berlin")
            )
        },
        {"timestamp": pa.array([float(time) for _, _, time in ROWS])},
        {"timestamp": pa.array([time for _, _, time in ROWS], pa.uint32())},
        {"timestamp": pa.array([iso(time) for _, _, time in ROWS])},
        {"item": pa.array([item for _, item, _ in ROWS]).dictionary_encode()},
        {"item": pa.array([item for _, item, _ in ROWS], pa.large_string())},
    ],
)
def test_parquet_of_every_type(tmp_path, changes):
    pq.write_table(table(**changes), tmp_path / "log.parquet")
    assert rows_of(tmp_path / "log.parquet")[0] == expected()


def test_whole_numbers_are_ids_also_as_floats(tmp_path):
    for kind in (pa.int64(), pa.uint8(), pa.float64()):
        pq.write_table(table(item=pa.array([3, 1, 2, 3], kind)), tmp_path / "log.parquet")
        assert [row[1] for row in rows_of(tmp_path / "log.parquet")[0]] == ["3", "1", "2", "3"]


def test_a_folder_reads_as_its_files_by_name(tmp_path):
    first, *rest = CSV.splitlines(keepends=True)
    put(tmp_path, first + rest[0], "a.csv")
    put(tmp_path, gzip.compress((first + rest[1]).encode()), "b.csv.gz")
    put(tmp_path, "no log", "README.md")
    put(tmp_path, "no log", ".hidden.csv")
    pq.write_table(table().slice(2), tmp_path / "c.parquet")
    assert rows_of(tmp_path)[0] == expected()


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no file that ends in \.csv"):
        rows_of(tmp_path)


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_the_size_of_blocks_changes_nothing(tmp_path, monkeypatch, size):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", size)
    text = CSV + '"two\nlines",i1,1400000009\n' * 3 + "u5,i5,1400000010\n"
    wanted = [
        *expected(),
        *[("two\nlines", "i1", 1400000009 * SECOND)] * 3,
        ("u5", "i5", 1400000010 * SECOND),
    ]
    assert rows_of(put(tmp_path, text))[0] == wanted


def test_many_rows_take_the_fast_way_and_the_same(tmp_path):
    made = pl.DataFrame(
        {"user": range(5000), "item": range(5000), "timestamp": range(AT, AT + 5000)}
    )
    buffer = io.BytesIO()
    made.write_csv(buffer)
    found = rows_of(put(tmp_path, buffer.getvalue()))[0]
    assert found == [(str(n), str(n), (AT + n) * SECOND) for n in range(5000)]


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
    path = put(
        tmp_path,
        b"".join(
            [*lines[:3], line if isinstance(line, bytes) else line.encode(), b"\n", *lines[3:]]
        ),
    )
    with pytest.raises(DataError, match=f"log.csv:4: .*{reason}") as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    found, bad = rows_of(path, on_error="skip")
    assert found == expected()
    assert bad.count == 1
    assert bad.shown[0].startswith(f"{path}:4: ")


def test_a_quote_within_a_plain_cell_is_a_quote(tmp_path):
    path = put(
        tmp_path,
        f'user,item,timestamp\nu1,12" disc,{AT}\nu1,5" or 7",{AT}\nu1,"two\nlines",{AT}\nu2,b,{AT}\n',
    )
    assert [row[:2] for row in rows_of(path)[0]] == [
        ("u1", '12" disc'),
        ("u1", '5" or 7"'),
        ("u1", "two\nlines"),
        ("u2", "b"),
    ]


def test_the_first_ten_bad_lines_are_shown_and_all_are_counted(tmp_path):
    path = put(tmp_path, "user,item,timestamp\n" + "a,b,1400000000\nx,y,never\n" * 25)
    found, bad = rows_of(path, on_error="skip")
    assert (len(found), bad.count, len(bad.shown)) == (25, 25, 10)
    assert [line.split(":")[1] for line in bad.shown] == [str(n) for n in range(3, 22, 2)]
    assert bad.told()[0] == "25 lines could not be read and were left out; the first 10:"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"timestamp": pa.array([AT, None, AT, AT])}, "no time"),
        ({"timestamp": pa.array([float(AT), float("nan"), AT, AT])}, "time is nan"),
        ({"timestamp": pa.array([AT, -1, AT, AT])}, "negative"),
        ({"timestamp": pa.array([AT, AT * 1000, AT, AT])}, "far future"),
        ({"timestamp": pa.array([AT, -1, AT, AT], pa.timestamp("s"))}, "negative"),
        ({"timestamp": pa.array([AT, 10**12, AT, AT], pa.timestamp("s"))}, "far future|neither"),
        ({"item": pa.array(["a", None, "b", "c"])}, "no item"),
        ({"item": pa.array(["a", "", "b", "c"])}, "no item"),
        ({"user": pa.array([1.0, 2.5, 3.0, 4.0])}, "user is '2.5', no id"),
    ],
)
def test_a_bad_row_of_parquet(tmp_path, changes, reason):
    path = tmp_path / "log.parquet"
    pq.write_table(table(**changes), path)
    with pytest.raises(DataError, match=f"log.parquet:2: .*({reason})"):
        rows_of(path)
    found, bad = rows_of(path, on_error="skip")
    assert (len(found), bad.count) == (3, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "empty"),
        ("log.csv", b"\x00\x01\x02" * 100, ":1: binary"),
        ("log.csv", b"\xff\xfe" * 100, ":1: not UTF-8"),
        ("log.csv", b'"user,item\n', ":1: the columns' names are not readable"),
        ("log.csv", b"user,item\na,b\n", ":1: no column of times, only user, item"),
        ("log.csv.gz", gzip.compress(CSV.encode() * 50)[:-9], "cut off"),
        ("log.csv.gz", gzip.compress(CSV.encode())[:-8] + b"12345678", "damaged"),
        ("log.parquet", b"PAR1 no, not really", "not readable as Parquet"),
        ("log.parquet", b"", "not readable as Parquet"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_files_that_are_no_log(tmp_path, name, content, message, on_error):
    path = put(tmp_path, content, name)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(path, on_error=on_error)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_or_of_a_type_that_is_none(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(table().drop_columns(["item"]), path)
    with pytest.raises(DataError, match="no column of items, only rating, timestamp, user"):
        rows_of(path)
    for strange in (
        [[1], [2], [3], [4]],
        [b"1"] * 4,
        [True] * 4,
        [datetime.timedelta(1)] * 4,
        [{"a": 1}] * 4,
    ):
        pq.write_table(table(item=pa.array(strange)), path)
        with pytest.raises(DataError, match="the column of items is "):
            rows_of(path)
    pq.write_table(table(item=pa.nulls(4)), path)
    with pytest.raises(DataError, match=r"log\.parquet:1: no item"):
        rows_of(path)


def test_strange_ids_stay_what_they_are(tmp_path):
    ids = [
        "x" * 10_000,
        "1" * 5_000,
        "a.b",
        "it's",
        "é",
        "🙂",
        "no\u00a0break",
        " edge ",
        "%,;",
        "NULL",
        "nan",
        "007",
    ]
    quoted = [name.replace('"', '""') for name in ids]
    text = "user,item,time\n" + "".join(f'"{name}","{name}",{AT}\n' for name in quoted)
    assert [row[0] for row in rows_of(put(tmp_path, text))[0]] == ids


def test_a_missing_path(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        rows_of(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (CSV.split("\n", 1)[1], ("0", "1", "2")),
        (CSV.split("\n", 1)[1].replace("u1,i9,", "u1,9,i9,").replace("i7", "8,i7"), None),
        ("".join(f"{time}\tx\t{item}\t{user}\n" for user, item, time in ROWS[:2]), ("3", "2", "0")),
    ],
)
def test_whole_numbers_are_places_of_a_text_without_names(tmp_path, content, columns):
    if columns is None:
        with pytest.raises(DataError, match=r"log.csv:1: no column 7, only 0 to 3: mend --columns"):
            rows_of(put(tmp_path, content), ("0", "2", "7"))
        return
    found, _ = rows_of(put(tmp_path, content), columns)
    assert found == expected()[: len(found)]
    assert len(found) == content.count("\n")


def test_a_name_that_is_a_number_is_a_place_in_text_and_a_name_in_parquet(tmp_path):
    table = pa.table(
        {
            "2": [user for user, _, _ in ROWS],
            "0": [item for _, item, _ in ROWS],
            "1": [t for _, _, t in ROWS],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    assert rows_of(tmp_path / "log.parquet", ("2", "0", "1"))[0] == expected()
    assert rows_of(tmp_path / "log.parquet", ("0", "1", "2"), "skip")[0] != expected()
    pq.write_table(table.rename_columns(["a", "b", "c"]), tmp_path / "log.parquet")
    assert rows_of(tmp_path / "log.parquet", ("0", "1", "2"))[0] == expected()
    # A line with names is a row like the others, and its time is none.
    found, bad = rows_of(put(tmp_path, CSV), ("0", "1", "2"), "skip")
    assert (found, bad.count, bad.shown[0].split(": ")[0]) == (
        expected(),
        1,
        f"{tmp_path / 'log.csv'}:1",
    )


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_the_time_of_a_row_without_a_user_settles_no_unit(tmp_path, ending):
    lines = {
        "csv": f'user,item,timestamp\n"",i1,{AT * 1000}\nu1,i9,{AT}\n',
        "jsonl": f'{{"reviewerID": "", "asin": "I1", "unixReviewTime": {AT * 1000}}}\n'
        f'{{"reviewerID": "U1", "asin": "I9", "unixReviewTime": {AT}}}\n',
    }
    path, bad = put(tmp_path, lines[ending], f"log.{ending}"), BadLines("skip")
    read = read_interactions if ending == "csv" else read_amazon
    assert [row[2] for found in read(path, bad, Clock()) for row in found.rows()] == [AT * SECOND]
    assert bad.count == 1
