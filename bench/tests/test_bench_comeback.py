"""Sandboxes that come into a pool while students take from it."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import asyncpg
import pytest

from bench import comeback, life, pool
from bench.life import Renewed, Sample
from sandbox_broker.bus import Publisher, Requester

SANDBOXES, LEASES = 10, 3


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    await pool.fill(connection, SANDBOXES)
    yield connection
    await pool.truncate_tables(connection)
    await connection.close()


@pytest.fixture
def requester(amqp_url: str) -> Requester:
    """Not connected: these tests ask for nothing."""
    return Requester(amqp_url, "bench", Publisher(amqp_url, "bench"))


async def available(database: asyncpg.Connection) -> int:
    return int(await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'available'"))


async def test_what_students_take_comes_back_with_its_events(database: asyncpg.Connection) -> None:
    stock = comeback.Restocked(database, SANDBOXES, least=SANDBOXES)
    await pool.insert_leases(database, "student", LEASES)
    await stock.step()
    assert await available(database) >= SANDBOXES
    assert await database.fetchval("SELECT count(*) FROM outbox WHERE type = 'sandbox.discovered'") == stock.added
    assert await pool.find_problems(database, sandboxes=stock.sandboxes, promised=LEASES) == ()


async def test_how_few_were_available_is_kept(database: asyncpg.Connection) -> None:
    stock = comeback.Restocked(database, SANDBOXES, least=SANDBOXES)
    await pool.insert_leases(database, "student", LEASES)
    await stock.step()
    await stock.step()
    assert stock.least == SANDBOXES - LEASES


async def test_nothing_comes_where_nothing_is_taken(database: asyncpg.Connection) -> None:
    stock = comeback.Restocked(database, SANDBOXES, least=SANDBOXES)
    await stock.step()
    await stock.step()
    assert (stock.added, await available(database)) == (0, SANDBOXES)


async def test_for_each_sandbox_that_was_released_a_new_one_comes(
    database: asyncpg.Connection, requester: Requester
) -> None:
    await pool.insert_leases(database, "student", LEASES)
    await release(database)
    renewed = Renewed(database, SANDBOXES, requester=requester)
    await renewed.renew()
    assert await available(database) == SANDBOXES
    assert await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'deleted'") == LEASES
    events = await database.fetch("SELECT type, count(*) FROM outbox GROUP BY type ORDER BY type")
    assert [tuple(row) for row in events] == [("sandbox.deleted", LEASES), ("sandbox.discovered", LEASES)]
    assert await pool.find_problems(database, sandboxes=renewed.sandboxes, promised=LEASES) == ()


async def test_a_new_one_comes_also_for_what_another_has_deleted(
    database: asyncpg.Connection, requester: Requester
) -> None:
    await pool.insert_leases(database, "student", LEASES)
    await release(database)
    await database.execute("UPDATE sandboxes SET status = 'deleted' WHERE status = 'pending_deletion'")
    renewed = Renewed(database, SANDBOXES, requester=requester)
    await renewed.catch_up()
    await renewed.catch_up()
    assert (renewed.added, await available(database)) == (LEASES, SANDBOXES)


async def test_one_that_the_reaper_is_just_claiming_is_renewed_when_it_has(
    database: asyncpg.Connection, clean_database: str, requester: Requester
) -> None:
    await pool.insert_leases(database, "student", LEASES)
    await release(database)
    reaper = await asyncpg.connect(clean_database)
    renewed = Renewed(database, SANDBOXES, requester=requester)
    async with reaper.transaction():
        await reaper.execute("""
            UPDATE sandboxes SET deletion_due_at = now() + interval '1 minute'
            WHERE sandbox_id IN (SELECT sandbox_id FROM sandboxes WHERE status = 'pending_deletion' LIMIT 1)
        """)
        renewing = asyncio.create_task(renewed.renew())
        blocked = partial(reaper.fetchval, "SELECT cardinality(pg_blocking_pids($1)) > 0")
        while not (renewing.done() or await blocked(database.get_server_pid())):  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(0.01)
    await renewing
    await reaper.close()
    assert await available(database) == SANDBOXES
    assert await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'deleted'") == LEASES


async def test_a_step_that_fails_ends_what_goes_on_beside_it() -> None:
    async def fail() -> None:
        raise ValueError("the step")

    with pytest.raises(ValueError, match="the step"):
        async with comeback.repeated(0, fail):
            await asyncio.Event().wait()


async def test_a_step_that_has_begun_comes_to_its_end() -> None:
    begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def step() -> None:
        begun.set()
        await may_end.wait()
        ended.set()

    async with comeback.repeated(3600, step):
        await begun.wait()
        may_end.set()
    assert ended.is_set()


def test_the_first_and_the_last_tenth_are_told_apart() -> None:
    # 100 a second until the middle, 50 a second after it.
    samples = [Sample(second, 100 * second, {"server": 80.0}) for second in range(6)]
    samples += [Sample(5 + second, 500 + 50 * second, {"server": 80.0}) for second in range(1, 11)]
    found = life.progress(samples)
    assert (found["first tenth, cycles/s"], found["last tenth, cycles/s"]) == (100.0, 50.0)
    assert found["last tenth ÷ first"] == 0.5


def test_tenths_may_begin_and_end_between_two_looks() -> None:
    samples = [
        Sample(0, 0, {"server": 80.0}),
        Sample(10, 500, {"server": 80.0}),
        Sample(30, 1000, {"server": 80.0}),
    ]
    assert life.progress(samples)["last tenth ÷ first"] == 0.5


def test_memory_at_the_end_is_compared_with_the_middle_for_the_service_that_has_grown_most() -> None:
    samples = [
        Sample(0, 0, {"server": 10.0, "reaper": 10.0}),
        Sample(1, 60, {"server": 100.0, "reaper": 50.0}),
        Sample(2, 100, {"server": 100.0, "reaper": 75.0}),
    ]
    found = life.progress(samples)
    assert (found["reaper MB at the start"], found["reaper MB at the end"]) == (10.0, 75.0)
    assert found["memory at the end ÷ middle"] == 1.5


async def release(database: asyncpg.Connection) -> None:
    """As the allocator does it, for all leases."""
    await database.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")
    await database.execute(
        "UPDATE sandboxes SET status = 'pending_deletion', deletion_due_at = now() WHERE status = 'allocated'"
    )
