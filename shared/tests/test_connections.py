"""What a lost database looks like, through asyncpg and through the engine; and that a mistake looks different."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from sandbox_broker.database import connections

from .shared_harness import Line, line_to, nothing_stays

Query = Callable[[str], Awaitable[object]]


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    async with nothing_stays():
        yield


@pytest.fixture
async def database_line(clean_database: str) -> AsyncIterator[Line]:
    async with line_to(clean_database, 5432) as line:
        yield line


@pytest.fixture
async def engine(database_line: Line) -> AsyncIterator[AsyncEngine]:
    created = connections.create_engine(
        database_line.url, statement_timeout_sec=1, pool_size=1, max_overflow=0, pool_timeout=0.2
    )
    yield created
    await created.dispose()


@pytest.fixture(params=["asyncpg", "engine"])
async def query(request: pytest.FixtureRequest, engine: AsyncEngine, database_line: Line) -> AsyncIterator[Query]:
    if request.param == "asyncpg":
        connection = await connections.connect(database_line.url, application_name="test", statement_timeout_sec=1)
        yield connection.fetch
        connection.terminate()
        return

    async def execute(sql: str) -> object:
        async with engine.connect() as opened:
            return (await opened.execute(text(sql))).all()

    yield execute


@pytest.fixture
async def admin(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


async def wait_for_sleeper(admin: asyncpg.Connection) -> int:
    async with asyncio.timeout(30):
        while True:
            found = await admin.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
                " AND query LIKE 'SELECT pg_sleep%'"
            )
            if found is not None:
                return int(found)


async def test_a_backend_that_is_ended_is_a_lost_connection(query: Query, admin: asyncpg.Connection) -> None:
    running = asyncio.ensure_future(query("SELECT pg_sleep(10)"))
    await admin.execute("SELECT pg_terminate_backend($1)", await wait_for_sleeper(admin))
    with pytest.raises(connections.CONNECTION_ERRORS):
        await running


async def test_whatever_the_server_says_to_who_connects_is_a_lost_connection(clean_database: str) -> None:
    refused = f"{clean_database}?no_such_setting=1"
    with pytest.raises(connections.CONNECTION_ERRORS, match="no_such_setting"):
        await connections.connect(refused, application_name="test", statement_timeout_sec=1)
    engine = connections.create_engine(refused)
    with pytest.raises(connections.CONNECTION_ERRORS, match="no_such_setting"):
        await engine.connect()
    assert "no_such_setting" in (await connections.check_connection(engine) or "")
    await engine.dispose()
    assert "no_such_setting" in (await connections.find_problem(refused, patience_sec=60) or "")


async def test_a_line_that_is_cut_is_a_lost_connection(
    query: Query, admin: asyncpg.Connection, database_line: Line
) -> None:
    running = asyncio.ensure_future(query("SELECT pg_sleep(10)"))
    await wait_for_sleeper(admin)
    database_line.cut()
    with pytest.raises(connections.CONNECTION_ERRORS):
        await running


async def test_a_statement_that_takes_too_long_is_ended(query: Query) -> None:
    with pytest.raises(connections.CONNECTION_ERRORS, match="statement timeout"):
        await query("SELECT pg_sleep(10)")


async def test_a_database_that_falls_silent_is_given_up(query: Query, database_line: Line) -> None:
    await query("SELECT 1")
    database_line.silence()
    async with asyncio.timeout(30):
        with pytest.raises(connections.CONNECTION_ERRORS):
            await query("SELECT 1")
    database_line.speak()


@pytest.mark.parametrize("sql", ["SELECT nonsense", "SELECT 1/0", "SELEKT", "SELECT 'x'::int"])
async def test_a_mistake_is_no_lost_connection(query: Query, sql: str) -> None:
    with pytest.raises(asyncpg.PostgresError) as raised:
        await query(sql)
    assert not isinstance(raised.value, connections.CONNECTION_ERRORS)


async def test_a_value_that_does_not_fit_is_no_lost_connection(admin: asyncpg.Connection) -> None:
    for value in ("a\0b", "a\ud800b", 7):
        with pytest.raises(asyncpg.DataError) as raised:
            await admin.fetch("SELECT $1::text", value)
        assert not isinstance(raised.value, connections.CONNECTION_ERRORS)


async def test_the_engine_replaces_connections_that_were_lost(
    engine: AsyncEngine, database_line: Line, admin: asyncpg.Connection
) -> None:
    for _ in range(3):
        assert await connections.check_connection(engine) is None
        database_line.cut()
        assert await connections.check_connection(engine) is None
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def test_a_pool_with_no_connection_left_does_not_answer(engine: AsyncEngine) -> None:
    async with engine.connect() as held:
        await held.execute(text("SELECT 1"))
        with pytest.raises(connections.CONNECTION_ERRORS):
            async with engine.connect():
                pass


async def test_an_option_in_the_url_is_asyncpgs_business(clean_database: str) -> None:
    engine = connections.create_engine(f"{clean_database}?sslmode=prefer")
    try:
        assert await connections.check_connection(engine) is None
    finally:
        await engine.dispose()


async def test_a_server_that_is_not_there_is_told_by_ping() -> None:
    engine = connections.create_engine("postgresql://anna:hunter2@127.0.0.1:1/x")
    problem = await connections.check_connection(engine)
    assert problem is not None
    assert "hunter2" not in problem
    await engine.dispose()
