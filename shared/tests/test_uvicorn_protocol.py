"""Strict message framing: executed requests, refused requests, and closed connections."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from csp_simulator.testing import serving
from devstack.conditions import wait_until
from devstack.wire import Client, connected
from sandbox_broker.runtime.uvicorn_protocol import MAX_HEAD_BYTES, MAX_HEAD_FIELDS, StrictProtocol

HOST = b"Host: x\r\n"
OFFER = b"Connection: Upgrade\r\nUpgrade: anything\r\n"
NEXT = b"GET /next HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"


@dataclass
class RecordingApp:
    """ASGI application that answers with the path, after the body unless `early`, and records each request."""

    early: bool = False
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_answer.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.early:
            await self._respond(scope, send)
        body = b""
        while True:
            message: Message = await receive()
            if message["type"] != "http.request":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.requests.append((scope["method"], scope["path"], body))
        self.headers.append(list(scope["headers"]))
        await self.may_answer.wait()
        if not self.early:
            await self._respond(scope, send)

    async def _respond(self, scope: Scope, send: Send) -> None:
        body = json.dumps({"path": scope["path"]}).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def served(app: RecordingApp, **options: Any) -> AsyncIterator[Client]:
    async with serving(app, http=StrictProtocol, **options) as url, asyncio.timeout(60), connected(url) as client:
        yield client


def post(*fields: bytes, version: bytes = b"HTTP/1.1", host: bytes = HOST) -> bytes:
    return b"POST /a " + version + b"\r\n" + host + b"".join(line + b"\r\n" for line in fields) + b"\r\n"


@pytest.mark.parametrize("offered", [b"anything", b"websocket", b"h2c", b"TLS/1.2, foo"])
@pytest.mark.parametrize("connection", [b"Upgrade", b"keep-alive, upgrade", b"Upgrade, HTTP2-Settings"])
@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_an_upgrade_offer_is_ignored_and_its_body_is_not_a_request(
    offered: bytes, connection: bytes, framing: str
) -> None:
    smuggled = b"POST /admin HTTP/1.1\r\n" + HOST + b"X-Ignore: "
    if framing == "chunked":
        length, body = b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled)
    else:
        length, body = b"Content-Length: %d" % len(smuggled), smuggled
    app = RecordingApp()
    async with served(app) as client:
        await client.send(post(b"Connection: " + connection, b"Upgrade: " + offered, length))
        await client.send(body)
        assert await client.response() == (200, {"path": "/a"})
        await client.send(NEXT)
        assert await client.response() == (200, {"path": "/next"})
        assert await client.read_to_end() == b""
    assert app.requests == [("POST", "/a", smuggled), ("GET", "/next", b"")]
    assert all(name != b"upgrade" for name, _ in app.headers[0])


async def test_upgrade_offers_in_one_segment_are_separate_requests() -> None:
    app = RecordingApp()
    offer = post(OFFER.removesuffix(b"\r\n"), b"Content-Length: 2") + b"{}"
    async with served(app) as client:
        await client.send(offer * 150 + NEXT)
        for _ in range(150):
            assert await client.response() == (200, {"path": "/a"})
        assert await client.response() == (200, {"path": "/next"})
    assert app.requests == [("POST", "/a", b"{}")] * 150 + [("GET", "/next", b"")]


@pytest.mark.parametrize(
    "sent",
    [
        post(host=b""),
        post(host=HOST + HOST),
        post(host=HOST + HOST, version=b"HTTP/1.0"),
        post(b"Transfer-Encoding: gzip, chunked"),
        post(b"Transfer-Encoding: chunked, chunked"),
        post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        post(b"Transfer-Encoding: identity"),
        post(b"Transfer-Encoding:"),
        post(b"Transfer-Encoding: xchunked"),
        post(b"Transfer-Encoding: chunked;q=1"),
        post(b"Transfer-Encoding: identity", version=b"HTTP/1.0"),
        post(b"Transfer-Encoding: gzip, chunked", version=b"HTTP/1.0"),
        post(b"Transfer-Encoding: chunked", version=b"HTTP/1.0"),
        post(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
        post(b"Content-Length: 5", b"Content-Length: 5"),
        post(b"Content-Length: +5"),
        post(b"Content-Length : 5"),
        post(b"X-Folded: a", b" b"),
        post(OFFER + b"Transfer-Encoding: identity"),
        post(OFFER + HOST.removesuffix(b"\r\n")),
        post(version=b"HTTP/2.0"),
        post(version=b"HTTP/0.9"),
        b"CONNECT x:80 HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /a HTTP/1.1\n" + HOST + b"\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
async def test_ambiguous_framing_is_400_and_closes(sent: bytes) -> None:
    app = RecordingApp()
    async with served(app) as client:
        await client.send(sent + b"5\r\nhello\r\n0\r\n\r\n" + NEXT)
        status, body = await client.response()
        assert (status, body["detail"]["code"]) == (400, "MALFORMED_REQUEST")
        assert b"connection: close" in client.head
        assert await client.read_to_end() == b""
    assert app.requests == []


async def test_a_health_check_over_http_1_0_needs_no_host() -> None:
    app = RecordingApp()
    async with served(app) as client:
        await client.send(b"OPTIONS /a HTTP/1.0\r\n\r\n")
        assert await client.response() == (200, {"path": "/a"})
        assert await client.read_to_end() == b""


@pytest.mark.parametrize("closing", [b"HTTP/1.1\r\nConnection: close\r\n", b"HTTP/1.0\r\n"])
async def test_requests_after_a_closing_request_are_not_executed(closing: bytes) -> None:
    app = RecordingApp()
    async with served(app) as client:
        await client.send(b"GET /a " + closing + HOST + b"\r\n" + NEXT)
        assert await client.response() == (200, {"path": "/a"})
        assert await client.read_to_end() == b""
    assert app.requests == [("GET", "/a", b"")]


async def test_a_malformed_body_is_refused_once_and_its_request_gets_no_second_answer() -> None:
    app = RecordingApp()
    async with served(app) as client:
        await client.send(post(b"Transfer-Encoding: chunked"))
        await client.send(b"5\r\nhello\r\nno size\r\n")
        status, _ = await client.response()
        assert status == 400
        assert await client.read_to_end() == b""
    assert app.requests == []


async def test_a_malformed_body_after_the_answer_only_closes() -> None:
    async with served(RecordingApp(early=True)) as client:
        await client.send(post(b"Transfer-Encoding: chunked"))
        assert await client.response() == (200, {"path": "/a"})
        await client.send(b"no size\r\n")
        assert await client.read_to_end() == b""


@pytest.mark.parametrize(
    "malformed", [b"\x00\r\n\r\n", post(host=b""), post(b"Transfer-Encoding: chunked") + b"no size\r\n"]
)
async def test_a_malformed_request_never_answers_an_earlier_one(malformed: bytes) -> None:
    app = RecordingApp()
    app.may_answer.clear()
    async with served(app) as client:
        await client.send(post() + malformed)
        await wait_until(lambda: app.requests)
        app.may_answer.set()
        assert await client.response() == (200, {"path": "/a"})
        assert await client.read_to_end() == b""
    assert app.requests == [("POST", "/a", b"")]


async def test_trailer_fields_do_not_become_header_fields() -> None:
    app = RecordingApp()
    async with served(app) as client:
        await client.send(post(b"Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\nX-Trailer: a\r\nHost: y\r\n\r\n")
        assert await client.response() == (200, {"path": "/a"})
        await client.send(NEXT)
        assert await client.response() == (200, {"path": "/next"})
    assert app.headers[0] == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]


def head_of(size: int, segment: int) -> list[bytes]:
    head = b"GET /a HTTP/1.1\r\n" + HOST + b"X-Long: \r\n\r\n"
    head = head.replace(b"X-Long: ", b"X-Long: " + b"x" * (size - len(head)))
    return [head[start : start + segment] for start in range(0, len(head), segment)]


@pytest.mark.parametrize("segment", [1000, 20_000, 100_000])
@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, 431), (60_000, 431)])
async def test_a_head_over_16_kib_is_431(size: int, status: int, segment: int) -> None:
    app = RecordingApp()
    async with served(app) as client:
        for part in head_of(size, segment):
            await client.send(part)
        assert (await client.response())[0] == status
        if status == 431:
            assert await client.read_to_end() == b""
    assert len(app.requests) == (status == 200)


@pytest.mark.parametrize(("fields", "status"), [(MAX_HEAD_FIELDS, 200), (MAX_HEAD_FIELDS + 1, 431)])
async def test_more_than_100_fields_are_431(fields: int, status: int) -> None:
    async with served(RecordingApp()) as client:
        await client.send(post(*[b"X: y"] * (fields - 1)))
        assert (await client.response())[0] == status


@pytest.mark.parametrize("endless", [b"0\r\nX-Trailer: ", b"1;", b"0\r\n"])
async def test_a_trailer_or_a_chunk_extension_without_an_end_is_refused(endless: bytes) -> None:
    """A response before the end of the body does not lift the limit."""
    filling = b"a: b\r\n" if endless == b"0\r\n" else b"x"
    async with served(RecordingApp(early=True)) as client:
        await client.send(post(b"Transfer-Encoding: chunked"))
        assert (await client.response())[0] == 200
        await client.send(endless + filling * (4 * MAX_HEAD_BYTES))
        assert await client.read_to_end() == b""


async def test_a_large_body_needs_no_large_head() -> None:
    app = RecordingApp()
    async with served(app) as client:
        for _ in range(2):
            await client.send(post(b"Content-Length: 100000") + b"x" * 100_000)
            assert (await client.response())[0] == 200
    assert [len(body) for _, _, body in app.requests] == [100_000, 100_000]


async def test_the_log_line_of_a_malformed_request_is_short() -> None:
    target = b"http://" + b"[" * 10_000
    with capture_logs() as logs:
        async with served(RecordingApp()) as client:
            await client.send(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.response())[0] == 400
    assert [(line["event"], line["log_level"]) for line in logs] == [("request.malformed", "warning")]
    assert len(json.dumps(logs[0])) < 500


async def test_a_trailer_connection_close_closes_after_the_response() -> None:
    """The parser accepts no request after it. HAProxy forwards such a trailer and keeps the connection open."""
    for early in (False, True):
        async with served(RecordingApp(early=early)) as client:
            await client.send(post(b"Transfer-Encoding: chunked"))
            await client.send(b"1\r\nx\r\n0\r\nConnection: close\r\n\r\n")
            assert (await client.response())[0] == 200
            client.writer.write(NEXT)
            assert await client.read_to_end() == b""


async def test_an_expectation_of_an_http_1_0_client_is_ignored() -> None:
    async with served(RecordingApp()) as client:
        await client.send(post(b"Expect: 100-continue", b"Content-Length: 1", version=b"HTTP/1.0"))
        await client.send(b"x")
        answer = await client.read_to_end()
    assert answer.startswith(b"HTTP/1.1 200 ")
