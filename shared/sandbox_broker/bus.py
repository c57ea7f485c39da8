"""RabbitMQ for the services: batches of deliveries, requests and answers.

The rules, and what each is for:

- Connections are those of `connection.py`: they come back, and what waited for a lost one fails at once.
- Publishing (`publisher.py`) and consuming have connections of their own: a resource alarm blocks only publishers.
- A delivery is only put in line by the callback; the work is done outside it, in batches, and acknowledged in
  order, up to and including the last of the batch.
- Answers come to one exclusive queue per process. A request has a deadline on our side.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Sequence
from typing import Self

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic

from sandbox_broker import metrics, story, topology, tracing
from sandbox_broker.connection import Disconnected, keep_connected, losses, open_channel
from sandbox_broker.messages import (
    Command,
    InvalidCommand,
    Reply,
    ReplyEnvelope,
    decode_commands,
    encode_commands,
    request_ids_in,
)
from sandbox_broker.publisher import PUBLISH_TIMEOUT_SEC, Outgoing, Publisher, Unroutable

__all__ = [
    "PUBLISH_TIMEOUT_SEC",
    "Disconnected",
    "Outgoing",
    "Publisher",
    "Requester",
    "Subscription",
    "Unroutable",
    "answer",
    "decode_delivery",
    "keep_connected",
]


SUBSCRIBE_TIMEOUT_SEC = 5.0
ANSWER_PATIENCE_SEC = 3.0
"""For a reply whose sending failed; then its sender has given up, or soon will."""
ANSWER_PAUSE_SEC = 0.1
PUBLISHED_AT = "published_at"
"""A header: Unix milliseconds, by the clock of who has published the message."""

log = structlog.get_logger()


class Subscription:
    """What RabbitMQ delivers from one queue, in batches, until the channel closes, the queue is deleted, or
    `end` is called. What was delivered and not acknowledged then goes back to the queue."""

    def __init__(self, channel: Channel, queue: topology.Queue) -> None:
        self._channel = channel
        self._queue = queue.name
        self._wait = metrics.QUEUE_WAIT.labels(queue.name)
        self._inbox: asyncio.Queue[tuple[DeliveredMessage, float] | None] = asyncio.Queue()
        self._ended = False

    @classmethod
    async def open(cls, connection: AbstractConnection, queue: topology.Queue, *, prefetch: int) -> Self:
        """Raises Disconnected, also where it is the queue alone that does not answer."""
        with losses():
            try:
                async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SEC):
                    channel = await open_channel(connection, confirms=False)
                    subscription = cls(channel, queue)
                    channel.closing.add_done_callback(lambda _: subscription.end())
                    channel.on_consumer_cancel_callbacks.add(lambda _: subscription.end())
                    await channel.basic_qos(prefetch_count=prefetch)
                    await channel.basic_consume(queue.name, subscription._deliver)
            except TimeoutError as error:
                raise Disconnected(f"the queue {queue.name} does not answer") from error
        return subscription

    async def _deliver(self, delivery: DeliveredMessage) -> None:
        published_at = (delivery.header.properties.headers or {}).get(PUBLISHED_AT)
        if isinstance(published_at, int):
            self._wait.observe(max(0.0, time.time() - published_at / 1000))
        self._inbox.put_nowait((delivery, asyncio.get_running_loop().time()))

    async def batch(self, limit: int) -> list[DeliveredMessage]:
        """All that has gathered, up to `limit`, and at least one; empty once the subscription has ended. What has
        expired in line here is dropped, as RabbitMQ drops what expires in the queue: nobody waits for it."""
        deliveries: list[DeliveredMessage] = []
        while not self._ended and len(deliveries) < limit and (not deliveries or not self._inbox.empty()):
            if (arrived := await self._inbox.get()) is None:
                continue
            delivery, since = arrived
            expiration = delivery.header.properties.expiration
            if expiration and (asyncio.get_running_loop().time() - since) * 1000 > int(expiration):
                for request_ids in story.by_line(request_ids_in(delivery.body)):
                    log.info("message.expired", queue=self._queue, request_ids=request_ids)
                await self.ack(delivery)
            else:
                deliveries.append(delivery)
        return [] if self._ended else deliveries

    async def ack(self, delivery: DeliveredMessage, *, all_before: bool = False) -> None:
        """Acknowledges this delivery, or with it all before it. Where the channel is gone it does nothing:
        RabbitMQ delivers them again, and doing them again changes nothing."""
        await self._settle(self._channel.basic_ack(_tag(delivery), multiple=all_before))

    async def reject(self, delivery: DeliveredMessage) -> None:
        """Sends this delivery to the dead letters."""
        metrics.DEAD_LETTERED.labels(self._queue).inc()
        await self._settle(self._channel.basic_reject(_tag(delivery), requeue=False))

    async def _settle(self, sending: Awaitable[None]) -> None:
        try:
            with losses():
                async with asyncio.timeout(PUBLISH_TIMEOUT_SEC):
                    await sending
        except Disconnected:
            self.end()

    def end(self) -> None:
        self._ended = True
        self._inbox.put_nowait(None)


def decode_delivery(delivery: DeliveredMessage) -> list[Command | InvalidCommand]:
    """Decode the commands of a delivery. A command that its exchange may not carry becomes an InvalidCommand,
    because its sender has no right to it.

    Raise InvalidEnvelope when there is no list of commands.
    """
    exchange = delivery.exchange
    return [
        command
        if isinstance(command, InvalidCommand) or topology.can_carry(exchange, command)
        else InvalidCommand(
            command.model_dump(mode="json"), f"{command.type} may not be sent over the exchange '{exchange}'"
        )
        for command in decode_commands(delivery.body)
    ]


def _tag(delivery: DeliveredMessage) -> int:
    tag = delivery.delivery_tag
    assert tag is not None, "only a basic.get of an empty queue has none"  # noqa: S101 (for the type checker)
    return tag


class Requester:
    """Sends commands and hands out their replies. `run` keeps its reply queue open."""

    def __init__(
        self, url: str, name: str, publisher: Publisher, *, exchange: topology.Exchange = topology.COMMANDS
    ) -> None:
        """`exchange` is that of the sender: see topology."""
        self._url = url
        self._name = f"{name}-replies"
        self._publisher = publisher
        self._exchange = exchange.name
        self._reply_queue: str | None = None
        self._connected = asyncio.Event()
        self._waiting: dict[str, tuple[asyncio.Future[tuple[Reply, ...]], int]] = {}

    @property
    def connected(self) -> bool:
        return self._reply_queue is not None and self._publisher.connected

    async def run(self) -> None:
        await keep_connected(self._url, self._name, self._session)

    async def _session(self, connection: AbstractConnection) -> None:
        with losses():
            channel = await open_channel(connection, confirms=False)
            lost = channel.closing

            def cancelled(_: object) -> None:
                if not lost.done():
                    lost.set_exception(Disconnected("the reply queue was deleted"))

            channel.on_consumer_cancel_callbacks.add(cancelled)
            queue = (await channel.queue_declare(exclusive=True, auto_delete=True)).queue or ""
            await channel.queue_bind(queue, topology.REPLIES.name, routing_key=queue)
            await channel.basic_consume(queue, self._answered, no_ack=True)
            self._reply_queue = queue
            self._connected.set()
            try:
                await lost
            finally:
                self._reply_queue = None
                self._connected.clear()
                for future, _ in self._waiting.values():
                    if not future.done():
                        future.set_exception(Disconnected("the connection was lost while waiting for the reply"))
                self._waiting.clear()

    async def _answered(self, delivery: DeliveredMessage) -> None:
        waiting = self._waiting.pop(delivery.header.properties.correlation_id or "", None)
        if waiting is None or waiting[0].done():
            return  # its sender has stopped waiting
        future, expected = waiting
        try:
            replies = ReplyEnvelope.model_validate_json(delivery.body).replies
            if len(replies) != expected:
                raise ValueError(f"{len(replies)} replies to {expected} commands")  # noqa: TRY301 (it ends like what cannot be read)
            future.set_result(replies)
        except ValueError as error:
            future.set_exception(error)

    async def send(
        self, queue: topology.Queue, commands: Sequence[Command], *, timeout_sec: float
    ) -> asyncio.Future[tuple[Reply, ...]]:
        """Publishes one envelope; returns, once RabbitMQ has taken it, what will hold the replies, in order.

        Past `timeout_sec` the future fails with TimeoutError, and RabbitMQ drops the envelope if nobody has
        begun it. Raises Disconnected or Unroutable; the future may fail with Disconnected too, or with
        ValueError when the reply cannot be understood.
        """
        if self._reply_queue is None:
            raise Disconnected("not connected to RabbitMQ")
        correlation_id = uuid.uuid4().hex
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Reply, ...]] = loop.create_future()
        self._waiting[correlation_id] = (future, len(commands))
        timer = loop.call_later(timeout_sec, _expire, future)
        future.add_done_callback(lambda done: self._forget(correlation_id, timer, done))
        properties = Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            correlation_id=correlation_id,
            reply_to=self._reply_queue,
            headers={PUBLISHED_AT: round(time.time() * 1000)},
            expiration=str(max(1, round(timeout_sec * 1000))),
        )
        try:
            await self._publisher.publish(
                self._exchange,
                queue.name,
                encode_commands(commands),
                properties,
                timeout_sec=min(timeout_sec, PUBLISH_TIMEOUT_SEC),
            )
        except BaseException:  # also when cancelled: nobody waits for a reply to what was not sent
            future.cancel()
            raise
        return future

    def _forget(
        self, correlation_id: str, timer: asyncio.TimerHandle, done: asyncio.Future[tuple[Reply, ...]]
    ) -> None:
        timer.cancel()
        self._waiting.pop(correlation_id, None)
        if not done.cancelled():
            done.exception()  # looked at, or asyncio complains where nobody waits any more

    async def request(self, queue: topology.Queue, command: Command, *, timeout_sec: float) -> Reply:
        """Sends one command, as soon as there is a connection, and waits for its reply. For which request, and
        whether that is traced, the work at hand tells (story.py, tracing.py) where the command itself does not.

        Raises Disconnected, Unroutable or TimeoutError, or ValueError when the reply cannot be understood.
        """
        deadline = asyncio.get_running_loop().time() + timeout_sec
        command = command.model_copy(
            update={
                "request_id": command.request_id or story.request_id(),
                "traceparent": command.traceparent or tracing.traceparent(),
            }
        )
        try:
            async with asyncio.timeout_at(deadline):
                await self._publisher.wait_connected()
                await self._connected.wait()
                left = deadline - asyncio.get_running_loop().time()
                (reply,) = await (await self.send(queue, [command], timeout_sec=left))
                return reply
        except TimeoutError:
            raise TimeoutError(f"no reply in {timeout_sec:g} s") from None


def _expire(future: asyncio.Future[tuple[Reply, ...]]) -> None:
    if not future.done():
        future.set_exception(TimeoutError("no reply in time"))


async def answer(publisher: Publisher, delivery: DeliveredMessage, replies: Sequence[Reply]) -> None:
    """Sends the replies to whoever asked; nobody waiting any more is no error. Again until they have arrived: of
    two answers to one question the second is dropped by who asked."""
    asked = delivery.header.properties
    if not asked.reply_to:
        return None
    body = ReplyEnvelope(replies=tuple(replies)).model_dump_json().encode()
    properties = Basic.Properties(content_type="application/json", correlation_id=asked.correlation_id)
    try:
        async with asyncio.timeout(ANSWER_PATIENCE_SEC):
            while True:
                try:
                    return await publisher.publish(
                        topology.REPLIES.name, asked.reply_to, body, properties, mandatory=False
                    )
                except Disconnected as error:
                    log.info("reply.delayed", error=str(error))
                    await asyncio.sleep(ANSWER_PAUSE_SEC)
    except TimeoutError:
        log.warning("reply.lost")  # its sender asks again, and gets the same
