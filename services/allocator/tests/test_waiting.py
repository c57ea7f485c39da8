"""Waiting line: joining, keeping and losing a place, and service in the order of arrival."""

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from allocator.handlers import waiting
from allocator.handlers.lease_changes import claim_lease, replace_sandbox
from allocator.handlers.leases import end_play
from allocator.sql import waiting as statements
from allocator.waiting_line import WaitingLimits, WaitingLine
from allocator.write_session import Fenced, WriteSession
from sandbox_broker.contract.commands import AllocateSandbox, ClaimLease, EndPlay, ReplaceSandbox, ServeWaiting
from sandbox_broker.contract.policies import Match, Policy
from sandbox_broker.contract.replies import LineServed, PlayEnded, Reply, StudentWaiting

from .allocator_harness import (
    Pool,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
)


def wait_command(
    holder: str, prefix: str | None = None, key: str | None = None, wait_sec: int = 900, track: str | None = None
) -> AllocateSandbox:
    return allocate_command(holder, prefix, key, track, wait_sec)


def place(reply: Reply) -> StudentWaiting:
    assert isinstance(reply, StudentWaiting), reply
    return reply


async def ask(session: WriteSession, *commands: AllocateSandbox) -> Reply:
    """Send the commands in one batch; return the last reply."""
    return (await allocate(session, *commands))[-1]


async def serve(session: WriteSession) -> LineServed:
    (reply,) = await waiting.serve_waiting(session, [ServeWaiting()])
    assert isinstance(reply, LineServed)
    return reply


async def holders(pool: Pool) -> list[str]:
    return await pool.column("SELECT holder FROM waiting ORDER BY waiting_id")


async def leased(pool: Pool) -> dict[str, str]:
    """Return the name of the sandbox of each student with a lease; for a replacement, of the new one."""
    rows = await pool.rows("SELECT holder, name FROM leases JOIN sandboxes USING (sandbox_id) ORDER BY lease_id")
    return {row["holder"]: row["name"] for row in rows}


async def events(pool: Pool, event_type: str) -> list[dict[str, Any]]:
    rows = await pool.column("SELECT data::text FROM outbox WHERE type = $1 ORDER BY outbox_id", event_type)
    return [json.loads(row) for row in rows]


async def pass_time(pool: Pool, seconds: float) -> None:
    await pool.execute(
        "UPDATE waiting SET waiting_since = waiting_since - $1 * interval '1 second', "
        "asked_at = asked_at - $1 * interval '1 second', ends_at = ends_at - $1 * interval '1 second'",
        seconds,
    )


