"""What is forgotten, when, and what stays for good."""

import asyncio
from datetime import timedelta
from typing import Literal

import pytest

from allocator import purge as statements
from allocator.handlers import purge as handlers
from allocator.lanes import MAINTENANCE
from allocator.writer import Writer
from sandbox_broker.contract.commands import DeleteStale, PurgeRecords
from sandbox_broker.contract.replies import Purged

from .allocator_harness import Pool

STATES = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")


async def since(pool: Pool, sandbox_id: str, ago: timedelta) -> None:
    await pool.execute(
        "UPDATE sandboxes SET status_since = now() - $2::interval WHERE sandbox_id = $1", sandbox_id, ago
    )


async def delete_stale(writer: Writer, *, hours: float = 24, limit: int = 500) -> int:
    reply = await handlers.delete_stale(writer, DeleteStale(stale_for_sec=hours * 3600, limit=limit))
    assert isinstance(reply, Purged)
    return reply.count


async def purge(
    writer: Writer, status: Literal["stale", "deletion_failed", "deleted"], *, days: float = 0, limit: int = 500
) -> int:
    command = PurgeRecords(status=status, for_sec=days * 24 * 3600, limit=limit)
    reply = await handlers.purge_records(writer, command)
    assert isinstance(reply, Purged)
    return reply.count


async def test_what_has_been_stale_for_long_enough_is_deleted_and_announced(pool: Pool) -> None:
    old, young = await pool.fill(2, "stale")
    for status in STATES:
        for other in await pool.fill(1, status):
            await since(pool, other, timedelta(days=100) if status != "stale" else timedelta())
    await since(pool, old, timedelta(hours=25))
    await since(pool, young, timedelta(hours=23))
    writer = await pool.writer()
    assert await delete_stale(writer) == 1
    assert (await pool.status(old), await pool.status(young)) == ("deleted", "stale")
    assert await pool.value(
        "SELECT deleted_at > now() - interval '1 minute' FROM sandboxes WHERE sandbox_id = $1", old
    )
    assert await pool.events() == ["sandbox.deleted"]
    assert await delete_stale(writer) == 0


async def test_the_history_goes_with_the_record(pool: Pool) -> None:
    gone, kept = *(await pool.fill(1, "deleted")), *(await pool.fill(1))
    for sandbox_id in (gone, kept):
        await pool.execute(
            "INSERT INTO history "
            "SELECT $1, place, 'sandbox.discovered', now(), '{}' FROM generate_series(1, 3) place",
            sandbox_id,
        )
    assert await purge(await pool.writer(), "deleted") == 1
    assert await pool.column("SELECT DISTINCT sandbox_id FROM history") == [kept]


async def test_the_purge_goes_in_pieces(pool: Pool) -> None:
    ids = await pool.fill(7, "stale")
    for one in ids:
        await since(pool, one, timedelta(days=2))
    writer = await pool.writer()
    assert [await delete_stale(writer, limit=3) for _ in range(4)] == [3, 3, 1, 0]
    assert [await purge(writer, "deleted", limit=3) for _ in range(4)] == [3, 3, 1, 0]


@pytest.mark.parametrize("status", ["stale", "deletion_failed", "deleted"])
async def test_only_records_of_the_state_that_are_old_enough_are_forgotten(
    pool: Pool, status: Literal["stale", "deletion_failed", "deleted"]
) -> None:
    for one in STATES:
        for sandbox_id in await pool.fill(2, one):
            await since(pool, sandbox_id, timedelta(days=31))
    (young,) = await pool.fill(1, status)
    await since(pool, young, timedelta(days=29))
    assert await purge(await pool.writer(), status, days=30) == 2
    left = await pool.column("SELECT DISTINCT status FROM sandboxes WHERE sandbox_id <> $1", young)
    assert sorted(left) == sorted({*STATES} - {status})
    assert await pool.status(young) == status
    assert await pool.events() == []


async def test_the_history_outlives_the_record(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = 'deleted'")
    assert await purge(await pool.writer(), "deleted") == 1
    assert await pool.column("SELECT sandbox_id FROM leases WHERE end_reason = 'student'") == [sandbox_id]


async def test_two_purges_at_once_count_everything_once(pool: Pool) -> None:
    await pool.fill(200, "stale")
    writers = [await pool.writer() for _ in range(4)]
    assert sum(await asyncio.gather(*(delete_stale(writer, hours=0, limit=200) for writer in writers))) <= 200
    while await delete_stale(writers[0], hours=0):
        pass
    assert len(await pool.events()) == 200


async def test_what_is_restored_meanwhile_stays(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1, "stale")
    writer, other = await pool.writer(), await pool.writer()
    transaction = other.connection.transaction()
    await transaction.start()
    await other.connection.execute("UPDATE sandboxes SET status = 'available'")
    assert await delete_stale(writer, hours=0) == 0
    assert await purge(writer, "stale") == 0
    await transaction.commit()
    assert await pool.status(sandbox_id) == "available"


@pytest.mark.parametrize(
    ("statement", "arguments", "status"),
    [
        (statements.DELETE_STALE, (timedelta(), 500), "stale"),
        (statements.PURGE_RECORDS, ("deleted", timedelta(), 500), "deleted"),
    ],
)
async def test_old_records_are_looked_up_by_their_keys_whatever_the_statistics_say(
    pool: Pool, statement: str, arguments: tuple[object, ...], status: str
) -> None:
    await pool.fill(10, status)
    await pool.execute("VACUUM ANALYZE sandboxes")
    await pool.fill(5_000, status)
    writer = await pool.writer(lane=MAINTENANCE)
    plan = await writer.connection.fetch(f"EXPLAIN {statement}", writer.epoch, *arguments)
    assert any(row[0].strip().startswith("Index Cond: (sandbox_id = ANY (") for row in plan)
