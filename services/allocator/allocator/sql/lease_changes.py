"""Changes of a lease: claim a standby lease, extend a lease, replace a broken sandbox.

Each statement handles one command. It locks the row of the lease before it reads its values, so a concurrent end of
the lease comes before or after it as a whole. The statements follow the rules for generic plans in
`sql/allocations.py`.
"""

import os
from typing import Literal, TypedDict

from allocator.sql.allocations import ANNOUNCE_SERVED, PICK_ANY, PICK_BY_PREFIX
from allocator.sql.leases import end_leases, has_secret, is_in_scope
from allocator.write_session import GUARD, WriteSession
from sandbox_broker.contract.commands import ClaimLease, ExtendLease, ReplaceSandbox

# The sandbox depends on the lease, so that both rows are locked in the order of the statements that end a lease.
_TARGET = """
    FROM guard
    LEFT JOIN LATERAL (
        SELECT * FROM leases leased WHERE leased.sandbox_id = $2 LIMIT 1 FOR UPDATE
    ) l ON true
    LEFT JOIN LATERAL (
        SELECT sandbox_id, external_id, name, sfdc_account_id, status FROM sandboxes leased_sandbox
        WHERE leased_sandbox.sandbox_id = coalesce(l.sandbox_id, $2) LIMIT 1
    ) s ON true
"""

CLAIM = f"""
WITH {GUARD},
target AS MATERIALIZED (
    SELECT l.lease_id, l.holder, l.mode, l.ended_at, l.track_name, l.allocated_at, l.expires_at, l.claimed_at,
        coalesce(l.lease_sec, $5::int) AS lease_sec,
        s.external_id, s.name, s.sfdc_account_id, s.status,
        {is_in_scope("l", "$9::text")} AS in_scope,
        (l.holder = $3 OR l.first_holder = $3) AND {is_in_scope("l", "$9::text")}
            AND {has_secret("l", "$7::bytea", "$8::bytea")} AS own,
        coalesce($4::text, l.holder) AS new_holder, other.sandbox_id AS other_sandbox_id
    {_TARGET}
    LEFT JOIN LATERAL (
        SELECT active.sandbox_id FROM leases active
        WHERE active.holder = $4 AND active.ended_at IS NULL AND active.sandbox_id || '' <> $2
        LIMIT 1
    ) other ON true
),
claimed AS (
    UPDATE leases standby
    SET mode = 'active', claimed_at = now(), expires_at = now() + make_interval(secs => t.lease_sec),
        holder = t.new_holder, first_holder = nullif(t.holder, t.new_holder)
    FROM target t
    WHERE standby.lease_id = ANY (ARRAY[t.lease_id]) AND num_nulls(standby.ended_at) = 1
      AND standby.mode || '' = 'standby' AND t.own AND t.other_sandbox_id IS NULL
    RETURNING standby.sandbox_id, standby.holder, standby.first_holder, standby.expires_at, standby.claimed_at
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'lease.claimed', c.sandbox_id, jsonb_build_object(
        'sandbox_id', c.sandbox_id, 'external_id', t.external_id, 'name', t.name, 'holder', c.holder,
        'first_holder', c.first_holder, 'track_name', t.track_name,
        'expires_at', floor(extract(epoch FROM c.expires_at))::bigint, 'request_id', $6::text
    )
    FROM claimed c CROSS JOIN target t
)
SELECT epoch, t.lease_id, t.status, t.in_scope, coalesce(t.own, false) AS own, t.ended_at IS NOT NULL AS ended,
    t.external_id, t.name, t.sfdc_account_id, t.other_sandbox_id, c.sandbox_id IS NOT NULL AS claimed,
    CASE WHEN c.sandbox_id IS NULL THEN t.mode ELSE 'active' END AS mode, coalesce(c.holder, t.holder) AS holder,
    floor(extract(epoch FROM t.allocated_at))::bigint AS allocated_at,
    floor(extract(epoch FROM coalesce(c.expires_at, t.expires_at)))::bigint AS expires_at,
    floor(extract(epoch FROM coalesce(c.claimed_at, t.claimed_at)))::bigint AS claimed_at
FROM guard LEFT JOIN target t ON true LEFT JOIN claimed c ON true
"""

