"""Pool history: one sample for each half minute, whatever the number of allocators, and an end after a week."""

import asyncio

from allocator.background.pool_history import PoolHistory
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary

from .allocator_harness import Pool


async def test_a_half_minute_has_one_sample_with_all_counts(pool: Pool) -> None:
    await pool.fill(3)
    await pool.lease("ann")
    await pool.execute(
        "INSERT INTO pool_samples SELECT now() - interval '8 days', 0, 0, 0, 0, 0, 0 "
        "UNION ALL SELECT date_bin('30 seconds', now() - interval '1 minute', 'epoch'), 0, 0, 0, 0, 0, 0"
    )
    engine = connections.create_engine(Primary(pool.url), pool_size=2, max_overflow=0, pool_timeout=5)
    try:
        await asyncio.gather(*(PoolHistory(engine)._record() for _ in range(4)))
    finally:
        await engine.dispose()
    rows = await pool.rows("SELECT * FROM pool_samples ORDER BY sampled_at")
    assert 2 <= len(rows) <= 3  # four runs may fall into two half minutes
    assert dict(rows[-1]) | {"sampled_at": None} == {
        "sampled_at": None,
        "available": 3,
        "allocated": 1,
        "pending_deletion": 0,
        "deletion_failed": 0,
        "stale": 0,
        "waiting": 0,
    }
