"""A log on a cluster becomes to the byte what it becomes on one machine, whatever is cut where, and
says the same of bad lines."""

from __future__ import annotations

import contextlib
import gzip
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from faulty_server import serving
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.ray_engine import clean_log as engine_module
from genrec_shards.ray_engine import shard_tasks as tars
from genrec_shards.ray_engine.log_spans import Sizes, cuts, survey
from genrec_shards.ray_engine.shard_tasks import write_shards_on_ray
from genrec_shards.ray_engine.sources import LogFile
from genrec_shards.ray_engine.tasks import Tasks
from genrec_shards.readers.tabular import with_whole_cells
from genrec_shards.readers.text_blocks import whole_lines
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.write import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import (
    SMALL,
    START,
    WRITERS,
    csv_of,
    files,
    json_of,
    messy_rows,
    parquet_of,
    parts,
    write_csv,
)

from genrec_dist.cli.app import run_command

SMALL_SHARDS = {"users_per_shard": 32, "users_per_record": 16}


class Here(Tasks):
    """Every task at once and in this process: what is cut where can be tried many times."""

    def __init__(self, num_cpus: int = 3) -> None:
        self.num_cpus = num_cpus

    def start(self, function, *arguments, parts=1):
        return function(*arguments)

    def get(self, reference):
        return reference

    def put(self, value):
        return value


@contextlib.contextmanager
def here(address: str | None) -> Iterator[Tasks]:
    yield Here()


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(engine_module, "connected", here)
    monkeypatch.setattr(tars, "connected", here)
    monkeypatch.setattr(engine_module, "SIZES", SMALL)


def refused(source, out, engine, **more) -> str:
    """The line that says what went wrong; nothing may be left."""
    with pytest.raises(ValueError) as caught:
        prepare(source, out, engine=engine, **more)
    assert "\n" not in str(caught.value)
    assert not [
        path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name)
    ]
    return str(caught.value)


def check_alike(source, tmp_path, **more) -> Any:
    """Both engines, byte by byte."""
    local = prepare(source, tmp_path / "local", **more)
    ray = prepare(source, tmp_path / "ray", engine="ray", **more)
    assert files(tmp_path / "local") == files(tmp_path / "ray")
    assert ray.bad_lines == local.bad_lines
    return ray


@pytest.mark.parametrize("ties", ["shuffle", "keep"])
@pytest.mark.parametrize("write", WRITERS)
def test_every_format_to_the_byte(tmp_path, in_process, write, ties):
    source, format = WRITERS[write](messy_rows(1), tmp_path)
    options = {"ties": ties, "seed": 4, "k_core": 6, "numbering": "train-order"}
    made = check_alike(source, tmp_path, format=format, **options)
    for reason in ("duplicates", "items_below_k_core", "users_below_k_core"):
        assert made.info.dropped[reason]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_depends_on_how_the_work_is_cut(tmp_path, in_process, monkeypatch, seed):
    draw = random.Random(seed)
    choices = (64, 700, 1 << 20), (64, 9000, 1 << 25), (64, 9000), (1, 2, 13)
    monkeypatch.setattr(engine_module, "SIZES", Sizes(*map(draw.choice, choices)))
    source, format = WRITERS[draw.choice(list(WRITERS))](messy_rows(seed, 600), tmp_path)
    options = {
        "k_core": draw.choice((0, 4)),
        "min_length": draw.choice((3, 6)),
        "numbering": draw.choice(("random", "collaborative", "given")),
        "ties": draw.choice(("keep", "shuffle")),
    }
    dates = {"since": "2014-06-01", "until": "2015-04-01"}
    check_alike(source, tmp_path, format=format, seed=seed, **options, **dates)


def test_blocks_outside_the_dates_are_left_out_by_both(tmp_path, in_process):
    rows = sorted(messy_rows(0), key=lambda row: row[2])
    source = write_csv(tmp_path / "log.csv", rows)
    check_alike(source, tmp_path, since="2014-09-01", k_core=2)
    for engine in ("local", "ray"):
        assert "no user is left of 0 with 1,575 rows (1,575 rows outside the dates)" in refused(
            source, tmp_path / "none", engine, since="2030-01-01"
        )


