"""Pool history: two samples of the pool a minute, kept for a week.

Every allocator takes the samples. The primary key of `pool_samples` admits one sample for each half minute.
"""

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from sandbox_broker.database import connections
from sandbox_broker.runtime import service

PERIOD_SEC = 10
"""Shorter than the half minute of a sample, so that a late run loses none."""

RECORD_SAMPLE = """
INSERT INTO pool_samples
    (sampled_at, available, allocated, pending_deletion, deletion_failed, stale, waiting)
SELECT date_bin('30 seconds', now(), 'epoch'),
    coalesce(sum(number) FILTER (WHERE status = 'available'), 0),
    coalesce(sum(number) FILTER (WHERE status = 'allocated'), 0),
    coalesce(sum(number) FILTER (WHERE status = 'pending_deletion'), 0),
    coalesce(sum(number) FILTER (WHERE status = 'deletion_failed'), 0),
    coalesce(sum(number) FILTER (WHERE status = 'stale'), 0),
    (SELECT count(*) FROM waiting)
FROM pool_totals
ON CONFLICT (sampled_at) DO NOTHING
"""
REMOVE_OLD_SAMPLES = "DELETE FROM pool_samples WHERE sampled_at < now() - interval '7 days'"

log = structlog.get_logger()


class PoolHistory:
    """Periodic writer of the samples."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def run(self) -> None:
        await service.run_periodically(PERIOD_SEC, self._record)

    async def _record(self) -> None:
        try:
            async with self._engine.begin() as connection:
                await connection.execute(text(RECORD_SAMPLE))
                await connection.execute(text(REMOVE_OLD_SAMPLES))
        except connections.CONNECTION_ERRORS as error:
            log.warning("pool.not_sampled", error=connections.describe_error(error))
