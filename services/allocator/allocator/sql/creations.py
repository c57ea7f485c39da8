"""Creation intents: grant them, claim the due ones, record their results, stop and resume a name prefix.

An intent is in flight from its grant until a sync imports its account, or until no account can exist any more.
Meanwhile it counts for the `max` of its stock rule. `max` holds at every instant for three reasons:

- A grant reads all levels in one snapshot and raises `next_number` of the prefix, on condition that the number is
  still the one of the snapshot. So of two concurrent grants the second grants nothing.
- The statement that imports an account ends the flight of its intent (`sql/listings.APPLY_LISTING`).
- An intent without a result may have an account, because CSP may create one and answer with an error. It stays in
  flight until a later listing lacks its name (`SETTLE`).

A name belongs to one intent for ever (`creations_one_per_name`), so rows are never removed.
"""

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import TypedDict

from allocator.write_session import GUARD, ConcurrentUpdate, WriteSession

MAX_GRANT = 500
"""Intents per statement."""
NUMBER_WINDOW = 1000
"""Known names that one grant can skip."""
SETTLE_GRACE = timedelta(minutes=10)
"""Longest time from a request to CSP until its listing contains the account. A listing that was begun this long
after the last attempt and lacks the name proves that no account exists."""
LISTING_PATIENCE = timedelta(days=1)
"""Time for CSP to list an account that it has created."""
MAX_HISTORY = 50


def note(what: str, details: str = "'{}'::jsonb") -> str:
    """Return the assignment that adds an entry to the history. The first entry, the grant, is never dropped."""
    return f"""history = CASE
            WHEN jsonb_array_length(history) < {MAX_HISTORY} THEN history ELSE history - 1
        END || (jsonb_build_object('at', floor(extract(epoch FROM now())), 'what', '{what}') || {details})"""


# Leader lease: one run at a time, so that the throttles of the provisioner hold over its replicas. A concurrent run
# blocks on the row and then sees the new owner.
_LEADER_LEASE = """
duty AS (
    UPDATE creation_duty SET run_id = $2, until = now() + $3::interval, claimed_at = now()
    FROM guard
    WHERE run_id = $2 OR until <= now()
    RETURNING run_id
)
"""

# Names with the prefix and a number, in the pool, in the listings of CSP and among the intents.
ADD_PREFIXES = f"""
WITH {GUARD},
new AS MATERIALIZED (
    SELECT l.name_prefix, l.prefix_end FROM guard, stock_levels l WHERE l.next_number IS NULL
),
known AS (
    SELECT n.name_prefix, substr(k.name, length(n.name_prefix) + 1) AS number
    FROM new n
    CROSS JOIN LATERAL (
        SELECT name FROM sandboxes WHERE name >= n.name_prefix AND name < n.prefix_end
        UNION ALL SELECT name FROM csp_accounts WHERE name >= n.name_prefix AND name < n.prefix_end
        UNION ALL SELECT name FROM creations WHERE name >= n.name_prefix AND name < n.prefix_end
    ) k
),
added AS (
    INSERT INTO stock_prefixes (name_prefix, next_number)
    SELECT n.name_prefix, 1 + coalesce((
        SELECT max(CASE WHEN k.number ~ '^[0-9]{{1,15}}$' THEN k.number::bigint END)
        FROM known k WHERE k.name_prefix = n.name_prefix
    ), 0)
    FROM new n
    ON CONFLICT (name_prefix) DO NOTHING
)
SELECT epoch FROM guard
"""

# Intents that were never claimed have no account, so they end at once.
ABANDON_SURPLUS = f"""
WITH {GUARD},
{_LEADER_LEASE},
unneeded AS MATERIALIZED (
    SELECT c.creation_id
    FROM duty CROSS JOIN stock_levels l CROSS JOIN LATERAL (
        SELECT creation_id FROM creations
        WHERE name_prefix = l.name_prefix AND in_flight AND state = 'pending' AND first_claimed_at IS NULL
        ORDER BY creation_id DESC LIMIT l.surplus
    ) c
    UNION ALL
    SELECT c.creation_id FROM duty, creations c
    WHERE c.in_flight AND c.state = 'pending' AND c.first_claimed_at IS NULL
      AND NOT EXISTS (SELECT FROM stock_rules r WHERE r.name_prefix = c.name_prefix)
),
abandoned AS (
    UPDATE creations c SET state = 'abandoned', in_flight = false, ended_at = now(), {note("abandoned")}
    FROM unneeded u
    WHERE c.creation_id = u.creation_id AND c.state = 'pending' AND c.first_claimed_at IS NULL
    RETURNING c.name
)
SELECT epoch, ARRAY(SELECT name FROM abandoned) AS names FROM guard
"""

