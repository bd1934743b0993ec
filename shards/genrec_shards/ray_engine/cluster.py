"""Ray for a log: a quiet one of its own on this machine, or a cluster that runs already; tasks, and what they raise."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from genrec_shards.remote import is_loopback

LOOPBACK = "127.0.0.1"
PROBE_SECONDS = 5.0
MOST_RETRIES = 3
"""Of a task whose worker is lost: it gives the same again, so nothing comes twice."""

Result = TypeVar("Result")


class Tasks:
    """Functions run by Ray's workers; results stay where they were made until they are asked for."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.num_cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._remote: dict[tuple[Callable[..., Any], int], Any] = {}

    def start(self, function: Callable[..., Any], *arguments: Any, parts: int = 1) -> Any:
        """A reference to what the function will give, or `parts` of them; arguments that are references are waited for."""
        if (function, parts) not in self._remote:
            self._remote[function, parts] = self.ray.remote(function).options(
                num_cpus=1, num_returns=parts, max_retries=MOST_RETRIES, scheduling_strategy="SPREAD"
            )
        return self._remote[function, parts].remote(*arguments)

    def get(self, reference: Any) -> Any:
        """The value. Raises what the function raised where that is the user's to mend, else RuntimeError in one line."""
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ValueError | OSError):
                raise cause from None
            raise ValueError(f"Ray: a task failed: {_last_line(error)}") from None
        except exceptions.RayError as error:
            raise ValueError(
                f"Ray: a worker or a node was lost and {MOST_RETRIES} retries did not help ({type(error).__name__}): "
                "give the nodes more memory or disk, and run it again"
            ) from None

    def put(self, value: Any) -> Any:
        """A reference that many tasks may be given."""
        return self.ray.put(value)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Tasks]:
    """Ray while the block runs. `address`: of a running cluster, or None for one of our own, on loopback, that ends with it.

    Raises ValueError, one line, where Ray is not installed or nobody answers.
    """
    _set_environment(own=address is None, inside=address is None or _is_loopback(address))
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("--engine ray: ray is not installed: pip install 'genrec-dist[tune]'") from None
    began = not ray.is_initialized()
    if began:
        with _kept_handler(signal.SIGTERM):
            _start(ray, address)
    try:
        yield Tasks(ray)
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


def _set_environment(own: bool, inside: bool) -> None:
    """Before Ray is imported, which reads it then. `inside`: is all of it on loopback? Values of the user's own stay."""
    if own and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if inside:
        # Or Ray listens on this machine's outer address, and looks there for a cluster on loopback. The switch is named after
        # the systems where that is the default.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _start(ray: Any, address: str | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is not None:
        _probe(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"--ray-address {address}: {' '.join(str(error).split())[:300]}") from None
        return
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=LOOPBACK,
    )
    if any(node["NodeManagerAddress"] != LOOPBACK for node in ray.nodes()):
        ray.shutdown()
        raise ValueError(
            "Ray was imported before it could be kept on loopback: use a process of its own, or --ray-address"
        )


def _probe(address: str) -> None:
    """Ray asks an address that nobody answers for more than ten minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or "/" in address or not port.isdigit():
        raise ValueError(f"--ray-address {address[:80]}: give HOST:PORT of the cluster's head, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--ray-address {address}: nobody answers ({error}): start a cluster there with `ray start --head`, or leave it out"
        ) from None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def cancel(tasks: Tasks, references: Sequence[Any]) -> None:
    """Let go of tasks that nobody waits for any more; a cluster that is not ours goes on without them."""
    for reference in references:
        with contextlib.suppress(Exception):
            tasks.ray.cancel(reference, force=False)
