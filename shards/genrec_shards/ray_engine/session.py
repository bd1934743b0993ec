"""Ray while a block runs: a quiet one of its own on this machine, on loopback alone, or a cluster
that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from genrec_shards.storage.remote import is_loopback

LOOPBACK = "127.0.0.1"
PROBE_SECONDS = 5.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextlib.contextmanager
def started(
    address: str | None,
    option: str,
    *,
    object_store_bytes: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """The module `ray`, connected. `address`: of a running cluster, or None for one of our own that
    ends with the block.

    `option`: what the user gives the address by; `settings`: environment variables that Ray reads
    when it is imported, where the user has none of her own. In a process that is connected already
    nothing is started and nothing ended. Raises ValueError, one line, where Ray is not installed,
    nobody answers, or Ray would listen elsewhere than on loopback."""
    _set_environment(
        own=address is None,
        inside=address is None or _is_loopback(address),
        settings=settings or {},
    )
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("ray is not installed: pip install 'genrec-dist[tune]'") from None
    began = not ray.is_initialized()
    try:
        if began:
            with _kept_handler(signal.SIGTERM):
                _start(ray, address, option, object_store_bytes)
        yield ray
    finally:
        if began:
            ray.shutdown()


@contextlib.contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Ray puts a handler of its own in place of ours."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where Ray sets none
            signal.signal(number, before)


def _is_loopback(address: str) -> bool:
    return is_loopback(address.rpartition(":")[0].strip("[]"))


def _set_environment(own: bool, inside: bool, settings: Mapping[str, str]) -> None:
    """Before Ray is imported, which reads it then. `inside`: is all of it on loopback? Values of
    the user's own stay."""
    if (
        own
        and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token"
        and "RAY_AUTH_TOKEN_PATH" not in os.environ
    ):
        # Of this cluster alone: nothing is left in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if inside:
        # Or Ray listens on this machine's outer address, and looks there for a cluster on loopback.
        # The switch is named after the systems where that is the default.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name, value in (_QUIET | dict(settings)).items():
        os.environ.setdefault(name, value)


def _start(ray: Any, address: str | None, option: str, object_store_bytes: int | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is not None:
        _probe(address, option)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{option} {address}: {' '.join(str(error).split())[:300]}") from None
        return
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=LOOPBACK,
    )
    outside = [
        node["NodeManagerAddress"] for node in ray.nodes() if node["NodeManagerAddress"] != LOOPBACK
    ]
    if outside:
        raise ValueError(
            f"Ray listens on {outside[0]}: it was imported before it could be kept on loopback: use a "
            f"process of its own, or {option}"
        )


def _probe(address: str, option: str) -> None:
    """Ray asks an address that nobody answers for more than ten minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in address or not port.isdigit():
        raise ValueError(f"{option} {address[:80]}: give HOST:PORT of the cluster's head, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{option} {address}: nobody answers ({error}): start a cluster there with `ray start --head`, or leave it out"
        ) from None
