"""Pool metrics: counts the pool and sets its gauges."""

import time

import asyncpg
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from allocator import metrics
from allocator.background.depletion_forecast import DepletionForecast
from sandbox_broker.database import connections
from sandbox_broker.runtime import service

PERIOD_SEC = 5

COUNT_BY_STATUS = "SELECT status, number FROM pool_totals"
# The 1,000 longest pending sandboxes contain the oldest request: a retried or reopened deletion was
# requested before it became pending again. The deletion of a broken sandbox counts from the end of its hold.
OLDEST_DELETION = """
SELECT coalesce(extract(epoch FROM now() - min(coalesce(deletion_hold_until, deletion_requested_at))), 0)::float
FROM (
    SELECT deletion_requested_at, deletion_hold_until FROM sandboxes
    WHERE status = 'pending_deletion' ORDER BY status_since LIMIT 1000
) longest
WHERE coalesce(deletion_hold_until <= now(), true)
"""
COUNT_STANDBY = "SELECT count(*) FROM leases WHERE mode = 'standby' AND end_reason IS NULL"
COUNT_ON_HOLD = """
SELECT count(*) FROM sandboxes
WHERE deletion_hold_until IS NOT NULL AND deletion_hold_until > now() AND status = 'pending_deletion'
"""
COUNT_LOGINS = """
SELECT state, count(*) FROM accesses
WHERE state IN ('failed', 'removing', 'remains') AND (state <> 'remains' OR ended_at > now() - interval '1 day')
GROUP BY state
UNION ALL
SELECT 'pending', count(*) FROM accesses WHERE due_at IS NOT NULL AND state = 'pending'
"""
COUNT_DEAD_LETTERS = "SELECT count(*) FROM dead_letters"
# held: the newest applied or held listing is held. leaked: accounts of the last applied listing without a sandbox
# in the pool. missing: leased sandboxes without an account in CSP.
SYNC_STATE = """
SELECT
    coalesce((SELECT held_at IS NOT NULL FROM decided_listing), false) AS held,
    coalesce((SELECT (outcome->>'leaked')::bigint FROM applied_listing), 0) AS leaked,
    (SELECT count(*) FROM sandboxes WHERE status = 'allocated' AND missing_since IS NOT NULL) AS missing
"""
OUTBOX_LAG = """
SELECT coalesce(extract(epoch FROM now() - (SELECT occurred_at FROM outbox ORDER BY outbox_id LIMIT 1)), 0)::float
"""
COUNT_LEASES_EVER = "SELECT coalesce(max(lease_id), 0) FROM leases"

log = structlog.get_logger()


class PoolMetrics:
    """Periodic update of the pool gauges. Every allocator sets them, on standby too."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._forecast = DepletionForecast()

    async def run(self) -> None:
        await service.run_periodically(PERIOD_SEC, self._update)

    async def _update(self) -> None:
        try:
            async with self._engine.connect() as connection:
                totals = await connection.execute(text(COUNT_BY_STATUS))
                counts: dict[str, int] = dict(totals.all())
                oldest_deletion_sec = await connection.scalar(text(OLDEST_DELETION))
                standby = await connection.scalar(text(COUNT_STANDBY))
                on_hold = await connection.scalar(text(COUNT_ON_HOLD))
                logins: dict[str, int] = dict((await connection.execute(text(COUNT_LOGINS))).all())
                dead_letters = await connection.scalar(text(COUNT_DEAD_LETTERS))
                sync = (await connection.execute(text(SYNC_STATE))).one()
                outbox_lag_sec = await connection.scalar(text(OUTBOX_LAG))
                leases = await connection.scalar(text(COUNT_LEASES_EVER))
        except (*connections.CONNECTION_ERRORS, asyncpg.PostgresError) as error:
            # A query that PostgreSQL refuses must not end the allocator, because students need no gauges.
            log.warning("pool.not_counted", error=connections.describe_error(error))
            return
        metrics.SYNC_HELD.set(sync.held)
        metrics.LEAKS.labels("in_csp").set(sync.leaked)
        metrics.LEAKS.labels("missing").set(sync.missing)
        metrics.OLDEST_DELETION.set(oldest_deletion_sec)
        metrics.STANDBY.set(standby or 0)
        metrics.ON_HOLD.set(on_hold or 0)
        for state, gauge in metrics.ACCESS_LOGINS.items():
            gauge.set(logins.get(state, 0))
        metrics.DEAD_LETTERS.set(dead_letters or 0)
        metrics.OUTBOX_LAG.set(outbox_lag_sec)
        metrics.EXHAUSTION.total = self._forecast.exhaustion_sec(
            time.monotonic(), counts.get("available", 0), leases
        )
        metrics.POOL_COUNTED.set_to_current_time()
        for status, gauge in metrics.POOL.items():
            gauge.set(counts.get(status, 0))
        metrics.POOL_TOTAL.set(sum(counts.get(status, 0) for status in metrics.STATUSES))
