"""Listings: bring the pool in line with a listing of CSP.

A listing is staged in batches under its id. APPLY_LISTING applies it as a whole or not at all. Idempotent
statements around it do the rest: MOVE_ACCOUNTS corrects account ids before it, FLAG_MISSING and REFRESH_SANDBOXES
set flags and names after it. Students wait for the same rows, so two more rules hold:

- No statement waits for a row locked by a statement of a student. SKIP LOCKED passes over it, and the next
  listing sees its new state.
- No statement locks many rows needed by students. Available sandboxes are locked only when they become stale
  and must not be allocated any more. Names are corrected a few at a time.

Every statement looks accounts up by (listing_id, sandbox_id). The table has no statistics of freshly staged rows,
so every plan that the planner may choose must be bearable: nested index look-ups are, a nested scan of a listing is
not.
"""

from collections.abc import Sequence
from typing import TypedDict

from allocator.sql.creations import note
from allocator.write_session import GUARD, WriteSession
from sandbox_broker.contract.commands import UNREADABLE_ACCOUNT, ListedAccount
from sandbox_broker.database.schema import PROOF_GRACE

MAX_EXAMPLES = 20
"""Sandboxes named by a held sync per kind of change."""

# A new listing abandons all unfinished ones. Only the accounts of the last applied listing stay, for comparison.
BEGIN_LISTING = f"""
WITH {GUARD},
kept AS MATERIALIZED (
    SELECT (SELECT listing_id FROM applied_listing) AS listing_id FROM guard
),
begun AS (
    INSERT INTO csp_listings (begun_at) SELECT now() FROM guard RETURNING listing_id
),
dropped AS (
    DELETE FROM csp_accounts a USING kept WHERE a.listing_id IS DISTINCT FROM kept.listing_id
),
expired AS (
    DELETE FROM csp_listings l USING kept
    WHERE l.listing_id IS DISTINCT FROM kept.listing_id AND l.begun_at < now() - interval '30 days'
)
SELECT listing_id FROM begun
"""

STAGE_LISTING = f"""
WITH {GUARD}, staged AS (
    INSERT INTO csp_accounts (listing_id, sandbox_id, external_id, name, sfdc_account_id, created_at)
    SELECT $2, a.* FROM guard, unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::timestamptz[])
        AS a (sandbox_id, external_id, name, sfdc_account_id, created_at)
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT epoch, (SELECT count(*) FROM staged) AS staged FROM guard
"""

# A record without a readable csp_id lists the sandbox of its account. NOT applies to each EXISTS, because the
# planner turns only NOT EXISTS into a join.
_BY_ID = "EXISTS (SELECT FROM csp_accounts a WHERE a.listing_id = $2 AND a.sandbox_id = s.sandbox_id)"
_BY_ACCOUNT = f"""EXISTS (
    SELECT FROM csp_accounts a WHERE a.listing_id = $2 AND a.sandbox_id = '{UNREADABLE_ACCOUNT}' || s.external_id
)"""
_IS_LISTED = f"({_BY_ID} OR {_BY_ACCOUNT})"
_IS_UNLISTED = f"(NOT {_BY_ID} AND NOT {_BY_ACCOUNT})"

# Sandboxes with different account ids in the listing and the pool.
_MOVING = """
moving AS MATERIALIZED (
    SELECT s.sandbox_id, s.status, a.external_id
    FROM guard, csp_accounts a JOIN sandboxes s ON s.sandbox_id = a.sandbox_id
    WHERE a.listing_id = {listing_id} AND s.external_id <> a.external_id
      AND s.status IN ('available', 'allocated', 'stale')
)
"""

# Accounts that are new to the pool.
_DISCOVERED = """
discovered AS MATERIALIZED (
    SELECT a.sandbox_id, a.name FROM guard, csp_accounts a
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL
      AND NOT EXISTS (SELECT FROM sandboxes s WHERE s.sandbox_id = a.sandbox_id)
      AND NOT EXISTS (SELECT FROM leases l WHERE l.sandbox_id = a.sandbox_id)
)
"""

