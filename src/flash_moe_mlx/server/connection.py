"""HTTP connections that clients can't hold open by sending nothing, sending slowly, or not reading.

uvicorn waits for a request's head indefinitely and does not bound the number of open connections. Each connection holds
a file descriptor, and reading experts needs file descriptors too.
"""

import asyncio
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 64
"""Size of the system's queue of connections that have not been accepted yet."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of a server's connections.

    Attributes:
        max_connections: Maximum number of open connections. Beyond it, the one that kept us waiting longest is closed.
        head_seconds: Time within which a request's line and headers must arrive.
        body_seconds: Time within which its body must arrive.
        write_seconds: Time for which a client may leave sent data unread.
    """

    max_connections: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 60.0

    def protocol(self) -> Any:
        """Return the class that uvicorn takes as ``http``, bound to these limits."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return partial(BoundedConnection, max(1, min(self.max_connections, descriptors // 2)), self)


class BoundedConnection(H11Protocol):
    """uvicorn's connection, closed if the client keeps it waiting."""

    def __init__(self, max_connections: int, limits: ConnectionLimits, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._max_connections = max_connections
        self._limits = limits
        self._stage: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.waiting_since = 0.0

    @property
    def waits_for_client(self) -> bool:
        """Whether no request can be answered without more data from the client."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self._max_connections:
            _make_room(self.connections).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_seconds, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def abort(self) -> None:
        """Close the connection immediately."""
        self._stop_timers()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        """Start the timer of the current stage; further bytes within a stage do not extend it."""
        stage = self.conn.their_state
        if stage is self._stage:
            return
        self._stage, self.waiting_since = stage, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.waits_for_client and not self.transport.is_closing():
            idle = stage is h11.IDLE
            seconds = self._limits.head_seconds if idle else self._limits.body_seconds
            self._timer = self.loop.call_later(seconds, self.abort)

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._write_timer = None


def _make_room(connections: Iterable[Any]) -> BoundedConnection:
    """Return the connection to close: the one waiting longest, preferring those that wait for their client."""
    return min(connections, key=lambda connection: (not connection.waits_for_client, connection.waiting_since))
