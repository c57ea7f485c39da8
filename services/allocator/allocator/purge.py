"""The SQL that ends what is over: stale sandboxes, and records that nobody needs any more. It keeps the rules of
store.py, and takes a few hundred rows at a time, by their keys: joined to what is old, the planner might compare
each with each."""

from allocator.store import GUARD

# From stale to deleted without CSP: it is not there, and nobody ever had it.
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

# Leases stay: who had what is kept, and what was leased once is never inserted again.
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
forgotten AS (
    DELETE FROM history WHERE sandbox_id = ANY (ARRAY(SELECT sandbox_id FROM purged))
)
SELECT epoch, (SELECT count(*) FROM purged) AS count FROM guard
"""
