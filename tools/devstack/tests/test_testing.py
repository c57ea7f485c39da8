"""Clearing of the tables between tests, while services use the database."""

import asyncio

import asyncpg

from devstack.conditions import wait_until_blocked
from devstack.testing import clear_tables


async def test_rows_inserted_while_the_clearing_waits_are_deleted(clean_database: str) -> None:
    service = await asyncpg.connect(clean_database)
    testing = await asyncpg.connect(clean_database)
    async with service.transaction():
        await service.execute(
            "INSERT INTO pool_changes (status, stem, number) VALUES ('available', 'sandbox-', 50)"
        )
    async with service.transaction():
        await service.execute("DELETE FROM pool_changes")
        clearing = asyncio.create_task(clear_tables(testing))
        await wait_until_blocked(testing, service)
        await service.execute("INSERT INTO pool_counts VALUES ('pool', '', 'available', 50)")
    await clearing
    assert await testing.fetchval("SELECT count(*) FROM pool_counts") == 0
    await service.close()
    await testing.close()


async def test_a_blocking_service_can_lock_further_tables(clean_database: str) -> None:
    service = await asyncpg.connect(clean_database)
    testing = await asyncpg.connect(clean_database)
    async with service.transaction():
        await service.execute("SET LOCAL lock_timeout = '900ms'; SELECT FROM dead_letters")
        clearing = asyncio.create_task(clear_tables(testing))
        await wait_until_blocked(testing, service)
        await service.execute("SELECT FROM sandboxes")
        assert not clearing.done()
    await clearing
    await service.close()
    await testing.close()
