"""Service runtime: one process with one event loop, an HTTP port, and background tasks."""

import asyncio
import gc
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
"""Longer than the idle time-out of clients and proxies (mostly up to 60 s). If the server closed first, a request
sent at that moment could be lost."""

T = TypeVar("T")

log = structlog.get_logger()


def lifespan(
    *tasks: Callable[[], Coroutine[Any, Any, None]],
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Return a lifespan that runs `tasks` while the application runs.

    At the end it cancels them one by one in reverse order, so that a task never outlives the tasks it depends on. A
    task that ends by itself stops the process, and the platform restarts it.
    """

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
                await cancel_and_wait(task)
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("service.task_failed", task=task.get_name(), exc_info=error)

    return run_tasks


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel the task and wait until it has ended. Repeat the cancellation, because wait_for of Python 3.11 in the
    client library can lose one that arrives when its wait ends."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1)


async def run_uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` until it ends, even if the caller is cancelled. Then raise the cancellation."""
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


async def run_periodically(period_sec: float, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` now and then after each pause of `period_sec`, until cancelled."""
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
    """Serve until SIGTERM or SIGINT, then let requests and tasks finish. Exit with 1 if a task failed, and with 2
    and one line if a port is in use.

    `ops_port` is a second port of the same application, which distinguishes the ports by `scope["server"]`. Both
    ports drain together. `bind_host` is a comma-separated list of addresses to listen on, empty for all.
    """
    raise_open_file_limit()
    try:
        # Before the tasks start, so that a service that cannot listen consumes no messages.
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
            loop="sandbox_broker.runtime.event_loop:EventLoop",
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
        # uvicorn installs its own handlers while it serves. These handle a signal before that, and the signal that
        # uvicorn raises again at its end, so that the process exits with 0.
        signal.signal(number, request_exit)
    # Modules and models stay until the end. Without this, each full garbage collection searches them all. In the
    # gateway this takes 100 ms, and cost up to a quarter of the throughput at 200 connections (ADR 8).
    gc.freeze()
    server.run(listeners)
    tracing.shutdown()
    if getattr(app.state, "failed", False):
        sys.exit(1)


def _name(task: Callable[..., object]) -> str:
    while isinstance(task, partial):
        task = task.func
    return task.__qualname__
