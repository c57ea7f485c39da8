"""Responses: byte for byte those of uvicorn, also for unusual messages, and in one write."""

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway.web import response_cycle
from gateway.web.response_cycle import ResponseCycle

NAMES = some.sampled_from(
    [b"content-length", b"Content-Length", b"content-type", b"X-Request-Id", b"connection", b"transfer-encoding"]
)
VALUES = some.sampled_from([b"", b"0", b"2", b"3", b"close", b"keep-alive", b"chunked", b"text/plain"])
FIELDS = some.tuples(NAMES | some.binary(max_size=4), VALUES | some.binary(max_size=4))


class Recorder:
    """Transport that keeps its bytes."""

    def __init__(self) -> None:
        self.written = b""
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.written += data
        self.writes += 1

    def close(self) -> None:
        self.written += b"<closed>"

    def end(self) -> None:
        self.written += b"<end>"

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def build_cycle(kind: type[RequestResponseCycle], transport: Any, **options: Any) -> RequestResponseCycle:
    defaults: dict[str, Any] = {"method": "POST", "keep_alive": True, "default_headers": []}
    given = defaults | options
    return kind(
        scope={"type": "http", "method": given["method"], "path": "/", "http_version": "1.1"},  # type: ignore[typeddict-item]
        transport=transport,
        flow=FlowControl(transport),
        logger=logging.getLogger(),
        access_logger=logging.getLogger(),
        access_log=False,
        default_headers=given["default_headers"],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=given["keep_alive"],
        on_response=transport.end,
    )


async def respond(kind: type[RequestResponseCycle], messages: Any, **options: Any) -> tuple[bytes, str, bool, bool]:
    """Return the bytes on the wire, the error, and whether the response has started and is complete."""
    transport = Recorder()
    cycle = build_cycle(kind, transport, **options)
    error = ""
    try:
        for message in messages:
            await cycle.send(message)
    except (RuntimeError, ValueError) as raised:
        error = repr(raised)
    return transport.written, error, cycle.response_started, cycle.response_complete


def build_messages(status: int, headers: Any, *bodies: bytes) -> list[Any]:
    """Return the messages of a response with its body in parts."""
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        *(
            {"type": "http.response.body", "body": body, "more_body": number < len(bodies)}
            for number, body in enumerate(bodies, 1)
        ),
    ]


@given(
    method=some.sampled_from(["GET", "POST", "HEAD"]),
    keep_alive=some.booleans(),
    default_headers=some.sampled_from([[], [(b"date", b"today")], [(b"connection", b"close")]]),
    status=some.sampled_from([200, 201, 204, 304, 404, 503]),
    headers=some.lists(FIELDS, max_size=4),
    bodies=some.lists(some.sampled_from([b"", b"{}", b"abc"]), min_size=1, max_size=2),
)
def test_a_response_is_that_of_uvicorn(
    method: str, keep_alive: bool, default_headers: Any, status: int, headers: Any, bodies: list[bytes]
) -> None:
    messages = build_messages(status, headers, *bodies)
    options = {"method": method, "keep_alive": keep_alive, "default_headers": default_headers}

    async def respond_with_both() -> list[Any]:
        return [await respond(kind, messages, **options) for kind in (RequestResponseCycle, ResponseCycle)]

    expected, found = asyncio.run(respond_with_both())
    assert found == expected


async def test_head_and_body_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise AssertionError("uvicorn writes the response")

    monkeypatch.setattr(RequestResponseCycle, "send", refuse)
    transport = Recorder()
    cycle = build_cycle(ResponseCycle, transport, default_headers=[(b"date", b"today")])
    for message in build_messages(201, [(b"content-type", b"application/json"), (b"content-length", b"2")], b"{}"):
        await cycle.send(message)
    assert (transport.writes, cycle.response_complete) == (1, True)
    assert transport.written == (
        b"HTTP/1.1 201 Created\r\ndate: today\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}<end>"
    )


async def test_the_head_of_a_stream_is_written_at_once() -> None:
    transport = Recorder()
    cycle = build_cycle(ResponseCycle, transport)
    await cycle.send(build_messages(200, [(b"content-type", b"text/event-stream")])[0])
    assert transport.written.endswith(b"transfer-encoding: chunked\r\n\r\n")


async def test_an_application_that_fails_before_the_body_closes_the_connection() -> None:
    transport = Recorder()
    cycle = build_cycle(ResponseCycle, transport)

    async def application(_: Any, __: Any, send: Any) -> None:
        await send(build_messages(200, [(b"content-length", b"2")])[0])
        raise ValueError

    await cycle.run_asgi(application)
    assert transport.written == b"<closed>"


async def test_a_client_that_has_disconnected_gets_nothing() -> None:
    transport = Recorder()
    cycle = build_cycle(ResponseCycle, transport)
    start, body = build_messages(200, [(b"content-length", b"2")], b"{}")
    await cycle.send(start)
    cycle.disconnected = True
    await cycle.send(body)
    assert transport.written == b""


def test_the_number_of_lines_in_memory_is_limited() -> None:
    lines = response_cycle._Lines()
    for number in range(3 * response_cycle._MAX_LINES):
        assert lines[(b"x-ratelimit-reset", b"%d" % number)] == b"x-ratelimit-reset: %d\r\n" % number
        assert lines[(b"x-request-id", b"%d" % number)] == b"x-request-id: %d\r\n" % number
        assert len(lines) <= response_cycle._MAX_LINES
