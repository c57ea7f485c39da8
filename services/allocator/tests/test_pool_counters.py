"""Pool counters: exact after every change and at every stage of the aggregation."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from allocator.background import outbox_relay
from allocator.background.pool_metrics import COUNT_BY_STATUS

from .allocator_harness import (
    Pool,
    account,
    allocate,
    allocate_command,
    granted_lease,
    release,
    release_command,
    sync,
)

BY_SCAN = "SELECT status, count(*)::bigint AS number FROM sandboxes GROUP BY status"
GROUPS_BY_SCAN = """
SELECT 'pool' AS kind, '' AS value, status, count(*)::bigint FROM sandboxes GROUP BY 3
UNION ALL SELECT 'name_prefix', rtrim(name, '0123456789'), status, count(*) FROM sandboxes GROUP BY 2, 3
UNION ALL
SELECT 'track_name', l.track_name, s.status, count(*) FROM sandboxes s JOIN leases l USING (sandbox_id)
WHERE l.track_name IS NOT NULL GROUP BY 2, 3
"""


async def update_counters(pool: Pool) -> None:
    """Aggregate the logged changes like the relay."""
    await pool.execute(outbox_relay.UPDATE_COUNTERS)
    await pool.execute(outbox_relay.DELETE_ZERO_COUNTERS)


async def fetch_rows(pool: Pool, query: str) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in await pool.rows(query)}


async def check_counters(pool: Pool) -> None:
    """Compare the counters with a scan, before and after the aggregation."""
    expected = await fetch_rows(pool, BY_SCAN)
    assert {row for row in await fetch_rows(pool, COUNT_BY_STATUS) if row[1]} == expected
    await update_counters(pool)
    assert {row for row in await fetch_rows(pool, COUNT_BY_STATUS) if row[1]} == expected
    assert await fetch_rows(pool, "SELECT kind, value, status, number FROM pool_counts") == await fetch_rows(
        pool, GROUPS_BY_SCAN
    )
    assert await pool.value("SELECT count(*) FROM pool_changes") == 0


async def test_the_counters_follow_every_status_change(pool: Pool) -> None:
    session = await pool.write_session()
    await sync(session, [account(number) for number in range(1, 6)])
    await check_counters(pool)
    replies = await allocate(
        session,
        allocate_command("ann", track="dns"),
        allocate_command("bob", "sandbox-", track="dns"),
        allocate_command("cid"),
    )
    await check_counters(pool)
    await release(session, release_command(granted_lease(replies[0]).sandbox_id, "ann"))
    await check_counters(pool)
    await pool.execute(
        "UPDATE sandboxes SET status = 'deleted', deleted_at = now() WHERE status = 'pending_deletion'"
    )
    await check_counters(pool)
    await sync(session, [account(number, name=f"renamed-{number}") for number in range(1, 6)])
    await check_counters(pool)
    await pool.execute("DELETE FROM sandboxes WHERE status = 'deleted'")
    await check_counters(pool)
    await pool.execute("DELETE FROM sandboxes")
    await check_counters(pool)
    assert await pool.value("SELECT count(*) FROM pool_counts") == 0


async def test_an_update_without_a_status_change_is_not_logged(pool: Pool) -> None:
    await pool.fill(3, "pending_deletion")
    await update_counters(pool)
    await pool.execute("UPDATE sandboxes SET deletion_attempts = deletion_attempts + 1")
    assert await pool.value("SELECT count(*) FROM pool_changes") == 0


async def test_a_large_batch_logs_few_changes(pool: Pool) -> None:
    await pool.fill(100)
    await update_counters(pool)
    await allocate(await pool.write_session(), *(allocate_command(f"student-{number}") for number in range(100)))
    assert await pool.value("SELECT count(*) FROM pool_changes") == 2


async def test_an_open_transaction_does_not_block_allocation_and_counting(pool: Pool) -> None:
    first, second = await pool.fill(2)
    other = await asyncpg.connect(pool.url)
    try:
        async with other.transaction():
            await other.execute("UPDATE sandboxes SET status = 'stale' WHERE sandbox_id = $1", first)
            async with asyncio.timeout(60):
                (reply,) = await allocate(await pool.write_session(), allocate_command("ann"))
                await update_counters(pool)
            assert granted_lease(reply).sandbox_id == second
        await check_counters(pool)
    finally:
        await other.close()


@pytest.mark.parametrize("seed", range(3))
async def test_the_counters_are_exact_under_concurrent_changes(pool: Pool, seed: int) -> None:
    await pool.fill(200)
    chance = random.Random(seed)
    transitions = [
        ("available", "allocated"),
        ("allocated", "pending_deletion"),
        ("pending_deletion", "deleted"),
        ("available", "stale"),
        ("stale", "available"),
    ]

    async def change(steps: Sequence[tuple[str, str]]) -> None:
        connection = await asyncpg.connect(pool.url)
        try:
            for before, after in steps:
                await connection.execute(
                    "UPDATE sandboxes SET status = $2 WHERE sandbox_id IN (SELECT sandbox_id FROM sandboxes "
                    "WHERE status = $1 ORDER BY random() LIMIT 5 FOR UPDATE SKIP LOCKED)",
                    before,
                    after,
                )
        finally:
            await connection.close()

    async def aggregate() -> None:
        for _ in range(20):
            await update_counters(pool)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(change(chance.choices(transitions, k=40)))
        group.create_task(aggregate())
    await check_counters(pool)