_FREE_NUMBERS = f"""
    SELECT candidate AS number
    FROM generate_series(
        {{rule}}.next_number, {{rule}}.next_number + least({{rule}}.missing, {MAX_GRANT}) - 1 + {NUMBER_WINDOW}
    ) candidate
    WHERE NOT EXISTS (SELECT FROM sandboxes s WHERE s.name = {{rule}}.name_prefix || candidate)
      AND NOT EXISTS (SELECT FROM csp_accounts a WHERE a.name = {{rule}}.name_prefix || candidate)
      AND NOT EXISTS (SELECT FROM creations c WHERE c.name = {{rule}}.name_prefix || candidate)
    ORDER BY candidate LIMIT least({{rule}}.missing, {MAX_GRANT})
"""

# One rule per statement, because the intents of one rule count for the `max` of another whose prefix its own prefix
# begins with.
GRANT = f"""
WITH {GUARD},
{_LEADER_LEASE},
rule AS MATERIALIZED (
    SELECT l.name_prefix, l.missing, l.next_number FROM duty CROSS JOIN stock_levels l
    WHERE l.missing > 0 AND l.stopped_at IS NULL AND l.next_number IS NOT NULL
    ORDER BY l.name_prefix LIMIT 1
),
numbered AS MATERIALIZED (
    SELECT r.name_prefix, free.number FROM rule r CROSS JOIN LATERAL ({_FREE_NUMBERS.format(rule="r")}) free
),
advanced AS (
    UPDATE stock_prefixes p
    SET next_number = coalesce((SELECT max(number) + 1 FROM numbered), r.next_number + {NUMBER_WINDOW})
    FROM rule r
    WHERE p.name_prefix = r.name_prefix AND p.next_number = r.next_number
    RETURNING p.name_prefix
),
granted AS (
    INSERT INTO creations (name, name_prefix, request_id, traceparent, history)
    SELECT n.name_prefix || n.number, n.name_prefix, $4, $5,
        jsonb_build_array(jsonb_build_object('at', floor(extract(epoch FROM now())), 'what', 'granted'))
    FROM advanced a JOIN numbered n ON n.name_prefix = a.name_prefix
    ORDER BY n.number
    RETURNING name
)
SELECT epoch, (SELECT name_prefix FROM rule) AS name_prefix, EXISTS (SELECT FROM advanced) AS advanced,
    (SELECT count(*) FROM granted) AS granted
FROM guard
"""

# A claim that the run has not received is due: the reply was lost, so no attempt has begun. The requests of a run
# follow each other, so `received` is complete.
_IS_DUE = "(c.due_at <= now() OR c.claim = $2 AND c.creation_id <> ALL ($5::bigint[]))"

# The emptiest prefix comes first. Its claimed intents count as filled, so several prefixes take turns.
CLAIM_CREATIONS = f"""
WITH {GUARD},
{_LEADER_LEASE},
levels AS MATERIALIZED (
    SELECT l.name_prefix, l.admin_user, (l.available + l.begun - l.waiting)::float / greatest(l.target, 1) AS filled
    FROM guard, stock_levels l WHERE l.stopped_at IS NULL
),
due AS MATERIALIZED (
    SELECT c.creation_id, c.first_claimed_at IS NOT NULL AS claimed_before, l.filled, l.admin_user
    FROM duty CROSS JOIN levels l JOIN creations c ON c.name_prefix = l.name_prefix
    WHERE c.in_flight AND c.state = 'pending' AND {_IS_DUE} AND duty.run_id = $2
    ORDER BY l.filled, c.due_at, c.creation_id LIMIT $4
    FOR UPDATE OF c SKIP LOCKED
),
claimed AS (
    UPDATE creations c
    SET due_at = now() + $3::interval, claim = $2, first_claimed_at = coalesce(c.first_claimed_at, now()),
        {note("claimed", "jsonb_build_object('run_id', $2::uuid)")}
    FROM due WHERE c.creation_id = due.creation_id
    RETURNING c.creation_id, c.name, c.name_prefix, c.attempts, c.request_id, c.traceparent,
        due.claimed_before, due.filled, due.admin_user
)
SELECT epoch, EXISTS (SELECT FROM duty) AS on_duty,
    extract(epoch FROM CASE
        WHEN EXISTS (SELECT FROM duty) THEN (
            SELECT min(greatest(c.due_at, now())) FROM creations c JOIN levels l USING (name_prefix)
            WHERE c.in_flight AND c.state = 'pending'
        )
        ELSE (SELECT until FROM creation_duty)
    END - now())::float AS next_in_sec,
    awaited.number AS awaited, awaited.sec AS awaited_sec,
    c.*
FROM guard
CROSS JOIN (
    SELECT count(*) AS number, extract(epoch FROM now() - max(created_at))::float AS sec
    FROM creations WHERE in_flight AND state = 'created'
) awaited
LEFT JOIN claimed c ON true
ORDER BY c.filled, c.creation_id
"""

