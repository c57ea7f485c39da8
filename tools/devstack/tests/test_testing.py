"""Between two tests everything is removed, whatever services at work are doing."""

import asyncio

import asyncpg

from devstack.testing import empty


async def test_what_a_service_writes_while_it_holds_us_up_is_removed(clean_database: str) -> None:
    at_work = await asyncpg.connect(clean_database)
    testing = await asyncpg.connect(clean_database)
    async with at_work.transaction():
        await at_work.execute(
            "INSERT INTO pool_changes (status, stem, number) VALUES ('available', 'sandbox-', 50)"
        )
    async with at_work.transaction():
        await at_work.execute("DELETE FROM pool_changes")
        emptying = asyncio.create_task(empty(testing))
        blocked = "SELECT cardinality(pg_blocking_pids($1)) > 0"
        while not await at_work.fetchval(blocked, testing.get_server_pid()):
            assert not emptying.done()
        await at_work.execute("INSERT INTO pool_counts VALUES ('pool', '', 'available', 50)")
    await emptying
    assert await testing.fetchval("SELECT count(*) FROM pool_counts") == 0
    await at_work.close()
    await testing.close()
