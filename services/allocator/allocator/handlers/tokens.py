"""Named tokens: issue, revoke, suspend, end their leases, and record their last use."""

import structlog

from allocator.sql import tokens
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    EndTokenLeases,
    IssueToken,
    RecordTokenUses,
    RevokeToken,
    SuspendToken,
)
from sandbox_broker.contract.replies import Recorded, Reply, TokenLeasesEnded, refuse

log = structlog.get_logger()


async def issue_token(session: WriteSession, command: IssueToken) -> Reply:
    row = await tokens.issue(session, command)
    if row["taken"]:
        return refuse("TOKEN_EXISTS", name=command.grant.name)
    if row["changed"]:
        log.info("token.issued", request_id=command.request_id, name=command.grant.name, role=command.grant.role)
    return Recorded(changed=row["changed"])


async def revoke_token(session: WriteSession, command: RevokeToken) -> Reply:
    """A repeated command succeeds without effect."""
    row = await tokens.revoke(session, command)
    if not row["known"]:
        return refuse("TOKEN_NOT_FOUND", name=command.name)
    if row["changed"]:
        log.info("token.revoked", request_id=command.request_id, name=command.name)
    return Recorded(changed=row["changed"])


async def suspend_token(session: WriteSession, command: SuspendToken) -> Reply:
    row = await tokens.suspend(session, command)
    if not row["known"]:
        return refuse("TOKEN_NOT_FOUND", name=command.name)
    if row["changed"]:
        event = "token.suspended" if command.suspended else "token.resumed"
        log.warning(event, request_id=command.request_id, name=command.name)
    return Recorded(changed=row["changed"])


async def end_token_leases(session: WriteSession, command: EndTokenLeases) -> Reply:
    sandbox_ids = await tokens.end_token_leases(session, command)
    for sandbox_id in sandbox_ids:
        log.info("lease.ended", request_id=command.request_id, sandbox_id=sandbox_id, note=command.note)
    return TokenLeasesEnded(sandbox_ids=tuple(sandbox_ids))


async def record_token_uses(session: WriteSession, command: RecordTokenUses) -> Reply:
    return Recorded(changed=await tokens.record_uses(session, command.uses))
