"""`genrec serve` as a process of its own, asked by real clients: lists, errors, limits, the token,
reloads under traffic, and the stop."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import Started
from genrec_shards.dataset import load_dataset
from genrec_shards.storage.manifest import file_sha256
from safetensors.torch import load_file, save_file
from two_ranks import environment

from genrec_dist.cli.app import run_command
from genrec_dist.inference.recommend import Recommendation, Recommender, Request
from genrec_dist.serving.listen import listen

TOKEN = "a secret, with ü"
JSON = {"Content-Type": "application/json"}
LIMIT = 200 * 1024


@dataclass
class Server:
    process: Started
    port: int
    token: str = ""

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, Any]:
        """(status, body, headers); bytes are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        own = JSON | (
            {"Authorization": f"Bearer {self.token}".encode().decode("latin-1")}
            if self.token
            else {}
        )
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, content, own if headers is None else headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, json.loads(text) if is_json else text, answer.headers

    def lists(self, **body: Any) -> list[dict[str, Any]]:
        status, answer, _ = self.ask("POST", "/recommend", body)
        assert status == 200, answer
        found: list[dict[str, Any]] = answer["recommendations"]
        return found

    def socket(self, head: str) -> socket.socket:
        """A connection on which the request line and these headers are sent."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        token = f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        client.sendall(
            f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{token}{head}\r\n\r\n".encode()
        )
        return client


def start(run: Path, folder: Path, *options: str, token: str = "") -> Server:
    more = {"GENREC_TOKEN": token} if token else {}
    arguments = ["-m", "genrec_dist.cli", "serve", run, "--port", "0", *options]
    process = Started(arguments, folder / "out", folder / "err", environment(**more))
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if found := re.search(
            r"serving at http://127.0.0.1:(\d+) ",
            process.out.read_text() if process.out.exists() else "",
        ):
            return Server(process, int(found[1]), token)
        assert process.poll() is None, process.err.read_text()
        time.sleep(0.02)
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A copy of the run, as the reload changes what it serves."""
    folder = tmp_path_factory.mktemp("serve")
    options = ("--max-body", str(LIMIT // 1024), "--max-wait", "1.5", "--max-k", "64")
    found = start(tiny_run, folder, *options, token=TOKEN)
    yield found
    found.process.kill()


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


@pytest.fixture(scope="module")
def histories(tiny_data: Path) -> list[list[str]]:
    sequences = load_dataset(tiny_data).sequences
    rows = [
        sequences.items[a:b] for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)
    ]
    return [[sequences.item_ids[row] for row in items] for items in rows[:40]]


def check(found: dict[str, Any], whole: Recommendation) -> None:
    """That a list is the beginning of the recommender's. What else is in a batch moves scores by
    rounding, so items of nearly equal scores may change places."""
    scores = dict(zip(whole.items, whole.scores, strict=True))
    assert found["scores"] == pytest.approx(whole.scores[: len(found["scores"])], abs=1e-4)
    assert [scores[item] for item in found["items"]] == pytest.approx(found["scores"], abs=1e-4)


def test_lists_are_those_of_the_recommender(
    server: Server, recommender: Recommender, histories: list[list[str]]
) -> None:
    history, other = histories[:2]
    (expected,) = recommender.recommend([history], k=7)
    (found,) = server.lists(history=history, k=7)
    assert found["items"] == expected.items
    assert found["scores"] == pytest.approx(expected.scores, abs=1e-6)
    blocked = expected.items[0]
    requests = [
        {"history": history, "block": [blocked]},
        {"history": other, "user": "user-1"},
        {"history": []},
        {"history": [7, "ü", "\ud800"]},
    ]
    expected_each = recommender.recommend(
        [Request(history, None, [blocked]), Request(other, "user-1"), [], ["7", "ü", "\ud800"]],
        k=10,
    )
    lists = server.lists(requests=requests)
    assert blocked not in lists[0]["items"]
    for one, wanted in zip(lists, expected_each, strict=True):
        assert one["items"] == wanted.items
        assert one["unknown_items"] == wanted.unknown_items
        assert one.get("user") == wanted.user
    assert lists[3]["unknown_items"] == ["7", "ü", "\ud800"]
    assert server.lists(requests=[]) == []


def test_many_callers_get_their_own_lists(
    server: Server, recommender: Recommender, histories: list[list[str]]
) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda history: server.lists(history=history, k=5), histories * 3))
    for (one,), whole in zip(found, recommender.recommend(histories, k=64) * 3, strict=True):
        assert len(one["items"]) == 5
        check(one, whole)


