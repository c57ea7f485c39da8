"""All dependencies on aiormq's internals: how a channel counts, confirms and writes messages, how long a connection
may be silent, and how it is dropped.

shared/pyproject.toml bounds the version of aiormq, and shared/tests/test_aiormq_internals.py fails if one of these
internals changes.
"""

import asyncio

from aio_pika.abc import AbstractConnection
from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from aiormq.connection import Connection

HEARTBEAT_GRACE = 1.5
"""aiormq closes a silent connection after (heartbeat + 1) * HEARTBEAT_GRACE, 9 s with a heartbeat of 5 s. It checks
every 2 s, and RabbitMQ sends a heartbeat every 2.5 s. With aiormq's value of 3, a client of a frozen node waits
20 s."""


def limit_silence() -> None:
    """Set HEARTBEAT_GRACE for new connections of this process."""
    # aiormq has no argument for it. It declares an integer, but only multiplies with it.
    Connection.HEARTBEAT_GRACE_MULTIPLIER = HEARTBEAT_GRACE  # type: ignore[assignment]


def drop(connection: AbstractConnection) -> None:
    """End the connection without waiting for RabbitMQ, like aiormq after a missed heartbeat."""
    underlying = None if connection.transport is None else connection.transport.connection
    if isinstance(underlying, Connection):
        underlying._reader_task.cancel()


def is_blocked(channel: Channel) -> bool:
    """Return whether a resource alarm of RabbitMQ blocks the connection."""
    return not getattr(channel.connection, "_Connection__connection_unblocked").is_set()  # noqa: B009 (for the type checker)


async def write_publishes(channel: Channel, frames: bytes, count: int) -> list[asyncio.Future[object]]:
    """Queue the frames of `count` publishes for the writer as one chunk. Return the futures of their confirms, in
    order."""
    async with channel.lock:
        before = channel.delivery_tag
        confirms = {before + index: channel.loop.create_future() for index in range(1, count + 1)}
        channel.delivery_tag += count
        channel.confirmations.update(confirms)
        try:
            # Blocks while the write queue is full, for example when an alarm blocks the writer.
            await channel.write_queue.put(ChannelFrame(frames, should_close=False))
        except BaseException:  # also after a cancellation: not sent, so RabbitMQ has not counted these messages
            channel.delivery_tag = before
            for tag in confirms:
                channel.confirmations.pop(tag, None)
            raise
    return list(confirms.values())
