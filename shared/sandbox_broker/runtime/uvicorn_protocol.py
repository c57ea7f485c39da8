"""HTTP/1.1 protocol of every service: uvicorn's protocol with strict message framing.

If a proxy and a server disagree on the end of a request, an attacker can mix up the requests of two clients
(request smuggling). Therefore each message here has exactly one possible end, or the connection closes:

- Upgrade offers are ignored. httptools skips the body of a request with an upgrade offer, so uvicorn would parse
  the body as the next request.
- No Host or two Hosts in HTTP/1.1, any Transfer-Encoding but exactly one `chunked`, CONNECT, and versions other
  than 1.0 and 1.1 are refused. llhttp, the parser, refuses further forms by itself: two Content-Lengths,
  Content-Length beside Transfer-Encoding, folded fields, bare CR or LF, spaces before a colon.
- Trailer fields are dropped, because uvicorn would add them to the header fields of the request.
- After a request that closes the connection, no further byte is parsed.

This module holds all dependencies on uvicorn's and httptools' internals for reading.
"""

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 16 * 1024
"""Maximum size of a request head: the request line and all header fields."""
MAX_HEAD_FIELDS = 100
MAX_LOGGED = 200
"""Maximum length, in characters, of the parser error in the log. The error can quote a whole request target."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Response to a message refused before the application."""

    status: int
    code: str
    message: str


MALFORMED = Refusal(
    400,
    "MALFORMED_REQUEST",
    "This is not valid HTTP/1.1, or its end is ambiguous. Check the client, or the proxy before this service.",
)
HEAD_TOO_LARGE = Refusal(
    431,
    "HEADERS_TOO_LARGE",
    f"The request line and the header fields may have {MAX_HEAD_BYTES} bytes and {MAX_HEAD_FIELDS} fields. "
    "Send fewer or shorter header fields.",
)


class _RefusedError(Exception):
    """Raised in a parser callback. httptools keeps it as the context of its own error."""

    def __init__(self, refusal: Refusal, problem: str) -> None:
        super().__init__(problem)
        self.refusal = refusal


