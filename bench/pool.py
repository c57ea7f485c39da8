"""Fills a pool, and looks whether what came of it is right."""

import asyncio
import time
from dataclasses import dataclass

import asyncpg

from devstack.errors import CannotRun
from devstack.temporary import truncate

_SETTLE_SEC = 120.0
_BETWEEN_LOOKS_SEC = 0.05
_QUIET_LOOKS = 4

# In the order in which a pool grows: the longest available first, with the account ids of CSP at random. With
# prefixes the names begin with lab0-, lab1- and so on, in turn.
_FILL = """
INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since)
SELECT 1000000 + n, md5(n::text)::uuid, coalesce('lab' || n % nullif($2, 0) || '-', 'sandbox-') || n,
    'available', now() - ($1 - n) * interval '100 ms'
FROM generate_series(1, $1) n
"""

# The holders are called $1-1, $1-2 and so on.
_LEASE = """
WITH taken AS (
    UPDATE sandboxes SET status = 'allocated', status_since = now()
    WHERE sandbox_id IN (
        SELECT sandbox_id FROM sandboxes WHERE status = 'available' ORDER BY status_since, sandbox_id LIMIT $2
    )
    RETURNING sandbox_id
)
INSERT INTO leases (sandbox_id, holder, track_name, expires_at)
SELECT sandbox_id, $1 || '-' || row_number() OVER (), 'bench-track', now() + interval '4 hours' FROM taken
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

_AGAIN = "SELECT count(*) - count(DISTINCT sandbox_id) FROM leases"

_APART = """
SELECT count(*) FROM (SELECT sandbox_id FROM leases WHERE ended_at IS NULL) l
FULL JOIN (SELECT sandbox_id FROM sandboxes WHERE status = 'allocated') s USING (sandbox_id)
WHERE l.sandbox_id IS NULL OR s.sandbox_id IS NULL
"""

# What a student had is to be deleted, and nothing else is; nothing is stale where no listing lacks anything.
_ASTRAY = """
SELECT count(*) FROM sandboxes s LEFT JOIN leases l ON l.sandbox_id = s.sandbox_id AND l.ended_at IS NOT NULL
WHERE (s.status IN ('pending_deletion', 'deletion_failed', 'deleted')) <> (l.sandbox_id IS NOT NULL)
   OR s.status = 'stale'
"""

_ELSEWHERE = """
SELECT count(*) FROM leases l JOIN sandboxes s USING (sandbox_id) WHERE NOT starts_with(s.name, l.track_name)
"""


@dataclass(frozen=True, slots=True)
class Lag:
    """The events that were not yet published."""

    events: int = 0
    seconds: float = 0.0
    """The age of the oldest."""


async def fill(database: asyncpg.Connection, sandboxes: int, *, prefixes: int = 0) -> None:
    """Everything anew: so many sandboxes, all of them available."""
    tables = await empty(database)
    # Not in the middle of what is measured.
    await database.execute("CHECKPOINT")
    await database.execute(_FILL, sandboxes, prefixes)
    await database.execute(f"VACUUM ANALYZE {tables}")


async def empty(database: asyncpg.Connection) -> str:
    """Names the tables that are empty now."""
    has_events = await database.fetchval("SELECT to_regclass('outbox') IS NOT NULL")
    tables = "sandboxes, outbox, history, pool_changes, pool_counts" if has_events else "sandboxes"
    await truncate(database, f"TRUNCATE {tables}; TRUNCATE leases RESTART IDENTITY")
    return f"{tables}, leases"


async def lease(database: asyncpg.Connection, students: str, number: int) -> None:
    """So many students of that name have a sandbox each."""
    await database.execute(_LEASE, students, number)


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
        before, leases = leases, await allocations(database)
        left = (await lag(database)).events
        if left or leases != before:
            drained, quiet = time.monotonic(), 0
        else:
            quiet += 1
        if time.monotonic() - began > _SETTLE_SEC:
            raise CannotRun(f"{left} events are still not published after {_SETTLE_SEC:.0f} s", status=1)
        await asyncio.sleep(_BETWEEN_LOOKS_SEC)
    return drained - began


async def allocations(database: asyncpg.Connection) -> int:
    """Leases that there have been; asking for them costs nothing."""
    return int(await database.fetchval("SELECT last_value - 1 + is_called::int FROM leases_lease_id_seq"))


async def claimed(database: asyncpg.Connection) -> int:
    return int(await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'allocated'"))


async def ended(database: asyncpg.Connection, reason: str) -> int:
    return int(await database.fetchval("SELECT count(*) FROM leases WHERE end_reason = $1", reason))


async def elsewhere(database: asyncpg.Connection) -> int:
    """Leases whose sandbox's name does not begin with the name of the track."""
    return int(await database.fetchval(_ELSEWHERE))


async def problems(
    database: asyncpg.Connection, *, sandboxes: int, promised: int, cut_off: int = 0, purged: int = 0
) -> tuple[str, ...]:
    """What is wrong with a pool that so many sandboxes were put into, when so many new leases were promised to
    clients; as many as were cut off may have one that they were not told of, and the records of some sandboxes
    may have been purged."""
    leases = await database.fetchval("SELECT count(*) FROM leases")
    recorded = await database.fetchval("SELECT count(*) FROM sandboxes")
    found = {
        "leases of one sandbox or one student are more than one": await database.fetchval(_TWICE),
        "sandboxes were handed out again": await database.fetchval(_AGAIN),
        "sandboxes and leases disagree": await database.fetchval(_APART),
        "sandboxes are in a state that they should not be in": await database.fetchval(_ASTRAY),
        "promised leases are missing": max(0, promised - leases),
        "leases were promised to nobody": max(0, leases - promised - cut_off),
        "sandboxes are missing, or too many": abs(sandboxes - purged - recorded),
    }
    return tuple(f"{number} {what}" for what, number in found.items() if number)
