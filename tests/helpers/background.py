"""Calls in threads of their own whose fate a test can ask for; one that is stranded fails the test
and does not hold it up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

PATIENCE = 60
"""Seconds after which a thread counts as stranded."""


def spawn(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """The coming result of a call, or its error, KeyboardInterrupt included. (The threads of a pool
    would be waited for.)"""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
