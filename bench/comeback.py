"""Sandboxes that come into the pool while students take from it, as CSP and the csp-syncer would bring them: with
new ids and names, and with their events. They come by SQL, since accounts of CSP take minutes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from bench import pool
from bench.servers import Target

_STEP_SEC = 0.02

_DISCOVER = """
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
class Pool:
    """One that `pool.fill` has filled."""

    connection: asyncpg.Connection
    filled: int
    """Sandboxes in it at first."""
    added: int = 0

    @property
    def sandboxes(self) -> int:
        """All that there ever were."""
        return self.filled + self.added

    async def add(self, number: int) -> None:
        await self.connection.execute(_DISCOVER, self.sandboxes + 1, self.sandboxes + number)
        self.added += number


@dataclass(slots=True)
class Restocked(Pool):
    """Keeps as many available as there were at first."""

    least: int = 0
    """That were available at a time: what was taken comes back a moment later."""
    before: int = 0

    async def step(self) -> None:
        taken = await pool.count_allocations(self.connection)
        self.least = min(self.least, self.sandboxes - taken)
        # As many are taken until the next look as since the last one.
        missing = taken + (taken - self.before) - self.added
        if missing > 0:
            await self.add(missing)
        self.before = taken


@asynccontextmanager
async def restocked(target: Target, sandboxes: int) -> AsyncIterator[Restocked]:
    """Of a pool that was filled with so many, in the block."""
    async with target.connected() as connection:
        stock = Restocked(connection, sandboxes, least=sandboxes)
        async with repeated(_STEP_SEC, stock.step):
            yield stock


@asynccontextmanager
async def repeated(pause_sec: float, step: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Again and again in the block, the last time whole. A step that raises ends the block, and is raised."""
    over = asyncio.Event()

    async def repeat() -> None:
        while not over.is_set():
            await step()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_sec):
                    await over.wait()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(repeat())
            try:
                yield
            finally:
                over.set()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