# Reads only: the due intents, then the names that would be granted next.
PREVIEW_CREATIONS = f"""
WITH {GUARD},
levels AS MATERIALIZED (
    SELECT l.name_prefix, l.admin_user, coalesce(l.next_number, 1) AS next_number, l.missing
    FROM guard, stock_levels l WHERE l.stopped_at IS NULL
),
planned AS (
    SELECT * FROM (
        SELECT c.creation_id, c.name, l.name_prefix, l.admin_user, c.attempts,
            c.first_claimed_at IS NOT NULL AS claimed_before
        FROM levels l JOIN creations c ON c.name_prefix = l.name_prefix
        WHERE c.in_flight AND c.state = 'pending' AND c.due_at <= now()
        ORDER BY c.creation_id LIMIT $2
    ) due
    UNION ALL
    SELECT 0, l.name_prefix || free.number, l.name_prefix, l.admin_user, 0, false
    FROM levels l CROSS JOIN LATERAL ({_FREE_NUMBERS.format(rule="l")}) free
)
SELECT epoch, true AS on_duty, NULL::float AS next_in_sec, 0 AS awaited, NULL::float AS awaited_sec,
    p.*, NULL AS request_id, NULL AS traceparent
FROM guard LEFT JOIN planned p ON true
LIMIT $2
"""

END_CREATIONS = f"""
WITH {GUARD}, ended AS (
    UPDATE creation_duty SET run_id = NULL, until = now() FROM guard WHERE run_id = $2 RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM ended) AS changed FROM guard
"""

# The first record of the account is the condition. A late record is true even if another run has given the intent
# up, because the account exists. A sync can have imported the account before, under another name.
RECORD_CREATION = f"""
WITH {GUARD},
account AS MATERIALIZED (
    SELECT EXISTS (
        SELECT FROM sandboxes s WHERE s.external_id = $3 AND s.status <> 'deleted'
    ) AS is_imported
    FROM guard
    WHERE NOT EXISTS (SELECT FROM creations other WHERE other.external_id = $3)
),
recorded AS (
    UPDATE creations c
    SET state = 'created', external_id = $3, created_at = now(), ended_at = now(), claim = NULL, error = NULL,
        in_flight = NOT a.is_imported, imported_at = CASE WHEN a.is_imported THEN now() END,
        {note("created", "jsonb_build_object('external_id', $3::text)")}
    FROM account a
    WHERE c.creation_id = $2 AND c.external_id IS NULL
    RETURNING c.creation_id, c.name, c.name_prefix, c.external_id, c.request_id
),
succeeded AS (
    UPDATE stock_prefixes p SET failures = 0 FROM recorded r WHERE p.name_prefix = r.name_prefix AND p.failures > 0
),
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'sandbox.created', jsonb_build_object(
        'creation_id', creation_id, 'name', name, 'name_prefix', name_prefix, 'external_id', external_id
    )
    FROM recorded
)
SELECT epoch, r.name, r.name_prefix FROM guard LEFT JOIN recorded r ON true
"""

_STOPS = "($7 OR p.failures + 1 >= $8)"

