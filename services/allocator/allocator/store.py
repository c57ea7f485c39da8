"""The SQL of leases, and the rules for all SQL that writes the pool.

This module, deletions.py, listings.py and purge.py write the pool (sandboxes and leases), and no other module does.
jobs.py, dead_letters.py and outbox.py write other tables.

Every change is one statement in a transaction of its own, with the rows for the outbox in the same statement,
so nothing is ever half done and an allocator that freezes holds no locks. Each begins with the epoch guard:
where another allocator has taken over it finds no row, changes nothing, and Fenced is raised. The lock that the
guard takes also makes whoever raises the epoch wait, so a statement sees all that earlier epochs have done.

What makes each effect happen once: conditional updates (`WHERE status = …`, `WHERE ended_at IS NULL`), and the
unique indexes leases_one_per_sandbox, leases_one_per_holder and sandboxes_one_per_account. All of it holds with
any number of allocators at work; the epoch and the single consumer are for order, not for safety.
"""

from collections.abc import Sequence
from datetime import timedelta
from operator import itemgetter
from typing import Any

import asyncpg

from sandbox_broker.contract.commands import AllocateSandbox, ReleaseSandbox
from sandbox_broker.database import connections
from sandbox_broker.database.schema import prefix_end

Rows = list[asyncpg.Record]

LOCK_TIMEOUT = "1s"

UNAVAILABLE = (
    *connections.CONNECTION_ERRORS,
    asyncpg.LockNotAvailableError,  # an operator's transaction
)
"""The database cannot do it now; the command is not to blame."""


class Fenced(Exception):
    """Another allocator has raised the epoch: stop, and leave the messages to it."""


# Planning would take two thirds of the time of a small statement, so each is planned once, for the empty table of a
# new installation as for a million sandboxes. So that there is only one plan to find, whatever the statistics say:
# tables are not joined but looked up, by LIMIT 1 or `= ANY (ARRAY[key])`; each index has a condition that only its
# own look-up states; and what else a row must fulfil is written so that it states none (`status || ''`, num_nulls).
LOOK_UPS = """
SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
"""
# Statements that run seldom and see much of the pool are planned each time.
SCANS = "SET plan_cache_mode = force_custom_plan;"

# Epochs come from one sequence, so a guard need not say which queue its own is of.
RAISE_EPOCH = """
UPDATE allocator_epoch SET epoch = nextval('allocator_epochs'), backend_pid = pg_backend_pid()
WHERE queue = $1 RETURNING epoch
"""

# Whoever still holds the epoch when our patience has ended has been in its statement for longer than that.
TERMINATE_PREDECESSOR = f"""
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = $1 AND pid <> pg_backend_pid()
  AND xact_start <= now() - interval '{LOCK_TIMEOUT}'
"""

GUARD = "guard AS MATERIALIZED (SELECT epoch FROM allocator_epoch WHERE epoch = $1 FOR SHARE)"

