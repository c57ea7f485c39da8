"""HTTP server for tests: it runs an ASGI application in the test's own event loop, on a free port."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp


@asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[str]:
    """Serve `app` during the block and yield its root URL, without /v2. `options` are passed to uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        defaults = {"lifespan": "off", "access_log": False, "log_level": "critical", "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(app, **{**defaults, **options})
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
