"""What a file is taken for: tables of every kind, sequences never in silence, and refusals that name
the option which helps."""

import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.read_log import LogOptions, read_log
from genrec_shards.readers.recognise import guess_format, read_as

from genrec_dist.cli.app import run_command

ROWS = [("196", "242", "3", "881250949"), ("186", "302", "3", "891717742")] * 3
WANTED = [(user, item, int(time) * 1_000_000) for user, item, _, time in ROWS]
NAMES = ("user_id", "item_id", "rating", "timestamp")
PLACES = "users in column 0, items in 1, times in 3"


def table(delimiter: str, names: tuple[str, ...] | None = NAMES) -> str:
    return "".join(delimiter.join(row) + "\n" for row in ([names] if names else []) + ROWS)


def objects(*fields: str) -> str:
    return "".join(
        json.dumps(dict(zip(fields, (row[0], row[1], int(row[3])), strict=True))) + "\n"
        for row in ROWS
    )


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, columns: tuple[str, ...] | None = None) -> list[tuple]:
    format = guess_format(path, columns)
    frames = read_log(path, format, BadLines(), LogOptions(columns))
    return [row for frame in frames for row in frame.rows()]


ATOMIC = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("log.csv", table(","), "text with commas between cells, users in column user_id, items"),
        ("log.txt", table(","), "text with commas between cells, users in column user_id"),
        ("log.txt.gz", gzip.compress(table(";").encode()), "text with semicolons between cells"),
        ("log", table("\t"), "text with tabs between cells, users in column user_id"),
        ("log.dat", table("|"), "text with bars between cells"),
        ("log.txt", table(" "), "text with spaces between cells, users in column user_id"),
        ("log.csv", table(";", ("User-ID", '"Item ID"', "Rating", "Date")), "in Item ID, times in"),
        ("ml.inter", table("\t", ATOMIC), "RecBole's atomic file, text with tabs"),
        ("ml.txt", table("\t", ATOMIC), "users in column user_id:token, items in item_id:token"),
        (
            "ratings.dat",
            table("::", None),
            f"text with `::` between cells and no names above, {PLACES}",
        ),
        ("ratings.dat", table("::"), "text with `::` between cells, users in column user_id"),
        ("log.jsonl", objects("user", "item", "time"), "JSON lines, users in field user, items in"),
        ("log.txt", objects("userId", "movieId", "ts"), "JSON lines, users in field userId"),
        ("log.zip", zipped({"log.txt": table(";")}), "text with semicolons between cells"),
        ("log.csv.zip", zipped({"any": table(",")}), "text with commas between cells"),
    ],
)
def test_tables_are_read_whatever_they_are_called(tmp_path, name, content, words):
    path = put(tmp_path, name, content)
    assert read(path) == WANTED
    assert words in read_as(path, "interactions")
    assert read_as(path, "interactions").startswith("interactions: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", table(",", None)),
        ("u.data", table("\t", None)),
        ("log.txt", table(";", None)),
        ("log.txt", table(" ", None)),
        ("log.inter", table("\t", None)),
        ("log.csv.gz", gzip.compress(table("|", None).encode())),
    ],
)
def test_a_table_without_names_says_which_columns_to_give_and_then_is_read(tmp_path, name, content):
    path = put(tmp_path, name, content)
    with pytest.raises(DataError, match=rf"{name}:1: .*--columns 0,1,3") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert read(path, ("0", "1", "3")) == WANTED
    assert f"and no names above, {PLACES}" in read_as(path, "interactions", ("0", "1", "3"))


def test_the_columns_that_a_refusal_gives_are_those_of_user_item_and_time(tmp_path):
    turned = "".join(f"{time},5,{user},{item}\n" for user, item, _, time in ROWS)
    with pytest.raises(DataError, match="--columns 1,2,0"):
        read(put(tmp_path, "log.csv", turned))
    dated = "".join(f"{user},{item},2021-03-01 10:00\n" for user, item, _, _ in ROWS)
    with pytest.raises(DataError, match="--columns 0,1,2"):
        read(put(tmp_path, "log.csv", dated))


