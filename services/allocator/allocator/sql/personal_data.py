"""Personal data: replace a student id by a pseudonym, and remove old entries of the audit."""

from datetime import timedelta
from typing import TypedDict

from allocator.write_session import GUARD, WriteSession

# Parameters: epoch, student id, pseudonym. blocked: a student with a lease or a place needs the id. A lease that is
# granted concurrently keeps the id; the administrator forgets it after its end. The fields holder and first_holder
# hold whole ids. The email of a login contains the id; it is needed until CSP has removed the user. Reasons are
# free text, so the id is replaced inside of them.
FORGET = f"""
WITH {GUARD},
blocked AS MATERIALIZED (
    SELECT FROM guard CROSS JOIN leases l WHERE l.holder = $2 AND l.ended_at IS NULL
    UNION ALL
    SELECT FROM guard CROSS JOIN waiting w WHERE w.holder = $2
),
held AS MATERIALIZED (
    SELECT l.lease_id, l.sandbox_id FROM guard CROSS JOIN leases l
    WHERE '' || l.holder = $2 AND NOT EXISTS (SELECT FROM blocked)
    UNION
    SELECT l.lease_id, l.sandbox_id FROM guard CROSS JOIN leases l
    WHERE l.first_holder = $2 AND NOT EXISTS (SELECT FROM blocked)
),
forgotten AS (
    UPDATE leases l
    SET holder = CASE WHEN l.holder = $2 THEN $3 ELSE l.holder END,
        first_holder = CASE WHEN l.first_holder = $2 THEN $3 ELSE l.first_holder END,
        end_note = replace(l.end_note, $2, $3), idempotency_key = NULL
    FROM held WHERE l.lease_id = held.lease_id
    RETURNING l.lease_id
),
history_of_sandboxes AS (
    UPDATE history h SET data = {{data}}
    FROM held WHERE h.sandbox_id = held.sandbox_id
),
logins AS (
    UPDATE accesses a SET email = NULL FROM held WHERE a.sandbox_id = held.sandbox_id AND a.state = 'removed'
),
unpublished AS (
    UPDATE outbox o SET data = {{data}}
    FROM guard
    WHERE (o.data ->> 'holder' = $2 OR o.data ->> 'first_holder' = $2) AND NOT EXISTS (SELECT FROM blocked)
),
audited AS (
    UPDATE audit a SET reason = replace(a.reason, $2, $3) FROM guard
    WHERE position($2 IN a.reason) > 0 AND NOT EXISTS (SELECT FROM blocked)
)
SELECT epoch, EXISTS (SELECT FROM blocked) AS blocked, (SELECT count(*) FROM forgotten) AS leases FROM guard
""".format(
    data="""data || jsonb_strip_nulls(jsonb_build_object(
        'holder', CASE WHEN data ->> 'holder' = $2 THEN $3 END,
        'first_holder', CASE WHEN data ->> 'first_holder' = $2 THEN $3 END,
        'note', CASE WHEN position($2 IN data ->> 'note') > 0 THEN replace(data ->> 'note', $2, $3) END
    ))"""
)

PURGE_AUDIT = f"""
WITH {GUARD},
old AS MATERIALIZED (
    SELECT a.audit_id FROM guard CROSS JOIN LATERAL (
        SELECT audit_id FROM audit WHERE at <= now() - $2::interval ORDER BY at LIMIT $3
    ) a
),
purged AS (
    DELETE FROM audit a USING old WHERE a.audit_id = old.audit_id RETURNING 1
)
SELECT epoch, (SELECT count(*) FROM purged) AS count FROM guard
"""


class ForgetRow(TypedDict):
    blocked: bool
    """Whether the student has a lease, or a place in the waiting line."""
    leases: int
    """Number of past leases with the pseudonym."""


async def forget(session: WriteSession, *, student: str, pseudonym: str) -> ForgetRow:
    row: ForgetRow = await session.fetch_one(FORGET, student, pseudonym)
    return row


async def purge_audit(session: WriteSession, *, for_at_least: timedelta, limit: int) -> int:
    count: int = (await session.fetch_one(PURGE_AUDIT, for_at_least, limit))["count"]
    return count
