"""Shards at an address: exact, one record at a time, servers that fail tried again, other
addresses refused."""

import datetime
import gc
import ipaddress
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faulty_server import FaultyServer, serving
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.storage.address import check_address, is_address
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.remote import RemoteFiles, RetryPolicy
from s3_server import credentials, s3_server
from shard_damage import Canary, npy, replace_record
from shard_data import NUM_USERS, check_gather, make_dataset, shard
from two_ranks import environment

EVERYONE = list(range(NUM_USERS))[::-1]
QUICK = RetryPolicy(attempts=3, first_wait=0.02, longest_wait=0.1, stall=10, deadline=60)
STALLING = RetryPolicy(attempts=3, first_wait=0.02, stall=0.5, deadline=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("store")
    dataset = make_dataset(folder)
    shard(dataset, folder / "shards")
    return dataset


@pytest.fixture(scope="module")
def local(made) -> ShardReader:
    return ShardReader(made.path.parent / "shards")


@pytest.fixture
def server(made):
    with serving(made.path.parent) as running:
        yield running


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "cache"))


def open_remote(server: FaultyServer, retry: RetryPolicy = QUICK, **more) -> ShardReader:
    return ShardReader(f"{server.url}/shards", retry=retry, **more)


def fail(server: FaultyServer, fault: str, name: str, times: int = 10**9) -> None:
    """The first `times` requests of the file meet the fault."""
    server.requests.clear()
    server.fault = lambda path, number: (
        fault if path.endswith(name) and len(server.of(name)) <= times else None
    )


def test_address_gives_what_the_directory_gives_with_one_request_per_record(made, server):
    reader = open_remote(server)
    for _ in range(2):
        check_gather(reader, made, EVERYONE)
    parts = {
        (f"/shards/{one.name}", f"bytes={entry.offset}-{entry.offset + entry.bytes - 1}")
        for one in reader.manifest.shards
        for entry in one.records
    }
    assert sorted(request for request in server.requests if request[1]) == sorted(parts)
    stats = reader.fetch_stats
    assert len(server.requests) == stats.requests == len(parts) + 2  # the manifest and the lengths
    assert stats.bytes_fetched == server.bytes_sent
    manifest = (made.path.parent / "shards" / "manifest.json").stat().st_size
    assert stats.bytes_used == server.bytes_sent - manifest
    second = open_remote(server)
    check_gather(second, made, EVERYONE)
    # The manifest alone comes again.
    assert (second.fetch_stats.requests, second.fetch_stats.cache_hits) == (1, len(parts) + 1)


FAULTS = [
    ("500", "answers 500", 3),
    ("escape", r"answers 500 secret\?\[31m\?", 3),
    ("stall", "stalls", 3),
    ("stall half-way", "stalls", 3),
    ("truncate", "breaks off", 3),
    ("wrong bytes", "sha256 .* expected", 3),
    ("other range", "for bytes=", 3),
    ("hang up", "connection fails", None),  # aiohttp tries again by itself
    ("404", "no such file", 1),
    ("403", "answers 403", 1),
    ("ignore Range", "ignores Range", 1),
    ("no length", "announces no number", 1),
]


@pytest.mark.parametrize(("fault", "message", "attempts"), FAULTS)
def test_lasting_fault_ends_in_one_line_that_names_the_record(server, fault, message, attempts):
    reader = open_remote(server, STALLING, cache_bytes=0)
    before = reader.fetch_stats.requests
    fail(server, fault, "shard-000001.tar")
    with pytest.raises(DataError, match=message) as caught:
        reader.gather(np.array([70]))
    assert f"{server.url}/shards/shard-000001.tar: record 4: " in str(caught.value)
    assert "\n" not in str(caught.value)
    if attempts is not None:
        assert len(server.of("shard-000001.tar")) == attempts
        assert reader.fetch_stats.requests == before + attempts
    # The other tars are as they were.
    assert reader.gather(np.array([0]))[1][1] == reader.lengths[0]


@pytest.mark.parametrize("fault", [fault for fault, _, attempts in FAULTS if attempts != 1])
def test_passing_fault_is_survived(made, server, fault):
    retry = RetryPolicy(attempts=12, first_wait=0.02, longest_wait=0.1, stall=0.5, deadline=60)
    fail(server, fault, "shard-000001.tar", times=2)
    check_gather(open_remote(server, retry), made, EVERYONE)
    assert len(server.of("shard-000001.tar")) >= 6  # four records and two failures


