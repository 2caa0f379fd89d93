"""Bounds in the process that listens, before Ray Serve sees a request: connections and headers.

Ray Serve calls `bounds` in its HTTP proxy, because `serve.running` names it in the environment. The
parser that it takes otherwise, httptools, keeps headers of any length and waits for them forever.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

import h11
import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1024
HEADER_SECONDS = 10.0
# Requests may not steer Ray Serve: its timeouts, its choice of a replica, its cancelling.
STEERING = frozenset((
    b"serve-multiplexed-model-id", b"x-session-id", b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
))  # fmt: skip
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

RawHeaders = list[tuple[bytes, bytes]]


def bounds() -> list[Middleware]:
    """Put the bounded protocol in place, and return what cleans the headers."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return [Middleware(CleanHeaders)]


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose headers have to arrive soon, on a bounded number of connections.

    h11 itself refuses headers above 64 KiB. A connection beyond the last one is closed.
    """

    max_connections = MAX_CONNECTIONS
    header_seconds = HEADER_SECONDS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, a part of which may be here already."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Close the connection later unless the headers that it has begun are whole by then."""
        if self.conn.their_state is not h11.IDLE:
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class CleanHeaders:
    """ASGI middleware: no header of a request steers Ray Serve, or reaches its log as it came."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with its headers cleaned."""
        if "headers" in scope:
            scope["headers"] = clean(scope["headers"])
        await self.app(scope, receive, send)


def clean(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """`headers` without those that steer Ray Serve, and without an X-Request-Id that is no id."""
    return [(name, value) for name, value in headers if _harmless(name, value)]


def _harmless(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    if name == b"x-request-id":
        return REQUEST_ID.fullmatch(value) is not None
    return name not in STEERING
