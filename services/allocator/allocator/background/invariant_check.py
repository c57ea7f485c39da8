"""Invariant check: compares the pool with its rules and reports every violation.

The database enforces most rules. The check verifies them all the same, along other indexes than the enforcing
ones, because a repair can lose an index, a disk can damage one, and a person can write anything. The check only
reads, and no command waits for it. Its cost grows with the number of active leases. The number of sandboxes matters
only for counting index entries.
"""

from datetime import timedelta

import asyncpg
import structlog

from allocator import metrics
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.database.schema import metadata

STATEMENT_TIMEOUT_SEC = 10
MAX_EVENT_AGE = timedelta(minutes=5)
MAX_LEASE_OVERDUE = timedelta(days=1)
"""Time after the end of the lease; much longer than any grace period."""
CHECKED_AVAILABLE = 1000
"""Number of available sandboxes to check, beginning with the next to be allocated."""
MAX_IDS = 10

RULES = (
    "one_lease_per_sandbox",
    "one_lease_per_holder",
    "one_lease_per_account",
    "leased_is_allocated",
    "allocated_is_leased",
    "available_was_never_leased",
    "leases_end",
    "deletions_are_due",
    "events_are_published",
    "counters_are_exact",
    "unique_indexes_are_there",
)
UNIQUE_INDEXES = sorted(
    str(index.name) for table in metadata.tables.values() for index in table.indexes if index.unique
)

PARAMETERS = (MAX_EVENT_AGE, MAX_LEASE_OVERDUE, CHECKED_AVAILABLE, UNIQUE_INDEXES, MAX_IDS)
# active: active leases with their sandboxes. Look-ups by key replace a join, which would read all sandboxes.
# actual: number of sandboxes per status, counted by index. No index covers allocated sandboxes, so their number is
# taken from the leases. Only if the counters disagree, unleased scans all sandboxes for those without a lease.
VIOLATIONS = """
WITH active AS MATERIALIZED (
    SELECT l.sandbox_id, l.holder, l.expires_at, s.external_id, s.status
    FROM leases l LEFT JOIN LATERAL (
        SELECT external_id, status FROM sandboxes WHERE sandbox_id = l.sandbox_id LIMIT 1
    ) s ON true
    WHERE l.end_reason IS NULL
),
actual AS (
    SELECT 'available' AS status, count(*) AS number FROM sandboxes WHERE available_since IS NOT NULL
    UNION ALL
    SELECT 'allocated', count(DISTINCT sandbox_id) FROM active WHERE status = 'allocated'
    UNION ALL
    SELECT status, count(*) FROM sandboxes
    WHERE status IN ('pending_deletion', 'deletion_failed', 'stale', 'deleted') GROUP BY status
),
compared AS MATERIALIZED (
    SELECT status, coalesce(actual.number, 0) AS actual, coalesce(counted.number, 0) AS counted
    FROM actual FULL JOIN pool_totals counted USING (status)
),
unleased AS MATERIALIZED (
    SELECT s.sandbox_id FROM sandboxes s
    WHERE s.status = 'allocated' AND NOT EXISTS (SELECT FROM active a WHERE a.sandbox_id = s.sandbox_id)
      AND (SELECT actual <> counted FROM compared WHERE status = 'allocated')
),
violations AS (
    SELECT 'one_lease_per_sandbox' AS rule, sandbox_id AS id FROM active GROUP BY sandbox_id HAVING count(*) > 1
    UNION ALL
    SELECT 'one_lease_per_holder', holder FROM active GROUP BY holder HAVING count(*) > 1
    UNION ALL
    SELECT 'one_lease_per_account', external_id FROM active
    WHERE external_id IS NOT NULL GROUP BY external_id HAVING count(DISTINCT sandbox_id) > 1
    UNION ALL
    SELECT 'leased_is_allocated', sandbox_id FROM active WHERE status IS DISTINCT FROM 'allocated'
    UNION ALL
    SELECT 'allocated_is_leased', sandbox_id FROM unleased
    UNION ALL
    SELECT 'available_was_never_leased', n.sandbox_id
    FROM (
        SELECT sandbox_id FROM sandboxes WHERE available_since IS NOT NULL
        ORDER BY available_since, sandbox_id LIMIT $3
    ) n
    WHERE EXISTS (SELECT FROM leases l WHERE l.sandbox_id = n.sandbox_id)
    UNION ALL
    SELECT 'leases_end', sandbox_id FROM active WHERE expires_at < now() - $2::interval
    UNION ALL
    SELECT 'deletions_are_due', sandbox_id FROM sandboxes
    WHERE status = 'pending_deletion' AND deletion_due_at IS NULL
    UNION ALL
    SELECT 'events_are_published', event_id::text
    FROM (SELECT event_id, occurred_at FROM outbox ORDER BY outbox_id LIMIT 1000) first
    WHERE occurred_at < now() - $1::interval
    UNION ALL
    SELECT 'counters_are_exact', format('%s: %s counted, %s there', status, counted, actual + unleased.number)
    FROM compared CROSS JOIN LATERAL (SELECT count(*) AS number FROM unleased WHERE status = 'allocated') unleased
    WHERE counted <> actual + unleased.number
    UNION ALL
    SELECT 'unique_indexes_are_there', name FROM unnest($4::text[]) AS name
    WHERE NOT EXISTS (
        SELECT FROM pg_index WHERE indexrelid = to_regclass(name) AND indisunique AND indisvalid AND indisready
    )
)
SELECT rule, count(*) AS number, (array_agg(id ORDER BY id))[:$5] AS ids FROM violations GROUP BY rule ORDER BY rule
"""
IS_CURRENT_EPOCH = "SELECT EXISTS (SELECT FROM allocator_epoch WHERE epoch = $1)"
SESSION_SETTINGS = "SET default_transaction_read_only = on; SET max_parallel_workers_per_gather = 0"

