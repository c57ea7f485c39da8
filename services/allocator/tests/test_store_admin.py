"""What an administrator does to one sandbox: end its lease, have its deletion tried anew."""

import asyncio

import pytest

from allocator.handlers.deletions import retry_deletion
from allocator.handlers.leases import end_lease
from allocator.handlers.students import release_sandbox
from allocator.writer import Overtaken, Writer
from sandbox_broker.contract.commands import EndLease, RetryDeletion
from sandbox_broker.contract.replies import Reply, SandboxReleased

from .allocator_harness import Pool, done, refusal

END = "SELECT (end_reason, end_note) = ($2, $3) FROM leases WHERE sandbox_id = $1"


async def release(writer: Writer, sandbox_id: str, note: str = "student left") -> Reply:
    return await end_lease(writer, EndLease(request_id="request", sandbox_id=sandbox_id, note=note))


async def retry(writer: Writer, sandbox_id: str) -> Reply:
    return await retry_deletion(writer, RetryDeletion(request_id="request", sandbox_id=sandbox_id))


async def test_an_administrator_ends_any_students_lease(pool: Pool) -> None:
    sandbox_id, other = await pool.lease("ann"), await pool.lease("bob")
    reply = await release(await pool.writer(), sandbox_id)
    assert isinstance(reply, SandboxReleased)
    assert (reply.sandbox_id, reply.status) == (sandbox_id, "pending_deletion")
    assert await pool.value(END, sandbox_id, "admin", "student left")
    assert await pool.value("SELECT deletion_reason FROM sandboxes WHERE sandbox_id = $1", sandbox_id) == "admin"
    assert (await pool.events(sandbox_id))[-1] == "sandbox.deletion_requested"
    assert await pool.status(other) == "allocated"
    await pool.sound()


async def test_ending_it_again_changes_nothing_and_gives_the_same_answer(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    writer = await pool.writer()
    first = await release(writer, sandbox_id)
    before = await pool.state()
    assert await release(writer, sandbox_id, "another reason") == first
    assert await pool.state() == before


async def test_what_the_student_has_ended_stays_as_it_was(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    reply = await release(await pool.writer(), sandbox_id)
    assert isinstance(reply, SandboxReleased)
    assert await pool.value("SELECT end_reason FROM leases") == "student"


@pytest.mark.parametrize("status", ["available", "stale", "deletion_failed"])
async def test_what_nobody_ever_held_cannot_be_ended(pool: Pool, status: str) -> None:
    (sandbox_id,) = await pool.fill(1, status)
    writer = await pool.writer()
    before = await pool.state()
    assert refusal(await release(writer, sandbox_id)) == "NOT_ALLOCATED"
    assert refusal(await release(writer, "unknown")) == "SANDBOX_NOT_FOUND"
    assert await pool.state() == before


async def test_student_and_administrator_at_once_end_it_once(pool: Pool) -> None:
    for number in range(10):
        sandbox_id = await pool.lease(f"student-{number}")
        student, administrator = await pool.writer(), await pool.writer()

        async def by_administrator(writer: Writer = administrator, sandbox_id: str = sandbox_id) -> Reply:
            while True:
                try:
                    return await release(writer, sandbox_id)
                except Overtaken:
                    continue

        async def by_student(
            writer: Writer = student, sandbox_id: str = sandbox_id, holder: str = f"student-{number}"
        ) -> Reply:
            while True:
                try:
                    (reply,) = await release_sandbox(writer, [done(sandbox_id, holder)])
                except Overtaken:
                    continue
                return reply

        replies = await asyncio.gather(by_student(), by_administrator())
        assert [reply.type for reply in replies] == ["SandboxReleased"] * 2
        assert (await pool.events(sandbox_id)).count("sandbox.deletion_requested") == 1
    await pool.sound()


async def test_a_failed_deletion_is_sent_back_with_all_its_attempts(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1, "deletion_failed")
    await pool.execute("UPDATE sandboxes SET deletion_attempts = 8, deletion_error = 'CSP said 500'")
    writer = await pool.writer()
    reply = await retry(writer, sandbox_id)
    assert isinstance(reply, SandboxReleased)
    assert reply.status == "pending_deletion"
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert await pool.value("SELECT deletion_attempts = 0 AND deletion_due_at <= now() FROM sandboxes")
    assert await pool.events(sandbox_id) == ["sandbox.deletion_requested"]
    assert refusal(await retry(writer, sandbox_id)) == "NOT_DELETION_FAILED"
    assert await pool.events(sandbox_id) == ["sandbox.deletion_requested"]


@pytest.mark.parametrize("status", ["available", "allocated", "pending_deletion", "stale", "deleted"])
async def test_only_a_failed_deletion_is_sent_back(pool: Pool, status: str) -> None:
    (sandbox_id,) = await pool.fill(1, status)
    writer = await pool.writer()
    before = await pool.state()
    assert refusal(await retry(writer, sandbox_id)) == "NOT_DELETION_FAILED"
    assert refusal(await retry(writer, "unknown")) == "SANDBOX_NOT_FOUND"
    assert await pool.state() == before