# Facts for the decision whether to apply a listing. outdated: a newer listing has been applied.
ASSESS_LISTING = f"""
WITH {GUARD},
{_MOVING.format(listing_id="$2")},
{_DISCOVERED},
lacking AS MATERIALIZED (
    SELECT s.status FROM guard, sandboxes s
    WHERE (s.status = 'available' OR s.status = 'allocated' AND s.missing_since IS NULL) AND {_IS_UNLISTED}
)
SELECT epoch,
    l.applied_at IS NOT NULL AS applied,
    l.listing_id IS NULL OR EXISTS (
        SELECT FROM csp_listings later WHERE later.listing_id > $2 AND later.applied_at IS NOT NULL
    ) AS outdated,
    (SELECT count(*) FROM csp_accounts WHERE listing_id = $2) AS listed,
    (SELECT count(*) FROM sandboxes WHERE status IN ('available', 'allocated')) AS pool,
    (SELECT coalesce(max((outcome->>'synced')::bigint), 0) FROM csp_listings WHERE applied_at IS NOT NULL)
        AS largest,
    (SELECT count(*) FROM discovered d WHERE NOT EXISTS (
        SELECT FROM creations c WHERE c.name = d.name AND c.imported_at IS NULL
    )) AS discovered,
    (SELECT count(*) FROM lacking) AS lacking,
    (SELECT count(*) FROM moving) AS moving,
    (SELECT count(*) FROM moving WHERE status <> 'stale') AS moving_in_pool
FROM guard LEFT JOIN csp_listings l ON l.listing_id = $2
"""


def _change(table: str) -> str:
    return f"""jsonb_build_object(
        'count', (SELECT count(*) FROM {table}),
        'examples', (
            SELECT coalesce(jsonb_agg(example), '[]')
            FROM (SELECT sandbox_id, name FROM {table} ORDER BY sandbox_id LIMIT {MAX_EXAMPLES}) example
        )
    )"""


# The condition on held_at makes a duplicate command announce the hold only once.
HOLD_LISTING = f"""
WITH {GUARD},
stale AS MATERIALIZED (
    SELECT s.sandbox_id, s.name FROM guard, sandboxes s WHERE s.status = 'available' AND {_IS_UNLISTED}
),
missing AS MATERIALIZED (
    SELECT s.sandbox_id, s.name FROM guard, sandboxes s
    WHERE s.status = 'allocated' AND s.missing_since IS NULL AND {_IS_UNLISTED}
),
{_DISCOVERED},
restored AS MATERIALIZED (
    SELECT s.sandbox_id, s.name FROM guard, sandboxes s WHERE s.status = 'stale' AND {_IS_LISTED}
),
{_MOVING.format(listing_id="$2")},
moved AS MATERIALIZED (
    SELECT sandbox_id, s.name FROM moving JOIN sandboxes s USING (sandbox_id)
),
held AS (
    UPDATE csp_listings SET held_at = now(), outcome = jsonb_build_object(
        'reason', $3::text, 'stale', {_change("stale")}, 'missing', {_change("missing")},
        'moved', {_change("moved")}, 'discovered', {_change("discovered")}, 'restored', {_change("restored")}
    )
    FROM guard WHERE listing_id = $2 AND applied_at IS NULL AND held_at IS NULL
    RETURNING listing_id
),
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'sync.held', jsonb_build_object('listing_id', listing_id, 'reason', $3::text) FROM held
)
SELECT epoch FROM guard
"""

_GUARD_OF_EPOCH = GUARD.replace("$1", "{epoch}")

# Correct the account ids of sandboxes. Two sandboxes may have swapped their accounts, and the unique index permits
# a swap only through a third id. So these are two statements in one message, which PostgreSQL runs as one
# transaction. Such a message cannot have parameters. A sandbox does not get the account of another live sandbox
# unless the listing moves both.
_MOVE_ACCOUNTS = f"""
WITH RECURSIVE {_GUARD_OF_EPOCH},
{_MOVING},
held AS MATERIALIZED (
    SELECT m.sandbox_id, h.sandbox_id AS owner
    FROM moving m JOIN sandboxes h ON h.external_id = m.external_id AND h.status <> 'deleted'
),
blocked AS (
    SELECT sandbox_id FROM held WHERE owner NOT IN (SELECT sandbox_id FROM moving)
    UNION
    SELECT held.sandbox_id FROM held JOIN blocked ON blocked.sandbox_id = held.owner
)
UPDATE sandboxes s SET external_id = 'moving ' || s.sandbox_id
FROM moving m
WHERE s.sandbox_id = m.sandbox_id AND s.status = m.status
  AND s.sandbox_id NOT IN (SELECT sandbox_id FROM blocked);

WITH {_GUARD_OF_EPOCH}
UPDATE sandboxes s SET external_id = a.external_id
FROM guard, csp_accounts a
WHERE a.listing_id = {{listing_id}} AND s.sandbox_id = a.sandbox_id AND s.external_id = 'moving ' || s.sandbox_id
"""

