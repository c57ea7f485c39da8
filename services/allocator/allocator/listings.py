"""The SQL that brings the pool in line with a listing of CSP.

A listing is staged in pieces, under its number, and applied by APPLY_LISTING as a whole or not at all. What does
not belong to that whole is done around it, in statements that may be repeated: corrections of account ids before
it, flags and names after it. The rules of store.py hold, which lists the modules that write the pool, and two more,
because students wait for the same rows:

- No statement waits for a row that a student's statement has locked. It is passed over (SKIP LOCKED), and the
  next listing sees what has become of it.
- No statement locks many rows that students may want. An available sandbox is locked when it goes stale, which
  nobody should be given any more; names are corrected a few at a time.

Each statement looks accounts up by (listing_id, sandbox_id). There are no statistics of what was staged a moment
ago, so every plan must be bearable: nested index look-ups are, a nested scan of a whole listing is not.
"""

from collections.abc import Sequence

import asyncpg

from allocator.store import GUARD, one
from sandbox_broker.contract.commands import ListedAccount

EXAMPLES = 20
"""Sandboxes of each kind that a held plan names."""

# A listing that has not ended is given up as soon as the next one begins. What the last one that was applied has
# listed stays, for comparison; all else goes.
BEGIN_LISTING = f"""
WITH {GUARD},
kept AS MATERIALIZED (
    SELECT (SELECT max(listing_id) FROM csp_listings WHERE applied_at IS NOT NULL) AS listing_id FROM guard
),
begun AS (
    INSERT INTO csp_listings (begun_at) SELECT now() FROM guard RETURNING listing_id
),
dropped AS (
    DELETE FROM csp_accounts a USING kept WHERE a.listing_id IS DISTINCT FROM kept.listing_id
),
forgotten AS (
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

_IS_LISTED = "EXISTS (SELECT FROM csp_accounts a WHERE a.listing_id = $2 AND a.sandbox_id = s.sandbox_id)"

# Sandboxes that have another account id in the listing than here.
_MOVING = """
moving AS MATERIALIZED (
    SELECT s.sandbox_id, s.status, a.external_id
    FROM guard, csp_accounts a JOIN sandboxes s ON s.sandbox_id = a.sandbox_id
    WHERE a.listing_id = {listing_id} AND s.external_id <> a.external_id
      AND s.status IN ('available', 'allocated', 'stale')
)
"""

# What there is to know before a listing is applied. outdated: one that was begun later has been applied already.
WEIGH_LISTING = f"""
WITH {GUARD},
{_MOVING.format(listing_id="$2")},
lacking AS MATERIALIZED (
    SELECT s.status FROM guard, sandboxes s
    WHERE (s.status = 'available' OR s.status = 'allocated' AND s.missing_since IS NULL) AND NOT {_IS_LISTED}
)
SELECT epoch,
    l.applied_at IS NOT NULL AS applied,
    l.listing_id IS NULL OR EXISTS (
        SELECT FROM csp_listings later WHERE later.listing_id > $2 AND later.applied_at IS NOT NULL
    ) AS outdated,
    (SELECT count(*) FROM csp_accounts WHERE listing_id = $2) AS listed,
    (SELECT count(*) FROM sandboxes WHERE status IN ('available', 'allocated')) AS pool,
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
            FROM (SELECT sandbox_id, name FROM {table} ORDER BY sandbox_id LIMIT {EXAMPLES}) example
        )
    )"""


# Only the first time, so that a command that comes twice announces it once.
HOLD_LISTING = f"""
WITH {GUARD},
stale AS MATERIALIZED (
    SELECT s.sandbox_id, s.name FROM guard, sandboxes s WHERE s.status = 'available' AND NOT {_IS_LISTED}
),
missing AS MATERIALIZED (
    SELECT s.sandbox_id, s.name FROM guard, sandboxes s
    WHERE s.status = 'allocated' AND s.missing_since IS NULL AND NOT {_IS_LISTED}
),
discovered AS MATERIALIZED (
    SELECT a.sandbox_id, a.name FROM guard, csp_accounts a
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL
      AND NOT EXISTS (SELECT FROM sandboxes s WHERE s.sandbox_id = a.sandbox_id)
      AND NOT EXISTS (SELECT FROM leases l WHERE l.sandbox_id = a.sandbox_id)
),
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

