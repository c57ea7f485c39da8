"""Scenario in which students allocate while 100 slow clients hold connections.

Of the slow clients, a quarter each send no data, half of a request head, half of a body, or requests for large
responses, which they never read.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle, islice

from bench import with_maintenance
from bench.meter import Run
from bench.servers import TOKEN, Servers
from bench.sizes import Sizes
from devstack.wire import connected
from sandbox_broker.runtime.service import cancel_and_wait

_CLIENTS = 100
_HOLD_SEC = 25
"""Time before a client reconnects, shorter than the gateway's time-outs for slow clients."""

_POST = f"POST /v1/allocate HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
_PARTIAL_REQUESTS = (
    b"",
    _POST,
    _POST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    10 * b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: bench\r\n\r\n",
)


async def run_with_slow_clients(servers: Servers, sizes: Sizes) -> Run:
    """Generate the load of `beside-nothing` while the slow clients are connected."""
    async with _hold_connections(servers.broker.url):
        return await with_maintenance.run_without_maintenance(servers, sizes)


@asynccontextmanager
async def _hold_connections(url: str) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(_hold_connection(url, request))
        for request in islice(cycle(_PARTIAL_REQUESTS), _CLIENTS)
    ]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # raises, because clients only end on an error
    finally:
        for task in tasks:
            await cancel_and_wait(task)


async def _hold_connection(url: str, request: bytes) -> None:
    while True:
        async with connected(url) as client:
            await client.send(request)
            await asyncio.sleep(_HOLD_SEC)
