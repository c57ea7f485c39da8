"""Slow clients, clients that disconnect, and too many connections."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from csp_simulator.testing import serving
from devstack.conditions import wait_until
from devstack.wire import GET_HEALTH, connected
from gateway import allocator_client
from gateway.web.connection_limit import ConnectionLimit
from gateway.web.uvicorn_protocol import build_protocol

from .gateway_harness import STUDENT, create_app_without_servers, detail, running, sample, say_nothing

SHORT_SEC = 0.4
LONG_SEC = 600.0
"""Longer than the time limit of a test."""
BUNDLE = b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
ALLOCATE = (
    b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\n"
    + "".join(f"{name}: {value}\r\n" for name, value in STUDENT.items()).encode()
)


@asynccontextmanager
async def served(app: FastAPI, client_timeout_sec: float) -> AsyncIterator[str]:
    protocol = build_protocol(client_timeout_sec, None)
    async with serving(app, http=protocol, timeout_keep_alive=LONG_SEC) as url, asyncio.timeout(60):
        yield url


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"GET /heal",
        b"GET /healthz HTTP/1.1\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half",
        b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
        b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha",
        b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        GET_HEALTH + b"GET /heal",
        GET_HEALTH + GET_HEALTH + b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n",
    ],
)
async def test_an_unfinished_request_is_closed(sent: bytes) -> None:
    before = sample("broker_slow_clients_total", reason="request_unfinished")
    async with served(create_app_without_servers(), SHORT_SEC) as url, connected(url) as slow:
        slow.writer.write(sent)
        answer = await slow.read_to_end()
        async with connected(url) as other:
            other.writer.write(GET_HEALTH)
            assert (await other.response())[0] == 200
    assert answer.count(b"HTTP/1.1 200") == sent.count(GET_HEALTH)
    assert sample("broker_slow_clients_total", reason="request_unfinished") > before


async def test_a_slowly_sent_endless_request_is_closed() -> None:
    async with served(create_app_without_servers(), SHORT_SEC) as url, connected(url) as slow:
        slow.writer.write(b"GET /healthz HTTP/1.1\r\n")

        async def drip() -> None:
            while not slow.writer.transport.is_closing():
                slow.writer.write(b"X-More: and more\r\n")
                await asyncio.sleep(SHORT_SEC / 20)

        dripping = asyncio.create_task(drip())
        assert await slow.read_to_end() == b""
        slow.writer.transport.abort()
        await dripping


async def test_waiting_and_idle_connections_stay_open() -> None:
    app = create_app_without_servers()
    called, go_on = asyncio.Event(), asyncio.Event()

    async def slow_route() -> dict[str, str]:
        called.set()
        await go_on.wait()
        return {}

    app.add_api_route("/slow", slow_route)
    async with served(app, SHORT_SEC) as url, connected(url) as waiting, connected(url) as idle:
        idle.writer.write(GET_HEALTH)
        assert (await idle.response())[0] == 200
        waiting.writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await called.wait()
        for _ in range(3):  # each closes after one client time-out
            async with connected(url) as silent:
                await silent.read_to_end()
        go_on.set()
        assert await waiting.response() == (200, {})
        idle.writer.write(GET_HEALTH)
        assert (await idle.response())[0] == 200


async def test_a_body_after_its_response_keeps_the_connection_open() -> None:
    app = create_app_without_servers()
    async with served(app, SHORT_SEC) as url, connected(url) as client:
        client.writer.write(b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        assert (await client.response())[0] == 401
        client.writer.write(b"{}")
        for _ in range(3):
            async with connected(url) as silent:
                await silent.read_to_end()
        client.writer.write(GET_HEALTH)
        assert (await client.response())[0] == 200


async def test_the_keep_alive_time_out_applies_after_a_late_body() -> None:
    protocol = build_protocol(SHORT_SEC, None)
    async with (
        serving(create_app_without_servers(), http=protocol, timeout_keep_alive=1) as url,
        asyncio.timeout(60),
        connected(url) as client,
    ):
        client.writer.write(b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        assert (await client.response())[0] == 401
        client.writer.write(b"{}")
        assert await client.read_to_end() == b""


async def test_a_client_that_does_not_read_is_closed() -> None:
    before = sample("broker_slow_clients_total", reason="response_unread")
    async with served(create_app_without_servers(), SHORT_SEC) as url:
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as deaf:
            deaf.setblocking(False)
            # 1.4 MB each, more than the socket buffers can hold.
            await asyncio.get_running_loop().sock_sendall(deaf, 20 * BUNDLE)
            await wait_until(lambda: sample("broker_slow_clients_total", reason="response_unread") > before)
        async with connected(url) as other:
            other.writer.write(GET_HEALTH)
            assert (await other.response())[0] == 200


async def test_uvicorn_writes_no_usual_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Date field that the server adds to each response."""

    async def refuse(*_: object) -> None:
        raise AssertionError("uvicorn writes the response")

    async with served(create_app_without_servers(), LONG_SEC) as url, httpx.AsyncClient(trust_env=False) as http:
        await http.get(f"{url}/healthz")
        monkeypatch.setattr(RequestResponseCycle, "send", refuse)
        response = await http.post(f"{url}/v1/allocate", headers=STUDENT)
    assert response.status_code == 503
    assert response.headers["date"]


