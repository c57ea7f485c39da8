"""What the gateway's metrics say of the queues."""

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from prometheus_client import REGISTRY

from gateway.queries import queue_metrics
from gateway.queries.queue_metrics import Queues
from sandbox_broker.contract import topology
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.service import cancel_and_wait

from .gateway_harness import Cable, running, until

QUEUE = topology.REAPER_EVENTS.name


@pytest.fixture
async def publisher(clean_queues: str) -> AsyncIterator[Publisher]:
    publisher = Publisher(clean_queues, "test")
    task = asyncio.create_task(publisher.run())
    await publisher.wait_connected()
    yield publisher
    await cancel_and_wait(task)


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


async def test_a_queue_that_does_not_answer_has_no_value_and_hides_no_other(
    clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_metrics, "ANSWER_TIMEOUT_SEC", 1)
    async with Cable.to(clean_queues) as cable:
        publisher = Publisher(cable.url, "test")
        task = asyncio.create_task(publisher.run())
        await publisher.wait_connected()
        queues = Queues(publisher)
        await queues.look()
        assert told() == (0, 0, 0)
        cable.silence(QUEUE)
        for _ in range(2):
            await queues.look()
            assert told() == (None, None, None)
            assert told(topology.DEAD_LETTER_QUEUE.name) == (0, 0, 0)
        assert len(cable.held) == 1, "one question at a time, however often it is asked"
        cable.answer()
        await queues.look()
        assert told() == (0, 0, 0)
        await cancel_and_wait(task)


async def test_a_queue_that_does_not_answer_stops_no_allocation(
    clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ 4 does not answer about a classic queue whose node is down."""
    monkeypatch.setattr(queue_metrics, "PERIOD_SEC", 0.02)
    async with Cable.to(clean_queues) as cable, running(cable.url) as gateway:
        cable.silence(topology.SYNC_TICKS.name)
        await until(lambda: cable.held)
        await gateway.app.state.context.allocator._look()
        assert (await gateway.allocate()).status_code == 201
