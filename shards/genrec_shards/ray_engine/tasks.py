"""Ray for a log: functions as tasks, and what they raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from genrec_shards.ray_engine.session import started

MOST_RETRIES = 3
"""Of a task whose worker is lost: it gives the same again, so nothing comes twice."""

Result = TypeVar("Result")


class Tasks:
    """Functions run by Ray's workers; results stay where they were made until they are asked
    for."""

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
        RuntimeError in one line."""
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
    """Ray while the block runs. `address`: of a running cluster, or None for one of our own, on
    loopback, that ends with it.

    Raises ValueError, one line, where Ray is not installed or nobody answers.
    """
    with started(address, "--ray-address") as ray:
        yield Tasks(ray)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def cancel(tasks: Tasks, references: Sequence[Any]) -> None:
    """Let go of tasks that nobody waits for any more; a cluster that is not ours goes on without
    them."""
    for reference in references:
        with contextlib.suppress(Exception):
            tasks.ray.cancel(reference, force=False)
