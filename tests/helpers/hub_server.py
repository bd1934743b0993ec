"""A model hub on loopback: the endpoints that `huggingface_hub` calls to create a repository, to
upload in one commit and to download, and the ways in which they fail."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """`fault(method, path)` names what goes wrong with a request, or None: 503, cut (half of the
    body is read or sent), wrong bytes."""

    token: str = "hf_secret"
    fault: Callable[[str, str], str | None] = lambda method, path: None
    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """Private or not, by name."""
    commits: dict[tuple[str, str], list[dict[str, bytes]]] = field(default_factory=dict)
    """By (repository, branch), oldest first: the files after each commit."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256, whether a commit has them or not."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range) of each."""
    bodies: list[bytes] = field(default_factory=list)
    """All that was uploaded."""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Of a branch or a commit."""
        for (name, branch), commits in self.commits.items():
            for number, files in enumerate(commits):
                if name == repo and revision == commit_id(name, branch, number):
                    return files
        commits = self.commits.get((repo, revision), [])
        return commits[-1] if commits else {}

    def head(self, repo: str, revision: str = "main") -> str:
        """The commit that a branch, or the commit itself, means; "" where there is none."""
        if (repo, revision) not in self.commits:
            return revision if self.files(repo, revision) else ""
        return commit_id(repo, revision, len(self.commits[repo, revision]) - 1)

    def sent(self, method: str, part: str) -> list[str]:
        return [path for verb, path, _ in self.requests if verb == method and part in path]


def commit_id(repo: str, branch: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {branch} {number}".encode()).hexdigest()


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "timeout": 30})
    )
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        fault = hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length", "0"))
        if fault == "cut" and length:
            self.rfile.read(length // 2)
            self.connection.close()
            return
        body = self.rfile.read(length)
        if fault == "503":
            self._answer(503, b"busy")
            return
        # Addresses of the store need no token: on the real hub they are signed.
        guarded = self.command == "POST" or any(
            private and name in path for name, private in hub.repos.items()
        )
        if guarded and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, b'{"error": "Invalid username or password."}')
            return
        if self.command in ("POST", "PUT"):
            hub.bodies.append(body)
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                answer(self, body, fault, **match.groupdict())
                return
        self._answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def create(self, body: bytes, fault: str | None) -> None:
        fields = json.loads(body)
        name = "/".join(filter(None, [fields.get("organization"), fields["name"]]))
        if name in self.hub.repos:
            self._answer(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
            return
        self.hub.repos[name] = fields.get("visibility") == "private" or bool(fields.get("private"))
        self.hub.commits[name, "main"] = [{".gitattributes": b""}]
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, body: bytes, fault: str | None, repo: str, rev: str) -> None:
        if (repo, rev) in self.hub.commits:
            self._answer(409, b"{}")
            return
        self.hub.commits[repo, rev] = [dict(self.hub.files(repo))]
        self._json({})

    def info(self, body: bytes, fault: str | None, repo: str, rev: str = "main") -> None:
        if self._missing(repo, rev):
            return
        files = [{"rfilename": name} for name in self.hub.files(repo, rev)]
        self._json({"id": repo, "sha": self.hub.head(repo, rev), "siblings": files})

    def tree(self, body: bytes, fault: str | None, repo: str, rev: str) -> None:
        if self._missing(repo, rev):
            return
        files = self.hub.files(repo, rev).items()
        self._json(
            [{"type": "file", "path": n, "size": len(f), "oid": _blob_id(f)} for n, f in files]
        )

    def validate(self, body: bytes, fault: str | None) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, fault: str | None, repo: str, rev: str) -> None:
        there, files = self.hub.files(repo, rev), []
        for each in json.loads(body)["files"]:
            name = each["path"]
            is_large = name.endswith(".safetensors")
            held = there.get(name)
            oid = None if held is None else _sha256(held) if is_large else _blob_id(held)
            mode = "lfs" if is_large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def batch(self, body: bytes, fault: str | None, repo: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            if each["oid"] not in self.hub.stored:
                href = f"{self.hub.url}/store/{each['oid']}"
                each["actions"] = {"upload": {"href": href}}
            objects.append(each)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, fault: str | None, oid: str) -> None:
        if _sha256(body) != oid:
            self._answer(400, b"another hash")
            return
        self.hub.stored[oid] = body
        self._json({})

    def commit(self, body: bytes, fault: str | None, repo: str, rev: str) -> None:
        files = dict(self.hub.files(repo, rev))
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        self.hub.bodies += files.values()  # as they are, not in base64
        self.hub.commits[repo, rev].append(files)
        oid = self.hub.head(repo, rev)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, body: bytes, fault: str | None, repo: str, rev: str, name: str) -> None:
        if self._missing(repo, rev):
            return
        held = self.hub.files(repo, rev).get(name)
        if held is None:
            self._answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{_sha256(held)}"',
            "X-Repo-Commit": self.hub.head(repo, rev),
            "X-Linked-Size": str(len(held)),
            "Accept-Ranges": "bytes",
        }
        if fault == "wrong bytes":
            held = bytes([held[0] ^ 1]) + held[1:]
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            total, held, status = len(held), held[int(asked[1]) :], 206
            headers["Content-Range"] = f"bytes {asked[1]}-{total - 1}/{total}"
        cut = len(held) // 2 if fault == "cut" and self.command == "GET" else None
        self._answer(status, held, cut=cut, **headers)

    def _missing(self, repo: str, rev: str) -> bool:
        if repo not in self.hub.repos:
            self._answer(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif not self.hub.head(repo, rev):
            self._answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/branch/(?P<rev>.+)", _Handler.branch),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<rev>.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<rev>[^/]+)", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<rev>.+)", _Handler.preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/store/(?P<oid>.+)", _Handler.store),
    ("POST", f"/api/models/{_REPO}/commit/(?P<rev>.+)", _Handler.commit),
    ("GET", f"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<name>.+)", _Handler.resolve),
)
