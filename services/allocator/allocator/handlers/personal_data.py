"""Personal data: forget a student, and remove old entries of the audit."""

import uuid
from datetime import timedelta

import structlog

from allocator.sql import personal_data
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import ForgetStudent, PurgeAudit
from sandbox_broker.contract.replies import Purged, Reply, StudentForgotten, refuse

log = structlog.get_logger()


async def forget_student(session: WriteSession, command: ForgetStudent) -> Reply:
    """Replace the id by a random pseudonym. Repeated, the command finds no lease with the id."""
    pseudonym = f"forgotten-{uuid.uuid4()}"
    row = await personal_data.forget(session, student=command.student, pseudonym=pseudonym)
    if row["blocked"]:
        return refuse("STUDENT_HAS_LEASE")
    log.info("student.forgotten", request_id=command.request_id, pseudonym=pseudonym, leases=row["leases"])
    return StudentForgotten(pseudonym=pseudonym, leases=row["leases"])


async def purge_audit(session: WriteSession, command: PurgeAudit) -> Reply:
    count = await personal_data.purge_audit(
        session, for_at_least=timedelta(seconds=command.for_sec), limit=command.limit
    )
    return Purged(count=count)