@pytest.mark.parametrize(
    ("name", "fault"), [("manifest.json", "truncate"), ("lengths.npy", "wrong bytes")]
)
def test_manifest_and_lengths_are_requested_again_too(made, server, name, fault):
    fail(server, fault, name, times=1)
    check_gather(open_remote(server), made, EVERYONE)
    fail(server, fault, name)
    with pytest.raises(DataError, match=f"{server.url}/shards/{name}: .*3 attempts"):
        open_remote(server, cache_bytes=0)
    assert len(server.of(name)) == 3


def test_waits_grow_and_the_deadline_ends_them(server, monkeypatch):
    import genrec_shards.storage.remote as remote

    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    fail(server, "500", "lengths.npy")
    with pytest.raises(DataError, match="7 attempts"):
        open_remote(server, RetryPolicy(attempts=7, first_wait=1, longest_wait=10, deadline=100))
    longest = [1, 2, 4, 8, 10, 10]
    assert len(waited) == len(longest)
    assert all(most / 2 <= wait <= most for wait, most in zip(waited, longest, strict=True))
    monkeypatch.undo()
    server.requests.clear()
    endless = RetryPolicy(attempts=10**6, first_wait=0.05, longest_wait=0.1, deadline=1)
    with pytest.raises(DataError, match="answers 500"):
        open_remote(server, endless)
    assert 3 <= len(server.of("lengths.npy")) < 100


def test_a_request_that_the_deadline_cuts_off_does_not_hide_why_the_others_failed(server):
    server.requests.clear()

    def fault(path: str, number: int) -> str | None:
        if not path.endswith("lengths.npy"):
            return None
        return "500" if len(server.of("lengths.npy")) < 3 else "stall"

    server.fault = fault
    with pytest.raises(DataError, match=r"answers 500 .*\(3 attempts"):
        open_remote(server, RetryPolicy(attempts=10, first_wait=0.05, stall=10, deadline=1))


def test_server_that_trickles_is_given_up_at_the_deadline(server):
    fail(server, "trickle", "shard-000000.tar")  # fast enough for `stall`, 90 s in all
    reader = open_remote(server, RetryPolicy(attempts=3, stall=10, deadline=1), cache_bytes=0)
    with pytest.raises(DataError, match="not all in 1 s"):
        reader.record(0)


def test_first_failing_record_ends_the_requests_of_the_others(made, tmp_path):
    shard(made, tmp_path / "shards", users_per_record=1)
    with serving(tmp_path) as server:
        reader = open_remote(server, cache_bytes=0)
        server.fault = lambda path, number: "500"
        with pytest.raises(DataError, match="3 attempts"):
            reader.gather(np.array(EVERYONE))
        assert len(set(server.requests[2:])) < NUM_USERS / 2


def test_answers_are_not_unpacked(made, server):
    """A compressed answer could be of any size: the bytes are taken as they are, and sha256
    decides."""
    fail(server, "gzip", "shard-000000.tar")
    check_gather(open_remote(server), made, EVERYONE)


REFUSED = [
    "pipe:touch CANARY",
    "pipe:touch CANARY; cat x",
    "PIPE:touch CANARY",
    "file:///etc",
    "file://localhost/etc",
    "http://192.0.2.1/shards",
    "http://example.invalid/shards",
    "http://127.0.0.1.example.invalid/shards",
    "http://localhost@example.invalid/shards",
    "http://0x7f000001/shards",
    "http://[::2]/shards",
    "https:/example.invalid/shards",
    "https:///shards",
    "https://h:port/shards",
    "s3://UPPER/shards",
    "s3:///shards",
    "gs://bucket/shards",
    "ftp://127.0.0.1/shards",
    "memory://shards",
    "simplecache::https://example.invalid/shards",
    "https://example.invalid/x.tar::pipe:touch CANARY",
    "zip://shards::https://example.invalid/a.zip",
    "data:,x",
    "https://example.invalid/shards?a=b",
    "https://example.invalid/sha rds",
    "https://example.invalid/shards\n",
]


@pytest.mark.parametrize("address", REFUSED)
def test_other_addresses_are_refused_and_nothing_is_run(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    assert is_address(address)
    with pytest.raises(
        ValueError, match=r"not opened|http of another|no server|no bucket|not an address|ends up"
    ) as caught:
        ShardReader(address)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) in ([], ["cache"])  # no canary
    subprocess.run("touch CANARY", shell=True, check=True)
    assert (tmp_path / "CANARY").exists()  # the command would have worked


