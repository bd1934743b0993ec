"""Bytes of files behind an address: which addresses are allowed, requests of parts, and patience
with servers that fail."""

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
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from genrec_shards.errors import DataError

Result = TypeVar("Result")
# A drive's single letter is a path.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_ALLOWED = "allowed are https://, s3://, and http:// of this machine (127.0.0.1, [::1], localhost)"
# A whole file is the manifest or lengths.npy; more than this is something else.
_MOST_BYTES = 1 << 30
_FINAL_STATUS = {*range(400, 500)} - {408, 425, 429}


@dataclass(frozen=True)
class Patience:
    """How long a server may fail."""

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


class _Unfit(Exception):
    """An answer that is not the bytes asked for. `final`: asking again would change nothing."""

    def __init__(self, complaint: str, final: bool = False) -> None:
        super().__init__(complaint)
        self.final = final


def is_address(path: str | Path) -> bool:
    """Whether this is meant as an address, allowed or not. A directory of such a name is written
    `./name`."""
    return _SCHEME.match(str(path)) is not None or "://" in str(path)


def check_address(text: str) -> str:
    """The address without a slash at its end. Raises ValueError, which shows no password, for one
    that is not allowed."""
    shown = _without_secrets(text)
    if "::" in re.sub(r"\[[0-9a-fA-F:.]*\]", "", text):
        raise ValueError(f"{shown}: a chain of addresses is not opened; {_ALLOWED}")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{shown}: not an address ({error}); {_ALLOWED}") from None
    if parts.scheme not in ("https", "s3", "http"):
        raise ValueError(f"{shown}: {parts.scheme}: is not opened; {_ALLOWED}")
    if not host:
        raise ValueError(
            f"{shown}: names no server; write {parts.scheme}://SERVER/PATH, as text and not as a Path"
        )
    if "@" in parts.netloc:
        raise ValueError(
            f"{shown}: a password in an address ends up in every run's files; "
            "put it into ~/.netrc (https) or the AWS credentials (s3)"
        )
    if "?" in text or "#" in text or not text.isprintable() or any(map(str.isspace, text)):
        raise ValueError(
            f"{shown}: an address with ?, # or blanks is not opened; give that of the directory alone"
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(
            f"{shown}: http of another machine can be read and changed on its way; {_ALLOWED}"
        )
    if parts.scheme == "s3" and not _BUCKET.fullmatch(parts.netloc):
        raise ValueError(f"{shown}: {parts.netloc!r} is no bucket's name")
    return text.rstrip("/")


def is_loopback(host: str) -> bool:
    """Only names and numbers that need no server to be resolved: another's answer could change from
    call to call."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RemoteFiles:
    """The files below one address. It can be pickled and used after a fork: each process opens its
    own connections."""

    def __init__(self, address: str, patience: Patience) -> None:
        """Raises ValueError for an address that is not allowed, and where a package is missing."""
        self.address = check_address(address)
        self.patience = patience
        self.scheme = urlsplit(self.address).scheme
        _packages(self.scheme)

    def fetch(
        self,
        name: str,
        place: str,
        *,
        part: tuple[int, int] | None = None,
        sha256: str | None = None,
        count: Callable[[int], None],
    ) -> bytes:
        """The file's bytes, or those from `part[0]` to before `part[1]`, checked against `sha256`
        if there is one.

        `count` is told of every request, with the bytes it brought. Raises DataError naming `place`
        and what happened when patience is over."""

        def request(seconds: float) -> bytes:
            data = self._request(name, part, seconds)
            count(len(data))
            _check(data, part, sha256)
            return data

        return self._patiently(place, request, lambda: count(0))

    def size(self, name: str, place: str) -> int:
        """Bytes of a file. Raises DataError naming `place` when patience is over."""
        return self._patiently(place, lambda seconds: self._sync(self._size(name), seconds))

    def listed(self) -> list[tuple[str, int]]:
        """(name, bytes) of the files in this folder, of s3 alone: a web server has no common way to
        list."""

        async def ask() -> list[tuple[str, int]]:
            client = _client(self.scheme, self.patience.stall)
            try:
                entries = await client._ls(
                    self.address.removeprefix("s3://"), detail=True, refresh=True
                )
            except FileNotFoundError:
                return []
            folder = self.address.removeprefix("s3://") + "/"
            files = [(entry["name"], entry["size"]) for entry in entries if entry["type"] == "file"]
            return [
                (name.removeprefix(folder), size) for name, size in files if name.startswith(folder)
            ]

        return self._patiently(self.address, lambda seconds: self._sync(ask(), seconds))

    def put(self, name: str, file: Path) -> None:
        """Write a file below this address, in place of one that is there: s3 shows it whole or not
        at all."""

        async def ask() -> None:
            client = _client(self.scheme, self.patience.stall)
            await client._put_file(str(file), f"{self.address.removeprefix('s3://')}/{name}")

        self._patiently(f"{self.address}/{name}", lambda seconds: self._sync(ask(), seconds))

    def remove(self, name: str) -> None:
        """Remove a file below this address."""

        async def ask() -> None:
            await _client(self.scheme, self.patience.stall)._rm_file(
                f"{self.address.removeprefix('s3://')}/{name}"
            )

        self._patiently(f"{self.address}/{name}", lambda seconds: self._sync(ask(), seconds))

    def _sync(self, asked: Coroutine[Any, Any, Result], seconds: float) -> Result:
        from fsspec.asyn import sync

        async def ask() -> Result:
            return await asked

        return sync(_client(self.scheme, self.patience.stall).loop, ask, timeout=seconds)

    async def _size(self, name: str) -> int:
        client = _client(self.scheme, self.patience.stall)
        if self.scheme == "s3":
            found = await client._info(f"{self.address.removeprefix('s3://')}/{name}", refresh=True)
            if found["type"] != "file":
                raise FileNotFoundError(name)
            return int(found["size"])
        # A part is asked for, since the parts that follow need a server that honours Range.
        session = await client.set_session()
        address = client.encode_url(f"{self.address}/{name}")
        part = {"Range": "bytes=0-0"}
        async with session.get(
            address, headers=part, timeout=_aiohttp_timeout(self.patience.stall)
        ) as answer:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not total.isdigit():
            raise _Unfit(f"the server names no size ({total[:20]!r})", final=True)
        return int(total)

    def _patiently(
        self,
        place: str,
        request: Callable[[float], Result],
        failed: Callable[[], None] = lambda: None,
    ) -> Result:
        started, wait = time.monotonic(), self.patience.first_wait
        for attempt in range(1, self.patience.attempts + 1):
            left = self.patience.deadline - (time.monotonic() - started)
            try:
                return request(left)
            except _errors(self.scheme) as error:
                complaint, final = _told(error, self.patience)
                if not isinstance(error, _Unfit):
                    failed()
            # Chance keeps many processes from asking again in the same moment; the training's own
            # dice stay untouched.
            pause = min(wait, self.patience.longest_wait) * random.SystemRandom().uniform(0.5, 1)
            wait *= 2
            if (
                final
                or attempt == self.patience.attempts
                or pause + time.monotonic() - started > self.patience.deadline
            ):
                break
            time.sleep(pause)
        tries = (
            "" if attempt == 1 else f" ({attempt} attempts in {time.monotonic() - started:.1f} s)"
        )
        raise DataError(
            f"{place}: {complaint}{tries}: mend the server or the way to it, or copy the shards"
        ) from None

    def _request(self, name: str, part: tuple[int, int] | None, seconds: float) -> bytes:
        from fsspec.asyn import sync

        client = _client(self.scheme, self.patience.stall)
        start, end = part or (None, None)
        if self.scheme == "s3":
            # s3fs asks for the size of a whole file first, but not of one from 0 on.
            start = start or 0
            path, more = f"{self.address.removeprefix('s3://')}/{name}", {}
        else:
            path, more = (
                f"{self.address}/{name}",
                {"timeout": _aiohttp_timeout(self.patience.stall)},
            )
        data: bytes = sync(
            client.loop,
            partial(client._cat_file, path, start=start, end=end, **more),
            timeout=seconds,
        )
        return data


def _check(data: bytes, part: tuple[int, int] | None, sha256: str | None) -> None:
    if part is not None and len(data) != part[1] - part[0]:
        raise _Unfit(f"{len(data)} bytes came, expected {part[1] - part[0]}")
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise _Unfit(f"sha256 {found[:12]}, expected {sha256[:12]}")


def _without_secrets(text: str) -> str:
    """For messages: without a query, which may be a signature, without whatever may be a password,
    and on one line."""
    shown = re.sub(r"//.*@", "//***@", text.split("?")[0], flags=re.DOTALL)
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


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
            _clients[scheme, stall] = _s3_client(stall) if scheme == "s3" else _http_client(scheme)
        return _clients[scheme, stall]


def _http_client(scheme: str) -> Any:
    from fsspec.implementations.http import HTTPFileSystem

    async def guard(request: Any, send: Any) -> Any:
        # Every hop of a redirect comes through here.
        _check_hop(scheme, request.url.scheme, request.url.host or "")
        response = await send(request)
        try:
            _check_answer(response, request.headers.get("Range"))
        except _Unfit:
            response.close()
            raise
        return response

    session = {
        "middlewares": (guard,),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,
        # ~/.netrc and proxies are for servers elsewhere.
        "trust_env": scheme == "https",
    }
    return HTTPFileSystem(skip_instance_cache=True, client_kwargs=session)


def _check_hop(start: str, scheme: str, host: str) -> None:
    """A server elsewhere may send us on to https alone, and not to the services of this machine."""
    if scheme == "https" or (scheme == start == "http" and is_loopback(host)):
        return
    raise _Unfit(f"the server sends us on to {scheme}://{host}, which is not allowed", final=True)


def _check_answer(response: Any, asked: str | None) -> None:
    """Look at an answer's head, before any of its bytes are taken."""
    if 300 <= response.status < 400:
        if response.status not in (301, 302, 303, 307, 308):
            raise _Unfit(f"the server answers {response.status}", final=True)
        return
    if response.status == 404:
        raise _Unfit("no such file on the server", final=True)
    if response.status not in (200, 206):
        raise _Unfit(
            f"the server answers {response.status} {response.reason or ''}".rstrip(),
            response.status in _FINAL_STATUS,
        )
    length = response.headers.get("Content-Length", "")
    if not length.isdigit() or int(length) > _MOST_BYTES:
        raise _Unfit(f"the server announces {length or 'no number of'} bytes", final=True)
    if asked is None:
        return
    if response.status != 206:
        raise _Unfit(
            "the server ignores Range and sends the whole file; choose one that honours it",
            final=True,
        )
    if response.headers.get("Content-Range", "").replace(" ", "").split("/")[0] != asked.replace(
        "=", ""
    ):
        raise _Unfit(
            f"the server sends {response.headers.get('Content-Range', 'no range')[:60]!r} for {asked}"
        )


def _s3_client(stall: float) -> Any:
    import s3fs

    client = s3fs.S3FileSystem(
        skip_instance_cache=True,
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        # Attempts are counted here alone.
        config_kwargs={
            "connect_timeout": stall,
            "read_timeout": stall,
            "retries": {"total_max_attempts": 1},
        },
    )
    client.retries = 1
    client.connect()
    # A configuration file can name an endpoint too.
    endpoint = urlsplit(client.s3.meta.endpoint_url)
    if endpoint.scheme != "https" and not (
        endpoint.scheme == "http" and is_loopback(endpoint.hostname or "")
    ):
        raise ValueError(
            f"AWS endpoint {endpoint.scheme}://{endpoint.hostname}: not opened; {_ALLOWED}"
        )
    return client


def _aiohttp_timeout(stall: float) -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)


