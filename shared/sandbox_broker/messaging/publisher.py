"""Publisher for RabbitMQ. Each message is confirmed within a time limit. The connection only publishes, because a
resource alarm blocks publishing connections."""

import asyncio
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.channel import Channel
from aiormq.exceptions import DeliveryError, PublishError
from pamqp import frame
from pamqp.commands import Basic
from pamqp.constants import FRAME_BODY, FRAME_END_CHAR, FRAME_HEADER_SIZE
from pamqp.header import ContentHeader

from sandbox_broker.messaging.aiormq_internals import is_blocked, write_publishes
from sandbox_broker.messaging.connection import (
    Disconnected,
    leave_other_nodes,
    open_channel,
    run_with_reconnect,
    translating_errors,
)
from sandbox_broker.messaging.queue_inspector import QueueInfo, QueueInspector

PUBLISH_TIMEOUT_SEC = 5.0
REFUSED_SEC = 2.5
"""Time after which a refused message has the connection replaced, unless RabbitMQ confirms another message to the
same destination. A channel of RabbitMQ 3.10 refuses all messages to a queue in two cases. Its first message to the
queue came between the loss of the leader and the election: then the channel asks the lost node until that is back.
Or the queue was full, and its limit was lifted before it had room. A new channel works.

Longer than MAX_BACKOFF_SEC, so that the next connection is opened at once."""

SILENT_SEC = 5.0
"""The same for a message without an answer. A channel of RabbitMQ 3.10 can wait for the former leader of a queue on
a lost node, although the queue has a new leader. A new channel works."""

CHECK_PERIOD_SEC = 0.5

GATHER_SEC = 10.0
"""Period in which the other connections of the process follow the publisher to its node, if that confirms messages.
They may have connected to another node while this one was slow."""

Destination = tuple[str, str]
"""Exchange and routing key. The key is empty for messages that are not mandatory: a reply queue on a lost node may
confirm none, but all other reply queues do."""

log = structlog.get_logger()


class OutboundMessage(NamedTuple):
    """A durable message for `Publisher.publish_all`. Its body must not be empty and must fit into one frame."""

    routing_key: str
    body: bytes
    message_id: str
    """ASCII, not empty."""
    content_type: str
    hidden_routing_key: str | None = None
    """A further routing key. Its consumers get a copy, and RabbitMQ removes the key from the message."""

    def frames(self, exchange: str, channel: int) -> bytes:
        """Return the three frames of the message. pamqp renders most of them once per kind of message. For each
        message, it would take ten times as long."""
        before_size, before_id, after_id = _split_header(
            self.content_type, self.hidden_routing_key, len(self.message_id), channel
        )
        size = len(self.body)
        return b"".join(
            (
                _publish_frame(exchange, self.routing_key, channel),
                before_size,
                size.to_bytes(_SIZE_BYTES),
                before_id,
                self.message_id.encode("ascii"),
                after_id,
                _FRAME_HEADER.pack(FRAME_BODY, channel, size),
                self.body,
                FRAME_END_CHAR,
            )
        )


_SIZE_BYTES = 8
_SIZE_AT = FRAME_HEADER_SIZE + 4
"""Start of the size of the body in a header frame, after the class and the weight."""
_FRAME_HEADER = struct.Struct(">BHI")


@lru_cache(maxsize=64)
def _publish_frame(exchange: str, routing_key: str, channel: int) -> bytes:
    return frame.marshal(Basic.Publish(exchange=exchange, routing_key=routing_key), channel)


