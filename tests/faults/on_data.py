"""Attacks on data: logs of every format, shards, data directories, servers and addresses."""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from attacks import Box, Ended, NotHeld, content, kind, left_over, must_equal
from faulty_server import serving
from genrec_shards.dataset import load_dataset
from hostile import DEEP, VALUES, damaged, damaged_json, damaged_lines, shown
from logs import AMAZON, by_user, csv_of, json_of, messy_rows
from shard_damage import Canary, npy, replace_record
from world import result

BOMB = 3 << 30
"""Bytes to which a small compressed file unpacks: more than a command may take of memory."""


def prepared(box: Box, source: Path, place: Path, *options: str) -> bool:
    """Whether `prepare` succeeds; raises NotHeld where it neither leaves a whole directory, nor is
    refused, naming `place`, and leaves nothing."""
    ended = box.run("prepare", source, "--out", "OUT", *options)
    if left := left_over(box.folder):
        raise NotHeld(f"left over: {left}")
    if ended.refused(place):
        if box.out.exists():
            raise NotHeld("refused, and its output is there")
        return False
    info = load_dataset(box.out).info
    dropped = sum(number for number in info.dropped.values() if isinstance(number, int))
    if info.read is not None and info.interactions + dropped != info.read:
        raise NotHeld(f"{info.read} rows read, {info.interactions} kept, dropped {info.dropped}")
    return True


def errors(box: Box) -> list[str]:
    """Options of what becomes of a bad line."""
    mode = box.dice.choice(["stop", "skip"])
    box.note(f"--on-error {mode}")
    return ["--on-error", mode]


@kind("data", 110)
def log(box: Box) -> None:
    """A file of a log of any format: damaged, packed anew and torn, spelled in another encoding."""
    names = sorted(path.name for path in (box.world / "logs").iterdir())
    name = box.dice.choice(names)
    folder = box.copy(f"logs/{name}")
    path = box.dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = path.read_bytes()
    how = box.dice.randrange(10)
    if how == 0:
        encoding = box.dice.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig", "cp037", "utf-7"])
        data = data.decode("utf-8", "replace").encode(encoding, "replace")
        box.note(f"{path.name} in {encoding}")
        path.write_bytes(data)
    elif how == 1:
        packed = gzip.compress(data)
        data = box.dice.choice([packed + packed, packed[:-9], packed + b"more", packed[:30]])
        path = path.rename(path.with_name(path.name + ".gz"))
        path.write_bytes(data)
        box.note(f"{path.name}: gzip torn or twice")
    elif how == 2:
        path.write_bytes(data.replace(b"\n", box.dice.choice([b"\r", b"\x00\n", b"\n\n", b" \n"])))
        box.note(f"{path.name}: other ends of lines")
    else:
        for _ in range(box.dice.randint(1, 3)):
            box.damage(path, damaged_lines if b'{"' in data[:2] and how < 5 else damaged)
    files = list(folder.iterdir())
    options = [] if name == "sequences" else ["--k-core", "0"]
    prepared(box, folder if len(files) > 1 else files[0], folder, *options, *errors(box))


TIMES = [
    *(1.8e302, 1e308, -1.8e302, 1e19, -1, 0, float("nan"), float("inf"), "", "nan", "9" * 400),
    *("2014-13-45", "2014-02-30", "99999-01-01", "2014-01-01T99:99", None, True, [], {}, [1]),
    *("1e400", "-0", "0x7f", "١٢٣", "\x00", 2**63, 2**64, 2**31, "Mars/Phobos", "yesterday"),
]


@kind("data", 60)
def row(box: Box) -> None:
    """One hostile value in one row of a sound log; left out or read, it changes no other user."""
    rows = [list(row) for row in dict.fromkeys(messy_rows(seed=9, num_rows=120))]
    column = box.dice.choice([0, 1, 2, 2, 2])
    pool = TIMES if column == 2 else [value for value in VALUES if shown(value) not in "nan inf"]
    value = box.dice.choice([*pool, DEEP] if box.dice.random() < 0.1 else pool)
    form = box.dice.choice(["log.csv", "log.jsonl", "amazon.json"])
    if form == "log.csv":
        value = str(value).encode("utf-8", "replace").decode().replace("\n", " ")
    box.note(f"{form}: {('user', 'item', 'time')[column]} {shown(value)} in one row")
    at, found = len(rows) // 2, []
    own = {rows[at][0], str(value)}
    for place in ("sound", "hostile"):
        path = box.folder / place / form
        path.parent.mkdir()
        fields = ("user", "item", "timestamp") if form == "log.jsonl" else AMAZON
        path.write_bytes(csv_of(rows) if form == "log.csv" else json_of(rows, fields))
        options = ["--on-error", "skip", "--k-core", "0", "--ties", "keep", "--overwrite"]
        if not prepared(box, path, path, *options):
            raise NotHeld("a bad row is not left out")
        dataset = load_dataset(box.out)
        found.append(by_user(dataset.sequences, dataset.timestamps))
        rows[at][column] = value
    differing = [user for user in found[0].keys() - own if found[0][user] != found[1].get(user)]
    if differing:
        raise NotHeld(f"the row of one user changes {len(differing)} others")


