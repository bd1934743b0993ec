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

from genrec_shards.storage.address import is_loopback

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
    """The module `ray`, connected. In a process that is connected already nothing is started and
    nothing ended.

    Args:
        address: of a running cluster; None: one of our own that ends with the block.
        option: what the user gives the address by.
        object_store_bytes: memory of our own cluster's object store.
        settings: environment variables that Ray reads when it is imported; the user's own stay.

    Raises:
        ValueError: one line: Ray is not installed, nobody answers, or Ray would listen elsewhere
            than on loopback.
    """
    own_machine = address is None or is_loopback(address.rpartition(":")[0].strip("[]"))
    _set_environment(address is None, own_machine, settings or {})
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("ray is not installed: pip install 'genrec-dist[tune]'") from None
    began = not ray.is_initialized()
    try:
        if began:
            before = signal.getsignal(signal.SIGTERM)
            try:
                _start(ray, address, option, object_store_bytes)
            finally:
                # Ray puts a handler of its own in place of ours; outside of the main thread it sets
                # none, and nor can we.
                with contextlib.suppress(ValueError):
                    signal.signal(signal.SIGTERM, before)
        yield ray
    finally:
        if began:
            ray.shutdown()


def _set_environment(own: bool, own_machine: bool, settings: Mapping[str, str]) -> None:
    """Before Ray is imported, which reads it then. Values of the user's own stay."""
    if (
        own
        and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token"
        and "RAY_AUTH_TOKEN_PATH" not in os.environ
    ):
        # Of this cluster alone: nothing is left in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if own_machine:
        # Or Ray listens on this machine's outer address, and looks there for a cluster on loopback.
        # The switch is named after the systems where that is the default.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name, value in (_QUIET | dict(settings)).items():
        os.environ.setdefault(name, value)


def _start(ray: Any, address: str | None, option: str, object_store_bytes: int | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        _probe(address, option)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{option} {address}: {' '.join(str(error).split())[:300]}") from None
        return
    limited = hasattr(os, "sched_getaffinity")
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)) if limited else os.cpu_count(),
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        _node_ip_address=LOOPBACK,
        **quiet,
    )
    addresses = [node["NodeManagerAddress"] for node in ray.nodes()]
    if outside := [found for found in addresses if found != LOOPBACK]:
        imported = "it was imported before it could be kept on loopback"
        remedy = f"use a process of its own, or {option}"
        raise ValueError(f"Ray listens on {outside[0]}: {imported}: {remedy}")


def _probe(address: str, option: str) -> None:
    """Raises ValueError where nobody answers; Ray itself would try for more than ten minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in address or not port.isdigit():
        raise ValueError(f"{option} {address[:80]}: give HOST:PORT of the cluster's head, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        remedy = "start a cluster there with `ray start --head`, or leave it out"
        raise ValueError(f"{option} {address}: nobody answers ({error}): {remedy}") from None
