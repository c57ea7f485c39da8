"""What students ask for: a sandbox, and to give it back. The SQL is in store.py."""

from collections.abc import Mapping, Sequence

import asyncpg
import structlog

from allocator import domain, metrics, store
from allocator.writer import Overtaken, Writer
from sandbox_broker.contract.commands import AllocateSandbox, ReleaseSandbox
from sandbox_broker.contract.replies import LeaseGranted, Refused, Reply, SandboxReleased

log = structlog.get_logger()


async def allocate_sandbox(writer: Writer, commands: Sequence[AllocateSandbox]) -> list[Reply]:
    """New leases, or those that the holders have."""
    ended = await _ended_lately(writer, commands)
    replies = iter(await _allocate(writer, [command for command in commands if command.holder not in ended]))
    return [domain.DONE_BEFORE if command.holder in ended else next(replies) for command in commands]


async def _ended_lately(writer: Writer, commands: Sequence[AllocateSandbox]) -> set[str]:
    """Whose allocation is delivered again, and may have been done: a lease of theirs has ended, and they have no
    other. With a key it is known whether it was done. What else these students ask for is not among the commands:
    see domain.segments."""
    again = [
        command.holder
        for command in commands
        if isinstance(command, domain.AllocateAgain) and command.idempotency_key is None
    ]
    if not again:
        return set()
    row = await store.one(writer.connection, store.ENDED_LATELY, writer.epoch, again)
    for holder in row["holders"]:
        log.info("lease.refused", holder=holder, outcome="done_before")
    return set(row["holders"])


async def _allocate(writer: Writer, commands: Sequence[AllocateSandbox]) -> list[Reply]:
    """Copies of one request share its answer."""
    unique = {domain.same_request(command): command for command in commands}
    replies: dict[tuple[str, str | None, str | None], Reply] = {}
    for round_ in domain.rounds(list(unique.values())):
        rows = await store.allocate(writer.connection, writer.epoch, round_, writer.lab_duration)
        for command, row in zip(round_, rows, strict=True):
            replies[domain.same_request(command)] = _allocated(command, row)
    return _share(commands, replies)


def _allocated(command: AllocateSandbox, row: asyncpg.Record) -> Reply:
    outcome = row["outcome"]
    metrics.ALLOCATIONS.labels(outcome=outcome).inc()
    if outcome in ("new", "known"):
        log.info(
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
        )
    log.info(
        "lease.refused",
        request_id=command.request_id,
        holder=command.holder,
        outcome=outcome,
        name_prefix=command.name_prefix,
    )
    if outcome == "exhausted":
        return domain.exhausted(command)
    return domain.key_conflict(own=outcome == "key_used_up")


def _share(
    commands: Sequence[AllocateSandbox], replies: Mapping[tuple[str, str | None, str | None], Reply]
) -> list[Reply]:
    """Of equal requests only the first was given a new lease; for the others it is the one they have."""
    answered: set[tuple[str, str | None, str | None]] = set()
    shared: list[Reply] = []
    for command in commands:
        key = domain.same_request(command)
        reply = replies[key]
        if key in answered and isinstance(reply, LeaseGranted):
            reply = reply.model_copy(update={"new": False})
        answered.add(key)
        shared.append(reply)
    return shared


async def release_sandbox(writer: Writer, commands: Sequence[ReleaseSandbox]) -> list[Reply]:
    rows = await store.release(writer.connection, writer.epoch, commands)
    return [_released(command, row) for command, row in zip(commands, rows, strict=True)]


def _released(command: ReleaseSandbox, row: asyncpg.Record) -> Reply:
    refusal: Refused | None = None
    if not row["exists"]:
        refusal = domain.not_found(command.sandbox_id)
    elif not row["own"]:
        refusal = domain.not_owner(command.sandbox_id)
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
        raise Overtaken
    log.info(
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