# The condition of the limit reads the locked row, so concurrent extensions never exceed the limit together.
EXTEND = f"""
WITH {GUARD},
target AS MATERIALIZED (
    SELECT l.lease_id, l.holder, l.mode, l.ended_at, l.track_name, l.expires_at, l.extended_sec,
        coalesce(l.max_extension_sec, $8::int) AS max_extension_sec,
        s.external_id, s.name, s.status,
        {is_in_scope("l", "$11::text")} AS in_scope,
        $3::text IS NULL OR l.holder = $3 AND {is_in_scope("l", "$11::text")}
            AND {has_secret("l", "$9::bytea", "$10::bytea")} AS own,
        granted.extension_sec AS granted_sec, granted.expires_at AS granted_expires_at
    {_TARGET}
    LEFT JOIN LATERAL (
        SELECT extension_sec, expires_at FROM lease_extensions WHERE extension_id = $4 LIMIT 1
    ) granted ON true
),
extended AS (
    UPDATE leases current
    SET expires_at = current.expires_at + make_interval(secs => $5::int),
        extended_sec = current.extended_sec + CASE WHEN $3::text IS NULL THEN 0 ELSE $5::int END
    FROM target t
    WHERE current.lease_id = ANY (ARRAY[t.lease_id]) AND num_nulls(current.ended_at) = 1
      AND t.own AND t.granted_sec IS NULL
      AND ($3::text IS NULL OR (t.mode = 'active' AND current.extended_sec + $5::int <= t.max_extension_sec))
    RETURNING current.lease_id, current.sandbox_id, current.holder, current.track_name, current.expires_at,
        current.extended_sec
),
recorded AS (
    INSERT INTO lease_extensions (extension_id, lease_id, extension_sec, expires_at)
    SELECT $4, e.lease_id, $5::int, e.expires_at FROM extended e
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'lease.extended', e.sandbox_id, jsonb_build_object(
        'sandbox_id', e.sandbox_id, 'external_id', t.external_id, 'name', t.name, 'holder', e.holder,
        'track_name', e.track_name, 'reason', CASE WHEN $3::text IS NULL THEN 'admin' ELSE 'student' END,
        'note', $6::text, 'extension_sec', $5::int,
        'expires_at', floor(extract(epoch FROM e.expires_at))::bigint, 'request_id', $7::text
    )
    FROM extended e CROSS JOIN target t
)
SELECT epoch, t.lease_id, t.status, t.in_scope, coalesce(t.own, false) AS own, t.ended_at IS NOT NULL AS ended,
    t.mode, t.granted_sec, e.lease_id IS NOT NULL AS extended,
    t.max_extension_sec - t.extended_sec AS left_sec,
    floor(extract(epoch FROM coalesce(e.expires_at, t.granted_expires_at, t.expires_at)))::bigint AS expires_at,
    floor(extract(epoch FROM coalesce(e.expires_at, t.expires_at)))::bigint
        - coalesce(e.extended_sec, t.extended_sec) + t.max_extension_sec AS max_expires_at
FROM guard LEFT JOIN target t ON true LEFT JOIN extended e ON true
"""

