import asyncio
from collections.abc import AsyncIterator

import pytest

from devstack.ports import is_free
from tests.chaos.proxy import HOST, Proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that sends back what it is sent."""

    def __init__(self) -> None:
        self.port = 0
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        """How each connection has ended."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1000):
                writer.write(piece)
                await writer.drain()
            self.lost.put_nowait("ended")
        except ConnectionResetError:
            self.lost.put_nowait("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    async with await asyncio.start_server(echo.serve, HOST, 0) as server:
        echo.port = server.sockets[0].getsockname()[1]
        yield echo


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy(echo.port) as proxy:
        yield proxy


async def connect(proxy: Proxy) -> Streams:
    return await asyncio.open_connection(HOST, proxy.port)


async def send(streams: Streams, text: bytes) -> None:
    streams[1].write(text)
    await streams[1].drain()


async def received(streams: Streams, length: int) -> bytes:
    async with asyncio.timeout(60):
        return await streams[0].readexactly(length)


async def nothing_arrives(streams: Streams) -> bool:
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


async def test_it_passes_on_everything_in_both_directions(proxy: Proxy) -> None:
    text = bytes(range(256)) * 4000
    streams = await connect(proxy)
    sending = asyncio.create_task(send(streams, text))
    assert await received(streams, len(text)) == text
    await sending
    assert proxy.carried == 2 * len(text)
    streams[1].close()


async def test_an_end_of_the_connection_is_passed_on(proxy: Proxy, echo: Echo) -> None:
    streams = await connect(proxy)
    await send(streams, b"last words")
    streams[1].write_eof()
    async with asyncio.timeout(60):
        assert await streams[0].read() == b"last words"
        assert await echo.lost.get() == "ended"
    streams[1].close()


async def test_a_slow_link_takes_its_time_each_way(proxy: Proxy) -> None:
    streams = await connect(proxy)
    proxy.slow_down(0.1)
    began = asyncio.get_running_loop().time()
    await send(streams, b"hello")
    assert await received(streams, 5) == b"hello"
    assert asyncio.get_running_loop().time() - began >= 0.19
    streams[1].close()


async def test_what_a_black_hole_has_held_up_arrives_when_it_is_over(proxy: Proxy) -> None:
    old = await connect(proxy)
    await send(old, b"before")
    assert await received(old, 6) == b"before"
    proxy.swallow()
    new = await connect(proxy)
    for streams in (old, new):
        await send(streams, b"within")
        assert await nothing_arrives(streams)
    proxy.heal()
    for streams in (old, new):
        assert await received(streams, 6) == b"within"
        streams[1].close()


async def test_the_other_side_of_a_black_hole_does_not_learn_who_has_gone_before_it_is_over(
    proxy: Proxy, echo: Echo
) -> None:
    streams = await connect(proxy)
    await send(streams, b"before")
    await received(streams, 6)
    proxy.swallow()
    streams[1].close()
    await streams[1].wait_closed()
    other = await connect(proxy)
    assert await nothing_arrives(other)
    assert echo.lost.empty()
    other[1].close()
    proxy.heal()
    async with asyncio.timeout(60):
        await echo.lost.get()


async def test_a_reset_ends_what_is_connected_on_both_sides_and_whoever_connects(proxy: Proxy, echo: Echo) -> None:
    old = await connect(proxy)
    await send(old, b"before")
    await received(old, 6)
    proxy.reset()
    assert await is_reset(old)
    async with asyncio.timeout(60):
        assert await echo.lost.get() == "reset"
    assert await is_reset(await connect(proxy))
    proxy.heal()
    new = await connect(proxy)
    await send(new, b"after")
    assert await received(new, 5) == b"after"
    new[1].close()


async def test_whoever_connects_is_reset_when_nobody_listens_behind_it(echo: Echo, proxy: Proxy) -> None:
    async with Proxy(proxy.port) as before:
        await proxy.__aexit__(None, None, None)
        assert await is_reset(await connect(before))
        await proxy.__aenter__()


async def test_it_leaves_nothing_behind_even_in_the_middle_of_a_black_hole(echo: Echo) -> None:
    async with Proxy(echo.port) as proxy:
        old = await connect(proxy)
        await send(old, b"before")
        await received(old, 6)
        proxy.swallow()
        new = await connect(proxy)
        await send(new, b"within")
    assert is_free(proxy.port)
    for streams in (old, new):
        assert await is_reset(streams)
