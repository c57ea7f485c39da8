"""The SQL of what an administrator has started, and how it goes. It keeps the rules of store.py."""

from allocator.store import GUARD

# A job that has ended stays as it ended, whatever comes late.
RECORD_JOB = f"""
WITH {GUARD}, recorded AS (
    INSERT INTO jobs (job_id, kind, state, progress, result)
    SELECT $2, $3, $4, $5::text::jsonb, $6::text::jsonb FROM guard
    ON CONFLICT (job_id) DO UPDATE SET
        state = excluded.state, progress = excluded.progress, result = excluded.result, updated_at = now()
    WHERE jobs.state = 'running'
    RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM recorded) AS changed FROM guard
"""
