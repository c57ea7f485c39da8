"""Database fixture and SQL helper of the pool tests."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from bench import pool

SANDBOXES = 10


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    """Connection to a migrated database with ten available sandboxes."""
    connection = await asyncpg.connect(clean_database)
    await pool.fill(connection, SANDBOXES)
    yield connection
    await pool.truncate_tables(connection)
    await connection.close()


async def count_available(database: asyncpg.Connection) -> int:
    return int(await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'available'"))
