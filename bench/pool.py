"""Fills a pool, and looks whether what came of it is right."""

import asyncio
import time
from dataclasses import dataclass

import asyncpg

from devstack.errors import CannotRun

_SETTLE_SEC = 120.0
_BETWEEN_LOOKS_SEC = 0.05
_QUIET_LOOKS = 4

# In the order in which a pool grows: the longest available first, with the account ids of CSP at random.
_FILL = """
INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since)
SELECT 1000000 + n, md5(n::text)::uuid, 'sandbox-' || n, 'available', now() - ($1 - n) * interval '100 ms'
FROM generate_series(1, $1) n
"""

_LAG = """
SELECT count(*) AS events, coalesce(extract(epoch FROM now() - min(occurred_at)), 0)::float AS seconds FROM outbox
"""

_TWICE = """
SELECT count(*) FROM (
    SELECT sandbox_id FROM leases WHERE ended_at IS NULL GROUP BY sandbox_id HAVING count(*) > 1
    UNION ALL
    SELECT holder FROM leases WHERE ended_at IS NULL GROUP BY holder HAVING count(*) > 1
) twice
"""

_APART = """
SELECT count(*) FROM (SELECT sandbox_id FROM leases WHERE ended_at IS NULL) l
FULL JOIN (SELECT sandbox_id FROM sandboxes WHERE status = 'allocated') s USING (sandbox_id)
WHERE l.sandbox_id IS NULL OR s.sandbox_id IS NULL
"""


@dataclass(frozen=True, slots=True)
class Lag:
    """The events that were not yet published."""

    events: int = 0
    seconds: float = 0.0
    """The age of the oldest."""


async def fill(database: asyncpg.Connection, sandboxes: int) -> None:
    """Everything anew: so many sandboxes, all of them available."""
    tables = "sandboxes, leases"
    if await database.fetchval("SELECT to_regclass('outbox') IS NOT NULL"):
        tables += ", outbox"
    await database.execute(f"TRUNCATE {tables} CASCADE")
    # Not in the middle of what is measured.
    await database.execute("CHECKPOINT")
    await database.execute(_FILL, sandboxes)
    await database.execute(f"VACUUM ANALYZE {tables}")


async def lag(database: asyncpg.Connection) -> Lag:
    row = await database.fetchrow(_LAG)
    assert row is not None
    return Lag(row["events"], row["seconds"])


async def settle(database: asyncpg.Connection) -> float:
    """Waits until every request that was cut off has come to its end and every event is published: the seconds
    that the events took. Raises CannotRun when they take too long."""
    began = time.monotonic()
    drained, quiet, leases = began, 0, -1
    while quiet < _QUIET_LOOKS:
        before, leases = leases, await database.fetchval("SELECT count(*) FROM leases")
        left = (await lag(database)).events
        if left or leases != before:
            drained, quiet = time.monotonic(), 0
        else:
            quiet += 1
        if time.monotonic() - began > _SETTLE_SEC:
            raise CannotRun(f"{left} events are still not published after {_SETTLE_SEC:.0f} s", status=1)
        await asyncio.sleep(_BETWEEN_LOOKS_SEC)
    return drained - began


async def claimed(database: asyncpg.Connection) -> int:
    return int(await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'allocated'"))


async def problems(
    database: asyncpg.Connection, *, sandboxes: int, promised: int, cut_off: int = 0
) -> tuple[str, ...]:
    """What is wrong with a pool that was filled with so many sandboxes, when so many new leases were promised to
    clients; as many as were cut off may have one that they were not told of."""
    leases = await database.fetchval("SELECT count(*) FROM leases")
    in_pool = await database.fetchval("SELECT count(*) FROM sandboxes WHERE status IN ('available', 'allocated')")
    found = {
        "leases of one sandbox or one student are more than one": await database.fetchval(_TWICE),
        "sandboxes and leases disagree": await database.fetchval(_APART),
        "promised leases are missing": max(0, promised - leases),
        "leases were promised to nobody": max(0, leases - promised - cut_off),
        "sandboxes are missing, or too many": abs(sandboxes - in_pool),
    }
    return tuple(f"{number} {what}" for what, number in found.items() if number)
