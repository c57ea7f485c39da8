"""The gateway's side of a connection: strict framing, limits for slow and numerous clients, one write per response.

uvicorn waits without a limit for a request and for a client that does not read its response. Only the time between
two requests of a connection is limited.
"""

import asyncio
from collections.abc import Callable

from gateway import metrics
from gateway.allocator_client import cancel_pending
from gateway.api import errors
from gateway.api.errors import ApiError
from gateway.web import request_middleware
from gateway.web.connection_limit import ConnectionLimit
from gateway.web.response_cycle import ResponseCycle
from sandbox_broker.runtime.uvicorn_protocol import Refusal, StrictProtocol, render_response

MAX_MESSAGE_BYTES = 512 * 1024
"""Longest message with its head and the framing of its body. The largest body that is accepted fits in, even in
chunks of one byte."""

TOO_MANY_CONNECTIONS = Refusal(
    429, "RATE_LIMITED", "Too many open connections from this address. Close some of them, then try again."
)
RETRY_CONNECTION_SEC = 5

_CHECKS = 4
"""Checks per time-out. Frequent checks of one timer cost less than a timer for each request."""
_NO_SCOPE = object()


class BrokerProtocol(StrictProtocol):
    """One connection to the gateway.

    The gateway cuts it when the client needs longer than `client_timeout_sec` for a request (from connecting, or
    from the request's first byte, to its last) or for reading a response. It refuses it with 429 when the client's
    address has too many connections.
    """

    client_timeout_sec = 30.0
    connection_limit: ConnectionLimit | None = None

    _complete_scope: object = _NO_SCOPE
    """The scope of the newest request that has arrived completely."""
    _received_bytes = 0
    """Of a message that is not complete."""
    _awaited_at_last_check: object = None
    _checks_without_progress = 0
    _timer: asyncio.TimerHandle
    _release_connection: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._schedule_check()
        if self.connection_limit is not None and self.client is not None:
            self._release_connection = self.connection_limit.acquire(self.client[0])
            if self._release_connection is None:
                metrics.SLOW_CLIENTS.labels(reason="too_many_connections").inc()
                self.refuse(TOO_MANY_CONNECTIONS, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._timer.cancel()
        if self._release_connection is not None:
            self._release_connection()
        if self.cycle is not None and not self.cycle.response_complete:
            cancel_pending(self.cycle.scope)  # type: ignore[arg-type]  # uvicorn has a type of its own for it

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.scope is self._complete_scope or self._is_answered:
            self._received_bytes = 0
            return
        self._received_bytes += len(data)
        if self._received_bytes > MAX_MESSAGE_BYTES:
            self._cut("request_too_large")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if not self._upgrade_offered:
            # uvicorn makes the instance itself, and has just scheduled its task.
            self.cycle.__class__ = ResponseCycle

    def on_message_complete(self) -> None:
        self._complete_scope = self.scope
        super().on_message_complete()

    @property
    def _is_answered(self) -> bool:
        """The newest request has its response, perhaps before its body arrived: most routes read no body."""
        return self.cycle is not None and self.cycle.scope is self.scope and self.cycle.response_complete

    def _schedule_check(self) -> None:
        self._timer = self.loop.call_later(self.client_timeout_sec / _CHECKS, self._check_progress)

    def _check_progress(self) -> None:
        self._start_keep_alive_timeout()
        awaited = self._find_awaited()
        if awaited is None or awaited is not self._awaited_at_last_check:
            self._awaited_at_last_check, self._checks_without_progress = awaited, 0
        else:
            self._checks_without_progress += 1
        if self._checks_without_progress < _CHECKS:
            self._schedule_check()
        else:
            self._cut("response_unread" if awaited is self.transport else "request_unfinished")

    def _find_awaited(self) -> object:
        """Return an object that identifies the pending action of the client; None if no action is pending."""
        if self.transport.get_write_buffer_size() > 0:
            return self.transport
        return (self.scope or self) if self.scope is not self._complete_scope else None

    def _start_keep_alive_timeout(self) -> None:
        """Limit the idle time again. uvicorn forgets to when the end of a request arrives after its response."""
        if self._is_answered and self.scope is self._complete_scope and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _cut(self, reason: str) -> None:
        metrics.SLOW_CLIENTS.labels(reason=reason).inc()
        self.transport.abort()

    def render_refusal(self, refusal: Refusal, request_id: str) -> bytes:
        retry_after = RETRY_CONNECTION_SEC if refusal is TOO_MANY_CONNECTIONS else None
        error = ApiError(refusal.code, refusal.message, retry_after=retry_after)
        response = errors.build_response(error, {"request_id": request_id})
        headers = [
            *response.raw_headers,
            (b"x-request-id", request_id.encode()),
            *request_middleware.SECURITY_HEADERS,
            request_middleware.NO_STORE,
        ]
        return render_response(refusal.status, headers, bytes(response.body))


def build_protocol(client_timeout_sec: float, connection_limit: ConnectionLimit | None) -> type[BrokerProtocol]:
    """Return a subclass with these limits, because uvicorn makes the instances itself."""
    limits = {"client_timeout_sec": client_timeout_sec, "connection_limit": connection_limit}
    return type("BrokerProtocol", (BrokerProtocol,), limits)
