"""Files at an address: which addresses are allowed, requests of byte ranges, retries."""

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from genrec_shards.errors import DataError, printable

Result = TypeVar("Result")
# A drive's single letter is a path.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_ALLOWED = "allowed are https://, s3://, and http:// of this machine (127.0.0.1, [::1], localhost)"
# A whole file is the manifest or lengths.npy; more than this is something else.
_MOST_BYTES = 1 << 30
_REDIRECTS = (301, 302, 303, 307, 308)
_FINAL_STATUS = {*range(400, 500)} - {408, 425, 429}


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a failing server is tried again."""

    attempts: int = 6
    """Requests of the same bytes."""
    first_wait: float = 0.5
    """Seconds before the second attempt; twice as long before each further one, times a random
    factor of 0.5 to 1."""
    longest_wait: float = 20.0
    """Seconds."""
    stall: float = 20.0
    """Seconds without a byte after which a request is given up."""
    deadline: float = 180.0
    """Seconds for all attempts together."""


class BadResponse(Exception):
    """An answer that is not the bytes requested. `final`: another request would change nothing."""

    def __init__(self, complaint: str, final: bool = False) -> None:
        super().__init__(complaint)
        self.final = final


def is_address(path: str | Path) -> bool:
    """Whether this is meant as an address, allowed or not. A directory of such a name is written
    `./name`."""
    return _SCHEME.match(str(path)) is not None or "://" in str(path)


def check_address(text: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: the address is not allowed. The message shows no password.
    """
    # Neither a query, which may be a signature, nor what may be a password; and one line.
    shown = re.sub(r"//.*@", "//***@", text.split("?")[0], flags=re.DOTALL)
    shown = printable(shown)
    if "::" in re.sub(r"\[[0-9a-fA-F:.]*\]", "", text):
        raise ValueError(f"{shown}: a chain of addresses is not opened; {_ALLOWED}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{shown}: not an address ({error}); {_ALLOWED}") from None
    problem = None
    if parts.scheme not in ("https", "s3", "http"):
        problem = f"{parts.scheme}: is not opened; {_ALLOWED}"
    elif not host:
        problem = f"names no server; write {parts.scheme}://SERVER/PATH, as text and not as a Path"
    elif "@" in parts.netloc:
        problem = (
            "a password in an address ends up in every run's files; "
            "put it into ~/.netrc (https) or the AWS credentials (s3)"
        )
    elif "?" in text or "#" in text or not text.isprintable() or any(map(str.isspace, text)):
        problem = "an address with ?, # or blanks is not opened; give that of the directory alone"
    elif parts.scheme == "http" and not is_loopback(host):
        problem = f"http of another machine can be read and changed on its way; {_ALLOWED}"
    elif parts.scheme == "s3" and not _BUCKET.fullmatch(parts.netloc):
        problem = f"{parts.netloc!r} is no bucket's name"
    if problem is not None:
        raise ValueError(f"{shown}: {problem}")
    return text.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine. Only names and numbers that need no name server count: its
    answer could change from call to call."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RemoteFiles:
    """The files below one address, read through fsspec (`cat_file(start, end)`).

    It can be pickled and used after a fork: each process opens its own connections. Each method
    retries by the policy and then raises DataError, one line with the place and what happened."""

    def __init__(self, address: str, retry: RetryPolicy) -> None:
        """Raises ValueError for an address that is not allowed, or where a package is missing."""
        self.address, self.retry = check_address(address), retry
        self.scheme = urlsplit(self.address).scheme
        try:
            if self.scheme == "s3":
                import s3fs  # noqa: F401
            else:
                import fsspec.implementations.http  # noqa: F401
        except ImportError as error:
            remedy = f"({error.name}): pip install 'genrec-dist[remote]'"
            raise ValueError(f"{self.scheme}:// needs a package {remedy}") from None

    def fetch(
        self,
        name: str,
        place: str,
        *,
        part: tuple[int, int] | None = None,
        sha256: str | None = None,
        count: Callable[[int], None],
    ) -> bytes:
        """The bytes of a file.

        Args:
            name: the file's name below the address.
            place: what an error names.
            part: (first byte, byte after the last); None: the whole file.
            sha256: what the bytes must have, in hex.
            count: called once for each request, with the bytes that came.
        """

        def request(seconds: float) -> bytes:
            data = b""
            try:
                data = self._read(name, part, seconds)
            finally:
                count(len(data))
            if part is not None and len(data) != part[1] - part[0]:
                raise BadResponse(f"{len(data)} bytes came, expected {part[1] - part[0]}")
            found = hashlib.sha256(data).hexdigest()
            if sha256 is not None and found != sha256:
                raise BadResponse(f"sha256 {found[:12]}, expected {sha256[:12]}")
            return data

        return self._with_retries(place, request)

    def size(self, name: str, place: str) -> int:
        """Bytes of a file; of a web server that honours Range, since parts will be requested."""
        size = self._size_of_object if self.scheme == "s3" else self._size_of_page
        return self._with_retries(place, lambda seconds: size(self._path(name), seconds))

    def listed(self) -> list[tuple[str, int]]:
        """(name, bytes) of the files in this folder; of s3 alone, since web servers share no way
        to list."""
        folder = self._path("")

        def request(seconds: float) -> list[tuple[str, int]]:
            try:
                found = self._client().ls(folder[:-1], detail=True, refresh=True, timeout=seconds)
            except FileNotFoundError:
                return []
            files = [entry for entry in found if entry["type"] == "file"]
            return [
                (entry["name"].removeprefix(folder), entry["size"])
                for entry in files
                if entry["name"].startswith(folder)
            ]

        return self._with_retries(self.address, request)

    def put(self, name: str, file: Path) -> None:
        """Write a file below this address, in place of one that is there: s3 shows it whole or not
        at all."""
        self._with_retries(
            f"{self.address}/{name}",
            lambda left: self._client().put_file(str(file), self._path(name), timeout=left),
        )

    def remove(self, name: str) -> None:
        """Remove a file below this address."""
        self._with_retries(
            f"{self.address}/{name}",
            lambda left: self._client().rm_file(self._path(name), timeout=left),
        )

    def _client(self) -> Any:
        return _client(self.scheme, self.retry.stall)

    def _path(self, name: str) -> str:
        """The file as fsspec names it."""
        return f"{self.address.removeprefix('s3://')}/{name}"

    def _read(self, name: str, part: tuple[int, int] | None, seconds: float) -> bytes:
        start, end = part or (None, None)
        if self.scheme == "s3":
            # s3fs asks for the size of a whole file first, but not of one from 0 on.
            start = start or 0
        data: bytes = self._client().cat_file(
            self._path(name), start=start, end=end, timeout=seconds
        )
        return data

    def _size_of_object(self, path: str, seconds: float) -> int:
        found = self._client().info(path, refresh=True, timeout=seconds)
        if found["type"] != "file":
            raise FileNotFoundError(path)
        return int(found["size"])

    def _size_of_page(self, path: str, seconds: float) -> int:
        from fsspec.asyn import sync

        client = self._client()

        async def ask() -> str:
            session, first_byte = await client.set_session(), {"Range": "bytes=0-0"}
            async with session.get(client.encode_url(path), headers=first_byte) as answer:
                return str(answer.headers.get("Content-Range", ""))

        total = sync(client.loop, ask, timeout=seconds).rpartition("/")[2]
        if not total.isdigit():
            raise BadResponse(f"the server names no size ({total[:20]!r})", final=True)
        return int(total)

    def _with_retries(self, place: str, request: Callable[[float], Result]) -> Result:
        """What `request`, called with the seconds that are left, returns."""
        retry, started, wait = self.retry, time.monotonic(), self.retry.first_wait
        for attempt in range(1, retry.attempts + 1):
            try:
                return request(retry.deadline - (time.monotonic() - started))
            except _network_errors(self.scheme) as error:
                complaint, final = _describe(error, retry)
            # A random share keeps many processes from trying again in the same moment; the
            # generators of the training stay untouched.
            pause = min(wait, retry.longest_wait) * random.SystemRandom().uniform(0.5, 1)
            wait *= 2
            too_late = pause + time.monotonic() - started > retry.deadline
            if final or attempt == retry.attempts or too_late:
                break
            time.sleep(pause)
        seconds = time.monotonic() - started
        tries = "" if attempt == 1 else f" ({attempt} attempts in {seconds:.1f} s)"
        remedy = "mend the server or the way to it, or copy the shards"
        raise DataError(f"{place}: {complaint}{tries}: {remedy}") from None


