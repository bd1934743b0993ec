"""The HTTP side of `genrec serve`: requests, answers, typed errors, limits, signals."""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genrec_dist.inference.recommend import REQUESTS_AT_ONCE, Recommendation
from genrec_dist.inference.recommend import Request as RecommendRequest
from genrec_dist.report.html import page, text
from genrec_dist.serving.connection import Connection
from genrec_dist.serving.metrics import CONTENT_TYPE
from genrec_dist.serving.service import QueueFull, Service

DRAIN_SECONDS = 30
"""How long a stopping server waits for requests it has taken."""
EXAMPLES: dict[str, Any] = {
    "/recommend": [
        {"history": ["b07", "c12"], "k": 5},
        {"requests": [{"history": ["b07"], "block": ["c12"]}, {"history": []}], "k": 5},
    ],
    "/reload": [{"run": "runs/new"}],
}


def _id(value: Any) -> Any:
    """Whole numbers are ids too, as in a file of requests."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Id = Annotated[str, BeforeValidator(_id)]
# Lists fail fast: a body of nothing but errors would otherwise take a second to say them all.


class History(BaseModel):
    model_config = ConfigDict(extra="forbid")

    history: list[Id] = Field(fail_fast=True, description="Item ids, oldest first; may be empty.")
    user: Id | None = Field(None, description="A user's id; unknown ones count as none.")
    block: list[Id] = Field(
        [], fail_fast=True, description="Item ids that this answer must not list."
    )


class Recommend(BaseModel):
    """One history, or `requests` with many."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": EXAMPLES["/recommend"]}
    )

    history: list[Id] | None = Field(
        None, fail_fast=True, description="Item ids, oldest first; may be empty."
    )
    user: Id | None = Field(None, description="A user's id; unknown ones count as none.")
    block: list[Id] = Field(
        [], fail_fast=True, description="Item ids that the answer must not list."
    )
    requests: list[History] | None = Field(None, fail_fast=True, max_length=REQUESTS_AT_ONCE)
    k: int = Field(10, ge=1, strict=True, description="Length of the lists.")

    @model_validator(mode="after")
    def _one_or_many(self) -> Recommend:
        if (self.history is None) == (self.requests is None):
            raise ValueError("give either history or requests")
        if self.requests is not None and (self.block or self.user is not None):
            raise ValueError("with requests, user and block belong into each of them")
        return self

    def each(self) -> list[RecommendRequest]:
        if self.requests is None:
            return [RecommendRequest(self.history or [], self.user, self.block)]
        return [RecommendRequest(each.history, each.user, each.block) for each in self.requests]


