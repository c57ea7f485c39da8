"""Logins inside sandboxes: requested with a lease, claimed by one attempt at a time, and ended with the lease."""

import uuid
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from cryptography.fernet import Fernet

from allocator.access_password import generate_password
from allocator.handlers import deletions, lease_changes, leases, logins, purge
from allocator.routing import MAINTENANCE
from allocator.sql import logins as sql_logins
from allocator.write_session import WriteSession
from csp_simulator.users import find_password_problem
from sandbox_broker.contract.commands import (
    ClaimAccess,
    ClaimDeletions,
    ClaimLease,
    EndLease,
    ExpireLeases,
    HurryDeletions,
    PurgeRecords,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RecordDeletion,
    ReplaceSandbox,
    RotateAccessKeys,
)
from sandbox_broker.contract.policies import Access, Match, Policy
from sandbox_broker.contract.replies import (
    AccessClaimed,
    AccessKeysRotated,
    DeletionsClaimed,
    DeletionsHurried,
    DueAccess,
    Recorded,
)
from sandbox_broker.runtime.access_keys import AccessKeys

from .allocator_harness import (
    ACCESS_KEY,
    RUN,
    Pool,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
)

DOMAIN = "labs.example.com"
KEYS = AccessKeys(ACCESS_KEY)


@pytest.fixture
async def session(pool: Pool) -> WriteSession:
    return await pool.write_session(lane=MAINTENANCE)


@pytest.fixture
async def students(pool: Pool) -> WriteSession:
    return await pool.write_session()


async def lease(pool: Pool, students: WriteSession, holder: str = "ann") -> str:
    """Lease a new sandbox with a login; return its id."""
    await pool.fill(1)
    (reply,) = await allocate(students, allocate_command(holder, access="user"))
    return granted_lease(reply).sandbox_id


async def send_claim(session: WriteSession, **options: Any) -> AccessClaimed:
    options = {"limit": 10, "max_running": 100, "claim_sec": 60, "removal_wait_sec": 300, **options}
    reply = await logins.claim_access(session, ClaimAccess(email_domain=DOMAIN, **options))
    assert isinstance(reply, AccessClaimed)
    return reply


async def claim(session: WriteSession, **options: Any) -> list[DueAccess]:
    return list((await send_claim(session, **options)).logins)


async def record(session: WriteSession, due: DueAccess, user_id: str = "user-1") -> bool:
    command = RecordAccess(sandbox_id=due.sandbox_id, claim_id=due.claim_id, user_id=user_id)
    reply = await logins.record_access(session, command)
    assert isinstance(reply, Recorded)
    return reply.changed


async def fail(session: WriteSession, due: DueAccess, *, failed: bool = False, retry_in_sec: float = 0) -> bool:
    command = RecordAccessFailure(
        sandbox_id=due.sandbox_id, claim_id=due.claim_id, error="503", retry_in_sec=retry_in_sec, failed=failed
    )
    reply = await logins.record_access_failure(session, command)
    assert isinstance(reply, Recorded)
    return reply.changed


async def remove(session: WriteSession, due: DueAccess) -> bool:
    command = RecordAccessRemoval(sandbox_id=due.sandbox_id, claim_id=due.claim_id)
    reply = await logins.record_access_removal(session, command)
    assert isinstance(reply, Recorded)
    return reply.changed


async def make_ready(session: WriteSession) -> None:
    for due in await claim(session):
        assert await record(session, due, f"user-{due.sandbox_id}")


async def login(pool: Pool, sandbox_id: str) -> asyncpg.Record:
    (row,) = await pool.rows("SELECT * FROM accesses WHERE sandbox_id = $1", sandbox_id)
    return row


