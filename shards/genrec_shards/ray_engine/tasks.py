"""Functions as tasks of Ray, and what they raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from genrec_shards.ray_engine.session import started

MOST_RETRIES = 3
"""Of a task whose worker is lost: it gives the same again, so nothing comes twice."""


class Tasks:
    """Functions run by Ray's workers; results stay where they were made until `get`."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.num_cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._remote: dict[tuple[Callable[..., Any], int], Any] = {}

    def start(self, function: Callable[..., Any], *arguments: Any, parts: int = 1) -> Any:
        """A reference to what the function will give, or `parts` of them; arguments that are
        references are waited for."""
        if (function, parts) not in self._remote:
            self._remote[function, parts] = self.ray.remote(function).options(
                num_cpus=1,
                num_returns=parts,
                max_retries=MOST_RETRIES,
                scheduling_strategy="SPREAD",
            )
        return self._remote[function, parts].remote(*arguments)

    def get(self, reference: Any) -> Any:
        """The value. Raises what the function raised where that is the user's to mend, else
        ValueError in one line."""
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from None
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            last = lines[-1][:300] if lines else type(error).__name__
            raise ValueError(f"Ray: a task failed: {last}") from None
        except exceptions.RayError as error:
            lost = f"a worker or a node was lost and {MOST_RETRIES} retries did not help"
            remedy = "give the nodes more memory or disk, and run it again"
            raise ValueError(f"Ray: {lost} ({type(error).__name__}): {remedy}") from None

    def put(self, value: Any) -> Any:
        """A reference that many tasks may be given."""
        return self.ray.put(value)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Tasks]:
    """Ray while the block runs. `address`: of a running cluster, or None for one of our own, on
    loopback, that ends with it.

    Raises ValueError, one line, where Ray is not installed or nobody answers.
    """
    with started(address, "--ray-address") as ray:
        yield Tasks(ray)
