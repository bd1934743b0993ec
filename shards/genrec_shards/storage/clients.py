"""This process's clients of web servers and S3: connections, redirects, heads of answers."""

import asyncio
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from genrec_shards.errors import printable
from genrec_shards.storage.address import ALLOWED, is_loopback

# A whole file is the manifest or lengths.npy; more than this is something else.
_MOST_BYTES = 1 << 30
_REDIRECTS = (301, 302, 303, 307, 308)
_FINAL_STATUS = {*range(400, 500)} - {408, 425, 429}


class BadResponse(Exception):
    """An answer that is not the bytes requested. `final`: another request would change nothing."""

    def __init__(self, complaint: str, final: bool = False) -> None:
        super().__init__(complaint)
        self.final = final


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


def client_of(scheme: str, stall: float) -> Any:
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
        raise ValueError(f"AWS endpoint {endpoint.scheme}://{host}: not opened; {ALLOWED}")
    return client


def network_errors(scheme: str) -> tuple[type[BaseException], ...]:
    """What a request can raise because of a server or a network; our own mistakes are not among
    them."""
    import aiohttp

    errors = OSError, asyncio.TimeoutError, BadResponse, aiohttp.ClientError
    if scheme != "s3":
        return errors
    from botocore.exceptions import BotoCoreError, HTTPClientError

    return *errors, BotoCoreError, HTTPClientError
