"""Connections to RabbitMQ that come back. One that is lost is thrown away with all that belonged to it and built
anew; whatever waited for it fails at once with `Disconnected`. (aio-pika's robust classes lose consumers and
return callbacks.)
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import structlog
from aio_pika import Connection
from aio_pika.abc import AbstractConnection
from aio_pika.connection import make_url
from aiormq.channel import Channel
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed

from sandbox_broker.contract import topology
from sandbox_broker.observability import metrics

HEARTBEAT_SEC = 5
CONNECT_TIMEOUT_SEC = 5.0
MIN_BACKOFF_SEC = 0.1
MAX_BACKOFF_SEC = 2.0
DELETE_TIMEOUT_SEC = 2.0
"""RabbitMQ may not answer for a classic queue while the node of that queue is down."""

log = structlog.get_logger()


class Disconnected(Exception):
    """RabbitMQ does not answer or did not confirm in time: whether the message arrived is unknown."""


@contextmanager
def losses() -> Iterator[None]:
    """Around every call of the client library: what it raises when a connection is lost, as Disconnected.

    It has no one class for that. What waits while we close the connection ourselves may get a bare Exception,
    and what waits when the heartbeat fails is cancelled; of a real cancellation the task itself knows.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Disconnected("RabbitMQ no longer answers") from error
    except Exception as error:
        if isinstance(error, AMQPError | OSError | TimeoutError | RuntimeError) or type(error) is Exception:
            raise Disconnected(str(error) or type(error).__name__) from error
        raise


async def keep_connected(url: str, name: str, session: Callable[[AbstractConnection], Awaitable[None]]) -> None:
    """Runs `session` on a fresh connection for ever; when it ends or raises Disconnected, after a pause with
    jitter again. Each connection starts with the topology declared, where its user may do that. Ends by being
    cancelled, or with what else `session` raises."""
    loop = asyncio.get_running_loop()
    metrics.CONNECTED.labels(name).set(0)
    pause = MIN_BACKOFF_SEC
    while True:
        began = loop.time()
        try:
            connection = Connection(
                make_url(url, heartbeat=HEARTBEAT_SEC), client_properties={"connection_name": name}
            )
            try:
                await _connect(connection)
                log.info("rabbitmq.connected", connection=name)
                metrics.CONNECTED.labels(name).set(1)
                await session(connection)
            finally:
                metrics.CONNECTED.labels(name).set(0)
                await _close(connection)
            log.info("rabbitmq.session_ended", connection=name)
        except Disconnected as error:
            metrics.DISCONNECTS.labels(name).inc()
            log.warning("rabbitmq.disconnected", connection=name, error=str(error))
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # the wait_for of Python 3.11, in the client library, can swallow it
        pause = MIN_BACKOFF_SEC if loop.time() - began > MAX_BACKOFF_SEC else min(2 * pause, MAX_BACKOFF_SEC)
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 (jitter)


@asynccontextmanager
async def opened(url: str, *, timeout: float | None = None) -> AsyncIterator[Connection]:
    """A connection that lasts as long as the block. Raises AMQPError, OSError or TimeoutError where none
    comes about."""
    connection = Connection(make_url(url))
    try:
        await connection.connect(timeout)
        yield connection
    finally:
        await _close(connection)


async def _connect(connection: Connection) -> None:
    with losses():
        await connection.connect(CONNECT_TIMEOUT_SEC)
        async with asyncio.timeout(CONNECT_TIMEOUT_SEC):
            await _declare(connection)


async def _declare(connection: AbstractConnection) -> None:
    """A user of least privilege may not: then `python -m sandbox_broker.declare` has done it, or what uses a queue
    that is not there says so."""
    try:
        async with connection.channel() as channel:
            await topology.declare(channel)
    except ChannelAccessRefused as error:
        log.debug("rabbitmq.not_declared", error=str(error))


async def _close(connection: Connection) -> None:
    """Also one that never came about, or that was lost: what is not closed aio-pika closes in its `__del__`, which
    then needs an event loop and may come where none runs."""
    with suppress(Disconnected), losses():
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SEC):
                await connection.close()
        finally:
            await connection.close()  # at once: whatever came of the first, it has let go of the transport


async def open_channel(connection: AbstractConnection, *, confirms: bool) -> Channel:
    channel = await connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
    underlying = await channel.get_underlay_channel()
    assert isinstance(underlying, Channel)  # noqa: S101 (its abstract class leaves out `wait`)
    return underlying


async def delete_replaced(connection: AbstractConnection, queue: topology.Queue) -> bool:
    """Delete the queue that `queue` replaces, unless a consumer still uses it. Repeating that is harmless.

    Return False if a later call can succeed: a service of an earlier version consumes the old queue, or its node is
    down and RabbitMQ 3 refuses. Return True if the old queue is gone, if the user may not delete it, or if RabbitMQ
    does not answer within DELETE_TIMEOUT_SEC; it then finishes the deletion later. Raise nothing for a lost
    connection; the next use of it does.
    """
    if queue.replaces is None:
        return True
    try:
        with losses():
            async with asyncio.timeout(DELETE_TIMEOUT_SEC):
                # A channel of its own, because a refusal closes the channel and a missing answer blocks it.
                channel = await open_channel(connection, confirms=False)
                await channel.queue_delete(queue.replaces, if_unused=True)
                await channel.close()
    except Disconnected as error:
        if isinstance(error.__cause__, ChannelAccessRefused):  # the step `sandbox_broker.declare` does it
            return True
        log.info("queue.not_deleted", queue=queue.replaces, error=str(error))
        return not isinstance(error.__cause__, ChannelNotFoundEntity | ChannelPreconditionFailed)
    return True