async def test_an_endless_head_is_431() -> None:
    async with served(create_app_without_servers(), LONG_SEC) as url, connected(url) as client:
        client.writer.write(GET_HEALTH)
        assert (await client.response())[0] == 200
        client.writer.write(b"GET /healthz HTTP/1.1\r\n" + b"X-More: and more\r\n" * 2000)
        status, body = await client.response()
        assert (status, body["detail"]["code"]) == (431, "HEADERS_TOO_LARGE")
        assert b"x-content-type-options: nosniff" in client.head
        assert body["detail"]["request_id"].encode() in client.head
        assert await client.read_to_end() == b""


async def test_an_endless_body_closes_the_connection() -> None:
    before = sample("broker_slow_clients_total", reason="request_too_large")
    async with served(create_app_without_servers(), LONG_SEC) as url, connected(url) as client:
        with contextlib.suppress(ConnectionError):
            client.writer.write(ALLOCATE + b"Transfer-Encoding: chunked\r\n\r\n")
            while True:
                client.writer.write(b"1;%b\r\nx\r\n" % (b"y" * 10_000))
                await client.writer.drain()
    assert sample("broker_slow_clients_total", reason="request_too_large") == before + 1


async def test_connections_per_address_are_limited() -> None:
    before = sample("broker_slow_clients_total", reason="too_many_connections")
    protocol = build_protocol(LONG_SEC, ConnectionLimit(3, []))
    async with (
        serving(create_app_without_servers(), http=protocol, timeout_keep_alive=LONG_SEC) as url,
        asyncio.timeout(60),
        connected(url) as first,
        connected(url) as second,
        connected(url) as third,
    ):
        for client in (first, second, third):
            await client.send(GET_HEALTH)
            assert (await client.response())[0] == 200
        async with connected(url) as fourth:
            status, body = await fourth.response()
            assert (status, body["detail"]["code"]) == (429, "RATE_LIMITED")
            assert b"retry-after: 5" in fourth.head
            assert await fourth.read_to_end() == b""
        assert sample("broker_slow_clients_total", reason="too_many_connections") == before + 1
        first.writer.transport.abort()
        while True:  # the server closes the first connection a moment later
            async with connected(url) as fifth:
                await fifth.send(GET_HEALTH)
                if (await fifth.response())[0] == 200:
                    break


@pytest.mark.parametrize("size", [1, 16])
async def test_the_largest_body_is_accepted_in_small_chunks(size: int) -> None:
    chunk = f"{size:x}\r\n".encode() + b"x" * size + b"\r\n"
    async with served(create_app_without_servers(), LONG_SEC) as url, connected(url) as client:
        client.writer.write(ALLOCATE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.writer.write(chunk * (64 * 1024 // size) + b"0\r\n\r\n")
        status, body = await client.response()
    assert (status, body["detail"]["code"]) == (503, "ALLOCATOR_UNAVAILABLE")


async def test_disconnected_clients_free_their_requests_at_once(
    amqp_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator_client, "MAX_IN_FLIGHT", 5)
    gone = sample("broker_allocate_total", outcome="client_gone")
    # Connected clients would wait longer than this test.
    async with running(amqp_url, database_url=database_url, allocate_timeout_sec=60) as gateway:
        gateway.allocator.answer = say_nothing
        in_flight = gateway.app.state.context.allocator
        async with served(gateway.app, LONG_SEC) as url, contextlib.AsyncExitStack() as connections:
            for _ in range(5):
                client = await connections.enter_async_context(connected(url))
                client.writer.write(ALLOCATE + b"\r\n")
            await wait_until(lambda: in_flight.in_flight == 5)
            refused = await gateway.allocate()
            assert (refused.status_code, detail(refused)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
            await connections.aclose()
            await wait_until(lambda: in_flight.in_flight == 0, within_sec=45)
            gateway.reset()
            assert (await gateway.allocate()).status_code == 201
            assert sample("broker_allocate_total", outcome="client_gone") == gone + 5


async def test_a_disconnect_within_the_body_sends_no_command(amqp_url: str, database_url: str) -> None:
    labels = {"method": "POST", "endpoint": "/v1/allocate", "status": "499"}
    before = sample("broker_request_latency_seconds_count", **labels)
    async with running(amqp_url, database_url=database_url) as gateway:
        async with served(gateway.app, LONG_SEC) as url:
            async with connected(url) as client:
                client.writer.write(ALLOCATE + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
                await client.writer.drain()
            await wait_until(lambda: sample("broker_request_latency_seconds_count", **labels) > before)
        assert gateway.allocator.commands == []


async def test_requests_beyond_the_drain_time_get_stopping(amqp_url: str, database_url: str) -> None:
    async with running(amqp_url, database_url=database_url, allocate_timeout_sec=60) as gateway:
        gateway.allocator.answer = say_nothing
        gateway.app.state.stopping = True
        async with contextlib.AsyncExitStack() as connections:
            async with served(gateway.app, LONG_SEC) as url:
                client = await connections.enter_async_context(connected(url))
                client.writer.write(ALLOCATE + b"\r\n")
                await wait_until(lambda: gateway.allocator.commands)
            status, body = await client.response()
    assert (status, body["detail"]["code"]) == (503, "STOPPING")
    assert body["detail"]["retry_after"]