class Reload(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": EXAMPLES["/reload"]})

    run: str | None = Field(None, description="A run directory of the server; none: as now.")


class List(BaseModel):
    user: str | None = None
    items: list[str] = Field(description="Item ids, best first.")
    scores: list[float] = Field(description="Natural log-probabilities.")
    unknown_items: list[str] = Field(description="Of the history, not in the catalogue; skipped.")
    invalid: int | None = Field(None, description="Mode free alone: texts that are no item.")
    duplicates: int | None = Field(None, description="Mode free alone: items spelt before.")


class Lists(BaseModel):
    run: str = Field(description="The name of the run directory that answered.")
    model: str = Field(description="First digits of the sha256 of its manifest.")
    recommendations: list[List]


class Problem(HTTPException):
    """An error with a name, and the field that is to blame."""

    def __init__(self, status: int, kind: str, message: str, field: str = "", **headers: str):
        super().__init__(status, message, {n.replace("_", "-"): v for n, v in headers.items()})
        self.kind, self.field = kind, field


def _json(content: Any, status: int = 200, headers: Any = None) -> Response:
    # ASCII: an unpaired surrogate in the name of a wrong field cannot be written as UTF-8.
    body = json.dumps(content).encode("ascii")
    return Response(body, status, headers, media_type="application/json")


def _wrong_field(error: dict[str, Any], path: str) -> dict[str, str]:
    """Field and message of one of pydantic's errors about a body sent to `path`."""
    if error["type"] == "json_invalid":
        return {"field": "body", "message": f"no JSON: {error['ctx']['error']}"}
    field = ".".join(map(str, error["loc"][1:])) or "body"
    if error["type"] == "extra_forbidden":
        is_nested = len(error["loc"]) > 2
        body = Reload if path == RELOAD else History if is_nested else Recommend
        return {"field": field, "message": f"no such field; known: {', '.join(body.model_fields)}"}
    # What came with another content type is not read as JSON.
    is_other_type = error["type"] == "model_attributes_type" and field == "body"
    message = "send a JSON object with Content-Type: application/json"
    return {"field": field, "message": message if is_other_type else error["msg"]}


async def _answer_problem(request: Request, error: Exception) -> Response:
    """`{"error": {"type": ..., "message": ..., "field": ...}}`"""
    if isinstance(error, RequestValidationError):
        first = _wrong_field(error.errors()[0], request.url.path)
        message = f"{first['field']}: {first['message']}"
        told = {"type": "invalid_request", "message": message, "field": first["field"]}
        return _json({"error": told}, 422)
    if isinstance(error, StarletteHTTPException):
        kind = getattr(error, "kind", "") or HTTPStatus(error.status_code).name.lower()
        told = {"type": kind, "message": error.detail}
        if field := getattr(error, "field", ""):
            told["field"] = field
        return _json({"error": told}, error.status_code, error.headers)
    told = {"type": "internal", "message": f"{type(error).__name__}: see the server's log"}
    return _json({"error": told}, 500)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    k: int = 100
    """Length of a list."""
    body: int = 2**20
    """Bytes of a request's body."""
    seconds: float = 10.0
    """Until the head of a request is there, and then until its body is."""


OPEN_PATHS = {"/health", "/metrics", "/docs", "/openapi.json"}
"""Those that need no token."""
RELOAD = "/reload"
PATHS = {*OPEN_PATHS, "/recommend", RELOAD}


class Gate:
    """Middleware: refuses before a body is read, bounds it in bytes and seconds, counts and times
    requests."""

    def __init__(self, app: ASGIApp, service: Service, limits: Limits, token: str | None):
        self._app, self._metrics, self._limits = app, service.metrics, limits
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, size, status, whole = time.perf_counter(), 0, 500, False
        headers = dict(scope["headers"])

        async def bounded() -> Message:
            nonlocal size, whole
            left = None if whole else start + self._limits.seconds - time.perf_counter()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                reason = f"the body took longer than {self._limits.seconds:g} s"
                raise Problem(408, "body_timeout", reason, connection="close") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._limits.body:
                raise self._too_large()
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        refusal = None
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            reason = "send the header Authorization: Bearer with the server's token"
            refusal = Problem(401, "unauthorized", reason, www_authenticate="Bearer")
        elif scope["path"] == RELOAD and self._token is None:
            # Any program of this machine, and a page in its browser, could send one.
            reason = "start the server with GENREC_TOKEN to reload over HTTP, or send it SIGHUP"
            refusal = Problem(403, "forbidden", reason)
        elif int(headers.get(b"content-length", b"0")) > self._limits.body:
            refusal = self._too_large()
        try:
            if refusal is not None:
                answer = _answer_problem(Request(scope), refusal)
                await (await answer)(scope, receive, watched)
            else:
                await self._app(scope, bounded, watched)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requests[path, status] += 1
            if path == "/recommend" and status == 200:
                self._metrics.observe(time.perf_counter() - start)

    def _knows(self, given: bytes) -> bool:
        """Whether the header has the token, in a time that does not tell how much of it."""
        if self._token is None:
            return True
        scheme, _, found = given.partition(b" ")
        is_equal = hmac.compare_digest(found.strip(), self._token.encode())
        return is_equal and scheme.lower() == b"bearer"

    def _too_large(self) -> Problem:
        return Problem(413, "too_large", f"the body is over {self._limits.body:,} bytes: send less")


_BEARER = HTTPBearer(auto_error=False, description="The value of the server's GENREC_TOKEN.")


def make_app(service: Service, *, token: str | None, limits: Limits, at: str) -> FastAPI:
    """The application.

    Args:
        service: What answers.
        token: What all but `OPEN_PATHS` want as bearer token; None: nothing, and nobody reloads
            over HTTP.
        limits: What a request may ask for.
        at: Address of the server, for the page of examples and the line that says it is ready.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop, tasks = asyncio.get_running_loop(), set()

        async def reload() -> None:
            try:
                model = await service.reload()
                print(f"reloaded {model.run} ({model.digest})", flush=True)
            except Exception as error:  # the old model answers on, whatever it was
                print(f"not reloaded, {service.model.run} answers on: {error}", file=sys.stderr)

        def on_hangup() -> None:
            task = asyncio.create_task(reload())
            tasks.add(task)  # or nothing would hold it
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        print(f"{service.model.run}: serving at {at} (examples: {at}/docs)", flush=True)
        yield
        await asyncio.gather(*tasks)

    app = FastAPI(title="genrec serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, service=service, limits=limits, token=token)
    for kind in (RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, _answer_problem)
    locked = [Depends(_BEARER)]  # for the schema: the gate has compared it

    @app.post("/recommend", dependencies=locked, response_model=Lists)
    async def recommend(body: Recommend) -> Response:
        """Lists for one history or many, in the order of the requests."""
        if body.k > limits.k:
            raise Problem(422, "invalid_request", f"k: at most {limits.k} on this server", "k")
        try:
            model, answers = await service.recommend(body.each(), body.k)
        except QueueFull:
            reason = "as many requests wait as may wait: send it again later"
            raise Problem(503, "queue_full", reason, retry_after="1") from None
        lists = [_fields(answer) for answer in answers]
        name = model.run.resolve().name
        return _json({"run": name, "model": model.digest, "recommendations": lists})

    @app.post("/reload", dependencies=locked)
    async def reload(body: Reload | None = None) -> Response:
        """Go to newer weights of the same run, or to another run; requests go on meanwhile."""
        run = Path(body.run) if body and body.run is not None else None
        try:
            model = await service.reload(run)
        except (ValueError, OSError) as error:
            raise Problem(422, "bad_model", str(error), "run") from None
        return _json({"run": model.run.resolve().name, "model": model.digest})

    @app.get("/health")
    async def health() -> Response:
        """Whether it answers, and with which model."""
        model = service.model
        return _json(
            {
                "status": "ok",
                "run": model.run.resolve().name,
                "model": model.digest,
                "decode": model.recommender.mode,
                "items": len(model.recommender.item_filter.rows),
                "in_flight": service.in_flight,
            }
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and the histogram of latencies, for Prometheus."""
        run, digest = service.model.run.resolve().name, service.model.digest
        shown = service.metrics.text(service.in_flight, run, digest)
        return Response(shown, headers={"content-type": CONTENT_TYPE})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs(app.openapi(), at, "" if token is None else "TOKEN"))

    return app


