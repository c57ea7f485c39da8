"""Policies: an administrator replaces them."""

from collections.abc import Iterator, Mapping
from typing import Any

import structlog

from allocator.sql import policies
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import ApplyPolicies
from sandbox_broker.contract.replies import PoliciesApplied, PolicyChange, Reply

log = structlog.get_logger()


async def apply_policies(session: WriteSession, command: ApplyPolicies) -> Reply:
    """A repeated command finds no difference."""
    applied = await policies.read_policies(session)
    wanted = {policy.name: policy.to_document() for policy in command.policies}
    changes = tuple(find_changes(applied.documents, wanted))
    if changes and not command.dry_run:
        version = await policies.apply_policies(session, command.policies, changes=changes, version=applied.version)
        log.info(
            "policies.applied",
            request_id=command.request_id,
            version=version,
            changes=[f"{change.change} {change.name}" for change in changes],
        )
    return PoliciesApplied(changes=changes)


def find_changes(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> Iterator[PolicyChange]:
    """Yield the changed policies by name. A document without a field differs from one with its default."""
    for name in sorted({*before, *after}):
        old, new = before.get(name, {}), after.get(name, {})
        if old == new:
            continue
        fields = tuple(field for field in {**new, **old} if field != "name" and old.get(field) != new.get(field))
        yield PolicyChange(
            name=name, change="changed" if old and new else "added" if new else "removed", fields=fields
        )
