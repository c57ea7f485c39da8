"""Runs a service: one process, one event loop, an HTTP port, and the tasks that do its work."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import structlog
import uvicorn
from starlette.applications import Starlette

from sandbox_broker.observability import tracing
from sandbox_broker.runtime.settings import stop
from sandbox_broker.runtime.sockets import open_listeners, parse_addresses, raise_open_file_limit
from sandbox_broker.runtime.uvicorn_protocol import StrictProtocol
from sandbox_broker.runtime.uvicorn_server import STOP_SEC, Server

KEEP_ALIVE_SEC = 75
"""Longer than clients and proxies keep an idle connection (mostly up to 60 s). Were it the server that closes
first, a request could be sent into the closing and be lost."""

T = TypeVar("T")

log = structlog.get_logger()


def lifespan(
    *tasks: Callable[[], Coroutine[Any, Any, None]],
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Runs `tasks` as long as the application lives. At the end they are cancelled one by one, the last first,
    so that what a task builds on outlives it. One that ends by itself stops the process: whoever runs it
    starts it afresh."""

    @asynccontextmanager
    async def run_tasks(app: Starlette) -> AsyncIterator[None]:
        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            log.error("service.task_failed", task=task.get_name(), exc_info=error)
            app.state.failed = True
            os.kill(os.getpid(), signal.SIGTERM)

        running = [asyncio.create_task(task(), name=_name(task)) for task in tasks]
        for task in running:
            task.add_done_callback(ended)
        try:
            yield
        finally:
            for task in reversed(running):
                task.remove_done_callback(ended)
                await cancel(task)
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("service.task_failed", task=task.get_name(), exc_info=error)

    return run_tasks


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancels until the task has ended. Once may not be enough: the wait_for of Python 3.11, in the client
    library, loses a cancellation that comes just when its wait is over."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` to its end, even when cancelled meanwhile; the cancellation comes after it."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("service.work_failed", exc_info=failure)
    raise cancelled


async def every(period_sec: float, work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` now and then once a period, for ever."""
    while True:
        await work()
        await asyncio.sleep(period_sec)


def run(
    app: Starlette,
    port: int,
    *,
    ops_port: int | None = None,
    bind_host: str = "",
    protocol: type[StrictProtocol] = StrictProtocol,
    drain_sec: float = 0,
) -> None:
    """Serve until SIGTERM or SIGINT, then let requests and tasks finish. Exits with 1 if a task failed, and with 2
    and one line if the port is taken.

    `ops_port` is a second port of the same application, which tells the two apart by `scope["server"]`. It is
    served as long as the first one and drains with it. `bind_host` is a comma-separated list of the addresses to
    listen on; empty for all.
    """
    raise_open_file_limit()
    try:
        # Before the tasks start: a service that cannot listen takes no work from a queue.
        addresses = parse_addresses(bind_host)
        listeners = [
            listener
            for number in (port, ops_port)
            if number is not None
            for listener in open_listeners(number, addresses)
        ]
    except OSError as error:
        stop(error.strerror or str(error))
    server = Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=protocol,
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SEC,
            timeout_graceful_shutdown=int(STOP_SEC - drain_sec),
        ),
        app,
        drain_sec=drain_sec,
    )

    def request_exit(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn has handlers of its own while it serves: this is for a signal that comes before, and for the
        # one that it raises again when it is done, when a stop is no failure.
        signal.signal(number, request_exit)
    server.run(listeners)
    tracing.shutdown()
    if getattr(app.state, "failed", False):
        sys.exit(1)


def _name(task: Callable[..., object]) -> str:
    while isinstance(task, partial):
        task = task.func
    return task.__qualname__
