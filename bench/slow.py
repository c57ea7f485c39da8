"""A class at work while a hundred other clients are in no hurry: some send nothing, some half a head, some half a
body, and some ask for much and read none of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle, islice

from bench import beside
from bench.meter import Run
from bench.servers import TOKEN, Servers
from bench.sizes import Sizes
from devstack.wire import connected
from sandbox_broker.service import cancel

_CLIENTS = 100
_STAY_SEC = 25
"""Then each comes anew; a little later it would be cut off."""

_POST = f"POST /v1/allocate HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
_SENT = (
    b"",
    _POST,
    _POST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    10 * b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: bench\r\n\r\n",
)


async def clients(servers: Servers, sizes: Sizes) -> Run:
    """The load of `beside-nothing`."""
    async with _lingering(servers.ours.url):
        return await beside.nothing(servers, sizes)


@asynccontextmanager
async def _lingering(url: str) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(_linger(url, sent)) for sent in islice(cycle(_SENT), _CLIENTS)]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # it should not have ended
    finally:
        for task in tasks:
            await cancel(task)


async def _linger(url: str, sent: bytes) -> None:
    while True:
        async with connected(url) as client:
            await client.send(sent)
            await asyncio.sleep(_STAY_SEC)