# Parameters: epoch, lab duration, then one array per column of the requests.
# looked: the requests, with the lease that the student has and the one that the idempotency key was used for;
# wanted: for each prefix who has neither; picked: as many sandboxes as they are, those available longest first;
# assigned: who gets which, or none. Nothing here joins two sets: the lists of one prefix are unnested side by side,
# so the work grows with the number of requests and no estimate can make it grow faster.
_ALLOCATE = f"""
WITH {GUARD},
looked AS MATERIALIZED (
    SELECT r.*, known.*, keyed.holder = r.holder AS key_is_own
    FROM guard
    CROSS JOIN unnest($3::int[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
        AS r (place, holder, track_name, prefix, prefix_end, idempotency_key)
    LEFT JOIN LATERAL (
        SELECT its.*, held.allocated_at, held.expires_at
        FROM leases held CROSS JOIN LATERAL (
            SELECT sandbox_id, name, external_id, sfdc_account_id FROM sandboxes its
            WHERE its.sandbox_id = held.sandbox_id LIMIT 1
        ) its
        WHERE held.holder = r.holder AND held.ended_at IS NULL
        LIMIT 1
    ) known ON true
    LEFT JOIN LATERAL (
        SELECT keyed.holder FROM leases keyed
        WHERE keyed.idempotency_key = r.idempotency_key AND keyed.idempotency_key IS NOT NULL
        LIMIT 1
    ) keyed ON true
),
wanted AS MATERIALIZED (
    SELECT prefix, prefix_end, count(*) AS number, array_agg(place) AS places, array_agg(holder) AS holders,
        array_agg(track_name) AS track_names, array_agg(idempotency_key) AS idempotency_keys
    FROM looked
    WHERE sandbox_id IS NULL AND key_is_own IS NULL
    GROUP BY prefix, prefix_end
),
picked AS MATERIALIZED (
    SELECT w.*, ARRAY({{picks}}) AS sandbox_ids FROM wanted w
),
assigned AS MATERIALIZED (
    SELECT a.*
    FROM picked p
    CROSS JOIN unnest(p.places, p.holders, p.track_names, p.idempotency_keys, p.sandbox_ids)
        AS a (place, holder, track_name, idempotency_key, sandbox_id)
),
claimed AS (
    UPDATE sandboxes s SET status = 'allocated', status_since = now(), track_name = a.track_name
    FROM assigned a
    WHERE s.sandbox_id = ANY (ARRAY[a.sandbox_id]) AND s.status || '' = 'available'
    RETURNING a.place, a.holder, a.track_name, a.idempotency_key,
        s.sandbox_id, s.name, s.external_id, s.sfdc_account_id
),
leased AS (
    INSERT INTO leases (sandbox_id, holder, track_name, idempotency_key, expires_at)
    SELECT sandbox_id, holder, track_name, idempotency_key, now() + $2::interval FROM claimed
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.allocated', c.sandbox_id, jsonb_build_object(
        'sandbox_id', c.sandbox_id, 'external_id', c.external_id, 'name', c.name, 'holder', c.holder,
        'track_name', c.track_name, 'expires_at', floor(extract(epoch FROM now() + $2::interval))::bigint
    )
    FROM claimed c
    UNION ALL
    SELECT 'pool.exhausted', NULL, jsonb_build_object('name_prefix', nullif(prefix, ''))
    FROM picked WHERE cardinality(sandbox_ids) < number
),
answered AS (
    SELECT place, 'new' AS outcome, sandbox_id, name, external_id, sfdc_account_id,
        now() AS allocated_at, now() + $2::interval AS expires_at
    FROM claimed
    UNION ALL
    SELECT place,
        CASE
            WHEN NOT key_is_own THEN 'key_of_another'
            WHEN sandbox_id IS NOT NULL THEN 'known'
            ELSE 'key_used_up'
        END,
        sandbox_id, name, external_id, sfdc_account_id, allocated_at, expires_at
    FROM looked WHERE sandbox_id IS NOT NULL OR key_is_own IS NOT NULL
    UNION ALL
    SELECT place, 'exhausted', NULL, NULL, NULL, NULL, NULL, NULL FROM assigned WHERE sandbox_id IS NULL
)
SELECT place, outcome, sandbox_id, name, external_id, sfdc_account_id,
    floor(extract(epoch FROM allocated_at))::bigint AS allocated_at,
    floor(extract(epoch FROM expires_at))::bigint AS expires_at
FROM answered
"""

_PICK_ANY = """
SELECT sandbox_id FROM sandboxes oldest WHERE available_since IS NOT NULL
ORDER BY available_since, sandbox_id LIMIT w.number FOR UPDATE SKIP LOCKED
"""

# Names are mostly numbered: the few stems (names without their number) that start with the prefix are walked along
# the index from one to the next, and each has its sandboxes in the order of their age. A prefix that ends with a
# digit may cut through a number; what starts with it is sorted.
_PICK_BY_PREFIX = """
SELECT sandbox_id FROM (
    SELECT oldest.*
    FROM (
        WITH RECURSIVE stem AS (
            (
                SELECT available_stem FROM sandboxes first
                WHERE w.prefix !~ '[0-9]$' AND available_stem >= w.prefix AND available_stem < w.prefix_end
                ORDER BY available_stem LIMIT 1
            )
            UNION ALL
            SELECT following.available_stem
            FROM stem CROSS JOIN LATERAL (
                SELECT available_stem FROM sandboxes next
                WHERE available_stem > stem.available_stem AND available_stem < w.prefix_end
                ORDER BY available_stem LIMIT 1
            ) following
        )
        SELECT available_stem FROM stem
    ) stems
    CROSS JOIN LATERAL (
        SELECT sandbox_id, status_since FROM sandboxes of_stem
        WHERE available_stem = stems.available_stem
        ORDER BY status_since, sandbox_id LIMIT w.number FOR UPDATE SKIP LOCKED
    ) oldest
    UNION ALL
    SELECT oldest.*
    FROM (SELECT WHERE w.prefix ~ '[0-9]$') ends_with_a_digit
    CROSS JOIN LATERAL (
        SELECT sandbox_id, status_since FROM sandboxes by_name
        WHERE available_name >= w.prefix AND available_name < w.prefix_end
        ORDER BY status_since, sandbox_id LIMIT w.number FOR UPDATE SKIP LOCKED
    ) oldest
) candidates
ORDER BY status_since, sandbox_id LIMIT w.number
"""

ALLOCATE_ANY = _ALLOCATE.format(picks=_PICK_ANY)
ALLOCATE_BY_PREFIX = _ALLOCATE.format(picks=_PICK_BY_PREFIX)

