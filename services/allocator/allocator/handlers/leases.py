"""Leases: allocate, release, expire, and end by an administrator."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta

import structlog

from allocator import domain, metrics
from allocator.handlers import access, waiting
from allocator.policy_book import PolicyBook
from allocator.sql import allocations, leases
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import AllocateSandbox, EndLease, EndPlay, ExpireLeases, ReleaseSandbox
from sandbox_broker.contract.replies import (
    LeaseGranted,
    LeasesExpired,
    PlayEnded,
    Refused,
    Reply,
    SandboxReleased,
    refuse,
)
from sandbox_broker.observability import frequent_log

log = structlog.get_logger()

_ALREADY_COMPLETED = refuse("ALLOCATOR_UNAVAILABLE", cause="redelivered")
_REFUSALS: Mapping[str, Refused] = {
    "token_ended": access.TOKEN_ENDED,
    "out_of_scope": refuse("FORBIDDEN_SCOPE", cause="allocation"),
    "wrong_secret": refuse("NOT_SANDBOX_OWNER", cause="secret"),
    "key_used_up": refuse("IDEMPOTENCY_KEY_CONFLICT", cause="own_ended_lease"),
    "key_of_another": refuse("IDEMPOTENCY_KEY_CONFLICT", cause="other_student"),
}
"""Refusals without parameters, by outcome."""


async def allocate_sandbox(session: WriteSession, commands: Sequence[AllocateSandbox]) -> list[Reply]:
    """Grant new leases, or repeat the active leases of the holders."""
    completed = await _holders_already_served(session, commands)
    replies = iter(await _allocate(session, [command for command in commands if command.holder not in completed]))
    return [_ALREADY_COMPLETED if command.holder in completed else next(replies) for command in commands]


async def _holders_already_served(session: WriteSession, commands: Sequence[AllocateSandbox]) -> set[str]:
    """Return the holders of possibly completed, redelivered allocations.

    Such a holder has no lease now, but an ended one of the last two minutes. With an idempotency key the database
    knows the answer, so those commands are not checked. All commands of a holder in `commands` are allocations (see
    domain.split_on_conflict).
    """
    redelivered = [
        command.holder
        for command in commands
        if isinstance(command, domain.RedeliveredAllocation) and command.idempotency_key is None
    ]
    if not redelivered:
        return set()
    holders = await leases.holders_with_ended_lease(session, holders=redelivered)
    for holder in holders:
        log.info("lease.refused", holder=holder, outcome="done_before")
    return set(holders)


async def _allocate(session: WriteSession, commands: Sequence[AllocateSandbox]) -> list[Reply]:
    """Run one allocation per distinct request; duplicates share its reply."""
    unique = {domain.dedup_key(command): command for command in commands}
    rows: dict[domain.DedupKey, allocations.AllocationRow | None] = {}
    line = await waiting.open_line(session)
    refused = await waiting.find_refused(session, unique)
    rows.update(refused)
    direct, queued = line.split([command for key, command in unique.items() if key not in refused])
    for group in domain.conflict_free_groups(direct):
        rows.update(_by_key(group, await allocations.allocate(session, group)))
    if queued:
        rows.update(_by_key(queued, await waiting.allocate_in_line(session, queued)))
    replies: dict[domain.DedupKey, Reply] = {}
    if to_wait := [command for key, command in unique.items() if command.wait_sec and _is_exhausted(rows[key])]:
        replies.update(await waiting.wait_in_line(session, to_wait))
        metrics.ALLOCATIONS.labels(outcome="waiting").inc(len(replies))
    answered = {key: command for key, command in unique.items() if key not in replies}
    for outcome, number in Counter(_outcome(rows[key]) for key in answered).items():
        metrics.ALLOCATIONS.labels(outcome=outcome).inc(number)
    for key, command in answered.items():
        replies[key] = _allocation_reply(command, rows[key], session.policies)
    await access.record_refusals(session, ((command, replies[key]) for key, command in unique.items()))
    return _share_replies(commands, replies)


def _by_key(
    commands: Sequence[AllocateSandbox], rows: Sequence[allocations.AllocationRow | None]
) -> Iterable[tuple[domain.DedupKey, allocations.AllocationRow | None]]:
    return zip(map(domain.dedup_key, commands), rows, strict=True)


def _is_exhausted(row: allocations.AllocationRow | None) -> bool:
    return _outcome(row) == "exhausted"


def _outcome(row: allocations.AllocationRow | None) -> str:
    """Return the outcome of a row. None is a student that waits, and asks without the wish to wait."""
    return "exhausted" if row is None else row["outcome"]


def _allocation_reply(
    command: AllocateSandbox, row: allocations.AllocationRow | None, policies: PolicyBook
) -> Reply:
    outcome = _outcome(row)
    if row is not None and outcome in ("new", "known"):
        frequent_log.info(
            "lease.granted" if outcome == "new" else "lease.repeated",
            request_id=command.request_id,
            sandbox_id=row["sandbox_id"],
            holder=command.holder,
            track_name=command.track_name,
        )
        return LeaseGranted(
            new=outcome == "new",
            sandbox_id=row["sandbox_id"],
            name=row["name"],
            external_id=row["external_id"],
            sfdc_account_id=row["sfdc_account_id"],
            allocated_at=row["allocated_at"],
            expires_at=row["expires_at"],
            mode=row["mode"],
            claimed_at=row["claimed_at"],
        )
    log.info(
        "lease.refused",
        request_id=command.request_id,
        holder=command.holder,
        outcome=outcome,
        name_prefix=command.name_prefix,
    )
    return _refusal(command, outcome, policies)


def _refusal(command: AllocateSandbox, outcome: str, policies: PolicyBook) -> Refused:
    refusal = _REFUSALS.get(outcome)
    if refusal is not None:
        return refusal
    if outcome == "quota_exceeded":
        terms = policies.resolve(track_name=command.track_name, name_prefix=command.name_prefix)
        return refuse("QUOTA_EXCEEDED", cause="policy", policy=terms.policy or "", max_active=terms.max_active or 0)
    if outcome in allocations.QUOTA_OUTCOMES and command.sender is not None:
        return _refuse_over_quota(outcome, command.sender.actor)
    if command.name_prefix is None:
        return refuse("POOL_EXHAUSTED")
    return refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix=command.name_prefix)


def _refuse_over_quota(outcome: str, token: str) -> Refused:
    if outcome == "max_active":
        return refuse("QUOTA_EXCEEDED", cause="max_active", token=token)
    if outcome == "max_new_per_hour":
        return refuse("QUOTA_EXCEEDED", cause="max_new_per_hour", token=token)
    return refuse("QUOTA_EXCEEDED", cause="max_rate", token=token)


def _share_replies(commands: Sequence[AllocateSandbox], replies: Mapping[domain.DedupKey, Reply]) -> list[Reply]:
    """Return a reply per command. A new lease is new for the first of its commands only."""
    new = {reply.sandbox_id for reply in replies.values() if isinstance(reply, LeaseGranted) and reply.new}
    shared: list[Reply] = []
    for command in commands:
        reply = replies[domain.dedup_key(command)]
        if isinstance(reply, LeaseGranted):
            is_first = reply.sandbox_id in new
            new.discard(reply.sandbox_id)
            if reply.new is not is_first:
                reply = reply.model_copy(update={"new": is_first})
        shared.append(reply)
    return shared


async def release_sandbox(session: WriteSession, commands: Sequence[ReleaseSandbox]) -> list[Reply]:
    scopes = await access.find_scopes(session, commands)
    permitted = [
        (command, scope) for command, scope in zip(commands, scopes, strict=True) if not isinstance(scope, Refused)
    ]
    rows = iter(await leases.release(session, *zip(*permitted, strict=True)) if permitted else ())
    replies = [
        scope if isinstance(scope, Refused) else _release_reply(command, next(rows))
        for command, scope in zip(commands, scopes, strict=True)
    ]
    await access.record_refusals(session, zip(commands, replies, strict=True))
    return replies


def _release_reply(command: ReleaseSandbox, row: leases.ReleaseRow) -> Reply:
    refusal: Refused | None = None
    if not row["exists"]:
        refusal = refuse("SANDBOX_NOT_FOUND", sandbox_id=command.sandbox_id)
    elif not row["in_scope"]:
        refusal = refuse("FORBIDDEN_SCOPE", cause="lease")
    elif not row["own"]:
        refusal = refuse("NOT_SANDBOX_OWNER", sandbox_id=command.sandbox_id)
    if refusal is not None:
        log.info(
            "release.refused",
            request_id=command.request_id,
            sandbox_id=command.sandbox_id,
            holder=command.holder,
            code=refusal.code,
        )
        return refusal
    if row["deletion_requested_at"] is None:
        raise ConcurrentUpdate
    frequent_log.info(
        "lease.released",
        request_id=command.request_id,
        sandbox_id=command.sandbox_id,
        holder=command.holder,
        status=row["status"],
    )
    return SandboxReleased(
        sandbox_id=command.sandbox_id,
        status=row["status"],
        deletion_requested_at=row["deletion_requested_at"],
    )


async def end_play(session: WriteSession, commands: Sequence[EndPlay]) -> list[Reply]:
    """End the leases of plays that Instruqt has ended, and the places of their students in the waiting line."""
    stopped = await waiting.end_plays(session, commands)
    rows = await leases.end_plays(session, commands)
    return [_play_reply(command, row, stopped) for command, row in zip(commands, rows, strict=True)]


def _play_reply(command: EndPlay, row: leases.EndPlayRow, stopped: Collection[str]) -> Reply:
    """`stopped` are the holders that have lost a place in the waiting line."""
    if row["sandbox_id"] is None:
        return PlayEnded(outcome="stopped_waiting" if command.holder in stopped else "no_lease")
    if not row["is_of_play"]:
        return PlayEnded(outcome="newer_lease", sandbox_id=row["sandbox_id"])
    if not row["moved"]:
        raise ConcurrentUpdate
    log.info(
        "lease.ended",
        request_id=command.request_id,
        sandbox_id=row["sandbox_id"],
        holder=command.holder,
        reason="play_ended",
    )
    return PlayEnded(outcome="released", sandbox_id=row["sandbox_id"])


async def expire_leases(session: WriteSession, command: ExpireLeases) -> Reply:
    row = await leases.expire(session, grace=timedelta(seconds=command.grace_sec), limit=command.limit)
    for sandbox_id in row["expired"]:
        log.info("lease.expired", sandbox_id=sandbox_id)
    for sandbox_id in row["unclaimed"]:
        log.info("lease.unclaimed", sandbox_id=sandbox_id)
    metrics.EXPIRED.inc(len(row["expired"]))
    metrics.UNCLAIMED.inc(len(row["unclaimed"]))
    return LeasesExpired(sandbox_ids=(*row["expired"], *row["unclaimed"]))


async def end_lease(session: WriteSession, command: EndLease) -> Reply:
    row = await leases.end_lease(
        session,
        sandbox_id=command.sandbox_id,
        note=command.note,
        request_id=command.request_id,
        traceparent=command.traceparent,
    )
    if row["status"] is None:
        return refuse("SANDBOX_NOT_FOUND", sandbox_id=command.sandbox_id)
    if row["lease_id"] is None:
        return refuse("NOT_ALLOCATED", sandbox_id=command.sandbox_id, status=row["status"])
    if row["deletion_requested_at"] is None:
        raise ConcurrentUpdate
    if row["changed"]:
        log.info("lease.ended", sandbox_id=command.sandbox_id, note=command.note)
    return SandboxReleased(
        sandbox_id=command.sandbox_id,
        status=row["status"],
        deletion_requested_at=row["deletion_requested_at"],
        changed=row["changed"],
    )