@lru_cache(maxsize=64)
def _split_header(
    content_type: str, hidden_routing_key: str | None, id_length: int, channel: int
) -> tuple[bytes, bytes, bytes]:
    """Return the header frame without the size of the body and the message id, split where they belong."""
    placeholder = "\0" * id_length
    properties = Basic.Properties(
        content_type=content_type,
        delivery_mode=2,
        message_id=placeholder,
        headers={"BCC": [hidden_routing_key]} if hidden_routing_key else None,
    )
    header = frame.marshal(ContentHeader(properties=properties, body_size=0), channel)
    # The message id is the last property.
    before_id, _, after_id = header[_SIZE_AT + _SIZE_BYTES :].rpartition(placeholder.encode())
    return header[:_SIZE_AT], before_id, after_id


class Unroutable(Exception):
    """No queue is bound for this exchange and routing key."""


class Publisher:
    """Publisher with confirms and its own connection. `run` keeps it connected."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = f"{name}-publish"
        self._channel: Channel | None = None
        self._inspector: QueueInspector | None = None
        self._connected = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()
        self._deadlines: dict[Destination, float] = {}
        """Destinations without a confirm, with the time of the event loop at which the connection is replaced."""
        self._has_confirm = False
        """Whether RabbitMQ has confirmed a mandatory message on this connection since the last gathering."""

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
            self._deadlines.clear()
            self._has_confirm = False
            lost = channel.closing
            now = asyncio.get_running_loop().time
            gather_at = now()
            self._connected.set()
            try:
                while not lost.done():
                    self._check_deadlines(channel)
                    if self._has_confirm and now() >= gather_at:
                        leave_other_nodes(self._url, connection)
                        self._has_confirm, gather_at = False, now() + GATHER_SEC
                    await asyncio.wait([lost], timeout=CHECK_PERIOD_SEC)
                await lost
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
        destination = (exchange, routing_key if mandatory else "")
        with translating_errors():
            async with asyncio.timeout(timeout_sec) as limit:
                self._limits.add(limit)
                self._expect_confirm(destination, SILENT_SEC)
                try:
                    await self._channel.basic_publish(
                        body,
                        exchange=exchange,
                        routing_key=routing_key,
                        properties=properties or Basic.Properties(delivery_mode=2),
                        mandatory=mandatory,
                        wait=False,
                    )
                    self._deadlines.pop(destination, None)
                    self._has_confirm |= mandatory
                except PublishError as error:
                    self._deadlines.pop(destination, None)
                    raise Unroutable(f"no queue for {routing_key!r} on exchange {exchange!r}") from error
                except DeliveryError:
                    self._expect_confirm(destination, REFUSED_SEC)
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
        destination = (exchange, "")
        confirms: list[asyncio.Future[object]] = []
        try:
            with translating_errors():
                async with asyncio.timeout(timeout_sec) as limit:
                    self._limits.add(limit)
                    self._expect_confirm(destination, SILENT_SEC)
                    try:
                        frames = b"".join(message.frames(exchange, channel.number) for message in messages)
                        confirms = await write_publishes(channel, frames, len(messages))
                        for confirm in confirms:  # RabbitMQ confirms many at once, so few of them are waited for
                            if not confirm.done():
                                await asyncio.wait([confirm])
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
            self._deadlines.pop(destination, None)
        elif any(_is_refused(confirm) for confirm in confirms):
            self._expect_confirm(destination, REFUSED_SEC)
        return confirmed

    def _expect_confirm(self, destination: Destination, within_sec: float) -> None:
        """Have the connection replaced after this time, unless RabbitMQ confirms a message to the destination. An
        earlier deadline stays."""
        deadline = asyncio.get_running_loop().time() + within_sec
        self._deadlines[destination] = min(deadline, self._deadlines.get(destination, deadline))

    def _check_deadlines(self, channel: Channel) -> None:
        """Raise Disconnected if a destination is without a confirm for too long. A resource alarm is no reason,
        because it blocks every connection."""
        if is_blocked(channel):
            self._deadlines.clear()
        now = asyncio.get_running_loop().time()
        for (exchange, routing_key), deadline in self._deadlines.items():
            if deadline <= now:
                raise Disconnected(f"RabbitMQ confirms no message to {routing_key or exchange}")

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