# Gives sandboxes the account ids that CSP says they have, also where two have changed them between each other:
# the unique index allows that only by way of a third id. Two statements in one message, which PostgreSQL runs as
# one transaction; with parameters it would take only one. An account that another live sandbox keeps, because
# the listing does not move that one, is not taken over.
_MOVE_ACCOUNTS = f"""
WITH RECURSIVE {_GUARD_OF_EPOCH},
{_MOVING},
held AS MATERIALIZED (
    SELECT m.sandbox_id, h.sandbox_id AS keeper
    FROM moving m JOIN sandboxes h ON h.external_id = m.external_id AND h.status <> 'deleted'
),
blocked AS (
    SELECT sandbox_id FROM held WHERE keeper NOT IN (SELECT sandbox_id FROM moving)
    UNION
    SELECT held.sandbox_id FROM held JOIN blocked ON blocked.sandbox_id = held.keeper
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

# All of a listing happens once, because `applied_at` is set once.
# discovered: what is known is never inserted again, whatever its state, so what was deleted stays deleted; nor is
# what was leased once and whose record has been forgotten.
# reopened: CSP said that it is deleted, and still lists it. That ends in CSP, never with a student (ADR 7). What
# went from stale to deleted was never used, so there is no deletion of it to repeat.
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
unlisted AS MATERIALIZED (
    SELECT s.sandbox_id FROM opening, sandboxes s
    WHERE s.status = 'available' AND NOT {_IS_LISTED}
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
    SELECT 'sync.completed', NULL, outcome || jsonb_build_object('listing_id', listing_id) FROM applied
)
SELECT epoch, c.* FROM guard LEFT JOIN counted c ON true
"""

# Flags what a student holds and CSP no longer lists, and takes the flag from what it lists again; also counts
# what is in CSP and should not be, for the gauge.
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
found AS MATERIALIZED (
    SELECT count(*) AS leaked FROM latest, csp_accounts a LEFT JOIN sandboxes s ON s.sandbox_id = a.sandbox_id
    WHERE a.listing_id = $2 AND a.external_id IS NOT NULL
      AND (s.sandbox_id IS NULL OR s.status = 'deleted' AND s.status_since <= latest.begun_at - $3::interval)
),
noted AS (
    UPDATE csp_listings l SET outcome = l.outcome || to_jsonb(found) FROM found, latest
    WHERE l.listing_id = latest.listing_id
)
SELECT epoch, l.outcome || to_jsonb(found) AS outcome
FROM guard, found, csp_listings l WHERE l.listing_id = $2
"""

# Corrects the names of a piece of the listing, those after $3. At most half of what is available is locked at a
# time, so that the pool does not look empty meanwhile.
REFRESH_SANDBOXES = f"""
WITH {GUARD},
room AS MATERIALIZED (
    SELECT greatest(1, count(*) / 2) AS rows
    FROM (SELECT FROM sandboxes WHERE available_since IS NOT NULL LIMIT 2 * $4::int) available
),
renamed AS MATERIALIZED (
    SELECT r.* FROM guard, room CROSS JOIN LATERAL (
        SELECT s.sandbox_id, a.name, a.sfdc_account_id
        FROM csp_accounts a JOIN sandboxes s ON s.sandbox_id = a.sandbox_id
        WHERE a.listing_id = $2 AND a.sandbox_id > $3 AND a.external_id IS NOT NULL
          AND s.status IN ('available', 'allocated')
          AND (s.name, s.sfdc_account_id) IS DISTINCT FROM (a.name, a.sfdc_account_id)
        ORDER BY a.sandbox_id LIMIT room.rows
        FOR NO KEY UPDATE OF s SKIP LOCKED
    ) r
),
refreshed AS (
    UPDATE sandboxes s SET name = r.name, sfdc_account_id = r.sfdc_account_id
    FROM renamed r WHERE s.sandbox_id = r.sandbox_id
)
SELECT epoch, (SELECT max(sandbox_id) FROM renamed) AS last FROM guard
"""

# For the gauges: whether the newest listing that has ended is held, what the last applied one found in CSP that is
# not in the pool, and what students hold that is no longer in CSP.
SYNC_STATE = """
SELECT
    coalesce((
        SELECT held_at IS NOT NULL FROM csp_listings
        WHERE coalesce(applied_at, held_at) IS NOT NULL ORDER BY listing_id DESC LIMIT 1
    ), false) AS held,
    coalesce((
        SELECT (outcome->>'leaked')::bigint FROM csp_listings
        WHERE applied_at IS NOT NULL ORDER BY listing_id DESC LIMIT 1
    ), 0) AS leaked,
    (SELECT count(*) FROM sandboxes WHERE status = 'allocated' AND missing_since IS NOT NULL) AS missing
"""


async def stage_listing(
    connection: asyncpg.Connection,
    epoch: int,
    listing_id: int,
    accounts: Sequence[ListedAccount],
    unreadable: Sequence[str],
) -> int:
    """Keeps a piece aside; of an unreadable record there is only its sandbox's id. Returns how many are new."""
    blank = [None] * len(unreadable)
    row = await one(
        connection,
        STAGE_LISTING,
        epoch,
        listing_id,
        [*(account.sandbox_id for account in accounts), *unreadable],
        [*(account.external_id for account in accounts), *blank],
        [*(account.name for account in accounts), *blank],
        [*(account.sfdc_account_id for account in accounts), *blank],
        [*(account.created_at for account in accounts), *blank],
    )
    staged: int = row["staged"]
    return staged


async def move_accounts(connection: asyncpg.Connection, epoch: int, listing_id: int) -> None:
    """Raises asyncpg.UniqueViolationError when a sandbox changed meanwhile: repeat."""
    await connection.execute(_MOVE_ACCOUNTS.format(epoch=int(epoch), listing_id=int(listing_id)))
