"""Samples of the pool over time."""

from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import PoolHistory, PoolSample
from gateway.queries.sandboxes import read_connection, unix_seconds
from sandbox_broker.database.schema import pool_samples

MAX_SAMPLES = 300
SAMPLE_SEC = 30
"""Time between two samples of the allocator."""


async def pool_history(engine: AsyncEngine, hours: int) -> PoolHistory:
    """Return the samples of the last `hours`, the latest of each step. Raises ApiError DATABASE_UNAVAILABLE."""
    step_sec = max(SAMPLE_SEC, -(-hours * 3600 // MAX_SAMPLES // SAMPLE_SEC) * SAMPLE_SEC)
    at = unix_seconds(pool_samples.c.sampled_at)
    step = func.floor(at / step_sec)
    query = (
        select(at.label("at"), *(column for column in pool_samples.c if column.name != "sampled_at"))
        .where(pool_samples.c.sampled_at > func.now() - timedelta(hours=hours))
        .distinct(step)
        .order_by(step, pool_samples.c.sampled_at.desc())
    )
    async with read_connection(engine) as connection:
        rows = (await connection.execute(query)).mappings().all()
    return PoolHistory(samples=[PoolSample.model_validate(dict(row)) for row in rows], step_sec=step_sec)
