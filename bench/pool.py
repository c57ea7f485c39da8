"""Fill a pool, wait until the broker is idle, and verify the database after a run."""

import asyncio
import time
from dataclasses import dataclass

import asyncpg

from devstack import temporary
from devstack.errors import CannotRun

_IDLE_TIMEOUT_SEC = 120.0
_POLL_INTERVAL_SEC = 0.05
_IDLE_POLLS = 4
"""Consecutive polls without a change after which the broker counts as idle."""

# Rows are in the order of a pool that grew over time: the first row has been available longest, and CSP's account
# ids are random. With prefixes, the names cycle through lab0-, lab1-, ….
_INSERT_SANDBOXES = """
INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since)
SELECT 1000000 + n, md5(n::text)::uuid, coalesce('lab' || n % nullif($2, 0) || '-', 'sandbox-') || n,
    'available', now() - ($1 - n) * interval '100 ms'
FROM generate_series(1, $1) n
"""

# The holders are $1-1, $1-2, ….
_INSERT_LEASES = """
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

# The sandboxes that the next students get come first.
_INSERT_EVENTS = """
INSERT INTO outbox (type, subject, data)
SELECT 'sandbox.discovered', sandbox_id,
    jsonb_build_object('sandbox_id', sandbox_id, 'external_id', external_id, 'name', name)
FROM sandboxes WHERE status = 'available' ORDER BY status_since, sandbox_id LIMIT $1
"""

_OUTBOX_LAG = """
SELECT count(*) AS events, coalesce(extract(epoch FROM now() - min(occurred_at)), 0)::float AS seconds FROM outbox
"""

# Cheap enough to poll, however many events there are.
_HAS_EVENTS = "SELECT EXISTS (SELECT FROM outbox)"

# The sequence gives the count without a scan of `leases`.
_ALLOCATIONS = "SELECT last_value - 1 + is_called::int FROM leases_lease_id_seq"

_DOUBLE_LEASES = """
SELECT count(*) FROM (
    SELECT sandbox_id FROM leases WHERE ended_at IS NULL GROUP BY sandbox_id HAVING count(*) > 1
    UNION ALL
    SELECT holder FROM leases WHERE ended_at IS NULL GROUP BY holder HAVING count(*) > 1
) doubles
"""

_REUSED_SANDBOXES = "SELECT count(*) - count(DISTINCT sandbox_id) FROM leases"

_LEASE_MISMATCHES = """
SELECT count(*) FROM (SELECT sandbox_id FROM leases WHERE ended_at IS NULL) l
FULL JOIN (SELECT sandbox_id FROM sandboxes WHERE status = 'allocated') s USING (sandbox_id)
WHERE l.sandbox_id IS NULL OR s.sandbox_id IS NULL
"""

# A sandbox must be on its way to deletion if, and only if, its lease has ended. No sandbox may be stale, because
# the benchmark's listings contain every sandbox.
_WRONG_STATUSES = """
SELECT count(*) FROM sandboxes s LEFT JOIN leases l ON l.sandbox_id = s.sandbox_id AND l.ended_at IS NOT NULL
WHERE (s.status IN ('pending_deletion', 'deletion_failed', 'deleted')) <> (l.sandbox_id IS NOT NULL)
   OR s.status = 'stale'
"""

# With prefixes, students.lua sends the prefix as the track id too.
_WRONG_PREFIXES = """
SELECT count(*) FROM leases l JOIN sandboxes s USING (sandbox_id) WHERE NOT starts_with(s.name, l.track_name)
"""


@dataclass(frozen=True, slots=True)
class OutboxLag:
    """Events in the outbox, all of them unpublished."""

    events: int = 0
    seconds: float = 0.0
    """Age of the oldest event."""


async def fill(database: asyncpg.Connection, sandboxes: int, *, prefixes: int = 0) -> None:
    """Replace the content of the database by `sandboxes` available sandboxes."""
    tables = await truncate_tables(database)
    # A checkpoint during the measurement would distort it.
    await database.execute("CHECKPOINT")
    await database.execute(_INSERT_SANDBOXES, sandboxes, prefixes)
    await database.execute(f"VACUUM ANALYZE {tables}")


async def truncate_tables(database: asyncpg.Connection) -> str:
    """Truncate the pool's tables. Returns their names, separated by commas."""
    has_events = await database.fetchval("SELECT to_regclass('outbox') IS NOT NULL")
    tables = "sandboxes, outbox, history, pool_changes, pool_counts" if has_events else "sandboxes"
    await temporary.truncate_tables(database, f"TRUNCATE {tables}; TRUNCATE leases RESTART IDENTITY")
    return f"{tables}, leases"


