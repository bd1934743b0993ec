"""How many threads a process computes with on a CPU, and how they wait for each other."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def set_thread_defaults(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the environment of OpenMP where the user has not: to be called before torch is imported.

    Waiting threads sleep. By default they spin, and where other work shares the cores, a step then
    takes ten times as long or more (docs/log.md). Torch's own number of threads, that of the cores,
    stays unless this process may use less of them: a container is often given a share of a large
    machine's time. Neither depends on the load, so that a resumed run computes the same bits."""
    environment = os.environ if environment is None else environment
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys():
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in environment:
        threads = max(1, math.floor(quota))
        if threads < num_cores():
            environment["OMP_NUM_THREADS"] = str(threads)


def num_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """The cores' worth of time that a container's control group grants; None for no limit.

    `cgroup`: where the groups are mounted; a container sees its own there, of version 2
    (`cpu.max`: "200000 100000" is two cores) or 1."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((cgroup / "cpu" / name).read_text().strip() for name in names)
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def describe_threads(threads: int) -> str:
    """How this process computes, in words; `threads`: torch's number of them."""
    quota, source = cpu_quota(), "torch's choice"
    if "OMP_NUM_THREADS" in os.environ:
        source = "OMP_NUM_THREADS"
    cores = f"{num_cores()} cores" + ("" if quota is None else f", of their time {quota:g}")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    waits = "sleep" if policy.upper() == "PASSIVE" else "spin"
    return f"{threads} ({source}) on {cores}; they {waits} while they wait (OMP_WAIT_POLICY)"
