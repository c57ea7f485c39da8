"""Ticks: several replicas, one run at a time."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity

from devstack.conditions import wait_until
from sandbox_broker.contract import topology
from sandbox_broker.messaging import ticks
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable

from .shared_harness import PATIENCE_SEC, assert_no_leaks, background_tasks

QUEUE = topology.CLEANUP_TICKS
AT_ONCE = 0
"""A period so short that no tick is early."""


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
async def publisher(clean_queues: str) -> AsyncIterator[Publisher]:
    made = Publisher(clean_queues, "test")
    async with background_tasks(made.run()):
        await made.wait_connected()
        yield made


class Work:
    """Work that counts concurrent runs. Each run continues until `go` is released."""

    def __init__(self) -> None:
        self.begun = 0
        self.at_work = 0
        self.most_at_work = 0
        self.go = asyncio.Semaphore(0)

    async def __call__(self) -> None:
        self.begun += 1
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            await self.go.acquire()
        finally:
            self.at_work -= 1


async def waiting(url: str) -> int:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        declared = await channel.declare_queue(QUEUE.name, passive=True)
        return declared.declaration_result.message_count or 0


async def is_empty(url: str) -> bool:
    return await waiting(url) == 0


async def is_deleted(url: str, queue: str) -> bool:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        try:
            await channel.declare_queue(queue, passive=True)
        except ChannelNotFoundEntity:
            return True
        return False


async def test_replicas_with_slow_work_pile_up_no_ticks_and_no_concurrent_runs(
    clean_queues: str, publisher: Publisher
) -> None:
    work = Work()
    async with background_tasks(
        *(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, work) for _ in range(3)),
        *(ticks.publish_ticks(publisher, QUEUE, 0.005) for _ in range(3)),
    ):
        await wait_until(lambda: work.begun == 1)
        sent = 0

        async def count() -> None:
            nonlocal sent
            for _ in range(50):
                await publisher.publish(topology.TICKS.name, QUEUE.name, b"{}")
                sent += 1

        await count()
        assert await waiting(clean_queues) == 1
        assert (work.begun, work.most_at_work) == (1, 1)
        for number in (2, 3, 4):
            work.go.release()
            await wait_until(lambda number=number: work.begun == number)  # type: ignore[misc]
            assert work.most_at_work == 1
            assert await waiting(clean_queues) <= 1


async def test_many_early_ticks_cause_one_run(clean_queues: str, publisher: Publisher) -> None:
    work = Work()
    work.go.release()
    async with background_tasks(*(ticks.consume_ticks(clean_queues, QUEUE, 3600, work) for _ in range(2))):
        await asyncio.gather(*(publisher.publish(topology.TICKS.name, QUEUE.name, b"{}") for _ in range(1000)))
        await wait_until(lambda: work.begun == 1)
        await wait_until(partial(is_empty, clean_queues))
        await publisher.publish(topology.TICKS.name, QUEUE.name, b"{}")
        assert (work.begun, work.at_work) == (1, 0)


async def test_several_replicas_cause_one_run_per_period(clean_queues: str, publisher: Publisher) -> None:
    begun: list[float] = []

    async def work() -> None:
        begun.append(asyncio.get_running_loop().time())

    async with background_tasks(
        *(ticks.consume_ticks(clean_queues, QUEUE, 0.5, work) for _ in range(3)),
        *(ticks.publish_ticks(publisher, QUEUE, 0.5 / number) for number in (1, 2, 3, 5, 7)),
    ):
        await wait_until(lambda: len(begun) == 5)
    # The first run may start late, so only three of the four periods are certain.
    assert begun[-1] - begun[0] >= 3 * 0.9 * 0.5


async def test_an_outage_is_followed_by_one_run(clean_queues: str, publisher: Publisher) -> None:
    for _ in range(5):  # without a consumer
        await publisher.publish(topology.TICKS.name, QUEUE.name, b"{}")
    work = Work()
    work.go.release()
    async with background_tasks(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, work)):
        await wait_until(lambda: work.begun == 1 and work.at_work == 0)
        assert await waiting(clean_queues) == 0
    assert work.begun == 1


async def test_a_tick_of_a_stopped_worker_is_redelivered(clean_queues: str, publisher: Publisher) -> None:
    first, second = Work(), Work()
    async with background_tasks(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, second)):
        async with background_tasks(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, first)):
            await publisher.publish(topology.TICKS.name, QUEUE.name, b"{}")
            await wait_until(lambda: first.begun + second.begun == 1)
        if first.begun:
            await wait_until(lambda: second.begun == 1)
    async with background_tasks(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, first)):
        await wait_until(lambda: first.begun)


async def is_unroutable(publisher: Publisher) -> bool:
    """Publish a tick. RabbitMQ 3.10 may close a connection that publishes into a queue during its deletion."""
    try:
        await publisher.publish(topology.TICKS.name, QUEUE.name, b"{}")
    except Unroutable:
        return True
    except Disconnected:
        await asyncio.sleep(0.01)  # RabbitMQ 3.10 can close the connection of a publisher to a deleted queue
        return False
    return False


async def test_publishing_continues_while_the_queue_is_missing(clean_queues: str, publisher: Publisher) -> None:
    done = Work()
    async with background_tasks(ticks.publish_ticks(publisher, QUEUE, 0.005)):
        async with await aio_pika.connect(clean_queues) as connection, connection.channel() as channel:
            await channel.queue_delete(QUEUE.name)
            async with asyncio.timeout(PATIENCE_SEC):
                while not await is_unroutable(publisher):
                    await publisher.wait_connected()
        async with background_tasks(
            ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, done)
        ):  # the consumer declares the queue
            await wait_until(lambda: done.begun == 1)


async def test_the_first_tick_waits_for_the_connection(clean_queues: str) -> None:
    made, work = Publisher(clean_queues, "late"), Work()
    async with background_tasks(
        ticks.publish_ticks(made, QUEUE, 3600), ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, work)
    ):
        await asyncio.sleep(0)
        assert not made.connected
        async with background_tasks(made.run()):
            await wait_until(lambda: work.begun == 1)


async def test_failed_work_stops_the_consumer_and_keeps_the_tick(clean_queues: str, publisher: Publisher) -> None:
    async def fail() -> None:
        raise TimeoutError("a mistake, not a lost connection")

    await publisher.publish(topology.TICKS.name, QUEUE.name, b"{}")
    with pytest.raises(TimeoutError, match="a mistake"):
        await asyncio.wait_for(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, fail), 20)
    work = Work()
    async with background_tasks(ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, work)):
        await wait_until(lambda: work.begun == 1)


async def test_a_replaced_queue_is_deleted_after_its_last_consumer(clean_queues: str, publisher: Publisher) -> None:
    """Rolling update: a reaper of the earlier version runs beside a reaper of this version."""
    old = QUEUE.replaces
    assert old is not None
    ran = 0
    old_ticks: asyncio.Queue[object] = asyncio.Queue()

    async def work() -> None:
        nonlocal ran
        ran += 1

    async with await aio_pika.connect(clean_queues) as connection, connection.channel() as channel:
        # With the arguments of the earlier version.
        queue = await channel.declare_queue(
            old,
            durable=True,
            arguments={"x-max-length": 1, "x-overflow": "drop-head", "x-single-active-consumer": True},
        )
        await queue.bind(topology.TICKS.name, old)
        await queue.consume(old_ticks.put, no_ack=True)
        async with background_tasks(
            ticks.consume_ticks(clean_queues, QUEUE, AT_ONCE, work), ticks.publish_ticks(publisher, QUEUE, 0.01)
        ):
            await wait_until(lambda: ran >= 3)
            await publisher.publish(topology.TICKS.name, old, b"{}")
            await old_ticks.get()
            await channel.close()
            await wait_until(partial(is_deleted, clean_queues, old))
            after = ran
            await wait_until(lambda: ran > after)
