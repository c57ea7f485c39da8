"""Named tokens: their scope, their quotas and their end, in the transaction of the effect."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from allocator.handlers import lease_changes, leases
from allocator.routing import MAINTENANCE
from allocator.sql.audit import MAX_REFUSALS_PER_MINUTE
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ClaimLease,
    Command,
    EndLease,
    EndTokenLeases,
    ExtendLease,
    IssueToken,
    RecordTokenUses,
    ReleaseSandbox,
    ReplaceSandbox,
    RevokeToken,
    SuspendToken,
)
from sandbox_broker.contract.replies import (
    LeaseGranted,
    Recorded,
    Refused,
    Reply,
    StudentWaiting,
    TokenLeasesEnded,
    refuse,
)
from sandbox_broker.contract.tokens import Sender, TokenGrant

from .allocator_harness import RUN, Pool, allocate, granted_lease, refusal_code

KEY_A, KEY_B = "000000000000000a", "000000000000000b"
ADMIN = Sender(actor="$BROKER_ADMIN_TOKEN", address="192.0.2.9", reason="why")


def request(sender: Sender | None, holder: str = "ann", **fields: Any) -> AllocateSandbox:
    return AllocateSandbox(request_id="request", holder=holder, sender=sender, **fields)


def issue(name: str = "lab", key_id: str = KEY_A, **fields: Any) -> IssueToken:
    grant = TokenGrant(name=name, **{"role": "track", **fields})
    return IssueToken(request_id="request", key_id=key_id, token_hash="ab" * 32, grant=grant, sender=ADMIN)


async def run(session: WriteSession, command: Command) -> Reply:
    """Run a command as the lane for maintenance does."""
    (reply,) = await session.run(lambda: MAINTENANCE.handlers[type(command)](session, [command]))
    return reply


async def allocate_until_done(session: WriteSession, commands: Sequence[AllocateSandbox]) -> list[Reply]:
    """Repeat the commands until no other session is faster."""
    while True:
        try:
            return await session.run(lambda: allocate(session, *commands))
        except ConcurrentUpdate:
            pass


async def test_a_token_is_issued_once(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    command = issue(tracks=("lab-a",), prefixes=("a-",), max_active=5, expires_at=2_000_000_000)
    assert await run(session, command) == Recorded(changed=True)
    assert await run(session, command) == Recorded(changed=False)
    assert await run(session, issue(key_id=KEY_B)) == refuse("TOKEN_EXISTS", name="lab")
    (row,) = await pool.rows("SELECT * FROM tokens")
    assert (row["name"], row["role"], row["tracks"], row["prefixes"]) == ("lab", "track", ["lab-a"], ["a-"])
    assert (row["max_active"], row["max_new_per_hour"], row["token_hash"]) == (5, None, bytes.fromhex("ab" * 32))
    assert row["issued_by"] == ADMIN.actor
    assert await pool.events() == ["token.changed"]


async def test_the_name_of_a_revoked_token_is_free_again(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    assert refusal_code(await run(session, RevokeToken(request_id="r", name="lab"))) == "TOKEN_NOT_FOUND"
    await run(session, issue())
    assert await run(session, RevokeToken(request_id="r", name="lab")) == Recorded(changed=True)
    assert await run(session, RevokeToken(request_id="r", name="lab")) == Recorded(changed=False)
    assert await run(session, issue(key_id=KEY_B)) == Recorded(changed=True)


async def test_a_lease_remembers_its_token(pool: Pool) -> None:
    await pool.fill(2)
    sender = await pool.token("lab", KEY_A)
    await allocate(await pool.write_session(), request(sender), request(None, "bob"))
    assert await pool.column("SELECT token FROM leases ORDER BY holder") == ["lab", None]


@pytest.mark.parametrize("end", ["revoke", "suspend", "expire"])
async def test_an_ended_token_leases_and_changes_nothing(pool: Pool, end: str) -> None:
    await pool.fill(2)
    sender = await pool.token("lab", KEY_A)
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    (reply,) = await allocate(session, request(sender))
    sandbox_id = granted_lease(reply).sandbox_id
    if end == "revoke":
        await run(maintenance, RevokeToken(request_id="r", name="lab"))
    elif end == "suspend":
        await run(maintenance, SuspendToken(request_id="r", name="lab"))
    else:
        await pool.execute("UPDATE tokens SET expires_at = now() - interval '1 second'")
        session.policies.forget()
    ended = refuse("UNAUTHORIZED", cause="token_ended")
    assert await allocate(session, request(sender), request(sender, "bob")) == [ended, ended]
    assert [reply for reply, _ in await student_commands(session, sandbox_id, sender)] == [ended] * 4
    assert await pool.status(sandbox_id) == "allocated"
    if end == "suspend":
        await run(maintenance, SuspendToken(request_id="r", name="lab", suspended=False))
        (reply,) = await allocate(session, request(sender))
        assert granted_lease(reply).sandbox_id == sandbox_id


async def student_commands(
    session: WriteSession, sandbox_id: str, sender: Sender | None, secret_hash: str | None = None
) -> list[tuple[Reply, str]]:
    """Run each command that changes the lease of ann; return the replies with the actions."""
    common: dict[str, Any] = {
        "request_id": "request",
        "sandbox_id": sandbox_id,
        "holder": "ann",
        "sender": sender,
        "secret_hash": secret_hash,
    }
    extension = ExtendLease(extension_id=RUN, extension_sec=60, **common)
    return [
        ((await lease_changes.claim_lease(session, [ClaimLease(**common)]))[0], "lease.claim"),
        ((await lease_changes.extend_lease(session, [extension]))[0], "lease.extend"),
        (
            (await lease_changes.replace_sandbox(session, [ReplaceSandbox(reason="broken", **common)]))[0],
            "lease.replace",
        ),
        ((await leases.release_sandbox(session, [ReleaseSandbox(**common)]))[0], "lease.release"),
    ]


async def test_a_scoped_token_leases_in_its_scope_only(pool: Pool) -> None:
    await pool.fill(["a-1", "a-2", "b-1"])
    tracks = await pool.token("tracks", KEY_A, tracks=["lab-a"])
    prefixes = await pool.token("prefixes", KEY_B, prefixes=["a-"])
    session = await pool.write_session()
    refused = refuse("FORBIDDEN_SCOPE", cause="allocation")
    replies = await allocate(
        session,
        request(tracks, "1"),
        request(tracks, "2", track_name="lab-b"),
        request(tracks, "3", track_name="lab-a-1"),
        request(prefixes, "4"),
        request(prefixes, "5", name_prefix="b-"),
        request(prefixes, "6", name_prefix="a"),
        request(tracks, "7", track_name="lab-a"),
        request(prefixes, "8", name_prefix="a-2"),
    )
    assert replies[:6] == [refused] * 6
    assert all(isinstance(reply, LeaseGranted) for reply in replies[6:])
    entries = await pool.rows("SELECT * FROM audit ORDER BY audit_id")
    assert sorted((row["actor"], row["object"] or "") for row in entries) == sorted(
        (actor, name)
        for actor, names in (("tracks", ("", "lab-b", "lab-a-1")), ("prefixes", ("", "b-", "a")))
        for name in names
    )
    assert {(row["action"], row["outcome"], row["address"], row["request_id"]) for row in entries} == {
        ("lease.allocate", "FORBIDDEN_SCOPE", "192.0.2.1", "request")
    }


async def test_a_leaked_token_does_not_fill_the_audit(pool: Pool) -> None:
    """Refusals are recorded up to a limit per token and minute, by all commands together, and counted beyond it."""
    leaked = await pool.token("leaked", KEY_A, tracks=["a"])
    other = await pool.token("other", KEY_B, tracks=["b"])
    session = await pool.write_session()
    sandbox_id = await pool.lease("ann")
    before = REGISTRY.get_sample_value("broker_audit_refusals_skipped_total") or 0
    for start in (0, 20):
        students = [str(number) for number in range(start, start + 20)]
        await allocate(session, *(request(leaked, name) for name in students), request(other, "o"))
    replies = [reply for reply, _ in await student_commands(session, sandbox_id, leaked)]
    assert replies == [refuse("FORBIDDEN_SCOPE", cause="lease")] * 4
    by_actor = "SELECT actor || ' ' || count(*) FROM audit GROUP BY actor ORDER BY actor"
    assert await pool.column(by_actor) == [f"leaked {MAX_REFUSALS_PER_MINUTE}", "other 2"]
    skipped = REGISTRY.get_sample_value("broker_audit_refusals_skipped_total") or 0
    assert skipped - before == 44 - MAX_REFUSALS_PER_MINUTE
    await pool.execute("UPDATE audit SET at = at - interval '61 seconds'")
    await student_commands(session, sandbox_id, leaked)
    assert await pool.column(by_actor) == [f"leaked {MAX_REFUSALS_PER_MINUTE + 4}", "other 2"]


async def test_a_scoped_token_reaches_no_lease_of_another_token(pool: Pool) -> None:
    await pool.fill(3)
    own = await pool.token("a", KEY_A, tracks=["a"])
    other = await pool.token("b", KEY_B, tracks=["b"])
    session = await pool.write_session()
    (reply,) = await allocate(session, request(other, track_name="b"))
    sandbox_id = granted_lease(reply).sandbox_id
    before = await pool.rows("SELECT * FROM leases")
    assert await allocate(session, request(own, track_name="a")) == [refuse("FORBIDDEN_SCOPE", cause="allocation")]
    outcomes = await student_commands(session, sandbox_id, own)
    assert [reply for reply, _ in outcomes] == [refuse("FORBIDDEN_SCOPE", cause="lease")] * 4
    assert await pool.rows("SELECT * FROM leases") == before
    assert await pool.column("SELECT action FROM audit ORDER BY audit_id") == [
        "lease.allocate",
        *(action for _, action in outcomes),
    ]
    results = [reply for reply, _ in await student_commands(session, sandbox_id, other)]
    assert not any(isinstance(reply, Refused) for reply in results[:3])
    assert refusal_code(results[3]) != "FORBIDDEN_SCOPE" if isinstance(results[3], Refused) else True


async def test_a_scoped_token_does_not_take_the_place_of_a_student_in_line(pool: Pool) -> None:
    own = await pool.token("a", KEY_A, tracks=["a"])
    other = await pool.token("b", KEY_B, tracks=["b"])
    session = await pool.write_session()
    await allocate(session, request(other, track_name="b", wait_sec=900))
    for wait_sec in (900, 0, None):
        (reply,) = await allocate(session, request(own, track_name="a", wait_sec=wait_sec))
        assert refusal_code(reply) == "FORBIDDEN_SCOPE"
    await pool.fill(1)
    (reply,) = await allocate(session, request(other, track_name="b", wait_sec=900))
    assert granted_lease(reply).new


async def test_a_revoked_token_loses_its_place_in_line(pool: Pool) -> None:
    sender = await pool.token("lab", KEY_A)
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    await allocate(session, request(sender, wait_sec=900))
    await run(maintenance, RevokeToken(request_id="r", name="lab"))
    await pool.fill(1)
    (reply,) = await allocate(session, request(None, "bob", wait_sec=900))
    assert granted_lease(reply).new
    assert await pool.column("SELECT holder FROM waiting") == []


@pytest.mark.parametrize(("change", "code"), [("scope", "FORBIDDEN_SCOPE"), ("end", "UNAUTHORIZED")])
async def test_a_refused_repetition_does_not_change_the_place_in_line(pool: Pool, change: str, code: str) -> None:
    sender = await pool.token("a", KEY_A, tracks=["a"])
    session = await pool.write_session()
    await allocate(session, request(sender, track_name="a", wait_sec=900))
    before = await pool.rows("SELECT * FROM waiting")
    if change == "end":
        await run(await pool.write_session(lane=MAINTENANCE), RevokeToken(request_id="r", name="a"))
    for wait_sec in (900, 0, None):
        for prefix in (None, "other-"):
            repetition = request(
                sender, track_name="b" if change == "scope" else "a", name_prefix=prefix, wait_sec=wait_sec
            )
            (reply,) = await allocate(session, repetition)
            assert refusal_code(reply) == code
    assert await pool.rows("SELECT * FROM waiting") == before


async def test_a_new_token_with_the_same_name_keeps_the_place_in_line(pool: Pool) -> None:
    """Both reach the leases of this name, too."""
    old = await pool.token("a", KEY_A, tracks=["a"])
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    await allocate(session, request(old, track_name="a", wait_sec=900))
    await allocate(session, request(None, "bob", wait_sec=900))
    await run(maintenance, RevokeToken(request_id="r", name="a"))
    new = await pool.token("a", KEY_B, tracks=["a"])
    (reply,) = await allocate(session, request(new, track_name="a", wait_sec=900))
    assert isinstance(reply, StudentWaiting)
    assert reply.position == 1
    await pool.fill(1)
    (reply,) = await allocate(session, request(new, track_name="a", wait_sec=900))
    assert granted_lease(reply).new


async def test_a_student_above_the_limit_of_the_token_keeps_the_place_in_line(pool: Pool) -> None:
    sender = await pool.token("lab", KEY_A, max_active=1)
    session = await pool.write_session()
    for holder in ("ann", "bob"):
        await allocate(session, request(sender, holder, wait_sec=900))
    await pool.fill(2)
    free, waits = await allocate(session, request(None, "cid"), request(sender, "bob", wait_sec=900))
    assert granted_lease(free).new
    assert isinstance(waits, StudentWaiting)
    assert await pool.column("SELECT holder FROM leases ORDER BY lease_id") == ["ann", "cid"]
    sandbox_id = await pool.value("SELECT sandbox_id FROM leases WHERE holder = 'ann'")
    await leases.release_sandbox(
        session, [ReleaseSandbox(request_id="r", sandbox_id=sandbox_id, holder="ann", sender=sender)]
    )
    await pool.fill(["late-1"])
    (reply,) = await allocate(session, request(sender, "bob", wait_sec=900))
    assert granted_lease(reply).name == "late-1"


@pytest.mark.parametrize("limit", ["max_active", "max_new_per_hour", "max_rate"])
async def test_a_limit_of_a_token_is_exact(pool: Pool, limit: str) -> None:
    await pool.fill(10)
    sender = await pool.token("lab", KEY_A, **{limit: 3})
    session = await pool.write_session()
    replies = await allocate(session, *(request(sender, str(number)) for number in range(5)), request(None, "free"))
    assert sum(isinstance(reply, LeaseGranted) for reply in replies) == 4
    assert replies[3] == replies[4] == refuse("QUOTA_EXCEEDED", cause=limit, token="lab")
    again, refused = await allocate(session, request(sender, "0"), request(sender, "6"))
    assert not granted_lease(again).new
    assert refusal_code(refused) == "QUOTA_EXCEEDED"


@pytest.mark.parametrize(
    ("limit", "passes"), [("max_active", "0 s"), ("max_new_per_hour", "61 m"), ("max_rate", "61 s")]
)
async def test_a_place_of_a_limit_becomes_free(pool: Pool, limit: str, passes: str) -> None:
    await pool.fill(3)
    sender = await pool.token("lab", KEY_A, **{limit: 1})
    session = await pool.write_session()
    (reply,) = await allocate(session, request(sender))
    lease = granted_lease(reply)
    await leases.release_sandbox(
        session, [ReleaseSandbox(request_id="r", sandbox_id=lease.sandbox_id, holder="ann", sender=sender)]
    )
    (reply,) = await allocate(session, request(sender, "bob"))
    assert isinstance(reply, LeaseGranted) == (limit == "max_active")
    await pool.execute("UPDATE leases SET allocated_at = allocated_at - $1::text::interval", passes)
    (reply,) = await allocate(session, request(sender, "bob"))
    assert isinstance(reply, LeaseGranted)


@pytest.mark.parametrize("limit", ["max_active", "max_new_per_hour", "max_rate"])
async def test_leases_of_an_earlier_token_with_the_name_count_to_the_limit(pool: Pool, limit: str) -> None:
    await pool.fill(4)
    earlier = await pool.token("lab", KEY_A)
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    granted_lease((await allocate(session, request(earlier)))[0])
    old = granted_lease((await allocate(session, request(earlier, "old")))[0]).sandbox_id
    await run(maintenance, EndLease(request_id="r", sandbox_id=old, note="why"))
    await pool.execute("UPDATE leases SET allocated_at = now() - interval '61 minutes' WHERE sandbox_id = $1", old)
    assert await pool.column("SELECT DISTINCT token_has_quota FROM leases") == [False]
    await run(maintenance, RevokeToken(request_id="r", name="lab"))
    grant: dict[str, Any] = {limit: 2}
    await run(maintenance, issue(key_id=KEY_B, **grant))
    session.policies.forget()
    sender = Sender(actor="lab", key_id=KEY_B)
    replies = await allocate(session, request(sender, "bob"), request(sender, "cleo"))
    assert isinstance(replies[0], LeaseGranted)
    assert replies[1] == refuse("QUOTA_EXCEEDED", cause=limit, token="lab")


async def test_concurrent_allocators_grant_exactly_the_limit_of_a_token(pool: Pool) -> None:
    """300 requests with `max_active: 50` in two sessions that share an epoch."""
    await pool.fill(300)
    sender = await pool.token("lab", KEY_A, max_active=50)
    sessions = [await pool.write_session() for _ in range(2)]

    async def serve(session: WriteSession, first: int) -> list[Reply]:
        numbers = range(first, 300, 2)
        batches = [numbers[start : start + 10] for start in range(0, len(numbers), 10)]
        return [
            reply
            for batch in batches
            for reply in await allocate_until_done(session, [request(sender, str(number)) for number in batch])
        ]

    replies = await asyncio.gather(*(serve(session, first) for first, session in enumerate(sessions)))
    assert sum(isinstance(reply, LeaseGranted) for part in replies for reply in part) == 50
    assert await pool.value("SELECT count(*) FROM leases WHERE token = 'lab' AND ended_at IS NULL") == 50
    await pool.assert_sound()


async def test_a_revocation_comes_between_two_statements_of_students(pool: Pool) -> None:
    await pool.fill(10)
    sender = await pool.token("lab", KEY_A)
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    await allocate(session, request(sender, "first"))
    transaction = session.connection.transaction()
    await transaction.start()
    await allocate(session, request(sender, "second"))
    revoking = asyncio.create_task(run(maintenance, RevokeToken(request_id="r", name="lab", sender=ADMIN)))
    await pool.until_waiting(maintenance)
    await transaction.commit()
    await revoking
    (reply,) = await allocate(session, request(sender, "third"))
    assert refusal_code(reply) == "UNAUTHORIZED"


async def test_the_leases_of_a_token_end_together(pool: Pool) -> None:
    await pool.fill(4)
    sender = await pool.token("lab", KEY_A)
    session, maintenance = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    await allocate(session, *(request(sender, str(number)) for number in range(3)), request(None, "free"))
    ended: list[str] = []
    for _ in range(2):
        command = EndTokenLeases(request_id="r", name="lab", note="leaked", limit=2, sender=ADMIN)
        reply = await run(maintenance, command)
        assert isinstance(reply, TokenLeasesEnded)
        ended += reply.sandbox_ids
    assert len(ended) == 3
    assert await pool.column("SELECT DISTINCT end_note FROM leases WHERE token = 'lab'") == ["leaked"]
    assert await pool.value("SELECT count(*) FROM leases WHERE ended_at IS NULL") == 1
    rows = await pool.rows("SELECT object, action, reason, outcome FROM audit ORDER BY object")
    assert [tuple(row) for row in rows] == [(name, "lease.release", "leaked", "done") for name in sorted(ended)]
    await pool.assert_sound()


async def test_the_last_use_only_moves_forward(pool: Pool) -> None:
    await pool.token("lab", KEY_A)
    session = await pool.write_session(lane=MAINTENANCE)
    now = int(time.time()) // 60 * 60
    for at, changed in ((now, True), (now, False), (now - 60, False), (now + 60, True)):
        assert await run(session, RecordTokenUses(uses={KEY_A: at, KEY_B: at})) == Recorded(changed=changed)
    assert await pool.column("SELECT extract(epoch FROM last_used_at)::bigint FROM token_uses") == [now + 60]
