"""What the gateway's metrics say of the queues."""

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from prometheus_client import REGISTRY

from gateway.queues import Queues
from sandbox_broker import topology
from sandbox_broker.bus import Publisher
from sandbox_broker.service import cancel

QUEUE = topology.REAPER_EVENTS.name


@pytest.fixture
async def publisher(clean_queues: str) -> AsyncIterator[Publisher]:
    publisher = Publisher(clean_queues, "test")
    task = asyncio.create_task(publisher.run())
    await publisher.wait_connected()
    yield publisher
    await cancel(task)


@pytest.fixture
async def channel(clean_queues: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(clean_queues) as connection, connection.channel() as channel:
        yield channel


def told(queue: str = QUEUE) -> tuple[float | None, float | None, float | None]:
    """Depth, age and consumers."""
    names = ("broker_queue_depth", "broker_queue_oldest_message_age_seconds", "broker_queue_consumers")
    depth, age, consumers = (REGISTRY.get_sample_value(name, {"queue": queue}) for name in names)
    return depth, age, consumers


async def put(channel: AbstractChannel) -> None:
    await channel.default_exchange.publish(aio_pika.Message(b"{}"), QUEUE)


async def test_every_queue_is_looked_at(publisher: Publisher) -> None:
    await Queues(publisher).look()
    assert {queue.name: told(queue.name) for queue in topology.QUEUES} == dict.fromkeys(
        (queue.name for queue in topology.QUEUES), (0, 0, 0)
    )


async def test_what_waits_and_since_when_and_who_takes_it(publisher: Publisher, channel: AbstractChannel) -> None:
    now = [100.0]
    queues = Queues(publisher, clock=lambda: now[0])
    await queues.look()
    now[0] = 105
    await put(channel)
    await put(channel)
    await queues.look()
    assert told() == (2, 5, 0)
    now[0] = 165
    await queues.look()
    assert told() == (2, 65, 0)

    queue = await channel.get_queue(QUEUE)
    await queue.purge()
    now[0] = 170
    await queues.look()
    assert told() == (0, 0, 0)

    async def leave(_: AbstractIncomingMessage) -> None:
        pass

    await queue.consume(leave)
    await queues.look()
    assert told() == (0, 0, 1)


async def test_of_what_was_there_before_only_the_time_since_then_is_known(
    publisher: Publisher, channel: AbstractChannel
) -> None:
    await put(channel)
    now = [0.0]
    queues = Queues(publisher, clock=lambda: now[0])
    await queues.look()
    assert told() == (1, 0, 0)
    now[0] = 30
    await queues.look()
    assert told() == (1, 30, 0)


async def test_a_queue_that_is_gone_has_no_value_and_hides_no_other(
    publisher: Publisher, channel: AbstractChannel
) -> None:
    queues = Queues(publisher)
    await queues.look()
    await channel.queue_delete(QUEUE)
    await queues.look()
    assert told() == (None, None, None)
    assert told(topology.DEAD_LETTER_QUEUE.name) == (0, 0, 0)


async def test_without_rabbitmq_no_old_value_says_that_all_is_well(publisher: Publisher) -> None:
    await Queues(publisher).look()
    assert told() == (0, 0, 0)
    await Queues(Publisher("amqp://127.0.0.1:1/", "never")).look()
    assert told() == (None, None, None)
