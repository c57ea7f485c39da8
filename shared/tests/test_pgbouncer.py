"""PgBouncer with its default settings: the session mode works, the transaction mode is refused."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import text

from devstack.output import Terminal
from devstack.pgbouncer import start_pgbouncer
from sandbox_broker import migrate
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary

from .shared_harness import assert_no_leaks


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


async def test_the_session_mode_works(empty_database_url: str) -> None:
    async with start_pgbouncer(empty_database_url, "session", Terminal()) as pooled:
        await migrate.migrate(pooled)
        assert await connections.find_problem(pooled, patience_sec=5) is None
        engine = connections.create_engine(Primary(pooled), pool_size=2, statement_timeout_sec=1)
        async with engine.connect() as first, engine.connect() as second:
            for opened in (first, second):
                for setting, value in (("statement_timeout", "1s"), ("jit", "off")):
                    assert (await opened.execute(text(f"SHOW {setting}"))).scalar_one() == value
        await engine.dispose()
        dedicated = [
            await connections.connect(Primary(pooled), application_name=name, statement_timeout_sec=1)
            for name in ("one", "two")
        ]
        with pytest.raises(asyncpg.QueryCanceledError):
            await dedicated[0].execute("SELECT pg_sleep(10)")
        assert await dedicated[0].fetchval("SELECT pg_try_advisory_lock(1)")
        assert not await dedicated[1].fetchval("SELECT pg_try_advisory_lock(1)")
        dedicated[0].terminate()
        async with asyncio.timeout(30):
            while not await dedicated[1].fetchval("SELECT pg_try_advisory_lock(1)"):  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.05)
        dedicated[1].terminate()


async def test_the_transaction_mode_is_refused(database_url: str) -> None:
    async with start_pgbouncer(database_url, "transaction", Terminal()) as pooled:
        problem = await connections.find_problem(pooled, patience_sec=5)
        assert problem is not None
        assert problem.endswith(connections.SHARED_SESSIONS)
        with pytest.raises(connections.SharedSessionsError, match="pool_mode = session"):
            await migrate.migrate(pooled)


async def test_a_direct_connection_has_its_own_session(database_url: str) -> None:
    assert await connections.find_problem(database_url, patience_sec=5) is None
