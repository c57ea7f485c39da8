"""A name with several addresses, of which the first ones do not answer."""

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from devstack.ports import free_port
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.connection import open_connection
from sandbox_broker.runtime import event_loop, preflight
from sandbox_broker.runtime.event_loop import EventLoop

from .shared_harness import PATIENCE_SEC, TcpProxy, open_silent_port, open_tcp_proxy

NAME = "two-addresses.test"
AT_ONCE_SEC = 2.0


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of NAME, which a test sets."""
    listed: list[str] = []
    getaddrinfo = EventLoop.getaddrinfo

    async def resolve(self: EventLoop, host: Any, port: Any, **options: Any) -> list[Any]:
        names = listed if host in (NAME, NAME.encode()) else [host]
        return [info for name in names for info in await getaddrinfo(self, name, port, **options)]

    monkeypatch.setattr(EventLoop, "getaddrinfo", resolve)
    return listed


def at_name(url: str, port: int) -> str:
    parts = urlsplit(url)
    user, sign, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{sign}{NAME}:{port}").geturl()


@pytest.fixture
def silent() -> Iterator[int]:
    with open_silent_port("127.0.0.2") as port:
        yield port


async def _relay_from(url: str, port: int, default_port: int) -> TcpProxy:
    proxy = TcpProxy(url)
    await proxy.open(default_port, port=port)
    return proxy


def test_clients_reach_the_second_address(
    addresses: list[str], silent: int, clean_queues: str, clean_database: str
) -> None:
    """RabbitMQ, PostgreSQL and an HTTP client, each behind a name whose first address drops packets."""
    addresses[:] = ["127.0.0.2", "127.0.0.1"]

    async def connect(url: str, default_port: int) -> float:
        proxy = await _relay_from(url, silent, default_port)
        began = time.monotonic()
        try:
            if default_port == 5672:
                async with open_connection(at_name(url, silent)):
                    pass
            else:
                opened = await connections.connect(
                    Primary(at_name(url, silent)), application_name="test", statement_timeout_sec=1
                )
                opened.terminate()
            return time.monotonic() - began
        finally:
            await proxy.close()

    for url, default_port in ((clean_queues, 5672), (clean_database, 5432)):
        assert event_loop.run(asyncio.wait_for(connect(url, default_port), PATIENCE_SEC)) < AT_ONCE_SEC


def test_the_preflight_reaches_the_second_address(
    addresses: list[str], silent: int, clean_queues: str, clean_database: str
) -> None:
    addresses[:] = ["127.0.0.2", "127.0.0.1"]

    async def check(**urls: str) -> None:
        (url,) = {value for value in urls.values() if value}
        proxy = await _relay_from(url, silent, 5672)
        try:
            await asyncio.to_thread(preflight.check, amqp_url=at_name(url, silent))
        finally:
            await proxy.close()

    event_loop.run(asyncio.wait_for(check(amqp_url=clean_queues), PATIENCE_SEC))


def test_an_address_that_refuses_is_followed_by_the_next(addresses: list[str], clean_queues: str) -> None:
    addresses[:] = ["127.0.0.3", "127.0.0.1"]

    async def connect() -> None:
        async with (
            open_tcp_proxy(clean_queues, 5672) as proxy,
            open_connection(at_name(clean_queues, urlsplit(proxy.url).port or 0)),
        ):
            pass

    event_loop.run(asyncio.wait_for(connect(), PATIENCE_SEC))


def test_no_address_answers(addresses: list[str]) -> None:
    addresses[:] = ["127.0.0.3", "127.0.0.1"]

    async def connect() -> None:
        await asyncio.open_connection(NAME, free_port())

    with pytest.raises(ConnectionRefusedError):
        event_loop.run(connect())


def test_a_cancelled_connection_leaves_no_socket(addresses: list[str], silent: int) -> None:
    addresses[:] = ["127.0.0.2", "127.0.0.2"]

    async def connect() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection(NAME, silent), 0.6)
        await asyncio.sleep(0)
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    event_loop.run(connect())  # a socket that is left open is a ResourceWarning, which fails the test


def test_the_http_client_of_csp_reaches_the_second_address(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx connects by anyio, which resolves the name itself."""
    getaddrinfo = EventLoop.getaddrinfo

    async def resolve(self: EventLoop, host: Any, port: Any, **options: Any) -> list[Any]:
        names = ["127.0.0.2", "127.0.0.1"] if host in (NAME, NAME.encode()) else [host]
        return [info for name in names for info in await getaddrinfo(self, name, port, **options)]

    monkeypatch.setattr(EventLoop, "getaddrinfo", resolve)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def fetch() -> str:
        async with (
            await asyncio.start_server(answer, "127.0.0.1", silent),
            httpx.AsyncClient(trust_env=False, timeout=AT_ONCE_SEC) as client,
        ):
            return (await client.get(f"http://{NAME}:{silent}/")).text

    assert event_loop.run(fetch()) == "ok"


def test_a_numeric_address_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect() -> None:
        async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            assert writer.get_extra_info("socket").family == socket.AF_INET
            writer.close()

    monkeypatch.setattr(event_loop, "_connect_to_first", None)
    event_loop.run(connect())
