"""Questions to RabbitMQ about a queue: how many messages wait in it, and how many consumers it has.

A passive declaration is such a question. It needs no right to the queue and no management API. RabbitMQ 4 does
not answer it while the queue cannot be reached, for example a classic queue whose node is down. The answer comes
when the node is back.
"""

import asyncio
from functools import partial
from typing import NamedTuple

from aio_pika.abc import AbstractConnection
from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity

from sandbox_broker.messaging.connection import Disconnected, losses, open_channel


class QueueInfo(NamedTuple):
    messages: int
    """Messages that wait. Delivered and unacknowledged messages are not counted."""
    consumers: int


class QueueUnavailable(Disconnected):
    """RabbitMQ does not answer about this queue in time, or there is no such queue."""


class QueueInspector:
    """Asks about queues over `connection`. Each queue has a channel of its own, because a channel answers its
    questions in order: a queue that does not answer delays no question about another queue.

    At most one question about a queue is open. Later callers wait for the same answer, so a queue that never
    answers costs one channel.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._channels: dict[str, Channel] = {}
        self._questions: dict[str, asyncio.Task[QueueInfo]] = {}

    async def inspect(self, queue: str, *, timeout_sec: float) -> QueueInfo:
        """Raise QueueUnavailable, or Disconnected if the connection is lost."""
        question = self._questions.get(queue)
        if question is None:
            question = self._questions[queue] = asyncio.create_task(self._ask(queue))
            question.add_done_callback(partial(self._forget, queue))
        await asyncio.wait([question], timeout=timeout_sec)
        if not question.done():
            raise QueueUnavailable(f"RabbitMQ gives no answer about the queue {queue}")
        if question.cancelled():
            raise Disconnected("not connected to RabbitMQ")
        return question.result()

    def close(self) -> None:
        """Cancel the open questions. The channels end with the connection."""
        for question in list(self._questions.values()):
            question.cancel()

    async def _ask(self, queue: str) -> QueueInfo:
        try:
            with losses():
                channel = self._channels.get(queue)
                if channel is None or channel.is_closed:
                    channel = self._channels[queue] = await open_channel(self._connection, confirms=False)
                declared = await channel.queue_declare(queue, passive=True)
        except Disconnected as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                raise QueueUnavailable(str(error)) from error
            raise
        return QueueInfo(declared.message_count or 0, declared.consumer_count or 0)

    def _forget(self, queue: str, question: asyncio.Task[QueueInfo]) -> None:
        del self._questions[queue]
        if not question.cancelled():
            question.exception()  # retrieved here, because every caller may have stopped waiting
