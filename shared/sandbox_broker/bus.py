"""RabbitMQ for the services: connections that come back, confirmed publishing, batches of deliveries, requests.

The rules, and what each is for:

- A connection that is lost is thrown away with all that belonged to it and built anew; whatever waited for it
  fails at once with `Disconnected`. (aio-pika's robust classes lose consumers and return callbacks.)
- Publishing and consuming have connections of their own: a resource alarm blocks only publishers.
- Every publish is confirmed, mandatory, and bounded in time; confirms are awaited together, not one by one.
- A delivery is only put in line by the callback; the work is done outside it, in batches, and acknowledged in
  order, up to and including the last of the batch.
- Answers come to one exclusive queue per process. A request has a deadline on our side.
"""

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import AMQPError, ChannelInvalidStateError, PublishError
from pamqp.commands import Basic

from sandbox_broker import topology
from sandbox_broker.messages import Command, Reply, ReplyEnvelope, encode_commands

HEARTBEAT_SEC = 5
CONNECT_TIMEOUT_SEC = 5.0
PUBLISH_TIMEOUT_SEC = 5.0
MAX_BACKOFF_SEC = 2.0

_CONNECTION_ERRORS = (AMQPError, ChannelInvalidStateError, OSError, TimeoutError)

log = structlog.get_logger()


class Disconnected(Exception):
    """RabbitMQ does not answer or did not confirm in time: whether the message arrived is unknown."""


class Unroutable(Exception):
    """No queue takes messages for this exchange and routing key."""


async def keep_connected(url: str, name: str, session: Callable[[AbstractConnection], Awaitable[None]]) -> None:
    """Runs `session` on a fresh connection for ever; when it ends or raises a connection error, after a pause
    with jitter again. Each connection starts with the topology declared. Ends by being cancelled."""
    attempt = 0
    while True:
        try:
            connection = await _connect(url, name)
            try:
                attempt = 0
                await session(connection)
            finally:
                await _close(connection)
        except _CONNECTION_ERRORS as error:
            log.warning("rabbitmq.disconnected", connection=name, error=str(error) or type(error).__name__)
        attempt += 1
        await asyncio.sleep(min(0.1 * 2**attempt, MAX_BACKOFF_SEC) * random.uniform(0.5, 1))  # noqa: S311 (jitter)


async def _connect(url: str, name: str) -> AbstractConnection:
    connection = await aio_pika.connect(
        url,
        timeout=CONNECT_TIMEOUT_SEC,
        heartbeat=HEARTBEAT_SEC,
        client_properties={"connection_name": name},
    )
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SEC), connection.channel() as channel:
            await topology.declare(channel)
    except BaseException:
        await _close(connection)
        raise
    log.info("rabbitmq.connected", connection=name)
    return connection


async def _close(connection: AbstractConnection) -> None:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SEC):
            await connection.close()
    except _CONNECTION_ERRORS:
        pass  # it was lost anyway


async def _open_channel(connection: AbstractConnection, *, confirms: bool) -> Channel:
    channel = await connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
    underlying = await channel.get_underlay_channel()
    assert isinstance(underlying, Channel)  # noqa: S101 (its abstract class leaves out `wait`)
    return underlying


class Publisher:
    """Publishes with confirms over a connection of its own. `run` keeps it connected."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = f"{name}-publish"
        self._channel: Channel | None = None
        self._connected = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._channel is not None

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def run(self) -> None:
        await keep_connected(self._url, self._name, self._session)

    async def _session(self, connection: AbstractConnection) -> None:
        channel = self._channel = await _open_channel(connection, confirms=True)
        self._connected.set()
        try:
            await asyncio.wait([channel.closing])
        finally:
            self._channel = None
            self._connected.clear()

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: Basic.Properties | None = None,
        *,
        mandatory: bool = True,
        timeout_sec: float = PUBLISH_TIMEOUT_SEC,
    ) -> None:
        """Returns when RabbitMQ has taken the message.

        Raises Disconnected, or Unroutable where `mandatory` and no queue takes it.
        """
        if self._channel is None:
            raise Disconnected("not connected to RabbitMQ")
        try:
            await self._channel.basic_publish(
                body,
                exchange=exchange,
                routing_key=routing_key,
                properties=properties or Basic.Properties(delivery_mode=2),
                mandatory=mandatory,
                timeout=timeout_sec,
                wait=False,
            )
        except PublishError as error:
            raise Unroutable(f"no queue for {routing_key!r} on exchange {exchange!r}") from error
        except _CONNECTION_ERRORS as error:
            raise Disconnected(f"publishing failed: {str(error) or type(error).__name__}") from error

    async def consumers(self, queue: str) -> int:
        """How many consumers the queue has; raises Disconnected."""
        if self._channel is None:
            raise Disconnected("not connected to RabbitMQ")
        try:
            declared = await self._channel.queue_declare(queue, passive=True, timeout=PUBLISH_TIMEOUT_SEC)
        except _CONNECTION_ERRORS as error:
            raise Disconnected(str(error) or type(error).__name__) from error
        return declared.consumer_count or 0


class Subscription:
    """What RabbitMQ delivers from one queue, in batches, until the channel closes, the queue is deleted, or
    `end` is called. What was delivered and not acknowledged then goes back to the queue."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._inbox: asyncio.Queue[DeliveredMessage | None] = asyncio.Queue()
        self._ended = False

    @classmethod
    async def open(cls, connection: AbstractConnection, queue: topology.Queue, *, prefetch: int) -> Self:
        channel = await _open_channel(connection, confirms=False)
        subscription = cls(channel)
        channel.closing.add_done_callback(lambda _: subscription.end())
        channel.on_consumer_cancel_callbacks.add(lambda _: subscription.end())
        await channel.basic_qos(prefetch_count=prefetch)
        await channel.basic_consume(queue.name, subscription._deliver)
        return subscription

    async def _deliver(self, delivery: DeliveredMessage) -> None:
        self._inbox.put_nowait(delivery)

    async def batch(self, limit: int) -> list[DeliveredMessage]:
        """All that has gathered, up to `limit`, and at least one; empty once the subscription has ended."""
        deliveries: list[DeliveredMessage] = []
        while not self._ended and len(deliveries) < limit and (not deliveries or not self._inbox.empty()):
            delivery = await self._inbox.get()
            if delivery is not None:
                deliveries.append(delivery)
        return [] if self._ended else deliveries

    async def ack(self, delivery: DeliveredMessage, *, all_before: bool = False) -> None:
        """Acknowledges this delivery, or with it all before it. Where the channel is gone it does nothing:
        RabbitMQ delivers them again, and doing them again changes nothing."""
        try:
            await self._channel.basic_ack(_tag(delivery), multiple=all_before)
        except _CONNECTION_ERRORS:
            self.end()

    async def reject(self, delivery: DeliveredMessage) -> None:
        """Sends this delivery to the dead letters."""
        try:
            await self._channel.basic_reject(_tag(delivery), requeue=False)
        except _CONNECTION_ERRORS:
            self.end()

    def end(self) -> None:
        self._ended = True
        self._inbox.put_nowait(None)


