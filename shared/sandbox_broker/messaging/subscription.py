"""Consumption of a queue in batches.

The delivery callback only stores a delivery. The consumer processes deliveries outside of the callback, in batches,
and acknowledges them in order. Publishers use separate connections, because a resource alarm blocks a connection
that publishes.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Self

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity
from orjson import JSONEncodeError
from pamqp.commands import Basic

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, decode_commands, encode_replies, request_ids_in
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Reply, refuse
from sandbox_broker.messaging.connection import Disconnected, declare, open_channel, translating_errors
from sandbox_broker.messaging.publisher import PUBLISH_TIMEOUT_SEC, Publisher
from sandbox_broker.observability import log_context, metrics

SUBSCRIBE_TIMEOUT_SEC = 5.0

REPLY_RETRY_SEC = 3.0
"""Time limit for publishing a reply. After it, the requester has given up or soon will."""

REPLY_PAUSE_SEC = 0.1

REPLY_CONFIRM_SEC = 1.0
"""Time limit for the confirm of a sent reply. RabbitMQ 4.3 confirms none to a reply queue on a lost node, and the
requesters of the next batch would wait meanwhile."""

NOT_ENCODED = refuse("INTERNAL_ERROR")
"""Sent instead of a reply that cannot be encoded. Its command was carried out, so a retry finds it done."""

PUBLISHED_AT = "published_at"
"""Header with the time of publication in Unix milliseconds, by the clock of the publisher."""

log = structlog.get_logger()


class Subscription:
    """Consumer of one queue in batches. It ends when the channel closes, the queue is deleted, or `end` is called.
    RabbitMQ then returns unacknowledged deliveries to the queue."""

    def __init__(self, channel: Channel, queue: topology.Queue) -> None:
        self._channel = channel
        self._queue = queue.name
        self._wait = metrics.QUEUE_WAIT.labels(queue.name)
        self._inbox: asyncio.Queue[tuple[DeliveredMessage, float] | None] = asyncio.Queue()
        self._ended = False

    @classmethod
    async def open(cls, connection: AbstractConnection, queue: topology.Queue, *, prefetch: int) -> Self:
        """Start consuming. Raises Disconnected, also if only this queue does not answer.

        If the queue is missing, the topology is declared before Disconnected is raised.
        """
        with translating_errors():
            try:
                async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SEC):
                    channel = await open_channel(connection, confirms=False)
                    subscription = cls(channel, queue)
                    channel.closing.add_done_callback(lambda _: subscription.end())
                    channel.on_consumer_cancel_callbacks.add(lambda _: subscription.end())
                    await channel.basic_qos(prefetch_count=prefetch)
                    await channel.basic_consume(queue.name, subscription._deliver)
            except ChannelNotFoundEntity as error:
                await declare(connection)
                raise Disconnected(f"the queue {queue.name} was missing") from error
            except TimeoutError as error:
                raise Disconnected(f"the queue {queue.name} does not answer") from error
        return subscription

    async def _deliver(self, delivery: DeliveredMessage) -> None:
        published_at = (delivery.header.properties.headers or {}).get(PUBLISHED_AT)
        if isinstance(published_at, int):
            self._wait.observe(max(0.0, time.time() - published_at / 1000))
        self._inbox.put_nowait((delivery, asyncio.get_running_loop().time()))

    async def batch(self, limit: int) -> list[DeliveredMessage]:
        """Wait for a delivery and return all stored deliveries, at most `limit`. Empty after the subscription has
        ended.

        Deliveries that expired here are acknowledged and dropped, because their requesters have stopped waiting.
        RabbitMQ drops messages that expire in the queue for the same reason.
        """
        deliveries: list[DeliveredMessage] = []
        while not self._ended and len(deliveries) < limit and (not deliveries or not self._inbox.empty()):
            if (arrived := await self._inbox.get()) is None:
                continue
            delivery, since = arrived
            expiration = delivery.header.properties.expiration
            if expiration and (asyncio.get_running_loop().time() - since) * 1000 > int(expiration):
                for request_ids in log_context.split_by_line(request_ids_in(delivery.body)):
                    log.info("message.expired", queue=self._queue, request_ids=request_ids)
                await self.ack(delivery)
            else:
                deliveries.append(delivery)
        return [] if self._ended else deliveries

    async def ack(self, delivery: DeliveredMessage, *, all_before: bool = False) -> None:
        """Acknowledge this delivery, with `all_before` also all earlier ones. A lost channel is ignored, because
        RabbitMQ redelivers them and their commands are idempotent."""
        await self._settle(self._channel.basic_ack(_tag(delivery), multiple=all_before))

    async def reject(self, delivery: DeliveredMessage) -> None:
        """Reject this delivery, so that RabbitMQ moves it to the dead letters."""
        metrics.DEAD_LETTERED.labels(self._queue).inc()
        await self._settle(self._channel.basic_reject(_tag(delivery), requeue=False))

    async def _settle(self, sending: Awaitable[None]) -> None:
        try:
            with translating_errors():
                async with asyncio.timeout(PUBLISH_TIMEOUT_SEC):
                    await sending
        except Disconnected:
            self.end()

    def end(self) -> None:
        self._ended = True
        self._inbox.put_nowait(None)


def decode_delivery(delivery: DeliveredMessage) -> list[Command | InvalidCommand]:
    """Decode the commands of a delivery. A command that its exchange may not carry becomes an InvalidCommand,
    because its sender may not send it.

    Raises InvalidEnvelope if the body has no list of commands.
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
    assert tag is not None, "only basic.get on an empty queue returns no tag"  # noqa: S101 (for the type checker)
    return tag


def _encode_or_refuse(replies: Sequence[Reply]) -> bytes:
    """Return the body of a reply message, with NOT_ENCODED for each reply that cannot be encoded.

    An exception would end the consumer before its acknowledgement, and again with each redelivery.
    """
    try:
        return encode_replies(replies)
    except JSONEncodeError:
        return encode_replies([reply if _is_encodable(reply) else NOT_ENCODED for reply in replies])


def _is_encodable(reply: Reply) -> bool:
    try:
        encode_replies([reply])
    except JSONEncodeError as error:
        log.error("reply.not_encoded", reply=reply.type, error=str(error))
        return False
    return True


async def publish_replies(publisher: Publisher, delivery: DeliveredMessage, replies: Sequence[Reply]) -> None:
    """Publish the replies; retry for REPLY_RETRY_SEC after a disconnect. A requester that has gone is not an
    error. Requesters drop duplicate replies. A reply without a confirm may have arrived."""
    request = delivery.header.properties
    if not request.reply_to:
        return None
    body = _encode_or_refuse(replies)
    properties = Basic.Properties(content_type="application/json", correlation_id=request.correlation_id)
    try:
        async with asyncio.timeout(REPLY_RETRY_SEC):
            while True:
                try:
                    return await publisher.publish(
                        topology.REPLIES.name,
                        request.reply_to,
                        body,
                        properties,
                        mandatory=False,
                        timeout_sec=REPLY_CONFIRM_SEC,
                    )
                except Disconnected as error:
                    if isinstance(error.__cause__, TimeoutError) and publisher.connected:
                        log.warning("reply.not_confirmed")
                        return None
                    log.info("reply.delayed", error=str(error))
                    await asyncio.sleep(REPLY_PAUSE_SEC)
    except TimeoutError:
        log.warning("reply.lost")  # a retry of the requester gets the same reply
