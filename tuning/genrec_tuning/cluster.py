"""Ray for a sweep: a quiet one of its own on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterator

from genrec_tuning.space import Resources

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes: trials exchange a few numbers an epoch, their data lie in shards."""


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[None]:
    """Ray while the block runs. `address`: of a running cluster, or None for one of our own, on loopback, that ends with it.

    Raises ValueError if the cluster cannot be reached, or has no node that a trial fits on.
    """
    _set_environment(own=address is None)
    import ray

    try:
        with _kept_handler(signal.SIGTERM):
            _start(address)
        check_fits(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Ray puts a handler of its own in place of the sweep's."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where Ray sets none
            signal.signal(number, before)


def _set_environment(own: bool) -> None:
    """Before Ray is imported, which reads it then."""
    # Each has the user's own value where there is one.
    if own and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # Of this cluster alone: nothing is left in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if own:
        # Ray takes loopback for this machine's outer address, and listens there and everywhere, unless it is told that this
        # machine belongs to no cluster. The switch is named after the systems where that is the default.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Signals are the sweep's, and trials stay where the driver is: paths mean the same there.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # A failed trial's last report has no score.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def _start(address: str | None) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"--address {address}: {' '.join(str(error).split())[:300]}") from None
        return
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=LOOPBACK,
    )
    (node,) = ray.nodes()
    if node["NodeManagerAddress"] != LOOPBACK:
        raise ValueError(
            f"Ray listens on {node['NodeManagerAddress']}: it was imported before the sweep could keep it on loopback; "
            "start the sweep in a process of its own, or give --address"
        )


def check_fits(resources: Resources, nodes: list[dict[str, float]]) -> None:
    """Ray would wait for a node that never comes. Raises ValueError naming what no node has."""
    if any(node.get("CPU", 0) >= resources.cpu and node.get("GPU", 0) >= resources.gpu for node in nodes):
        return
    have = "; ".join(f"cpu {node.get('CPU', 0):g}, gpu {node.get('GPU', 0):g}" for node in nodes)
    raise ValueError(
        f"resources_per_trial: cpu {resources.cpu:g}, gpu {resources.gpu:g}: no node has that much (there are: {have}); "
        "a trial lies on one node"
    )
