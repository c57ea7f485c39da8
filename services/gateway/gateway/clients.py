"""Clients that are slow, and clients that go away. uvicorn waits for a request, and for somebody to read its
response, as long as it takes; only between two requests of a connection it has a time limit."""

import asyncio

from gateway import malformed, metrics
from gateway.joining import JoiningTransport
from gateway.replies import leave

MAX_RECEIVED = 512 * 1024
"""Bytes of one request, with its head and the framing of its body: room for the largest body that is let through,
in chunks of one byte."""

_LOOKS = 4
_NONE = object()


class Protocol(malformed.Protocol):
    """Cuts a connection off that is late with its request (from connecting, or from its first byte, to its last) or
    with reading a response. It looks from time to time, so that a request in time costs next to nothing.
    """

    patience_sec = 30.0

    _whole: object = _NONE
    """The scope of the request that has come as a whole."""
    _received = 0
    """Of one that has not."""
    _late: object = None
    """What was waited for at the last look."""
    _looks = 0
    _timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # A transport in all but its class.
        super().connection_made(JoiningTransport(transport, self.loop))  # type: ignore[arg-type]
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._timer.cancel()
        if self.cycle is not None and not self.cycle.response_complete:
            leave(self.cycle.scope)  # type: ignore[arg-type]  # uvicorn has a type of its own for it

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.scope is self._whole or self._answered:
            self._received = 0
            return
        self._received += len(data)
        if self._received > MAX_RECEIVED:
            self._cut("request_too_large")

    def on_message_complete(self) -> None:
        self._whole = self.scope
        super().on_message_complete()

    @property
    def _answered(self) -> bool:
        """The newest request, perhaps before it has come as a whole: most routes never look at a body."""
        return self.cycle is not None and self.cycle.scope is self.scope and self.cycle.response_complete

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(self.patience_sec / _LOOKS, self._look)

    def _look(self) -> None:
        self._keep_alive()
        awaited = self._awaited()
        if awaited is None or awaited is not self._late:
            self._late, self._looks = awaited, 0
        else:
            self._looks += 1
        if self._looks < _LOOKS:
            self._look_later()
        else:
            self._cut("response_unread" if awaited is self.transport else "request_unfinished")

    def _awaited(self) -> object:
        """What the client owes us: the same object as long as it is the same thing, or None."""
        if self.transport.get_write_buffer_size() > 0:
            return self.transport
        return (self.scope or self) if self.scope is not self._whole else None

    def _keep_alive(self) -> None:
        """Where the rest of a request came after its response, uvicorn has forgotten its limit for idle ones."""
        if self._answered and self.scope is self._whole and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _cut(self, reason: str) -> None:
        metrics.SLOW_CLIENTS.labels(reason=reason).inc()
        self.transport.abort()


def protocol(patience_sec: float) -> type[Protocol]:
    """A class of its own: uvicorn makes the instances."""
    return type("Protocol", (Protocol,), {"patience_sec": patience_sec})
