"""The socket of a server."""

from __future__ import annotations

import socket


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before torch is loaded. Raises ValueError where the address cannot be
    had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"{host} port {port}: {reason}: choose others with --host and --port"
        ) from None
    # Connections inherit it. An answer's body would otherwise wait 40 ms for the client's word that
    # its head has come: asyncio sees to that only of sockets that it makes.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
