"""Purge: delete stale sandboxes and remove expired records, a few hundred rows at a time.

The statements look rows up by key, because for a join with the old rows the planner might compare all pairs.
"""

from datetime import timedelta

from allocator.write_session import GUARD, WriteSession

# Stale sandboxes no longer exist in CSP and were never leased, so they need no deletion in CSP.
DELETE_STALE = f"""
WITH {GUARD},
old AS MATERIALIZED (
    SELECT s.sandbox_id FROM guard, sandboxes s
    WHERE s.status = 'stale' AND s.status_since <= now() - $2::interval
    LIMIT $3 FOR UPDATE OF s SKIP LOCKED
),
moved AS (
    UPDATE sandboxes s SET status = 'deleted', status_since = now(), deleted_at = now()
    WHERE s.sandbox_id = ANY (ARRAY(SELECT sandbox_id FROM old)) AND s.status = 'stale'
    RETURNING s.sandbox_id, s.external_id, s.name
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deleted', sandbox_id,
        jsonb_build_object('sandbox_id', sandbox_id, 'external_id', external_id, 'name', name)
    FROM moved
)
SELECT epoch, (SELECT count(*) FROM moved) AS count FROM guard
"""

# Leases remain as the record of past holders. They also keep a listing from inserting a used sandbox again.
PURGE_RECORDS = f"""
WITH {GUARD},
old AS MATERIALIZED (
    SELECT s.sandbox_id FROM guard, sandboxes s
    WHERE s.status = $2 AND s.status_since <= now() - $3::interval
      AND s.status IN ('stale', 'deletion_failed', 'deleted')
    LIMIT $4 FOR UPDATE OF s SKIP LOCKED
),
purged AS (
    DELETE FROM sandboxes s
    WHERE s.sandbox_id = ANY (ARRAY(SELECT sandbox_id FROM old)) AND s.status = $2
    RETURNING s.sandbox_id
),
purged_history AS (
    DELETE FROM history WHERE sandbox_id = ANY (ARRAY(SELECT sandbox_id FROM purged))
),
purged_logins AS (
    DELETE FROM accesses WHERE sandbox_id = ANY (ARRAY(SELECT sandbox_id FROM purged))
)
SELECT epoch, (SELECT count(*) FROM purged) AS count FROM guard
"""


async def delete_stale(session: WriteSession, *, stale_for: timedelta, limit: int) -> int:
    """Mark sandboxes as deleted after `stale_for` in status stale; return their number."""
    count: int = (await session.fetch_one(DELETE_STALE, stale_for, limit))["count"]
    return count


async def purge_records(session: WriteSession, *, status: str, for_at_least: timedelta, limit: int) -> int:
    """Remove sandboxes after `for_at_least` in `status`, with their history and logins; return their number."""
    count: int = (await session.fetch_one(PURGE_RECORDS, status, for_at_least, limit))["count"]
    return count