def _packages(scheme: str) -> None:
    try:
        if scheme == "s3":
            import s3fs  # noqa: F401
        else:
            import fsspec.implementations.http  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs a package ({error.name}): pip install 'genrec-dist[remote]'"
        ) from None


def _errors(scheme: str) -> tuple[type[BaseException], ...]:
    """What a request can raise because of a server or a network; mistakes of ours are not among
    them."""
    import aiohttp

    errors = OSError, asyncio.TimeoutError, _Unfit, aiohttp.ClientError
    if scheme != "s3":
        return errors
    from botocore.exceptions import BotoCoreError, HTTPClientError

    return *errors, BotoCoreError, HTTPClientError


def _told(error: BaseException, patience: Patience) -> tuple[str, bool]:
    """(what happened, whether asking again is useless). Foreign messages are not shown: a signed
    address may be in them."""
    name = type(error).__name__
    if isinstance(error, _Unfit):
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
        return (
            f"the server stalls: nothing for {patience.stall:g} s, or not all in {patience.deadline:g} s",
            False,
        )
    if "Payload" in name or "IncompleteRead" in name or "ResponseStreaming" in name:
        return "the answer breaks off", False
    with contextlib.suppress(TypeError, ValueError):
        number = getattr(error, "errno", None)
        if number is not None and number > 0:
            return f"{os.strerror(number).lower()} ({name})", False
    return f"the connection fails ({name})", False