def test_a_split_by_time_to_the_byte(tmp_path, in_process):
    source = write_csv(tmp_path / "log.csv", messy_rows(3))
    dates = {"split": "global-time", "cutoff": "2014-12-01,2015-03-01"}
    made = check_alike(source, tmp_path, k_core=3, **dates)
    assert made.info.global_time.test_targets > 0
    write_shards(load_dataset(tmp_path / "local"), tmp_path / "shards", **SMALL_SHARDS)
    write_shards_on_ray(tmp_path / "local", tmp_path / "ray-shards", **SMALL_SHARDS)
    assert files(tmp_path / "shards") == files(tmp_path / "ray-shards")
    assert "periods.npy" in files(tmp_path / "shards")


class Counting(Here):
    """Counts what was begun, by the function's name."""

    begun: ClassVar[Counter[str]] = Counter()

    def start(self, function, *arguments, parts=1):
        self.begun[function.__name__] += 1
        return super().start(function, *arguments, parts=parts)


def test_a_bad_line_leaves_few_tasks_begun_behind_it(tmp_path, monkeypatch):
    """None of them is cancelled, so a cluster must not be left with the rest of a long log."""
    tasks = Counting()
    monkeypatch.setattr(engine_module, "connected", lambda _: contextlib.nullcontext(tasks))
    monkeypatch.setattr(engine_module, "SIZES", Sizes(block=64, span=64, bucket=9000, most=256))
    source = write_csv(tmp_path / "log.csv", [("U1", "I1", -5), *messy_rows(2)])
    assert "log.csv:2: time -5 is negative" in refused(source, tmp_path / "out", "ray")
    assert tasks.begun["read_spans"] == engine_module.READING_AHEAD * tasks.num_cpus


# Bad lines


BAD = ("U1,i1", "U1,,1400000000", "U1,i1,never", 'U1,"i1,1400000000', "U1,i1,-5", "a,b,c,d,e")


@pytest.mark.parametrize("seed", range(3))
def test_bad_lines_are_counted_and_told_as_by_one_machine(tmp_path, in_process, seed):
    draw = random.Random(seed)
    folder = tmp_path / "log"
    folder.mkdir()
    for name, part in zip("abc", parts(messy_rows(seed), 3), strict=True):
        lines = csv_of(part).decode().splitlines()
        # Cells with line ends move what comes behind them, quotes that nobody closes join blocks.
        for place in sorted(draw.sample(range(2, len(lines)), 12)):
            lines[place] = draw.choice(
                BAD if draw.random() < 0.6 else ('U7,"two\nlines",1400000000',)
            )
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = check_alike(folder, tmp_path, on_error="skip", k_core=2)
    assert len(made.bad_lines) == 11
    local = refused(folder, tmp_path / "stopped", "local")
    assert local == refused(folder, tmp_path / "stopped", "ray")
    assert re.search(r"log/a\.csv:\d+: ", local)


