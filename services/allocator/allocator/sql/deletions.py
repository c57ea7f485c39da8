"""Deletions: claim the due ones, record their results, retry failed ones."""

import uuid
from datetime import timedelta
from typing import Literal, TypedDict

from allocator.write_session import GUARD, WriteSession

# Leader lease: one clean-up run at a time. A concurrent run blocks on the row and then sees the new owner.
# Statements that lock sandboxes for a run must refer to this CTE, or they could lock them before it has been
# checked.
_LEADER_LEASE = """
duty AS (
    UPDATE cleanup_duty SET run_id = $2, until = now() + $3::interval
    FROM guard
    WHERE run_id = $2 OR until <= now()
    RETURNING run_id
)
"""


def _claim_statement(condition: str, order: str) -> str:
    return f"""
WITH {GUARD},
{_LEADER_LEASE},
due AS MATERIALIZED (
    SELECT s.sandbox_id
    FROM duty CROSS JOIN LATERAL (
        SELECT sandbox_id FROM sandboxes
        WHERE status = 'pending_deletion' AND deletion_due_at <= now() AND duty.run_id = $2
            {condition}
        ORDER BY deletion_due_at {order} LIMIT $4 FOR UPDATE SKIP LOCKED
    ) s
),
claimed AS (
    UPDATE sandboxes s SET deletion_due_at = now() + $3::interval, deletion_claim = $2
    FROM due WHERE s.sandbox_id = due.sandbox_id
    RETURNING s.sandbox_id, s.external_id, s.name, s.deletion_attempts, s.deletion_requested_at,
        s.deletion_request_id, s.deletion_traceparent, s.missing_since IS NOT NULL AS missing
)
SELECT epoch, EXISTS (SELECT FROM duty) AS on_duty,
    extract(epoch FROM CASE
        WHEN EXISTS (SELECT FROM duty) THEN (
            SELECT deletion_due_at FROM sandboxes
            WHERE status = 'pending_deletion' ORDER BY deletion_due_at LIMIT 1
        )
        ELSE (SELECT until FROM cleanup_duty)
    END - now())::float AS next_in_sec,
    c.*
FROM guard LEFT JOIN claimed c ON true ORDER BY c.deletion_requested_at
"""


CLAIM_DELETIONS = _claim_statement("", "")
# Without an index of their own: behind 100,000 failed deletions that are due, a claim took 0.3 s on a busy machine,
# and each deletion takes CSP 5 to 10 s. A partial index would be written with every claim.
CLAIM_UNTRIED_DELETIONS = {
    "oldest": _claim_statement("AND deletion_attempts = 0", ""),
    "newest": _claim_statement("AND deletion_attempts = 0", "DESC"),
}

# Deletions claimed by this run are in progress. They stay as they are, or the run would delete them twice. Broken
# sandboxes on hold wait for an operator, and others for the removal of the login inside them.
HURRY_DELETIONS = f"""
WITH {GUARD},
{_LEADER_LEASE},
postponed AS MATERIALIZED (
    SELECT s.sandbox_id
    FROM duty CROSS JOIN LATERAL (
        SELECT sandbox_id FROM sandboxes
        WHERE status = 'pending_deletion' AND deletion_due_at > now()
          AND deletion_claim IS DISTINCT FROM duty.run_id
          AND (deletion_hold_until IS NULL OR deletion_hold_until <= now())
          AND NOT EXISTS (
              SELECT FROM accesses a WHERE a.sandbox_id = sandboxes.sandbox_id AND a.state = 'removing'
          )
        ORDER BY deletion_due_at LIMIT $4 FOR UPDATE SKIP LOCKED
    ) s
),
hurried AS (
    UPDATE sandboxes s SET deletion_due_at = now() FROM postponed WHERE s.sandbox_id = postponed.sandbox_id
    RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM duty) AS on_duty, (SELECT count(*) FROM hurried) AS hurried FROM guard
"""

END_CLEANUP = f"""
WITH {GUARD}, ended AS (
    UPDATE cleanup_duty SET run_id = NULL, until = now() FROM guard WHERE run_id = $2 RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM ended) AS changed FROM guard
"""

RECORD_DELETION = f"""
WITH {GUARD},
moved AS (
    UPDATE sandboxes s
    SET status = 'deleted', status_since = now(), deleted_at = now(),
        deletion_due_at = NULL, deletion_hold_until = NULL, deletion_claim = NULL, deletion_error = NULL,
        services_error = $3
    FROM guard
    WHERE s.sandbox_id = $2 AND s.status = 'pending_deletion'
    RETURNING s.sandbox_id, s.external_id, s.name
),
remaining AS (
    UPDATE accesses a SET state = 'remains', due_at = NULL FROM moved m
    WHERE a.sandbox_id = m.sandbox_id AND a.state = 'removing'
    RETURNING a.email, a.user_id, a.error
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deleted', m.sandbox_id,
        jsonb_build_object('sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name)
    FROM moved m
    UNION ALL
    SELECT 'access.remains', m.sandbox_id, jsonb_build_object(
        'sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name, 'holder', l.holder,
        'error', r.error
    )
    FROM moved m CROSS JOIN remaining r JOIN leases l ON l.sandbox_id = m.sandbox_id
)
SELECT epoch, EXISTS (SELECT FROM moved) AS changed, r.email AS remaining_email, r.user_id AS remaining_user_id
FROM guard LEFT JOIN remaining r ON true
"""

