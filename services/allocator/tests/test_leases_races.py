"""Races for the end of a lease: each pair has one winner and one consistent history.

Each statement meets the end of the lease on another connection, in random order. `RACES=1000` makes a long run.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from allocator.handlers import deletions
from allocator.handlers.leases import end_play
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import ClaimDeletions, EndPlay
from sandbox_broker.contract.replies import (
    DeletionsClaimed,
    LeaseExtended,
    LeaseGranted,
    PlayEnded,
    Reply,
    SandboxReleased,
)
from sandbox_broker.contract.types import MAX_TIME

from .allocator_harness import RUN, Pool, allocate_command, refusal_code, release, release_command
from .test_lease_changes import claim, expire, extend, replace, standby_command, take_lease

END = "SELECT end_reason FROM leases WHERE sandbox_id = $1"
ENDED_ONCE = ["sandbox.allocated", "sandbox.deletion_requested"]

Record = Callable[[str, object], None]


@pytest.fixture
def races() -> int:
    """Number of races per test."""
    return int(os.environ.get("RACES", "25"))


async def race(*operations: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run the operations concurrently, in random order; return their results in the given order."""
    order = random.sample(range(len(operations)), len(operations))
    results = await asyncio.gather(*(operations[index]() for index in order))
    return [results[order.index(index)] for index in range(len(operations))]


def retried(session: WriteSession, operation: Callable[..., Awaitable[Any]], *arguments: Any) -> Callable[[], Any]:
    """Return the operation with the retries of the dispatcher after a race."""
    return partial(session.run, partial(operation, session, *arguments))