# Ends leases and asks for the deletion of their sandboxes, for the rows of
# `ending (lease_id, sandbox_id, reason, note, request_id, traceparent)`.
_END_LEASES = """
ended AS (
    UPDATE leases l SET ended_at = now(), end_reason = e.reason, end_note = e.note
    FROM ending e
    WHERE l.lease_id = ANY (ARRAY[e.lease_id]) AND num_nulls(l.ended_at) = 1
    RETURNING l.sandbox_id, l.holder, l.track_name, e.reason, e.request_id, e.traceparent
),
moved AS (
    UPDATE sandboxes s
    SET status = 'pending_deletion', status_since = now(), deletion_requested_at = now(),
        deletion_due_at = now(), deletion_reason = ended.reason,
        deletion_request_id = ended.request_id, deletion_traceparent = ended.traceparent
    FROM ended
    WHERE s.sandbox_id = ANY (ARRAY[ended.sandbox_id]) AND s.status || '' = 'allocated'
    RETURNING s.sandbox_id, s.external_id, s.name, s.deletion_requested_at,
        ended.holder, ended.track_name, ended.reason, ended.request_id
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deletion_requested', m.sandbox_id, jsonb_build_object(
        'sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name, 'holder', m.holder,
        'track_name', m.track_name, 'reason', m.reason, 'request_id', m.request_id
    )
    FROM moved m
)
"""

# Nothing is delivered again later than that: RabbitMQ drops what its sender no longer waits for, which is a minute
# at most, and so does who has it in line.
ENDED_LATELY = f"""
WITH {GUARD}
SELECT epoch, ARRAY(
    SELECT ended.holder
    FROM leases ended LEFT JOIN LATERAL (
        SELECT lease_id FROM leases held WHERE held.holder = ended.holder AND held.ended_at IS NULL LIMIT 1
    ) other ON true
    WHERE '' || ended.holder = ANY ($2::text[]) AND ended.ended_at > now() - interval '2 minutes'
      AND num_nulls(other.lease_id) = 1
) AS holders
FROM guard
"""

RELEASE = f"""
WITH {GUARD},
request AS MATERIALIZED (
    SELECT r.*
    FROM guard, unnest($2::int[], $3::text[], $4::text[], $5::text[], $6::text[])
        AS r (place, sandbox_id, holder, request_id, traceparent)
),
found AS MATERIALIZED (
    SELECT r.place, r.sandbox_id, r.request_id, r.traceparent,
        s.status, s.deletion_requested_at, l.lease_id, l.ended_at,
        s.sandbox_id IS NOT NULL OR l.lease_id IS NOT NULL AS exists, l.holder = r.holder AS own
    FROM request r
    LEFT JOIN LATERAL (SELECT * FROM sandboxes WHERE sandbox_id = r.sandbox_id LIMIT 1) s ON true
    LEFT JOIN LATERAL (SELECT * FROM leases WHERE sandbox_id = r.sandbox_id LIMIT 1) l ON true
),
ending AS MATERIALIZED (
    SELECT DISTINCT ON (lease_id)
        lease_id, sandbox_id, 'student' AS reason, NULL::text AS note, request_id, traceparent
    FROM found WHERE own AND ended_at IS NULL ORDER BY lease_id, place
),
{_END_LEASES}
SELECT f.place, f.exists, coalesce(f.own, false) AS own,
    CASE WHEN f.moved THEN 'pending_deletion' ELSE coalesce(f.status, 'deleted') END AS status,
    floor(extract(epoch FROM CASE WHEN f.moved THEN now() ELSE coalesce(f.deletion_requested_at, f.ended_at) END))
        ::bigint AS deletion_requested_at
FROM (SELECT found.*, sandbox_id IN (SELECT sandbox_id FROM moved) AS moved FROM found) f
ORDER BY f.place
"""

EXPIRE = f"""
WITH {GUARD},
ending AS MATERIALIZED (
    SELECT l.lease_id, l.sandbox_id, 'expired' AS reason, NULL::text AS note, NULL::text AS request_id,
        NULL::text AS traceparent
    FROM guard CROSS JOIN LATERAL (
        SELECT lease_id, sandbox_id FROM leases
        WHERE end_reason IS NULL AND expires_at <= now() - $2::interval
        ORDER BY expires_at LIMIT $3 FOR UPDATE SKIP LOCKED
    ) l
),
{_END_LEASES}
SELECT epoch, ARRAY(SELECT sandbox_id FROM moved) AS sandbox_ids FROM guard
"""

