"""How leases end: by the student, or by the clock; once, whoever comes second."""

import asyncio
import random
from datetime import timedelta

import pytest

from allocator.handlers.leases import expire_leases
from allocator.writer import Overtaken, Writer
from sandbox_broker.contract.commands import ExpireLeases
from sandbox_broker.contract.replies import LeasesExpired, SandboxReleased

from .allocator_harness import Pool, allocate, ask, done, granted, refusal, release

END = "SELECT end_reason FROM leases WHERE sandbox_id = $1 AND ended_at IS NOT NULL"


async def expire(writer: Writer, *, grace_sec: float = 0, limit: int = 100) -> list[str]:
    reply = await expire_leases(writer, ExpireLeases(grace_sec=grace_sec, limit=limit))
    assert isinstance(reply, LeasesExpired)
    return list(reply.sandbox_ids)


async def test_a_release_ends_the_lease_and_asks_for_the_deletion(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    (reply,) = await release(await pool.writer(), done(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert (reply.sandbox_id, reply.status) == (sandbox_id, "pending_deletion")
    ended_at = await pool.value("SELECT floor(extract(epoch FROM ended_at))::bigint FROM leases")
    assert reply.deletion_requested_at == ended_at
    assert await pool.value(END, sandbox_id) == "student"
    assert await pool.value("SELECT deletion_due_at <= now() FROM sandboxes")
    assert await pool.events(sandbox_id) == ["sandbox.allocated", "sandbox.deletion_requested"]


async def test_a_repeated_release_gives_the_same_answer(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    writer = await pool.writer()
    first, copy = await release(writer, done(sandbox_id, "ann"), done(sandbox_id, "ann"))
    (later,) = await release(writer, done(sandbox_id, "ann"))
    assert first == copy == later
    assert (await pool.events(sandbox_id)).count("sandbox.deletion_requested") == 1


async def test_a_student_may_be_late(pool: Pool) -> None:
    sandbox_id = await pool.overdue("ann")
    writer = await pool.writer()
    assert await expire(writer) == [sandbox_id]
    (reply,) = await release(writer, done(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert reply.status == "pending_deletion"
    assert await pool.value(END, sandbox_id) == "expired"
    assert (await pool.events(sandbox_id)).count("sandbox.deletion_requested") == 1


@pytest.mark.parametrize("status", ["deleted", "deletion_failed"])
async def test_a_release_tells_how_far_the_deletion_has_come(pool: Pool, status: str) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = $1", status)
    (reply,) = await release(await pool.writer(), done(sandbox_id, "gone"))
    assert isinstance(reply, SandboxReleased)
    assert reply.status == status


async def test_a_release_after_the_record_was_purged_is_success_for_its_student_only(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("DELETE FROM sandboxes")
    own, other = await release(await pool.writer(), done(sandbox_id, "gone"), done(sandbox_id, "bob"))
    assert isinstance(own, SandboxReleased)
    assert own.status == "deleted"
    assert refusal(other) == "NOT_SANDBOX_OWNER"


async def test_nobody_releases_what_another_student_holds_or_what_nobody_holds(pool: Pool) -> None:
    leased = await pool.lease("ann")
    (free,) = await pool.fill(1)
    before = await pool.state()
    replies = await release(
        await pool.writer(), done(leased, "bob"), done(free, "bob"), done(f"{leased}0", "ann"), done("%", "ann")
    )
    assert [refusal(reply) for reply in replies] == 2 * ["NOT_SANDBOX_OWNER"] + 2 * ["SANDBOX_NOT_FOUND"]
    assert await pool.state() == before


async def test_each_release_of_a_batch_gets_its_own_answer_in_order(pool: Pool) -> None:
    first, second = await pool.lease("ann"), await pool.lease("bob")
    replies = await release(
        await pool.writer(), done(second, "ann"), done(first, "ann"), done("x", "ann"), done(second, "bob")
    )
    assert [reply.type for reply in replies] == ["Refused", "SandboxReleased", "Refused", "SandboxReleased"]


async def test_after_a_release_the_student_gets_another_sandbox(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    await pool.fill(1)
    writer = await pool.writer()
    await release(writer, done(sandbox_id, "ann"))
    (reply,) = await allocate(writer, ask("ann"))
    assert granted(reply).new
    assert granted(reply).sandbox_id != sandbox_id


async def test_only_leases_overdue_by_more_than_the_grace_expire(pool: Pool) -> None:
    long_ago = await pool.overdue("ann", timedelta(minutes=31))
    await pool.overdue("bob", timedelta(minutes=29))
    await pool.lease("cid")
    writer = await pool.writer()
    assert await expire(writer, grace_sec=30 * 60) == [long_ago]
    assert await expire(writer, grace_sec=30 * 60) == []
    assert await pool.status(long_ago) == "pending_deletion"
    assert await pool.events(long_ago) == ["sandbox.allocated", "sandbox.deletion_requested"]


async def test_leases_expire_in_pieces_the_longest_overdue_first(pool: Pool) -> None:
    ids = [await pool.overdue(f"student-{hours}", timedelta(hours=hours)) for hours in (1, 3, 2)]
    writer = await pool.writer()
    assert sorted(await expire(writer, limit=2)) == sorted(ids[1:])
    assert await expire(writer, limit=2) == ids[:1]


async def test_a_release_and_an_expiry_at_the_same_moment_end_a_lease_once(pool: Pool) -> None:
    student, clock = await pool.writer(), await pool.writer()
    for number in range(40):
        sandbox_id = await pool.overdue(f"student-{number}")

        async def give_back(sandbox_id: str = sandbox_id, holder: str = f"student-{number}") -> SandboxReleased:
            while True:
                try:
                    (reply,) = await release(student, done(sandbox_id, holder))
                except Overtaken:
                    continue
                assert isinstance(reply, SandboxReleased)
                return reply

        if random.random() < 0.5:
            reply, expired = await asyncio.gather(give_back(), expire(clock))
        else:
            expired, reply = await asyncio.gather(expire(clock), give_back())
        assert reply.status == "pending_deletion"
        assert await pool.value(END, sandbox_id) == ("expired" if expired else "student")
        assert await pool.events(sandbox_id) == ["sandbox.allocated", "sandbox.deletion_requested"]
    await pool.sound()


async def test_a_release_that_is_overtaken_changes_nothing_and_asks_to_be_repeated(pool: Pool) -> None:
    sandbox_id = await pool.overdue("ann")
    clock, student = await pool.writer(), await pool.writer()
    transaction = clock.connection.transaction()
    await transaction.start()
    assert await expire(clock) == [sandbox_id]
    waiting = asyncio.create_task(release(student, done(sandbox_id, "ann")))
    await pool.until_waiting(student)
    await transaction.commit()
    with pytest.raises(Overtaken):
        await waiting
    (reply,) = await release(student, done(sandbox_id, "ann"))
    assert isinstance(reply, SandboxReleased)
    assert await pool.value(END, sandbox_id) == "expired"
