"""The end of leases: by the student, by the end of the play, by expiry, and by an administrator.

The statements follow the rules for generic plans in `sql/allocations.py`.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypedDict

from allocator.write_session import GUARD, WriteSession
from sandbox_broker.contract.commands import EndPlay, ReleaseSandbox


def has_secret(lease: str, given: str, nonce: str) -> str:
    """Return the SQL condition that the client knows the secret of the lease, if it has one.

    The parameters are the alias of the lease, and expressions for the hash from the client and for random bytes.
    The time of comparing two hashes with random bytes says nothing about the stored hash.
    """
    return (
        f"(num_nulls({lease}.secret_hash) = 1 "
        f"OR coalesce(sha256({lease}.secret_hash || {nonce}) = sha256({given} || {nonce}), false))"
    )


def is_in_scope(lease: str, scope: str) -> str:
    """Return the SQL condition that the lease was made with the token of this name; NULL is any token."""
    return f"({scope} IS NULL OR coalesce({lease}.token = {scope}, false))"


def end_leases(deletion_due: str = "now()", hold_until: str = "NULL") -> str:
    """Return the CTEs that end the leases of the CTE `ending (lease_id, sandbox_id, reason, note, request_id,
    traceparent)`, erase the passwords of their logins, and request the deletion of their sandboxes. The deletion
    waits for the removal of a login, at most for the time that its claim has set. A running attempt to create a
    login keeps its claim, so that the removal comes after it.

    The parameters are SQL expressions for the time of the deletion, and for the end of the hold before it.
    """
    return f"""