def _fields(answer: Recommendation) -> dict[str, Any]:
    return {n: value for n, value in asdict(answer).items() if value is not None}


def _docs(schema: dict[str, Any], at: str, token: str) -> str:
    """The operations with examples. (FastAPI's own page loads its scripts from a network.)

    `token`: what stands for it in the examples; empty: none is needed.
    """
    sections = ['<h1>genrec serve</h1><p>Schema: <a href="/openapi.json">OpenAPI</a></p>']
    for path, methods in schema["paths"].items():
        if path == RELOAD and not token:
            continue
        for method, operation in methods.items():
            call = f"curl {at}{path}"
            if token and "security" in operation:
                call += f" -H 'Authorization: Bearer {token}'"
            bodies = [
                f" -H 'Content-Type: application/json' -d '{json.dumps(example)}'"
                for example in EXAMPLES.get(path, [])
            ]
            title = f"<h2>{method.upper()} {path}</h2><p>{text(operation['description'])}</p>"
            sections.append(title + "".join(f"<pre>{text(call + b)}</pre>" for b in bodies or [""]))
    return page("serve", sections)


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking connections and answer what was taken; a second Ctrl-C stops at once. (The
        base class would raise the signal again afterwards, and the exit code would be its.)"""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def run_server(app: FastAPI, listener: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=partial(Connection, head_seconds=limits.seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    # The loop works beside a thread that decodes, and would wait 5 ms for a turn (docs/log.md).
    sys.setswitchinterval(0.0005)
    _Server(config).run(sockets=[listener])
