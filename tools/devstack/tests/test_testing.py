"""Between two tests everything is removed, whatever services at work are doing."""

import asyncio
from functools import partial

import asyncpg

from devstack.testing import empty


async def until_blocked(who: asyncpg.Connection, by: asyncpg.Connection) -> None:
    blocked = partial(by.fetchval, "SELECT cardinality(pg_blocking_pids($1)) > 0", who.get_server_pid())
    while not await blocked():  # noqa: ASYNC110 (nothing tells us)
        await asyncio.sleep(0.01)


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
        await until_blocked(testing, at_work)
        await at_work.execute("INSERT INTO pool_counts VALUES ('pool', '', 'available', 50)")
    await emptying
    assert await testing.fetchval("SELECT count(*) FROM pool_counts") == 0
    await at_work.close()
    await testing.close()


async def test_a_service_that_holds_us_up_gets_what_we_have_locked(clean_database: str) -> None:
    at_work = await asyncpg.connect(clean_database)
    testing = await asyncpg.connect(clean_database)
    async with at_work.transaction():
        await at_work.execute("SET LOCAL lock_timeout = '900ms'; SELECT FROM dead_letters")
        emptying = asyncio.create_task(empty(testing))
        await until_blocked(testing, at_work)
        await at_work.execute("SELECT FROM sandboxes")
        assert not emptying.done()
    await emptying
    await at_work.close()
    await testing.close()