@pytest.mark.parametrize(
    "address",
    [
        "https://me:secret@example.invalid/shards",
        "https://me:sec/ret@example.invalid/shards",
        "https://me:secret@@example.invalid:99999/shards",
        "http://me:secret@example.invalid/shards",
        "x::https://me:secret@example.invalid/shards",
        "https://example.invalid/shards?signature=secret",
    ],
)
def test_a_password_is_refused_and_not_shown(address):
    with pytest.raises(ValueError) as caught:
        ShardReader(address)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


def test_what_is_an_address():
    allowed = [
        "https://example.invalid/a/b/",
        "s3://my.bucket-1/x",
        "http://127.0.0.1:8000/x",
        "http://127.9.0.1/x",
    ]
    for address in [*allowed, "http://localhost:80/x", "http://[::1]:8000/x"]:
        assert check_address(address) == address.rstrip("/")
    assert not any(map(is_address, ["shards", "/a/b:c", "./pipe:x", "C:\\shards", "a b/c"]))


def test_redirects_lead_to_allowed_servers_alone(made, server, tmp_path):
    (tmp_path / "empty").mkdir()
    targets = ["http://192.0.2.1/x", "http://example.invalid/x", "file:///etc/passwd", "pipe:touch"]
    with serving(tmp_path / "empty") as first:
        first.redirect = lambda path: server.url + path
        check_gather(open_remote(first, cache_bytes=0), made, EVERYONE)
        for target in targets:
            first.redirect = lambda path, target=target: target
            with pytest.raises(DataError, match=r"is not allowed|connection fails"):
                open_remote(first)


OVER_HTTPS = """
import sys, ssl
from pathlib import Path
import faulty_server
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.remote import RetryPolicy
folder, certificate, key = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
quick = RetryPolicy(attempts=2, first_wait=0.01)
with faulty_server.serving(Path(folder), context) as server:
    def read():
        try:
            reader = ShardReader(server.url + '/shards', retry=quick)
            return 'users', reader.record(0).users.size
        except ValueError as error:
            return error
    print(read())
    server.redirect = lambda path: 'http://127.0.0.1:9/x'
    print(read())
"""


def test_https_server_is_checked_and_may_not_redirect_to_this_machine(made, tmp_path):
    """In processes of their own: certificates are read when a program starts."""
    certificate = make_certificate(tmp_path)
    command = [sys.executable, "-c", OVER_HTTPS, str(made.path.parent), *map(str, certificate)]
    paths = os.pathsep.join(path for path in sys.path if path)
    results = {}
    for name, trusted in (("stranger", {}), ("friend", {"SSL_CERT_FILE": str(certificate[0])})):
        env = environment(PYTHONPATH=paths, GENREC_CACHE=str(tmp_path / name), **trusted)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        results[name] = done.stdout.splitlines()
    assert "certificate is not trusted" in results["stranger"][0]
    assert results["friend"][0] == "('users', 16)"
    assert "sends us on to http://127.0.0.1, which is not allowed" in results["friend"][1]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) of localhost and 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    builder = builder.add_extension(host, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(signed.public_bytes(pem))
    paths[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return paths


@pytest.mark.parametrize("member", ["items.npy", "extra.pyd"])
def test_pickle_from_a_server_is_refused_and_never_run(made, tmp_path, member):
    shard(made, tmp_path / "shards")
    canary = Canary(tmp_path / "canary")
    pickled = {f"00000000.{member}": npy(np.array([canary], dtype=object), allow_pickle=True)}
    replace_record(tmp_path / "shards", lambda members: members.update(pickled))
    with serving(tmp_path) as server:
        reader = open_remote(server)
        for _ in range(2):  # from the server, then from the cache
            with pytest.raises(DataError, match=r"shard-000000\.tar: record 0"):
                reader.record(0)
        assert len(server.of("shard-000000.tar")) == 1
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary))
    assert canary.path.exists()


def gathered(reader: ShardReader, users: np.ndarray, queue) -> None:
    gc.collect()
    queue.put(reader.gather(users)[0].tolist())


@pytest.mark.parametrize(("method", "turns"), [("fork", 3), ("spawn", 1)])
def test_used_reader_works_in_another_process_and_still_in_its_own(
    made, local, server, method, turns
):
    """A forked child must leave its parent's connections alone: closed there, they fall silent
    here."""
    once = RetryPolicy(attempts=1, stall=20, deadline=60)
    reader = open_remote(server, once, cache_bytes=0, cache_records=1)
    context = multiprocessing.get_context(method)
    for turn in range(turns):
        users = np.arange(turn, NUM_USERS, 7)
        assert np.array_equal(reader.gather(users)[0], local.gather(users)[0])
        for one in (reader, local):
            queue = context.Queue()
            process = context.Process(target=gathered, args=(one, users[::-1], queue))
            process.start()
            assert queue.get(timeout=60) == local.gather(users[::-1])[0].tolist()
            process.join(60)
            assert process.exitcode == 0
    for one in (reader, local):
        check_gather(pickle.loads(pickle.dumps(one)), made, EVERYONE)


