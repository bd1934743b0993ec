"""Ray for a sweep: a quiet one of its own on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from genrec_shards.ray_engine.session import started

from genrec_tuning.space import Resources

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Signals are the sweep's, and trials stay where the driver is: paths mean the same there.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A failed trial's last report has no score.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes: trials exchange a few numbers an epoch, their data lie in shards."""


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[None]:
    """Ray while the block runs. `address`: of a running cluster, or None for one of our own, on loopback, that ends with it.

    Raises ValueError if the cluster cannot be reached, or has no node that a trial fits on.
    """
    with started(address, "--address", object_store_bytes=OBJECT_STORE_BYTES, settings=SETTINGS) as ray:
        check_fits(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield


def check_fits(resources: Resources, nodes: list[dict[str, float]]) -> None:
    """Ray would wait for a node that never comes. Raises ValueError naming what no node has."""
    if any(node.get("CPU", 0) >= resources.cpu and node.get("GPU", 0) >= resources.gpu for node in nodes):
        return
    have = "; ".join(f"cpu {node.get('CPU', 0):g}, gpu {node.get('GPU', 0):g}" for node in nodes)
    raise ValueError(
        f"resources_per_trial: cpu {resources.cpu:g}, gpu {resources.gpu:g}: no node has that much (there are: {have}); "
        "a trial lies on one node"
    )