log = structlog.get_logger()


async def check_invariants(primary: Primary, epoch: int) -> None:
    """Set the metric of every rule and log each violation.

    `epoch` is the maintenance epoch of this allocator, 0 on standby. Without a current epoch, or if the database
    does not answer, clear the metric.
    """
    try:
        violations = await _fetch_violations_under(primary, epoch)
    except (*connections.CONNECTION_ERRORS, asyncpg.PostgresError) as error:  # a damaged index raises the latter
        log.warning("invariants.not_checked", error=connections.describe_error(error))
        violations = None
    if violations is None:
        metrics.INVARIANT_VIOLATIONS.clear()
        return
    counts = {row["rule"]: row["number"] for row in violations}
    for rule in RULES:
        metrics.INVARIANT_VIOLATIONS.labels(rule=rule).set(counts.get(rule, 0))
    for row in violations:
        log.error("invariant.violated", rule=row["rule"], number=row["number"], ids=row["ids"])


async def _fetch_violations_under(primary: Primary, epoch: int) -> list[asyncpg.Record] | None:
    """Return the violations, or None if `epoch` is not current."""
    if epoch == 0:
        return None
    connection = await connections.connect(
        primary, application_name="allocator-invariants", statement_timeout_sec=STATEMENT_TIMEOUT_SEC
    )
    try:
        await connection.execute(SESSION_SETTINGS)
        if not await connection.fetchval(IS_CURRENT_EPOCH, epoch):
            return None
        return await fetch_violations(connection)
    finally:
        connection.terminate()


async def fetch_violations(connection: asyncpg.Connection) -> list[asyncpg.Record]:
    """Return a row for each violated rule: rule, number of violations, and up to MAX_IDS ids."""
    rows: list[asyncpg.Record] = await connection.fetch(VIOLATIONS, *PARAMETERS)
    return rows