@pytest.mark.parametrize("where", ["directory", "address"])
def test_threads_may_share_a_reader(made, server, where):
    if where == "address":
        reader = open_remote(server, cache_records=2)
    else:
        reader = ShardReader(made.path.parent / "shards", cache_records=2)
    failures = []

    def work(seed: int) -> None:
        try:
            for users in np.random.default_rng(seed).integers(0, NUM_USERS, (10, 8)).tolist():
                check_gather(reader, made, users)
            check_gather(reader, made, EVERYONE)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert len(server.requests) == (12 if where == "address" else 0)


def test_missing_package_of_an_address_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    message = r"s3:// needs a package .*: pip install 'genrec-dist\[remote\]'"
    with pytest.raises(ValueError, match=message):
        ShardReader("s3://bucket/shards")


def use_endpoint(monkeypatch, url: str) -> None:
    for name, value in credentials(url).items():
        monkeypatch.setenv(name, value)
    # The clients that are there were made for another endpoint.
    monkeypatch.setattr("genrec_shards.storage.clients._clients", {})


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on loopback."""
    with s3_server() as (server, url):
        use_endpoint(monkeypatch, url)
        yield server


def test_shards_come_from_s3(made, s3):
    import boto3

    shards = made.path.parent / "shards"
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in shards.iterdir():
        client.upload_file(str(path), "bucket", f"some/shards/{path.name}")
    reader = ShardReader("s3://bucket/some/shards/", retry=QUICK)
    check_gather(reader, made, EVERYONE)
    stats = reader.fetch_stats
    assert stats.requests == 12
    assert stats.bytes_fetched - stats.bytes_used == (shards / "manifest.json").stat().st_size

    def check_error(address: str, record: int, message: str) -> None:
        with pytest.raises(DataError, match=message):
            ShardReader(address, retry=QUICK, cache_bytes=0).record(record)

    folder, tar = "s3://bucket/some/shards", "shard-00000{}.tar: record {}: "
    client.delete_object(Bucket="bucket", Key="some/shards/shard-000001.tar")
    check_error(folder, 4, f"{folder}/{tar.format(1, 4)}no such file")
    check_error("s3://nobody", 0, r"s3://nobody/manifest.json: no such file")
    body = (shards / "shard-000000.tar").read_bytes()
    client.put_object(Bucket="bucket", Key="some/shards/shard-000000.tar", Body=body[:1000])
    cut = rf"{tar.format(0, 0)}1000 bytes came, expected .* \(3 attempts"
    check_error(folder, 0, cut)
    s3.stop()
    check_error(folder, 0, rf"{folder}/manifest.json: .* \(3 attempts")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "s3://shards/shard-000001.tar: record 4: "),
        ("stall half-way", "stalls"),
        ("truncate", "breaks off"),
        ("wrong bytes", "sha256"),
        ("ignore Range", "bytes came, expected"),
        ("403", "credentials"),
    ],
)
def test_s3_gets_as_many_requests_and_no_more(made, server, monkeypatch, fault, message):
    """A read of S3 is an HTTP GET of /bucket/key, so the server that fails can stand for it."""
    use_endpoint(monkeypatch, server.url)
    fail(server, fault, "shard-000001.tar", times=2)
    if fault != "403":
        check_gather(ShardReader("s3://shards", retry=STALLING), made, EVERYONE)
    fail(server, fault, "shard-000001.tar")
    with pytest.raises(DataError, match=message) as caught:
        ShardReader("s3://shards", retry=STALLING, cache_bytes=0).record(4)
    assert "\n" not in str(caught.value)
    assert len(server.of("shard-000001.tar")) == (1 if fault == "403" else 3)


def test_endpoint_on_another_machine_must_be_https(monkeypatch):
    use_endpoint(monkeypatch, "http://192.0.2.1")
    with pytest.raises(ValueError, match=r"AWS endpoint http://192\.0\.2\.1: not opened"):
        ShardReader("s3://bucket/shards", retry=QUICK)


def test_our_own_mistakes_are_not_taken_for_a_servers(server, monkeypatch):
    files = RemoteFiles(f"{server.url}/shards", QUICK)
    monkeypatch.setattr(files, "_read", lambda *arguments: {}["mistake"])
    with pytest.raises(KeyError):
        files.fetch("manifest.json", "place", count=lambda size: None)