_ACCOUNT_OF_ANOTHER = """
    SELECT FROM sandboxes other
    WHERE other.external_id = a.external_id AND other.status <> 'deleted' AND other.sandbox_id <> a.sandbox_id
"""

# Each listing takes effect once, because `applied_at` is set once.
# discovered: accounts without a sandbox and without a lease. A known sandbox is never inserted again, so a deleted
# sandbox stays deleted. A lease without a sandbox shows a used sandbox with a purged record.
# imported: an account with the id or, before its creation was recorded, the name of an intent ends the flight of
# the intent. This is in the same statement, so that the sandbox and its intent never both count for a stock rule.
# reopened: CSP has confirmed the deletion, and still lists the account. The sandbox is deleted again and never
# reaches another student (ADR 7). A sandbox deleted as stale was never used, so it is not reopened.
APPLY_LISTING = f"""
WITH {GUARD},
opening AS MATERIALIZED (
    SELECT l.listing_id, l.begun_at FROM guard, csp_listings l
    WHERE l.listing_id = $2 AND l.applied_at IS NULL AND NOT EXISTS (
        SELECT FROM csp_listings later WHERE later.listing_id > $2 AND later.applied_at IS NOT NULL
    )
    FOR UPDATE OF l
),
restored AS (
    UPDATE sandboxes s
    SET status = 'available', status_since = now(),
        name = a.name, external_id = a.external_id, sfdc_account_id = a.sfdc_account_id
    FROM opening, csp_accounts a
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL AND s.sandbox_id = a.sandbox_id AND s.status = 'stale'
      AND NOT EXISTS ({_ACCOUNT_OF_ANOTHER})
    RETURNING s.sandbox_id, s.external_id, s.name
),
discovered AS (
    INSERT INTO sandboxes (sandbox_id, external_id, name, sfdc_account_id, status)
    SELECT a.sandbox_id, a.external_id, a.name, a.sfdc_account_id, 'available'
    FROM opening, csp_accounts a
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL
      AND NOT EXISTS (SELECT FROM sandboxes s WHERE s.sandbox_id = a.sandbox_id)
      AND NOT EXISTS (SELECT FROM leases l WHERE l.sandbox_id = a.sandbox_id)
    ORDER BY a.created_at, a.sandbox_id
    ON CONFLICT DO NOTHING
    RETURNING sandbox_id, external_id, name
),
arrivals AS MATERIALIZED (
    SELECT c.creation_id, c.state, d.external_id FROM discovered d JOIN creations c ON c.external_id = d.external_id
    WHERE c.imported_at IS NULL
    UNION ALL
    SELECT c.creation_id, c.state, d.external_id FROM discovered d JOIN creations c ON c.name = d.name
    WHERE c.imported_at IS NULL AND c.external_id IS NULL
      AND NOT EXISTS (SELECT FROM creations other WHERE other.external_id = d.external_id)
),
imported AS (
    UPDATE creations c
    SET state = 'created', in_flight = false, imported_at = now(), external_id = a.external_id, claim = NULL,
        created_at = coalesce(c.created_at, now()), ended_at = coalesce(c.ended_at, now()),
        {note("imported", "jsonb_build_object('external_id', a.external_id)")}
    FROM arrivals a
    WHERE c.creation_id = a.creation_id AND c.imported_at IS NULL
    RETURNING c.creation_id, c.name, c.name_prefix, c.external_id, a.state AS previous_state,
        extract(epoch FROM c.imported_at - c.first_claimed_at)::float AS creation_sec
),
unlisted AS MATERIALIZED (
    SELECT s.sandbox_id FROM opening, sandboxes s
    WHERE s.status = 'available' AND {_IS_UNLISTED}
    FOR NO KEY UPDATE OF s SKIP LOCKED
),
gone AS (
    UPDATE sandboxes s SET status = 'stale', status_since = now()
    FROM unlisted u WHERE s.sandbox_id = u.sandbox_id AND s.status = 'available'
    RETURNING s.sandbox_id, s.external_id, s.name
),
reopened AS (
    UPDATE sandboxes s
    SET status = 'pending_deletion', status_since = now(), external_id = a.external_id, missing_since = NULL,
        deletion_due_at = now(), deletion_claim = NULL, deletion_attempts = 0,
        deletion_error = 'CSP still lists it'
    FROM opening o, csp_accounts a
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL AND s.sandbox_id = a.sandbox_id
      AND s.status = 'deleted' AND s.deletion_requested_at IS NOT NULL
      AND s.status_since <= o.begun_at - $3::interval
      AND NOT EXISTS ({_ACCOUNT_OF_ANOTHER})
    RETURNING s.sandbox_id, s.external_id, s.name, s.deletion_reason
),
counted AS MATERIALIZED (
    SELECT (SELECT count(*) FROM csp_accounts WHERE listing_id = $2 AND external_id IS NOT NULL) AS synced,
        (SELECT count(*) FROM discovered) AS discovered, (SELECT count(*) FROM restored) AS restored,
        (SELECT count(*) FROM gone) AS marked_stale, (SELECT count(*) FROM reopened) AS reopened
    FROM opening
),
applied AS (
    UPDATE csp_listings l SET applied_at = now(), held_at = NULL, outcome = to_jsonb(counted)
    FROM counted WHERE l.listing_id = $2
    RETURNING l.listing_id, l.outcome
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT e.type, e.sandbox_id,
        jsonb_build_object('sandbox_id', e.sandbox_id, 'external_id', e.external_id, 'name', e.name) || e.more
    FROM (
        SELECT 'sandbox.discovered' AS type, *, '{{}}'::jsonb AS more FROM discovered
        UNION ALL SELECT 'sandbox.restored', *, '{{}}' FROM restored
        UNION ALL SELECT 'sandbox.stale', *, '{{}}' FROM gone
        UNION ALL
        SELECT 'sandbox.deletion_requested', sandbox_id, external_id, name,
            jsonb_build_object('reason', deletion_reason, 'reopened', true)
        FROM reopened
    ) e
    UNION ALL
    SELECT 'sandbox.created', NULL, jsonb_build_object(
        'creation_id', creation_id, 'name', name, 'name_prefix', name_prefix, 'external_id', external_id
    )
    FROM imported WHERE previous_state <> 'created'
    UNION ALL
    SELECT 'sync.completed', NULL, outcome || jsonb_build_object('listing_id', listing_id) FROM applied
)
SELECT epoch, c.*, ARRAY(SELECT creation_sec FROM imported WHERE creation_sec IS NOT NULL) AS creation_secs
FROM guard LEFT JOIN counted c ON true
"""

