"""Policies: read them, and replace them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from allocator.write_session import GUARD, ConcurrentUpdate, WriteSession
from sandbox_broker.contract import topology
from sandbox_broker.contract.policies import Policy
from sandbox_broker.contract.replies import PolicyChange

READ_POLICIES = f"""
WITH {GUARD}
SELECT version, (SELECT coalesce(jsonb_object_agg(name, document), '{{}}') FROM policies) AS documents
FROM guard, policy_set
"""

# $2 is the version that the changes were found against, so of two concurrent commands the second has no effect.
# The students' row of allocator_epoch comes before the policies, as in the statements of students: two statements
# that lock both would otherwise wait for each other. It waits for the running statement of the students, so no
# lease is granted under earlier policies after this commit.
APPLY_POLICIES = f"""
WITH {GUARD},
raised AS (
    UPDATE policy_set SET version = version + 1, applied_at = now()
    FROM guard WHERE version = $2
    RETURNING version
),
announced_to_students AS (
    UPDATE allocator_epoch e SET policy_version = raised.version
    FROM raised WHERE e.queue = '{topology.ALLOCATOR_COMMANDS.name}'
    RETURNING raised.version
),
removed AS (
    DELETE FROM policies p USING announced_to_students WHERE p.name <> ALL ($3::text[])
),
written AS (
    INSERT INTO policies (name, document)
    SELECT g.* FROM announced_to_students, unnest($3::text[], $4::jsonb[]) AS g (name, document)
    ON CONFLICT (name) DO UPDATE SET document = EXCLUDED.document
    WHERE policies.document IS DISTINCT FROM EXCLUDED.document
),
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'policy.changed', jsonb_build_object('version', version, 'changes', $5::jsonb) FROM raised
)
SELECT epoch, raised.version FROM guard LEFT JOIN raised ON true
"""


class AppliedPolicies(NamedTuple):
    version: int
    documents: dict[str, dict[str, Any]]
    """Fields that the administrator set, by the name of the policy."""


async def read_policies(session: WriteSession) -> AppliedPolicies:
    row = await session.fetch_one(READ_POLICIES)
    return AppliedPolicies(row["version"], orjson.loads(row["documents"]))


async def apply_policies(
    session: WriteSession, policies: Sequence[Policy], *, changes: Sequence[PolicyChange], version: int
) -> int:
    """Replace the policies of `version`; return the new version. Raises ConcurrentUpdate if another command has
    replaced them."""
    row = await session.fetch_one(
        APPLY_POLICIES,
        version,
        [policy.name for policy in policies],
        [orjson.dumps(policy.to_document()).decode() for policy in policies],
        orjson.dumps([change.model_dump() for change in changes]).decode(),
    )
    if row["version"] is None:
        raise ConcurrentUpdate
    new_version: int = row["version"]
    return new_version
