"""Deletions: claimed by one reaper at a time, recorded once, and final."""

import asyncio
import uuid

import pytest

from allocator import store
from allocator.handlers.deletions import (
    claim_deletions,
    end_cleanup,
    hurry_deletions,
    record_deletion,
    record_deletion_failure,
)
from allocator.writer import Writer
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    EndCleanup,
    HurryDeletions,
    RecordDeletion,
    RecordDeletionFailure,
)
from sandbox_broker.contract.replies import DeletionsClaimed, DeletionsHurried, DueDeletion, Recorded

from .allocator_harness import RUN, Pool, account, allocate, apply, ask, begin, refusal, stage, sync

OTHER_RUN = uuid.UUID(int=9)


async def asked(
    writer: Writer, *, run: uuid.UUID = RUN, limit: int = 100, claim_sec: float = 60
) -> DeletionsClaimed:
    reply = await claim_deletions(writer, ClaimDeletions(run_id=run, limit=limit, claim_sec=claim_sec))
    assert isinstance(reply, DeletionsClaimed)
    return reply


async def claim(
    writer: Writer, *, run: uuid.UUID = RUN, limit: int = 100, claim_sec: float = 60
) -> list[DueDeletion]:
    return list((await asked(writer, run=run, limit=limit, claim_sec=claim_sec)).deletions)


async def hurry(writer: Writer, *, run: uuid.UUID = RUN, limit: int = 100) -> int | None:
    """None: another run is on duty."""
    reply = await hurry_deletions(writer, HurryDeletions(run_id=run, limit=limit, claim_sec=60))
    assert isinstance(reply, DeletionsHurried)
    return reply.hurried if reply.on_duty else None


async def end(writer: Writer, run: uuid.UUID = RUN) -> bool:
    reply = await end_cleanup(writer, EndCleanup(run_id=run))
    assert isinstance(reply, Recorded)
    return reply.changed


async def delete(writer: Writer, sandbox_id: str) -> bool:
    reply = await record_deletion(writer, RecordDeletion(sandbox_id=sandbox_id))
    assert isinstance(reply, Recorded)
    return reply.changed


