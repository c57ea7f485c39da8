"""Commands of an administrator for one sandbox: EndLease and RetryDeletion."""

import asyncio

import pytest

from allocator.handlers.deletions import retry_deletion
from allocator.handlers.leases import end_lease, release_sandbox
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import EndLease, RetryDeletion
from sandbox_broker.contract.replies import Reply, SandboxReleased

from .allocator_harness import Pool, refusal_code, release_command

END = "SELECT (end_reason, end_note) = ($2, $3) FROM leases WHERE sandbox_id = $1"


async def release(session: WriteSession, sandbox_id: str, note: str = "student left") -> Reply:
    return await end_lease(session, EndLease(request_id="request", sandbox_id=sandbox_id, note=note))


async def retry(session: WriteSession, sandbox_id: str) -> Reply:
    return await retry_deletion(session, RetryDeletion(request_id="request", sandbox_id=sandbox_id))


async def test_end_lease_ends_the_lease_of_any_student(pool: Pool) -> None:
    sandbox_id, other = await pool.lease("ann"), await pool.lease("bob")
    reply = await release(await pool.write_session(), sandbox_id)
    assert isinstance(reply, SandboxReleased)
    assert (reply.sandbox_id, reply.status) == (sandbox_id, "pending_deletion")
    assert await pool.value(END, sandbox_id, "admin", "student left")
    assert await pool.value("SELECT deletion_reason FROM sandboxes WHERE sandbox_id = $1", sandbox_id) == "admin"
    assert (await pool.events(sandbox_id))[-1] == "sandbox.deletion_requested"
    assert await pool.status(other) == "allocated"
    await pool.assert_sound()


async def test_end_lease_is_idempotent(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    first = await release(session, sandbox_id)
    assert isinstance(first, SandboxReleased)
    assert first.changed
    before = await pool.state()
    repeated = await release(session, sandbox_id, "another reason")
    assert repeated == first.model_copy(update={"changed": False})
    assert await pool.state() == before


async def test_end_lease_keeps_the_end_reason_of_a_released_lease(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    reply = await release(await pool.write_session(), sandbox_id)
    assert isinstance(reply, SandboxReleased)
    assert await pool.value("SELECT end_reason FROM leases") == "student"


@pytest.mark.parametrize("status", ["available", "stale", "deletion_failed"])
async def test_end_lease_refuses_a_sandbox_without_a_lease(pool: Pool, status: str) -> None:
    (sandbox_id,) = await pool.fill(1, status)
    session = await pool.write_session()
    before = await pool.state()
    assert refusal_code(await release(session, sandbox_id)) == "NOT_ALLOCATED"
    assert refusal_code(await release(session, "unknown")) == "SANDBOX_NOT_FOUND"
    assert await pool.state() == before


async def test_concurrent_release_and_end_lease_end_the_lease_once(pool: Pool) -> None:
    for number in range(10):
        sandbox_id = await pool.lease(f"student-{number}")
        student, administrator = await pool.write_session(), await pool.write_session()

        async def by_administrator(session: WriteSession = administrator, sandbox_id: str = sandbox_id) -> Reply:
            while True:
                try:
                    return await release(session, sandbox_id)
                except ConcurrentUpdate:
                    continue

        async def by_student(
            session: WriteSession = student, sandbox_id: str = sandbox_id, holder: str = f"student-{number}"
        ) -> Reply:
            while True:
                try:
                    (reply,) = await release_sandbox(session, [release_command(sandbox_id, holder)])
                except ConcurrentUpdate:
                    continue
                return reply

        replies = await asyncio.gather(by_student(), by_administrator())
        assert [reply.type for reply in replies] == ["SandboxReleased"] * 2
        assert (await pool.events(sandbox_id)).count("sandbox.deletion_requested") == 1
    await pool.assert_sound()


async def test_retry_deletion_resets_the_attempts(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1, "deletion_failed")
    await pool.execute("UPDATE sandboxes SET deletion_attempts = 8, deletion_error = 'CSP said 500'")
    session = await pool.write_session()
    reply = await retry(session, sandbox_id)
    assert isinstance(reply, SandboxReleased)
    assert reply.status == "pending_deletion"
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert await pool.value("SELECT deletion_attempts = 0 AND deletion_due_at <= now() FROM sandboxes")
    assert await pool.events(sandbox_id) == ["sandbox.deletion_requested"]
    assert refusal_code(await retry(session, sandbox_id)) == "NOT_DELETION_FAILED"
    assert await pool.events(sandbox_id) == ["sandbox.deletion_requested"]


@pytest.mark.parametrize("status", ["available", "allocated", "pending_deletion", "stale", "deleted"])
async def test_retry_deletion_refuses_other_statuses(pool: Pool, status: str) -> None:
    (sandbox_id,) = await pool.fill(1, status)
    session = await pool.write_session()
    before = await pool.state()
    assert refusal_code(await retry(session, sandbox_id)) == "NOT_DELETION_FAILED"
    assert refusal_code(await retry(session, "unknown")) == "SANDBOX_NOT_FOUND"
    assert await pool.state() == before
