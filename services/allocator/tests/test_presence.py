"""Presence of allocators: two of one broker, two of different brokers on one database."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from allocator import metrics
from allocator.background import presence
from allocator.background.presence import Presence
from devstack.conditions import wait_until
from devstack.testing import NewVhost
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.runtime.service import cancel_and_wait

from .allocator_harness import Pool


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "REPORT_SEC", 0.1)


@pytest.fixture(autouse=True)
async def _no_allocators(pool: Pool) -> None:
    await pool.execute("DELETE FROM allocators")


@asynccontextmanager
async def run_presence(amqp_url: str, pool: Pool) -> AsyncIterator[tuple[Presence, "asyncio.Task[None]"]]:
    engine = connections.create_engine(Primary(pool.url), pool_size=1)
    running = Presence(amqp_url, engine)
    task = asyncio.create_task(running.run())
    try:
        yield running, task
    finally:
        await cancel_and_wait(task)
        await engine.dispose()


async def test_allocators_of_one_broker_start_beside_each_other(pool: Pool, amqp_url: str) -> None:
    async with run_presence(amqp_url, pool) as (first, first_task):
        await first.wait_checked()
        async with run_presence(amqp_url, pool) as (second, second_task):
            await second.wait_checked()

            async def have_reported() -> bool:
                return bool(await pool.value("SELECT min(reports) > 10 AND count(*) = 2 FROM allocators"))

            await wait_until(have_reported)
            assert not first_task.done()
            assert not second_task.done()
            assert await pool.value("SELECT max(other_broker_at) FROM allocators") is None
    assert await pool.value("SELECT count(*) FROM allocators") == 0


async def test_an_allocator_starts_after_a_predecessor_that_was_killed(pool: Pool, amqp_url: str) -> None:
    await pool.execute(
        "INSERT INTO allocators (allocator_id, presence_queue) VALUES (gen_random_uuid(), 'amq.gen-of-the-dead')"
    )
    async with run_presence(amqp_url, pool) as (successor, task):
        await successor.wait_checked()
        assert not task.done()


async def test_the_newcomer_of_another_broker_stops_without_a_check(
    pool: Pool, amqp_url: str, new_vhost: NewVhost
) -> None:
    async with new_vhost() as other_amqp_url, run_presence(amqp_url, pool) as (first, first_task):
        await first.wait_checked()
        with capture_logs() as logs:
            async with run_presence(other_amqp_url, pool) as (newcomer, newcomer_task):
                waiting = asyncio.create_task(newcomer.wait_checked())
                await asyncio.wait([newcomer_task], timeout=60)
                assert newcomer_task.done()
                assert newcomer_task.exception() is None
                assert not waiting.done()
                await cancel_and_wait(waiting)

        async def is_noticed() -> bool:
            return bool(await pool.value("SELECT max(other_broker_at) IS NOT NULL FROM allocators"))

        await wait_until(is_noticed)
        assert not first_task.done()
        await wait_until(lambda: metrics.OTHER_BROKER._value.get() == 1)
        levels = {line["log_level"] for line in logs if line["event"] == "allocator.other_broker"}
        assert levels == {"critical", "error"}
    await pool.execute("DELETE FROM allocators")