# The claim and its number of attempts are the condition. A duplicate message finds them changed, and so does a late
# message of a replaced run.
RECORD_CREATION_FAILURE = f"""
WITH {GUARD},
moved AS (
    UPDATE creations c
    SET state = CASE WHEN $6::interval IS NULL THEN 'failed' ELSE c.state END,
        ended_at = CASE WHEN $6::interval IS NULL THEN now() END,
        due_at = now() + coalesce($6::interval, '0'), attempts = c.attempts + 1, error = $5, claim = NULL,
        {note("failed", "jsonb_build_object('error', $5::text)")}
    FROM guard
    WHERE c.creation_id = $2 AND c.state = 'pending' AND c.attempts = $4 AND c.claim = $3
    RETURNING c.creation_id, c.name, c.name_prefix, c.state, c.attempts, c.error
),
counted AS (
    UPDATE stock_prefixes p
    SET failures = p.failures + 1, last_error = $5, last_error_at = now(),
        stopped_at = CASE WHEN {_STOPS} THEN coalesce(p.stopped_at, now()) ELSE p.stopped_at END,
        stop_cause = CASE
            WHEN {_STOPS} THEN coalesce(p.stop_cause, CASE WHEN $7 THEN 'refused' ELSE 'failures' END)
            ELSE p.stop_cause
        END,
        stop_reason = CASE WHEN {_STOPS} THEN coalesce(p.stop_reason, $5) ELSE p.stop_reason END
    FROM moved m WHERE p.name_prefix = m.name_prefix
    RETURNING p.name_prefix, p.failures, p.stop_cause, p.stop_reason, p.stopped_at = now() AS has_stopped
),
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'creation.failed', jsonb_build_object(
        'creation_id', creation_id, 'name', name, 'name_prefix', name_prefix, 'attempts', attempts, 'error', error
    )
    FROM moved WHERE state = 'failed'
    UNION ALL
    SELECT 'stock.stopped',
        jsonb_build_object('name_prefix', name_prefix, 'cause', stop_cause, 'reason', stop_reason)
    FROM counted WHERE has_stopped
)
SELECT epoch, m.name, m.name_prefix, c.failures, coalesce(c.has_stopped, false) AS has_stopped
FROM guard LEFT JOIN moved m ON true LEFT JOIN counted c ON true
"""

RESUME_STOCK = f"""
WITH {GUARD},
resumed AS (
    UPDATE stock_prefixes p
    SET stopped_at = NULL, stop_cause = NULL, stop_reason = NULL, failures = 0
    FROM guard WHERE p.name_prefix = $2 AND p.stopped_at IS NOT NULL
    RETURNING p.name_prefix
),
due AS (
    UPDATE creations c SET due_at = now()
    FROM resumed r
    WHERE c.name_prefix = r.name_prefix AND c.in_flight AND c.state = 'pending' AND c.claim IS NULL
),
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'stock.resumed', jsonb_build_object('name_prefix', name_prefix) FROM resumed
)
SELECT epoch, EXISTS (SELECT FROM resumed) AS changed,
    EXISTS (SELECT FROM stock_rules WHERE name_prefix = $2)
        OR EXISTS (SELECT FROM stock_prefixes WHERE name_prefix = $2) AS exists
FROM guard
"""

# End the flight of intents without an account. The listing lacks the name, or its account would have been imported.
# Pending intents end only without a stock rule, because otherwise they are tried again.
SETTLE = f"""
WITH {GUARD},
latest AS MATERIALIZED (
    SELECT l.begun_at FROM guard, csp_listings l
    WHERE l.listing_id = $2 AND l.applied_at IS NOT NULL AND NOT EXISTS (
        SELECT FROM csp_listings later WHERE later.listing_id > $2 AND later.applied_at IS NOT NULL
    )
),
over AS MATERIALIZED (
    SELECT c.creation_id, c.state FROM latest l, creations c
    WHERE c.in_flight AND CASE c.state
        WHEN 'created' THEN c.created_at <= l.begun_at - $4::interval
        WHEN 'pending' THEN c.first_claimed_at IS NOT NULL AND c.due_at <= l.begun_at - $3::interval
            AND NOT EXISTS (SELECT FROM stock_rules r WHERE r.name_prefix = c.name_prefix)
        ELSE c.ended_at <= l.begun_at - $3::interval
    END
    AND NOT EXISTS (SELECT FROM csp_accounts a WHERE a.listing_id = $2 AND a.name = c.name)
),
settled AS (
    UPDATE creations c
    SET in_flight = false, ended_at = coalesce(c.ended_at, now()), claim = NULL,
        state = CASE c.state WHEN 'failed' THEN 'failed' ELSE 'abandoned' END,
        {note("not listed")}
    FROM over o WHERE c.creation_id = o.creation_id AND c.in_flight AND c.state = o.state
    RETURNING c.name, c.state
)
SELECT epoch, ARRAY(SELECT name FROM settled WHERE state = 'abandoned') AS abandoned FROM guard
"""


