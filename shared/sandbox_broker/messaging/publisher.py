"""Publisher for RabbitMQ. Each message is confirmed within a time limit. The connection only publishes, because a
resource alarm blocks publishing connections."""

import asyncio
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.channel import Channel
from aiormq.exceptions import DeliveryError, PublishError
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from sandbox_broker.messaging.aiormq_internals import is_blocked, write_publishes
from sandbox_broker.messaging.connection import Disconnected, open_channel, run_with_reconnect, translating_errors
from sandbox_broker.messaging.queue_inspector import QueueInfo, QueueInspector

PUBLISH_TIMEOUT_SEC = 5.0
REFUSED_SEC = 5.0
"""After this time without a confirm, the next nack closes the connection. RabbitMQ 3.10 refuses all messages on a
channel to a quorum queue that was full, if the limit is lifted before the queue has room. A new channel works."""

SILENT_SEC = 4.0
"""After this time without a confirm for a message, the connection is replaced. A channel of RabbitMQ 3.10 can wait
for the former leader of a queue on a lost node, although the queue has a new leader. A new channel works."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class OutboundMessage:
    """A durable message for `Publisher.publish_all`. Its body must not be empty and must fit into one frame."""

    routing_key: str
    body: bytes
    message_id: str
    content_type: str
    hidden_routing_key: str | None = None
    """A further routing key. Its consumers get a copy, and RabbitMQ removes the key from the message."""

    def frames(self, exchange: str, channel: int) -> bytes:
        properties = Basic.Properties(
            content_type=self.content_type,
            delivery_mode=2,
            message_id=self.message_id,
            headers={"BCC": [self.hidden_routing_key]} if self.hidden_routing_key else None,
        )
        header = ContentHeader(properties=properties, body_size=len(self.body))
        return (
            _publish_frame(exchange, self.routing_key, channel)
            + frame.marshal(header, channel)
            + frame.marshal(ContentBody(self.body), channel)
        )


@lru_cache(maxsize=64)
def _publish_frame(exchange: str, routing_key: str, channel: int) -> bytes:
    return frame.marshal(Basic.Publish(exchange=exchange, routing_key=routing_key), channel)


class Unroutable(Exception):
    """No queue is bound for this exchange and routing key."""


class Publisher:
    """Publisher with confirms and its own connection. `run` keeps it connected."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = f"{name}-publish"
        self._channel: Channel | None = None
        self._lost: asyncio.Future[None] | None = None
        """Done at the end of the session."""
        self._inspector: QueueInspector | None = None
        self._connected = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()
        self._confirmed_at = -math.inf
        self._unconfirmed_since = math.inf
        """Time of the first message after the last confirm."""

    @property
    def connected(self) -> bool:
        return self._channel is not None

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def run(self) -> None:
        await run_with_reconnect(self._url, self._name, self._session)

    async def _session(self, connection: AbstractConnection) -> None:
        with translating_errors():
            channel = await open_channel(connection, confirms=True)
            # With separate channels, so that queue inspection does not delay messages.
            inspector = QueueInspector(connection)
            self._channel, self._inspector = channel, inspector
            self._lost = channel.closing
            self._note_confirm()
            self._connected.set()
            try:
                await self._lost
            finally:
                self._channel = self._inspector = None
                inspector.close()
                self._connected.clear()
                # Wake the callers waiting for the writer, because the library does not.
                for limit in self._limits:
                    if not limit.expired():
                        limit.reschedule(0)

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
        """Publish one message and wait for its confirm.

        Raises Disconnected, or Unroutable if `mandatory` is set and no queue is bound.
        """
        if self._channel is None:
            raise Disconnected("not connected to RabbitMQ")
        with translating_errors():
            async with asyncio.timeout(timeout_sec) as limit:
                self._limits.add(limit)
                self._note_publish()
                try:
                    await self._channel.basic_publish(
                        body,
                        exchange=exchange,
                        routing_key=routing_key,
                        properties=properties or Basic.Properties(delivery_mode=2),
                        mandatory=mandatory,
                        wait=False,
                    )
                    self._note_confirm()
                except PublishError as error:
                    self._note_confirm()
                    raise Unroutable(f"no queue for {routing_key!r} on exchange {exchange!r}") from error
                except DeliveryError:
                    await self._refused()
                    raise
                except asyncio.CancelledError:  # the time limit of this function or of the caller
                    self._leave_if_silent()
                    raise
                finally:
                    self._limits.discard(limit)

    async def publish_all(
        self, exchange: str, messages: Sequence[OutboundMessage], *, timeout_sec: float = PUBLISH_TIMEOUT_SEC
    ) -> int:
        """Write all messages in order with one system call, then wait for their confirms.

        Return the number of confirmed leading messages. It is less than all if the connection was lost or
        RabbitMQ refused a message. The messages are not mandatory. Raises Disconnected if no message was written.

        `publish` would use locks, a timer, a task and a system call for each message in the client library.
        """
        if self._channel is None:
            raise Disconnected("not connected to RabbitMQ")
        channel = self._channel
        confirms: list[asyncio.Future[object]] = []
        try:
            with translating_errors():
                async with asyncio.timeout(timeout_sec) as limit:
                    self._limits.add(limit)
                    self._note_publish()
                    try:
                        frames = b"".join(message.frames(exchange, channel.number) for message in messages)
                        confirms = await write_publishes(channel, frames, len(messages))
                        await asyncio.wait(confirms)
                    finally:
                        self._limits.discard(limit)
        except Disconnected:
            if not confirms:
                raise
        confirmed = 0
        for confirm in confirms:
            if not confirm.done() or confirm.cancelled() or confirm.exception() is not None:
                break
            confirmed += 1
        for confirm in confirms[confirmed:]:
            confirm.cancel()
        if confirmed:
            self._note_confirm()
        elif any(_is_refused(confirm) for confirm in confirms):
            await self._refused()
        else:
            self._leave_if_silent()
        return confirmed

    def _note_publish(self) -> None:
        self._unconfirmed_since = min(self._unconfirmed_since, asyncio.get_running_loop().time())

    def _note_confirm(self) -> None:
        self._confirmed_at = asyncio.get_running_loop().time()
        self._unconfirmed_since = math.inf

    def _leave_if_silent(self) -> None:
        """End the session if RabbitMQ has confirmed nothing for SILENT_SEC. A resource alarm is no reason, because
        it blocks every connection."""
        if self._channel is None or self._lost is None or self._lost.done() or is_blocked(self._channel):
            return
        if asyncio.get_running_loop().time() - self._unconfirmed_since >= SILENT_SEC:
            self._lost.set_exception(Disconnected("RabbitMQ does not confirm messages"))

    async def _refused(self) -> None:
        if self._channel is not None and asyncio.get_running_loop().time() - self._confirmed_at > REFUSED_SEC:
            log.warning("rabbitmq.only_refuses", connection=self._name)
            with contextlib.suppress(Disconnected), translating_errors():
                async with asyncio.timeout(PUBLISH_TIMEOUT_SEC):
                    await self._channel.close()

    async def count_consumers(self, queue: str, *, timeout_sec: float = PUBLISH_TIMEOUT_SEC) -> int:
        """Return the number of consumers of the queue. Raises the errors of `inspect_queue`."""
        return (await self.inspect_queue(queue, timeout_sec=timeout_sec)).consumers

    async def inspect_queue(self, queue: str, *, timeout_sec: float = PUBLISH_TIMEOUT_SEC) -> QueueInfo:
        """Return the counts of the queue. Raises QueueUnavailable if RabbitMQ does not answer for this queue or it
        does not exist, and Disconnected without a connection."""
        if self._inspector is None:
            raise Disconnected("not connected to RabbitMQ")
        return await self._inspector.inspect(queue, timeout_sec=timeout_sec)


def _is_refused(confirm: asyncio.Future[object]) -> bool:
    return confirm.done() and not confirm.cancelled() and isinstance(confirm.exception(), DeliveryError)
