"""A connection to the server whose client has to send the head of each request in time."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's, which would wait for ever for a client that sends a header line now and then."""

    def __init__(self, *, head_seconds: float, **given: Any):
        """`head_seconds`: from a connection, or a request's first byte, to the end of its head."""
        super().__init__(**given)
        self._head_seconds = head_seconds
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the limit run while a head is not whole. Between two requests, when nothing of the
        next has come, uvicorn's limit of an idle connection runs in its place."""
        has_begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if self.conn.their_state is not h11.IDLE or not has_begun:
            self._unwatch()
        elif self._limit is None:
            self._limit = self.loop.call_later(self._head_seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
