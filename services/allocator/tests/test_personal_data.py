"""Personal data: a pseudonym replaces a student id everywhere, and old entries of the audit are removed."""

import asyncio
from datetime import timedelta

import pytest

from allocator.handlers import personal_data
from allocator.handlers.personal_data import build_pseudonym
from allocator.routing import MAINTENANCE
from allocator.sql.personal_data import FIND_OLD_LEASES
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import EndLease, ForgetStudent, PurgeAudit, PurgePersonalData
from sandbox_broker.contract.replies import Purged, StudentForgotten, refuse
from sandbox_broker.contract.tokens import Sender

from .allocator_harness import Pool, allocate, allocate_command

ADMIN = Sender(actor="$BROKER_ADMIN_TOKEN")
PRIVACY = ADMIN.model_copy(update={"reason": 'request of inst-"ann"-7'})
STUDENT = 'inst-"ann"-7'
TABLES = ("leases", "history", "outbox", "audit", "waiting")


async def mentions(pool: Pool, text: str) -> dict[str, int]:
    """Return the number of rows of each table that contain the text in any column, as JSON writes it."""
    escaped = text.replace('"', '\\"')
    return {
        table: await pool.value(
            f"SELECT count(*) FROM {table} t WHERE position($1 IN replace(to_jsonb(t)::text, '\\\\', '\\')) > 0 "
            f"OR position($2 IN to_jsonb(t)::text) > 0",
            text,
            escaped,
        )
        for table in TABLES
    }


