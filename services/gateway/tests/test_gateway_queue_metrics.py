"""Tests of queue_metrics.py against RabbitMQ."""

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from prometheus_client import REGISTRY

from devstack.conditions import wait_until
from gateway.queries import queue_metrics
from gateway.queries.queue_metrics import QueueMetrics
from sandbox_broker.contract import topology
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.service import cancel_and_wait

from .gateway_harness import Cable, running

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


def gauges(queue: str = QUEUE) -> tuple[float | None, float | None, float | None]:
    """Return depth, age in seconds, and consumers."""
    names = ("broker_queue_depth", "broker_queue_oldest_message_age_seconds", "broker_queue_consumers")
    depth, age, consumers = (REGISTRY.get_sample_value(name, {"queue": queue}) for name in names)
    return depth, age, consumers


async def publish(channel: AbstractChannel) -> None:
    await channel.default_exchange.publish(aio_pika.Message(b"{}"), QUEUE)


async def test_all_queues_have_gauges(publisher: Publisher) -> None:
    await QueueMetrics(publisher).measure()
    assert {queue.name: gauges(queue.name) for queue in topology.QUEUES} == dict.fromkeys(
        (queue.name for queue in topology.QUEUES), (0, 0, 0)
    )


async def test_depth_age_and_consumers(publisher: Publisher, channel: AbstractChannel) -> None:
    now = [100.0]
    metrics = QueueMetrics(publisher, clock=lambda: now[0])
    await metrics.measure()
    now[0] = 105
    await publish(channel)
    await publish(channel)
    await metrics.measure()
    assert gauges() == (2, 5, 0)
    now[0] = 165
    await metrics.measure()
    assert gauges() == (2, 65, 0)

    queue = await channel.get_queue(QUEUE)
    await queue.purge()
    now[0] = 170
    await metrics.measure()
    assert gauges() == (0, 0, 0)

    async def ignore(_: AbstractIncomingMessage) -> None:
        pass

    await queue.consume(ignore)
    await metrics.measure()
    assert gauges() == (0, 0, 1)


async def test_age_of_earlier_messages_counts_from_the_first_measurement(
    publisher: Publisher, channel: AbstractChannel
) -> None:
    await publish(channel)
    now = [0.0]
    metrics = QueueMetrics(publisher, clock=lambda: now[0])
    await metrics.measure()
    assert gauges() == (1, 0, 0)
    now[0] = 30
    await metrics.measure()
    assert gauges() == (1, 30, 0)


async def test_deleted_queue_has_no_gauges_and_does_not_affect_others(
    publisher: Publisher, channel: AbstractChannel
) -> None:
    metrics = QueueMetrics(publisher)
    await metrics.measure()
    await channel.queue_delete(QUEUE)
    await metrics.measure()
    assert gauges() == (None, None, None)
    assert gauges(topology.DEAD_LETTER_QUEUE.name) == (0, 0, 0)


async def test_gauges_are_removed_without_rabbitmq(publisher: Publisher) -> None:
    await QueueMetrics(publisher).measure()
    assert gauges() == (0, 0, 0)
    await QueueMetrics(Publisher("amqp://127.0.0.1:1/", "never")).measure()
    assert gauges() == (None, None, None)


async def test_queue_without_an_answer_has_no_gauges_and_does_not_affect_others(
    clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_metrics, "ANSWER_TIMEOUT_SEC", 1)
    async with Cable.to(clean_queues) as cable:
        publisher = Publisher(cable.url, "test")
        task = asyncio.create_task(publisher.run())
        await publisher.wait_connected()
        metrics = QueueMetrics(publisher)
        await metrics.measure()
        assert gauges() == (0, 0, 0)
        cable.silence(QUEUE)
        for _ in range(2):
            await metrics.measure()
            assert gauges() == (None, None, None)
            assert gauges(topology.DEAD_LETTER_QUEUE.name) == (0, 0, 0)
        assert len(cable.held) == 1, "at most one question per queue is open"
        cable.answer()
        await metrics.measure()
        assert gauges() == (0, 0, 0)
        await cancel_and_wait(task)


async def test_queue_without_an_answer_does_not_stop_allocations(
    clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ 4 does not answer questions about a classic queue while its node is down."""
    monkeypatch.setattr(queue_metrics, "PERIOD_SEC", 0.02)
    async with Cable.to(clean_queues) as cable, running(cable.url) as gateway:
        cable.silence(topology.SYNC_TICKS.name)
        await wait_until(lambda: cable.held)
        await gateway.app.state.context.allocator._refresh_presence()
        assert (await gateway.allocate()).status_code == 201
