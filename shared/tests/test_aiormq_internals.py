"""Canary for aiormq's internals: with a version that changed them, these tests fail before a service does."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from aiormq.abc import ChannelFrame, DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import ChannelInvalidStateError, DeliveryError
from pamqp.commands import Basic
from pamqp.common import FieldTable

from sandbox_broker.contract import topology
from sandbox_broker.messaging import connection as connection_module
from sandbox_broker.messaging.aiormq_internals import drop, write_publishes
from sandbox_broker.messaging.connection import Disconnected, open_channel, translating_errors
from sandbox_broker.messaging.publisher import OutboundMessage

from .shared_harness import PATIENCE_SEC, open_tcp_proxy

QUEUE = topology.ALLOCATOR_COMMANDS.name
EXCHANGE = topology.COMMANDS.name


@pytest.fixture
async def connection(clean_queues: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(clean_queues) as opened:
        yield opened


@pytest.fixture
async def channel(connection: AbstractConnection) -> Channel:
    return await open_channel(connection, confirms=True)


def write(
    channel: Channel, *bodies: bytes, exchange: str = EXCHANGE, routing_key: str = QUEUE
) -> asyncio.Task[list[asyncio.Future[object]]]:
    messages = [OutboundMessage(routing_key, body, body.decode(), "text/plain") for body in bodies]
    frames = b"".join(message.frames(exchange, channel.number) for message in messages)
    return asyncio.create_task(write_publishes(channel, frames, len(messages)))


async def take_bodies(channel: Channel, count: int) -> list[bytes]:
    bodies: list[bytes] = []
    complete = asyncio.Event()

    async def deliver(delivery: DeliveredMessage) -> None:
        bodies.append(delivery.body)
        if len(bodies) == count:
            complete.set()

    await channel.basic_consume(QUEUE, deliver, no_ack=True)
    async with asyncio.timeout(PATIENCE_SEC):
        await complete.wait()
    return bodies


async def test_own_publishes_and_those_of_the_library_share_one_count(
    connection: AbstractConnection, channel: Channel
) -> None:
    """RabbitMQ confirms the number of a message on its channel. A wrong number confirms another message."""
    async with asyncio.timeout(PATIENCE_SEC):
        await channel.basic_publish(b"1", exchange=EXCHANGE, routing_key=QUEUE)
        assert channel.delivery_tag == 1
        confirms = await write(channel, b"2", b"3", b"4")
        assert list(channel.confirmations) == [2, 3, 4]
        assert channel.delivery_tag == 4
        results = await asyncio.gather(*confirms)
        assert all(isinstance(result, Basic.Ack) for result in results)
        await channel.basic_publish(b"5", exchange=EXCHANGE, routing_key=QUEUE)
    assert (channel.delivery_tag, dict(channel.confirmations)) == (5, {})
    assert await take_bodies(await open_channel(connection, confirms=False), 5) == [b"1", b"2", b"3", b"4", b"5"]


async def test_a_negative_confirm_fails_only_its_message(channel: Channel) -> None:
    limits: FieldTable = {"x-max-length": 1, "x-overflow": "reject-publish"}
    limited = (await channel.queue_declare(exclusive=True, arguments=limits)).queue or ""
    async with asyncio.timeout(PATIENCE_SEC):
        confirms = await write(channel, b"kept", b"refused", routing_key=limited, exchange="")
        await asyncio.wait(confirms)
        results = await asyncio.gather(*confirms, *await write(channel, b"other"), return_exceptions=True)
    assert [type(result) for result in results] == [Basic.Ack, DeliveryError, Basic.Ack]


async def test_an_unsent_publish_does_not_count(channel: Channel) -> None:
    """The write queue is full, and the caller gives up."""
    async with asyncio.timeout(PATIENCE_SEC):
        unsent = write(channel, b"unsent", b"unsent")
        while not channel.write_queue.full():
            channel.write_queue.put_nowait(ChannelFrame(b"", should_close=False))
        await asyncio.sleep(0)  # starts `unsent`
        unsent.cancel()
        await asyncio.wait([unsent])
        assert unsent.cancelled()
        assert (channel.delivery_tag, dict(channel.confirmations)) == (0, {})
        (result,) = await asyncio.gather(*await write(channel, b"sent"))
        assert isinstance(result, Basic.Ack)
        assert result.delivery_tag == 1


async def test_a_closed_channel_refuses_publishes(channel: Channel) -> None:
    await channel.close()
    with pytest.raises(ChannelInvalidStateError):
        await write(channel, b"late")
    with pytest.raises(Disconnected), translating_errors():
        await write(channel, b"late")


async def test_a_silent_node_is_noticed_within_eleven_seconds(clean_queues: str) -> None:
    grace_sec: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def session(opened: AbstractConnection) -> None:
        underlying: Any = opened.transport
        if not grace_sec.done():
            grace_sec.set_result(underlying.connection._Connection__heartbeat_grace_timeout)

    running = asyncio.create_task(connection_module.run_with_reconnect(clean_queues, "silent", session))
    try:
        async with asyncio.timeout(PATIENCE_SEC):
            longest_check_sec = connection_module.HEARTBEAT_SEC // 2
            assert await grace_sec + longest_check_sec <= 11
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_dropped_connection_ends_without_an_answer(clean_queues: str) -> None:
    async with open_tcp_proxy(clean_queues, 5672) as proxy, await aio_pika.connect(proxy.url) as opened:
        lost = (await open_channel(opened, confirms=False)).closing
        proxy.pause()
        drop(opened)
        async with asyncio.timeout(PATIENCE_SEC):
            with pytest.raises(Disconnected), translating_errors():
                await lost
        proxy.resume()
