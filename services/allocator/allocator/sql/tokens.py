"""Named tokens: issue, revoke, suspend, end their leases, and record their last use.

Each change raises the version of policies and tokens, as in `sql/policies.py`: the students' row of allocator_epoch
waits for the running statement of the students, so no lease is granted with the token after the commit.
"""

from collections.abc import Mapping
from typing import TypedDict

from allocator.sql.leases import end_leases
from allocator.write_session import GUARD, WriteSession
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import EndTokenLeases, IssueToken, RevokeToken, SuspendToken

# The students' row of allocator_epoch comes before the token, as in the statements of students: two statements that
# lock both would otherwise wait for each other.
_RAISE_VERSION = f"""
raised AS (
    UPDATE policy_set SET version = version + 1 FROM wanted RETURNING version
),
announced_to_students AS (
    UPDATE allocator_epoch e SET policy_version = raised.version
    FROM raised WHERE e.queue = '{topology.ALLOCATOR_COMMANDS.name}'
    RETURNING raised.version
)
"""
"""CTEs that announce a change of the token in the CTE `wanted` to the students' lane."""


def _announce(change: str) -> str:
    """Return the CTE that announces the token of the CTE `changed (name)` to subscribers."""
    return f"""
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'token.changed', jsonb_build_object('name', name, 'change', {change}) FROM changed
)
"""


# The key makes it once: a repeated command finds its own row. Another token with the name violates
# tokens_one_per_name only in a race with another allocator; then the statement runs again and finds it.
# counted: leases of an earlier token with this name and without limits. They count to the limits of this one. That
# token is revoked, so no more leases are made with it.
ISSUE = f"""
WITH {GUARD},
taken AS MATERIALIZED (
    SELECT t.key_id FROM guard CROSS JOIN tokens t
    WHERE t.key_id = $2 OR (t.name = $3 AND t.revoked_at IS NULL)
),
wanted AS MATERIALIZED (
    SELECT FROM guard WHERE NOT EXISTS (SELECT FROM taken)
),
{_RAISE_VERSION},
changed AS (
    INSERT INTO tokens (key_id, name, role, tracks, prefixes, max_active, max_new_per_hour, max_rate, expires_at,
        token_hash, pepper_id, issued_by)
    SELECT $2, $3, $4, $5, $6, $7, $8, $9, to_timestamp($10::bigint), decode($11, 'hex'), $12, $13
    FROM announced_to_students
    RETURNING name
),
counted AS (
    UPDATE leases SET token_has_quota = true FROM changed
    WHERE num_nonnulls($7::int, $8::int, $9::int) > 0 AND NOT token_has_quota AND lease_id = ANY (ARRAY(
        SELECT lease_id FROM leases active WHERE token = $3 AND end_reason IS NULL
        UNION
        SELECT lease_id FROM leases recent WHERE token = $3 AND allocated_at > now() - interval '1 hour'
    ))
),
{_announce("'issued'")}
SELECT epoch, EXISTS (SELECT FROM changed) AS changed, EXISTS (SELECT FROM taken WHERE key_id <> $2) AS taken
FROM guard
"""

REVOKE = f"""
WITH {GUARD},
wanted AS MATERIALIZED (
    SELECT t.key_id FROM guard CROSS JOIN tokens t WHERE t.name = $2 AND t.revoked_at IS NULL
),
{_RAISE_VERSION},
changed AS (
    UPDATE tokens t SET revoked_at = now() FROM wanted, announced_to_students
    WHERE t.key_id = wanted.key_id AND t.revoked_at IS NULL
    RETURNING t.name
),
{_announce("'revoked'")}
SELECT epoch, EXISTS (SELECT FROM changed) AS changed, EXISTS (SELECT FROM tokens WHERE name = $2) AS known
FROM guard
"""

SUSPEND = f"""
WITH {GUARD},
wanted AS MATERIALIZED (
    SELECT t.key_id FROM guard CROSS JOIN tokens t
    WHERE t.name = $2 AND t.revoked_at IS NULL AND (t.suspended_at IS NOT NULL) <> $3::boolean
),
{_RAISE_VERSION},
changed AS (
    UPDATE tokens t SET suspended_at = CASE WHEN $3 THEN now() END FROM wanted, announced_to_students
    WHERE t.key_id = wanted.key_id AND t.revoked_at IS NULL
    RETURNING t.name
),
{_announce("CASE WHEN $3 THEN 'suspended' ELSE 'resumed' END")}
SELECT epoch, EXISTS (SELECT FROM changed) AS changed,
    EXISTS (SELECT FROM tokens WHERE name = $2 AND revoked_at IS NULL) AS known
FROM guard
"""

END_LEASES = f"""
WITH {GUARD},
ending AS MATERIALIZED (
    SELECT l.lease_id, l.sandbox_id, 'admin' AS reason, $3::text AS note, $4::text AS request_id,
        NULL::text AS traceparent
    FROM guard CROSS JOIN LATERAL (
        SELECT lease_id, sandbox_id FROM leases
        WHERE token = $2 AND end_reason IS NULL
        ORDER BY lease_id LIMIT $5 FOR UPDATE
    ) l
),
{end_leases()}
SELECT epoch, ARRAY(SELECT sandbox_id FROM moved ORDER BY sandbox_id) AS sandbox_ids FROM guard
"""

RECORD_USES = f"""
WITH {GUARD},
recorded AS (
    INSERT INTO token_uses (key_id, last_used_at)
    SELECT u.key_id, to_timestamp(u.at) FROM guard CROSS JOIN unnest($2::text[], $3::bigint[]) AS u (key_id, at)
    WHERE EXISTS (SELECT FROM tokens t WHERE t.key_id = u.key_id)
    ON CONFLICT (key_id) DO UPDATE SET last_used_at = excluded.last_used_at
    WHERE token_uses.last_used_at < excluded.last_used_at
    RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM recorded) AS changed FROM guard
"""


class IssueRow(TypedDict):
    changed: bool
    taken: bool
    """Whether another token has the name."""


class ChangeRow(TypedDict):
    changed: bool
    known: bool
    """Whether there is such a token."""


async def issue(session: WriteSession, command: IssueToken) -> IssueRow:
    """Raises asyncpg.UniqueViolationError if another allocator issued the name concurrently; run it again."""
    grant = command.grant
    row: IssueRow = await session.fetch_one(
        ISSUE,
        command.key_id,
        grant.name,
        grant.role,
        list(grant.tracks),
        list(grant.prefixes),
        grant.max_active,
        grant.max_new_per_hour,
        grant.max_rate,
        grant.expires_at,
        command.token_hash,
        command.pepper_id,
        None if command.sender is None else command.sender.actor,
    )
    return row


async def revoke(session: WriteSession, command: RevokeToken) -> ChangeRow:
    row: ChangeRow = await session.fetch_one(REVOKE, command.name)
    return row


async def suspend(session: WriteSession, command: SuspendToken) -> ChangeRow:
    row: ChangeRow = await session.fetch_one(SUSPEND, command.name, command.suspended)
    return row


async def end_token_leases(session: WriteSession, command: EndTokenLeases) -> list[str]:
    """Return the sandboxes of the ended leases."""
    row = await session.fetch_one(END_LEASES, command.name, command.note, command.request_id, command.limit)
    sandbox_ids: list[str] = row["sandbox_ids"]
    return sandbox_ids


async def record_uses(session: WriteSession, uses: Mapping[str, int]) -> bool:
    """`uses` are Unix seconds by key id. Return whether a record changed."""
    row = await session.fetch_one(RECORD_USES, list(uses), list(uses.values()))
    changed: bool = row["changed"]
    return changed