def _tag(delivery: DeliveredMessage) -> int:
    tag = delivery.delivery_tag
    assert tag is not None, "only a basic.get of an empty queue has none"  # noqa: S101
    return tag


class Requester:
    """Sends commands and hands out their replies. `run` keeps its reply queue open."""

    def __init__(self, url: str, name: str, publisher: Publisher) -> None:
        self._url = url
        self._name = f"{name}-replies"
        self._publisher = publisher
        self._reply_queue: str | None = None
        self._connected = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[tuple[Reply, ...]]] = {}

    @property
    def connected(self) -> bool:
        return self._reply_queue is not None and self._publisher.connected

    async def run(self) -> None:
        await keep_connected(self._url, self._name, self._session)

    async def _session(self, connection: AbstractConnection) -> None:
        channel = await _open_channel(connection, confirms=False)
        lost = channel.closing
        channel.on_consumer_cancel_callbacks.add(lambda _: asyncio.ensure_future(channel.close()))
        declared = await channel.queue_declare(exclusive=True, auto_delete=True)
        await channel.basic_consume(declared.queue or "", self._answered, no_ack=True)
        self._reply_queue = declared.queue
        self._connected.set()
        try:
            await asyncio.wait([lost])
        finally:
            self._reply_queue = None
            self._connected.clear()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Disconnected("the connection was lost while waiting for the reply"))
            self._waiting.clear()

    async def _answered(self, delivery: DeliveredMessage) -> None:
        future = self._waiting.pop(delivery.header.properties.correlation_id or "", None)
        if future is None or future.done():
            return  # its sender has stopped waiting
        try:
            future.set_result(ReplyEnvelope.model_validate_json(delivery.body).replies)
        except ValueError as error:
            future.set_exception(error)

    async def send(
        self, queue: topology.Queue, commands: Sequence[Command], *, timeout_sec: float
    ) -> asyncio.Future[tuple[Reply, ...]]:
        """Publishes one envelope; returns, once RabbitMQ has taken it, what will hold the replies, in order.

        Past `timeout_sec` the future fails with TimeoutError, and RabbitMQ drops the envelope if nobody has
        begun it. Raises Disconnected or Unroutable; the future may fail with Disconnected too.
        """
        if self._reply_queue is None:
            raise Disconnected("not connected to RabbitMQ")
        correlation_id = uuid.uuid4().hex
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Reply, ...]] = loop.create_future()
        self._waiting[correlation_id] = future
        timer = loop.call_later(timeout_sec, _expire, future)
        future.add_done_callback(lambda _: self._forget(correlation_id, timer))
        properties = Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            correlation_id=correlation_id,
            reply_to=self._reply_queue,
            expiration=str(max(1, round(timeout_sec * 1000))),
        )
        try:
            await self._publisher.publish(
                topology.COMMANDS.name,
                queue.name,
                encode_commands(commands),
                properties,
                timeout_sec=min(timeout_sec, PUBLISH_TIMEOUT_SEC),
            )
        except BaseException:
            future.cancel()
            raise
        return future

    def _forget(self, correlation_id: str, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self._waiting.pop(correlation_id, None)

    async def request(self, queue: topology.Queue, command: Command, *, timeout_sec: float) -> Reply:
        """Sends one command, as soon as there is a connection, and waits for its reply.

        Raises Disconnected, Unroutable or TimeoutError.
        """
        async with asyncio.timeout(timeout_sec):
            await self._publisher.wait_connected()
            await self._connected.wait()
            (reply,) = await (await self.send(queue, [command], timeout_sec=timeout_sec))
            return reply


def _expire(future: asyncio.Future[tuple[Reply, ...]]) -> None:
    if not future.done():
        future.set_exception(TimeoutError("no reply in time"))


async def answer(publisher: Publisher, delivery: DeliveredMessage, replies: Sequence[Reply]) -> None:
    """Sends the replies to whoever asked; nobody waiting any more is no error. Raises Disconnected."""
    asked = delivery.header.properties
    if asked.reply_to:
        await publisher.publish(
            "",
            asked.reply_to,
            ReplyEnvelope(replies=tuple(replies)).model_dump_json().encode(),
            Basic.Properties(content_type="application/json", correlation_id=asked.correlation_id),
            mandatory=False,
        )
