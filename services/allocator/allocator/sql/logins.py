"""Logins inside sandboxes: claim the due ones, record their results, encrypt their passwords with another key.

`accesses` has one row per lease that asked for a login. Its key is the sandbox, because a sandbox has at most one
lease ever. The statement that grants the lease inserts the row. The statement that ends the lease erases the
password (`leases.end_leases`, and the constraint `accesses_password_erased`).

Exactly one user per row, whatever crashes: the first claim fixes the email and the password, and CSP refuses a
second user with the same email in an account. Each attempt therefore finds or creates the same user with the same
password. The claim id is the condition of each record, so the record of a replaced attempt has no effect.
"""

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, TypedDict

from allocator.write_session import GUARD, WriteSession

# The local part of an email has at most 64 characters. An id that is longer, or has other characters, becomes a
# readable part and a hash.
_EMAIL_NAME = """
CASE
    WHEN l.holder ~ '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' AND length(l.holder) <= 64 THEN l.holder
    ELSE left(trim('-' FROM regexp_replace(l.holder, '[^A-Za-z0-9_]+', '-', 'g')), 40)
        || '-' || left(encode(sha256(convert_to(l.holder, 'UTF8')), 'hex'), 16)
END
"""

# Parameters: epoch, duration of the claims, limit, largest number of running claims, domain of the emails, longest
# wait for the removal, an encrypted password for each new login, the name of its key.
CLAIM = f"""
WITH {GUARD},
running AS MATERIALIZED (
    SELECT (SELECT count(*) FROM accesses WHERE claim IS NOT NULL AND due_at > now()) AS number FROM guard
),
due AS MATERIALIZED (
    SELECT a.sandbox_id, row_number() OVER () AS number
    FROM running CROSS JOIN LATERAL (
        SELECT sandbox_id FROM accesses WHERE due_at <= now()
        ORDER BY due_at LIMIT least($3::int, greatest($4::int - running.number, 0)) FOR UPDATE SKIP LOCKED
    ) a
),
claimed AS (
    UPDATE accesses a
    SET claim = gen_random_uuid(), due_at = now() + $2::interval,
        first_claimed_at = coalesce(a.first_claimed_at, now()), removal_wait = $6::interval,
        email = coalesce(a.email, l.email_name || '@' || $5::text),
        password = CASE WHEN a.ended_at IS NULL THEN coalesce(a.password, ($7::text[])[due.number]) END,
        password_key = CASE
            WHEN a.ended_at IS NULL THEN CASE WHEN a.password IS NULL THEN $8::text ELSE a.password_key END
        END
    FROM due CROSS JOIN LATERAL (
        SELECT {_EMAIL_NAME} AS email_name, s.external_id
        FROM leases l JOIN sandboxes s USING (sandbox_id) WHERE l.sandbox_id = due.sandbox_id
    ) l
    WHERE a.sandbox_id = due.sandbox_id
    RETURNING a.*, l.external_id, due.number,
        extract(epoch FROM now() - coalesce(a.ended_at, a.requested_at))::float AS waiting_sec
)
SELECT epoch,
    extract(epoch FROM (SELECT min(due_at) FROM accesses) - now())::float AS next_in_sec,
    c.sandbox_id, c.external_id, c.claim, c.ended_at IS NOT NULL AS remove, c.email, c.groups::text AS groups,
    c.password, c.user_id, c.attempts, c.waiting_sec
FROM guard LEFT JOIN claimed c ON true ORDER BY c.number
"""

_EVENT = """
jsonb_build_object('sandbox_id', s.sandbox_id, 'external_id', s.external_id, 'name', s.name, 'holder', l.holder)
"""
"""Fields of every event about a login."""

# The lease may have ended during the attempt. The user is then to be deleted.
RECORD = f"""
WITH {GUARD},
recorded AS (
    UPDATE accesses a
    SET user_id = $4, claim = NULL, error = NULL,
        state = CASE WHEN a.ended_at IS NULL THEN 'ready' ELSE a.state END,
        ready_at = CASE WHEN a.ended_at IS NULL THEN now() END,
        due_at = CASE WHEN a.ended_at IS NULL THEN NULL ELSE now() END
    FROM guard
    WHERE a.sandbox_id = $2 AND a.claim = $3 AND a.state IN ('pending', 'failed', 'removing')
    RETURNING a.sandbox_id, a.state, extract(epoch FROM now() - a.requested_at)::float AS after_sec
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'access.ready', s.sandbox_id, {_EVENT} || jsonb_build_object('after_sec', floor(r.after_sec)::bigint)
    FROM recorded r JOIN sandboxes s USING (sandbox_id) JOIN leases l USING (sandbox_id) WHERE r.state = 'ready'
)
SELECT epoch, r.state, r.after_sec FROM guard LEFT JOIN recorded r ON true
"""

RECORD_FAILURE = f"""
WITH {GUARD},
target AS MATERIALIZED (
    SELECT a.sandbox_id, a.state FROM guard, accesses a WHERE a.sandbox_id = $2 AND a.claim = $3 FOR UPDATE
),
recorded AS (
    UPDATE accesses a
    SET claim = NULL, attempts = a.attempts + 1, error = $4, due_at = now() + $5::interval,
        state = CASE WHEN t.state = 'pending' AND $6 THEN 'failed' ELSE t.state END
    FROM target t
    WHERE a.sandbox_id = t.sandbox_id AND a.claim = $3 AND a.state IN ('pending', 'failed', 'removing')
    RETURNING a.sandbox_id, a.state, a.attempts, t.state AS earlier_state
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'access.failed', s.sandbox_id, {_EVENT} || jsonb_build_object('error', $4::text)
    FROM recorded r JOIN sandboxes s USING (sandbox_id) JOIN leases l USING (sandbox_id)
    WHERE r.state = 'failed' AND r.earlier_state = 'pending'
)
SELECT epoch, r.state, r.attempts, coalesce(r.state <> r.earlier_state, false) AS has_failed
FROM guard LEFT JOIN recorded r ON true
"""