# Clients by (scheme, seconds a server may stall), shared by all readers of a process.
_clients: dict[tuple[str, float], Any] = {}
# A parent's clients in its child: never touched and never collected, since closing them here would
# take the parent's sockets out of the event queue that both processes share.
_left_alone: list[Any] = []
_clients_lock = threading.Lock()


def _after_fork() -> None:
    global _clients, _clients_lock
    _left_alone.append(_clients)
    _clients, _clients_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _client(scheme: str, stall: float) -> Any:
    """This process's fsspec file system."""
    with _clients_lock:
        if (scheme, stall) not in _clients:
            make = _s3_client if scheme == "s3" else _http_client
            _clients[scheme, stall] = make(scheme, stall)
        return _clients[scheme, stall]


def _http_client(scheme: str, stall: float) -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    async def guard(request: Any, send: Any) -> Any:
        # Every hop of a redirect comes through here. A server elsewhere may send us on to https
        # alone, and not to the services of this machine.
        target, host = request.url.scheme, request.url.host or ""
        if target != "https" and not (target == scheme == "http" and is_loopback(host)):
            complaint = f"the server sends us on to {target}://{host}, which is not allowed"
            raise BadResponse(complaint, final=True)
        response = await send(request)
        try:
            _check_head(response, request.headers.get("Range"))
        except BadResponse:
            response.close()
            raise
        return response

    session = {
        "middlewares": (guard,),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,  # an answer could unpack to any size
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall),
        "trust_env": scheme == "https",  # ~/.netrc and proxies are for servers elsewhere
    }
    return HTTPFileSystem(skip_instance_cache=True, client_kwargs=session)


