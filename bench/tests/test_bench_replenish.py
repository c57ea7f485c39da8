"""Replenishing a pool while students take from it."""

import asyncio

import asyncpg
import pytest

from bench import pool
from bench.replenish import ReplenishedPool, run_periodically

from .conftest import SANDBOXES, count_available

LEASES = 3


async def test_allocated_sandboxes_are_replaced_and_announced(database: asyncpg.Connection) -> None:
    replenished = ReplenishedPool(database, SANDBOXES, min_available=SANDBOXES)
    await pool.insert_leases(database, "student", LEASES)
    await replenished.replenish()
    assert await count_available(database) >= SANDBOXES
    events = await database.fetchval("SELECT count(*) FROM outbox WHERE type = 'sandbox.discovered'")
    assert events == replenished.added
    assert await pool.find_problems(database, sandboxes=replenished.sandboxes, confirmed=LEASES) == ()


async def test_the_minimum_of_available_sandboxes_is_recorded(database: asyncpg.Connection) -> None:
    replenished = ReplenishedPool(database, SANDBOXES, min_available=SANDBOXES)
    await pool.insert_leases(database, "student", LEASES)
    await replenished.replenish()
    await replenished.replenish()
    assert replenished.min_available == SANDBOXES - LEASES


async def test_an_unused_pool_is_not_replenished(database: asyncpg.Connection) -> None:
    replenished = ReplenishedPool(database, SANDBOXES, min_available=SANDBOXES)
    await replenished.replenish()
    await replenished.replenish()
    assert (replenished.added, await count_available(database)) == (0, SANDBOXES)


async def test_a_failing_step_cancels_the_block() -> None:
    async def fail() -> None:
        raise ValueError("the step")

    with pytest.raises(ValueError, match="the step"):
        async with run_periodically(0, fail):
            await asyncio.Event().wait()


async def test_a_step_that_has_begun_is_completed() -> None:
    begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def step() -> None:
        begun.set()
        await may_end.wait()
        ended.set()

    async with run_periodically(3600, step):
        await begun.wait()
        may_end.set()
    assert ended.is_set()