DEEP = b'{"history": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "field"),
    [
        ("/recommend", {"history": [["a"]]}, 422, "invalid_request", "history.0"),
        ("/recommend", {"history": [True]}, 422, "invalid_request", "history.0"),
        ("/recommend", {"history": "abc"}, 422, "invalid_request", "history"),
        ("/recommend", {"history": [], "user": 1.5}, 422, "invalid_request", "user"),
        ("/recommend", {"history": [], "k": 0}, 422, "invalid_request", "k"),
        ("/recommend", {"history": [], "k": "5"}, 422, "invalid_request", "k"),
        ("/recommend", {"history": [], "k": 65}, 422, "invalid_request", "k"),
        ("/recommend", {"history": [], "K": 1}, 422, "invalid_request", "K"),
        ("/recommend", {"history": [], "\ud800": 1}, 422, "invalid_request", "body"),
        ("/recommend", {"requests": [{"history": []}, {}]}, 422, "invalid_request", "requests.1.history"),
        ("/recommend", {"requests": [{"history": []}] * 257}, 422, "invalid_request", "requests"),
        ("/recommend", {"requests": [], "history": []}, 422, "invalid_request", "body"),
        ("/recommend", {"requests": [], "user": "u"}, 422, "invalid_request", "body"),
        ("/recommend", {}, 422, "invalid_request", "body"),
        ("/recommend", b"", 422, "invalid_request", "body"),
        ("/recommend", b'{"history": ', 422, "invalid_request", "body"),
        ("/recommend", b"\xff\xff", 400, "bad_request", None),
        ("/recommend", DEEP, 400, "bad_request", None),
        ("/recommend", b"x" * (LIMIT + 1), 413, "too_large", None),
        ("/reload", {"run": "nowhere"}, 422, "bad_model", "run"),
        ("/reload", {"runs": "nowhere"}, 422, "invalid_request", "runs"),
        ("/nothing", {}, 404, "not_found", None),
        ("/health", {}, 405, "method_not_allowed", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    server: Server, path: str, body: Any, status: int, kind: str, field: str | None
) -> None:
    found, answer, _ = server.ask("POST", path, body)
    assert (found, answer["error"]["type"], answer["error"].get("field")) == (status, kind, field)
    assert answer["error"]["message"]
    assert server.lists(history=[])


@pytest.mark.parametrize(
    ("path", "body", "known"),
    [
        ("/recommend", {"histories": [["b07"]]}, {"history", "user", "block", "requests", "k"}),
        ("/recommend", {"requests": [{"history": [], "k": 5}]}, {"history", "user", "block"}),
        ("/reload", {"runs": "nowhere"}, {"run"}),
    ],
)
def test_a_field_that_does_not_exist_is_answered_by_those_that_do(
    server: Server, path: str, body: Any, known: set[str]
) -> None:
    _, answer, _ = server.ask("POST", path, body)
    assert set(answer["error"]["message"].split("known: ")[1].split(", ")) == known


def test_another_content_type_is_no_json(server: Server) -> None:
    """A page in a browser may send text/plain to this machine without being asked."""
    headers = {
        "Content-Type": "text/plain",
        "Authorization": f"Bearer {TOKEN}".encode().decode("latin-1"),
    }
    status, answer, _ = server.ask("POST", "/recommend", b'{"history": []}', headers)
    assert (status, answer["error"]["field"]) == (422, "body")
    assert "application/json" in answer["error"]["message"]


def test_lists_and_reloads_need_the_token(server: Server) -> None:
    for path in ("/recommend", "/reload"):
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {TOKEN}".encode().decode("latin-1")},
        ):
            status, answer, headers = server.ask("POST", path, {"history": []}, JSON | given)
            assert (status, answer["error"]["type"]) == (401, "unauthorized")
            assert headers["www-authenticate"] == "Bearer"
    assert server.ask("GET", "/health", headers={})[0] == 200
    assert server.ask("GET", "/metrics", headers={})[0] == 200