# One row or none in every CTE. The statement locks the old sandbox before it picks the new one with SKIP LOCKED, so
# it never waits while it holds a new sandbox. Without a new sandbox no row reaches `ending`, and nothing changes.
# With one, the student no longer waits for it.
REPLACE = f"""
WITH {GUARD},
target AS MATERIALIZED (
    SELECT l.*, s.external_id, s.name, s.status, locked.sandbox_id AS locked_sandbox_id,
        {is_in_scope("l", "$13::text")} AS in_scope,
        $3::text IS NULL OR l.holder = $3 AND {is_in_scope("l", "$13::text")}
            AND {has_secret("l", "$11::bytea", "$12::bytea")} AS own,
        $3::text IS NULL OR l.replacements < coalesce(l.max_replacements, $10::int) AS within_limit,
        coalesce(l.name_prefix, '') AS prefix,
        left(l.name_prefix, -1) || chr(ascii(right(l.name_prefix, 1)) + 1) AS prefix_end
    {_TARGET}
    LEFT JOIN LATERAL (
        SELECT old.sandbox_id FROM sandboxes old WHERE old.sandbox_id = s.sandbox_id LIMIT 1 FOR UPDATE
    ) locked ON true
),
demand AS MATERIALIZED (
    SELECT t.*, 1 AS number FROM target t
    WHERE t.lease_id IS NOT NULL AND t.ended_at IS NULL AND t.own AND t.within_limit
),
picked AS MATERIALIZED (
    SELECT d.*, (ARRAY(
        SELECT oldest_of_all.sandbox_id
        FROM (SELECT WHERE d.prefix = '') without_prefix CROSS JOIN LATERAL ({PICK_ANY}) oldest_of_all
        UNION ALL
        SELECT oldest_fit.sandbox_id
        FROM (SELECT WHERE d.prefix <> '') with_prefix CROSS JOIN LATERAL ({PICK_BY_PREFIX}) oldest_fit
    ))[1] AS new_sandbox_id
    FROM demand d
),
ending AS MATERIALIZED (
    SELECT lease_id, sandbox_id, 'broken' AS reason, $4::text AS note, $5::text AS request_id,
        $6::text AS traceparent
    FROM picked WHERE new_sandbox_id IS NOT NULL
),
{end_leases("now() + $7::interval", "now() + $7::interval")},
claimed AS (
    UPDATE sandboxes n SET status = 'allocated', status_since = now(), track_name = p.track_name
    FROM ended CROSS JOIN picked p
    WHERE n.sandbox_id = ANY (ARRAY[p.new_sandbox_id]) AND n.status || '' = 'available'
    RETURNING n.sandbox_id, n.name, n.external_id, n.sfdc_account_id
),
leased AS (
    INSERT INTO leases (
        sandbox_id, holder, track_name, name_prefix, mode, claimed_at, first_holder, extended_sec, replaces,
        replacements, policy, lease_sec, max_extension_sec, standby_sec, max_replacements, token, secret_hash,
        expires_at
    )
    SELECT c.sandbox_id, p.holder, p.track_name, p.name_prefix, p.mode, p.claimed_at, p.first_holder,
        p.extended_sec, p.sandbox_id, p.replacements + 1, p.policy, p.lease_sec, p.max_extension_sec,
        p.standby_sec, p.max_replacements, p.token, p.secret_hash,
        greatest(
            p.expires_at,
            now() + make_interval(secs => CASE
                WHEN p.mode = 'standby' THEN coalesce(p.standby_sec, $9::int) ELSE coalesce(p.lease_sec, $8::int)
            END)
        )
    FROM claimed c CROSS JOIN picked p
    RETURNING sandbox_id, allocated_at, expires_at
),
served AS (
    DELETE FROM waiting w USING claimed c CROSS JOIN picked p
    WHERE w.holder = ANY (ARRAY[p.holder COLLATE "C"]) AND w.command ->> 'type' = 'ReplaceSandbox'
    RETURNING w.*, c.sandbox_id, c.name
),
{ANNOUNCE_SERVED},
login_requested AS (
    INSERT INTO accesses (sandbox_id, groups)
    SELECT l.sandbox_id, a.groups FROM leased l CROSS JOIN picked p CROSS JOIN LATERAL (
        SELECT groups FROM accesses old_login WHERE old_login.sandbox_id = p.sandbox_id LIMIT 1
    ) a
),
announced_replacement AS (
    INSERT INTO outbox (type, subject, data)
    SELECT event.* FROM leased l CROSS JOIN claimed c CROSS JOIN picked p CROSS JOIN announced
    CROSS JOIN LATERAL (VALUES
        ('sandbox.allocated', l.sandbox_id, jsonb_build_object(
            'sandbox_id', l.sandbox_id, 'external_id', c.external_id, 'name', c.name, 'holder', p.holder,
            'track_name', p.track_name, 'expires_at', floor(extract(epoch FROM l.expires_at))::bigint,
            'mode', p.mode, 'replaces', p.sandbox_id
        )),
        ('sandbox.replaced', p.sandbox_id, jsonb_build_object(
            'sandbox_id', p.sandbox_id, 'external_id', p.external_id, 'name', p.name, 'holder', p.holder,
            'track_name', p.track_name, 'reason', CASE WHEN $3::text IS NULL THEN 'admin' ELSE 'student' END,
            'note', $4::text, 'replaced_by', l.sandbox_id,
            'hold_until', floor(extract(epoch FROM now() + $7::interval))::bigint, 'request_id', $5::text
        ))
    ) event (type, subject, data)
    UNION ALL
    SELECT 'pool.exhausted', NULL, jsonb_build_object('name_prefix', nullif(prefix, ''))
    FROM picked WHERE new_sandbox_id IS NULL
),
replacement AS MATERIALIZED (
    SELECT l.sandbox_id, c.name, c.external_id, c.sfdc_account_id, l.allocated_at, l.expires_at, p.mode,
        p.claimed_at, true AS new, false AS over
    FROM leased l CROSS JOIN claimed c CROSS JOIN picked p
    UNION ALL
    SELECT earlier.sandbox_id, s.name, s.external_id, s.sfdc_account_id, earlier.allocated_at, earlier.expires_at,
        earlier.mode, earlier.claimed_at, false,
        num_nulls(earlier.ended_at) = 0 OR $3::text IS NOT NULL AND earlier.holder || '' <> $3
    FROM target t
    CROSS JOIN LATERAL (
        SELECT * FROM leases by_replaced WHERE by_replaced.replaces = t.sandbox_id LIMIT 1
    ) earlier
    LEFT JOIN LATERAL (
        SELECT name, external_id, sfdc_account_id FROM sandboxes new_sandbox
        WHERE new_sandbox.sandbox_id = earlier.sandbox_id LIMIT 1
    ) s ON true
)
SELECT epoch, t.lease_id, t.status, t.in_scope, coalesce(t.own, false) AS own, t.holder, t.track_name,
    t.end_reason, t.ended_at IS NOT NULL AS ended, coalesce(t.within_limit, false) AS within_limit,
    nullif(t.prefix, '') AS name_prefix,
    coalesce(t.max_replacements, $10::int) AS max_replacements,
    r.new, r.over, r.sandbox_id, r.name, r.external_id, r.sfdc_account_id, r.mode,
    floor(extract(epoch FROM r.allocated_at))::bigint AS allocated_at,
    floor(extract(epoch FROM r.expires_at))::bigint AS expires_at,
    floor(extract(epoch FROM r.claimed_at))::bigint AS claimed_at
FROM guard LEFT JOIN target t ON true LEFT JOIN replacement r ON true
"""