# An administrator ends a lease, whoever holds it.
END_LEASE = f"""
WITH {GUARD},
found AS MATERIALIZED (
    SELECT s.sandbox_id, s.status, s.deletion_requested_at, l.lease_id, l.ended_at
    FROM guard, sandboxes s LEFT JOIN leases l ON l.sandbox_id = s.sandbox_id
    WHERE s.sandbox_id = $2
),
ending AS MATERIALIZED (
    SELECT lease_id, sandbox_id, 'admin' AS reason, $3::text AS note,
        $4::text AS request_id, $5::text AS traceparent
    FROM found WHERE lease_id IS NOT NULL AND ended_at IS NULL
),
{_END_LEASES}
SELECT epoch, f.lease_id,
    CASE WHEN m.sandbox_id IS NOT NULL THEN 'pending_deletion' ELSE f.status END AS status,
    floor(extract(epoch FROM coalesce(m.deletion_requested_at, f.deletion_requested_at, f.ended_at)))::bigint
        AS deletion_requested_at,
    m.sandbox_id IS NOT NULL AS changed
FROM guard LEFT JOIN found f ON true LEFT JOIN moved m ON true
"""

COUNT_BY_STATUS = """
SELECT status, sum(number)::bigint
FROM (
    SELECT status, number FROM pool_counts WHERE kind = 'pool' UNION ALL SELECT status, number FROM pool_changes
) counted
GROUP BY status
"""

# Among those that have been pending longest: one that is sent back, or reopened, was asked for before that.
OLDEST_DELETION = """
SELECT coalesce(extract(epoch FROM now() - min(deletion_requested_at)), 0)::float FROM (
    SELECT deletion_requested_at FROM sandboxes
    WHERE status = 'pending_deletion' ORDER BY status_since LIMIT 1000
) longest
"""


OUTBOX_LAG = """
SELECT coalesce(extract(epoch FROM now() - (SELECT occurred_at FROM outbox ORDER BY outbox_id LIMIT 1)), 0)::float
"""

LEASES_EVER = "SELECT coalesce(max(lease_id), 0) FROM leases"


async def connect(database_url: str, queue: str, *, statement_timeout_sec: float, plans: str) -> asyncpg.Connection:
    """A connection for the statements of this file, for the commands of one queue; it bears the queue's name.
    `plans` is LOOK_UPS or SCANS. Raises one of UNAVAILABLE."""
    connection = await connections.connect(
        database_url, application_name=queue, statement_timeout_sec=statement_timeout_sec
    )
    try:
        await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'; {plans}")
    except BaseException:  # also when cancelled: nobody else would close it
        connection.terminate()
        raise
    return connection


async def raise_epoch(connection: asyncpg.Connection, queue: str) -> int:
    """Makes this connection the one whose writes for the queue's commands count, and returns its epoch. A
    predecessor that is frozen inside a statement, and so holds the row, loses its connection."""
    try:
        return int(await connection.fetchval(RAISE_EPOCH, queue))
    except asyncpg.LockNotAvailableError:
        await connection.fetch(TERMINATE_PREDECESSOR, queue)
        return int(await connection.fetchval(RAISE_EPOCH, queue))


async def allocate(
    connection: asyncpg.Connection, epoch: int, commands: Sequence[AllocateSandbox], lab_duration: timedelta
) -> Rows:
    """One row per command, in order, with its outcome. The commands must fit one round (see domain.rounds).
    Raises asyncpg.UniqueViolationError when another allocator was faster: repeat."""
    prefixes = [command.name_prefix or "" for command in commands]
    statement = ALLOCATE_BY_PREFIX if any(prefixes) else ALLOCATE_ANY
    rows = guarded(
        await connection.fetch(
            statement,
            epoch,
            lab_duration,
            list(range(len(commands))),
            [command.holder for command in commands],
            [command.track_name for command in commands],
            prefixes,
            [prefix_end(prefix) if prefix else "" for prefix in prefixes],
            [command.idempotency_key for command in commands],
        )
    )
    return sorted(rows, key=itemgetter("place"))


async def release(connection: asyncpg.Connection, epoch: int, commands: Sequence[ReleaseSandbox]) -> Rows:
    """One row per command, in order: exists, own, status, deletion_requested_at."""
    return guarded(
        await connection.fetch(
            RELEASE,
            epoch,
            list(range(len(commands))),
            [command.sandbox_id for command in commands],
            [command.holder for command in commands],
            [command.request_id for command in commands],
            [command.traceparent for command in commands],
        )
    )


async def one(connection: asyncpg.Connection, statement: str, epoch: int, *arguments: Any) -> asyncpg.Record:
    """The single row that a guarded statement answers with. Raises Fenced."""
    return guarded(await connection.fetch(statement, epoch, *arguments))[0]


def guarded(rows: Rows) -> Rows:
    """What a guarded statement answers with. Raises Fenced."""
    if not rows:
        raise Fenced
    return rows
