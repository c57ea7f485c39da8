"""Audit: an entry per command of an administrator, in the transaction of its effect."""

from collections.abc import Sequence

import pytest

from allocator.handlers import lease_changes
from allocator.routing import MAINTENANCE
from allocator.sql import audit as audit_sql
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import Command, EndLease, ExtendLease, RecordJob, RevokeToken
from sandbox_broker.contract.replies import Reply
from sandbox_broker.contract.tokens import Sender

from .allocator_harness import RUN, Pool

ADMIN = Sender(actor="night-shift", key_id="000000000000000a", address="192.0.2.9", reason="from the console")


async def run(session: WriteSession, command: Command) -> Reply:
    (reply,) = await MAINTENANCE.handlers[type(command)](session, [command])
    return reply


async def entries(pool: Pool) -> list[tuple[object, ...]]:
    rows = await pool.rows(
        "SELECT actor, action, object, reason, request_id, address, outcome FROM audit ORDER BY audit_id"
    )
    return [tuple(row) for row in rows]


async def test_a_release_says_who_and_why(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session(lane=MAINTENANCE)
    command = EndLease(request_id="r-1", sandbox_id=sandbox_id, note="class over", sender=ADMIN)
    for _ in range(2):
        await run(session, command)
    await run(session, command.model_copy(update={"sandbox_id": "unknown"}))
    expected = ("night-shift", "lease.release", sandbox_id, "class over", "r-1", "192.0.2.9")
    assert await entries(pool) == [
        (*expected, "done"),
        (*expected, "unchanged"),
        (*expected[:2], "unknown", *expected[3:], "SANDBOX_NOT_FOUND"),
    ]


async def test_a_command_without_a_reason_of_its_own_has_that_of_its_sender(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    await run(session, RecordJob(request_id="r", job_id=RUN, kind="sync", sender=ADMIN))
    await run(session, RevokeToken(request_id="r", name="lab", sender=ADMIN))
    assert [entry[1:4] for entry in await entries(pool)] == [
        ("sync", str(RUN), "from the console"),
        ("token.revoke", "lab", "from the console"),
    ]


async def test_commands_of_services_are_not_audited(pool: Pool) -> None:
    session = await pool.write_session(lane=MAINTENANCE)
    await run(session, RecordJob(job_id=RUN, kind="sync"))
    assert await entries(pool) == []


async def test_an_administrator_in_the_lane_of_students_is_audited(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    command = ExtendLease(
        request_id="r", sandbox_id=sandbox_id, extension_id=RUN, extension_sec=60, note="exam", sender=ADMIN
    )
    await lease_changes.extend_lease(await pool.write_session(), [command])
    assert [entry[1:4] for entry in await entries(pool)] == [("lease.extend", sandbox_id, "exam")]


async def test_the_effect_and_its_entry_are_one_transaction(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session(lane=MAINTENANCE)

    async def fail(_: WriteSession, __: Sequence[audit_sql.Entry]) -> None:
        raise ConnectionError

    monkeypatch.setattr(audit_sql, "record", fail)
    with pytest.raises(ConnectionError):
        await run(session, EndLease(request_id="r", sandbox_id=sandbox_id, note="why", sender=ADMIN))
    assert await pool.status(sandbox_id) == "allocated"
