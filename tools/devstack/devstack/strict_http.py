"""Reference reader for request framing: h11 decides which requests a byte stream contains, and this module decides
whether a server has treated the stream safely. For tests against request smuggling."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import zip_longest
from urllib.parse import urlsplit

import h11

MAX_HEAD_BYTES = 16 * 1024
MAX_FIELDS = 100
EARLY = b"/early"
"""Prefix of the targets that answer without reading the body."""

HOP_BY_HOP = frozenset([b"connection", b"http2-settings", b"upgrade"])
"""Fields of the connection. A server that ignores an upgrade offer may drop them."""

_TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(
    rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) /[-A-Za-z0-9._~%!$&'()*+,;=:@/?]* HTTP/1\.[01]"
)
_LENIENT_REQUEST_LINE = re.compile(rb"\A([A-Z_-]+) +([!-~]+) +(?:HTTP|RTSP|ICE)/(1\.[01])(?=\r\n)")
"""llhttp accepts repeated spaces (RFC 9112, 3, allows it) and two more protocol names, and does not report them.
Neither moves the end of a message."""
_ENCODING_WITH_SPACE = re.compile(rb"transfer-encoding:.*[ \t]\Z", re.IGNORECASE)
_FIELD_LINE = re.compile(_TOKEN + rb":[ \t]*[\t\x20-\x7e\x80-\xff]*")
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(;%b(=(%b|\"[ !#-\[\]-~]*\"))?)*" % (_TOKEN, _TOKEN))
_UNSAFE_TRAILER = re.compile(rb"connection|content-length|host|te|trailer|transfer-encoding|upgrade", re.IGNORECASE)


class Verdict(Enum):
    SERVE = auto()
    MAY_REFUSE = auto()
    """Valid for h11, but RFC 9110 or RFC 9112 lets a server refuse it."""
    REFUSE = auto()
    """Valid for h11, but refused by the rules of this project."""


class Ending(Enum):
    OPEN = auto()
    """All bytes belong to complete requests. The connection stays open."""
    CLOSED = auto()
    """A request ends the connection. Bytes after it belong to no request."""
    INCOMPLETE = auto()
    """The last request, or its head, has not arrived as a whole."""
    ILLEGAL = auto()
    """The bytes after the last complete request are no HTTP request."""


@dataclass(frozen=True, slots=True)
class Request:
    method: bytes
    target: bytes
    """In origin form: path and query."""
    fields: tuple[tuple[bytes, bytes], ...] = ()
    """Header fields without HOP_BY_HOP, sorted. Names are in lower case."""
    body: bytes | None = None
    """None where the handler does not read it."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    request: Request
    verdict: Verdict
    complete: bool
    """The whole body is there."""
    expects_continue: bool

    @property
    def is_answerable(self) -> bool:
        return self.complete or self.request.target.startswith(EARLY)


@dataclass(frozen=True, slots=True)
class Reading:
    """The requests of a byte stream, in order, and the state of the connection after the last byte."""

    requests: tuple[ReadRequest, ...]
    ending: Ending
    partial_head: bool = False
    """The stream ends within a head, or in bytes that are no head."""

    @property
    def answerable(self) -> int:
        """Number of responses that a server sends if it refuses no request."""
        return sum(read.is_answerable for read in self.requests)


def read_requests(stream: bytes) -> Reading:
    requests: list[ReadRequest] = []
    rest = stream
    while True:
        # A server ignores empty lines before a request line (RFC 9112, 2.2). h11 does not.
        received = rest.lstrip(b"\r\n")
        rest = _LENIENT_REQUEST_LINE.sub(rb"\1 \2 HTTP/\3", received, count=1)
        if not rest:
            return Reading(tuple(requests), Ending.OPEN)
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(rest)
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return Reading(tuple(requests), Ending.ILLEGAL, partial_head=True)
        if event is h11.NEED_DATA:
            return Reading(tuple(requests), Ending.INCOMPLETE, partial_head=True)
        assert isinstance(event, h11.Request)
        head = rest[: _head_length(rest)]
        body = bytearray()
        ending = None
        try:
            while not isinstance(following := connection.next_event(), h11.EndOfMessage):
                if following is h11.NEED_DATA:
                    ending = Ending.INCOMPLETE
                    break
                assert isinstance(following, h11.Data)
                body += following.data
        except h11.RemoteProtocolError:
            ending = Ending.ILLEGAL
        after = connection.trailing_data[0] if ending is None else b""
        verdict = _judge_head(head, event)
        is_plain = rest == received and _is_plain_chunked(head, rest[len(head) : len(rest) - len(after)])
        if verdict is Verdict.SERVE and not is_plain:
            verdict = Verdict.MAY_REFUSE
        fields = tuple(sorted(field for field in event.headers if field[0] not in HOP_BY_HOP))
        target = to_origin_form(event.target)
        read = bytes(body) if not target.startswith(EARLY) else None
        requests.append(
            ReadRequest(
                Request(event.method, target, fields, read), verdict, ending is None, _expects_continue(event)
            )
        )
        if verdict is Verdict.REFUSE or (ending is None and _closes(event)):
            ending = Ending.CLOSED
        if ending is not None:
            return Reading(tuple(requests), ending)
        rest = after


def _head_length(data: bytes) -> int:
    """h11 ends a head at the first empty line, with or without carriage returns."""
    match = re.search(rb"\n\r?\n", data)
    assert match is not None
    return match.end()


