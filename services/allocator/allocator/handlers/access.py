"""Access of named tokens to leases, and the audit of refusals for scope."""

from collections.abc import Iterable, Sequence

import structlog

from allocator import audit, metrics
from allocator.sql import allocations
from allocator.sql import audit as audit_sql
from allocator.token_book import Token
from allocator.write_session import PoliciesChanged, WriteSession
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Refused, Reply, refuse

TOKEN_ENDED = refuse("UNAUTHORIZED", cause="token_ended")

log = structlog.get_logger()


async def find_scopes(session: WriteSession, commands: Sequence[Command]) -> list[str | Refused | None]:
    """Return per command the token that limits it to its leases, None without a limit, or the refusal of an ended
    token.

    Administrators send commands without a holder. They reach every lease.
    """
    senders = [command.sender if getattr(command, "holder", None) else None for command in commands]
    if not any(sender is not None and sender.key_id is not None for sender in senders):
        return [None] * len(commands)
    await load_current_tokens(session)
    scopes: list[str | Refused | None] = []
    for sender in senders:
        token = session.policies.tokens.find(sender)
        if isinstance(token, Token):
            scopes.append(token.name if token.is_scoped else None)
        else:
            scopes.append(None if token is None else TOKEN_ENDED)
    return scopes


async def load_current_tokens(session: WriteSession) -> None:
    """Load the policy book with its tokens again if it is outdated."""
    try:
        await allocations.check_policy_version(session)
    except PoliciesChanged:
        await session.policies.load(session.connection)


async def record_refusals(session: WriteSession, results: Iterable[tuple[Command, Reply]]) -> None:
    """Record the refusals for scope in the audit, and count those beyond the limit of their token."""
    entries = [
        audit.build_entry(command, audit.find_object(command), reply.code)
        for command, reply in results
        if isinstance(reply, Refused) and reply.code == "FORBIDDEN_SCOPE" and command.sender is not None
    ]
    if entries:
        recorded = await audit_sql.record_refusals(session, entries)
        metrics.REFUSALS_NOT_AUDITED.inc(len(entries) - recorded)
