"""Queue inspection: the number of ready messages and of consumers of a queue.

The inspector declares the queue passively. This needs no management API, and since RabbitMQ 4.3.1 any permission
for the queue. RabbitMQ 4 does not answer while the queue is unreachable, for example a classic queue while its node
is down. The answer arrives when the node is back.
"""

import asyncio
from functools import partial
from typing import NamedTuple

from aio_pika.abc import AbstractConnection
from aiormq.channel import Channel
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from sandbox_broker.messaging.connection import Disconnected, open_channel, translating_errors


class QueueInfo(NamedTuple):
    messages: int
    """Number of ready messages. Delivered and unacknowledged messages are not counted."""
    consumers: int


class QueueUnavailable(Disconnected):
    """RabbitMQ does not answer for this queue in time, the queue does not exist, or the user may not see it."""


class QueueInspector:
    """Inspector of queues over `connection`. Each queue has its own channel, because a channel answers in order: an
    unreachable queue must not delay the inspection of another queue.

    At most one inspection per queue runs. Later callers wait for the same answer, so an unreachable queue costs one
    channel.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._channels: dict[str, Channel] = {}
        self._inspections: dict[str, asyncio.Task[QueueInfo]] = {}

    async def inspect(self, queue: str, *, timeout_sec: float) -> QueueInfo:
        """Return the counts of the queue. Raises QueueUnavailable, or Disconnected if the connection is lost."""
        inspection = self._inspections.get(queue)
        if inspection is None:
            inspection = self._inspections[queue] = asyncio.create_task(self._ask(queue))
            inspection.add_done_callback(partial(self._forget, queue))
        await asyncio.wait([inspection], timeout=timeout_sec)
        if not inspection.done():
            raise QueueUnavailable(f"RabbitMQ does not answer for the queue {queue}")
        if inspection.cancelled():
            raise Disconnected("not connected to RabbitMQ")
        return inspection.result()

    def close(self) -> None:
        """Cancel the running inspections. The channels close with the connection."""
        for inspection in list(self._inspections.values()):
            inspection.cancel()

    async def _ask(self, queue: str) -> QueueInfo:
        try:
            with translating_errors():
                channel = self._channels.get(queue)
                if channel is None or channel.is_closed:
                    channel = self._channels[queue] = await open_channel(self._connection, confirms=False)
                declared = await channel.queue_declare(queue, passive=True)
        except Disconnected as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity | ChannelAccessRefused):
                raise QueueUnavailable(str(error)) from error
            raise
        return QueueInfo(declared.message_count or 0, declared.consumer_count or 0)

    def _forget(self, queue: str, inspection: asyncio.Task[QueueInfo]) -> None:
        del self._inspections[queue]
        if not inspection.cancelled():
            inspection.exception()  # retrieved here, because every caller may have stopped waiting
