"""Deletions: claimed by one clean-up run at a time, recorded once, and final."""

import asyncio
import uuid
from typing import Literal

import pytest

from allocator.background.pool_metrics import OLDEST_DELETION
from allocator.handlers.deletions import (
    claim_deletions,
    end_cleanup,
    hurry_deletions,
    record_deletion,
    record_deletion_failure,
)
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    EndCleanup,
    HurryDeletions,
    RecordDeletion,
    RecordDeletionFailure,
)
from sandbox_broker.contract.replies import DeletionsClaimed, DeletionsHurried, DueDeletion, Recorded

from .allocator_harness import (
    RUN,
    Pool,
    account,
    allocate,
    allocate_command,
    apply,
    begin,
    refusal_code,
    stage,
    sync,
)

OTHER_RUN = uuid.UUID(int=9)


async def send_claim(
    session: WriteSession, *, run: uuid.UUID = RUN, limit: int = 100, claim_sec: float = 60
) -> DeletionsClaimed:
    reply = await claim_deletions(session, ClaimDeletions(run_id=run, limit=limit, claim_sec=claim_sec))
    assert isinstance(reply, DeletionsClaimed)
    return reply


async def claim(
    session: WriteSession, *, run: uuid.UUID = RUN, limit: int = 100, claim_sec: float = 60
) -> list[DueDeletion]:
    return list((await send_claim(session, run=run, limit=limit, claim_sec=claim_sec)).deletions)


async def hurry(session: WriteSession, *, run: uuid.UUID = RUN, limit: int = 100) -> int | None:
    """Return the number of hurried deletions; None if another run holds the leader lease."""
    reply = await hurry_deletions(session, HurryDeletions(run_id=run, limit=limit, claim_sec=60))
    assert isinstance(reply, DeletionsHurried)
    return reply.hurried if reply.on_duty else None


async def end(session: WriteSession, run: uuid.UUID = RUN) -> bool:
    reply = await end_cleanup(session, EndCleanup(run_id=run))
    assert isinstance(reply, Recorded)
    return reply.changed


async def delete(session: WriteSession, sandbox_id: str) -> bool:
    reply = await record_deletion(session, RecordDeletion(sandbox_id=sandbox_id))
    assert isinstance(reply, Recorded)
    return reply.changed


async def fail(
    session: WriteSession, sandbox_id: str, attempts: int, retry_in_sec: float | None, run: uuid.UUID = RUN
) -> bool:
    reply = await record_deletion_failure(
        session,
        RecordDeletionFailure(
            run_id=run, sandbox_id=sandbox_id, attempts=attempts, error="CSP said 500", retry_in_sec=retry_in_sec
        ),
    )
    assert isinstance(reply, Recorded)
    return reply.changed


async def make_due(pool: Pool, count: int) -> list[str]:
    """Insert sandboxes with pending deletions, the first due first; return their ids."""
    ids = await pool.fill(count, "pending_deletion")
    await pool.execute(
        "UPDATE sandboxes SET deletion_requested_at = status_since, deletion_due_at = status_since "
        "WHERE status = 'pending_deletion' AND deletion_due_at IS NULL"
    )
    return ids


async def test_a_claim_returns_the_longest_due_deletions_first(pool: Pool) -> None:
    ids = await make_due(pool, 3)
    session = await pool.write_session()
    first, second = await claim(session, limit=2)
    assert [first.sandbox_id, second.sandbox_id] == ids[:2]
    assert (first.external_id, first.attempts) == (f"account-{ids[0]}", 0)
    assert [due.sandbox_id for due in await claim(session, limit=2)] == ids[2:]
    assert await claim(session) == []


async def test_a_claim_of_untried_deletions_prefers_them_in_its_order(pool: Pool) -> None:
    ids = await make_due(pool, 4)
    await pool.execute("UPDATE sandboxes SET deletion_attempts = 1 WHERE sandbox_id = ANY($1)", [ids[0], ids[3]])
    session = await pool.write_session()

    async def claim_one(untried: Literal["oldest", "newest"]) -> list[str]:
        command = ClaimDeletions(run_id=RUN, limit=1, claim_sec=60, untried=untried)
        reply = await claim_deletions(session, command)
        assert isinstance(reply, DeletionsClaimed)
        return [due.sandbox_id for due in reply.deletions]

    assert await claim_one("newest") == [ids[2]]
    assert await claim_one("oldest") == [ids[1]]
    assert [await claim_one("newest"), await claim_one("oldest")] == [[ids[0]], [ids[3]]]
    assert await claim_one("oldest") == []


async def test_only_due_deletions_are_claimed(pool: Pool) -> None:
    (sandbox_id,) = await make_due(pool, 1)
    await pool.lease("ann")
    await pool.fill(1, "deletion_failed")
    await pool.execute(
        "UPDATE sandboxes SET deletion_due_at = now() + interval '1 hour' WHERE sandbox_id = $1", sandbox_id
    )
    assert await claim(await pool.write_session()) == []


