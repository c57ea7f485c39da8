"""Deletions: claimed by one reaper at a time, recorded once, and final."""

import asyncio

import pytest

from allocator.handlers import Writer, claim_deletions, record_deletion, record_deletion_failure
from sandbox_broker.messages import (
    ClaimDeletions,
    DeletionsClaimed,
    DueDeletion,
    RecordDeletion,
    RecordDeletionFailure,
    Recorded,
)

from .allocator_harness import Pool, account, allocate, apply, ask, begin, refusal, stage, sync


async def claim(writer: Writer, *, limit: int = 100, claim_sec: float = 60) -> list[DueDeletion]:
    reply = await claim_deletions(writer, ClaimDeletions(limit=limit, claim_sec=claim_sec))
    assert isinstance(reply, DeletionsClaimed)
    return list(reply.deletions)


async def delete(writer: Writer, sandbox_id: str) -> bool:
    reply = await record_deletion(writer, RecordDeletion(sandbox_id=sandbox_id))
    assert isinstance(reply, Recorded)
    return reply.changed


async def fail(writer: Writer, sandbox_id: str, attempts: int, retry_in_sec: float | None) -> bool:
    reply = await record_deletion_failure(
        writer,
        RecordDeletionFailure(
            sandbox_id=sandbox_id, attempts=attempts, error="CSP said 500", retry_in_sec=retry_in_sec
        ),
    )
    assert isinstance(reply, Recorded)
    return reply.changed


async def make_due(pool: Pool, count: int) -> list[str]:
    """Sandboxes that wait for their deletion, the first due first."""
    ids = await pool.fill(count, "pending_deletion")
    await pool.execute(
        "UPDATE sandboxes SET deletion_requested_at = status_since, deletion_due_at = status_since "
        "WHERE status = 'pending_deletion' AND deletion_due_at IS NULL"
    )
    return ids


async def test_a_claim_tells_what_to_delete_the_longest_due_first(pool: Pool) -> None:
    ids = await make_due(pool, 3)
    writer = await pool.writer()
    first, second = await claim(writer, limit=2)
    assert [first.sandbox_id, second.sandbox_id] == ids[:2]
    assert (first.external_id, first.attempts) == (f"account-{ids[0]}", 0)
    assert [due.sandbox_id for due in await claim(writer, limit=2)] == ids[2:]
    assert await claim(writer) == []


async def test_only_what_is_due_is_claimed(pool: Pool) -> None:
    (sandbox_id,) = await make_due(pool, 1)
    await pool.lease("ann")
    await pool.fill(1, "deletion_failed")
    await pool.execute(
        "UPDATE sandboxes SET deletion_due_at = now() + interval '1 hour' WHERE sandbox_id = $1", sandbox_id
    )
    assert await claim(await pool.writer()) == []


async def test_a_claim_ends_by_itself(pool: Pool) -> None:
    ids = await make_due(pool, 1)
    writer = await pool.writer()
    await claim(writer, claim_sec=60)
    assert await claim(writer) == []
    await pool.execute("UPDATE sandboxes SET deletion_due_at = deletion_due_at - interval '61 seconds'")
    assert [due.sandbox_id for due in await claim(writer)] == ids


async def test_two_reapers_never_get_the_same_sandbox(pool: Pool) -> None:
    ids = await make_due(pool, 120)
    writers = [await pool.writer() for _ in range(4)]

    async def work(writer: Writer) -> list[str]:
        mine: list[str] = []
        while due := await claim(writer, limit=7):
            mine += [deletion.sandbox_id for deletion in due]
        return mine

    claimed = [one for mine in await asyncio.gather(*map(work, writers)) for one in mine]
    # One that finds all that is left in the hands of others stops early; nothing is claimed twice.
    assert len(set(claimed)) == len(claimed)
    claimed += [due.sandbox_id for due in await claim(writers[0], limit=1000)]
    assert sorted(claimed) == sorted(ids)


async def test_a_deletion_is_recorded_once(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    assert [await delete(writer, sandbox_id), await delete(writer, sandbox_id)] == [True, False]
    assert await pool.status(sandbox_id) == "deleted"
    assert (await pool.events(sandbox_id)).count("sandbox.deleted") == 1
    assert await claim(writer) == []


@pytest.mark.parametrize("status", ["available", "allocated", "deletion_failed", "stale", "deleted"])
async def test_only_a_pending_deletion_can_be_recorded(pool: Pool, status: str) -> None:
    (sandbox_id,) = await pool.fill(1, status)
    writer = await pool.writer()
    before = await pool.state()
    assert not await delete(writer, sandbox_id)
    assert not await fail(writer, sandbox_id, 0, 30)
    assert not await delete(writer, "unknown")
    assert await pool.state() == before


async def test_a_failure_is_counted_once_and_comes_due_again_after_its_pause(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    (due,) = await claim(writer)
    assert await fail(writer, sandbox_id, due.attempts, 30)
    assert not await fail(writer, sandbox_id, due.attempts, 30)
    assert await pool.value("SELECT deletion_attempts FROM sandboxes") == 1
    assert await pool.value("SELECT deletion_error FROM sandboxes") == "CSP said 500"
    assert 25 < await pool.value("SELECT extract(epoch FROM deletion_due_at - now()) FROM sandboxes") <= 30
    assert await claim(writer) == []
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    (again,) = await claim(writer)
    assert again.attempts == 1
    assert await delete(writer, sandbox_id)
    assert await pool.value("SELECT deletion_error FROM sandboxes") is None


async def test_a_failure_with_no_pause_is_due_at_once_and_not_final(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    assert await fail(writer, sandbox_id, 0, 0)
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert len(await claim(writer)) == 1


async def test_the_last_failure_is_announced_and_leaves_the_sandbox_to_a_person(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    assert await fail(writer, sandbox_id, 0, 30)
    assert "sandbox.deletion_failed" not in await pool.events(sandbox_id)
    assert await fail(writer, sandbox_id, 1, None)
    assert not await fail(writer, sandbox_id, 1, None)
    assert await pool.status(sandbox_id) == "deletion_failed"
    assert (await pool.events(sandbox_id)).count("sandbox.deletion_failed") == 1
    assert await pool.value("SELECT data->>'attempts' FROM outbox WHERE type = 'sandbox.deletion_failed'") == "2"
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    assert await claim(writer) == []


async def test_a_deleted_sandbox_comes_back_through_no_listing(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    accounts = [account(int(sandbox_id))]
    begun_before = await begin(writer)
    await stage(writer, begun_before, accounts)
    assert await delete(writer, sandbox_id)
    await apply(writer, begun_before, 1)
    assert await pool.status(sandbox_id) == "deleted"
    await sync(writer, accounts)
    assert await pool.status(sandbox_id) == "deleted"
    (reply,) = await allocate(writer, ask("bob"))
    assert refusal(reply) == "POOL_EXHAUSTED"


async def test_a_used_sandbox_whose_record_is_forgotten_comes_back_through_no_listing(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    await pool.execute("DELETE FROM sandboxes")
    await sync(writer, [account(int(sandbox_id)), account(900)])
    assert await pool.column("SELECT sandbox_id FROM sandboxes") == ["900"]
    (reply,) = await allocate(writer, ask("bob"))
    assert reply.type == "LeaseGranted"