async def expire_and_claim_deletions(session: WriteSession) -> list[str]:
    """End the overdue leases, and claim the due deletions like the reaper. Return the sandboxes to delete."""
    await expire(session)
    reply = await deletions.claim_deletions(session, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(reply, DeletionsClaimed)
    return [deletion.sandbox_id for deletion in reply.deletions]


async def end_play_of(session: WriteSession, holder: str) -> Reply:
    (reply,) = await end_play(session, [EndPlay(request_id="request", holder=holder, ended_at=MAX_TIME)])
    return reply


async def release_sandbox(session: WriteSession, sandbox_id: str, holder: str) -> Reply:
    (reply,) = await release(session, release_command(sandbox_id, holder))
    return reply


async def test_an_extension_and_the_expiry_have_one_winner(
    pool: Pool, races: int, record_testsuite_property: Record
) -> None:
    student, clock = await pool.write_session(), await pool.write_session()
    wins = 0
    for number in range(races):
        holder = f"student-{number}"
        sandbox_id = (await take_lease(pool, student, allocate_command(holder))).sandbox_id
        await pool.execute("UPDATE leases SET expires_at = now() WHERE sandbox_id = $1", sandbox_id)
        reply, deleting = await race(
            retried(student, extend, sandbox_id, holder), partial(expire_and_claim_deletions, clock)
        )
        end, events = await pool.value(END, sandbox_id), await pool.events(sandbox_id)
        if isinstance(reply, LeaseExtended):
            wins += 1
            assert (end, events) == (None, ["sandbox.allocated", "lease.extended"])
            assert await pool.status(sandbox_id) == "allocated"
            assert sandbox_id not in deleting
        else:
            assert refusal_code(reply) == "LEASE_ENDED"
            assert (end, events) == ("expired", ENDED_ONCE)
    record_testsuite_property("extensions that won", wins)
    await pool.assert_sound()


async def test_a_claim_and_the_end_of_standby_have_one_winner(
    pool: Pool, races: int, record_testsuite_property: Record
) -> None:
    student, clock = await pool.write_session(), await pool.write_session()
    wins = 0
    for number in range(races):
        setup, holder = f"setup-{number}", f"student-{number}"
        sandbox_id = (await take_lease(pool, student, standby_command(setup))).sandbox_id
        await pool.execute("UPDATE leases SET expires_at = now() WHERE sandbox_id = $1", sandbox_id)
        reply, deleting = await race(
            retried(student, claim, sandbox_id, setup, holder), partial(expire_and_claim_deletions, clock)
        )
        end, events = await pool.value(END, sandbox_id), await pool.events(sandbox_id)
        if isinstance(reply, LeaseGranted):
            wins += 1
            assert (end, events) == (None, ["sandbox.allocated", "lease.claimed"])
            assert sandbox_id not in deleting
        else:
            assert refusal_code(reply) == "LEASE_ENDED"
            assert (end, events) == ("unclaimed", ENDED_ONCE)
    record_testsuite_property("claims that won", wins)
    await pool.assert_sound()


async def test_a_replacement_and_a_release_have_one_winner(
    pool: Pool, races: int, record_testsuite_property: Record
) -> None:
    first, second = await pool.write_session(), await pool.write_session()
    wins = 0
    for number in range(races):
        holder = f"student-{number}"
        old = (await take_lease(pool, first, allocate_command(holder))).sandbox_id
        (new,) = await pool.fill(1)
        reply, released = await race(
            retried(first, replace, old, holder), retried(second, release_sandbox, old, holder)
        )
        assert isinstance(released, SandboxReleased)
        active = await pool.column("SELECT sandbox_id FROM leases WHERE holder = $1 AND ended_at IS NULL", holder)
        if isinstance(reply, LeaseGranted):
            wins += 1
            assert (await pool.value(END, old), active) == ("broken", [reply.sandbox_id])
            await release(first, release_command(reply.sandbox_id, holder))
        else:
            assert refusal_code(reply) == "LEASE_ENDED"
            assert (await pool.value(END, old), active) == ("student", [])
            await pool.execute("DELETE FROM sandboxes WHERE sandbox_id = $1", new)
        assert (await pool.events(old)).count("sandbox.deletion_requested") == 1
    record_testsuite_property("replacements that won", wins)
    await pool.assert_sound()


async def test_the_end_of_a_play_and_the_release_of_its_student_have_one_winner(
    pool: Pool, races: int, record_testsuite_property: Record
) -> None:
    student, instruqt = await pool.write_session(), await pool.write_session()
    wins = 0
    for number in range(races):
        holder = f"student-{number}"
        sandbox_id = (await take_lease(pool, student, allocate_command(holder))).sandbox_id
        play, released = await race(
            retried(instruqt, end_play_of, holder), retried(student, release_sandbox, sandbox_id, holder)
        )
        assert isinstance(released, SandboxReleased)
        assert released.status == "pending_deletion"
        assert isinstance(play, PlayEnded)
        wins += play.outcome == "released"
        assert await pool.value(END, sandbox_id) == {"released": "play_ended", "no_lease": "student"}[play.outcome]
        assert await pool.events(sandbox_id) == ENDED_ONCE
    record_testsuite_property("ends of plays that won", wins)
    await pool.assert_sound()


async def test_a_release_and_the_expiry_have_one_winner(
    pool: Pool, races: int, record_testsuite_property: Record
) -> None:
    student, clock = await pool.write_session(), await pool.write_session()
    wins = 0
    for number in range(races):
        holder = f"student-{number}"
        sandbox_id = (await take_lease(pool, student, allocate_command(holder))).sandbox_id
        await pool.execute("UPDATE leases SET expires_at = now() WHERE sandbox_id = $1", sandbox_id)
        released, _ = await race(retried(student, release_sandbox, sandbox_id, holder), partial(expire, clock))
        assert isinstance(released, SandboxReleased)
        assert released.status == "pending_deletion"
        end = await pool.value(END, sandbox_id)
        wins += end == "student"
        assert end in ("student", "expired")
        assert await pool.events(sandbox_id) == ENDED_ONCE
    record_testsuite_property("releases that won", wins)
    await pool.assert_sound()