class _LeaseRow(TypedDict):
    """Lease of the sandbox before the statement."""

    lease_id: int | None
    """None: the sandbox was never leased."""
    status: str | None
    """Status of the sandbox. None: the pool does not contain it."""
    in_scope: bool
    """Whether the token of the sender reaches the lease."""
    own: bool
    """Whether the command may change the lease. True for every lease if an administrator sent it."""
    ended: bool


class ClaimRow(_LeaseRow):
    name: str
    external_id: str
    sfdc_account_id: str | None
    other_sandbox_id: str | None
    """Another sandbox that the new holder has."""
    claimed: bool
    """Whether this statement started the time."""
    mode: str
    holder: str
    allocated_at: int
    expires_at: int
    claimed_at: int | None


class ExtendRow(_LeaseRow):
    mode: str
    granted_sec: int | None
    """Length of the extension with this id, if it was granted before."""
    extended: bool
    """Whether this statement extended the lease."""
    left_sec: int
    """Time by which the student could extend the lease before this statement."""
    expires_at: int
    max_expires_at: int


class ReplaceRow(_LeaseRow):
    """The columns after `new` describe the lease that replaces the old one."""

    holder: str
    track_name: str | None
    end_reason: str | None
    within_limit: bool
    max_replacements: int
    name_prefix: str | None
    new: bool | None
    """None: there is no replacement. False: the sandbox had been replaced before."""
    over: bool
    """Whether the student no longer has this lease."""
    sandbox_id: str
    name: str
    external_id: str
    sfdc_account_id: str | None
    mode: Literal["active", "standby"]
    allocated_at: int
    expires_at: int
    claimed_at: int | None


async def claim(session: WriteSession, command: ClaimLease, scope: str | None) -> ClaimRow:
    """`scope` is a token in all functions of this module: the sender may change only its leases. None permits
    any."""
    row: ClaimRow = await session.fetch_one(
        CLAIM,
        command.sandbox_id,
        command.holder,
        command.new_holder,
        session.policies.settings_terms.lease_sec,
        command.request_id,
        *_access(command, scope),
    )
    return row


async def extend(session: WriteSession, command: ExtendLease, scope: str | None) -> ExtendRow:
    """Extend the lease unless it has ended, or the student would exceed the limit.

    Raises asyncpg.UniqueViolationError if another allocator granted the same extension concurrently; run it again.
    """
    row: ExtendRow = await session.fetch_one(
        EXTEND,
        command.sandbox_id,
        command.holder,
        command.extension_id,
        command.extension_sec,
        command.note,
        command.request_id,
        session.policies.settings_terms.max_extension_sec,
        *_access(command, scope),
    )
    return row


async def replace(session: WriteSession, command: ReplaceSandbox, scope: str | None) -> ReplaceRow:
    """Replace the sandbox if another one is available, and the student may have it."""
    terms = session.policies.settings_terms
    row: ReplaceRow = await session.fetch_one(
        REPLACE,
        command.sandbox_id,
        command.holder,
        command.reason,
        command.request_id,
        command.traceparent,
        session.broken_hold,
        terms.lease_sec,
        terms.standby_sec,
        terms.max_replacements,
        *_access(command, scope),
    )
    return row


def _access(
    command: ClaimLease | ExtendLease | ReplaceSandbox, scope: str | None
) -> tuple[bytes | None, bytes, str | None]:
    """Return the last parameters of each statement: the hash of the secret, random bytes, and the scope."""
    return (command.secret_hash and bytes.fromhex(command.secret_hash)) or None, os.urandom(16), scope