def _check_head(response: Any, requested: str | None) -> None:
    """Raise BadResponse unless the head of an answer fits; its body has not been read yet.

    Args:
        response: aiohttp's.
        requested: the Range header of the request.
    """
    status, headers = response.status, response.headers
    if status in _REDIRECTS:
        return
    if status == 404:
        raise BadResponse("no such file on the server", final=True)
    if status not in (200, 206):
        reason = f"the server answers {status} {printable(response.reason or '')}".rstrip()
        raise BadResponse(reason, final=300 <= status < 400 or status in _FINAL_STATUS)
    length = headers.get("Content-Length", "")
    if not length.isdigit() or int(length) > _MOST_BYTES:
        raise BadResponse(f"the server announces {length or 'no number of'} bytes", final=True)
    if requested is None:
        return
    if status != 206:
        complaint = "the server ignores Range and sends the whole file; choose one that honours it"
        raise BadResponse(complaint, final=True)
    sent = headers.get("Content-Range", "no range")
    if sent.replace(" ", "").split("/")[0] != requested.replace("=", ""):
        raise BadResponse(f"the server sends {sent[:60]!r} for {requested}")


def _s3_client(scheme: str, stall: float) -> Any:
    import s3fs

    config = {
        "connect_timeout": stall,
        "read_timeout": stall,
        "retries": {"total_max_attempts": 1},  # attempts are counted here alone
    }
    endpoint_url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    client = s3fs.S3FileSystem(
        skip_instance_cache=True, endpoint_url=endpoint_url, config_kwargs=config
    )
    client.retries = 1
    client.connect()
    # A configuration file can name an endpoint too.
    endpoint = urlsplit(client.s3.meta.endpoint_url)
    host = endpoint.hostname or ""
    if endpoint.scheme != "https" and not (endpoint.scheme == "http" and is_loopback(host)):
        raise ValueError(f"AWS endpoint {endpoint.scheme}://{host}: not opened; {_ALLOWED}")
    return client


def _network_errors(scheme: str) -> tuple[type[BaseException], ...]:
    """What a request can raise because of a server or a network; our own mistakes are not among
    them."""
    import aiohttp

    errors = OSError, asyncio.TimeoutError, BadResponse, aiohttp.ClientError
    if scheme != "s3":
        return errors
    from botocore.exceptions import BotoCoreError, HTTPClientError

    return *errors, BotoCoreError, HTTPClientError


def _describe(error: BaseException, retry: RetryPolicy) -> tuple[str, bool]:
    """(what happened, whether another request is useless). Foreign messages are not shown: a signed
    address may be in them."""
    name = type(error).__name__
    if isinstance(error, BadResponse):
        return str(error), error.final
    if isinstance(error, FileNotFoundError):
        return "no such file on the server", True
    if isinstance(error, PermissionError) or name in (
        "NoCredentialsError",
        "PartialCredentialsError",
    ):
        return "the server wants credentials: see AWS_ACCESS_KEY_ID, AWS_PROFILE or ~/.aws", True
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the server's certificate is not trusted", True
    if isinstance(error, asyncio.TimeoutError) or "Timeout" in name:
        limits = f"nothing for {retry.stall:g} s, or not all in {retry.deadline:g} s"
        return f"the server stalls: {limits}", False
    if "Payload" in name or "IncompleteRead" in name or "ResponseStreaming" in name:
        return "the answer breaks off", False
    with contextlib.suppress(TypeError, ValueError):
        number = getattr(error, "errno", None)
        if number is not None and number > 0:
            return f"{os.strerror(number).lower()} ({name})", False
    return f"the connection fails ({name})", False
