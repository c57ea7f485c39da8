"""Quota: the active leases of a policy never exceed `max_active`."""

import asyncio
from collections.abc import Sequence

import pytest

from allocator.handlers import policies
from allocator.routing import MAINTENANCE
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import AllocateSandbox, ApplyPolicies
from sandbox_broker.contract.policies import Match, Policy
from sandbox_broker.contract.replies import LeaseGranted, Reply, refuse

from .allocator_harness import (
    Pool,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
)

ACTIVE = "SELECT count(*) FROM leases WHERE policy = $1 AND ended_at IS NULL"


def lab(name: str = "lab", *, max_active: int | None, track: str | None = None) -> Policy:
    return Policy(name=name, match=Match(track_name=track or name), max_active=max_active)


def request(number: int, track: str = "lab", prefix: str | None = None) -> AllocateSandbox:
    return allocate_command(f"{track}-student-{number}", prefix, track=track)


def count_granted(replies: Sequence[Reply]) -> int:
    return sum(isinstance(reply, LeaseGranted) for reply in replies)


async def run(session: WriteSession, commands: Sequence[AllocateSandbox]) -> list[Reply]:
    """Repeat the commands until no other session is faster."""
    while True:
        try:
            return await session.run(lambda: allocate(session, *commands))
        except ConcurrentUpdate:
            pass


async def test_a_batch_gets_exactly_the_free_leases(pool: Pool) -> None:
    await pool.fill(20)
    await pool.apply_policies(lab(max_active=3), lab("other", max_active=2))
    session = await pool.write_session()
    replies = await allocate(
        session, *(request(number, track) for number in range(5) for track in ("lab", "other", "free"))
    )
    assert [await pool.value(ACTIVE, name) for name in ("lab", "other")] == [3, 2]
    assert count_granted(replies) == 3 + 2 + 5
    assert replies[-3] == refuse("QUOTA_EXCEEDED", cause="policy", policy="lab", max_active=3)
    assert replies[-2] == refuse("QUOTA_EXCEEDED", cause="policy", policy="other", max_active=2)
    assert await pool.events() == ["sandbox.allocated"] * 10  # a quota does not exhaust the pool
    await pool.assert_sound()


async def test_an_active_lease_is_repeated_at_the_limit(pool: Pool) -> None:
    await pool.fill(3)
    await pool.apply_policies(lab(max_active=1))
    session = await pool.write_session()
    (first,) = await allocate(session, request(1))
    again, other = await allocate(session, request(1), request(2))
    assert again == granted_lease(first).model_copy(update={"new": False})
    assert refusal_code(other) == "QUOTA_EXCEEDED"


async def test_the_end_of_a_lease_frees_its_place(pool: Pool) -> None:
    await pool.fill(3)
    await pool.apply_policies(lab(max_active=1))
    session = await pool.write_session()
    (first,) = await allocate(session, request(1))
    await release(session, release_command(granted_lease(first).sandbox_id, "lab-student-1"))
    second, third = await allocate(session, request(2), request(3))
    assert granted_lease(second).new
    assert refusal_code(third) == "QUOTA_EXCEEDED"


async def test_a_limit_of_zero_closes_a_lab(pool: Pool) -> None:
    await pool.fill(1)
    await pool.apply_policies(lab(max_active=0))
    (reply,) = await allocate(await pool.write_session(), request(1))
    assert refusal_code(reply) == "QUOTA_EXCEEDED"


async def test_a_lowered_limit_grants_nothing_until_enough_leases_have_ended(pool: Pool) -> None:
    await pool.fill(10)
    await pool.apply_policies(lab(max_active=4))
    session = await pool.write_session()
    leases = [granted_lease(reply) for reply in await allocate(session, *map(request, range(4)))]
    await pool.apply_policies(lab(max_active=2))
    for number in range(2):
        await release(session, release_command(leases[number].sandbox_id, f"lab-student-{number}"))
        (reply,) = await allocate(session, request(10))
        assert refusal_code(reply) == "QUOTA_EXCEEDED"
    await release(session, release_command(leases[2].sandbox_id, "lab-student-2"))
    replies = await allocate(session, request(10), request(11))
    assert count_granted(replies) == 1
    assert await pool.value(ACTIVE, "lab") == 2


async def test_a_request_without_a_sandbox_takes_no_place(pool: Pool) -> None:
    await pool.fill(["aws-1"])
    await pool.apply_policies(lab(max_active=1))
    session = await pool.write_session()
    (reply,) = await allocate(session, request(1, prefix="gcp-"))
    assert refusal_code(reply) == "POOL_EXHAUSTED"
    (reply,) = await allocate(session, request(2, prefix="aws-"))
    assert granted_lease(reply).name == "aws-1"


@pytest.mark.parametrize("allocators", [1, 2])
async def test_concurrent_allocators_grant_exactly_the_limit(pool: Pool, allocators: int) -> None:
    """The sessions share an epoch, so only the statement itself separates them."""
    await pool.fill(300)
    await pool.apply_policies(lab(max_active=50))
    sessions = [await pool.write_session() for _ in range(allocators)]

    async def serve(session: WriteSession, first: int) -> list[Reply]:
        numbers = range(first, 300, allocators)
        batches = [list(map(request, numbers[start : start + 10])) for start in range(0, len(numbers), 10)]
        return [reply for batch in batches for reply in await run(session, batch)]

    replies = await asyncio.gather(*(serve(session, first) for first, session in enumerate(sessions)))
    assert sum(map(count_granted, replies)) == 50
    assert {refusal_code(reply) for part in replies for reply in part if not isinstance(reply, LeaseGranted)} == {
        "QUOTA_EXCEEDED"
    }
    assert await pool.value(ACTIVE, "lab") == 50
    await pool.assert_sound()


async def test_a_statement_that_has_not_counted_another_grants_nothing(pool: Pool) -> None:
    await pool.fill(10)
    await pool.apply_policies(lab(max_active=1))
    faster, slower = await pool.write_session(), await pool.write_session()
    await allocate(slower, request(0, "free"))  # loads the policies
    transaction = faster.connection.transaction()
    await transaction.start()
    await allocate(faster, request(1))
    waiting = asyncio.create_task(run(slower, [request(2)]))
    await pool.until_waiting(slower)
    await transaction.commit()
    assert [refusal_code(reply) for reply in await waiting] == ["QUOTA_EXCEEDED"]
    assert await pool.value(ACTIVE, "lab") == 1


async def test_policies_change_between_two_statements_of_students(pool: Pool) -> None:
    await pool.fill(10)
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    await allocate(session, request(0, "free"))
    transaction = session.connection.transaction()
    await transaction.start()
    await allocate(session, request(1), request(2))
    command = ApplyPolicies(request_id="request", policies=(lab(max_active=1),))
    applying = asyncio.create_task(policies.apply_policies(maintenance, command))
    await pool.until_waiting(maintenance)
    await transaction.commit()
    await applying
    first, second = await allocate(session, request(3), request(4))
    assert granted_lease(first).new
    assert refusal_code(second) == "QUOTA_EXCEEDED"