async def insert_leases(database: asyncpg.Connection, student_prefix: str, count: int) -> None:
    """Lease `count` available sandboxes to the students `<student_prefix>-1`, `<student_prefix>-2`, …."""
    await database.execute(_INSERT_LEASES, student_prefix, count)


async def announce_sandboxes(database: asyncpg.Connection, count: int) -> None:
    """Write a `sandbox.discovered` for `count` available sandboxes, and wait until the relay publishes them."""
    await database.execute(_INSERT_EVENTS, count)
    while (await read_outbox_lag(database)).events >= count:  # noqa: ASYNC110 (no event to wait for)
        await asyncio.sleep(_POLL_INTERVAL_SEC)


async def read_outbox_lag(database: asyncpg.Connection) -> OutboxLag:
    row = await database.fetchrow(_OUTBOX_LAG)
    assert row is not None
    return OutboxLag(row["events"], row["seconds"])


async def wait_until_idle(database: asyncpg.Connection) -> float:
    """Wait until all events are published and requests that lost their client have finished.

    Returns the seconds until the last change. Raises CannotRun after 120 s.
    """
    began = time.monotonic()
    drained, idle_polls, leases = began, 0, -1
    while idle_polls < _IDLE_POLLS:
        before, leases = leases, await count_allocations(database)
        unpublished = await database.fetchval(_HAS_EVENTS)
        if unpublished or leases != before:
            drained, idle_polls = time.monotonic(), 0
        else:
            idle_polls += 1
        if time.monotonic() - began > _IDLE_TIMEOUT_SEC:
            events = (await read_outbox_lag(database)).events
            raise CannotRun(f"{events} events are unpublished after {_IDLE_TIMEOUT_SEC:.0f} s", status=1)
        await asyncio.sleep(_POLL_INTERVAL_SEC)
    return drained - began


async def count_allocations(database: asyncpg.Connection) -> int:
    """Count all leases since the pool was filled, active and ended. Cheap enough to poll."""
    return int(await database.fetchval(_ALLOCATIONS))


async def count_allocated(database: asyncpg.Connection) -> int:
    return int(await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'allocated'"))


async def count_ended_leases(database: asyncpg.Connection, reason: str) -> int:
    return int(await database.fetchval("SELECT count(*) FROM leases WHERE end_reason = $1", reason))


async def count_wrong_prefixes(database: asyncpg.Connection) -> int:
    """Count leases of sandboxes without the requested name prefix."""
    return int(await database.fetchval(_WRONG_PREFIXES))


async def find_problems(
    database: asyncpg.Connection, *, sandboxes: int, confirmed: int, cut_off: int = 0, purged: int = 0
) -> tuple[str, ...]:
    """Verify the database after a run. Returns one text for each violated invariant.

    `sandboxes` is the number of sandboxes ever added, `confirmed` the number of new leases confirmed to clients.
    Up to `cut_off` requests lost their client before the response, so their leases may exist too. `purged` is the
    number of purged records.
    """
    leases = await database.fetchval("SELECT count(*) FROM leases")
    recorded = await database.fetchval("SELECT count(*) FROM sandboxes")
    counts = {
        "sandboxes or students have more than one lease": await database.fetchval(_DOUBLE_LEASES),
        "sandboxes were allocated again after use": await database.fetchval(_REUSED_SANDBOXES),
        "sandboxes are allocated without a lease, or leased but not allocated": await database.fetchval(
            _LEASE_MISMATCHES
        ),
        "sandboxes have a status that does not match their use": await database.fetchval(_WRONG_STATUSES),
        "confirmed leases are missing": max(0, confirmed - leases),
        "leases were not confirmed to a client": max(0, leases - confirmed - cut_off),
        "sandbox records are missing or unexpected": abs(sandboxes - purged - recorded),
    }
    return tuple(f"{count} {problem}" for problem, count in counts.items() if count)
