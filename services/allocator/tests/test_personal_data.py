"""Personal data: a pseudonym replaces a student id everywhere, and old entries of the audit are removed."""

import pytest

from allocator.handlers import personal_data
from allocator.routing import MAINTENANCE
from sandbox_broker.contract.commands import EndLease, ForgetStudent, PurgeAudit
from sandbox_broker.contract.replies import Purged, StudentForgotten, refuse
from sandbox_broker.contract.tokens import Sender

from .allocator_harness import Pool, allocate, allocate_command

ADMIN = Sender(actor="$BROKER_ADMIN_TOKEN")
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
        session, [ForgetStudent(request_id="r", student=STUDENT, sender=ADMIN)]
    )
    assert isinstance(reply, StudentForgotten)
    assert reply.leases == 1
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