class ClaimRow(TypedDict):
    """Claimed intent. The first four columns are the same in all rows. Without claimed intents there is one row,
    with None in the other columns."""

    on_duty: bool
    """Whether the run holds the leader lease."""
    next_in_sec: float | None
    """Seconds until the next intent is due or, without the leader lease, until its expiry."""
    awaited: int
    """Accounts that CSP has created and no sync has imported yet."""
    awaited_sec: float | None
    """Seconds since the newest of them was recorded."""
    creation_id: int | None
    name: str
    name_prefix: str
    admin_user: str | None
    """JSON."""
    attempts: int
    claimed_before: bool
    request_id: str | None
    traceparent: str | None


class FailureRow(TypedDict):
    name: str | None
    """None: the claim has ended or was recorded before."""
    name_prefix: str
    failures: int
    """Consecutive failed attempts of the prefix."""
    has_stopped: bool
    """Whether this failure stopped the prefix."""


class ResumeRow(TypedDict):
    changed: bool
    exists: bool
    """Whether the prefix has or had a stock rule."""


async def grant_creations(
    session: WriteSession,
    *,
    run_id: uuid.UUID,
    claim: timedelta,
    request_id: str | None,
    traceparent: str | None,
) -> dict[str, int]:
    """Grant the intents that the stock rules need; return their number per name prefix. Grant nothing without the
    leader lease, which is taken or extended for the duration `claim`.

    Raises ConcurrentUpdate if another allocator was faster; run it again.
    """
    granted: dict[str, int] = {}
    while True:
        row = await session.fetch_one(GRANT, run_id, claim, request_id, traceparent)
        name_prefix = row["name_prefix"]
        if name_prefix is None:
            return granted
        if not row["advanced"]:
            raise ConcurrentUpdate
        granted[name_prefix] = granted.get(name_prefix, 0) + row["granted"]


async def abandon_surplus(session: WriteSession, *, run_id: uuid.UUID, claim: timedelta) -> list[str]:
    """Abandon intents that are not needed any more and were never claimed; return their names."""
    names: list[str] = (await session.fetch_one(ABANDON_SURPLUS, run_id, claim))["names"]
    return names


async def add_prefixes(session: WriteSession) -> None:
    """Begin the numbering of new stock rules behind the highest known number."""
    await session.fetch_one(ADD_PREFIXES)


async def claim_creations(
    session: WriteSession, *, run_id: uuid.UUID, claim: timedelta, limit: int, received: Sequence[int] | None
) -> list[ClaimRow]:
    """Take or extend the leader lease, and claim up to `limit` due intents, both for the duration `claim`.

    Claims of the run that are not in `received` are due, unless it is None.
    """
    rows: list[ClaimRow] = await session.fetch(CLAIM_CREATIONS, run_id, claim, limit, received)
    return rows


async def preview_creations(session: WriteSession, *, limit: int) -> list[ClaimRow]:
    """Return up to `limit` intents that are due, or missing (with the id 0). Write nothing."""
    rows: list[ClaimRow] = await session.fetch(PREVIEW_CREATIONS, limit)
    return rows


async def end_creations(session: WriteSession, *, run_id: uuid.UUID) -> bool:
    """End the leader lease of the run; return whether the run held it."""
    changed: bool = (await session.fetch_one(END_CREATIONS, run_id))["changed"]
    return changed


async def record_creation(session: WriteSession, *, creation_id: int, external_id: str) -> tuple[str, str] | None:
    """Record the account of an intent; return its name and name prefix, or None if it has an account already."""
    row = await session.fetch_one(RECORD_CREATION, creation_id, external_id)
    return None if row["name"] is None else (row["name"], row["name_prefix"])


async def record_creation_failure(
    session: WriteSession,
    *,
    run_id: uuid.UUID,
    creation_id: int,
    attempts: int,
    error: str,
    retry_in: timedelta | None,
    refused: bool,
    max_failures: int,
) -> FailureRow:
    """Postpone a claimed intent by `retry_in`, or end it as failed if `retry_in` is None. Stop its prefix after a
    refusal or `max_failures` consecutive failures.

    `attempts` is the number of attempts before the failed one.
    """
    row: FailureRow = await session.fetch_one(
        RECORD_CREATION_FAILURE, creation_id, run_id, attempts, error, retry_in, refused, max_failures
    )
    return row


async def resume_stock(session: WriteSession, *, name_prefix: str) -> ResumeRow:
    row: ResumeRow = await session.fetch_one(RESUME_STOCK, name_prefix)
    return row


async def settle(session: WriteSession, *, listing_id: int) -> list[str]:
    """End the flight of intents that have no account according to the applied listing; return the names of the
    abandoned ones."""
    names: list[str] = (await session.fetch_one(SETTLE, listing_id, SETTLE_GRACE, LISTING_PATIENCE))["abandoned"]
    return names
