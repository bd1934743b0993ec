"""More than a thousand damaged files of every format: a reader reads them or says in one line why
not."""

import gzip
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.read_log import LogOptions, read_log
from genrec_shards.readers.recognise import guess_format
from genrec_shards.sequences import read_sequences
from logs import AMAZON, Row, csv_of, json_of

from genrec_dist.cli.app import run_command

FILES = 1050
AT = 1_400_000_000
NOISE = [
    *(b"\x00", b"\xff\xfe", b'"', b"'", b"\\", b"\n", b"\r", b",", b"\t", b"{", b"}", b"[", b"nan"),
    *(b"-1", b"1e999", b"9" * 400, b"\x1f\x8b", b"PAR1", b"x" * 10_000, b"None", b"[" * 2000),
    *("\u2028".encode(), "\ud800".encode("utf-8", "surrogatepass")),
]


def rows(draw: random.Random) -> list[Row]:
    return [
        (f"u{draw.randrange(9)}", f"i{draw.randrange(9)}", AT + draw.randrange(99))
        for _ in range(30)
    ]


def sequences_file(draw: random.Random) -> bytes:
    lines = (f"u{n} " + " ".join(str(draw.randrange(99)) for _ in range(5)) for n in range(20))
    return "\n".join(lines).encode()


def parquet_file(draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    times = pa.array([time for _, _, time in rows(draw)])
    pq.write_table(pa.table({"user": times, "item": times, "timestamp": times}), buffer)
    return buffer.getvalue()


KINDS = {
    "log.csv": lambda draw: csv_of(rows(draw)),
    "log.txt": sequences_file,
    "log.parquet": parquet_file,
    "amazon.json": lambda draw: json_of(rows(draw), AMAZON),
    "python.json": lambda draw: json_of(rows(draw), AMAZON, line=repr),
    "amazon.jsonl": lambda draw: json_of(rows(draw), ("user_id", "parent_asin", "timestamp")),
    "yelp.json": lambda draw: json_of(rows(draw), ("user_id", "business_id", "date")),
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut, spliced, overwritten or packed and torn, once to four times."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        end = min(at + draw.choice([0, 1, 3, 50]), len(data))
        how = draw.randrange(5)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + draw.choice(NOISE) + data[at:]
        elif how == 2:
            data = data[:at] + draw.choice(NOISE) + data[end:]
        elif how == 3:
            data = data[:at] + draw.randbytes(end - at) + data[end:]
        else:
            data = data[end:] + data[at:end] + data[:at]
    if draw.random() < 0.2:
        data = gzip.compress(data, mtime=0)
        data = data[: draw.randrange(len(data) + 1)] if draw.random() < 0.7 else data
    return data


def read(path, on_error: str) -> tuple[int, int]:
    """Rows read and lines left out."""
    bad, format = BadLines(on_error), guess_format(path)
    if format == "sequences":
        return read_sequences(path, bad).num_interactions, bad.count
    return sum(frame.height for frame in read_log(path, format, bad, LogOptions())), bad.count


def test_no_damaged_file_ends_in_a_traceback(tmp_path):
    read_whole = refused = skipped = 0
    for number in range(FILES):
        draw = random.Random(number)
        name, make = draw.choice(list(KINDS.items()))
        path = tmp_path / name
        path.write_bytes(damaged(make(draw), draw))
        for on_error in ("stop", "skip"):
            try:
                _, left_out = read(path, on_error)
            except DataError as error:
                message = str(error)
                assert message.startswith(str(path)), (number, message)
                assert "\n" not in message, (number, message)
                assert len(message) < 1000, (number, message)
                refused += 1
            else:
                read_whole += on_error == "stop"
                skipped += left_out > 0
    # The damage is of all three sorts: unseen, a line's, the file's.
    assert read_whole > 20
    assert refused > 200
    assert skipped > 200


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_leaves_nothing_behind_a_command(tmp_path, name, capfd):
    for number in range(8):
        draw = random.Random(1000 + number)
        path = tmp_path / name
        path.write_bytes(damaged(KINDS[name](draw), draw))
        code = run_command(["prepare", str(path), "--out", str(tmp_path / "data"), "--overwrite"])
        said = capfd.readouterr().err
        assert "Traceback" not in said
        if code == 0:
            assert (tmp_path / "data" / "audit.json").exists()
            continue
        assert code == 1, (number, said)
        assert said.count("\n") == 1, (number, said)
        assert str(path) in said, (number, said)
        assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]