async def test_a_student_is_forgotten_everywhere(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    sandbox_id, other = await pool.lease(STUDENT), await pool.lease("bob")
    command = EndLease(request_id="r", sandbox_id=sandbox_id, note=f"{STUDENT} left", sender=ADMIN)
    await MAINTENANCE.handlers[EndLease](session, [command])
    await pool.execute(
        "INSERT INTO history (sandbox_id, outbox_id, type, occurred_at, data) "
        "SELECT subject, outbox_id, type, occurred_at, data FROM outbox WHERE type = 'sandbox.allocated'"
    )
    assert all(number for table, number in (await mentions(pool, STUDENT)).items() if table != "waiting")
    (reply,) = await MAINTENANCE.handlers[ForgetStudent](
        session, [ForgetStudent(request_id="r", student=STUDENT, sender=PRIVACY)]
    )
    assert isinstance(reply, StudentForgotten)
    assert reply == StudentForgotten(pseudonym=build_pseudonym(session.pseudonym_key, STUDENT), leases=1)
    assert set((await mentions(pool, STUDENT)).values()) == {0}
    assert await pool.value("SELECT holder FROM leases WHERE sandbox_id = $1", sandbox_id) == reply.pseudonym
    assert await pool.value("SELECT end_note FROM leases WHERE sandbox_id = $1", sandbox_id) == (
        f"{reply.pseudonym} left"
    )
    assert await pool.value("SELECT holder FROM leases WHERE sandbox_id = $1", other) == "bob"
    assert await pool.column("SELECT object FROM audit WHERE action = 'student.forget'") == [reply.pseudonym]


@pytest.mark.parametrize("is_waiting", [False, True])
async def test_a_student_with_a_lease_or_a_place_is_kept(pool: Pool, is_waiting: bool) -> None:
    if is_waiting:
        await allocate(await pool.write_session(), allocate_command(STUDENT, wait_sec=900))
    else:
        await pool.lease(STUDENT)
    before = await pool.state()
    session = await pool.write_session(lane=MAINTENANCE)
    reply = await personal_data.forget_student(session, ForgetStudent(request_id="r", student=STUDENT))
    assert reply == refuse("STUDENT_HAS_LEASE")
    assert await pool.state() == before


async def test_an_unknown_student_has_no_leases(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    reply = await personal_data.forget_student(session, ForgetStudent(request_id="r", student="nobody"))
    assert isinstance(reply, StudentForgotten)
    assert reply.leases == 0


def test_a_pseudonym_needs_the_key() -> None:
    assert build_pseudonym(b"key", "ann") == build_pseudonym(b"key", "ann")
    assert len({build_pseudonym(key, name) for key in (b"key", b"other") for name in ("ann", "bob")}) == 4


async def end_lease(pool: Pool, student: str, days_ago: int, *, note: str | None = None) -> str:
    """Lease a sandbox, end the lease with an entry in the audit, publish its events; return the sandbox."""
    session = await pool.write_session(lane=MAINTENANCE)
    sandbox_id = await pool.lease(student)
    command = EndLease(request_id="r", sandbox_id=sandbox_id, note=note or f"{student} left", sender=ADMIN)
    await MAINTENANCE.handlers[EndLease](session, [command])
    await pool.execute(
        "UPDATE leases SET ended_at = now() - $2 * interval '1 day', idempotency_key = holder || lease_id "
        "WHERE sandbox_id = $1",
        sandbox_id,
        days_ago,
    )
    await pool.execute(
        "INSERT INTO history (sandbox_id, outbox_id, type, occurred_at, data) "
        "SELECT subject, outbox_id, type, occurred_at, data FROM outbox WHERE subject = $1",
        sandbox_id,
    )
    await pool.execute(
        "INSERT INTO accesses (sandbox_id, groups, claim, email, first_claimed_at, due_at, state, ended_at) "
        "VALUES ($1, '[]', gen_random_uuid(), $2 || '@labs', now(), now(), 'removed', now())",
        sandbox_id,
        student,
    )
    return sandbox_id


@pytest.mark.parametrize(
    ("student", "note", "expected"),
    [
        (
            "ann",
            "annual check: ann's lab, (ann), joann, ann-2, ann.",
            "annual check: <>'s lab, (<>), joann, ann-2, <>.",
        ),
        ("a.b*c", "a.b*c, axbbc, a.b*c1", "<>, axbbc, a.b*c1"),
        ("ann", "ann", "<>"),
        ("7", "lab 7 of 17, $7 \\7", "lab <> of 17, $<> \\<>"),
        ("\\1 (a", "\\1 (a left", "<> left"),
    ],
)
async def test_an_id_inside_a_longer_word_stays(pool: Pool, student: str, note: str, expected: str) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    sandbox_id = await end_lease(pool, student, 1, note=note)
    reply = await personal_data.forget_student(session, ForgetStudent(request_id="r", student=student))
    assert isinstance(reply, StudentForgotten)
    expected = expected.replace("<>", reply.pseudonym)
    assert await pool.value("SELECT end_note FROM leases") == expected
    assert await pool.value("SELECT reason FROM audit WHERE object = $1", sandbox_id) == expected
    notes = await pool.column("SELECT data ->> 'note' FROM history WHERE data ->> 'note' IS NOT NULL")
    assert set(notes) <= {expected}


async def test_the_students_of_old_leases_become_pseudonyms(pool: Pool) -> None:
    """The lease of `zoe` has two ids. `ann` has an old lease, a young one and an active one."""
    session = await pool.write_session(lane=MAINTENANCE)
    old, claimed = await end_lease(pool, STUDENT, 401), await end_lease(pool, "zoe", 402)
    await pool.execute("UPDATE leases SET first_holder = 'instructor' WHERE sandbox_id = $1", claimed)
    young, standing = await end_lease(pool, STUDENT, 399), await pool.lease(STUDENT)
    untouched = "SELECT to_jsonb(l) FROM leases l WHERE sandbox_id = ANY ($1) ORDER BY sandbox_id"
    before = await pool.rows(untouched, [young, standing])

    counts = [await purge_personal_data(session, limit=1) for _ in range(4)]

    assert counts == [1, 1, 1, 0]
    assert await pool.rows(untouched, [young, standing]) == before
    pseudonym = build_pseudonym(session.pseudonym_key, STUDENT)
    (row,) = await pool.rows("SELECT holder, end_note, idempotency_key FROM leases WHERE sandbox_id = $1", old)
    assert tuple(row) == (pseudonym, f"{pseudonym} left", None)
    (row,) = await pool.rows("SELECT holder, first_holder FROM leases WHERE sandbox_id = $1", claimed)
    assert tuple(row) == tuple(build_pseudonym(session.pseudonym_key, name) for name in ("zoe", "instructor"))
    for name in ("zoe", "instructor"):
        assert set((await mentions(pool, name)).values()) == {0}
    for table, column in (("history", "sandbox_id"), ("outbox", "subject"), ("accesses", "sandbox_id")):
        texts = await pool.column(f"SELECT to_jsonb(t)::text FROM {table} t WHERE {column} = $1", old)
        assert texts
        assert "ann" not in "".join(texts)
    assert await pool.column("SELECT reason FROM audit WHERE object = $1", old) == [f"{pseudonym} left"]
    assert await pool.column("SELECT reason FROM audit WHERE object = $1", young) == [f"{STUDENT} left"]


async def test_a_student_is_forgotten_under_the_same_pseudonym(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    for days in (401, 1):
        await end_lease(pool, STUDENT, days)
    assert await purge_personal_data(session, limit=10) == 1
    reply = await personal_data.forget_student(session, ForgetStudent(request_id="r", student=STUDENT))
    assert reply == StudentForgotten(pseudonym=build_pseudonym(session.pseudonym_key, STUDENT), leases=1)
    assert await pool.column("SELECT DISTINCT holder FROM leases") == [reply.pseudonym]


async def test_two_allocators_and_a_repeated_command_leave_one_pseudonym(pool: Pool) -> None:
    """Each session has a random key, like an allocator without PSEUDONYM_KEY."""
    sessions = [await pool.write_session(lane=MAINTENANCE) for _ in range(2)]
    for number in range(20):
        await end_lease(pool, f"student-{number}", 401)
    await asyncio.gather(*(purge_personal_data(session, limit=20) for session in sessions))
    assert await purge_personal_data(sessions[0], limit=20) == 0
    pairs = await pool.rows("SELECT holder, end_note FROM leases")
    assert len(pairs) == 20
    for holder, note in pairs:
        assert holder.startswith("forgotten-")
        assert note == f"{holder} left"


async def test_leases_with_pseudonyms_are_not_read_again(pool: Pool) -> None:
    await pool.execute(
        "INSERT INTO leases (sandbox_id, holder, expires_at, ended_at, end_reason) "
        "SELECT 'gone-' || n, 'forgotten-' || n, now(), now() - interval '500 days', 'student' "
        "FROM generate_series(1, 5000) n"
    )
    await end_lease(pool, STUDENT, 401)
    await pool.execute("VACUUM ANALYZE leases")
    session = await pool.write_session(lane=MAINTENANCE)
    plan = await session.connection.fetch(f"EXPLAIN {FIND_OLD_LEASES}", session.epoch, timedelta(days=400), 500)
    assert "leases_with_student_id" in "\n".join(row[0] for row in plan)


async def purge_personal_data(session: WriteSession, *, limit: int) -> int:
    """Forget leases that ended 400 days ago; return their number."""
    reply = await personal_data.purge_personal_data(session, PurgePersonalData(for_sec=400 * 86400, limit=limit))
    assert isinstance(reply, Purged)
    return reply.count


async def test_old_entries_of_the_audit_are_removed(pool: Pool) -> None:
    for days in (1, 401, 402, 403):
        await pool.execute(
            "INSERT INTO audit (at, actor, action, outcome) "
            "VALUES (now() - $1 * interval '1 day', 'a', 'b', 'done')",
            days,
        )
    session = await pool.write_session(lane=MAINTENANCE)
    for removed in (2, 1, 0):
        command = PurgeAudit(for_sec=400 * 86400, limit=2)
        assert await personal_data.purge_audit(session, command) == Purged(count=removed)
    assert await pool.value("SELECT count(*) FROM audit") == 1
