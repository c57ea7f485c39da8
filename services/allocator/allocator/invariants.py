"""Looks now and then whether the pool keeps its rules, and says which it does not.

Most of them the database enforces. They are looked at all the same, along other indexes than those that enforce
them: an index can be lost in a repair or damaged by a disk, and a person may write what no statement of ours would.
Nothing here writes, and nobody waits for it. Its cost grows with the leases that are active, and with the number of
sandboxes only as counting the entries of an index does.
"""

from datetime import timedelta

import asyncpg
import structlog

from allocator import metrics
from allocator.store import Rows
from sandbox_broker.database import connections
from sandbox_broker.database.schema import metadata

STATEMENT_TIMEOUT_SEC = 10
EVENT_LATE = timedelta(minutes=5)
LEASE_LATE = timedelta(days=1)
"""After its end; far more than any grace period."""
NEXT_IN_LINE = 1000
"""So many of the available sandboxes are looked at, those to be handed out next."""
EXAMPLES = 10

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

PARAMETERS = (EVENT_LATE, LEASE_LATE, NEXT_IN_LINE, UNIQUE_INDEXES, EXAMPLES)
# active: the leases, each with its sandbox, looked up one by one rather than joined to all there are.
# there: how many sandboxes are in each state, by index. Those that are allocated have none: they are those that are
# leased, unless the counters say otherwise. Only then all sandboxes are searched for those that are not (unleased).
VIOLATIONS = """
WITH active AS MATERIALIZED (
    SELECT l.sandbox_id, l.holder, l.expires_at, s.external_id, s.status
    FROM leases l LEFT JOIN LATERAL (
        SELECT external_id, status FROM sandboxes WHERE sandbox_id = l.sandbox_id LIMIT 1
    ) s ON true
    WHERE l.end_reason IS NULL
),
there AS (
    SELECT 'available' AS status, count(*) AS number FROM sandboxes WHERE available_since IS NOT NULL
    UNION ALL
    SELECT 'allocated', count(DISTINCT sandbox_id) FROM active WHERE status = 'allocated'
    UNION ALL
    SELECT status, count(*) FROM sandboxes
    WHERE status IN ('pending_deletion', 'deletion_failed', 'stale', 'deleted') GROUP BY status
),
counted AS (
    SELECT status, sum(number) AS number
    FROM (
        SELECT status, number FROM pool_counts WHERE kind = 'pool' UNION ALL SELECT status, number FROM pool_changes
    ) changes
    GROUP BY status
),
compared AS MATERIALIZED (
    SELECT status, coalesce(there.number, 0) AS there, coalesce(counted.number, 0) AS counted
    FROM there FULL JOIN counted USING (status)
),
unleased AS MATERIALIZED (
    SELECT s.sandbox_id FROM sandboxes s
    WHERE s.status = 'allocated' AND NOT EXISTS (SELECT FROM active a WHERE a.sandbox_id = s.sandbox_id)
      AND (SELECT there <> counted FROM compared WHERE status = 'allocated')
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
    SELECT 'counters_are_exact', format('%s: %s counted, %s there', status, counted, there + unleased.number)
    FROM compared CROSS JOIN LATERAL (SELECT count(*) AS number FROM unleased WHERE status = 'allocated') unleased
    WHERE counted <> there + unleased.number
    UNION ALL
    SELECT 'unique_indexes_are_there', name FROM unnest($4::text[]) AS name
    WHERE NOT EXISTS (
        SELECT FROM pg_index WHERE indexrelid = to_regclass(name) AND indisunique AND indisvalid AND indisready
    )
)
SELECT rule, count(*) AS number, (array_agg(id ORDER BY id))[:$5] AS ids FROM violations GROUP BY rule ORDER BY rule
"""
AT_WORK = "SELECT EXISTS (SELECT FROM allocator_epoch WHERE epoch = $1)"
SETTINGS = "SET default_transaction_read_only = on; SET max_parallel_workers_per_gather = 0"

log = structlog.get_logger()


async def check(database_url: str, epoch: int) -> None:
    """Sets the metric for every rule, and logs what is violated. One that is not at work, or could not look, has
    nothing to say: then there is no metric."""
    try:
        found = await _look(database_url, epoch)
    except (*connections.CONNECTION_ERRORS, asyncpg.PostgresError) as error:  # also what a damaged index raises
        log.warning("invariants.not_checked", error=connections.reason(error))
        found = None
    if found is None:
        metrics.INVARIANT_VIOLATIONS.clear()
        return
    numbers = {row["rule"]: row["number"] for row in found}
    for rule in RULES:
        metrics.INVARIANT_VIOLATIONS.labels(rule=rule).set(numbers.get(rule, 0))
    for row in found:
        log.error("invariant.violated", rule=row["rule"], number=row["number"], ids=row["ids"])


async def _look(database_url: str, epoch: int) -> Rows | None:
    if epoch == 0:
        return None
    connection = await connections.connect(
        database_url, application_name="allocator-invariants", statement_timeout_sec=STATEMENT_TIMEOUT_SEC
    )
    try:
        await connection.execute(SETTINGS)
        if not await connection.fetchval(AT_WORK, epoch):
            return None
        return await violations(connection)
    finally:
        connection.terminate()


async def violations(connection: asyncpg.Connection) -> Rows:
    """A row for each rule that is violated: rule, number, and up to EXAMPLES ids."""
    found: Rows = await connection.fetch(VIOLATIONS, *PARAMETERS)
    return found