async def test_a_claim_expires(pool: Pool) -> None:
    ids = await make_due(pool, 1)
    session = await pool.write_session()
    await claim(session, claim_sec=60)
    assert await claim(session) == []
    await pool.execute("UPDATE sandboxes SET deletion_due_at = deletion_due_at - interval '61 seconds'")
    assert [due.sandbox_id for due in await claim(session)] == ids


async def test_a_second_run_is_refused_until_the_leader_lease_expires(pool: Pool) -> None:
    first, second = await make_due(pool, 2)
    session = await pool.write_session()
    assert [due.sandbox_id for due in await claim(session, limit=1)] == [first]
    refused = await send_claim(session, run=OTHER_RUN)
    assert (refused.deletions, refused.on_duty) == ((), False)
    assert 50 < (refused.next_in_sec or 0) <= 60
    assert await hurry(session, run=OTHER_RUN) is None
    assert not await end(session, OTHER_RUN)
    assert [due.sandbox_id for due in await claim(session, limit=1)] == [second]


async def test_the_next_run_starts_after_end_cleanup(pool: Pool) -> None:
    ids = await make_due(pool, 2)
    session = await pool.write_session()
    await claim(session, limit=1)
    assert [await end(session), await end(session)] == [True, False]
    assert [due.sandbox_id for due in await claim(session, run=OTHER_RUN)] == ids[1:]


async def test_the_leader_lease_of_a_dead_run_expires(pool: Pool) -> None:
    ids = await make_due(pool, 2)
    session = await pool.write_session()
    await claim(session, claim_sec=60)
    later = "deletion_due_at = deletion_due_at - interval '61 seconds'"
    await pool.execute(f"UPDATE sandboxes SET {later}")
    assert await claim(session, run=OTHER_RUN) == []  # due, but the first run may still work on them
    await pool.execute("UPDATE cleanup_duty SET until = until - interval '61 seconds'")
    assert [due.sandbox_id for due in await claim(session, run=OTHER_RUN)] == ids
    assert await claim(session) == []  # the first run resumes


async def test_concurrent_runs_elect_one_leader(pool: Pool) -> None:
    ids = await make_due(pool, 40)
    sessions = [await pool.write_session() for _ in range(4)]

    async def work(session: WriteSession) -> list[str]:
        run, mine = uuid.uuid4(), []
        while due := await claim(session, run=run, limit=7):
            mine += [deletion.sandbox_id for deletion in due]
        return mine

    claimed = sorted(await asyncio.gather(*map(work, sessions)), key=len)
    assert claimed == [[], [], [], ids]


async def test_an_empty_claim_returns_the_time_of_the_next_deletion(pool: Pool) -> None:
    session = await pool.write_session()
    assert (await send_claim(session)).next_in_sec is None
    await make_due(pool, 2)
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now() + interval '30 seconds'")
    reply = await send_claim(session)
    assert reply.on_duty
    assert 20 < (reply.next_in_sec or 0) <= 30


async def test_hurry_makes_postponed_deletions_due_but_not_claimed_ones(pool: Pool) -> None:
    in_progress, postponed, given_up = await make_due(pool, 3)
    await pool.lease("ann")
    session = await pool.write_session()
    await claim(session, limit=2)
    assert await fail(session, postponed, 0, 3600)
    assert await claim(session, limit=1)
    assert await fail(session, given_up, 0, None)
    assert await hurry(session) == 1
    assert await hurry(session) == 0  # a duplicate message
    assert [due.sandbox_id for due in await claim(session)] == [postponed]
    assert await hurry(session) == 0
    # A claim of an ended run does not protect the deletion.
    await end(session)
    assert await hurry(session, run=OTHER_RUN, limit=1) == 1
    assert await hurry(session, run=OTHER_RUN, limit=10) == 1
    assert {due.sandbox_id for due in await claim(session, run=OTHER_RUN)} == {in_progress, postponed}