# The deletion of the sandbox waited for the removal, unless it has begun since. A broken sandbox stays on hold.
RECORD_REMOVAL = f"""
WITH {GUARD},
recorded AS (
    UPDATE accesses a
    SET state = 'removed', removed_at = now(), due_at = NULL, claim = NULL, error = NULL, email = NULL,
        user_id = NULL
    FROM guard
    WHERE a.sandbox_id = $2 AND a.claim = $3 AND a.state IN ('removing', 'remains')
    RETURNING a.sandbox_id
),
freed AS (
    UPDATE sandboxes s SET deletion_due_at = greatest(now(), coalesce(s.deletion_hold_until, now()))
    FROM recorded r
    WHERE s.sandbox_id = r.sandbox_id AND s.status = 'pending_deletion' AND s.deletion_attempts = 0
      AND s.deletion_claim IS NULL AND s.deletion_due_at > now()
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'access.removed', s.sandbox_id, {_EVENT}
    FROM recorded r JOIN sandboxes s USING (sandbox_id) JOIN leases l USING (sandbox_id)
)
SELECT epoch, EXISTS (SELECT FROM recorded) AS changed FROM guard
"""

OUTDATED = f"""
WITH {GUARD}
SELECT epoch, a.sandbox_id, a.password FROM guard LEFT JOIN LATERAL (
    SELECT sandbox_id, password FROM accesses
    WHERE password IS NOT NULL AND password_key <> $2 AND sandbox_id > $3 ORDER BY sandbox_id LIMIT $4
) a ON true
"""

# The old password is the condition, so a login that ended meanwhile stays without a password. The statement counts
# in the snapshot from before its own changes.
REPLACE_PASSWORDS = f"""
WITH {GUARD},
replaced AS (
    UPDATE accesses a SET password = r.new_password, password_key = $2
    FROM guard CROSS JOIN unnest($3::text[], $4::text[], $5::text[]) AS r (sandbox_id, old_password, new_password)
    WHERE a.sandbox_id = r.sandbox_id AND a.password = r.old_password
    RETURNING 1
)
SELECT epoch, (SELECT count(*) FROM replaced) AS rotated,
    (SELECT count(*) FROM accesses WHERE password IS NOT NULL AND password_key <> $2)
        - (SELECT count(*) FROM replaced) AS outdated
FROM guard
"""


class ClaimRow(TypedDict):
    """Claimed login. `next_in_sec` is the same in all rows. Without claimed logins there is one row with None in
    the other columns."""

    next_in_sec: float | None
    sandbox_id: str | None
    external_id: str
    claim: uuid.UUID
    remove: bool
    email: str
    groups: str
    """JSON list."""
    password: str | None
    user_id: str | None
    attempts: int
    waiting_sec: float


class RecordRow(TypedDict):
    state: str | None
    """State after the record. None: the claim has ended."""
    after_sec: float


class FailureRow(TypedDict):
    state: str | None
    """State after the record. None: the claim has ended."""
    attempts: int
    has_failed: bool
    """Whether this record made the login fail."""


class OutdatedPassword(NamedTuple):
    sandbox_id: str
    password: str


async def claim(
    session: WriteSession,
    *,
    duration: timedelta,
    max_running: int,
    email_domain: str,
    removal_wait: timedelta,
    passwords: Sequence[str],
    key_id: str,
) -> list[ClaimRow]:
    """Claim up to as many due logins as there are `passwords`. Each new login keeps one of these."""
    return await session.fetch(
        CLAIM, duration, len(passwords), max_running, email_domain, removal_wait, passwords, key_id
    )


async def record(session: WriteSession, *, sandbox_id: str, claim_id: uuid.UUID, user_id: str) -> RecordRow:
    row: RecordRow = await session.fetch_one(RECORD, sandbox_id, claim_id, user_id)
    return row


async def record_failure(
    session: WriteSession, *, sandbox_id: str, claim_id: uuid.UUID, error: str, retry_in: timedelta, failed: bool
) -> FailureRow:
    row: FailureRow = await session.fetch_one(RECORD_FAILURE, sandbox_id, claim_id, error, retry_in, failed)
    return row


async def record_removal(session: WriteSession, *, sandbox_id: str, claim_id: uuid.UUID) -> bool:
    """Return whether the claim was valid."""
    changed: bool = (await session.fetch_one(RECORD_REMOVAL, sandbox_id, claim_id))["changed"]
    return changed


async def find_outdated_passwords(
    session: WriteSession, *, key_id: str, after: str, limit: int
) -> list[OutdatedPassword]:
    """Return passwords that another key encrypts, in the order of their sandbox ids, starting behind `after`."""
    rows = await session.fetch(OUTDATED, key_id, after, limit)
    return [OutdatedPassword(row["sandbox_id"], row["password"]) for row in rows if row["sandbox_id"] is not None]


async def replace_passwords(
    session: WriteSession, *, key_id: str, passwords: Sequence[tuple[OutdatedPassword, str]]
) -> tuple[int, int]:
    """Replace passwords by their new ciphers. Return the number of replaced ones, and of those that another key
    still encrypts."""
    row = await session.fetch_one(
        REPLACE_PASSWORDS,
        key_id,
        [outdated.sandbox_id for outdated, _ in passwords],
        [outdated.password for outdated, _ in passwords],
        [new for _, new in passwords],
    )
    return row["rotated"], row["outdated"]
