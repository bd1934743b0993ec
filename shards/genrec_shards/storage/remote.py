"""Files at an address: requests of byte ranges, checked and tried again."""

import asyncio
import contextlib
import hashlib
import os
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from genrec_shards.errors import DataError
from genrec_shards.storage.address import check_address
from genrec_shards.storage.clients import BadResponse, client_of, network_errors

Result = TypeVar("Result")


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
        return client_of(self.scheme, self.retry.stall)

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
        complaint = ""
        for attempt in range(1, retry.attempts + 1):
            try:
                return request(retry.deadline - (time.monotonic() - started))
            except network_errors(self.scheme) as error:
                found, final = _describe(error, retry)
            # A request that the deadline cuts off says less than those that failed by themselves.
            if not complaint or time.monotonic() - started < retry.deadline:
                complaint = found
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
