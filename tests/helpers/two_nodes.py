"""Two Ray nodes on this machine, of as many cores each as the argument says, on loopback; they end
when standard input does."""

from __future__ import annotations

import os
import sys

# Before Ray is imported, which reads them then; what the caller has set stays.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_raylet_start_wait_time_s": "300",
} | dict(os.environ)

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    node = {"num_cpus": int(sys.argv[1]), "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