# Flag leased sandboxes without an account in CSP, unflag those listed again, and count the superfluous accounts in
# CSP (leaked).
FLAG_MISSING = f"""
WITH {GUARD},
latest AS MATERIALIZED (
    SELECT l.listing_id, l.begun_at FROM guard, csp_listings l
    WHERE l.listing_id = $2 AND l.applied_at IS NOT NULL AND NOT EXISTS (
        SELECT FROM csp_listings later WHERE later.listing_id > $2 AND later.applied_at IS NOT NULL
    )
),
changed AS MATERIALIZED (
    SELECT s.sandbox_id FROM latest, sandboxes s
    WHERE (s.status = 'allocated' OR s.missing_since IS NOT NULL)
      AND (s.missing_since IS NOT NULL) = {_IS_LISTED}
    FOR NO KEY UPDATE OF s SKIP LOCKED
),
flagged AS (
    UPDATE sandboxes s SET missing_since = CASE WHEN s.missing_since IS NULL THEN now() END
    FROM changed c WHERE s.sandbox_id = c.sandbox_id
),
leaks AS MATERIALIZED (
    SELECT count(*) AS leaked FROM latest, csp_accounts a LEFT JOIN sandboxes s ON s.sandbox_id = a.sandbox_id
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL
      AND (s.sandbox_id IS NULL OR s.status = 'deleted' AND s.status_since <= latest.begun_at - $3::interval)
),
noted AS (
    UPDATE csp_listings l SET outcome = l.outcome || to_jsonb(leaks) FROM leaks, latest
    WHERE l.listing_id = latest.listing_id
)
SELECT epoch, l.outcome || to_jsonb(leaks) AS outcome
FROM guard, leaks, csp_listings l WHERE l.listing_id = $2
"""

