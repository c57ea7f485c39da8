-- Import the leases that started or ended after the backup into a restored database. Run it before an allocator starts:
--
--   psql "$DATABASE_URL" -v granted=granted.csv -v released=released.csv -v lab_hours=4 -f deploy/postgres/after_restore.sql
--
-- docs/runbook.md describes how to create the two files. The script may be repeated. Without it, the allocator would
-- lease sandboxes that are in use to a second student.
\set ON_ERROR_STOP on
BEGIN;
CREATE TEMPORARY TABLE granted (sandbox_id text, holder text, track_name text, allocated_at timestamptz) ON COMMIT DROP;
CREATE TEMPORARY TABLE released (sandbox_id text, released_at timestamptz) ON COMMIT DROP;
\set copy_granted '\\copy granted FROM ' :'granted' ' CSV'
\set copy_released '\\copy released FROM ' :'released' ' CSV'
:copy_granted
:copy_released

UPDATE leases l SET ended_at = r.released_at, end_reason = 'admin', end_note = 'restored'
FROM (SELECT sandbox_id, min(released_at) AS released_at FROM released GROUP BY sandbox_id) r
WHERE l.sandbox_id = r.sandbox_id AND l.ended_at IS NULL;

-- A sandbox that is missing in the backup cannot become allocated. An ended lease keeps it out of the pool for ever.
INSERT INTO leases (sandbox_id, holder, track_name, allocated_at, expires_at, ended_at, end_reason, end_note)
SELECT g.sandbox_id, g.holder, g.track_name, g.allocated_at, g.allocated_at + :lab_hours * interval '1 hour',
    ended.at, CASE WHEN ended.at IS NOT NULL THEN 'admin' END, 'restored'
FROM granted g
LEFT JOIN sandboxes s ON s.sandbox_id = g.sandbox_id
CROSS JOIN LATERAL (
    SELECT coalesce(
        (SELECT min(released_at) FROM released r WHERE r.sandbox_id = g.sandbox_id),
        CASE WHEN s.sandbox_id IS NULL THEN now() END
    ) AS at
) ended
ON CONFLICT (sandbox_id) DO NOTHING;

UPDATE sandboxes s SET status = 'allocated', status_since = l.allocated_at, track_name = l.track_name
FROM leases l
WHERE l.sandbox_id = s.sandbox_id AND l.ended_at IS NULL AND s.status = 'available';

UPDATE sandboxes s
SET status = 'pending_deletion', status_since = now(), track_name = l.track_name,
    deletion_requested_at = l.ended_at, deletion_reason = 'admin', deletion_due_at = now()
FROM leases l
WHERE l.sandbox_id = s.sandbox_id AND l.ended_at IS NOT NULL AND s.status IN ('available', 'allocated');
COMMIT;
