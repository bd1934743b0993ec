"""An S3 server on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[Any, str]]:
    """A running server of moto, and its address."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server, "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def credentials(url: str) -> dict[str, str]:
    """The environment of who connects to it."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
