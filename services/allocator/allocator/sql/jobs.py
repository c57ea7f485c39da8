"""Jobs started by an administrator, and their progress."""

import uuid

from allocator.write_session import GUARD, WriteSession

# The state of a finished job is final: late reports have no effect.
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


async def record_job(
    session: WriteSession, *, job_id: uuid.UUID, kind: str, state: str, progress: str, result: str | None
) -> bool:
    """Insert or update a running job; return whether it changed. `progress` and `result` are JSON."""
    changed: bool = (await session.fetch_one(RECORD_JOB, job_id, kind, state, progress, result))["changed"]
    return changed
