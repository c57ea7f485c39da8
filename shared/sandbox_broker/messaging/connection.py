"""Connections to RabbitMQ with reconnection. A lost connection is replaced together with its channels and
consumers, and all operations on it fail at once with `Disconnected`. aio-pika's robust classes are not used,
because they lose consumers and return callbacks.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache

import structlog
from aio_pika import Connection
from aio_pika.abc import AbstractConnection
from aio_pika.connection import make_url
from aiormq.channel import Channel
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    InvalidFrameError,
    ProbableAuthenticationError,
)

from sandbox_broker.contract import topology
from sandbox_broker.messaging.aiormq_internals import drop, limit_silence
from sandbox_broker.observability import metrics
from sandbox_broker.runtime.server_urls import amqp_host, split_amqp_urls

HEARTBEAT_SEC = 5
CONNECT_TIMEOUT_SEC = 5.0
NODE_TIMEOUT_SEC = 2.0
"""Time limit of one node of several, because a frozen node or a silent address does not answer."""
MAX_CONNECT_TIMEOUT_SEC = 10.0
"""Both limits double up to this after each attempt that timed out. On an overloaded machine no shorter attempt may
ever succeed, and each takes processor time from the others."""
NEXT_NODE_SEC = 0.5
"""Time after which the next node is tried as well. A silent node delays a connection by this."""
MIN_BACKOFF_SEC = 0.1
MAX_BACKOFF_SEC = 2.0
DELETE_TIMEOUT_SEC = 2.0
"""Time limit, because RabbitMQ may not answer for a classic queue while the queue's node is down."""

REFUSALS = (AuthenticationError, ProbableAuthenticationError, InvalidFrameError)
"""Errors of a node that answers but refuses the credentials or the virtual host."""

log = structlog.get_logger()


class Disconnected(Exception):
    """RabbitMQ did not answer or confirm in time. The message may have arrived or not."""


