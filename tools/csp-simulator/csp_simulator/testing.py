"""HTTP server for tests: it runs an ASGI application in the test's own event loop, on a free port."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

STOP_SEC = 1.0
"""Time limit of requests that still run at the end."""


@asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[str]:
    """Serve `app` during the block and yield its root URL, without /v2. `options` are passed to uvicorn.

    uvicorn's own main loop and end wait for up to 0.2 s, and tests start more than a thousand servers.
    """
    # With this protocol number asyncio sets TCP_NODELAY. Otherwise most bodies arrive 40 ms after their head.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        defaults = {"lifespan": "off", "access_log": False, "log_level": "critical"}
        config = uvicorn.Config(app, **{**defaults, **options})
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        await server.on_tick(0)  # sets the Date of the responses
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for listening in server.servers:
                listening.close()
            for connection in list(server.server_state.connections):
                connection.shutdown()
            if running := set(server.server_state.tasks):
                _, late = await asyncio.wait(running, timeout=STOP_SEC)
                for task in late:
                    task.cancel()
            await server.lifespan.shutdown()
