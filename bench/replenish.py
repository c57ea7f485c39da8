"""Add new sandboxes to the pool while students take from it.

SQL inserts them with new ids, new names and their events, as a sync would. A sync itself could not keep up, because
CSP takes minutes to create an account.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from bench import pool
from bench.servers import Target

_INTERVAL_SEC = 0.02

_INSERT_DISCOVERED = """
WITH discovered AS (
    INSERT INTO sandboxes (sandbox_id, external_id, name, status)
    SELECT 1000000 + n, md5(n::text)::uuid, 'sandbox-' || n, 'available' FROM generate_series($1::int, $2::int) n
    RETURNING sandbox_id, external_id, name
)
INSERT INTO outbox (type, subject, data)
SELECT 'sandbox.discovered', sandbox_id,
    jsonb_build_object('sandbox_id', sandbox_id, 'external_id', external_id, 'name', name)
FROM discovered
"""


@dataclass(slots=True)
class GrowingPool:
    """Pool filled by `pool.fill`, to which new sandboxes are added."""

    connection: asyncpg.Connection
    filled: int
    """Sandboxes inserted by `pool.fill`."""
    added: int = 0

    @property
    def sandboxes(self) -> int:
        """Number of sandboxes ever inserted."""
        return self.filled + self.added

    async def add_sandboxes(self, count: int) -> None:
        await self.connection.execute(_INSERT_DISCOVERED, self.sandboxes + 1, self.sandboxes + count)
        self.added += count


@dataclass(slots=True)
class ReplenishedPool(GrowingPool):
    """Pool in which the number of available sandboxes stays at its initial value."""

    min_available: int = 0
    """Fewest available sandboxes seen so far. Replenishing lags behind allocation by one interval."""
    previous_allocations: int = 0

    async def replenish(self) -> None:
        """Add sandboxes for those allocated so far and for those of the next interval.

        The estimate for the next interval is the number of allocations in the last one.
        """
        allocations = await pool.count_allocations(self.connection)
        self.min_available = min(self.min_available, self.sandboxes - allocations)
        missing = allocations + (allocations - self.previous_allocations) - self.added
        if missing > 0:
            await self.add_sandboxes(missing)
        self.previous_allocations = allocations


@asynccontextmanager
async def keep_replenished(target: Target, sandboxes: int) -> AsyncIterator[ReplenishedPool]:
    """Replenish the pool, which was filled with `sandboxes`, during the block."""
    async with target.connect() as connection:
        replenished = ReplenishedPool(connection, sandboxes, min_available=sandboxes)
        async with run_periodically(_INTERVAL_SEC, replenished.replenish):
            yield replenished


@asynccontextmanager
async def run_periodically(pause_sec: float, step: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Repeat `step` during the block. A step that has begun is completed.

    A step that raises cancels the block, and its exception propagates.
    """
    block_ended = asyncio.Event()

    async def repeat() -> None:
        while not block_ended.is_set():
            await step()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_sec):
                    await block_ended.wait()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat())
            try:
                yield
            finally:
                block_ended.set()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
