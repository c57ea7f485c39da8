"""Samples of the pool over time."""

import time

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import PoolHistory, PoolSample
from gateway.queries.sandboxes import read_connection

MAX_SAMPLES = 300
SAMPLE_SEC = 30
"""Time between two samples of the allocator."""

AGE_OF_FIRST = text("""
SELECT ceil(extract(epoch FROM now() - min(sampled_at)))::bigint FROM pool_samples
WHERE sampled_at > now() - make_interval(hours => :hours)
""")
# One key look-up for each step, because a week has 20,000 samples.
LATEST_OF_EACH_STEP = text("""
SELECT
    extract(epoch FROM latest.sampled_at)::bigint AS at,
    latest.available, latest.allocated, latest.pending_deletion, latest.deletion_failed, latest.stale,
    latest.waiting
FROM generate_series(CAST(:newest_step AS bigint) - :steps, CAST(:newest_step AS bigint)) step
CROSS JOIN LATERAL (
    SELECT * FROM pool_samples
    WHERE sampled_at >= to_timestamp(step * CAST(:step_sec AS bigint))
        AND sampled_at < to_timestamp((step + 1) * CAST(:step_sec AS bigint))
        AND sampled_at > now() - make_interval(hours => :hours)
    ORDER BY sampled_at DESC LIMIT 1
) latest
ORDER BY step
""")


async def pool_history(engine: AsyncEngine, hours: int) -> PoolHistory:
    """Return the samples of the last `hours`, the latest of each step. The steps divide the time since the first of
    these samples. Raises ApiError DATABASE_UNAVAILABLE."""
    async with read_connection(engine) as connection:
        age_sec = await connection.scalar(AGE_OF_FIRST, {"hours": hours}) or 0
        step_sec = max(SAMPLE_SEC, -(-age_sec // MAX_SAMPLES // SAMPLE_SEC) * SAMPLE_SEC)
        parameters = {
            "hours": hours,
            "step_sec": step_sec,
            "steps": age_sec // step_sec + 2,  # a step of tolerance for the clocks on both sides
            "newest_step": int(time.time()) // step_sec + 1,
        }
        rows = (await connection.execute(LATEST_OF_EACH_STEP, parameters)).mappings().all()
    return PoolHistory(samples=[PoolSample.model_validate(dict(row)) for row in rows], step_sec=step_sec)
