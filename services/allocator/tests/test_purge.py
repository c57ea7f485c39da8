"""Purge of stale sandboxes and expired records."""

import asyncio
from datetime import timedelta
from typing import Literal

import pytest

from allocator.handlers import purge as handlers
from allocator.routing import MAINTENANCE
from allocator.sql import purge as statements
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import DeleteStale, PurgeRecords
from sandbox_broker.contract.replies import Purged

from .allocator_harness import Pool

STATUSES = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")


async def set_status_age(pool: Pool, sandbox_id: str, age: timedelta) -> None:
    await pool.execute(
        "UPDATE sandboxes SET status_since = now() - $2::interval WHERE sandbox_id = $1", sandbox_id, age
    )


async def delete_stale(session: WriteSession, *, hours: float = 24, limit: int = 500) -> int:
    reply = await handlers.delete_stale(session, DeleteStale(stale_for_sec=hours * 3600, limit=limit))
    assert isinstance(reply, Purged)
    return reply.count


async def purge_records(
    session: WriteSession,
    status: Literal["stale", "deletion_failed", "deleted"],
    *,
    days: float = 0,
    limit: int = 500,
) -> int:
    command = PurgeRecords(status=status, for_sec=days * 24 * 3600, limit=limit)
    reply = await handlers.purge_records(session, command)
    assert isinstance(reply, Purged)
    return reply.count


async def test_expired_stale_sandboxes_are_deleted_and_announced(pool: Pool) -> None:
    old, young = await pool.fill(2, "stale")
    for status in STATUSES:
        for other in await pool.fill(1, status):
            await set_status_age(pool, other, timedelta(days=100) if status != "stale" else timedelta())
    await set_status_age(pool, old, timedelta(hours=25))
    await set_status_age(pool, young, timedelta(hours=23))
    session = await pool.write_session()
    assert await delete_stale(session) == 1
    assert (await pool.status(old), await pool.status(young)) == ("deleted", "stale")
    assert await pool.value(
        "SELECT deleted_at > now() - interval '1 minute' FROM sandboxes WHERE sandbox_id = $1", old
    )
    assert await pool.events() == ["sandbox.deleted"]
    assert await delete_stale(session) == 0


async def test_the_history_is_removed_with_the_record(pool: Pool) -> None:
    gone, kept = *(await pool.fill(1, "deleted")), *(await pool.fill(1))
    for sandbox_id in (gone, kept):
        await pool.execute(
            "INSERT INTO history "
            "SELECT $1, number, 'sandbox.discovered', now(), '{}' FROM generate_series(1, 3) number",
            sandbox_id,
        )
    assert await purge_records(await pool.write_session(), "deleted") == 1
    assert await pool.column("SELECT DISTINCT sandbox_id FROM history") == [kept]


async def test_the_purge_runs_in_batches(pool: Pool) -> None:
    ids = await pool.fill(7, "stale")
    for one in ids:
        await set_status_age(pool, one, timedelta(days=2))
    session = await pool.write_session()
    assert [await delete_stale(session, limit=3) for _ in range(4)] == [3, 3, 1, 0]
    assert [await purge_records(session, "deleted", limit=3) for _ in range(4)] == [3, 3, 1, 0]


@pytest.mark.parametrize("status", ["stale", "deletion_failed", "deleted"])
async def test_only_expired_records_of_the_status_are_removed(
    pool: Pool, status: Literal["stale", "deletion_failed", "deleted"]
) -> None:
    for one in STATUSES:
        for sandbox_id in await pool.fill(2, one):
            await set_status_age(pool, sandbox_id, timedelta(days=31))
    (young,) = await pool.fill(1, status)
    await set_status_age(pool, young, timedelta(days=29))
    assert await purge_records(await pool.write_session(), status, days=30) == 2
    statuses = await pool.column("SELECT DISTINCT status FROM sandboxes WHERE sandbox_id <> $1", young)
    assert sorted(statuses) == sorted({*STATUSES} - {status})
    assert await pool.status(young) == status
    assert await pool.events() == []


async def test_the_leases_outlive_the_record(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = 'deleted'")
    assert await purge_records(await pool.write_session(), "deleted") == 1
    assert await pool.column("SELECT sandbox_id FROM leases WHERE end_reason = 'student'") == [sandbox_id]


async def test_concurrent_purges_delete_each_sandbox_once(pool: Pool) -> None:
    await pool.fill(200, "stale")
    sessions = [await pool.write_session() for _ in range(4)]
    assert sum(await asyncio.gather(*(delete_stale(session, hours=0, limit=200) for session in sessions))) <= 200
    while await delete_stale(sessions[0], hours=0):
        pass
    assert len(await pool.events()) == 200


async def test_a_concurrently_restored_sandbox_stays(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1, "stale")
    session, other = await pool.write_session(), await pool.write_session()
    transaction = other.connection.transaction()
    await transaction.start()
    await other.connection.execute("UPDATE sandboxes SET status = 'available'")
    assert await delete_stale(session, hours=0) == 0
    assert await purge_records(session, "stale") == 0
    await transaction.commit()
    assert await pool.status(sandbox_id) == "available"


@pytest.mark.parametrize(
    ("statement", "arguments", "status"),
    [
        (statements.DELETE_STALE, (timedelta(), 500), "stale"),
        (statements.PURGE_RECORDS, ("deleted", timedelta(), 500), "deleted"),
    ],
)
async def test_expired_records_are_looked_up_by_key_whatever_the_statistics(
    pool: Pool, statement: str, arguments: tuple[object, ...], status: str
) -> None:
    await pool.fill(10, status)
    await pool.execute("VACUUM ANALYZE sandboxes")
    await pool.fill(5_000, status)
    session = await pool.write_session(lane=MAINTENANCE)
    plan = await session.connection.fetch(f"EXPLAIN {statement}", session.epoch, *arguments)
    assert any(row[0].strip().startswith("Index Cond: (sandbox_id = ANY (") for row in plan)