def to_origin_form(target: bytes) -> bytes:
    if target.startswith(b"/") or b"://" not in target:
        path, _, query = target.partition(b"#")[0].partition(b"?")
    else:
        parts = urlsplit(target)
        path, query = parts.path, parts.query
    return path + (b"?" + query if query else b"")


def _expects_continue(request: h11.Request) -> bool:
    fields = [value for name, value in request.headers if name == b"expect"]
    return request.http_version == b"1.1" and any(value.lower() == b"100-continue" for value in fields)


def _closes(request: h11.Request) -> bool:
    tokens = [
        token.strip().lower()
        for name, value in request.headers
        if name == b"connection"
        for token in value.split(b",")
    ]
    return request.http_version < b"1.1" or b"close" in tokens


def _judge_head(head: bytes, request: h11.Request) -> Verdict:
    lines = head.replace(b"\r\n", b"\n").split(b"\n")[1:-2]
    values: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        values.setdefault(name.strip().lower(), []).append(value.strip(b" \t").lower())
    encodings, lengths = values.get(b"transfer-encoding", []), values.get(b"content-length", [])
    if (
        len(encodings) > 1
        or (encodings and (lengths or encodings != [b"chunked"]))
        or len(lengths) > 1
        or any(b"," in length for length in lengths)
        or len(values.get(b"host", [])) > 1
        or len(lines) > MAX_FIELDS
        or len(head) > MAX_HEAD_BYTES
        or request.method == b"CONNECT"
        or request.http_version not in (b"1.0", b"1.1")
    ):
        return Verdict.REFUSE
    request_line, *field_lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    is_plain = (
        head.endswith(b"\r\n\r\n")
        and _REQUEST_LINE.fullmatch(request_line)
        and all(_FIELD_LINE.fullmatch(line) for line in field_lines)
        and all(_CONTENT_LENGTH.fullmatch(length) for length in lengths)
        # RFC 9112, 6.1: HTTP/1.0 does not know Transfer-Encoding.
        and not (encodings and request.http_version == b"1.0")
        and not any(
            line.lower().startswith(b"transfer-encoding:") and line != line.rstrip() for line in field_lines
        )
    )
    return Verdict.SERVE if is_plain else Verdict.MAY_REFUSE


def _is_plain_chunked(head: bytes, body: bytes) -> bool:
    """Return False for chunk lines and trailers that h11 accepts and a strict server may refuse."""
    if not re.search(rb"\ntransfer-encoding:", head, re.IGNORECASE):
        return True
    while body:
        line, end, rest = body.partition(b"\r\n")
        match = _CHUNK_LINE.fullmatch(line)
        if not end:
            return True  # incomplete
        if match is None:
            return False
        size = int(match[1], 16)
        if size == 0:
            trailers = [trailer for trailer in rest.split(b"\r\n") if trailer]
            return all(
                _FIELD_LINE.fullmatch(trailer) and not _UNSAFE_TRAILER.match(trailer.partition(b":")[0])
                for trailer in trailers
            )
        body = rest[size + 2 :]
    return True


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    executed: int | None
    """Index of the request that the application executed for it; None for a response of the protocol."""


def find_violation(
    reading: Reading,
    responses: Sequence[Response],
    executed: Sequence[Request],
    *,
    continues: int,
    closed: bool,
) -> str | None:
    """Return the first rule that the server has broken on one connection; None if it was safe. `continues` is the
    number of interim responses 100.

    A server is safe if it executes the requests of `reading` in order and answers each of them once, or if it stops
    with an error status and closes the connection at or before the first request that it may refuse.
    """
    if continues > sum(read.expects_continue for read in reading.requests):
        return f"{continues} times 100 Continue"
    for index, (got, read) in enumerate(zip_longest(executed, reading.requests)):
        if got is None:
            break
        if read is None or read.verdict is Verdict.REFUSE or not read.is_answerable:
            return f"request {index} was executed, and the stream does not contain it: {got}"
        if got != read.request:
            return f"request {index} was executed as {got}, and the stream contains {read.request}"
    return _find_response_violation(reading, responses, closed=closed)


def _find_response_violation(reading: Reading, responses: Sequence[Response], *, closed: bool) -> str | None:
    for index, response in enumerate(responses):
        if response.executed is None:
            is_last = closed and index + 1 == len(responses)
            if is_last and response.status >= 400 and _may_stop_at(reading, index):
                return None
            return f"response {index} ({response.status}, last: {is_last}) refuses a request that is valid"
        if response.executed != index:
            return f"response {index} belongs to request {response.executed}"
    may_close = closed and _may_close_silently(reading, len(responses))
    if len(responses) < reading.answerable and not may_close:
        return f"{len(responses)} responses to {reading.answerable} requests"
    if closed and reading.ending is Ending.OPEN and not may_close:
        return "the connection was closed after a valid stream"
    return None


def _may_stop_at(reading: Reading, index: int) -> bool:
    """Return True if an error may replace response `index`, because a request at or after it is not valid.

    A broken body of a request that was answered already has no second response.
    """
    if any(read.verdict is not Verdict.SERVE or not read.complete for read in reading.requests[index:]):
        return True
    return index <= len(reading.requests) and reading.partial_head


def _may_close_silently(reading: Reading, index: int) -> bool:
    """Return True if the connection may end after `index` responses, because the last answered request or one after
    it is not valid."""
    if any(
        read.verdict is not Verdict.SERVE or not read.complete for read in reading.requests[max(index - 1, 0) :]
    ):
        return True
    return reading.ending in (Ending.ILLEGAL, Ending.INCOMPLETE)
