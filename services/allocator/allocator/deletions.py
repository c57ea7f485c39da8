"""The SQL of deletions: whose turn it is, what is due, and what came of it. It keeps the rules of store.py."""

from datetime import timedelta

import asyncpg

from allocator.store import GUARD, Rows, guarded
from sandbox_broker.contract.commands import ClaimDeletions

# One clean-up run at a time. Of two that ask at once the second waits for the row, then sees the first in it. What
# is locked for a run names the duty, or it could be locked before the duty is looked at.
_DUTY = """
duty AS (
    UPDATE cleanup_duty SET run_id = $2, until = now() + $3::interval
    FROM guard
    WHERE run_id = $2 OR until <= now()
    RETURNING run_id
)
"""

CLAIM_DELETIONS = f"""
WITH {GUARD},
{_DUTY},
due AS MATERIALIZED (
    SELECT s.sandbox_id
    FROM duty CROSS JOIN LATERAL (
        SELECT sandbox_id FROM sandboxes
        WHERE status = 'pending_deletion' AND deletion_due_at <= now() AND duty.run_id = $2
        ORDER BY deletion_due_at LIMIT $4 FOR UPDATE SKIP LOCKED
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

# Not what this run has in hand: made due, it would be deleted a second time beside the first.
HURRY_DELETIONS = f"""
WITH {GUARD},
{_DUTY},
postponed AS MATERIALIZED (
    SELECT s.sandbox_id
    FROM duty CROSS JOIN LATERAL (
        SELECT sandbox_id FROM sandboxes
        WHERE status = 'pending_deletion' AND deletion_due_at > now()
          AND deletion_claim IS DISTINCT FROM duty.run_id
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
        deletion_due_at = NULL, deletion_claim = NULL, deletion_error = NULL, services_error = $3
    FROM guard
    WHERE s.sandbox_id = $2 AND s.status = 'pending_deletion'
    RETURNING s.sandbox_id, s.external_id, s.name
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deleted', m.sandbox_id,
        jsonb_build_object('sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name)
    FROM moved m
)
SELECT epoch, EXISTS (SELECT FROM moved) AS changed FROM guard
"""

# The claim and its count of attempts are the condition: of a message that comes twice the second finds them
# changed, and one that comes when another run has taken over says nothing about that one's attempt.
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
        deletion_request_id = $3, deletion_traceparent = $4
    FROM guard
    WHERE s.sandbox_id = $2 AND s.status = 'deletion_failed'
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
    floor(extract(epoch FROM coalesce(s.deletion_requested_at, now())))::bigint AS deletion_requested_at
FROM guard LEFT JOIN sandboxes s ON s.sandbox_id = $2
"""


async def claim_deletions(connection: asyncpg.Connection, epoch: int, command: ClaimDeletions) -> Rows:
    """A row for each deletion, or one without a sandbox_id; all have on_duty and next_in_sec."""
    claim = timedelta(seconds=command.claim_sec)
    return guarded(await connection.fetch(CLAIM_DELETIONS, epoch, command.run_id, claim, command.limit))