async def fail(
    writer: Writer, sandbox_id: str, attempts: int, retry_in_sec: float | None, run: uuid.UUID = RUN
) -> bool:
    reply = await record_deletion_failure(
        writer,
        RecordDeletionFailure(
            run_id=run, sandbox_id=sandbox_id, attempts=attempts, error="CSP said 500", retry_in_sec=retry_in_sec
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


async def test_of_two_runs_one_works_and_the_other_is_told_when_to_ask_again(pool: Pool) -> None:
    first, second = await make_due(pool, 2)
    writer = await pool.writer()
    assert [due.sandbox_id for due in await claim(writer, limit=1)] == [first]
    refused = await asked(writer, run=OTHER_RUN)
    assert (refused.deletions, refused.on_duty) == ((), False)
    assert 50 < (refused.next_in_sec or 0) <= 60
    assert await hurry(writer, run=OTHER_RUN) is None
    assert not await end(writer, OTHER_RUN)
    assert [due.sandbox_id for due in await claim(writer, limit=1)] == [second]


async def test_another_run_begins_when_the_first_has_ended(pool: Pool) -> None:
    ids = await make_due(pool, 2)
    writer = await pool.writer()
    await claim(writer, limit=1)
    assert [await end(writer), await end(writer)] == [True, False]
    assert [due.sandbox_id for due in await claim(writer, run=OTHER_RUN)] == ids[1:]


async def test_a_run_that_died_is_succeeded_when_its_last_claim_ends(pool: Pool) -> None:
    ids = await make_due(pool, 2)
    writer = await pool.writer()
    await claim(writer, claim_sec=60)
    later = "deletion_due_at = deletion_due_at - interval '61 seconds'"
    await pool.execute(f"UPDATE sandboxes SET {later}")
    assert await claim(writer, run=OTHER_RUN) == []  # due, but the first may still be at it
    await pool.execute("UPDATE cleanup_duty SET until = until - interval '61 seconds'")
    assert [due.sandbox_id for due in await claim(writer, run=OTHER_RUN)] == ids
    assert await claim(writer) == []  # the first wakes up again


async def test_of_runs_that_ask_at_once_one_gets_all(pool: Pool) -> None:
    ids = await make_due(pool, 40)
    writers = [await pool.writer() for _ in range(4)]

    async def work(writer: Writer) -> list[str]:
        run, mine = uuid.uuid4(), []
        while due := await claim(writer, run=run, limit=7):
            mine += [deletion.sandbox_id for deletion in due]
        return mine

    claimed = sorted(await asyncio.gather(*map(work, writers)), key=len)
    assert claimed == [[], [], [], ids]


async def test_a_claim_that_finds_nothing_tells_when_the_next_is_due(pool: Pool) -> None:
    writer = await pool.writer()
    assert (await asked(writer)).next_in_sec is None
    await make_due(pool, 2)
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now() + interval '30 seconds'")
    nothing = await asked(writer)
    assert nothing.on_duty
    assert 20 < (nothing.next_in_sec or 0) <= 30


async def test_hurrying_makes_due_what_was_put_off_and_not_what_is_in_hand(pool: Pool) -> None:
    in_hand, put_off, given_up = await make_due(pool, 3)
    await pool.lease("ann")
    writer = await pool.writer()
    await claim(writer, limit=2)
    assert await fail(writer, put_off, 0, 3600)
    assert await claim(writer, limit=1)
    assert await fail(writer, given_up, 0, None)
    assert await hurry(writer) == 1
    assert await hurry(writer) == 0  # the message comes twice
    assert [due.sandbox_id for due in await claim(writer)] == [put_off]
    assert await hurry(writer) == 0
    # What a run that is over has left behind is in nobody's hand.
    await end(writer)
    assert await hurry(writer, run=OTHER_RUN, limit=1) == 1
    assert await hurry(writer, run=OTHER_RUN, limit=10) == 1
    assert {due.sandbox_id for due in await claim(writer, run=OTHER_RUN)} == {in_hand, put_off}


async def test_a_failure_counts_only_for_the_claim_it_belongs_to(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    assert not await fail(writer, sandbox_id, 0, 30)  # nobody has claimed it
    await claim(writer)
    await end(writer)
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    await claim(writer, run=OTHER_RUN)
    before = await pool.state()
    assert not await fail(writer, sandbox_id, 0, 30)  # of the first run, late
    assert await pool.state() == before
    assert await delete(writer, sandbox_id)  # what CSP has deleted is deleted, whoever says so


async def test_a_deletion_is_recorded_once(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    assert [await delete(writer, sandbox_id), await delete(writer, sandbox_id)] == [True, False]
    assert await pool.status(sandbox_id) == "deleted"
    assert await pool.value("SELECT deleted_at > now() - interval '1 minute' FROM sandboxes")
    assert (await pool.events(sandbox_id)).count("sandbox.deleted") == 1
    assert await claim(writer) == []


async def test_what_went_wrong_with_the_services_is_kept_with_the_deletion(pool: Pool) -> None:
    failed, deleted = await make_due(pool, 2)
    writer = await pool.writer()
    await claim(writer)
    await record_deletion(writer, RecordDeletion(sandbox_id=deleted, services_error="no JWT"))
    await record_deletion_failure(
        writer,
        RecordDeletionFailure(
            run_id=RUN, sandbox_id=failed, attempts=0, error="500", retry_in_sec=0, services_error="lab: 500"
        ),
    )
    assert await pool.column("SELECT services_error FROM sandboxes ORDER BY sandbox_id") == ["lab: 500", "no JWT"]
    assert await delete(writer, failed)
    assert await pool.column("SELECT services_error FROM sandboxes ORDER BY sandbox_id") == [None, "no JWT"]


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
    await claim(writer)
    assert await fail(writer, sandbox_id, 0, 0)
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert len(await claim(writer)) == 1


async def test_the_last_failure_is_announced_and_leaves_the_sandbox_to_a_person(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    await claim(writer)
    assert await fail(writer, sandbox_id, 0, 30)
    assert "sandbox.deletion_failed" not in await pool.events(sandbox_id)
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now()")
    await claim(writer)
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


async def test_the_longest_pending_deletion_is_told_however_far_off_its_turn_is(pool: Pool) -> None:
    assert await pool.value(store.OLDEST_DELETION) == 0
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
    assert await pool.value(store.OLDEST_DELETION) >= 24 * 3600
