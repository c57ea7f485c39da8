"""What the allocator does for each command: one function each, named like its command.

A handler gets all commands of its kind in a batch and answers with as many replies, in order. It runs its
statements on the writer's connection under the epoch given, and raises what the database raises.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg
import structlog

from allocator import dead_letters, deletions, domain, jobs, listings, metrics, purge, store
from sandbox_broker import messages, topology
from sandbox_broker.bus import Disconnected, Publisher, Unroutable
from sandbox_broker.messages import (
    AllocateSandbox,
    ApplyListing,
    BeginListing,
    ClaimDeletions,
    Command,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndLease,
    ExpireLeases,
    HurryDeletions,
    PurgeRecords,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RefreshSandboxes,
    ReleaseSandbox,
    ReplayDeadLetter,
    Reply,
    RetryDeletion,
    StageListing,
)
from sandbox_broker.tables import PROOF_GRACE

log = structlog.get_logger()


REPLAYABLE = frozenset(binding.queue.name for binding in topology.BINDINGS if binding.exchange is topology.COMMANDS)
"""Queues of commands, and no other: what a letter says of its queue, whoever sent it can have made up."""


class Overtaken(Exception):
    """Another allocator changed the same rows while we looked: repeat, and see its work."""


@dataclass(frozen=True, slots=True)
class Writer:
    """What a handler works with: the one connection that writes, and the epoch that allows it to."""

    connection: asyncpg.Connection
    epoch: int
    lab_duration: timedelta
    publisher: Publisher


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
        return messages.LeaseGranted(
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
        if key in answered and isinstance(reply, messages.LeaseGranted):
            reply = reply.model_copy(update={"new": False})
        answered.add(key)
        shared.append(reply)
    return shared


async def release_sandbox(writer: Writer, commands: Sequence[ReleaseSandbox]) -> list[Reply]:
    rows = await store.release(writer.connection, writer.epoch, commands)
    return [_released(command, row) for command, row in zip(commands, rows, strict=True)]


def _released(command: ReleaseSandbox, row: asyncpg.Record) -> Reply:
    refusal: messages.Refused | None = None
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
    return messages.SandboxReleased(
        sandbox_id=command.sandbox_id,
        status=row["status"],
        deletion_requested_at=row["deletion_requested_at"],
    )


async def expire_leases(writer: Writer, command: ExpireLeases) -> Reply:
    row = await store.one(
        writer.connection, store.EXPIRE, writer.epoch, timedelta(seconds=command.grace_sec), command.limit
    )
    for sandbox_id in row["sandbox_ids"]:
        log.info("lease.expired", sandbox_id=sandbox_id)
    metrics.EXPIRED.inc(len(row["sandbox_ids"]))
    return messages.LeasesExpired(sandbox_ids=tuple(row["sandbox_ids"]))


async def end_lease(writer: Writer, command: EndLease) -> Reply:
    row = await store.one(
        writer.connection,
        store.END_LEASE,
        writer.epoch,
        command.sandbox_id,
        command.note,
        command.request_id,
        command.traceparent,
    )
    if row["status"] is None:
        return domain.not_found(command.sandbox_id)
    if row["lease_id"] is None:
        return domain.not_allocated(command.sandbox_id, row["status"])
    if row["deletion_requested_at"] is None:
        raise Overtaken
    if row["changed"]:
        log.info("lease.ended", sandbox_id=command.sandbox_id, note=command.note)
    return messages.SandboxReleased(
        sandbox_id=command.sandbox_id,
        status=row["status"],
        deletion_requested_at=row["deletion_requested_at"],
    )


async def claim_deletions(writer: Writer, command: ClaimDeletions) -> Reply:
    rows = await deletions.claim_deletions(writer.connection, writer.epoch, command)
    claimed = tuple(
        messages.DueDeletion(
            sandbox_id=row["sandbox_id"],
            external_id=row["external_id"],
            name=row["name"],
            attempts=row["deletion_attempts"],
            missing=row["missing"],
            request_id=row["deletion_request_id"],
            traceparent=row["deletion_traceparent"],
        )
        for row in rows
        if row["sandbox_id"] is not None
    )
    next_in_sec = None if claimed else rows[0]["next_in_sec"]
    return messages.DeletionsClaimed(deletions=claimed, on_duty=rows[0]["on_duty"], next_in_sec=next_in_sec)


async def hurry_deletions(writer: Writer, command: HurryDeletions) -> Reply:
    row = await store.one(
        writer.connection,
        deletions.HURRY_DELETIONS,
        writer.epoch,
        command.run_id,
        timedelta(seconds=command.claim_sec),
        command.limit,
    )
    return messages.DeletionsHurried(on_duty=row["on_duty"], hurried=row["hurried"])


async def end_cleanup(writer: Writer, command: EndCleanup) -> Reply:
    row = await store.one(writer.connection, deletions.END_CLEANUP, writer.epoch, command.run_id)
    return messages.Recorded(changed=row["changed"])


async def record_deletion(writer: Writer, command: RecordDeletion) -> Reply:
    row = await store.one(
        writer.connection, deletions.RECORD_DELETION, writer.epoch, command.sandbox_id, command.services_error
    )
    if row["changed"]:
        log.info("sandbox.deleted", sandbox_id=command.sandbox_id)
    return messages.Recorded(changed=row["changed"])


async def record_deletion_failure(writer: Writer, command: RecordDeletionFailure) -> Reply:
    retry_in = None if command.retry_in_sec is None else timedelta(seconds=command.retry_in_sec)
    row = await store.one(
        writer.connection,
        deletions.RECORD_DELETION_FAILURE,
        writer.epoch,
        command.sandbox_id,
        command.attempts,
        command.error,
        retry_in,
        command.run_id,
        command.services_error,
    )
    if row["changed"]:
        log.warning(
            "sandbox.deletion_failed" if retry_in is None else "sandbox.deletion_postponed",
            sandbox_id=command.sandbox_id,
            attempts=command.attempts + 1,
            error=command.error,
            retry_in_sec=command.retry_in_sec,
        )
    return messages.Recorded(changed=row["changed"])


async def retry_deletion(writer: Writer, command: RetryDeletion) -> Reply:
    row = await store.one(
        writer.connection,
        deletions.RETRY_DELETION,
        writer.epoch,
        command.sandbox_id,
        command.request_id,
        command.traceparent,
    )
    if row["status"] is None:
        return domain.not_found(command.sandbox_id)
    if not row["changed"]:
        return domain.not_deletion_failed(command.sandbox_id, row["status"])
    log.info("sandbox.deletion_retried", sandbox_id=command.sandbox_id)
    return messages.SandboxReleased(
        sandbox_id=command.sandbox_id,
        status="pending_deletion",
        deletion_requested_at=row["deletion_requested_at"],
    )


async def begin_listing(writer: Writer, _: BeginListing) -> Reply:
    row = await store.one(writer.connection, listings.BEGIN_LISTING, writer.epoch)
    return messages.ListingBegun(listing_id=row["listing_id"])


async def stage_listing(writer: Writer, command: StageListing) -> Reply:
    staged = await listings.stage_listing(
        writer.connection, writer.epoch, command.listing_id, command.accounts, command.unreadable
    )
    return messages.ListingStaged(staged=staged)


async def apply_listing(writer: Writer, command: ApplyListing) -> Reply:
    """Weighs the listing, then applies it or not. A listing that has been applied gives its answer again, unless a
    crash of the database has emptied it: then all that students hold would look as if CSP lacked it."""
    listing_id = command.listing_id
    weight = await store.one(writer.connection, listings.WEIGH_LISTING, writer.epoch, listing_id)
    if weight["outdated"] or weight["listed"] != command.total:
        return domain.LISTING_OUTDATED
    if not weight["applied"]:
        refusal = domain.held(
            weight["listed"],
            weight["lacking"] + weight["moving_in_pool"],
            weight["pool"],
            command.max_stale_fraction,
        )
        if refusal and not command.force:
            await store.one(writer.connection, listings.HOLD_LISTING, writer.epoch, listing_id, refusal.message)
            log.warning("sync.held", listing_id=listing_id, reason=refusal.message)
            return refusal
        if weight["moving"]:
            await listings.move_accounts(writer.connection, writer.epoch, listing_id)
        row = await store.one(writer.connection, listings.APPLY_LISTING, writer.epoch, listing_id, PROOF_GRACE)
        if row["synced"] is None:
            raise Overtaken
        metrics.REOPENED.inc(row["reopened"])
    flagged = await store.one(writer.connection, listings.FLAG_MISSING, writer.epoch, listing_id, PROOF_GRACE)
    outcome = json.loads(flagged["outcome"])
    log.info("sync.applied", listing_id=listing_id, **outcome)
    return messages.ListingApplied(**outcome)


async def refresh_sandboxes(writer: Writer, command: RefreshSandboxes) -> Reply:
    row = await store.one(
        writer.connection,
        listings.REFRESH_SANDBOXES,
        writer.epoch,
        command.listing_id,
        command.after or "",
        command.limit,
    )
    return messages.SandboxesRefreshed(last=row["last"])


async def delete_stale(writer: Writer, command: DeleteStale) -> Reply:
    row = await store.one(
        writer.connection,
        purge.DELETE_STALE,
        writer.epoch,
        timedelta(seconds=command.stale_for_sec),
        command.limit,
    )
    if row["count"]:
        log.info("stale.deleted", count=row["count"])
    return messages.Purged(count=row["count"])


async def purge_records(writer: Writer, command: PurgeRecords) -> Reply:
    row = await store.one(
        writer.connection,
        purge.PURGE_RECORDS,
        writer.epoch,
        command.status,
        timedelta(seconds=command.for_sec),
        command.limit,
    )
    if row["count"]:
        log.info("records.purged", status=command.status, count=row["count"])
    return messages.Purged(count=row["count"])


async def record_job(writer: Writer, command: RecordJob) -> Reply:
    row = await store.one(
        writer.connection,
        jobs.RECORD_JOB,
        writer.epoch,
        command.job_id,
        command.kind,
        command.state,
        json.dumps(command.progress),
        None if command.result is None else json.dumps(command.result),
    )
    return messages.Recorded(changed=row["changed"])


async def replay_dead_letter(writer: Writer, command: ReplayDeadLetter) -> Reply:
    """Published first and then forgotten: who dies in between does it again, which changes nothing, since each
    command is carried out once however often it comes."""
    letter = await dead_letters.find(writer.connection, writer.epoch, command.dead_letter_id)
    if letter is None:
        return domain.no_such_dead_letter(command.dead_letter_id)
    if letter.queue not in REPLAYABLE:
        return domain.not_replayable(letter.queue)
    served = await dead_letters.served(writer.connection, writer.epoch, letter)
    body, skipped = dead_letters.without_allocations(letter.body, served)
    if body is not None:
        try:
            await writer.publisher.publish(topology.COMMANDS.name, letter.queue, body, letter.properties)
        except (Disconnected, Unroutable) as error:
            return domain.not_replayed(str(error))
    await dead_letters.drop(writer.connection, writer.epoch, letter.dead_letter_id)
    log.info(
        "dead_letter.replayed",
        request_id=command.request_id,
        dead_letter_id=str(letter.dead_letter_id),
        queue=letter.queue,
        published=body is not None,
        skipped=skipped,
    )
    return messages.DeadLetterReplayed(
        dead_letter_id=letter.dead_letter_id, queue=letter.queue, published=body is not None, skipped=skipped
    )


async def drop_dead_letter(writer: Writer, command: DropDeadLetter) -> Reply:
    if not await dead_letters.drop(writer.connection, writer.epoch, command.dead_letter_id):
        return domain.no_such_dead_letter(command.dead_letter_id)
    log.info("dead_letter.dropped", request_id=command.request_id, dead_letter_id=str(command.dead_letter_id))
    return messages.Recorded(changed=True)


Handler = Callable[[Writer, Sequence[Any]], Awaitable[list[Reply]]]


def _one_by_one(handle: Callable[[Writer, Any], Awaitable[Reply]]) -> Handler:
    async def handle_one(writer: Writer, commands: Sequence[Command]) -> list[Reply]:
        (command,) = commands
        return [await handle(writer, command)]

    return handle_one


@dataclass(frozen=True, slots=True)
class Lane:
    """One queue of commands, with a consumer and a database connection of its own."""

    queue: topology.Queue
    handlers: Mapping[type[Command], Handler]
    max_batch: int
    """Envelopes; each holds up to messages.MAX_ENVELOPE commands."""
    together: bool
    """Whether the handlers take all commands of their kind in a batch at once, in the order of `handlers`. Else
    they get one: what is repeated after a failure is then that command alone, and no claim that its neighbour
    was given is given away."""
    statement_timeout_sec: float
    plans: str
    """How its statements are planned: see store.connect."""
    gives_way: bool
    """Whether it rests after each batch for twice as long as that took, so that others mostly find the machine
    free."""


# What ends leases comes before what asks for them, so that nobody is told of a lease that the same batch ends.
# A student's statement has less time than the gateway waits for us.
STUDENTS = Lane(
    topology.ALLOCATOR_COMMANDS,
    {ReleaseSandbox: release_sandbox, AllocateSandbox: allocate_sandbox},
    max_batch=20,
    together=True,
    statement_timeout_sec=2,
    plans=store.LOOK_UPS,
    gives_way=False,
)
MAINTENANCE = Lane(
    topology.ALLOCATOR_MAINTENANCE,
    {
        ExpireLeases: _one_by_one(expire_leases),
        EndLease: _one_by_one(end_lease),
        ClaimDeletions: _one_by_one(claim_deletions),
        HurryDeletions: _one_by_one(hurry_deletions),
        EndCleanup: _one_by_one(end_cleanup),
        RecordDeletion: _one_by_one(record_deletion),
        RecordDeletionFailure: _one_by_one(record_deletion_failure),
        RetryDeletion: _one_by_one(retry_deletion),
        BeginListing: _one_by_one(begin_listing),
        StageListing: _one_by_one(stage_listing),
        ApplyListing: _one_by_one(apply_listing),
        RefreshSandboxes: _one_by_one(refresh_sandboxes),
        DeleteStale: _one_by_one(delete_stale),
        PurgeRecords: _one_by_one(purge_records),
        RecordJob: _one_by_one(record_job),
        ReplayDeadLetter: _one_by_one(replay_dead_letter),
        DropDeadLetter: _one_by_one(drop_dead_letter),
    },
    max_batch=1,
    together=False,
    statement_timeout_sec=30,
    plans=store.SCANS,
    gives_way=True,
)