ending_login AS MATERIALIZED (
    SELECT e.*, a.sandbox_id AS login, a.removal_wait
    FROM ending e LEFT JOIN LATERAL (
        SELECT sandbox_id, removal_wait FROM accesses kept_login
        WHERE kept_login.sandbox_id = e.sandbox_id LIMIT 1 FOR UPDATE
    ) a ON true
),
ended AS (
    UPDATE leases l SET ended_at = now(), end_reason = e.reason, end_note = e.note
    FROM ending_login e
    WHERE l.lease_id = ANY (ARRAY[e.lease_id]) AND num_nulls(l.ended_at) = 1
    RETURNING l.sandbox_id, l.holder, l.track_name, e.reason, e.request_id, e.traceparent, e.login, e.removal_wait
),
login_ended AS (
    UPDATE accesses erased
    SET ended_at = now(), password = NULL, password_key = NULL,
        state = CASE WHEN erased.first_claimed_at IS NULL THEN 'removed' ELSE 'removing' END,
        due_at = CASE
            WHEN erased.claim IS NOT NULL THEN erased.due_at WHEN erased.first_claimed_at IS NOT NULL THEN now()
        END
    FROM ended
    WHERE erased.sandbox_id = ANY (ARRAY[ended.login])
    RETURNING erased.sandbox_id, erased.state
),
moved AS (
    UPDATE sandboxes s
    SET status = 'pending_deletion', status_since = now(), deletion_requested_at = now(),
        deletion_due_at = greatest({deletion_due}, now() + ended.removal_wait),
        deletion_hold_until = {hold_until}, deletion_reason = ended.reason,
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
    RETURNING outbox_id
),
announced_login AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'access.ended', m.sandbox_id, jsonb_build_object(
        'sandbox_id', m.sandbox_id, 'external_id', m.external_id, 'name', m.name, 'holder', m.holder
    )
    FROM moved m
    WHERE m.sandbox_id IN (SELECT sandbox_id FROM login_ended WHERE state = 'removing')
      AND EXISTS (SELECT FROM announced)
)
"""


# Two minutes cover every redelivery: a request expires after at most one minute, in RabbitMQ and in the queues of
# the clients.
HOLDERS_WITH_ENDED_LEASE = f"""
WITH {GUARD}
SELECT epoch, ARRAY(
    SELECT ended.holder
    FROM leases ended LEFT JOIN LATERAL (
        SELECT lease_id FROM leases active WHERE active.holder = ended.holder AND active.ended_at IS NULL LIMIT 1
    ) active_lease ON true
    WHERE '' || ended.holder = ANY ($2::text[]) AND ended.ended_at > now() - interval '2 minutes'
      AND num_nulls(active_lease.lease_id) = 1
    UNION
    SELECT claimed.first_holder FROM leases claimed
    WHERE claimed.first_holder = ANY ($2::text[]) AND claimed.claimed_at > now() - interval '2 minutes'
) AS holders
FROM guard
"""

RELEASE = f"""
WITH {GUARD},
request AS MATERIALIZED (
    SELECT r.*
    FROM guard, unnest($2::int[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::text[])
        AS r (index, sandbox_id, holder, request_id, traceparent, secret_hash, scope)
),
target AS MATERIALIZED (
    SELECT r.index, r.sandbox_id, r.request_id, r.traceparent,
        s.status, s.deletion_requested_at, l.lease_id, l.ended_at,
        s.sandbox_id IS NOT NULL OR l.lease_id IS NOT NULL AS exists,
        {is_in_scope("l", "r.scope")} AS in_scope,
        l.holder = r.holder AND {is_in_scope("l", "r.scope")}
            AND {has_secret("l", "r.secret_hash", "$9::bytea")} AS own
    FROM request r
    LEFT JOIN LATERAL (SELECT * FROM sandboxes WHERE sandbox_id = r.sandbox_id LIMIT 1) s ON true
    LEFT JOIN LATERAL (SELECT * FROM leases WHERE sandbox_id = r.sandbox_id LIMIT 1) l ON true
),
ending AS MATERIALIZED (
    SELECT DISTINCT ON (lease_id)
        lease_id, sandbox_id, 'student' AS reason, NULL::text AS note, request_id, traceparent
    FROM target WHERE own AND ended_at IS NULL ORDER BY lease_id, index
),
{end_leases()}
SELECT t.index, t.exists, t.in_scope, coalesce(t.own, false) AS own,
    CASE WHEN t.moved THEN 'pending_deletion' ELSE coalesce(t.status, 'deleted') END AS status,
    floor(extract(epoch FROM CASE WHEN t.moved THEN now() ELSE coalesce(t.deletion_requested_at, t.ended_at) END))
        ::bigint AS deletion_requested_at
FROM (SELECT target.*, sandbox_id IN (SELECT sandbox_id FROM moved) AS moved FROM target) t
ORDER BY t.index
"""

END_PLAYS = f"""
WITH {GUARD},
request AS MATERIALIZED (
    SELECT r.*
    FROM guard, unnest($2::int[], $3::text[], $4::bigint[], $5::text[], $6::text[])
        AS r (index, holder, ended_at, request_id, traceparent)
),
target AS MATERIALIZED (
    SELECT r.*, l.lease_id, l.sandbox_id, floor(extract(epoch FROM l.allocated_at)) <= r.ended_at AS is_of_play
    FROM request r
    LEFT JOIN LATERAL (
        SELECT lease_id, sandbox_id, allocated_at FROM leases active
        WHERE active.holder = r.holder AND active.ended_at IS NULL LIMIT 1
    ) l ON true
),
ending AS MATERIALIZED (
    SELECT DISTINCT ON (lease_id)
        lease_id, sandbox_id, 'play_ended' AS reason, NULL::text AS note, request_id, traceparent
    FROM target WHERE is_of_play ORDER BY lease_id, index
),
{end_leases()}
SELECT index, sandbox_id, is_of_play, sandbox_id IN (SELECT sandbox_id FROM moved) AS moved FROM target
ORDER BY index
"""

# The grace period is for students at work. A standby lease has none, because no student has arrived.
EXPIRE = f"""
WITH {GUARD},
ending AS MATERIALIZED (
    SELECT overdue.lease_id, overdue.sandbox_id, overdue.reason, NULL::text AS note, NULL::text AS request_id,
        NULL::text AS traceparent
    FROM guard CROSS JOIN LATERAL (
        SELECT * FROM (
            SELECT lease_id, sandbox_id, 'expired' AS reason FROM leases
            WHERE end_reason IS NULL AND expires_at <= now() - $2::interval AND mode <> 'standby'
            ORDER BY expires_at LIMIT $3 FOR UPDATE SKIP LOCKED
        ) expired
        UNION ALL
        SELECT * FROM (
            SELECT lease_id, sandbox_id, 'unclaimed' FROM leases
            WHERE end_reason IS NULL AND mode = 'standby' AND expires_at <= now()
            ORDER BY expires_at LIMIT $3 FOR UPDATE SKIP LOCKED
        ) unclaimed
        LIMIT $3
    ) overdue
),
{end_leases()}
SELECT epoch, ARRAY(SELECT sandbox_id FROM moved WHERE reason = 'expired') AS expired,
    ARRAY(SELECT sandbox_id FROM moved WHERE reason = 'unclaimed') AS unclaimed
FROM guard
"""

# By an administrator, for any holder.
END_LEASE = f"""
WITH {GUARD},
target AS MATERIALIZED (
    SELECT s.sandbox_id, s.status, s.deletion_requested_at, l.lease_id, l.ended_at
    FROM guard, sandboxes s LEFT JOIN leases l ON l.sandbox_id = s.sandbox_id
    WHERE s.sandbox_id = $2
),
ending AS MATERIALIZED (
    SELECT lease_id, sandbox_id, 'admin' AS reason, $3::text AS note,
        $4::text AS request_id, $5::text AS traceparent
    FROM target WHERE lease_id IS NOT NULL AND ended_at IS NULL
),
{end_leases()}
SELECT epoch, t.lease_id,
    CASE WHEN m.sandbox_id IS NOT NULL THEN 'pending_deletion' ELSE t.status END AS status,
    floor(extract(epoch FROM coalesce(m.deletion_requested_at, t.deletion_requested_at, t.ended_at)))::bigint
        AS deletion_requested_at,
    m.sandbox_id IS NOT NULL AS changed
FROM guard LEFT JOIN target t ON true LEFT JOIN moved m ON true
"""


class ReleaseRow(TypedDict):
    index: int
    exists: bool
    in_scope: bool
    """Whether the token of the sender reaches the lease."""
    own: bool
    status: str
    deletion_requested_at: int | None


class EndPlayRow(TypedDict):
    index: int
    sandbox_id: str | None
    """None: the holder has no lease."""
    is_of_play: bool | None
    """False: the lease began after the end of the play."""
    moved: bool | None


class ExpireRow(TypedDict):
    """Ids of the sandboxes whose leases were ended."""

    expired: list[str]
    unclaimed: list[str]


class EndLeaseRow(TypedDict):
    lease_id: int | None
    """None: the sandbox was never leased."""
    status: str | None
    """None: the sandbox does not exist."""
    deletion_requested_at: int | None
    changed: bool


async def holders_with_ended_lease(session: WriteSession, *, holders: Sequence[str]) -> list[str]:
    """Return the `holders` without a lease, but with one ended within the last two minutes."""
    row = await session.fetch_one(HOLDERS_WITH_ENDED_LEASE, holders)
    result: list[str] = row["holders"]
    return result


async def release(
    session: WriteSession, commands: Sequence[ReleaseSandbox], scopes: Sequence[str | None]
) -> list[ReleaseRow]:
    """Return one row per command, in order. Per command, `scopes` has a token: the sender may release only
    its leases. None permits any."""
    return await session.fetch(
        RELEASE,
        list(range(len(commands))),
        [command.sandbox_id for command in commands],
        [command.holder for command in commands],
        [command.request_id for command in commands],
        [command.traceparent for command in commands],
        [command.secret_hash and bytes.fromhex(command.secret_hash) for command in commands],
        scopes,
        os.urandom(16),
    )


async def end_plays(session: WriteSession, commands: Sequence[EndPlay]) -> list[EndPlayRow]:
    """Return one row per command, in order."""
    return await session.fetch(
        END_PLAYS,
        list(range(len(commands))),
        [command.holder for command in commands],
        [command.ended_at for command in commands],
        [command.request_id for command in commands],
        [command.traceparent for command in commands],
    )


async def expire(session: WriteSession, *, grace: timedelta, limit: int) -> ExpireRow:
    """End up to `limit` leases that are overdue by at least `grace`, or standby leases without a claim in time."""
    row: ExpireRow = await session.fetch_one(EXPIRE, grace, limit)
    return row


async def end_lease(
    session: WriteSession, *, sandbox_id: str, note: str | None, request_id: str | None, traceparent: str | None
) -> EndLeaseRow:
    row: EndLeaseRow = await session.fetch_one(END_LEASE, sandbox_id, note, request_id, traceparent)
    return row