TITLES = "Toy Story (1995)\nGoldenEye (1995)\nFour Rooms of it\nThe Big Lebowski\n"
NUMBERED = "".join(f"{n} The Great Story of {n}\n" for n in range(20))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.txt", "u1\t1 2 3\nu2\t4 5 6\n", ":1: tabs in it.* --format sequences"),
        ("log.txt", "u1 1 2 3\nu2;4;5;6\n", ":2: semicolons in it.* --format sequences"),
        ("log.txt", "u1 a,b,c\n", ":1: commas in it.* --columns USER,ITEM,TIME.* --format seq"),
        ("log.txt", "user items\nu1 1 2 3\nu2 1 2 3\n", ":1: names of columns.* --columns USER"),
        ("log.txt", "user_id item_id rating\n1 2 3\n", ":1: names of columns.* --format sequences"),
        ("titles.txt", TITLES, ":1: most of its words hold no digit.* --format seq.* --items"),
        ("titles.txt", NUMBERED, ":1: most of its words hold no digit.* --format sequences"),
        ("log.csv", "user,item,rating\n1,2,3\n", "no column of times.*--columns.*--format seq"),
        ("log.txt", "user;item;rating\n1;2;3\n", "no column of times.*--columns.*--format seq"),
        (
            "log.json",
            objects("who", "what", "when"),
            ":1: no field of users, it has who.*--columns",
        ),
        ("users.dat", "1::F::1::10::48067\n", ":1: the first line is a row .* as --columns 0,1,4"),
        ("log.json", "[{}, {}]", ":1: one array of JSON.* one object a line"),
        (
            "all.zip",
            zipped({"a.csv": "x", "b.csv": "y"}),
            r"a zip of 2 files \(a.csv, b.csv\): unpack it",
        ),
        ("book.zip", zipped({"[Content_Types].xml": "x", "a": "y"}), "save it as CSV"),
        ("log.csv.zip", zipped({"a": table(",")})[:-30], "the zip cannot be read .*: unpack it"),
        ("log.tar.gz", gzip.compress(b"x"), "an archive of files: unpack it"),
        ("log.csv.xz", b"\xfd7zXZ\x00....", "xz is not read as text: unpack it"),
        ("log.bin", b"PAR1\x15\x04", "Parquet is not read as text: let its name end in .parquet"),
    ],
)
def test_what_is_no_log_of_a_known_kind_is_refused_with_the_way_out(
    tmp_path, name, content, message
):
    path = put(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)


def test_sequences_are_words_of_ids_and_any_others_when_it_is_said(tmp_path):
    path = put(tmp_path, "log.txt", "u1 B00A 7 x9\nu2 B00A 8 7\n")
    assert guess_format(path) == "sequences"
    assert read_as(path, "sequences").startswith("sequences: `user item item ...` a line")
    typed = put(tmp_path, "typed.txt", "user:1 item:5 item:9 item:7\nuser:2 item:5 item:7 item:1\n")
    assert guess_format(typed) == "sequences"
    # Times alone do not make a table: there are several in each line.
    times = put(tmp_path, "times.txt", "1 881250949 881250950 881250951\n2 881250949 7 8\n")
    assert guess_format(times) == "sequences"
    tabs = put(tmp_path, "tabs.txt", "ann\tapple pear plum\nbob\tplum pear apple\n")
    for options, code in (([], 1), (["--format", "sequences"], 0)):
        command = ["prepare", str(tabs), "--out", str(tmp_path / f"out{code}"), *options]
        assert run_command(command) == code


def test_columns_make_any_file_a_table(tmp_path):
    path = put(tmp_path, "log.jsonl", objects("who", "what", "when"))
    columns = ("who", "what", "when")
    assert guess_format(path, columns) == "interactions"
    assert read(path, columns) == WANTED
    assert "users in field who, items in what, times in when" in read_as(
        path, "interactions", columns
    )


def test_columns_may_be_named_without_the_type_that_recbole_adds(tmp_path):
    atomic = ("who:token", "what:token", "rating:float", "when:float")
    path = put(tmp_path, "ml.inter", table("\t", atomic))
    assert read(path, ("who", "what:token", "when")) == WANTED
    with pytest.raises(DataError, match="no column whom, only who:token, what:token"):
        read(path, ("whom", "what", "when"))


def test_reviews_and_parquet_say_what_they_are(tmp_path):
    path = put(tmp_path, "a.json", objects("reviewerID", "asin", "unixReviewTime"))
    assert guess_format(path) == "amazon"
    assert read_as(path, "amazon") == (
        "amazon: reviews in JSON lines, users in field reviewerID, items in asin, times in "
        "unixReviewTime"
    )
    columns = pa.table({"a": [1], "user": [2], "ts": [3], "item": [4]})
    pq.write_table(columns, tmp_path / "log.parquet")
    words = "interactions: Parquet, users in column user, items in item, times in ts"
    assert read_as(tmp_path / "log.parquet", "interactions") == words


def test_a_folder_is_read_as_its_first_file_and_json_lines_only_without_tables(tmp_path):
    put(tmp_path, "b.jsonl", objects("user", "item", "time"))
    assert guess_format(tmp_path) == "interactions"
    assert read(tmp_path) == WANTED
    put(tmp_path, "a.csv", table(",").replace("196", "7"))
    assert [row[0] for row in read(tmp_path)] == ["7", "186"] * 3
    assert "commas" in read_as(tmp_path, "interactions")


def test_prepare_says_what_it_took_a_file_for(tmp_path, capfd):
    rows = "".join(f"{n % 4}::{n}::5::{881250949 + n}\n" for n in range(24))
    path = put(tmp_path, "ratings.dat", rows)
    out = ["--out", str(tmp_path / "data"), "--k-core", "0"]
    assert run_command(["prepare", str(path), *out]) == 0
    said = re.sub(r"\s+", " ", capfd.readouterr().out)
    assert (
        f"ratings.dat was read as interactions: text with `::` between cells and no names above, {PLACES}"
        in said
    )
    assert "24 rows read, 24 kept (from 1997-12-04 to 1997-12-04); none left out" in said
    assert "No user has held-out items that share a timestamp with others." in said
    assert "Your log's ids " in said