async def claim_deletions(session: WriteSession) -> DeletionsClaimed:
    reply = await deletions.claim_deletions(session, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(reply, DeletionsClaimed)
    return reply


def test_passwords_satisfy_the_rules_of_csp_and_differ() -> None:
    passwords = {generate_password() for _ in range(500)}
    assert len(passwords) == 500
    assert all(find_password_problem(password) is None for password in passwords)
    assert not any(set("'\"\\ \n$`") & set(password) for password in passwords)


async def test_only_leases_that_ask_for_a_login_have_one(pool: Pool, students: WriteSession) -> None:
    await pool.fill(4)
    await pool.apply_policies(
        Policy(name="a", match=Match(track_name="lab-a"), access=Access(groups=("user", "act_admin"))),
        Policy(name="b", match=Match(track_name="lab-b")),
    )
    replies = await allocate(
        students,
        allocate_command("by-policy", track="lab-a"),
        allocate_command("by-both", track="lab-a", access="user"),
        allocate_command("by-header", track="lab-b", access="user"),
        allocate_command("without", track="lab-b"),
    )
    ids = {granted_lease(reply).sandbox_id: reply for reply in replies}
    assert len(ids) == 4
    rows = await pool.rows("SELECT l.holder, a.groups::text FROM accesses a JOIN leases l USING (sandbox_id)")
    assert {(row["holder"], row["groups"]) for row in rows} == {
        ("by-policy", '["user", "act_admin"]'),
        ("by-both", '["user", "act_admin"]'),
        ("by-header", '["user"]'),
    }


async def test_a_repeated_allocation_keeps_its_login(pool: Pool, students: WriteSession) -> None:
    sandbox_id = await lease(pool, students)
    (reply,) = await allocate(students, allocate_command("ann"))
    assert granted_lease(reply).sandbox_id == sandbox_id
    assert await pool.value("SELECT count(*) FROM accesses") == 1


async def test_every_attempt_gets_the_same_email_and_password(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    (first,) = await claim(session, claim_sec=0.001)
    (second,) = await claim(session)
    assert first.claim_id != second.claim_id
    assert first.password is not None
    assert second == first.model_copy(
        update={"claim_id": second.claim_id, "waiting_sec": second.waiting_sec, "attempts": 0}
    )
    assert (first.sandbox_id, first.email, first.groups) == (sandbox_id, f"ann@{DOMAIN}", ("user",))
    assert find_password_problem(KEYS.decrypt(first.password)) is None
    assert not await record(session, first)  # the claim has ended
    assert await record(session, second)
    assert not await record(session, second)
    row = await login(pool, sandbox_id)
    assert (row["state"], row["user_id"], row["password"]) == ("ready", "user-1", first.password)
    assert row["due_at"] is None
    assert await pool.events(sandbox_id) == ["sandbox.allocated", "access.ready"]


@pytest.mark.parametrize(
    ("holder", "email_name"),
    [
        ("inst-Student_1.abc", "inst-Student_1.abc"),
        ("x" * 64, "x" * 64),
        ("x" * 65, f"{'x' * 40}-5c41ee4afe75e4d9"),
        ("a b@c", None),
        (".ann", None),
        ("!!!", None),
    ],
)
async def test_email_of_a_student(
    pool: Pool, session: WriteSession, students: WriteSession, holder: str, email_name: str | None
) -> None:
    await lease(pool, students, holder)
    (due,) = await claim(session)
    name, _, domain = due.email.partition("@")
    assert domain == DOMAIN
    assert len(name) <= 64
    assert name.strip("-_.") != ""
    if email_name is not None and len(holder) <= 64:
        assert name == email_name
    else:
        assert name != holder
        assert len(name.rpartition("-")[2]) == 16


async def test_claims_are_limited_over_all_provisioners(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    for number in range(5):
        await lease(pool, students, f"student-{number}")
    first = await claim(session, limit=2, max_running=3)
    assert len(first) == 2
    second = await claim(session, limit=2, max_running=3)
    assert len(second) == 1
    reply = await send_claim(session, max_running=3)
    assert reply.logins == ()
    await record(session, first[0])
    assert len(await claim(session, max_running=3)) == 1


async def test_a_failure_postpones_and_a_failed_login_recovers(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    (due,) = await claim(session)
    assert await fail(session, due, retry_in_sec=60)
    assert not await fail(session, due)
    assert (await login(pool, sandbox_id))["state"] == "pending"
    reply = await send_claim(session)
    assert reply.logins == ()
    assert reply.next_in_sec is not None
    assert 50 < reply.next_in_sec <= 60
    for _ in range(2):
        await pool.execute("UPDATE accesses SET due_at = now()")
        (due,) = await claim(session)
        assert await fail(session, due, failed=True)
    assert due.attempts == 2
    row = await login(pool, sandbox_id)
    assert (row["state"], row["error"], row["attempts"]) == ("failed", "503", 3)
    await make_ready(session)
    assert (await login(pool, sandbox_id))["error"] is None
    assert await pool.events(sandbox_id) == ["sandbox.allocated", "access.failed", "access.ready"]


async def test_the_end_of_a_lease_erases_the_password_and_holds_the_deletion(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    await make_ready(session)
    await release(students, release_command(sandbox_id, "ann"))
    row = await login(pool, sandbox_id)
    assert (row["state"], row["password"], row["password_key"]) == ("removing", None, None)
    assert (await claim_deletions(session)).deletions == ()
    reply = await deletions.hurry_deletions(session, HurryDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(reply, DeletionsHurried)
    assert reply.hurried == 0
    (due,) = await claim(session)
    assert (due.remove, due.password, due.user_id, due.email) == (
        True,
        None,
        f"user-{sandbox_id}",
        f"ann@{DOMAIN}",
    )
    assert await remove(session, due)
    assert not await remove(session, due)
    assert [deletion.sandbox_id for deletion in (await claim_deletions(session)).deletions] == [sandbox_id]
    row = await login(pool, sandbox_id)
    assert (row["state"], row["email"], row["user_id"], row["due_at"]) == ("removed", None, None, None)
    assert (await pool.events(sandbox_id))[2:] == ["sandbox.deletion_requested", "access.ended", "access.removed"]


@pytest.mark.parametrize("way", ["release", "end", "expire", "replace"])
async def test_each_end_of_a_lease_erases_the_password(
    pool: Pool, session: WriteSession, students: WriteSession, way: str
) -> None:
    sandbox_id = await lease(pool, students)
    await make_ready(session)
    await pool.fill(1)
    if way == "release":
        await release(students, release_command(sandbox_id, "ann"))
    elif way == "end":
        await leases.end_lease(session, EndLease(request_id="r", sandbox_id=sandbox_id, note="why"))
    elif way == "expire":
        await pool.execute("UPDATE leases SET expires_at = now() - interval '1 hour'")
        await leases.expire_leases(session, ExpireLeases(grace_sec=0, limit=10))
    else:
        command = ReplaceSandbox(request_id="r", sandbox_id=sandbox_id, holder="ann", reason="broken")
        await lease_changes.replace_sandbox(students, [command])
    row = await login(pool, sandbox_id)
    assert (row["state"], row["password"]) == ("removing", None)


async def test_a_lease_that_ends_before_the_first_claim_has_no_user(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    await release(students, release_command(sandbox_id, "ann"))
    assert (await login(pool, sandbox_id))["state"] == "removed"
    assert await claim(session) == []
    assert len((await claim_deletions(session)).deletions) == 1


async def test_the_removal_comes_after_a_running_attempt(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    (creating,) = await claim(session)
    await release(students, release_command(sandbox_id, "ann"))
    assert await claim(session) == []
    assert await record(session, creating)
    assert (await login(pool, sandbox_id))["state"] == "removing"
    (due,) = await claim(session)
    assert (due.remove, due.user_id) == (True, "user-1")
    assert "access.ready" not in await pool.events(sandbox_id)


async def test_the_removal_of_a_dead_attempt_knows_the_email(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    await claim(session, claim_sec=0.001)
    await release(students, release_command(sandbox_id, "ann"))
    (due,) = await claim(session)
    assert (due.remove, due.user_id, due.email) == (True, None, f"ann@{DOMAIN}")


async def test_the_deletion_waits_a_bounded_time_and_records_the_user(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    (due,) = await claim(session, removal_wait_sec=0)
    await record(session, due)
    await release(students, release_command(sandbox_id, "ann"))
    (due,) = await claim(session)
    await fail(session, due)
    assert len((await claim_deletions(session)).deletions) == 1
    await deletions.record_deletion(session, RecordDeletion(sandbox_id=sandbox_id))
    row = await login(pool, sandbox_id)
    assert (row["state"], row["email"], row["user_id"]) == ("remains", f"ann@{DOMAIN}", "user-1")
    assert await claim(session) == []
    assert set((await pool.events(sandbox_id))[-2:]) == {"sandbox.deleted", "access.remains"}


async def test_a_purged_sandbox_takes_its_login_along(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    await make_ready(session)
    await release(students, release_command(sandbox_id, "ann"))
    await pool.execute("UPDATE sandboxes SET status = 'deletion_failed'")
    await purge.purge_records(session, PurgeRecords(status="deletion_failed", limit=10))
    assert await pool.value("SELECT count(*) FROM accesses") == 0
    assert (await send_claim(session)).next_in_sec is None


async def test_a_broken_sandbox_stays_on_hold_after_the_removal(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    await make_ready(session)
    await pool.fill(1)
    command = ReplaceSandbox(request_id="r", sandbox_id=sandbox_id, holder="ann", reason="broken")
    (reply,) = await lease_changes.replace_sandbox(students, [command])
    new = granted_lease(reply).sandbox_id
    due = {login.sandbox_id: login for login in await claim(session)}
    assert (due[sandbox_id].remove, due[new].remove, due[new].groups) == (True, False, ("user",))
    await remove(session, due[sandbox_id])
    assert await pool.column(
        "SELECT deletion_due_at = deletion_hold_until FROM sandboxes WHERE sandbox_id = $1", sandbox_id
    ) == [True]


async def test_a_claimed_standby_lease_keeps_the_email_of_its_user(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    await pool.fill(1)
    command = allocate_command("hot-start", access="user").model_copy(update={"mode": "standby"})
    (reply,) = await allocate(students, command)
    sandbox_id = granted_lease(reply).sandbox_id
    (first,) = await claim(session, claim_sec=0.001)
    change = ClaimLease(request_id="r", sandbox_id=sandbox_id, holder="hot-start", new_holder="ann")
    await lease_changes.claim_lease(students, [change])
    (second,) = await claim(session)
    assert (first.email, second.email) == (f"hot-start@{DOMAIN}", f"hot-start@{DOMAIN}")


async def test_keys_are_rotated_without_a_change_of_passwords(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    ids = [await lease(pool, students, f"student-{number}") for number in range(5)]
    passwords = {due.sandbox_id: KEYS.decrypt(due.password or "") for due in await claim(session)}
    new = Fernet.generate_key().decode()
    session.access_keys = AccessKeys(f"{new},{ACCESS_KEY}")
    await pool.execute("UPDATE accesses SET password = 'damaged' WHERE sandbox_id = $1", ids[0])

    async def rotate() -> tuple[int, int, int]:
        reply = await logins.rotate_access_keys(session, RotateAccessKeys(request_id="r", limit=3))
        assert isinstance(reply, AccessKeysRotated)
        return reply.rotated, reply.remaining, reply.unreadable

    assert [await rotate() for _ in range(3)] == [(2, 3, 1), (2, 1, 1), (0, 1, 1)]
    stored = await pool.rows("SELECT sandbox_id, password FROM accesses WHERE sandbox_id <> $1", ids[0])
    assert {row["sandbox_id"]: AccessKeys(new).decrypt(row["password"]) for row in stored} == {
        key: value for key, value in passwords.items() if key != ids[0]
    }


async def test_a_rotation_never_restores_an_erased_password(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    sandbox_id = await lease(pool, students)
    await make_ready(session)
    session.access_keys = AccessKeys(f"{Fernet.generate_key().decode()},{ACCESS_KEY}")
    outdated = await sql_logins.find_outdated_passwords(
        session, key_id=session.access_keys.key_id, after="", limit=10
    )
    await release(students, release_command(sandbox_id, "ann"))
    rotated = [(password, session.access_keys.rotate(password.password)) for password in outdated]
    assert len(rotated) == 1
    assert await sql_logins.replace_passwords(session, key_id=session.access_keys.key_id, passwords=rotated) == (
        0,
        0,
    )
    assert (await login(pool, sandbox_id))["password"] is None


async def test_without_keys_claims_and_rotations_are_refused(session: WriteSession) -> None:
    session.access_keys = None
    options = {"limit": 1, "max_running": 1, "claim_sec": 1, "removal_wait_sec": 1, "email_domain": DOMAIN}
    reply = await logins.claim_access(session, ClaimAccess.model_validate(options))
    assert refusal_code(reply) == "ACCESS_NOT_CONFIGURED"
    reply = await logins.rotate_access_keys(session, RotateAccessKeys(request_id="r", limit=1))
    assert refusal_code(reply) == "ACCESS_NOT_CONFIGURED"


async def test_the_database_refuses_a_password_after_the_end(pool: Pool, students: WriteSession) -> None:
    sandbox_id = await lease(pool, students)
    await release(students, release_command(sandbox_id, "ann"))
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute("UPDATE accesses SET password = 'x', password_key = 'y'")


async def test_a_record_of_an_unknown_claim_changes_nothing(
    pool: Pool, session: WriteSession, students: WriteSession
) -> None:
    await lease(pool, students)
    (due,) = await claim(session, claim_sec=timedelta(minutes=1).total_seconds())
    stranger = due.model_copy(update={"claim_id": uuid.UUID(int=1)})
    before = await pool.state()
    assert not await record(session, stranger)
    assert not await fail(session, stranger, failed=True)
    assert not await remove(session, stranger)
    assert await pool.state() == before
