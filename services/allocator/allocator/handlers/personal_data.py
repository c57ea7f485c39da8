"""Personal data: forget students, and remove old entries of the audit."""

import hmac
from datetime import timedelta

import structlog

from allocator.sql import personal_data
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import ForgetStudent, PurgeAudit, PurgePersonalData
from sandbox_broker.contract.replies import Purged, Reply, StudentForgotten, refuse
from sandbox_broker.contract.types import PSEUDONYM_PREFIX

log = structlog.get_logger()


async def forget_student(session: WriteSession, command: ForgetStudent) -> Reply:
    """Replace the id by its pseudonym. Repeated, the command finds no lease with the id."""
    pseudonym = build_pseudonym(session.pseudonym_key, command.student)
    row = await personal_data.forget(session, student=command.student, pseudonym=pseudonym)
    if row["blocked"]:
        return refuse("STUDENT_HAS_LEASE")
    log.info("student.forgotten", request_id=command.request_id, pseudonym=pseudonym, leases=row["leases"])
    return StudentForgotten(pseudonym=pseudonym, leases=row["leases"])


async def purge_personal_data(session: WriteSession, command: PurgePersonalData) -> Reply:
    """Replace the student ids of old leases. A repeated command finds other leases."""
    leases = await personal_data.find_old_leases(
        session, for_at_least=timedelta(seconds=command.for_sec), limit=command.limit
    )
    if leases:
        pseudonyms = [build_pseudonym(session.pseudonym_key, lease.student) for lease in leases]
        await personal_data.forget_old_leases(session, leases=leases, pseudonyms=pseudonyms)
        log.info("personal_data.purged", count=len(leases))
    return Purged(count=len(leases))


async def purge_audit(session: WriteSession, command: PurgeAudit) -> Reply:
    count = await personal_data.purge_audit(
        session, for_at_least=timedelta(seconds=command.for_sec), limit=command.limit
    )
    return Purged(count=count)


def build_pseudonym(key: bytes, student: str) -> str:
    """Return the pseudonym of a student id: the same one for the same key. The key is needed to check a guess."""
    return f"{PSEUDONYM_PREFIX}{hmac.digest(key, student.encode(), 'sha256').hex()[:32]}"
