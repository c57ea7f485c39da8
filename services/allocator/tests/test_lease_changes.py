"""Changes of a lease: claim, extend, replace, each with its effect once in any order with the end of the lease."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from allocator.domain import RedeliveredAllocation
from allocator.handlers import deletions, leases
from allocator.handlers.lease_changes import claim_lease, extend_lease, replace_sandbox
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ClaimLease,
    EndLease,
    ExpireLeases,
    ExtendLease,
    HurryDeletions,
    ReplaceSandbox,
    RetryDeletion,
)
from sandbox_broker.contract.replies import DeletionsHurried, LeaseExtended, LeaseGranted, Reply, SandboxReleased

from .allocator_harness import (
    DEFAULT_TERMS,
    RUN,
    Pool,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
)

HOUR = 3600
END = "SELECT end_reason FROM leases WHERE sandbox_id = $1"


def standby_command(holder: str, **fields: Any) -> AllocateSandbox:
    return AllocateSandbox(request_id="request", holder=holder, mode="standby", **fields)


async def claim(
    session: WriteSession, sandbox_id: str, holder: str = "setup", new_holder: str | None = None
) -> Reply:
    command = ClaimLease(request_id="request", sandbox_id=sandbox_id, holder=holder, new_holder=new_holder)
    (reply,) = await claim_lease(session, [command])
    return reply


async def extend(
    session: WriteSession,
    sandbox_id: str,
    holder: str | None = "ann",
    *,
    hours: float = 2,
    extension_id: uuid.UUID | None = None,
) -> Reply:
    command = ExtendLease(
        request_id="request",
        sandbox_id=sandbox_id,
        holder=holder,
        extension_id=extension_id or uuid.uuid4(),
        extension_sec=round(hours * HOUR),
        note=None if holder else "exam",
    )
    (reply,) = await extend_lease(session, [command])
    return reply


async def replace(session: WriteSession, sandbox_id: str, holder: str | None = "ann") -> Reply:
    command = ReplaceSandbox(request_id="request", sandbox_id=sandbox_id, holder=holder, reason="no DNS")
    (reply,) = await replace_sandbox(session, [command])
    return reply


async def expire(session: WriteSession, *, grace_sec: float = 0) -> None:
    await leases.expire_leases(session, ExpireLeases(grace_sec=grace_sec, limit=100))


async def take_standby(pool: Pool, holder: str = "setup") -> LeaseGranted:
    return await take_lease(pool, await pool.write_session(), standby_command(holder))


async def take_lease(pool: Pool, session: WriteSession, command: AllocateSandbox) -> LeaseGranted:
    """Lease a new sandbox, the only available one, on a session that many races share."""
    await pool.fill(1)
    (reply,) = await allocate(session, command)
    return granted_lease(reply)


async def age(pool: Pool, sec: float) -> None:
    """Move all leases into the past."""
    await pool.execute(
        """UPDATE leases SET allocated_at = allocated_at - $1 * interval '1 second',
            expires_at = expires_at - $1 * interval '1 second', claimed_at = claimed_at - $1 * interval '1 second',
            ended_at = ended_at - $1 * interval '1 second'""",
        sec,
    )


# Standby


async def test_a_standby_lease_may_be_claimed_for_standby_hours(pool: Pool) -> None:
    lease = await take_standby(pool)
    assert (lease.new, lease.mode, lease.claimed_at) == (True, "standby", None)
    assert lease.expires_at == lease.allocated_at + DEFAULT_TERMS.standby_sec
    (repeated,) = await allocate(await pool.write_session(), standby_command("setup"))
    assert repeated == lease.model_copy(update={"new": False})
    (plain,) = await allocate(await pool.write_session(), allocate_command("setup"))
    assert plain == lease.model_copy(update={"new": False})


async def test_the_time_of_a_standby_lease_starts_with_its_claim(pool: Pool) -> None:
    lease = await take_standby(pool)
    session = await pool.write_session()
    await age(pool, 20 * HOUR)
    claimed = granted_lease(await claim(session, lease.sandbox_id))
    assert (claimed.new, claimed.mode, claimed.sandbox_id) == (True, "active", lease.sandbox_id)
    assert claimed.claimed_at is not None
    assert claimed.expires_at == claimed.claimed_at + DEFAULT_TERMS.lease_sec
    assert claimed.allocated_at == lease.allocated_at - 20 * HOUR
    repeated = claimed.model_copy(update={"new": False})
    await age(pool, 0)
    assert await claim(session, lease.sandbox_id) == repeated
    assert await pool.events(lease.sandbox_id) == ["sandbox.allocated", "lease.claimed"]
    await expire(session)
    assert await pool.value(END, lease.sandbox_id) is None


async def test_a_claim_gives_the_lease_to_the_new_holder(pool: Pool) -> None:
    lease = await take_standby(pool)
    session = await pool.write_session()
    claimed = granted_lease(await claim(session, lease.sandbox_id, new_holder="ann"))
    again = claimed.model_copy(update={"new": False})
    assert await claim(session, lease.sandbox_id, new_holder="ann") == again
    assert await claim(session, lease.sandbox_id) == again
    assert await claim(session, lease.sandbox_id, "ann") == again
    assert refusal_code(await claim(session, lease.sandbox_id, new_holder="bob")) == "ALREADY_CLAIMED"
    assert refusal_code(await claim(session, lease.sandbox_id, "bob")) == "NOT_SANDBOX_OWNER"
    (repeated,) = await allocate(session, allocate_command("ann"))
    assert repeated == again
    refused, released = await release(
        session, release_command(lease.sandbox_id, "setup"), release_command(lease.sandbox_id, "ann")
    )
    assert refusal_code(refused) == "NOT_SANDBOX_OWNER"
    assert isinstance(released, SandboxReleased)
    assert list(map(tuple, await pool.rows("SELECT holder, first_holder, mode FROM leases"))) == [
        ("ann", "setup", "active")
    ]


async def test_a_claim_for_a_student_with_another_sandbox_is_refused(pool: Pool) -> None:
    own = await pool.lease("ann")
    lease = await take_standby(pool)
    session = await pool.write_session()
    before = await pool.state()
    assert refusal_code(await claim(session, lease.sandbox_id, new_holder="ann")) == "NEW_HOLDER_HAS_LEASE"
    assert await pool.state() == before
    await release(session, release_command(own, "ann"))
    assert granted_lease(await claim(session, lease.sandbox_id, new_holder="ann")).new


async def test_a_claim_by_its_own_id_keeps_the_holder(pool: Pool) -> None:
    lease = await take_standby(pool)
    session = await pool.write_session()
    assert granted_lease(await claim(session, lease.sandbox_id, new_holder="setup")).new
    assert list(map(tuple, await pool.rows("SELECT holder, first_holder FROM leases"))) == [("setup", None)]


async def test_a_claim_of_an_active_lease_returns_it(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    (lease,) = await allocate(session, allocate_command("ann"))
    assert await claim(session, sandbox_id, "ann") == lease
    assert refusal_code(await claim(session, sandbox_id, "ann", "bob")) == "ALREADY_CLAIMED"
    assert await pool.events(sandbox_id) == ["sandbox.allocated"]


async def test_an_unclaimed_standby_lease_ends_without_a_grace_period(pool: Pool) -> None:
    lease = await take_standby(pool)
    session = await pool.write_session()
    await age(pool, DEFAULT_TERMS.standby_sec - 60)
    await expire(session)
    assert await pool.value(END, lease.sandbox_id) is None
    await age(pool, 60)
    await expire(session, grace_sec=HOUR)
    assert await pool.value(END, lease.sandbox_id) == "unclaimed"
    assert await pool.status(lease.sandbox_id) == "pending_deletion"
    assert list(map(tuple, await pool.rows("SELECT mode, claimed_at FROM leases"))) == [("standby", None)]
    assert refusal_code(await claim(session, lease.sandbox_id)) == "LEASE_ENDED"
    reason = await pool.value("SELECT data->>'reason' FROM outbox WHERE type = 'sandbox.deletion_requested'")
    assert reason == "unclaimed"


async def test_students_and_administrators_end_standby_leases(pool: Pool) -> None:
    session = await pool.write_session()
    first, second = await take_standby(pool), await take_standby(pool, "other setup")
    await release(session, release_command(first.sandbox_id, "setup"))
    await leases.end_lease(session, EndLease(request_id="request", sandbox_id=second.sandbox_id, note="over"))
    assert await pool.value(END, first.sandbox_id) == "student"
    assert await pool.value(END, second.sandbox_id) == "admin"


async def test_a_redelivered_allocation_after_the_claim_takes_no_second_sandbox(pool: Pool) -> None:
    lease = await take_standby(pool)
    await pool.fill(1)
    session = await pool.write_session()
    await claim(session, lease.sandbox_id, new_holder="ann")
    (reply,) = await allocate(session, RedeliveredAllocation(**standby_command("setup").model_dump()))
    assert refusal_code(reply) == "ALLOCATOR_UNAVAILABLE"
    assert await pool.value("SELECT count(*) FROM leases") == 1


# Extensions


async def test_an_extension_moves_the_end_of_the_lease(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    lease = granted_lease((await allocate(session, allocate_command("ann")))[0])
    maximum = lease.expires_at + DEFAULT_TERMS.max_extension_sec
    reply = await extend(session, sandbox_id, hours=1.5)
    assert reply == LeaseExtended(
        changed=True, expires_at=lease.expires_at + round(1.5 * HOUR), max_expires_at=maximum
    )
    reply = await extend(session, sandbox_id, hours=2.5)
    assert reply == LeaseExtended(changed=True, expires_at=maximum, max_expires_at=maximum)
    before = await pool.state()
    assert refusal_code(await extend(session, sandbox_id, hours=0.1)) == "EXTENSION_LIMIT"
    assert await pool.state() == before
    assert granted_lease((await allocate(session, allocate_command("ann")))[0]).expires_at == maximum


async def test_an_extension_beyond_the_limit_changes_nothing(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    before = await pool.state()
    reply = await extend(session, sandbox_id, hours=4.5)
    assert refusal_code(reply) == "EXTENSION_LIMIT"
    assert getattr(reply, "parameters", None) == {"sandbox_id": sandbox_id, "left_hours": "4"}
    assert await pool.state() == before


async def test_an_extension_is_granted_once(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session, other = await pool.write_session(), await pool.write_session()
    extension_id = uuid.uuid4()
    first = await extend(session, sandbox_id, extension_id=extension_id)
    assert isinstance(first, LeaseExtended)
    await extend(session, sandbox_id, hours=1)
    repeated = await extend(other, sandbox_id, extension_id=extension_id)
    assert repeated == first.model_copy(update={"changed": False})
    conflict = await extend(session, sandbox_id, hours=1, extension_id=extension_id)
    assert refusal_code(conflict) == "IDEMPOTENCY_KEY_CONFLICT"
    assert (await pool.events(sandbox_id)).count("lease.extended") == 2
    await release(session, release_command(sandbox_id, "ann"))
    assert await extend(session, sandbox_id, extension_id=extension_id) == repeated


async def test_the_same_extension_from_two_allocators_is_granted_once(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    first, second = await pool.write_session(), await pool.write_session()
    extension_id = uuid.uuid4()
    transaction = first.connection.transaction()
    await transaction.start()
    granted = await extend(first, sandbox_id, extension_id=extension_id)
    waiting = asyncio.create_task(
        second.run(partial(extend, second, sandbox_id, extension_id=extension_id))  # retries like the dispatcher
    )
    await pool.until_waiting(second)
    await transaction.commit()
    assert isinstance(granted, LeaseExtended)
    assert await waiting == granted.model_copy(update={"changed": False})
    assert await pool.value("SELECT extended_sec FROM leases") == 2 * HOUR


async def test_concurrent_extensions_do_not_exceed_the_limit(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    sessions = [await pool.write_session() for _ in range(4)]
    replies = await asyncio.gather(*(extend(session, sandbox_id, hours=1.5) for session in sessions))
    assert sum(isinstance(reply, LeaseExtended) for reply in replies) == 2
    assert await pool.value("SELECT extended_sec FROM leases") == 3 * HOUR


async def test_an_extension_in_the_grace_period_keeps_the_lease(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    await age(pool, DEFAULT_TERMS.lease_sec + 20 * 60)
    assert isinstance(await extend(session, sandbox_id, hours=1), LeaseExtended)
    await expire(session)
    assert await pool.value(END, sandbox_id) is None


async def test_an_administrator_extends_without_the_limit(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    lease = granted_lease((await allocate(session, allocate_command("ann")))[0])
    reply = await extend(session, sandbox_id, None, hours=100)
    assert reply == LeaseExtended(
        changed=True,
        expires_at=lease.expires_at + 100 * HOUR,
        max_expires_at=lease.expires_at + 100 * HOUR + DEFAULT_TERMS.max_extension_sec,
    )
    assert isinstance(await extend(session, sandbox_id, hours=4), LeaseExtended)  # the student's limit is unused
    event = await pool.value("SELECT data FROM outbox WHERE type = 'lease.extended' ORDER BY outbox_id LIMIT 1")
    assert '"reason": "admin"' in event
    assert '"note": "exam"' in event


async def test_only_an_administrator_extends_a_standby_lease(pool: Pool) -> None:
    lease = await take_standby(pool)
    session = await pool.write_session()
    assert refusal_code(await extend(session, lease.sandbox_id, "setup")) == "NOT_CLAIMED"
    reply = await extend(session, lease.sandbox_id, None)
    assert isinstance(reply, LeaseExtended)
    assert reply.expires_at == lease.expires_at + 2 * HOUR


async def test_a_lease_of_an_earlier_version_has_the_limits_of_the_settings(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    await pool.execute(
        "UPDATE leases SET policy = NULL, lease_sec = NULL, max_extension_sec = NULL, standby_sec = NULL, "
        "max_replacements = NULL"
    )
    session = await pool.write_session()
    assert isinstance(await extend(session, sandbox_id, hours=4), LeaseExtended)
    assert refusal_code(await extend(session, sandbox_id, hours=0.1)) == "EXTENSION_LIMIT"
    new = granted_lease(await replace(session, sandbox_id))
    assert refusal_code(await replace(session, new.sandbox_id)) == "REPLACEMENT_LIMIT"


async def test_a_lease_keeps_the_limits_that_it_was_granted_under(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.fill(2)
    await pool.execute("UPDATE leases SET max_extension_sec = 3600, max_replacements = 2, policy = 'exam'")
    session = await pool.write_session()
    assert refusal_code(await extend(session, sandbox_id, hours=1.1)) == "EXTENSION_LIMIT"
    second = granted_lease(await replace(session, sandbox_id))
    assert refusal_code(await extend(session, second.sandbox_id, hours=1.1)) == "EXTENSION_LIMIT"
    third = granted_lease(await replace(session, second.sandbox_id))
    assert refusal_code(await replace(session, third.sandbox_id)) == "REPLACEMENT_LIMIT"
    assert await pool.column("SELECT policy FROM leases") == 3 * ["exam"]


# Replacements


async def test_a_broken_sandbox_is_replaced_in_one_step(pool: Pool) -> None:
    old = await pool.lease("ann")
    (new,) = await pool.fill(1)
    session = await pool.write_session()
    lease = granted_lease(await replace(session, old))
    assert (lease.new, lease.sandbox_id, lease.mode) == (True, new, "active")
    assert lease.expires_at == lease.allocated_at + DEFAULT_TERMS.lease_sec
    assert (await pool.status(old), await pool.status(new)) == ("pending_deletion", "allocated")
    row = (
        await pool.rows(
            "SELECT l.end_reason, l.end_note, s.deletion_reason, s.deletion_due_at - now() > interval '23 hours' "
            "FROM leases l JOIN sandboxes s USING (sandbox_id) WHERE sandbox_id = $1",
            old,
        )
    )[0]
    assert tuple(row) == ("broken", "no DNS", "broken", True)
    assert await pool.events(old) == ["sandbox.allocated", "sandbox.deletion_requested", "sandbox.replaced"]
    assert await pool.events(new) == ["sandbox.allocated"]
    await pool.assert_sound()


async def test_a_repeated_replacement_returns_the_same_sandbox(pool: Pool) -> None:
    old = await pool.lease("ann")
    await pool.fill(2)
    session = await pool.write_session()
    lease = granted_lease(await replace(session, old))
    assert await replace(session, old) == lease.model_copy(update={"new": False})
    (repeated,) = await allocate(session, allocate_command("ann"))
    assert repeated == lease.model_copy(update={"new": False})
    await release(session, release_command(lease.sandbox_id, "ann"))
    assert refusal_code(await replace(session, old)) == "LEASE_ENDED"


async def test_without_another_sandbox_nothing_changes(pool: Pool) -> None:
    old = await pool.lease("ann")
    session = await pool.write_session()
    before = await pool.state()
    assert refusal_code(await replace(session, old)) == "POOL_EXHAUSTED"
    after = await pool.state()
    assert [table for number, table in enumerate(after) if table != before[number]] == [after[3]]  # only the outbox
    assert (await pool.events())[-1] == "pool.exhausted"


async def test_a_replacement_has_the_prefix_and_the_track_of_the_lease(pool: Pool) -> None:
    await pool.fill(["lab-a-1", "lab-b-1", "lab-a-2"])
    session = await pool.write_session()
    (reply,) = await allocate(session, allocate_command("ann", prefix="lab-a-", track="dns"))
    assert granted_lease(reply).name == "lab-a-1"
    new = granted_lease(await replace(session, granted_lease(reply).sandbox_id))
    assert new.name == "lab-a-2"
    assert await pool.column("SELECT track_name FROM sandboxes ORDER BY name") == ["dns", "dns", None]
    (reply,) = await allocate(session, allocate_command("bob", prefix="lab-b-1"))
    refused = await replace(session, granted_lease(reply).sandbox_id, "bob")
    assert getattr(refused, "parameters", None) == {"cause": "name_prefix", "name_prefix": "lab-b-1"}


async def test_a_replacement_keeps_a_later_end_and_the_used_extension(pool: Pool) -> None:
    old = await pool.lease("ann")
    await pool.fill(1)
    session = await pool.write_session()
    extended = await extend(session, old, hours=4)
    assert isinstance(extended, LeaseExtended)
    lease = granted_lease(await replace(session, old))
    assert lease.expires_at == extended.expires_at
    assert refusal_code(await extend(session, lease.sandbox_id, hours=1)) == "EXTENSION_LIMIT"


async def test_a_broken_standby_sandbox_is_replaced_in_standby(pool: Pool) -> None:
    lease = await take_standby(pool)
    await pool.fill(1)
    session = await pool.write_session()
    new = granted_lease(await replace(session, lease.sandbox_id, "setup"))
    assert (new.mode, new.claimed_at) == ("standby", None)
    assert new.expires_at >= lease.expires_at
    assert granted_lease(await claim(session, new.sandbox_id, new_holder="ann")).new


async def test_replacements_are_limited_except_for_administrators(pool: Pool) -> None:
    old = await pool.lease("ann")
    await pool.fill(3)
    session = await pool.write_session()
    second = granted_lease(await replace(session, old))
    before = await pool.state()
    assert refusal_code(await replace(session, second.sandbox_id)) == "REPLACEMENT_LIMIT"
    assert await pool.state() == before
    assert granted_lease(await replace(session, second.sandbox_id, None)).new
    await pool.assert_sound()


@pytest.mark.parametrize("change", [extend, replace, claim])
async def test_a_stranger_changes_nothing(pool: Pool, change: Callable[..., Awaitable[Reply]]) -> None:
    leased, ended = await pool.lease("ann"), await pool.pending()
    (free,) = await pool.fill(1)
    session = await pool.write_session()
    before = await pool.state()
    for sandbox_id, code in (
        (leased, "NOT_SANDBOX_OWNER"),
        (ended, "NOT_SANDBOX_OWNER"),
        (free, "NOT_SANDBOX_OWNER"),
        ("%", "SANDBOX_NOT_FOUND"),
    ):
        assert refusal_code(await change(session, sandbox_id, "bob")) == code
    assert refusal_code(await change(session, ended, "gone")) == "LEASE_ENDED"
    assert await pool.state() == before


@pytest.mark.parametrize("change", [extend, replace])
async def test_an_administrator_needs_a_lease(pool: Pool, change: Callable[..., Awaitable[Reply]]) -> None:
    (free,) = await pool.fill(1)
    session = await pool.write_session()
    assert refusal_code(await change(session, free, None)) == "NOT_ALLOCATED"
    assert refusal_code(await change(session, "%", None)) == "SANDBOX_NOT_FOUND"


# The hold of a broken sandbox


async def test_a_broken_sandbox_is_not_hurried_before_the_end_of_its_hold(pool: Pool) -> None:
    old, other = await pool.lease("ann"), await pool.pending()
    await pool.fill(1)
    session = await pool.write_session()
    await replace(session, old)
    await pool.execute(
        "UPDATE sandboxes SET deletion_due_at = now() + interval '1 hour' WHERE sandbox_id = $1", other
    )
    hurry = HurryDeletions(run_id=RUN, limit=10, claim_sec=60)
    assert await deletions.hurry_deletions(session, hurry) == DeletionsHurried(hurried=1)
    await pool.execute("UPDATE sandboxes SET deletion_hold_until = now() WHERE deletion_hold_until IS NOT NULL")
    assert await deletions.hurry_deletions(session, hurry) == DeletionsHurried(hurried=1)


async def test_an_administrator_ends_the_hold_of_one_sandbox(pool: Pool) -> None:
    old = await pool.lease("ann")
    await pool.fill(1)
    session = await pool.write_session()
    await replace(session, old)
    before = await pool.state()
    retry = RetryDeletion(request_id="request", sandbox_id=old)
    refused = await deletions.retry_deletion(session, retry)
    assert refusal_code(refused) == "NOT_DELETION_FAILED"
    assert getattr(refused, "parameters", None) == {"cause": "on_hold", "sandbox_id": old}
    assert await pool.state() == before
    ended = await deletions.retry_deletion(session, retry.model_copy(update={"end_hold": True}))
    assert isinstance(ended, SandboxReleased)
    assert await pool.value("SELECT deletion_due_at <= now() FROM sandboxes WHERE sandbox_id = $1", old)
    again = await deletions.retry_deletion(session, retry.model_copy(update={"end_hold": True}))
    assert refusal_code(again) == "NOT_DELETION_FAILED"


async def test_two_replacements_of_one_sandbox_give_one_sandbox(pool: Pool) -> None:
    sessions = [await pool.write_session() for _ in range(2)]
    for number in range(10):
        holder = f"student-{number}"
        old = await pool.lease(holder)
        await pool.fill(2)
        replies = await asyncio.gather(
            *(session.run(partial(replace, session, old, holder)) for session in sessions)
        )
        assert len({granted_lease(reply).sandbox_id for reply in replies}) == 1
        assert sorted(granted_lease(reply).new for reply in replies) == [False, True]
    await pool.assert_sound()