def test_a_body_in_pieces_is_bounded_in_bytes_and_in_time(server: Server) -> None:
    with server.socket("Content-Length: 1000000000") as client:  # nothing of it is waited for
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    with server.socket("Transfer-Encoding: chunked") as client:
        piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        client.sendall(piece * (LIMIT // 0x8000 + 1) + b"0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    slow, gone = server.socket("Content-Length: 15"), server.socket("Content-Length: 15")
    slow.sendall(b'{"hist')
    gone.sendall(b'{"hist')
    gone.close()
    started = time.monotonic()
    assert server.lists(history=[])  # others are answered meanwhile
    answer = b"".join(iter(lambda: slow.recv(1000), b""))  # until the server closes
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer
    assert 1 < time.monotonic() - started < 30
    slow.close()


def test_a_client_that_is_slow_with_its_head_is_cut_off_and_an_idle_one_is_not(
    server: Server,
) -> None:
    def drip(client: socket.socket) -> float:
        """Send a header line now and then; seconds until the server closes."""
        started = time.monotonic()
        client.settimeout(0.2)
        while time.monotonic() - started < 30:
            try:
                client.sendall(b"X-More: 1\r\n")
                if not client.recv(1000):
                    return time.monotonic() - started
            except TimeoutError:
                continue
            except OSError:
                return time.monotonic() - started
        raise AssertionError("the connection is held")

    address = ("127.0.0.1", server.port)
    silent = socket.create_connection(address, timeout=30)
    with socket.create_connection(address) as client:
        client.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\n")
        assert drip(client) > 1
    assert silent.recv(100) == b""
    silent.close()
    with socket.create_connection(address, timeout=30) as client:
        for _ in range(2):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = client.recv(10_000)
            while not answer.endswith(b"}"):  # head and body may come one after the other
                answer += client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(2)  # longer than a head may take
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert drip(client) > 1


def test_unknown_items_are_named_and_counted(server: Server) -> None:
    unknown = [f"no-{number}" for number in range(10_000)]
    before = metric(server, "genrec_unknown_items_total")
    (found,) = server.lists(history=unknown, k=3)
    assert found["unknown_items"] == unknown
    assert len(found["items"]) == 3
    assert metric(server, "genrec_unknown_items_total") == before + 10_000


def test_clients_at_fault_cost_the_others_no_answer_and_the_server_no_memory(
    server: Server, recommender: Recommender, histories: list[list[str]]
) -> None:
    """Some seconds of good clients beside those that stop in the middle, are slow, send too much or
    name 10,000 items that nobody knows."""
    expected = recommender.recommend(histories, k=64)
    unknown = {"history": [f"no-{number}" for number in range(10_000)], "k": 3}
    over, count = threading.Event(), Counter()
    slow: list[socket.socket] = []

    def good(caller: int) -> None:
        at = caller
        while not over.is_set():
            at = (at + 1) % len(histories)
            (found,) = server.lists(history=histories[at], k=5)
            check(found, expected[at])
            count["good"] += 1

    def at_fault() -> None:
        while not over.is_set():
            with server.socket("Content-Length: 15") as client:
                client.sendall(b'{"hist')  # and goes
            slow.append(server.socket("Content-Length: 15"))
            slow[-1].sendall(b'{"hist')  # and stays
            status, _, _ = server.ask("POST", "/recommend", b"x" * (LIMIT + 1))
            assert status == 413
            (found,) = server.lists(**unknown)
            assert len(found["unknown_items"]) == 10_000
            count["at fault"] += 4

    def traffic(seconds: float) -> None:
        over.clear()
        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(good, caller) for caller in range(3)] + [pool.submit(at_fault)]
            wait(callers, timeout=seconds, return_when=FIRST_EXCEPTION)
            over.set()
            for caller in callers:
                caller.result()

    traffic(3)
    before, earlier = resident_bytes(server), count.copy()
    traffic(5)
    grown = resident_bytes(server) - before
    rounds = (count["at fault"] - earlier["at fault"]) // 4
    # Python holds the names of one request in more than 600 kB.
    assert grown < 2**21 + rounds * 200_000, (grown, rounds)
    assert min(rounds, count["good"]) > 4
    for client in slow:
        answer = b"".join(iter(lambda open_=client: open_.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        client.close()
    assert metric(server, "genrec_in_flight") == 0


def resident_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.M)
    assert found is not None
    return 1024 * int(found[1])


def metric(server: Server, name: str) -> float:
    _, text, _ = server.ask("GET", "/metrics")
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    assert found is not None, name
    return float(found[1])


def test_metrics_count_what_was_answered(server: Server) -> None:
    name = 'genrec_requests_total{path="/recommend",status="200"}'
    server.lists(history=[])
    before, histories = metric(server, name), metric(server, "genrec_histories_total")
    server.lists(requests=[{"history": []}] * 3)
    server.ask("POST", "/recommend", {"history": "abc"})
    assert metric(server, name) == before + 1
    assert metric(server, "genrec_histories_total") == histories + 3
    assert metric(server, "genrec_recommend_seconds_count") == before + 1
    _, text, headers = server.ask("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    buckets = [int(n) for n in re.findall(r'seconds_bucket{le="[^"]+"} (\d+)', text)]
    assert buckets == sorted(buckets)
    assert buckets[-1] == before + 1
    assert metric(server, "genrec_in_flight") == 0


def test_the_page_has_examples_that_work_and_loads_nothing(server: Server) -> None:
    _, schema, _ = server.ask("GET", "/openapi.json")
    (content,) = schema["paths"]["/recommend"]["post"]["requestBody"]["content"].values()
    name = content["schema"]["$ref"].split("/")[-1]
    examples = schema["components"]["schemas"][name]["examples"]
    assert len(examples) == 2
    _, page, _ = server.ask("GET", "/docs")
    for example in examples:
        assert server.lists(**example)
    assert page.count("<pre>curl ") >= 5
    assert not re.search(r"<script|<link|src=", page)
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://127.0.0.1"}


def other_run(run: Path, folder: Path) -> Path:
    """The run with other weights and without a manifest."""
    shutil.copytree(run, folder)
    weights = folder / "best" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
    (folder / "best" / "manifest.json").unlink()
    return folder


def test_reloads_under_traffic_lose_no_request(
    server: Server,
    recommender: Recommender,
    histories: list[list[str]],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    other = other_run(tiny_run, tmp_path / "other")
    digest = file_sha256(tiny_run / "best" / "manifest.json")[:12]
    by_model = {
        name: answers_of.recommend(histories, k=64)
        for name, answers_of in ((digest, recommender), ("", Recommender.load(other)))
    }
    answers: list[tuple[int, int, Any]] = []
    over = threading.Event()

    def call(caller: int) -> None:
        for number in range(10**6):
            at = (caller + number) % len(histories)
            status, answer, _ = server.ask("POST", "/recommend", {"history": histories[at], "k": 5})
            answers.append((at, status, answer))
            if over.is_set():
                return

    callers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in callers:
        thread.start()
    for run, name in ((other, ""), (tiny_run, digest)):
        status, answer, _ = server.ask("POST", "/reload", {"run": str(run)})
        assert (status, answer) == (200, {"run": run.name, "model": name})
        assert server.ask("GET", "/health")[1]["model"] == name
        until = time.monotonic() + 60
        while not any(answer.get("model") == name for _, _, answer in answers):
            assert time.monotonic() < until, "no answer by the new run"
            time.sleep(0.005)
    assert server.ask("POST", "/reload", {"run": str(tmp_path)})[0] == 422
    reloads = metric(server, 'genrec_reloads_total{result="ok"}')
    os.kill(server.process.pid, signal.SIGHUP)
    until = time.monotonic() + 60
    while metric(server, 'genrec_reloads_total{result="ok"}') == reloads:
        assert time.monotonic() < until
        time.sleep(0.02)
    over.set()
    for thread in callers:
        thread.join()
    assert {status for _, status, _ in answers} == {200}
    assert {answer["model"] for _, _, answer in answers} == {digest, ""}
    for at, _, answer in answers[:: len(answers) // 100 + 1]:
        check(answer["recommendations"][0], by_model[answer["model"]][at])


def test_a_full_queue_is_said_and_a_stop_answers_what_was_taken(
    tiny_run: Path, histories: list[list[str]], tmp_path: Path
) -> None:
    server = start(tiny_run, tmp_path, "--queue", "2", "--decode", "free")
    try:
        status, answer, _ = server.ask("POST", "/reload", {})  # any program might, without a token
        assert (status, answer["error"]["type"]) == (403, "forbidden")
        assert "GENREC_TOKEN" in answer["error"]["message"]
        assert "/reload" not in server.ask("GET", "/docs")[1]
        heavy = {"requests": [{"history": histories[n % 40]} for n in range(256)], "k": 64}
        with ThreadPoolExecutor(8) as pool:
            taken = [pool.submit(server.ask, "POST", "/recommend", heavy) for _ in range(2)]
            while server.ask("GET", "/health")[1]["in_flight"] < 2:
                assert not any(future.done() for future in taken), "decoded too soon to be seen"
            status, answer, headers = server.ask("POST", "/recommend", {"history": []})
            assert (status, answer["error"]["type"]) == (503, "queue_full")
            assert headers["retry-after"] == "1"
            assert not all(future.done() for future in taken)
            os.kill(server.process.pid, signal.SIGTERM)
            for future in taken:
                status, answer, _ = future.result()
                assert status == 200
                assert len(answer["recommendations"]) == 256
                assert {"invalid", "duplicates"} <= answer["recommendations"][0].keys()
        done = server.process.wait(30)
        assert (done.returncode, done.stderr) == (0, "")
        assert "stopped" in done.stdout
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/health")
    finally:
        server.process.kill()


def test_what_cannot_be_served_is_one_line(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refused(code: int, *options: str) -> str:
        assert run_command(["serve", str(tiny_run), *options]) == code
        (line,) = capfd.readouterr().err.splitlines()
        return line

    monkeypatch.delenv("GENREC_TOKEN", raising=False)
    assert "set GENREC_TOKEN" in refused(2, "--host", "0.0.0.0")
    monkeypatch.setenv("GENREC_TOKEN", " ")
    assert "GENREC_TOKEN is empty" in refused(2)
    monkeypatch.delenv("GENREC_TOKEN")
    with socket.create_server(("127.0.0.1", 0)) as held:
        assert "--port" in refused(1, "--port", str(held.getsockname()[1]))
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "genrec_dist.serving.app", raising=False)
    assert "pip install 'genrec-dist[serve]'" in refused(1, "--port", "0")
    assert run_command(["serve", str(tmp_path)]) == 1
    assert "no best/ in it" in capfd.readouterr().err


def test_a_short_answer_does_not_wait_for_a_full_packet() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