def test_bad_reviews_are_told_as_by_one_machine(tmp_path, in_process):
    fields = ("user_id", "parent_asin", "timestamp")
    data = json_of(messy_rows(0), fields, lambda time: time * 1000)
    lines = data.decode().splitlines()
    for place in (0, 1, 500, 501, 900):
        lines[place] = '{"no": "review"}' if place % 2 else "nonsense"
    (tmp_path / "log.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    made = check_alike(tmp_path / "log.jsonl", tmp_path, format="amazon", on_error="skip", k_core=2)
    assert made.info.dropped["bad_lines"] == 5
    assert made.bad_lines[3].startswith(f"{tmp_path / 'log.jsonl'}:1001: ")


def test_the_first_number_of_the_log_settles_the_unit_wherever_it_is_read(tmp_path, in_process):
    rows = messy_rows(2)
    dates = [(user, item, str(np.datetime64(time, "s"))) for user, item, time in rows]
    for name, log in (
        # What looks like seconds alone is milliseconds of 1970 behind a number of milliseconds.
        ("ms", [(u, i, t * 1000) for u, i, t in rows[:300]] + dates[300:900] + rows[900:]),
        ("dates", dates),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_bytes(csv_of(log))
        check_alike(tmp_path / name / "log.csv", tmp_path / name, k_core=2)
    log = write_csv(tmp_path / "log.csv", [*rows[:-1], ("u", "i", START * 1000)])
    assert "far future" in refused(log, tmp_path / "out", "ray")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("empty.jsonl", b""),
        ("names.csv", b"user,item,timestamp\n"),
        ("no_column.csv", b"a,b,c\n1,2,3\n"),
        ("binary.csv", b"\0\1\2" * 9000),
        ("cut.csv.gz", gzip.compress(csv_of(messy_rows(0)))[:-20]),
        ("damaged.csv.gz", gzip.compress(csv_of(messy_rows(0)))[:500] + b"x" * 500),
        ("torn.parquet", b"PAR1" + b"x" * 9000 + b"PAR1"),
        ("few.csv", b"user,item,timestamp\nu,i,1400000000\n"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_alike(tmp_path, in_process, name, content):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name, tmp_path / "out", "ray") == refused(
        tmp_path / name, tmp_path / "out", "local"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([b'"', b"\n", b"a,b", b'"x\ny"', b"\r\n", b"0123456789", b"\n\n"]),
        max_size=120,
    ),
    st.sampled_from([3, 7, 16]),
    st.booleans(),
)
def test_cuts_are_where_a_reader_of_the_whole_begins_a_block(tmp_path_factory, words, size, quoted):
    data = b"".join(words)
    path = tmp_path_factory.mktemp("cuts") / "log"
    path.write_bytes(data)
    found = whole_lines("log", (data[at : at + size] for at in range(0, len(data), size)))
    begins, at = {}, 0
    for block in with_whole_cells(found) if quoted else found:
        begins[at] = block.first_line
        at += len(block.data)
    pieces = survey(LogFile(str(path), len(data)), 0, -(-len(data) // size), size)
    given_cuts = {place: line for place, _, line in cuts(pieces, size, quoted) if place < len(data)}
    # The end of a file ends a block of a line without its end, and of cells that nobody closes.
    assert {place: line for place, line in begins.items() if place} == given_cuts


# Where a log may come from, and go


def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch):
    source = write_csv(tmp_path / "log.csv", messy_rows(0, 200))
    (tmp_path / "log.txt").write_text("u a b c\n")
    for place, options, message in (
        (tmp_path / "log.txt", {}, "engine ray is for logs"),
        (source, {"ray_address": "127.0.0.1:1"}, r"--ray-address 127.0.0.1:1: nobody answers"),
        (source, {"ray_address": "pipe:rm"}, r"give HOST:PORT"),
        (tmp_path / "none.csv", {}, "no such file"),
        ("pipe:cat log.csv", {}, "is not opened"),
        ("http://192.0.2.1/log.csv", {}, "http of another machine"),
        ("dir::file:///etc", {}, "chain of addresses"),
        ("ftp://127.0.0.1/log.csv", {}, "is not opened"),
        ("memory://log.csv", {}, "is not opened"),
        ("file://elsewhere/log.csv", {}, "write file:///PATH"),
    ):
        assert re.search(message, refused(place, tmp_path / "out", "ray", **options)), place
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(source, tmp_path / "out", "ray").endswith(
        "ray is not installed: pip install 'genrec-dist[tune]'"
    )
    assert "goes with --engine ray" in refused(
        source, tmp_path / "out", "local", ray_address="127.0.0.1:1"
    )


@pytest.mark.parametrize("format", ["csv", "amazon", "parquet", "csv.gz"])
def test_a_log_behind_a_web_server(tmp_path, in_process, format):
    folder = tmp_path / "served"
    folder.mkdir()
    rows, name = messy_rows(5), f"log.{format.replace('amazon', 'jsonl')}"
    if format == "parquet":
        parquet_of(rows, folder / name)
    else:
        fields = ("user_id", "parent_asin", "timestamp")
        text = json_of(rows, fields) if format == "amazon" else csv_of(rows)
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    local = prepare(folder / name, tmp_path / "local", k_core=3)
    with serving(folder) as server:
        prepare(f"{server.url}/{name}", tmp_path / "ray", engine="ray", k_core=3)
        assert files(tmp_path / "local") == files(tmp_path / "ray")
        assert f"{server.url}/none.csv: no such file" in refused(
            f"{server.url}/none.csv", tmp_path / "none", "ray"
        )
    assert local.info.source.name == name
    uri = (folder / name).as_uri()
    prepare(uri, (tmp_path / "by uri").as_uri(), engine="ray", k_core=3)
    assert files(tmp_path / "local") == files(tmp_path / "by uri")


def test_from_s3_to_s3(tmp_path, in_process, s3, monkeypatch):
    """A folder of files is listed; data and shards are complete or without their marker."""
    source, _ = WRITERS["folder"](messy_rows(6), tmp_path)
    for path in [*source.iterdir(), tmp_path / "note.txt"]:
        path.touch()
        s3.upload_file(str(path), "bucket", f"logs/{path.name}")
    data = "s3://bucket/data"
    local = ["prepare", str(source), "--out", str(tmp_path / "local"), "--k-core", "3"]
    ray = ["prepare", "s3://bucket/logs", "--out", data, "--k-core", "3", "--engine", "ray"]
    assert run_command(local) == run_command(ray) == 0
    found = stored(s3, "data")
    made = files(tmp_path / "local")
    for held in (found, made):  # which bear the folder's name
        held["dataset.json"] = held["dataset.json"].replace(b'"name": "logs"', b'"name": "log"')
    assert found == made
    assert run_command(ray) == 1
    again = SMALL_SHARDS
    shards = write_shards(load_dataset(tmp_path / "local"), tmp_path / "shards", **again)
    assert write_shards_on_ray(data, f"{data}/shards", **again) == shards
    assert stored(s3, "data/shards") == files(tmp_path / "shards")
    assert ShardReader(f"{data}/shards", cache_dir=tmp_path / "cache").manifest == shards
    with pytest.raises(ValueError, match="exists: choose another output"):
        write_shards_on_ray(data, f"{data}/shards", **again)
    with pytest.raises(ValueError, match="is not ours to overwrite"):
        write_shards_on_ray(data, "s3://bucket/logs", overwrite=True, **again)
    monkeypatch.setattr("genrec_shards.ray_engine.shard_tasks.write_tar", failing)
    with pytest.raises(OSError, match="disk full"):
        write_shards_on_ray(data, f"{data}/shards", overwrite=True, **again)
    assert "manifest.json" not in stored(s3, "data/shards")
    with pytest.raises(
        ValueError, match=r"cannot be written to: choose a path, or an address of s3://"
    ):
        write_shards_on_ray(tmp_path / "local", "https://127.0.0.1/shards", **again)


def failing(*arguments: Any) -> None:
    raise OSError("disk full")


@pytest.fixture
def s3(monkeypatch):
    """A client of an S3 server on loopback, with a bucket."""
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("genrec_shards.storage.clients._clients", {})
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def stored(s3: Any, folder: str) -> dict[str, bytes]:
    """The files right below a folder of the bucket."""
    listed = s3.list_objects_v2(Bucket="bucket", Prefix=f"{folder}/", Delimiter="/")
    keys = [entry["Key"] for entry in listed.get("Contents", [])]
    read = {key: s3.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}
    return {key.rpartition("/")[2]: data for key, data in read.items()}
