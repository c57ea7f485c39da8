"""Fail-over of PostgreSQL: which server the connections of a service use afterwards."""

import asyncio
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from devstack.postgres_pair import PostgresPair
from sandbox_broker.database import connections, primary
from sandbox_broker.database.primary import Primary

from .shared_harness import assert_no_leaks, background_tasks

BOUND_SEC = 10.0
"""The bound of ADR 16."""

pytest_plugins = ("devstack.fixtures",)


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
async def pair(postgres_binaries: None) -> AsyncIterator[PostgresPair]:
    async with PostgresPair() as servers:
        yield servers


async def read(engine: AsyncEngine, sql: str) -> object:
    async with engine.connect() as opened:
        return (await opened.execute(text(sql))).scalar_one()


async def read_until(engine: AsyncEngine, sql: str, expected: object, within_sec: float) -> None:
    async with asyncio.timeout(within_sec):
        while True:
            try:
                if await read(engine, sql) == expected:
                    return
            except connections.CONNECTION_ERRORS:
                pass
            await asyncio.sleep(0.05)


async def execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql)
    finally:
        connection.terminate()


UrlOf = Callable[[PostgresPair], str]


async def test_reads_leave_a_former_primary_that_comes_back(pair: PostgresPair) -> None:
    """The former primary comes first in the URL and still reports itself as a primary."""
    found = Primary(pair.url)
    engine = connections.create_engine(found, pool_size=3, max_overflow=0, statement_timeout_sec=5)
    await execute(pair.url, "CREATE TABLE leases AS SELECT 1 AS number")
    async with background_tasks(found.watch()):
        assert await asyncio.gather(
            *(read(engine, "SELECT count(*) FROM leases, pg_sleep(0.2)") for _ in range(3))
        ) == [1, 1, 1]
        former = pair.primary
        former.freeze()
        await pair.promote()
        await execute(pair.primary.url, "INSERT INTO leases VALUES (2)")
        former.thaw()

        await read_until(engine, "SELECT count(*) FROM leases", 2, BOUND_SEC)
        for _ in range(20):
            assert await asyncio.gather(*(read(engine, "SELECT count(*) FROM leases") for _ in range(3))) == [
                2,
                2,
                2,
            ]
        connection = await asyncpg.connect(former.url)
        assert await connection.fetchval("SELECT count(*) FROM leases") == 1, "the former primary still answers"
        connection.terminate()
    await engine.dispose()


async def test_a_new_service_uses_the_newest_primary(pair: PostgresPair) -> None:
    pair.primary.freeze()
    await pair.promote()
    pair.standby.thaw()
    for _ in range(10):
        connection = await connections.connect(Primary(pair.url), application_name="test", statement_timeout_sec=1)
        assert await connection.fetchval("SHOW port") == str(pair.primary.port)
        connection.terminate()


async def test_a_statement_on_a_frozen_primary_ends_when_the_new_one_is_found(pair: PostgresPair) -> None:
    found = Primary(pair.url)
    opened = await connections.connect(found, application_name="test", statement_timeout_sec=60)
    pair.primary.freeze()
    waiting = asyncio.ensure_future(opened.fetchval("SELECT 1"))
    await pair.promote()
    (await connections.connect(found, application_name="test", statement_timeout_sec=1)).terminate()
    with pytest.raises(connections.CONNECTION_ERRORS):
        await asyncio.wait_for(waiting, primary.HOST_TIMEOUT_SEC)


async def test_a_former_primary_is_refused_while_it_answers_alone(pair: PostgresPair) -> None:
    found = Primary(pair.url)
    pair.primary.freeze()
    await pair.promote()
    pair.standby.thaw()
    (await connections.connect(found, application_name="test", statement_timeout_sec=1)).terminate()
    pair.primary.freeze()
    with pytest.raises(connections.CONNECTION_ERRORS, match="is a former primary"):
        await connections.connect(found, application_name="test", statement_timeout_sec=1)
    assert "is a former primary" in str(await connections.check_connection(connections.create_engine(found)))


async def test_a_standby_is_no_primary(pair: PostgresPair) -> None:
    only = Primary(pair.standby.url)
    with pytest.raises(connections.CONNECTION_ERRORS, match=r"127\.0\.0\.1:\d+ is a standby"):
        await connections.connect(only, application_name="test", statement_timeout_sec=1)
    assert "is a standby" in str(await connections.find_problem(pair.standby.url, patience_sec=0.5))


async def test_a_server_that_hides_its_identity_is_used(pair: PostgresPair) -> None:
    await execute(
        pair.url,
        "CREATE ROLE reader LOGIN PASSWORD 'reader-reader';"
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC",
    )
    url = pair.url.replace(pair.url.partition("://")[2].partition("@")[0], "reader:reader-reader")
    connection = await connections.connect(Primary(url), application_name="test", statement_timeout_sec=1)
    assert await connection.fetchval("SELECT 1") == 1
    connection.terminate()
