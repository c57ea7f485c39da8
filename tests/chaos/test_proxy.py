"""Proxy: pass-through, delay, black hole and reset."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from devstack.ports import is_free
from tests.chaos.proxy import HOST, Proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class EchoServer:
    """TCP server that returns all received data."""

    def __init__(self) -> None:
        self.port = 0
        self.closed: asyncio.Queue[str] = asyncio.Queue()
        """One item per closed connection: "ended" or "reset"."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(1000):
                writer.write(chunk)
                await writer.drain()
            self.closed.put_nowait("ended")
        except ConnectionResetError:
            self.closed.put_nowait("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[EchoServer]:
    echo = EchoServer()
    async with await asyncio.start_server(echo.serve, HOST, 0) as server:
        echo.port = server.sockets[0].getsockname()[1]
        yield echo


@pytest.fixture
async def proxy(echo: EchoServer) -> AsyncIterator[Proxy]:
    async with Proxy(echo.port) as proxy:
        yield proxy


async def connect(proxy: Proxy) -> Streams:
    return await asyncio.open_connection(HOST, proxy.port)


async def send(streams: Streams, text: bytes) -> None:
    streams[1].write(text)
    await streams[1].drain()


async def receive(streams: Streams, length: int) -> bytes:
    async with asyncio.timeout(60):
        return await streams[0].readexactly(length)


async def is_silent(streams: Streams) -> bool:
    try:
        async with asyncio.timeout(0.2):
            await streams[0].read(1)
    except TimeoutError:
        return True
    return False


async def is_reset(streams: Streams) -> bool:
    try:
        async with asyncio.timeout(60):
            await streams[0].read(1)
    except ConnectionResetError:
        return True
    return False


async def test_data_passes_in_both_directions(proxy: Proxy) -> None:
    text = bytes(range(256)) * 4000
    streams = await connect(proxy)
    sending = asyncio.create_task(send(streams, text))
    assert await receive(streams, len(text)) == text
    await sending
    assert proxy.bytes_carried == 2 * len(text)
    streams[1].close()


async def test_end_of_a_connection_passes(proxy: Proxy, echo: EchoServer) -> None:
    streams = await connect(proxy)
    await send(streams, b"last words")
    streams[1].write_eof()
    async with asyncio.timeout(60):
        assert await streams[0].read() == b"last words"
        assert await echo.closed.get() == "ended"
    streams[1].close()


async def test_slow_link_delays_each_direction(proxy: Proxy) -> None:
    streams = await connect(proxy)
    proxy.slow_down(0.1)
    began = asyncio.get_running_loop().time()
    await send(streams, b"hello")
    assert await receive(streams, 5) == b"hello"
    assert asyncio.get_running_loop().time() - began >= 0.19
    streams[1].close()


async def test_black_hole_delivers_held_data_after_heal(proxy: Proxy) -> None:
    old = await connect(proxy)
    await send(old, b"before")
    assert await receive(old, 6) == b"before"
    proxy.black_hole()
    new = await connect(proxy)
    for streams in (old, new):
        await send(streams, b"within")
        assert await is_silent(streams)
    proxy.heal()
    for streams in (old, new):
        assert await receive(streams, 6) == b"within"
        streams[1].close()


async def test_black_hole_holds_back_the_end_of_a_connection(proxy: Proxy, echo: EchoServer) -> None:
    streams = await connect(proxy)
    await send(streams, b"before")
    await receive(streams, 6)
    proxy.black_hole()
    streams[1].close()
    await streams[1].wait_closed()
    other = await connect(proxy)
    assert await is_silent(other)
    assert echo.closed.empty()
    other[1].close()
    proxy.heal()
    async with asyncio.timeout(60):
        await echo.closed.get()


async def test_reset_closes_existing_and_new_connections(proxy: Proxy, echo: EchoServer) -> None:
    old = await connect(proxy)
    await send(old, b"before")
    await receive(old, 6)
    proxy.reset()
    assert await is_reset(old)
    async with asyncio.timeout(60):
        assert await echo.closed.get() == "reset"
    assert await is_reset(await connect(proxy))
    proxy.heal()
    new = await connect(proxy)
    await send(new, b"after")
    assert await receive(new, 5) == b"after"
    new[1].close()


async def test_connection_is_reset_without_a_listener_at_the_target(echo: EchoServer, proxy: Proxy) -> None:
    async with Proxy(proxy.port) as front:
        await proxy.__aexit__(None, None, None)
        assert await is_reset(await connect(front))
        await proxy.__aenter__()


async def test_exit_closes_all_connections_of_a_black_hole(echo: EchoServer) -> None:
    async with Proxy(echo.port) as proxy:
        old = await connect(proxy)
        await send(old, b"before")
        await receive(old, 6)
        proxy.black_hole()
        new = await connect(proxy)
        await send(new, b"within")
    assert is_free(proxy.port)
    for streams in (old, new):
        assert await is_reset(streams)
