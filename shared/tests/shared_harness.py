"""Test helpers of the shared package: background tasks, a leak check, and a TCP proxy that can fail."""

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from aio_pika import Connection

from sandbox_broker.runtime.service import cancel_and_wait

PATIENCE_SEC = 60.0


@asynccontextmanager
async def background_tasks(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` in background tasks during the block. Fail if a task ends early."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
    finally:
        for task in reversed(tasks):
            await cancel_and_wait(task)
    for task in tasks:
        assert task.cancelled(), task.exception()


@asynccontextmanager
async def assert_no_leaks() -> AsyncIterator[None]:
    """Fail if asyncio reports an error, or if the block leaves a task of the project or of a client library, or an
    open connection to RabbitMQ."""
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    before = asyncio.all_tasks()
    gc.freeze()  # so that get_objects() below skips existing objects

    def record(_: object, context: dict[str, Any]) -> None:
        # asyncpg reports this error if a connection is lost while it cancels a statement.
        if "unexpected connection_lost() call" not in str(context.get("exception")):
            reports.append(context)

    loop.set_exception_handler(record)
    try:
        yield
        async with asyncio.timeout(PATIENCE_SEC):
            while left := [task for task in asyncio.all_tasks() - before if _is_ours(task)]:
                await asyncio.wait(left)
        gc.collect()
        await asyncio.sleep(0)
        left_open = [item for item in gc.get_objects() if type(item) is Connection and not item.is_closed]
    finally:
        gc.unfreeze()
        loop.set_exception_handler(None)
    assert reports == [], reports  # pytest explains no assertion of this module
    assert left_open == [], left_open


def _is_ours(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and any(
        part in code.co_filename for part in ("aiormq", "aio_pika", "asyncpg", "sandbox_broker/")
    )


class CannedTransport(httpx.AsyncBaseTransport):
    """Transport that replaces the network. The client reads the body of the response as a stream."""

    def __init__(self, respond: Callable[[httpx.Request], httpx.Response]) -> None:
        self._transport = httpx.MockTransport(respond)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, stream=_Unread(response))


class _Unread(httpx.AsyncByteStream):
    # Needed because httpx reads the body of a mock response at once, and then refuses to stream it.
    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        async for chunk in self._response.stream:
            yield chunk


class TcpProxy:
    """TCP proxy to a server. It can reset its connections and pause the traffic."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self.url = ""

    async def open(self, default_port: int, *, port: int = 0) -> None:
        self._port = self._to.port or default_port
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        port = self._server.sockets[0].getsockname()[1]
        user, at, _ = self._to.netloc.rpartition("@")
        self.url = urlunsplit(self._to._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    @property
    def connected(self) -> bool:
        return bool(self._writers)

    def pause(self) -> None:
        """Stop forwarding bytes. The connections stay open."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def reset(self) -> None:
        """Reset all connections. New connections are accepted."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        self.resume()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        server_reader, server_writer = await asyncio.open_connection(self._to.hostname, self._port)
        self._writers |= {writer, server_writer}
        try:
            await asyncio.gather(self._forward(reader, server_writer), self._forward(server_reader, writer))
        finally:
            self._writers -= {writer, server_writer}

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()


@contextmanager
def open_silent_port(host: str = "127.0.0.1") -> Iterator[int]:
    """Yield a port of `host` that drops packets: the queue of its listener is full and never emptied."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind((host, 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(3):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        yield address[1]


@asynccontextmanager
async def open_tcp_proxy(url: str, default_port: int) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(url)
    await proxy.open(default_port)
    try:
        yield proxy
    finally:
        await proxy.close()