@kind("data", 15)
def bomb(box: Box) -> None:
    """A small file that unpacks to gigabytes, a line without end, or columns without number."""
    name = box.dice.choice(["log.txt.gz", "log.csv.gz", "log.jsonl.gz", "log.zip", "log.csv"])
    path, chunk = box.folder / name, box.dice.choice([b"\x00", b"7 ", b"a,b,3\n"]) * (1 << 18)
    box.note(f"{name} of {len(chunk[:6])} bytes again and again")
    start = {"log.csv.gz": b"user,item,timestamp\n", "log.jsonl.gz": b'{"user": "'}.get(name, b"")
    if name == "log.csv":
        path.write_bytes(b"user,item,timestamp" + b",x" * box.dice.choice([10**3, 10**6]) + b"\n")
    elif name == "log.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("log.csv", chunk * 256)
    else:
        # One member after another unpack as one stream.
        member = gzip.compress(chunk * 16, 9)
        path.write_bytes(gzip.compress(start) + member * (BOMB // len(chunk) // 16))
    prepared(box, path, path)


@kind("data", 25)
def parquet(box: Box) -> None:
    """A Parquet log whose columns have types and values that no log has."""
    times = box.dice.choice(
        [
            pa.array([2**31 - 1] * 30, pa.int32()).cast(pa.date32()),
            pa.array([2**62] * 30, pa.timestamp("us", "Mars/Phobos")),
            pa.array([2**62] * 30, pa.timestamp("s")),
            pa.array([-(2**62)] * 30, pa.timestamp("ns")),
            pa.array([1e308] * 30), pa.array([float("nan")] * 30), pa.array([None] * 30),
            pa.array([[1]] * 30), pa.array([{"a": 1}] * 30), pa.array([b"\xff"] * 30),
            pa.array([2**64 - 1] * 30, pa.uint64()), pa.array([True] * 30),
            pa.array(["x"] * 30).dictionary_encode(), pa.array([10**9] * 30, pa.duration("s")),
            pa.array([1] * 30, pa.decimal128(38, 10)), pa.array([3] * 30, pa.time32("s")),
            pa.array(range(30)),
        ]
    )  # fmt: skip
    names = box.dice.choice([pa.array([f"u{n % 4}" for n in range(30)]), times, pa.nulls(30)])
    table = {"user": names, "item": pa.array([f"i{n % 7}" for n in range(30)]), "timestamp": times}
    box.note(f"user {names.type}, timestamp {times.type}")
    path = box.folder / "log.parquet"
    pq.write_table(pa.table(table), path)
    prepared(box, path, path, "--k-core", "0", *errors(box))


def judge_read(box: Box, ended: Ended, *places: object, valid: bool = False) -> None:
    """Raise NotHeld unless the shards' sequences were refused, or are those of the world."""
    expected = result(box.world, "read-shards", "WORLD/data/shards", "cache")["standard output"]
    if not ended.refused(*places) and not valid and ended.out != expected:
        raise NotHeld("other sequences are read than were written")


@kind("data", 50)
def shard_bytes(box: Box) -> None:
    """A file of a shard directory damaged."""
    shards = box.copy("data/shards")
    path = box.dice.choice(sorted(shards.iterdir()))
    box.damage(path, damaged_json if path.suffix == ".json" else damaged)
    judge_read(box, box.run("read-shards", shards, "cache"), shards)


HEADERS = [
    "{'descr': '<i4', 'fortran_order': False, 'shape': (100000000000,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000000,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<i4', 'fortran_order': True, 'shape': (3, 4), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<V9', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '>i4', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (3,), }",
    "(" * 1000, "{'descr': " * 500, "", "\x00", "__import__('os').system('touch canary')", "{}",
]  # fmt: skip


def hostile_array(box: Box, folder: Path) -> bytes:
    """An .npy file that no writer of ours makes."""
    how = box.dice.randrange(6)
    if how == 0:
        header = box.dice.choice(HEADERS).encode().ljust(117) + b"\n"
        box.note(f"npy header {header[:70]!r}")
        size = box.dice.choice([len(header).to_bytes(2, "little"), b"\xff\xff", b"\x00\x00"])
        return b"\x93NUMPY\x01\x00" + size + header + bytes(64)
    if how == 1:
        box.note("npy format 2, a header of 2 GB")
        return b"\x93NUMPY\x02\x00" + (2**31 - 1).to_bytes(4, "little") + bytes(100)
    values = box.dice.choice(
        [
            np.full(40, -1, "<i4"), np.full(40, 2**31 - 1, "<i4"), np.arange(40, dtype="<i8"),
            np.arange(40, dtype=">i4"), np.arange(40.0), np.zeros((4, 10), "<i4"), np.array(5),
            np.zeros(0, "<i4"), np.arange(40, dtype="<u4"), np.array(["x" * 40]),
        ]
    )  # fmt: skip
    if how == 2:
        box.note("a pickled object")
        return npy(np.array([Canary(folder / "canary")], object), allow_pickle=True)
    content, what = damaged(npy(values), box.dice) if how == 3 else (npy(values), "")
    box.note(f"an array {values.dtype}{list(values.shape)} {what}")
    return content


@kind("data", 45)
def signed_shard(box: Box) -> None:
    """A member of a record, or the lengths, hostile under a manifest that was signed anew: refused,
    or sequences of the promised shape. (Who can sign can also write other sequences.)"""
    shards = box.copy("data/shards")
    if box.dice.random() < 0.3:
        array = hostile_array(box, box.folder)
        (shards / "lengths.npy").write_bytes(array)
        manifest = json.loads((shards / "manifest.json").read_text())
        manifest["lengths_sha256"] = hashlib.sha256(array).hexdigest()
        (shards / "manifest.json").write_text(json.dumps(manifest))
    else:
        name = box.dice.choice(["users", "offsets", "items"])

        def change(members: dict[str, bytes]) -> None:
            member = f"00000000.{name}.npy"
            how = box.dice.randrange(6)
            if how == 0:
                del members[member]
            elif how == 1:
                members[box.dice.choice(["../x", "/etc/x", "00000000.more.npy"])] = b"x"
            else:
                members[member] = hostile_array(box, box.folder)

        box.note(f"member {name}")
        replace_record(shards, change)
    judge_read(box, box.run("read-shards", shards, "cache"), shards, valid=True)


@kind("data", 40)
def directory(box: Box) -> None:
    """A file of a data directory damaged or missing, for a command that reads it."""
    data = box.copy("data")
    path = box.dice.choice(sorted(path for path in data.iterdir() if path.is_file()))
    if box.dice.random() < 0.1:
        path.unlink()
        box.note(f"{path.name} removed")
    else:
        box.damage(path, damaged_json if path.suffix == ".json" else damaged)
    command = box.dice.choice(
        [
            ["shard", "{}", "--out", "OUT"],
            ["baseline", "popularity", "{}", "--out", "OUT"],
            ["evaluate", "WORLD/dense", "--data", "{}", "--out", "OUT"],
        ]
    )
    box.note(f"genrec {command[0]}")
    ended = box.run(*(one.replace("{}", str(data)) for one in command))
    if not ended.refused(data, "dense"):
        expected = result(box.world, *(one.replace("{}", "WORLD/data") for one in command))
        must_equal(box.outcome(ended), expected, command[0])


FAULTS = [
    *("500", "403", "404", "stall", "hang up", "stall half-way", "truncate", "no length", "gzip"),
    *("wrong bytes", "other range", "ignore Range"),
]
STATUS = ["200 OK", "206 Partial", "200 \x1b[31mred", "999 x", "500 secret\x1b]0;x\x07", "-1", "x"]
HEADER = [
    "Content-Length: 10", "Content-Length: -5", "Content-Length: 99999999999999", "x" * 70_000,
    "Content-Length: x", "Transfer-Encoding: chunked", "Content-Encoding: gzip", "Content-Range: x",
    "Content-Range: bytes 0-9/10", "Content-Range: bytes 5-4/-1", "Location: file:///etc/passwd",
]  # fmt: skip
TARGETS = [
    *("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "javascript:alert(1)"),
    *("http://10.0.0.1/x", "http://169.254.169.254/latest/meta-data", "//10.0.0.1/x", ""),
    *("http://user:pw@127.0.0.1/x", "http://[::ffff:10.0.0.1]/x", "s3://bucket/x", "pipe:ls"),
]


@kind("data", 45)
def server(box: Box) -> None:
    """A server on this machine that fails, lies or leads elsewhere."""
    dice = box.dice
    with serving(box.world / "data") as running:
        name = dice.choice(["manifest.json", "lengths.npy", ".tar", ""])
        times, how = dice.choice([1, 2, 10**9]), dice.randrange(3)
        if how == 0:
            fault: str | None = dice.choice(FAULTS)
        elif how == 1:
            head = "\r\n".join([f"HTTP/1.1 {dice.choice(STATUS)}", *dice.sample(HEADER, 2)])
            body = dice.choice(["", "x" * 10, "5\r\nabc", "[" * 9999, "ffffffff\r\n"])
            fault = f"{head}\r\n\r\n{body}"
        else:
            fault, target = None, dice.choice([*TARGETS, running.url + "/shards/manifest.json"])
            running.redirect = lambda path: target if path.endswith(name) else None
            box.note(f"redirect of {name!r} to {target}")
        box.note(f"{shown(fault)} for {name!r}, {times} times")
        running.fault = lambda path, number: (
            fault if path.endswith(name) and len(running.of(name)) <= times else None
        )
        address = f"{running.url}/shards"
        judge_read(box, box.run("read-shards", address, "cache"), running.url)


@kind("data", 20)
def address(box: Box) -> None:
    """An address that is none, or one of a place that may not be asked."""
    scheme = box.dice.choice(
        [
            "http://",
            "https://",
            "ftp://",
            "file://",
            "pipe:",
            "data:",
            "//",
            "http:/",
            "HTTP://",
            "::",
        ]
    )
    place = box.dice.choice(
        ["127.0.0.1:1", "127.0.0.1:99999", "user:pw@127.0.0.1:1", "127.0.0.1:x", "[::1", "",
         "\x1b[31m", "%00", "cat /etc/passwd", "..", "127.0.0.1:1/../../x", "?a=b#c", "127.0.0.1:-1"]
    )  # fmt: skip
    given = scheme + place
    box.note(f"shards at {shown(given)}")
    if not box.run("read-shards", given, "cache").refused():
        raise NotHeld("read from nowhere")


COMMANDS = [
    ["prepare", "WORLD/log.txt", "--out", "OUT"],
    ["shard", "WORLD/data", "--out", "OUT"],
    ["evaluate", "WORLD/dense", "--out", "OUT"],
    ["recommend", "WORLD/dense", "--all-users", "--out", "OUT"],
    ["baseline", "popularity", "WORLD/data", "--out", "OUT"],
]


@kind("data", 60)
def command(box: Box) -> None:
    """A command that writes, killed at a file operation, amid a write or on a full disk; then the
    same once more, over what is there."""
    given = box.dice.choice(COMMANDS)
    expected = result(box.world, *given)
    number = box.dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    how = box.dice.randrange(3)
    if how == 0:
        at = box.dice.randint(1, 40)
        box.note(f"genrec {given[0]}: {number.name} at file operation {at}")
        ended = box.run(*given, at=at, signal=int(number))
        ended.must_end(*(-9, 0) if number == signal.SIGKILL else (128 + number, -number, 0))
    else:
        size, kills = int(2 ** box.dice.uniform(6, 16)), how == 1
        box.note(f"genrec {given[0]}: files of at most {size} bytes, kill {kills}")
        number = signal.SIGXFSZ if kills else signal.SIGKILL
        ended = box.run(*given, file_limit=size, signal=int(number))
        if kills:
            ended.must_end(-signal.SIGXFSZ, 0, 1)
        elif ended.refused(box.out) and left_over(box.folder):
            raise NotHeld(f"left over: {left_over(box.folder)}")
    more = ["--overwrite"] if given[0] in ("prepare", "shard") else []
    if more and box.out.exists():
        must_equal(content(box.out), expected, "under its final name")
    again = box.run(*given, *more)
    again.must_end(0)
    must_equal(box.outcome(again), expected, "once more")
