"""Responses in one write, with header lines that have been checked before.

uvicorn checks each name and value of a response head by a regular expression, and writes head and body in two
system calls and two packets. A response of the gateway has a dozen header fields, most of which are the same in all
responses.

This module holds all dependencies on uvicorn's internals for writing.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

_MAX_LINES = 1000
"""Lines in memory."""
_FOR_UVICORN = frozenset({b"connection", b"transfer-encoding"})
"""Fields that change the end of the body or of the connection."""


class _Lines(dict[tuple[bytes, bytes], bytes | None]):
    """Line of each header field that has been rendered; None for a field that uvicorn must handle."""

    def __missing__(self, field: tuple[bytes, bytes]) -> bytes | None:
        name, value = field
        line = None
        if not (
            name in _FOR_UVICORN or name != name.lower() or HEADER_RE.search(name) or HEADER_VALUE_RE.search(value)
        ):
            line = b"%b: %b\r\n" % field
        if name != b"x-request-id":  # differs in each response
            if len(self) >= _MAX_LINES:
                self.clear()
            self[field] = line
        return line


_lines = _Lines()


class ResponseCycle(RequestResponseCycle):
    """uvicorn's cycle of one request and its response.

    It keeps the head of a response with a Content-Length until the body arrives, and then writes both. uvicorn
    writes all other responses.
    """

    _start: Any = None
    """Message with the head of the response, until the message after it."""

    async def send(self, message: Any) -> None:
        if self._start is None and not self.response_started and message["type"] == "http.response.start":
            if any(name == b"content-length" for name, _ in message["headers"]):
                self._start = message
                self.response_started = True
                return
        elif self._start is not None:
            start, self._start = self._start, None
            if self._respond(start, message):
                return
            self.response_started = False
            await super().send(start)
        await super().send(message)

    def _respond(self, start: Any, message: Any) -> bool:
        """Write the whole response. Return False without a write for a response that needs uvicorn."""
        if (
            message["type"] != "http.response.body"
            or message.get("more_body", False)
            or not self.keep_alive
            or self.disconnected
            or self.flow.write_paused
            or self.scope["method"] == "HEAD"
        ):
            return False
        fields, body = [*self.default_headers, *start["headers"]], message.get("body", b"")
        if [value for name, value in fields if name == b"content-length"] != [b"%d" % len(body)]:
            return False
        lines = [_lines[field] for field in fields]
        if None in lines:
            return False
        self.transport.write(b"".join([STATUS_LINE[start["status"]], *lines, b"\r\n", body]))  # type: ignore[list-item]  # no None
        self.waiting_for_100_continue = False
        self.chunked_encoding = False
        self.response_complete = True
        self.message_event.set()
        self.on_response()
        return True
