"""A simulator inside a test's own event loop, on a free port."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp


@asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[str]:
    """Serve `app` inside the block; yields its root URL, to which /v2 and /_control are appended. `options` are
    uvicorn's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        usual = {"lifespan": "off", "access_log": False, "log_level": "critical", "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(app, **{**usual, **options})
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
