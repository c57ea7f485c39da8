"""The counters of the pool: right after every change, whoever makes it, and whatever has been added up."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from allocator import outbox, store

from .allocator_harness import Pool, account, allocate, ask, done, granted, release, sync

BY_SCAN = "SELECT status, count(*)::bigint AS number FROM sandboxes GROUP BY status"
GROUPS_BY_SCAN = """
SELECT 'pool' AS kind, '' AS value, status, count(*)::bigint FROM sandboxes GROUP BY 3
UNION ALL SELECT 'name_prefix', rtrim(name, '0123456789'), status, count(*) FROM sandboxes GROUP BY 2, 3
UNION ALL
SELECT 'track_name', l.track_name, s.status, count(*) FROM sandboxes s JOIN leases l USING (sandbox_id)
WHERE l.track_name IS NOT NULL GROUP BY 2, 3
"""


async def count(pool: Pool) -> None:
    """As the relay does it."""
    await pool.execute(outbox.COUNT)
    await pool.execute(outbox.DROP_ZEROS)


async def rows(pool: Pool, query: str) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in await pool.rows(query)}


async def check(pool: Pool) -> None:
    """What the counters say is what a scan says, before and after they have been added up."""
    expected = await rows(pool, BY_SCAN)
    assert {row for row in await rows(pool, store.COUNT_BY_STATUS) if row[1]} == expected
    await count(pool)
    assert {row for row in await rows(pool, store.COUNT_BY_STATUS) if row[1]} == expected
    assert await rows(pool, "SELECT kind, value, status, number FROM pool_counts") == await rows(
        pool, GROUPS_BY_SCAN
    )
    assert await pool.value("SELECT count(*) FROM pool_changes") == 0


async def test_the_counters_follow_a_sandbox_through_its_life(pool: Pool) -> None:
    writer = await pool.writer()
    await sync(writer, [account(number) for number in range(1, 6)])
    await check(pool)
    replies = await allocate(writer, ask("ann", track="dns"), ask("bob", "sandbox-", track="dns"), ask("cid"))
    await check(pool)
    await release(writer, done(granted(replies[0]).sandbox_id, "ann"))
    await check(pool)
    await pool.execute(
        "UPDATE sandboxes SET status = 'deleted', deleted_at = now() WHERE status = 'pending_deletion'"
    )
    await check(pool)
    await sync(writer, [account(number, name=f"renamed-{number}") for number in range(1, 6)])
    await check(pool)
    await pool.execute("DELETE FROM sandboxes WHERE status = 'deleted'")
    await check(pool)
    await pool.execute("DELETE FROM sandboxes")
    await check(pool)
    assert await pool.value("SELECT count(*) FROM pool_counts") == 0


async def test_what_changes_no_state_is_not_logged(pool: Pool) -> None:
    await pool.fill(3, "pending_deletion")
    await count(pool)
    await pool.execute("UPDATE sandboxes SET deletion_attempts = deletion_attempts + 1")
    assert await pool.value("SELECT count(*) FROM pool_changes") == 0


async def test_a_batch_logs_a_few_rows_however_large_it_is(pool: Pool) -> None:
    await pool.fill(100)
    await count(pool)
    await allocate(await pool.writer(), *(ask(f"student-{place}") for place in range(100)))
    assert await pool.value("SELECT count(*) FROM pool_changes") == 2


async def test_nobody_waits_for_a_transaction_that_has_changed_the_pool_and_is_still_open(pool: Pool) -> None:
    first, second = await pool.fill(2)
    other = await asyncpg.connect(pool.url)
    try:
        async with other.transaction():
            await other.execute("UPDATE sandboxes SET status = 'stale' WHERE sandbox_id = $1", first)
            async with asyncio.timeout(60):
                (reply,) = await allocate(await pool.writer(), ask("ann"))
                await count(pool)
            assert granted(reply).sandbox_id == second
        await check(pool)
    finally:
        await other.close()


@pytest.mark.parametrize("seed", range(3))
async def test_counters_are_exact_while_everyone_changes_the_pool_at_once(pool: Pool, seed: int) -> None:
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

    async def add_up() -> None:
        for _ in range(20):
            await count(pool)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(change(chance.choices(transitions, k=40)))
        group.create_task(add_up())
    await check(pool)