class _DiscardedFields(list[tuple[bytes, bytes]]):
    """List that drops the trailer fields of a chunked body."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        pass


_DISCARDED_FIELDS = _DiscardedFields()


class StrictProtocol(HttpToolsProtocol):
    """Protocol of one connection. Subclasses may override `render_refusal`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # uvicorn's default parser continues after a request that closes the connection. This parser stops.
        self.parser = httptools.HttpRequestParser(self)
        self._message_complete = True
        self._upgrade_offered = False
        self._stopped = False
        """True when no more bytes are read from this connection."""
        self._running: RequestResponseCycle | None = None
        """Request that the application handles. Pipelined requests wait in `self.pipeline`."""
        self._pending_bytes = 0
        """Bytes of earlier slices since the parser last reported a new message or body data."""

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        # In slices, because httptools buffers an unfinished header field without a limit.
        while data and not (self._stopped or self.transport.is_closing()):
            self._feed(data[:MAX_HEAD_BYTES])
            data = data[MAX_HEAD_BYTES:]

    def _feed(self, data: bytes) -> None:
        """Parse at most MAX_HEAD_BYTES bytes."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                # This parser has skipped the body. A new one gets the same head without the offer.
                data = self._render_head_without_upgrade() + data[offer.args[0] :]
                self._upgrade_offered = False
                self.parser = httptools.HttpRequestParser(self)
                continue
            except httptools.HttpParserError as error:
                cause = error.__context__
                refusal = cause.refusal if isinstance(cause, _RefusedError) else MALFORMED
                self.refuse(refusal, str(cause or error))
                return
            self._pending_bytes += len(data)
            if self._pending_bytes > 2 * MAX_HEAD_BYTES:
                self.refuse(HEAD_TOO_LARGE, "the head or a trailer does not end")
            return

    def on_message_begin(self) -> None:
        self._message_complete = False
        self._pending_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._check_head()
        if self._upgrade_offered:
            return
        super().on_headers_complete()
        self.headers = _DISCARDED_FIELDS

    def on_body(self, body: bytes) -> None:
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_offered:
            return
        self._message_complete = True
        self._pending_bytes = 0
        super().on_message_complete()
        if not self.parser.should_keep_alive():
            # Usually known from the head. A trailer `Connection: close` is known only here. Without this, the next
            # request on the connection would be refused.
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()

    def _check_head(self) -> None:
        """Raise _RefusedError if the head is too large, or the end of its message is ambiguous."""
        if len(self.headers) > MAX_HEAD_FIELDS:
            raise _RefusedError(HEAD_TOO_LARGE, "too many header fields")
        # Only a head that needed several slices can be too large.
        if self._pending_bytes and self._count_head_bytes() > MAX_HEAD_BYTES:
            raise _RefusedError(HEAD_TOO_LARGE, "the head is too long")
        names = [name for name, _ in self.headers]
        hosts, encodings = names.count(b"host"), names.count(b"transfer-encoding")
        if encodings and any(
            name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers
        ):
            raise _RefusedError(MALFORMED, "Transfer-Encoding is not chunked")
        version = self.parser.get_http_version()
        if version == "1.1":
            if hosts != 1 or encodings > 1:
                raise _RefusedError(MALFORMED, f"{hosts} Host and {encodings} Transfer-Encoding fields")
        elif version != "1.0" or hosts > 1 or encodings:
            # HTTP/1.0 has no Transfer-Encoding (RFC 9112, 6.1), and health checks over HTTP/1.0 send no Host.
            raise _RefusedError(MALFORMED, f"HTTP/{version}, {hosts} Host and {encodings} Transfer-Encoding fields")
        else:
            self.expect_100_continue = False  # because an HTTP/1.0 client reads "100 Continue" as final
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _RefusedError(MALFORMED, "CONNECT")
            self._upgrade_offered = True

    def _count_head_bytes(self) -> int:
        request_line = len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1\r\n")
        return request_line + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers) + 2

    def _render_head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def refuse(self, refusal: Refusal, problem: str) -> None:
        """Stop reading, and answer the current message with `refusal`. If an earlier request still waits for its
        response, close the connection after that response instead, because the client would mix up the two."""
        self._stopped = True
        if self.transport.is_closing():
            return
        rejected = None if self._message_complete else self._cycle_of_message()
        if rejected is not None and self.pipeline and self.pipeline[0][0] is rejected:
            self.pipeline.popleft()
        earlier = self.pipeline[0][0] if self.pipeline else self._running
        if earlier is not None and earlier is not rejected and not earlier.response_complete:
            earlier.keep_alive = False
            return
        if rejected is not None:
            answered = rejected.response_started
            rejected.disconnected = True  # the application's response is dropped
            rejected.message_event.set()
            if answered:
                self.transport.close()
                return
        request_id = str(uuid.uuid4())
        # A warning, because the log rate limit applies to warnings.
        log.warning("request.malformed", request_id=request_id, problem=problem[:MAX_LOGGED])
        self.transport.write(self.render_refusal(refusal, request_id))
        self.transport.close()

    def _cycle_of_message(self) -> RequestResponseCycle | None:
        """Return the request whose body is being read. None while a head is being read."""
        return self.cycle if self.cycle is not None and self.cycle.scope is self.scope else None

    def render_refusal(self, refusal: Refusal, request_id: str) -> bytes:
        """Return the response, head and body."""
        detail = {"code": refusal.code, "message": refusal.message, "request_id": request_id}
        body = json.dumps({"detail": detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        return render_response(refusal.status, headers, body)


def render_response(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """Return a response that closes the connection. `headers` must have Content-Type and Content-Length."""
    fields = b"".join(b"%b: %b\r\n" % field for field in headers)
    return STATUS_LINE[status] + fields + b"connection: close\r\n\r\n" + body