# Correct the names of a batch of the listing, after the sandbox $3. A batch locks at most half of the available
# sandboxes, or the pool would look empty to students.
REFRESH_SANDBOXES = f"""
WITH {GUARD},
batch AS MATERIALIZED (
    SELECT greatest(1, count(*) / 2) AS size
    FROM (SELECT FROM sandboxes WHERE available_since IS NOT NULL LIMIT 2 * $4::int) available
),
renamed AS MATERIALIZED (
    SELECT r.* FROM guard, batch CROSS JOIN LATERAL (
        SELECT s.sandbox_id, a.name, a.sfdc_account_id
        FROM csp_accounts a JOIN sandboxes s ON s.sandbox_id = a.sandbox_id
        WHERE a.listing_id = $2 AND a.sandbox_id > $3 AND a.external_id IS NOT NULL
          AND s.status IN ('available', 'allocated')
          AND (s.name, s.sfdc_account_id) IS DISTINCT FROM (a.name, a.sfdc_account_id)
        ORDER BY a.sandbox_id LIMIT batch.size
        FOR NO KEY UPDATE OF s SKIP LOCKED
    ) r
),
refreshed AS (
    UPDATE sandboxes s SET name = r.name, sfdc_account_id = r.sfdc_account_id
    FROM renamed r WHERE s.sandbox_id = r.sandbox_id
)
SELECT epoch, (SELECT max(sandbox_id) FROM renamed) AS last FROM guard
"""


class AssessmentRow(TypedDict):
    applied: bool | None
    outdated: bool
    listed: int
    """Number of staged accounts."""
    pool: int
    """Number of available and leased sandboxes."""
    largest: int
    """Accounts of the largest applied listing of the last 30 days, 0 before the first one."""
    discovered: int
    """Accounts that are new to the pool and that the broker did not create."""
    lacking: int
    """Sandboxes of the pool without an account in the listing."""
    moving: int
    """Sandboxes with another account in the listing."""
    moving_in_pool: int
    """Those of the pool among them."""


class AppliedRow(TypedDict):
    synced: int | None
    """None: another command applied the listing, or a newer one, concurrently."""
    reopened: int
    creation_secs: list[float]
    """Times from the first claim of a creation intent to the import of its account."""


async def begin_listing(session: WriteSession) -> int:
    """Begin a listing and return its id. Ids increase."""
    listing_id: int = (await session.fetch_one(BEGIN_LISTING))["listing_id"]
    return listing_id


async def stage_listing(
    session: WriteSession, *, listing_id: int, accounts: Sequence[ListedAccount], unreadable: Sequence[str]
) -> int:
    """Stage a batch of a listing; return the number of new accounts.

    `unreadable` are the sandbox ids of records without further readable fields.
    """
    blank = [None] * len(unreadable)
    row = await session.fetch_one(
        STAGE_LISTING,
        listing_id,
        [*(account.sandbox_id for account in accounts), *unreadable],
        [*(account.external_id for account in accounts), *blank],
        [*(account.name for account in accounts), *blank],
        [*(account.sfdc_account_id for account in accounts), *blank],
        [*(account.created_at for account in accounts), *blank],
    )
    staged: int = row["staged"]
    return staged


async def assess_listing(session: WriteSession, *, listing_id: int) -> AssessmentRow:
    row: AssessmentRow = await session.fetch_one(ASSESS_LISTING, listing_id)
    return row


async def hold_listing(session: WriteSession, *, listing_id: int, reason: str) -> None:
    """Hold a listing, store its planned changes, and announce it."""
    await session.fetch_one(HOLD_LISTING, listing_id, reason)


async def move_accounts(session: WriteSession, *, listing_id: int) -> None:
    """Correct account ids. Under a stale epoch this has no effect, without Fenced.

    Raises asyncpg.UniqueViolationError if a sandbox changed concurrently; run it again.
    """
    await session.connection.execute(_MOVE_ACCOUNTS.format(epoch=int(session.epoch), listing_id=int(listing_id)))


async def apply_listing(session: WriteSession, *, listing_id: int) -> AppliedRow:
    row: AppliedRow = await session.fetch_one(APPLY_LISTING, listing_id, PROOF_GRACE)
    return row


async def flag_missing(session: WriteSession, *, listing_id: int) -> str:
    """Flag missing sandboxes; return the outcome of the listing as JSON."""
    outcome: str = (await session.fetch_one(FLAG_MISSING, listing_id, PROOF_GRACE))["outcome"]
    return outcome


async def refresh_sandboxes(session: WriteSession, *, listing_id: int, after: str, limit: int) -> str | None:
    """Correct the names of up to `limit` sandboxes behind the id `after`; return the last id, None at the end."""
    last: str | None = (await session.fetch_one(REFRESH_SANDBOXES, listing_id, after, limit))["last"]
    return last