# The claim and its number of attempts are the condition. A duplicate message finds them changed, and so does a late
# message of a replaced run.
RECORD_DELETION_FAILURE = f"""
WITH {GUARD},
moved AS (
    UPDATE sandboxes s
    SET status = CASE WHEN $5::interval IS NULL THEN 'deletion_failed' ELSE s.status END,
        status_since = CASE WHEN $5::interval IS NULL THEN now() ELSE s.status_since END,
        deletion_attempts = s.deletion_attempts + 1, deletion_error = $4,
        deletion_due_at = now() + $5::interval, deletion_claim = NULL, services_error = $7
    FROM guard
    WHERE s.sandbox_id = $2 AND s.status = 'pending_deletion'
      AND s.deletion_attempts = $3 AND s.deletion_claim = $6
    RETURNING s.sandbox_id, s.external_id, s.name, s.status, s.deletion_attempts
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deletion_failed', m.sandbox_id, jsonb_build_object(
        'sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name,
        'attempts', m.deletion_attempts, 'error', $4::text
    )
    FROM moved m WHERE m.status = 'deletion_failed'
)
SELECT epoch, EXISTS (SELECT FROM moved) AS changed FROM guard
"""

RETRY_DELETION = f"""
WITH {GUARD},
moved AS (
    UPDATE sandboxes s
    SET status = 'pending_deletion', status_since = now(), deletion_attempts = 0, deletion_due_at = now(),
        deletion_hold_until = NULL, deletion_request_id = $3, deletion_traceparent = $4
    FROM guard
    WHERE s.sandbox_id = $2 AND (
        s.status = 'deletion_failed' OR $5 AND s.status = 'pending_deletion' AND s.deletion_hold_until > now()
    )
    RETURNING s.sandbox_id, s.external_id, s.name
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deletion_requested', m.sandbox_id, jsonb_build_object(
        'sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name, 'reason', 'admin',
        'request_id', $3::text
    )
    FROM moved m
)
SELECT epoch, EXISTS (SELECT FROM moved) AS changed, s.status,
    s.status = 'pending_deletion' AND coalesce(s.deletion_hold_until > now(), false) AS on_hold,
    floor(extract(epoch FROM coalesce(s.deletion_requested_at, now())))::bigint AS deletion_requested_at
FROM guard LEFT JOIN sandboxes s ON s.sandbox_id = $2
"""


class ClaimRow(TypedDict):
    """Claimed deletion. `on_duty` and `next_in_sec` are the same in all rows; without claimed deletions there is
    one row with None in the other columns."""

    on_duty: bool
    """Whether the run holds the leader lease."""
    next_in_sec: float | None
    """Seconds until the next deletion is due or, without the leader lease, until its expiry."""
    sandbox_id: str | None
    external_id: str
    name: str
    deletion_attempts: int
    deletion_request_id: str | None
    deletion_traceparent: str | None
    missing: bool


class DeletionRow(TypedDict):
    changed: bool
    """Whether the sandbox was pending."""
    remaining_email: str | None
    """Email of a user that the account had at its deletion. None: there was none."""
    remaining_user_id: str | None


class HurryRow(TypedDict):
    on_duty: bool
    hurried: int


class RetryRow(TypedDict):
    changed: bool
    status: str | None
    """Status before the retry; None: the sandbox does not exist."""
    on_hold: bool
    """Whether the sandbox was broken and on hold before the retry."""
    deletion_requested_at: int


async def claim_deletions(
    session: WriteSession,
    *,
    run_id: uuid.UUID,
    claim: timedelta,
    limit: int,
    untried: Literal["oldest", "newest"] | None = None,
) -> list[ClaimRow]:
    """Take or extend the leader lease, and claim up to `limit` due deletions, both for the duration `claim`.

    With `untried`, deletions that have failed before are claimed only if no other deletion is due.
    """
    if untried is not None:
        rows: list[ClaimRow] = await session.fetch(CLAIM_UNTRIED_DELETIONS[untried], run_id, claim, limit)
        if rows[0]["sandbox_id"] is not None:
            return rows
    return await session.fetch(CLAIM_DELETIONS, run_id, claim, limit)


async def hurry_deletions(session: WriteSession, *, run_id: uuid.UUID, claim: timedelta, limit: int) -> HurryRow:
    """Make up to `limit` postponed deletions due now."""
    row: HurryRow = await session.fetch_one(HURRY_DELETIONS, run_id, claim, limit)
    return row


async def end_cleanup(session: WriteSession, *, run_id: uuid.UUID) -> bool:
    """End the leader lease of the run; return whether the run held it."""
    changed: bool = (await session.fetch_one(END_CLEANUP, run_id))["changed"]
    return changed


async def record_deletion(session: WriteSession, *, sandbox_id: str, services_error: str | None) -> DeletionRow:
    """Mark a pending sandbox as deleted. A user inside it remains, if its removal has not been recorded."""
    row: DeletionRow = await session.fetch_one(RECORD_DELETION, sandbox_id, services_error)
    return row


async def record_deletion_failure(
    session: WriteSession,
    *,
    sandbox_id: str,
    attempts: int,
    error: str,
    retry_in: timedelta | None,
    run_id: uuid.UUID,
    services_error: str | None,
) -> bool:
    """Postpone a claimed deletion by `retry_in`, or give it up if `retry_in` is None; return whether the claim was
    valid.

    `attempts` is the number of attempts before the failed one.
    """
    row = await session.fetch_one(
        RECORD_DELETION_FAILURE, sandbox_id, attempts, error, retry_in, run_id, services_error
    )
    changed: bool = row["changed"]
    return changed


async def retry_deletion(
    session: WriteSession, *, sandbox_id: str, request_id: str | None, traceparent: str | None, end_hold: bool
) -> RetryRow:
    """Make a failed deletion pending and due again; with `end_hold` also that of a broken sandbox on hold."""
    row: RetryRow = await session.fetch_one(RETRY_DELETION, sandbox_id, request_id, traceparent, end_hold)
    return row
