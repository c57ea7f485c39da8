"""Replay of events while the outbox relay publishes some events before others with smaller numbers."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.queries.event_replay import read_events_after
from gateway.routes.admin_events import _format
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary


@pytest.fixture
async def engine(clean_database: str) -> AsyncIterator[AsyncEngine]:
    engine = connections.create_engine(Primary(clean_database))
    yield engine
    await engine.dispose()


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    await connection.execute(
        "INSERT INTO history (sandbox_id, outbox_id, type, occurred_at, data, event_id) "
        "SELECT '7', number, 'sandbox.allocated', now(), '{}', gen_random_uuid() "
        "FROM unnest('{5,900}'::int[]) number"
    )
    yield connection
    await connection.close()


async def read_ids(engine: AsyncEngine) -> list[str]:
    """Return the ids of the server-sent events that a client gets after event 0."""
    replay = await read_events_after(engine, 0)
    assert replay.complete
    return [line for event in replay.events for line in _format(event).decode().splitlines() if line[:3] == "id:"]


async def test_a_client_does_not_continue_after_an_event_that_is_unpublished(
    engine: AsyncEngine, database: asyncpg.Connection
) -> None:
    await database.execute(
        "INSERT INTO outbox (outbox_id, type, subject, data) OVERRIDING SYSTEM VALUE "
        "SELECT number, 'sandbox.stale', '8', '{}' FROM generate_series(40, 50) number"
    )
    assert await read_ids(engine) == ["id: 5", "id: 39"]


async def test_without_unpublished_events_the_id_is_the_sequence(
    engine: AsyncEngine, database: asyncpg.Connection
) -> None:
    assert await read_ids(engine) == ["id: 5", "id: 900"]
    await database.execute(
        "INSERT INTO outbox (outbox_id, type, subject, data) OVERRIDING SYSTEM VALUE "
        "VALUES (901, 'sandbox.stale', '8', '{}')"
    )
    assert await read_ids(engine) == ["id: 5", "id: 900"]