async def test_a_failure_counts_only_for_its_own_claim(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    assert not await fail(session, sandbox_id, 0, 30)  # there is no claim
    await claim(session)
    await end(session)
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    await claim(session, run=OTHER_RUN)
    before = await pool.state()
    assert not await fail(session, sandbox_id, 0, 30)  # a late message of the first run
    assert await pool.state() == before
    assert await delete(session, sandbox_id)  # a success counts from any run


async def test_a_deletion_is_recorded_once(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    assert [await delete(session, sandbox_id), await delete(session, sandbox_id)] == [True, False]
    assert await pool.status(sandbox_id) == "deleted"
    assert await pool.value("SELECT deleted_at > now() - interval '1 minute' FROM sandboxes")
    assert (await pool.events(sandbox_id)).count("sandbox.deleted") == 1
    assert await claim(session) == []


async def test_the_services_error_is_stored_with_the_deletion(pool: Pool) -> None:
    failed, deleted = await make_due(pool, 2)
    session = await pool.write_session()
    await claim(session)
    await record_deletion(session, RecordDeletion(sandbox_id=deleted, services_error="no JWT"))
    await record_deletion_failure(
        session,
        RecordDeletionFailure(
            run_id=RUN, sandbox_id=failed, attempts=0, error="500", retry_in_sec=0, services_error="lab: 500"
        ),
    )
    assert await pool.column("SELECT services_error FROM sandboxes ORDER BY sandbox_id") == ["lab: 500", "no JWT"]
    assert await delete(session, failed)
    assert await pool.column("SELECT services_error FROM sandboxes ORDER BY sandbox_id") == [None, "no JWT"]


@pytest.mark.parametrize("status", ["available", "allocated", "deletion_failed", "stale", "deleted"])
async def test_only_pending_deletions_can_be_recorded(pool: Pool, status: str) -> None:
    (sandbox_id,) = await pool.fill(1, status)
    session = await pool.write_session()
    before = await pool.state()
    assert not await delete(session, sandbox_id)
    assert not await fail(session, sandbox_id, 0, 30)
    assert not await delete(session, "unknown")
    assert await pool.state() == before


async def test_a_failure_counts_once_and_postpones_the_deletion(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    (due,) = await claim(session)
    assert await fail(session, sandbox_id, due.attempts, 30)
    assert not await fail(session, sandbox_id, due.attempts, 30)
    assert await pool.value("SELECT deletion_attempts FROM sandboxes") == 1
    assert await pool.value("SELECT deletion_error FROM sandboxes") == "CSP said 500"
    assert 25 < await pool.value("SELECT extract(epoch FROM deletion_due_at - now()) FROM sandboxes") <= 30
    assert await claim(session) == []
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    (repeated,) = await claim(session)
    assert repeated.attempts == 1
    assert await delete(session, sandbox_id)
    assert await pool.value("SELECT deletion_error FROM sandboxes") is None


async def test_a_failure_without_a_delay_is_due_at_once(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    await claim(session)
    assert await fail(session, sandbox_id, 0, 0)
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert len(await claim(session)) == 1


async def test_the_last_failure_is_announced_and_ends_the_retries(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    await claim(session)
    assert await fail(session, sandbox_id, 0, 30)
    assert "sandbox.deletion_failed" not in await pool.events(sandbox_id)
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    await claim(session)
    assert await fail(session, sandbox_id, 1, None)
    assert not await fail(session, sandbox_id, 1, None)
    assert await pool.status(sandbox_id) == "deletion_failed"
    assert (await pool.events(sandbox_id)).count("sandbox.deletion_failed") == 1
    assert await pool.value("SELECT data->>'attempts' FROM outbox WHERE type = 'sandbox.deletion_failed'") == "2"
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    assert await claim(session) == []


async def test_a_listing_does_not_restore_a_deleted_sandbox(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    accounts = [account(int(sandbox_id))]
    begun_before = await begin(session)
    await stage(session, begun_before, accounts)
    assert await delete(session, sandbox_id)
    await apply(session, begun_before, 1)
    assert await pool.status(sandbox_id) == "deleted"
    await sync(session, accounts)
    assert await pool.status(sandbox_id) == "deleted"
    (reply,) = await allocate(session, allocate_command("bob"))
    assert refusal_code(reply) == "POOL_EXHAUSTED"


async def test_a_listing_does_not_restore_a_used_sandbox_without_a_record(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    await pool.execute("DELETE FROM sandboxes")
    await sync(session, [account(int(sandbox_id)), account(900)])
    assert await pool.column("SELECT sandbox_id FROM sandboxes") == ["900"]
    (reply,) = await allocate(session, allocate_command("bob"))
    assert reply.type == "LeaseGranted"


async def test_the_oldest_pending_deletion_counts_even_if_it_is_not_due(pool: Pool) -> None:
    assert await pool.value(OLDEST_DELETION) == 0
    await pool.fill(1_001, "pending_deletion")
    await pool.execute(
        "UPDATE sandboxes SET (status_since, deletion_requested_at, deletion_due_at) = (now(), now(), now())"
    )
    (stuck,) = await pool.fill(1, "pending_deletion")
    await pool.execute(
        "UPDATE sandboxes SET status_since = now() - interval '1 day', "
        "deletion_requested_at = now() - interval '1 day', deletion_due_at = now() + interval '1 hour' "
        "WHERE sandbox_id = $1",
        stuck,
    )
    assert await pool.value(OLDEST_DELETION) >= 24 * 3600
