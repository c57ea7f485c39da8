"""Samples of the pool over time."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import PoolHistory, PoolSample
from gateway.queries.sandboxes import read_connection

MAX_SAMPLES = 300
SAMPLE_SEC = 30
"""Time between two samples of the allocator."""

LATEST_OF_EACH_STEP = text("""
SELECT DISTINCT ON (step) at, available, allocated, pending_deletion, deletion_failed, stale, waiting
FROM (
    SELECT *, at / :step_sec AS step
    FROM pool_samples CROSS JOIN LATERAL (SELECT extract(epoch FROM sampled_at)::bigint AS at) times
    WHERE sampled_at > now() - make_interval(hours => :hours)
) samples
ORDER BY step, at DESC
""")


async def pool_history(engine: AsyncEngine, hours: int) -> PoolHistory:
    """Return the samples of the last `hours`, the latest of each step. Raises ApiError DATABASE_UNAVAILABLE."""
    step_sec = max(SAMPLE_SEC, -(-hours * 3600 // MAX_SAMPLES // SAMPLE_SEC) * SAMPLE_SEC)
    async with read_connection(engine) as connection:
        parameters = {"hours": hours, "step_sec": step_sec}
        rows = (await connection.execute(LATEST_OF_EACH_STEP, parameters)).mappings().all()
    return PoolHistory(samples=[PoolSample.model_validate(dict(row)) for row in rows], step_sec=step_sec)
