"""End of leases: by the student, by expiry or by the end of the play, once in any order."""

import asyncio
from datetime import timedelta

import pytest

from allocator.handlers.leases import end_play, expire_leases
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import EndPlay, ExpireLeases
from sandbox_broker.contract.replies import LeasesExpired, PlayEnded, SandboxReleased
from sandbox_broker.contract.types import MAX_TIME

from .allocator_harness import (
    Pool,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
)

END = "SELECT end_reason FROM leases WHERE sandbox_id = $1 AND ended_at IS NOT NULL"


async def expire(session: WriteSession, *, grace_sec: float = 0, limit: int = 100) -> list[str]:
    reply = await expire_leases(session, ExpireLeases(grace_sec=grace_sec, limit=limit))
    assert isinstance(reply, LeasesExpired)
    return list(reply.sandbox_ids)


async def test_a_release_ends_the_lease_and_requests_the_deletion(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    (reply,) = await release(await pool.write_session(), release_command(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert (reply.sandbox_id, reply.status) == (sandbox_id, "pending_deletion")
    ended_at = await pool.value("SELECT floor(extract(epoch FROM ended_at))::bigint FROM leases")
    assert reply.deletion_requested_at == ended_at
    assert await pool.value(END, sandbox_id) == "student"
    assert await pool.value("SELECT deletion_due_at <= now() FROM sandboxes")
    assert await pool.events(sandbox_id) == ["sandbox.allocated", "sandbox.deletion_requested"]


async def test_release_is_idempotent(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    first, copy = await release(session, release_command(sandbox_id, "ann"), release_command(sandbox_id, "ann"))
    (later,) = await release(session, release_command(sandbox_id, "ann"))
    assert first == copy == later
    assert (await pool.events(sandbox_id)).count("sandbox.deletion_requested") == 1


async def test_a_release_after_the_expiry_succeeds(pool: Pool) -> None:
    sandbox_id = await pool.overdue("ann")
    session = await pool.write_session()
    assert await expire(session) == [sandbox_id]
    (reply,) = await release(session, release_command(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert reply.status == "pending_deletion"
    assert await pool.value(END, sandbox_id) == "expired"
    assert (await pool.events(sandbox_id)).count("sandbox.deletion_requested") == 1


@pytest.mark.parametrize("status", ["deleted", "deletion_failed"])
async def test_a_repeated_release_returns_the_status_of_the_deletion(pool: Pool, status: str) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = $1", status)
    (reply,) = await release(await pool.write_session(), release_command(sandbox_id, "gone"))
    assert isinstance(reply, SandboxReleased)
    assert reply.status == status


async def test_a_release_after_the_purge_succeeds_only_for_the_holder(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("DELETE FROM sandboxes")
    own, other = await release(
        await pool.write_session(), release_command(sandbox_id, "gone"), release_command(sandbox_id, "bob")
    )
    assert isinstance(own, SandboxReleased)
    assert own.status == "deleted"
    assert refusal_code(other) == "NOT_SANDBOX_OWNER"


async def test_a_release_without_a_lease_of_the_student_is_refused(pool: Pool) -> None:
    leased = await pool.lease("ann")
    (free,) = await pool.fill(1)
    before = await pool.state()
    replies = await release(
        await pool.write_session(),
        release_command(leased, "bob"),
        release_command(free, "bob"),
        release_command(f"{leased}0", "ann"),
        release_command("%", "ann"),
    )
    assert [refusal_code(reply) for reply in replies] == 2 * ["NOT_SANDBOX_OWNER"] + 2 * ["SANDBOX_NOT_FOUND"]
    assert await pool.state() == before


async def test_replies_to_a_batch_of_releases_are_in_order(pool: Pool) -> None:
    first, second = await pool.lease("ann"), await pool.lease("bob")
    replies = await release(
        await pool.write_session(),
        release_command(second, "ann"),
        release_command(first, "ann"),
        release_command("x", "ann"),
        release_command(second, "bob"),
    )
    assert [reply.type for reply in replies] == ["Refused", "SandboxReleased", "Refused", "SandboxReleased"]


async def test_an_allocation_after_a_release_gets_another_sandbox(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    session = await pool.write_session()
    await release(session, release_command(sandbox_id, "ann"))
    (reply,) = await allocate(session, allocate_command("ann"))
    assert granted_lease(reply).new
    assert granted_lease(reply).sandbox_id != sandbox_id


async def test_only_leases_past_the_grace_period_expire(pool: Pool) -> None:
    long_ago = await pool.overdue("ann", timedelta(minutes=31))
    await pool.overdue("bob", timedelta(minutes=29))
    await pool.lease("cid")
    session = await pool.write_session()
    assert await expire(session, grace_sec=30 * 60) == [long_ago]
    assert await expire(session, grace_sec=30 * 60) == []
    assert await pool.status(long_ago) == "pending_deletion"
    assert await pool.events(long_ago) == ["sandbox.allocated", "sandbox.deletion_requested"]


async def test_leases_expire_in_batches_longest_overdue_first(pool: Pool) -> None:
    ids = [await pool.overdue(f"student-{hours}", timedelta(hours=hours)) for hours in (1, 3, 2)]
    session = await pool.write_session()
    assert sorted(await expire(session, limit=2)) == sorted(ids[1:])
    assert await expire(session, limit=2) == ids[:1]


async def test_a_release_that_loses_a_race_raises_concurrent_update(pool: Pool) -> None:
    sandbox_id = await pool.overdue("ann")
    clock, student = await pool.write_session(), await pool.write_session()
    transaction = clock.connection.transaction()
    await transaction.start()
    assert await expire(clock) == [sandbox_id]
    waiting = asyncio.create_task(release(student, release_command(sandbox_id, "ann")))
    await pool.until_waiting(student)
    await transaction.commit()
    with pytest.raises(ConcurrentUpdate):
        await waiting
    (reply,) = await release(student, release_command(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert await pool.value(END, sandbox_id) == "expired"


def play_command(holder: str, ended_at: int = MAX_TIME) -> EndPlay:
    return EndPlay(request_id="request", holder=holder, ended_at=ended_at)


async def end_plays(session: WriteSession, *commands: EndPlay) -> list[tuple[str, str | None]]:
    """End plays, and run again after a race. Return the outcome and the sandbox of each."""
    while True:
        try:
            replies = await end_play(session, commands)
        except ConcurrentUpdate:
            continue
        assert all(isinstance(reply, PlayEnded) for reply in replies)
        return [(reply.outcome, reply.sandbox_id) for reply in replies if isinstance(reply, PlayEnded)]


async def test_the_end_of_a_play_ends_the_lease_once(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    other_id = await pool.lease("bob")
    session = await pool.write_session()
    outcomes = await end_plays(session, play_command("ann"), play_command("nobody"), play_command("ann"))
    assert outcomes == [("released", sandbox_id), ("no_lease", None), ("released", sandbox_id)]
    assert await end_plays(session, play_command("ann")) == [("no_lease", None)]
    assert await pool.value(END, sandbox_id) == "play_ended"
    deletion_reason = "SELECT deletion_reason FROM sandboxes WHERE sandbox_id = $1"
    assert await pool.value(deletion_reason, sandbox_id) == "play_ended"
    assert await pool.events(sandbox_id) == ["sandbox.allocated", "sandbox.deletion_requested"]
    assert await pool.status(other_id) == "allocated"


async def test_the_end_of_an_earlier_play_keeps_a_newer_lease(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    allocated_at: int = await pool.value("SELECT floor(extract(epoch FROM allocated_at))::bigint FROM leases")
    assert await end_plays(session, play_command("ann", allocated_at - 1)) == [("newer_lease", sandbox_id)]
    assert await pool.status(sandbox_id) == "allocated"
    assert await end_plays(session, play_command("ann", allocated_at)) == [("released", sandbox_id)]


async def test_a_release_after_the_end_of_the_play_succeeds(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    await end_plays(session, play_command("ann"))
    (reply,) = await release(session, release_command(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert await pool.value(END, sandbox_id) == "play_ended"
