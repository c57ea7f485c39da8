"""Personal data: replace student ids by pseudonyms, and remove old entries of the audit."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, TypedDict

from allocator.write_session import GUARD, WriteSession
from sandbox_broker.contract.types import PSEUDONYM_PREFIX


def _replace_id(text: str) -> str:
    """Return the expression for a free text with the pseudonym of row i in place of its student id. An id that is
    only a part of a longer word stays, because `ann` is not in `annual`."""
    escaped = r"regexp_replace(i.student, '\W', '\\\&', 'g')"
    return rf"regexp_replace({text}, '(?<![\w-])' || {escaped} || '(?![\w-])', i.pseudonym, 'g')"


# Row i has a student id and its pseudonym.
_DATA = f"""data || jsonb_strip_nulls(jsonb_build_object(
        'holder', CASE WHEN data ->> 'holder' = i.student THEN i.pseudonym END,
        'first_holder', CASE WHEN data ->> 'first_holder' = i.student THEN i.pseudonym END,
        'note', CASE WHEN position(i.student IN data ->> 'note') > 0
            THEN {_replace_id("data ->> 'note'")} END
    ))"""
# Row i is a lease with an id to replace. The email of a login contains the id; it is needed until CSP has removed
# the user.
_REPLACE = f"""
forgotten AS (
    UPDATE leases l
    SET holder = CASE WHEN l.holder = i.student THEN i.pseudonym ELSE l.holder END,
        first_holder = CASE WHEN l.first_holder = i.student THEN i.pseudonym ELSE l.first_holder END,
        end_note = {_replace_id("l.end_note")}, idempotency_key = NULL
    FROM held i WHERE l.lease_id = i.lease_id
    RETURNING l.lease_id
),
history_of_sandboxes AS (
    UPDATE history h SET data = {_DATA}
    FROM held i WHERE h.sandbox_id = i.sandbox_id
),
logins AS (
    UPDATE accesses a SET email = NULL FROM held i WHERE a.sandbox_id = i.sandbox_id AND a.state = 'removed'
)"""

# Parameters: epoch, student id, pseudonym. blocked: a student with a lease or a place needs the id. A lease that is
# granted concurrently keeps the id; the administrator forgets it after its end.
FORGET = f"""
WITH {GUARD},
blocked AS MATERIALIZED (
    SELECT FROM guard CROSS JOIN leases l WHERE l.holder = $2 AND l.ended_at IS NULL
    UNION ALL
    SELECT FROM guard CROSS JOIN waiting w WHERE w.holder = $2
),
ids AS MATERIALIZED (
    SELECT $2::text AS student, $3::text AS pseudonym FROM guard WHERE NOT EXISTS (SELECT FROM blocked)
),
held AS MATERIALIZED (
    SELECT l.lease_id, l.sandbox_id, i.student, i.pseudonym FROM ids i CROSS JOIN leases l
    WHERE '' || l.holder = $2
    UNION
    SELECT l.lease_id, l.sandbox_id, i.student, i.pseudonym FROM ids i CROSS JOIN leases l
    WHERE l.first_holder = $2
),{_REPLACE},
unpublished AS (
    UPDATE outbox o SET data = {_DATA}
    FROM ids i WHERE o.data ->> 'holder' = i.student OR o.data ->> 'first_holder' = i.student
),
audited AS (
    UPDATE audit a SET reason = {_replace_id("a.reason")}
    FROM ids i WHERE position(i.student IN a.reason) > 0
)
SELECT epoch, EXISTS (SELECT FROM blocked) AS blocked, (SELECT count(*) FROM forgotten) AS leases FROM guard
"""

# One id of each lease. A lease with two ids is found again by the next run. The condition on the ids is the one of
# the index leases_with_student_id, so a lease with pseudonyms is not read again.
FIND_OLD_LEASES = f"""
WITH {GUARD}
SELECT epoch, o.lease_id, o.student FROM guard LEFT JOIN LATERAL (
    SELECT l.lease_id,
        CASE WHEN l.holder NOT LIKE '{PSEUDONYM_PREFIX}%' THEN l.holder ELSE l.first_holder END AS student
    FROM leases l
    WHERE l.ended_at <= now() - $2::interval
      AND (l.holder NOT LIKE '{PSEUDONYM_PREFIX}%' OR l.first_holder NOT LIKE '{PSEUDONYM_PREFIX}%')
    ORDER BY l.ended_at LIMIT $3
) o ON true
"""

# Only the reasons about the sandbox of a lease are searched, because a search of the whole audit for each id would
# take minutes.
FORGET_OLD_LEASES = f"""
WITH {GUARD},
held AS MATERIALIZED (
    SELECT l.lease_id, l.sandbox_id, o.student, o.pseudonym
    FROM guard CROSS JOIN unnest($2::bigint[], $3::text[], $4::text[]) AS o (lease_id, student, pseudonym)
    JOIN leases l ON l.lease_id = o.lease_id AND l.ended_at IS NOT NULL
),{_REPLACE},
unpublished AS (
    UPDATE outbox o SET data = {_DATA}
    FROM held i WHERE o.subject = i.sandbox_id
),
audited AS (
    UPDATE audit a SET reason = {_replace_id("a.reason")}
    FROM held i WHERE a.object = i.sandbox_id AND position(i.student IN a.reason) > 0
)
SELECT epoch FROM guard
"""

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


class OldLease(NamedTuple):
    lease_id: int
    student: str
    """An id that is not replaced yet."""


async def find_old_leases(session: WriteSession, *, for_at_least: timedelta, limit: int) -> list[OldLease]:
    """Return leases with a student id that ended at least `for_at_least` ago, the longest ago first."""
    rows = await session.fetch(FIND_OLD_LEASES, for_at_least, limit)
    return [OldLease(row["lease_id"], row["student"]) for row in rows if row["lease_id"] is not None]


async def forget_old_leases(
    session: WriteSession, *, leases: Sequence[OldLease], pseudonyms: Sequence[str]
) -> None:
    """Replace the id of each lease by its pseudonym. Active leases and other ids stay."""
    await session.fetch(
        FORGET_OLD_LEASES,
        [lease.lease_id for lease in leases],
        [lease.student for lease in leases],
        list(pseudonyms),
    )


async def purge_audit(session: WriteSession, *, for_at_least: timedelta, limit: int) -> int:
    count: int = (await session.fetch_one(PURGE_AUDIT, for_at_least, limit))["count"]
    return count
