"""What the tests of the shared code have in common: tasks that end with the test, and a line that can fail."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from aio_pika import Connection

from sandbox_broker.runtime.service import cancel_and_wait

PATIENCE_SEC = 60.0


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Meanwhile `work` runs, and none of it may fail."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
    finally:
        for task in reversed(tasks):
            await cancel_and_wait(task)
    for task in tasks:
        assert task.cancelled(), task.exception()


async def until(condition: Callable[[], object]) -> None:
    """Fails when it does not come true."""
    async with asyncio.timeout(PATIENCE_SEC):
        while not condition():  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def nothing_stays() -> AsyncIterator[None]:
    """Fails when asyncio complains of something, or a task of ours or of a client library stays, or a connection to
    RabbitMQ that nobody has closed."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    before = asyncio.all_tasks()
    gc.freeze()  # what is there now is not looked through below

    def complain(_: object, context: dict[str, Any]) -> None:
        # asyncpg says this of a connection that is lost while it asks the server to end a statement.
        if "unexpected connection_lost() call" not in str(context.get("exception")):
            complaints.append(context)

    loop.set_exception_handler(complain)
    try:
        yield
        async with asyncio.timeout(PATIENCE_SEC):
            while left := [task for task in asyncio.all_tasks() - before if _is_ours(task)]:
                await asyncio.wait(left)
        gc.collect()
        await asyncio.sleep(0)
        left_open = [one for one in gc.get_objects() if type(one) is Connection and not one.is_closed]
    finally:
        gc.unfreeze()
        loop.set_exception_handler(None)
    assert complaints == []
    assert left_open == []


def _is_ours(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and any(
        part in code.co_filename for part in ("aiormq", "aio_pika", "asyncpg", "sandbox_broker/")
    )


class CannedTransport(httpx.AsyncBaseTransport):
    """Takes the place of the network: `respond` answers, and the client reads the body as a stream."""

    def __init__(self, respond: Callable[[httpx.Request], httpx.Response]) -> None:
        self._transport = httpx.MockTransport(respond)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, stream=_Unread(response))


class _Unread(httpx.AsyncByteStream):
    # httpx reads a canned body when the response is made, and then refuses to stream it.
    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        async for chunk in self._response.stream:
            yield chunk


class Line:
    """A connection to a server, through us: it can be cut, and it can fall silent."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self.url = ""

    async def open(self, default_port: int) -> None:
        self._port = self._to.port or default_port
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        user, at, _ = self._to.netloc.rpartition("@")
        self.url = urlunsplit(self._to._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    def silence(self) -> None:
        """Nothing comes through any more; the connections stay."""
        self._flowing.clear()

    def speak(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Resets every connection; new ones can be made."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        self.speak()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        there, back = await asyncio.open_connection(self._to.hostname, self._port)
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))
        finally:
            self._writers -= {writer, back}

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()


@asynccontextmanager
async def line_to(url: str, default_port: int) -> AsyncIterator[Line]:
    line = Line(url)
    await line.open(default_port)
    try:
        yield line
    finally:
        await line.close()
