"""Changes of a lease: claim a standby lease, extend a lease, replace a broken sandbox."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

import structlog

from allocator import metrics
from allocator.audit import run_audited
from allocator.handlers import access, waiting
from allocator.sql import lease_changes
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import ClaimLease, ExtendLease, ReplaceSandbox
from sandbox_broker.contract.replies import LeaseExtended, LeaseGranted, Refused, Reply, StudentWaiting, refuse

C = TypeVar("C", ClaimLease, ExtendLease, ReplaceSandbox)

Change = Literal["claim", "extend", "replace"]

log = structlog.get_logger()


async def claim_lease(session: WriteSession, commands: Sequence[ClaimLease]) -> list[Reply]:
    return await _change_all(session, "claim", _claim, commands)


async def extend_lease(session: WriteSession, commands: Sequence[ExtendLease]) -> list[Reply]:
    return await _change_all(session, "extend", _extend, commands)


async def replace_sandbox(session: WriteSession, commands: Sequence[ReplaceSandbox]) -> list[Reply]:
    return await _change_all(session, "replace", _replace, commands)


async def _change_all(
    session: WriteSession,
    change: Change,
    run: Callable[[WriteSession, C, str | None], Awaitable[Reply]],
    commands: Sequence[C],
) -> list[Reply]:
    scopes = await access.find_scopes(session, commands)
    replies = [
        await _change(session, change, run, command, scope) for command, scope in zip(commands, scopes, strict=True)
    ]
    await access.record_refusals(
        session,
        (pair for pair in zip(commands, replies, strict=True) if pair[0].holder is not None),
    )
    return replies


async def _change(
    session: WriteSession,
    change: Change,
    run: Callable[[WriteSession, C, str | None], Awaitable[Reply]],
    command: C,
    scope: str | Refused | None,
) -> Reply:
    """Run one command, count its outcome and log a refusal. Audit the command of an administrator, which has no
    holder."""
    reply: Reply
    if isinstance(scope, Refused):
        reply = scope
    elif command.holder is None:
        reply = await run_audited(session, command, lambda session, command: run(session, command, None))
    else:
        reply = await run(session, command, scope)
    if isinstance(reply, Refused):
        log.info(
            f"{change}.refused",
            request_id=command.request_id,
            sandbox_id=command.sandbox_id,
            holder=command.holder,
            code=reply.code,
        )
        outcome = reply.code.lower()
    elif isinstance(reply, StudentWaiting):
        outcome = "waiting"
    else:
        is_new = (
            reply.changed if isinstance(reply, LeaseExtended) else isinstance(reply, LeaseGranted) and reply.new
        )
        outcome = "done" if is_new else "repeated"
    metrics.LEASE_CHANGES.labels(change, outcome).inc()
    return reply


async def _claim(session: WriteSession, command: ClaimLease, scope: str | None) -> Reply:
    row = await lease_changes.claim(session, command, scope)
    if refusal := _refuse_stranger(command, row):
        return refusal
    if row["ended"]:
        return refuse("LEASE_ENDED", sandbox_id=command.sandbox_id)
    if not row["claimed"]:
        if row["mode"] == "standby":
            if row["other_sandbox_id"] is None or command.new_holder is None:
                raise ConcurrentUpdate
            return refuse("NEW_HOLDER_HAS_LEASE", new_holder=command.new_holder)
        if command.new_holder not in (None, row["holder"]):
            return refuse("ALREADY_CLAIMED", sandbox_id=command.sandbox_id)
    else:
        log.info(
            "lease.claimed",
            request_id=command.request_id,
            sandbox_id=command.sandbox_id,
            holder=row["holder"],
            first_holder=command.holder if row["holder"] != command.holder else None,
            expires_at=row["expires_at"],
        )
    return LeaseGranted(
        new=row["claimed"],
        sandbox_id=command.sandbox_id,
        name=row["name"],
        external_id=row["external_id"],
        sfdc_account_id=row["sfdc_account_id"],
        allocated_at=row["allocated_at"],
        expires_at=row["expires_at"],
        claimed_at=row["claimed_at"],
    )


async def _extend(session: WriteSession, command: ExtendLease, scope: str | None) -> Reply:
    row = await lease_changes.extend(session, command, scope)
    if refusal := _refuse_stranger(command, row):
        return refusal
    if row["granted_sec"] is not None:
        if row["granted_sec"] != command.extension_sec:
            return refuse("IDEMPOTENCY_KEY_CONFLICT", cause="other_extension", hours=_hours(row["granted_sec"]))
    elif row["ended"]:
        return refuse("LEASE_ENDED", sandbox_id=command.sandbox_id)
    elif not row["extended"]:
        if row["mode"] == "standby":
            return refuse("NOT_CLAIMED", sandbox_id=command.sandbox_id)
        return refuse("EXTENSION_LIMIT", sandbox_id=command.sandbox_id, left_hours=_hours(row["left_sec"]))
    else:
        log.info(
            "lease.extended",
            request_id=command.request_id,
            sandbox_id=command.sandbox_id,
            holder=command.holder,
            note=command.note,
            extension_sec=command.extension_sec,
            expires_at=row["expires_at"],
        )
    return LeaseExtended(
        changed=row["extended"], expires_at=row["expires_at"], max_expires_at=row["max_expires_at"]
    )


async def _replace(session: WriteSession, command: ReplaceSandbox, scope: str | None) -> Reply:
    row = await waiting.replace_in_line(session, command, scope)
    if refusal := _refuse_stranger(command, row):
        return refusal
    if row["new"] is None and row["end_reason"] == "broken":
        raise ConcurrentUpdate  # the statement began before the end of another replacement
    if row["new"] is None or row["over"]:
        if refusal := _refuse_replacement(command, row):
            return refusal
        place = None
        if command.wait_sec is not None:
            place = await waiting.wait_for_replacement(session, command, row)
        return place or _refuse_exhausted(row)
    return LeaseGranted(
        new=row["new"],
        sandbox_id=row["sandbox_id"],
        name=row["name"],
        external_id=row["external_id"],
        sfdc_account_id=row["sfdc_account_id"],
        allocated_at=row["allocated_at"],
        expires_at=row["expires_at"],
        mode=row["mode"],
        claimed_at=row["claimed_at"],
    )


def _refuse_replacement(command: ReplaceSandbox, row: lease_changes.ReplaceRow) -> Refused | None:
    """Return the refusal unless the student may have another sandbox."""
    if row["ended"]:
        return refuse("LEASE_ENDED", sandbox_id=command.sandbox_id)
    if not row["within_limit"]:
        return refuse("REPLACEMENT_LIMIT", max_replacements=row["max_replacements"])
    return None


def _refuse_exhausted(row: lease_changes.ReplaceRow) -> Refused:
    if row["name_prefix"] is None:
        return refuse("POOL_EXHAUSTED")
    return refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix=row["name_prefix"])


def _refuse_stranger(
    command: ClaimLease | ExtendLease | ReplaceSandbox,
    row: lease_changes.ClaimRow | lease_changes.ExtendRow | lease_changes.ReplaceRow,
) -> Refused | None:
    """Return the refusal if the sandbox was never leased, or not to this student."""
    if row["lease_id"] is None:
        if row["status"] is None:
            return refuse("SANDBOX_NOT_FOUND", sandbox_id=command.sandbox_id)
        if command.holder is None:
            return refuse("NOT_ALLOCATED", sandbox_id=command.sandbox_id, status=row["status"])
    if not row["in_scope"]:
        return refuse("FORBIDDEN_SCOPE", cause="lease")
    if not row["own"]:
        return refuse("NOT_SANDBOX_OWNER", sandbox_id=command.sandbox_id)
    return None


def _hours(seconds: int) -> str:
    return f"{seconds / 3600:g}"