async def test_the_end_of_a_play_ends_the_place_of_its_student(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann"), wait_command("bob"))
    since: int = await pool.value("SELECT floor(extract(epoch FROM waiting_since))::bigint FROM waiting LIMIT 1")
    earlier, ended, repeated = [
        (await end_play(session, [EndPlay(request_id="request", holder="ann", ended_at=at)]))[0]
        for at in (since - 1, since, since)
    ]
    outcomes = [reply.outcome for reply in (earlier, ended, repeated) if isinstance(reply, PlayEnded)]
    assert outcomes == ["no_lease", "stopped_waiting", "no_lease"]
    (event,) = await events(pool, "waiting.ended")
    assert (event["holder"], event["reason"]) == ("ann", "play_ended")
    assert await holders(pool) == ["bob"]
    await pool.fill(1)
    assert (await serve(session)).served == 1
    assert list(await leased(pool)) == ["bob"]


async def test_without_a_sandbox_a_student_who_wants_to_wait_gets_a_place(pool: Pool) -> None:
    session = await pool.write_session()
    first, second = await allocate(session, wait_command("ann"), wait_command("bob"))
    now = await pool.value("SELECT extract(epoch FROM now())::bigint")
    assert [place(first).position, place(second).position] == [1, 2]
    assert now - 5 <= place(first).waiting_since <= now
    assert place(first).estimated_wait_sec is None
    assert place(await ask(session, wait_command("bob"))) == second
    assert await holders(pool) == ["ann", "bob"]
    started = await events(pool, "waiting.started")
    assert [(event["holder"], event["name_prefix"]) for event in started] == [("ann", None), ("bob", None)]
    assert 895 <= started[0]["ends_at"] - started[0]["waiting_since"] <= 900


async def test_a_student_who_does_not_want_to_wait_gets_the_refusal_of_today(pool: Pool) -> None:
    session = await pool.write_session()
    for command in (allocate_command("ann"), wait_command("ann", wait_sec=0)):
        assert refusal_code(await ask(session, command)) == "POOL_EXHAUSTED"
    assert await holders(pool) == []


async def test_a_free_sandbox_is_leased_without_a_place(pool: Pool) -> None:
    await pool.fill(1)
    assert granted_lease(await ask(await pool.write_session(), wait_command("ann"))).new
    assert await holders(pool) == []


async def test_a_sandbox_is_leased_to_the_first_without_a_repetition(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, *(wait_command(holder) for holder in ("ann", "bob", "cid")))
    await pool.fill(["sandbox-1", "sandbox-2"])
    assert await serve(session) == LineServed(served=2, waiting=1)
    assert await leased(pool) == {"ann": "sandbox-1", "bob": "sandbox-2"}
    lease = granted_lease(await ask(session, wait_command("ann")))
    assert (lease.new, lease.name) == (False, "sandbox-1")
    assert place(await ask(session, wait_command("cid"))).position == 1
    served = await events(pool, "waiting.served")
    assert [(event["holder"], event["name"]) for event in served] == [("ann", "sandbox-1"), ("bob", "sandbox-2")]
    assert await serve(session) == LineServed(served=0, waiting=1)
    await pool.assert_sound()


async def test_a_request_never_overtakes_a_student_whom_the_sandbox_fits(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann", "lab-a-"))
    await pool.fill(["lab-a-1", "lab-b-1"])
    replies = await allocate(
        session, allocate_command("bob", "lab-a-"), allocate_command("cid"), wait_command("dan", "lab-a-")
    )
    assert refusal_code(replies[0]) == "POOL_EXHAUSTED"
    assert granted_lease(replies[1]).name == "lab-b-1"
    assert place(replies[2]).position == 1
    assert await leased(pool) == {"ann": "lab-a-1", "cid": "lab-b-1"}


async def test_a_replacement_goes_before_the_line(pool: Pool) -> None:
    session = await pool.write_session()
    (broken,) = await pool.fill(1)
    await ask(session, allocate_command("ann"))
    replace = [ReplaceSandbox(request_id="request", sandbox_id=broken, holder="ann", reason="no login")]
    await ask(session, wait_command("bob"))
    assert [refusal_code(reply) for reply in await replace_sandbox(session, replace)] == ["POOL_EXHAUSTED"]
    await pool.fill(["sandbox-9"])
    assert [granted_lease(reply).name for reply in await replace_sandbox(session, replace)] == ["sandbox-9"]
    assert await serve(session) == LineServed(served=0, waiting=1)
    await pool.assert_sound()


async def test_a_request_for_other_sandboxes_is_served_directly(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann", "lab-a-"))
    await pool.fill(["lab-b-1"])
    assert granted_lease(await ask(session, allocate_command("bob", "lab-b-"))).name == "lab-b-1"
    assert place(await ask(session, wait_command("cid", "lab-b-"))).position == 1
    assert place(await ask(session, wait_command("dan"))).position == 3


async def test_a_repetition_in_the_moment_of_service_gets_a_new_lease(pool: Pool) -> None:
    session = await pool.write_session()
    await ask(session, wait_command("ann"))
    await pool.fill(1)
    replies = await allocate(session, wait_command("ann", wait_sec=899), wait_command("ann", wait_sec=898))
    assert sorted(granted_lease(reply).new for reply in replies) == [False, True]
    assert await holders(pool) == []


async def test_a_student_who_stops_asking_loses_the_place(pool: Pool) -> None:
    session = await pool.write_session()
    session.waiting_line.loaded_at = -1e9
    await allocate(session, wait_command("ann"), wait_command("bob"))
    session.waiting_line.loaded_at = -1e9
    await pass_time(pool, 50)
    assert place(await ask(session, wait_command("bob"))).position == 2
    await pass_time(pool, 50)
    await pool.fill(1)
    assert await serve(session) == LineServed(served=1, waiting=0)
    assert list(await leased(pool)) == ["bob"]
    (left,) = await events(pool, "waiting.ended")
    assert (left["holder"], left["reason"], left["waited_sec"]) == ("ann", "left", 100)
    assert place(await ask(session, wait_command("ann"))).position == 1


@pytest.fixture
def one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of three students are long, and their repeated requests share a look for ever."""
    monkeypatch.setattr("allocator.waiting_line.SHORT_LINE", 2)
    monkeypatch.setattr("allocator.waiting_line.LOOK_PERIOD_SEC", 3600)


@pytest.mark.usefixtures("one_look")
async def test_repeated_requests_in_a_long_line_share_a_look(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, *map(wait_command, ("ann", "bob", "cid")))
    await serve(session)
    await pool.fill(1)
    before = await pool.column("SELECT asked_at FROM waiting ORDER BY waiting_id")
    assert [
        place(reply).position for reply in await allocate(session, wait_command("bob"), wait_command("cid"))
    ] == [
        2,
        3,
    ]
    assert await pool.column("SELECT asked_at FROM waiting ORDER BY waiting_id") == before
    assert (await serve(session)).served == 1
    after = await pool.column("SELECT asked_at FROM waiting ORDER BY waiting_id")
    assert [later > earlier for earlier, later in zip(before[1:], after, strict=True)] == [True, True]
    assert list(await leased(pool)) == ["ann"]


@pytest.mark.usefixtures("one_look")
@pytest.mark.parametrize(("holder", "key"), [("new", None), ("cid", "another key")])
async def test_a_new_or_changed_request_in_a_long_line_looks(pool: Pool, holder: str, key: str | None) -> None:
    session = await pool.write_session()
    await allocate(session, *map(wait_command, ("ann", "bob", "cid", "dan")))
    await serve(session)
    await pool.fill(1)
    assert place(await ask(session, wait_command(holder, key=key))).position == {"new": 4, "cid": 2}[holder]
    assert list(await leased(pool)) == ["ann"]


@pytest.mark.usefixtures("one_look")
async def test_a_repeated_request_in_a_long_line_keeps_the_place(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, *map(wait_command, ("ann", "bob", "cid")))
    await serve(session)
    session.waiting_line.loaded_at = -1e9
    await pass_time(pool, 70)
    assert place(await ask(session, wait_command("bob"))).position == 2
    assert await serve(session) == LineServed(served=0, waiting=1)
    await pass_time(pool, 50)
    assert await serve(session) == LineServed(served=0, waiting=1)
    assert await holders(pool) == ["bob"]


@pytest.mark.usefixtures("one_look")
async def test_a_waiting_student_in_a_long_line_who_takes_over_a_lease_gets_it(pool: Pool) -> None:
    standby = await pool.lease("track")
    await pool.execute("UPDATE leases SET mode = 'standby'")
    session = await pool.write_session()
    await allocate(session, *map(wait_command, ("ann", "bob", "cid")))
    await serve(session)
    command = ClaimLease(request_id="request", sandbox_id=standby, holder="track", new_holder="bob")
    granted_lease((await claim_lease(session, [command]))[0])
    assert place(await ask(session, wait_command("bob"))).position == 2
    await serve(session)
    assert await holders(pool) == ["ann", "cid"]
    assert granted_lease(await ask(session, wait_command("bob"))).sandbox_id == standby


async def test_time_without_an_allocator_costs_no_place(pool: Pool) -> None:
    await ask(await pool.write_session(), wait_command("ann"))
    await pass_time(pool, 300)
    session = await pool.write_session()
    await session.raise_epoch()
    assert await serve(session) == LineServed(served=0, waiting=1)


async def test_the_end_of_the_longest_wait_is_refused_once(pool: Pool) -> None:
    session = await pool.write_session()
    await ask(session, wait_command("ann", wait_sec=30))
    await pass_time(pool, 31)
    assert await serve(session) == LineServed(served=0, waiting=0)
    (ended,) = await events(pool, "waiting.ended")
    assert (ended["reason"], ended["waited_sec"]) == ("timed_out", 31)
    assert refusal_code(await ask(session, wait_command("ann"))) == "POOL_EXHAUSTED"
    assert place(await ask(session, wait_command("ann"))).position == 1


async def test_a_wait_of_zero_gives_up_the_place(pool: Pool) -> None:
    session = await pool.write_session()
    await ask(session, wait_command("ann"))
    assert refusal_code(await ask(session, wait_command("ann", wait_sec=0))) == "POOL_EXHAUSTED"
    assert await holders(pool) == []
    assert (await events(pool, "waiting.ended"))[0]["reason"] == "left"


async def test_a_request_without_the_wish_to_wait_keeps_the_place_but_does_not_renew_it(pool: Pool) -> None:
    session = await pool.write_session()
    await ask(session, wait_command("ann"))
    before = await pool.value("SELECT asked_at FROM waiting")
    assert refusal_code(await ask(session, allocate_command("ann"))) == "POOL_EXHAUSTED"
    assert await pool.value("SELECT asked_at FROM waiting") == before
    await pool.fill(1)
    assert granted_lease(await ask(session, allocate_command("ann"))).new


async def test_a_request_for_another_prefix_moves_to_the_end(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann", "lab-a-"), wait_command("bob", "lab-b-"))
    assert place(await ask(session, wait_command("ann", "lab-b-"))).position == 2
    assert await holders(pool) == ["bob", "ann"]


async def replace(session: WriteSession, sandbox_id: str, holder: str | None, wait_sec: int | None = 900) -> Reply:
    command = ReplaceSandbox(
        request_id="request", sandbox_id=sandbox_id, holder=holder, reason="no login", wait_sec=wait_sec
    )
    (reply,) = await replace_sandbox(session, [command])
    return reply


async def test_a_student_waits_for_a_replacement_at_the_head_of_the_line(pool: Pool) -> None:
    session = await pool.write_session()
    broken = [await pool.lease(holder) for holder in ("ann", "bob")]
    await ask(session, wait_command("cid"))
    before = await pool.rows("SELECT * FROM leases ORDER BY 1")
    assert place(await replace(session, broken[0], "ann")).position == 1
    assert place(await replace(session, broken[1], "bob")).position == 2
    assert place(await replace(session, broken[0], "ann")).position == 1
    assert place(await ask(session, wait_command("cid"))).position == 3
    assert await pool.rows("SELECT * FROM leases ORDER BY 1") == before
    await pool.fill(["new-1"])
    assert await serve(session) == LineServed(served=1, waiting=2)
    assert (await leased(pool))["ann"] == "new-1"
    lease = granted_lease(await replace(session, broken[0], "ann"))
    assert (lease.name, lease.new) == ("new-1", False)
    assert [event["holder"] for event in await events(pool, "waiting.served")] == ["ann"]
    assert len(await events(pool, "sandbox.replaced")) == 1
    await pool.fill(["new-2"])
    assert granted_lease(await replace(session, broken[1], "bob")).name == "new-2"
    assert await holders(pool) == ["cid"]
    await pool.assert_sound()


async def test_a_new_allocator_knows_the_students_who_wait_for_a_replacement(pool: Pool) -> None:
    broken = await pool.lease("ann")
    old = await pool.write_session()
    await ask(old, wait_command("bob"))
    await replace(old, broken, "ann")
    session = await pool.write_session()
    await session.raise_epoch()
    await pool.fill(["new-1"])
    assert await serve(session) == LineServed(served=1, waiting=1)
    assert (await leased(pool))["ann"] == "new-1"


async def test_an_allocation_returns_the_broken_sandbox_and_keeps_the_place(pool: Pool) -> None:
    broken = await pool.lease("ann")
    session = await pool.write_session()
    await replace(session, broken, "ann")
    for command in (allocate_command("ann"), wait_command("ann", prefix="lab-")):
        assert granted_lease(await ask(session, command)).sandbox_id == broken
    assert await holders(pool) == ["ann"]


async def test_another_student_does_not_overtake_a_waiting_replacement(pool: Pool) -> None:
    broken = await pool.lease("ann"), await pool.lease("bob")
    session = await pool.write_session()
    place(await replace(session, broken[0], "ann"))
    await pool.fill(1)
    assert place(await replace(session, broken[1], "bob")).position == 1
    assert await holders(pool) == ["bob"]
    assert await pool.value("SELECT end_reason FROM leases WHERE sandbox_id = $1", broken[0]) == "broken"


@pytest.mark.parametrize("wait_sec", [None, 0])
async def test_a_replacement_without_the_wish_to_wait_is_refused(pool: Pool, wait_sec: int | None) -> None:
    broken = await pool.lease("ann")
    session = await pool.write_session()
    assert refusal_code(await replace(session, broken, "ann", wait_sec)) == "POOL_EXHAUSTED"
    place(await replace(session, broken, "ann"))
    assert refusal_code(await replace(session, broken, "ann", 0)) == "POOL_EXHAUSTED"
    assert await holders(pool) == []


async def test_the_policy_of_the_lease_limits_the_wait_for_a_replacement(pool: Pool) -> None:
    await pool.apply_policies(Policy(name="exam", match=Match(track_name="exam"), wait_minutes=0))
    await pool.fill(1)
    session = await pool.write_session()
    broken = granted_lease(await ask(session, allocate_command("ann", track="exam"))).sandbox_id
    session.policies.forget()
    assert refusal_code(await replace(session, broken, "ann")) == "POOL_EXHAUSTED"


@pytest.mark.parametrize("end", ["release", "claim", "administrator"])
async def test_a_place_for_a_replacement_ends_with_its_reason(pool: Pool, end: str) -> None:
    broken = await pool.lease("ann")
    session = await pool.write_session()
    if end == "claim":
        await pool.execute("UPDATE leases SET mode = 'standby'")
    await replace(session, broken, "ann")
    if end == "release":
        await release(session, release_command(broken, "ann"))
    if end == "claim":
        command = ClaimLease(request_id="request", sandbox_id=broken, holder="ann", new_holder="eve")
        granted_lease((await claim_lease(session, [command]))[0])
    await pool.fill(["new-1"])
    if end == "administrator":
        assert granted_lease(await replace(session, broken, None, None)).name == "new-1"
    assert await serve(session) == LineServed(served=0, waiting=0)
    assert await holders(pool) == []
    assert await pool.column("SELECT name FROM sandboxes WHERE status = 'available'") == (
        [] if end == "administrator" else ["new-1"]
    )


@pytest.mark.parametrize("has_sandbox", [True, False])
async def test_a_place_for_a_first_sandbox_is_not_one_for_a_replacement(pool: Pool, has_sandbox: bool) -> None:
    session = await pool.write_session()
    broken = await pool.lease("setup")
    await ask(session, wait_command("ann"))
    await pool.execute("UPDATE leases SET holder = 'ann'")
    if has_sandbox:
        await pool.fill(["lab-1"])
        assert granted_lease(await replace(session, broken, "ann", None)).new
        assert await holders(pool) == ["ann"]
        return
    assert refusal_code(await replace(session, broken, "ann", None)) == "POOL_EXHAUSTED"
    assert refusal_code(await replace(session, broken, "ann", 0)) == "POOL_EXHAUSTED"
    assert await events(pool, "waiting.ended") == []
    place(await replace(session, broken, "ann"))
    assert [event["reason"] for event in await events(pool, "waiting.ended")] == ["left"]
    await pool.fill(["lab-1"])
    assert (await serve(session)).served == 1
    assert await pool.value("SELECT end_reason FROM leases WHERE sandbox_id = $1", broken) == "broken"


async def test_another_idempotency_key_keeps_the_place(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann", key="k1"), wait_command("bob"))
    assert place(await ask(session, wait_command("ann", key="k2"))).position == 1
    await pool.fill(1)
    await serve(session)
    assert await pool.value("SELECT idempotency_key FROM leases WHERE holder = 'ann'") == "k2"


async def test_students_with_the_same_idempotency_key_get_one_lease(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann", key="k"), wait_command("bob", key="k"), wait_command("cid"))
    await pool.fill(2)
    assert await serve(session) == LineServed(served=2, waiting=0)
    assert set(await leased(pool)) == {"ann", "cid"}
    assert (await events(pool, "waiting.ended"))[0]["reason"] == "refused"
    assert refusal_code(await ask(session, wait_command("bob", key="k"))) == "IDEMPOTENCY_KEY_CONFLICT"


async def test_a_waiting_student_who_takes_over_a_lease_gets_it(pool: Pool) -> None:
    standby = await pool.lease("track")
    await pool.execute("UPDATE leases SET mode = 'standby'")
    session = await pool.write_session()
    await allocate(session, wait_command("ann"), wait_command("bob"))
    command = ClaimLease(request_id="request", sandbox_id=standby, holder="track", new_holder="ann")
    granted_lease((await claim_lease(session, [command]))[0])
    lease = granted_lease(await ask(session, wait_command("ann")))
    assert (lease.new, lease.sandbox_id) == (False, standby)
    assert await holders(pool) == ["bob"]
    assert (await events(pool, "waiting.ended"))[0]["reason"] == "refused"


async def test_a_waiting_student_with_a_used_key_is_refused(pool: Pool) -> None:
    await pool.fill(["lab-a-1"])
    session = await pool.write_session()
    await allocate(session, wait_command("ann", "lab-b-"), allocate_command("bob", "lab-a-", "k"))
    assert refusal_code(await ask(session, wait_command("ann", "lab-b-", "k"))) == "IDEMPOTENCY_KEY_CONFLICT"
    assert await holders(pool) == []


async def test_the_line_has_a_limit(pool: Pool) -> None:
    session = await pool.write_session()
    session.waiting_line = WaitingLine(WaitingLimits(ttl_sec=60, max_places=2))
    replies = await allocate(session, *(wait_command(holder) for holder in ("ann", "bob", "cid")))
    assert [place(reply).position for reply in replies[:2]] == [1, 2]
    assert refusal_code(replies[2]) == "POOL_EXHAUSTED"
    assert place(await ask(session, wait_command("bob"))).position == 2


async def test_the_policy_limits_the_wait(pool: Pool) -> None:
    await pool.apply_policies(
        Policy(name="exam", match=Match(track_name="exam"), wait_minutes=0),
        Policy(name="short", match=Match(track_name="short"), wait_minutes=2),
    )
    session = await pool.write_session()
    assert refusal_code(await ask(session, wait_command("ann", track="exam"))) == "POOL_EXHAUSTED"
    place(await ask(session, wait_command("bob", track="short")))
    assert await pool.value("SELECT extract(epoch FROM ends_at - waiting_since)::int FROM waiting") == 120


async def test_a_served_student_who_has_released_the_sandbox_waits_anew(pool: Pool) -> None:
    session = await pool.write_session()
    await ask(session, wait_command("ann"))
    (sandbox_id,) = await pool.fill(1)
    await serve(session)
    await release(session, release_command(sandbox_id, "ann"))
    assert place(await ask(session, wait_command("ann"))).position == 1


async def test_a_new_allocator_serves_the_line_in_its_order(pool: Pool) -> None:
    old = await pool.write_session()
    await allocate(old, *(wait_command(f"student-{number}") for number in range(5)))
    session = await pool.write_session()
    await session.raise_epoch()
    assert place(await ask(session, wait_command("student-4"))).position == 5
    with pytest.raises(Fenced):
        await ask(old, wait_command("late"))
    with pytest.raises(Fenced):
        await serve(old)
    await pool.fill(2)
    await serve(session)
    assert set(await leased(pool)) == {"student-0", "student-1"}


async def test_a_sandbox_taken_by_another_lane_is_given_to_nobody_behind(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann"), wait_command("bob"))
    first, second = await pool.fill(2)
    look = statements.look

    async def look_and_lose_one(*arguments: Any, **named: Any) -> Any:
        found = await look(*arguments, **named)
        await pool.execute("UPDATE sandboxes SET status = 'stale' WHERE sandbox_id = $1", first)
        return found

    monkeypatch.setattr(statements, "look", look_and_lose_one)
    assert await serve(session) == LineServed(served=1, waiting=1)
    assert await pool.value("SELECT holder FROM leases WHERE sandbox_id = $1", second) == "ann"


async def test_a_failed_statement_makes_the_line_unknown(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await pool.write_session()
    await ask(session, wait_command("ann"))

    async def fail(*_: Any) -> Any:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(session, "fetch", fail)
        with pytest.raises(ConnectionResetError):
            await ask(session, wait_command("bob"))
    await pool.execute("DELETE FROM waiting")
    assert place(await ask(session, wait_command("bob"))).position == 1


async def test_a_line_changed_by_a_person_is_loaded_again(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, wait_command("ann"), wait_command("bob"))
    await pool.execute("DELETE FROM waiting WHERE holder = 'ann'")
    assert place(await session.run(lambda: ask(session, wait_command("bob")))).position == 1


async def test_a_hundred_students_are_served_in_the_order_of_arrival(pool: Pool) -> None:
    session = await pool.write_session()
    students = [f"student-{number:03}" for number in range(100)]
    random.Random(7).shuffle(students)
    for start in range(0, 100, 10):
        await allocate(session, *(wait_command(holder) for holder in students[start : start + 10]))
    expected: list[str] = []
    while len(expected) < 100:
        await pool.fill(7)
        await serve(session)
        expected = students[: len(expected) + 7]
        assert set(await leased(pool)) == set(expected)
    await pool.assert_sound()


async def test_students_who_left_do_not_hold_up_the_others(pool: Pool) -> None:
    session = await pool.write_session()
    students = [(f"student-{number:03}", "lab-a-" if number % 2 else "lab-b-") for number in range(200)]
    await allocate(session, *(wait_command(holder, prefix) for holder, prefix in students))
    session.waiting_line.loaded_at = -1e9
    gone = set(random.Random(3).sample(students, 50))
    await pass_time(pool, 40)
    staying = [student for student in students if student not in gone]
    await allocate(session, *(wait_command(holder, prefix) for holder, prefix in staying))
    await pass_time(pool, 30)
    arrivals = ["lab-a-" if number % 3 else "lab-b-" for number in range(50)]
    for number, prefix in enumerate(arrivals):
        await pool.fill([f"{prefix}{number}"])
        await serve(session)
    right = {
        holder
        for prefix in ("lab-a-", "lab-b-")
        for holder, _ in [student for student in staying if student[1] == prefix][: arrivals.count(prefix)]
    }
    assert set(await leased(pool)) == right
    await pool.assert_sound()


class Reference:
    """First come, first served, one sandbox at a time."""

    def __init__(self) -> None:
        self.line: list[tuple[str, str]] = []
        self.free: list[str] = []
        self.leases: dict[str, str] = {}

    def serve(self) -> None:
        for holder, prefix in list(self.line):
            if sandbox := next((name for name in self.free if name.startswith(prefix)), None):
                self.free.remove(sandbox)
                self.leases[holder] = sandbox
                self.line.remove((holder, prefix))


@pytest.mark.parametrize("seed", range(4))
async def test_the_line_matches_a_reference(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    session, reference = await pool.write_session(), Reference()
    numbers = iter(range(1_000))
    for _ in range(60):
        step = rng.choice(["join", "join", "arrive", "ask", "serve"])
        prefix = rng.choice(["", "a-", "a-1", "b-"])
        if step == "arrive":
            names = [f"{rng.choice(['a-', 'a-1', 'b-'])}{next(numbers)}" for _ in range(rng.randint(1, 3))]
            ids = await pool.fill(names)
            await pool.execute(
                "UPDATE sandboxes SET status_since = clock_timestamp() + sandbox_id::int * interval '1 ms' "
                "WHERE sandbox_id = ANY ($1)",
                ids,
            )
            reference.free += names
            continue
        reference.serve()
        if step == "serve":
            await serve(session)
        else:
            holder = f"student-{next(numbers)}"
            sandbox = next((name for name in reference.free if name.startswith(prefix)), None)
            if sandbox is not None:
                reference.free.remove(sandbox)
                reference.leases[holder] = sandbox
            elif step == "join":
                reference.line.append((holder, prefix))
            reply = await ask(session, wait_command(holder, prefix or None, wait_sec=900 if step == "join" else 0))
            if sandbox is not None:
                assert granted_lease(reply).name == sandbox
            elif step == "join":
                place(reply)
            else:
                refusal_code(reply)
            await serve(session)
        assert await leased(pool) == reference.leases
        assert await holders(pool) == [holder for holder, _ in reference.line]
    await pool.assert_sound()


async def _raise_epochs(pool: Pool, sessions: Sequence[WriteSession]) -> None:
    for session in sessions:
        await session.raise_epoch()


async def test_two_active_allocators_serve_no_student_twice_and_overtake_none(pool: Pool) -> None:
    sessions = [await pool.write_session() for _ in range(2)]
    await allocate(sessions[0], *(wait_command(f"student-{number:02}") for number in range(40)))

    async def serve_with(session: WriteSession, rng: random.Random) -> None:
        for _ in range(15):
            try:
                if rng.random() < 0.5:
                    await session.raise_epoch()
                await pool.fill(1) if session is sessions[0] else None
                await session.run(lambda: serve(session))
            except Fenced:
                await session.raise_epoch()

    await asyncio.gather(*(serve_with(session, random.Random(index)) for index, session in enumerate(sessions)))
    await _raise_epochs(pool, sessions[:1])
    await serve(sessions[0])
    served = sorted(await leased(pool))
    assert served == [f"student-{number:02}" for number in range(len(served))]
    await pool.assert_sound()