@contextmanager
def translating_errors() -> Iterator[None]:
    """Translate the errors of the client library for a lost connection into Disconnected.

    The library has no common class for them. It raises a bare Exception when the connection closes on our side, and
    it cancels waiting calls when the heartbeat fails. `task.cancelling()` distinguishes a real cancellation.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Disconnected("RabbitMQ no longer answers") from error
    except Exception as error:  # the library has no common class, and some of its errors are a bare Exception
        if isinstance(error, AMQPError | OSError | TimeoutError | RuntimeError) or type(error) is Exception:
            raise Disconnected(str(error) or type(error).__name__) from error
        raise


async def run_with_reconnect(url: str, name: str, session: Callable[[AbstractConnection], Awaitable[None]]) -> None:
    """Run `session` on a new connection, and again after each end or Disconnected, with a backoff with jitter.

    A missing topology is declared first, if the user may do so. The function runs until it is
    cancelled or `session` raises another error.
    """
    limit_silence()
    loop = asyncio.get_running_loop()
    nodes = _nodes_of(url)
    metrics.CONNECTED.labels(name).set(0)
    pause, timeout_sec = MIN_BACKOFF_SEC, nodes.timeout_sec
    while True:
        began = loop.time()
        try:
            connection, node = await _connect_to_any(nodes, name, timeout_sec)
            timeout_sec = nodes.timeout_sec
            nodes.connections[connection] = node
            try:
                log.info("rabbitmq.connected", connection=name)
                metrics.CONNECTED.labels(name).set(1)
                await session(connection)
            except Disconnected:
                nodes.try_last(node)
                raise
            finally:
                del nodes.connections[connection]
                metrics.CONNECTED.labels(name).set(0)
                await _close(connection)
            log.info("rabbitmq.session_ended", connection=name)
        except Disconnected as error:
            metrics.DISCONNECTS.labels(name).inc()
            log.warning("rabbitmq.disconnected", connection=name, error=str(error))
            if isinstance(error.__cause__, TimeoutError):
                timeout_sec = min(2 * timeout_sec, MAX_CONNECT_TIMEOUT_SEC)
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # because wait_for of Python 3.11 in the client library can swallow it
        pause = MIN_BACKOFF_SEC if loop.time() - began > MAX_BACKOFF_SEC else min(2 * pause, MAX_BACKOFF_SEC)
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 (jitter)


@asynccontextmanager
async def open_connection(url: str, *, timeout: float | None = None) -> AsyncIterator[Connection]:
    """Open a connection for the block. `url` may list several nodes; `timeout` applies to each.

    Raises AMQPError, OSError or TimeoutError if no node accepts the connection. A refusal of the credentials or of
    the virtual host takes precedence.
    """
    errors: list[Exception] = []
    for node_url, limit in _nodes_in_random_order(url, timeout):
        connection = Connection(make_url(node_url))
        try:
            try:
                await connection.connect(limit)
            except (AMQPError, OSError, TimeoutError) as error:
                errors.append(error)
                continue
            yield connection
            return
        finally:
            await _close(connection)
    raise next((error for error in errors if isinstance(error, REFUSALS)), errors[-1])


def leave_other_nodes(url: str, connection: AbstractConnection) -> None:
    """End all connections of this process that use another node of `url` than `connection`, that of its publisher.

    A node of RabbitMQ 4 that is cut off from the other nodes keeps its clients. Their consumers get no message
    there, and only a publisher can notice it, because the node confirms no message to a quorum queue.
    """
    nodes = _nodes_of(url)
    kept = nodes.connections[connection]
    left = [other for other, node in nodes.connections.items() if node != kept]
    if left:
        log.info("rabbitmq.nodes_left", connections=len(left))
        nodes.try_first(kept)
    for other in left:
        drop(other)


class _Nodes:
    """Nodes of an AMQP_URL, and the open connections of this process to them.

    All connections of a process try the nodes in the same order, so that they use the same node and the process
    depends on one node only. The order is random, so that the processes spread over the nodes.
    """

    def __init__(self, url: str) -> None:
        nodes = split_amqp_urls(url)
        self.order = random.sample(nodes, len(nodes))
        self.timeout_sec = CONNECT_TIMEOUT_SEC if len(nodes) == 1 else NODE_TIMEOUT_SEC
        self.connections: dict[AbstractConnection, str] = {}

    def try_first(self, node: str) -> None:
        self.order.remove(node)
        self.order.insert(0, node)

    def try_last(self, node: str) -> None:
        self.order.remove(node)
        self.order.append(node)


@cache
def _nodes_of(url: str) -> _Nodes:
    return _Nodes(url)


async def _connect_to_any(nodes: _Nodes, name: str, timeout_sec: float) -> tuple[Connection, str]:
    """Connect to the first node that answers. Return the connection and the node's URL. The next node is tried
    NEXT_NODE_SEC after the previous one, or as soon as it has failed. Raises Disconnected if no node answers within
    `timeout_sec`."""
    waiting = list(reversed(nodes.order))
    attempts: dict[asyncio.Task[Connection], str] = {}
    try:
        while True:
            if waiting:
                node_url = waiting.pop()
                attempts[asyncio.create_task(_connect_to_node(node_url, name, timeout_sec))] = node_url
            pause_sec = NEXT_NODE_SEC if waiting else None
            ended, _ = await asyncio.wait(attempts, timeout=pause_sec, return_when=asyncio.FIRST_COMPLETED)
            for attempt in sorted(ended, key=lambda task: task.exception() is not None):
                error = attempt.exception()
                node_url = attempts.pop(attempt)
                if error is None:
                    for slower in attempts.values():
                        nodes.try_last(slower)
                    return attempt.result(), node_url
                nodes.try_last(node_url)
                if not isinstance(error, Disconnected) or not (attempts or waiting):
                    raise error
                node = str(amqp_host(node_url))
                log.info("rabbitmq.node_skipped", connection=name, node=node, error=str(error))
    finally:
        await _abandon(attempts)


async def _connect_to_node(node_url: str, name: str, timeout_sec: float) -> Connection:
    connection = Connection(
        make_url(node_url, heartbeat=HEARTBEAT_SEC), client_properties={"connection_name": name}
    )
    try:
        await _connect(connection, timeout_sec)
    except BaseException:  # also after a cancellation, because the connection has no other owner yet
        await _close(connection)
        raise
    return connection


async def _abandon(attempts: Collection[asyncio.Task[Connection]]) -> None:
    for attempt in attempts:
        attempt.cancel()
    for attempt in attempts:
        await asyncio.wait([attempt])
        # The connection may be open, because wait_for of Python 3.11 can lose a cancellation.
        if not attempt.cancelled() and attempt.exception() is None:
            await _close(attempt.result())


def _nodes_in_random_order(url: str, timeout_sec: float | None) -> list[tuple[str, float | None]]:
    """Return each node with its time limit. The random order spreads connections over the nodes."""
    nodes = split_amqp_urls(url)
    if len(nodes) > 1:
        timeout_sec = NODE_TIMEOUT_SEC if timeout_sec is None else min(timeout_sec, NODE_TIMEOUT_SEC)
    return [(node, timeout_sec) for node in random.sample(nodes, len(nodes))]


async def _connect(connection: Connection, timeout_sec: float) -> None:
    with translating_errors():
        await connection.connect(timeout_sec)
        async with asyncio.timeout(max(timeout_sec, CONNECT_TIMEOUT_SEC)):
            await _declare_if_missing(connection)


async def _declare_if_missing(connection: AbstractConnection) -> None:
    """Declare the topology unless it is complete. An existing topology is not declared again, because RabbitMQ
    logs a refusal as an error, and because a declaration waits for the leader of each queue."""
    async with connection.channel() as channel:
        if await topology.is_declared(channel):
            return
    await declare(connection)


async def declare(connection: AbstractConnection) -> None:
    """Declare the topology. Without the right to declare, log a warning: `python -m sandbox_broker.declare` must do
    it, and the first use of a missing queue fails."""
    try:
        async with connection.channel() as channel:
            await topology.declare(channel)
    except ChannelAccessRefused as error:
        log.warning("rabbitmq.not_declared", error=str(error), action="run python -m sandbox_broker.declare")


async def _close(connection: AbstractConnection) -> None:
    """Close the connection, even if it was never opened or is lost. Otherwise aio-pika closes it in `__del__`,
    which needs an event loop and may run without one."""
    with suppress(Disconnected), translating_errors():
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SEC):
                await connection.close()
        finally:
            await connection.close()  # returns at once, because the first call has released the transport


async def open_channel(connection: AbstractConnection, *, confirms: bool) -> Channel:
    channel = await connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
    underlying = await channel.get_underlay_channel()
    assert isinstance(underlying, Channel)  # noqa: S101 (its abstract class leaves out `wait`)
    return underlying


async def delete_replaced(connection: AbstractConnection, queue: topology.Queue) -> bool:
    """Delete the queue that `queue` replaces, unless it has a consumer. The function is idempotent.

    Return False if a later call can succeed: a service of an earlier version consumes the old queue, or its node is
    down and RabbitMQ 3 refuses. Return True if the old queue is gone, if the user may not delete it, or if RabbitMQ
    does not answer within DELETE_TIMEOUT_SEC; RabbitMQ then finishes the deletion later. A lost connection raises
    no error here; its next use raises one.
    """
    if queue.replaces is None:
        return True
    try:
        with translating_errors():
            async with asyncio.timeout(DELETE_TIMEOUT_SEC):
                # On a separate channel, because a refusal closes the channel and a missing answer blocks it.
                channel = await open_channel(connection, confirms=False)
                await channel.queue_delete(queue.replaces, if_unused=True)
                await channel.close()
    except Disconnected as error:
        if isinstance(error.__cause__, ChannelAccessRefused):  # `sandbox_broker.declare` deletes the queue
            return True
        log.info("queue.not_deleted", queue=queue.replaces, error=str(error))
        return not isinstance(error.__cause__, ChannelNotFoundEntity | ChannelPreconditionFailed)
    return True
