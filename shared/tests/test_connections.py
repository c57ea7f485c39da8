"""Connection errors of asyncpg and of the engine, and their distinction from wrong statements."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary

from .shared_harness import TcpProxy, assert_no_leaks, open_tcp_proxy

Query = Callable[[str], Awaitable[object]]


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
async def database_proxy(clean_database: str) -> AsyncIterator[TcpProxy]:
    async with open_tcp_proxy(clean_database, 5432) as line:
        yield line


@pytest.fixture
async def engine(database_proxy: TcpProxy) -> AsyncIterator[AsyncEngine]:
    created = connections.create_engine(
        Primary(database_proxy.url), statement_timeout_sec=1, pool_size=1, max_overflow=0, pool_timeout=0.2
    )
    yield created
    await created.dispose()


@pytest.fixture(params=["asyncpg", "engine"])
async def query(
    request: pytest.FixtureRequest, engine: AsyncEngine, database_proxy: TcpProxy
) -> AsyncIterator[Query]:
    if request.param == "asyncpg":
        connection = await connections.connect(
            Primary(database_proxy.url), application_name="test", statement_timeout_sec=1
        )
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
            pid = await admin.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
                " AND query LIKE 'SELECT pg_sleep%'"
            )
            if pid is not None:
                return int(pid)


async def test_a_terminated_backend_is_a_connection_error(query: Query, admin: asyncpg.Connection) -> None:
    running = asyncio.ensure_future(query("SELECT pg_sleep(10)"))
    await admin.execute("SELECT pg_terminate_backend($1)", await wait_for_sleeper(admin))
    with pytest.raises(connections.CONNECTION_ERRORS):
        await running


async def test_every_server_error_on_connect_is_a_connection_error(clean_database: str) -> None:
    refused = f"{clean_database}?no_such_setting=1"
    with pytest.raises(connections.CONNECTION_ERRORS, match="no_such_setting"):
        await connections.connect(Primary(refused), application_name="test", statement_timeout_sec=1)
    engine = connections.create_engine(Primary(refused))
    with pytest.raises(connections.CONNECTION_ERRORS, match="no_such_setting"):
        await engine.connect()
    assert "no_such_setting" in (await connections.check_connection(engine) or "")
    await engine.dispose()
    assert "no_such_setting" in (await connections.find_problem(refused, patience_sec=60) or "")


async def test_a_reset_connection_is_a_connection_error(
    query: Query, admin: asyncpg.Connection, database_proxy: TcpProxy
) -> None:
    running = asyncio.ensure_future(query("SELECT pg_sleep(10)"))
    await wait_for_sleeper(admin)
    database_proxy.reset()
    with pytest.raises(connections.CONNECTION_ERRORS):
        await running


async def test_a_slow_statement_is_cancelled(query: Query) -> None:
    with pytest.raises(connections.CONNECTION_ERRORS, match="statement timeout"):
        await query("SELECT pg_sleep(10)")


async def test_an_unresponsive_database_times_out(query: Query, database_proxy: TcpProxy) -> None:
    await query("SELECT 1")
    database_proxy.pause()
    async with asyncio.timeout(30):
        with pytest.raises(connections.CONNECTION_ERRORS):
            await query("SELECT 1")
    database_proxy.resume()


@pytest.mark.parametrize("sql", ["SELECT nonsense", "SELECT 1/0", "SELEKT", "SELECT 'x'::int"])
async def test_a_wrong_statement_is_not_a_connection_error(query: Query, sql: str) -> None:
    with pytest.raises(asyncpg.PostgresError) as raised:
        await query(sql)
    assert not isinstance(raised.value, connections.CONNECTION_ERRORS)


async def test_an_invalid_value_is_not_a_connection_error(admin: asyncpg.Connection) -> None:
    for value in ("a\0b", "a\ud800b", 7):
        with pytest.raises(asyncpg.DataError) as raised:
            await admin.fetch("SELECT $1::text", value)
        assert not isinstance(raised.value, connections.CONNECTION_ERRORS)


async def test_the_engine_replaces_lost_connections(
    engine: AsyncEngine, database_proxy: TcpProxy, admin: asyncpg.Connection
) -> None:
    for _ in range(3):
        assert await connections.check_connection(engine) is None
        database_proxy.reset()
        assert await connections.check_connection(engine) is None
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def test_an_exhausted_pool_is_a_connection_error(engine: AsyncEngine) -> None:
    async with engine.connect() as held:
        await held.execute(text("SELECT 1"))
        with pytest.raises(connections.CONNECTION_ERRORS):
            async with engine.connect():
                pass


async def test_asyncpg_parses_the_options_of_the_url(clean_database: str) -> None:
    engine = connections.create_engine(Primary(f"{clean_database}?sslmode=prefer"))
    try:
        assert await connections.check_connection(engine) is None
    finally:
        await engine.dispose()


async def test_check_connection_reports_a_missing_server() -> None:
    engine = connections.create_engine(Primary("postgresql://anna:hunter2@127.0.0.1:1/x"))
    problem = await connections.check_connection(engine)
    assert problem is not None
    assert "hunter2" not in problem
    await engine.dispose()
