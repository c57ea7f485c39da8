"""Deletions: whose turn it is, what is due, and what came of it."""

from datetime import timedelta

import structlog

from allocator import deletions, domain, store
from allocator.writer import Writer
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    EndCleanup,
    HurryDeletions,
    RecordDeletion,
    RecordDeletionFailure,
    RetryDeletion,
)
from sandbox_broker.contract.replies import Reply

log = structlog.get_logger()


async def claim_deletions(writer: Writer, command: ClaimDeletions) -> Reply:
    rows = await deletions.claim_deletions(writer.connection, writer.epoch, command)
    claimed = tuple(
        replies.DueDeletion(
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
    return replies.DeletionsClaimed(deletions=claimed, on_duty=rows[0]["on_duty"], next_in_sec=next_in_sec)


async def hurry_deletions(writer: Writer, command: HurryDeletions) -> Reply:
    row = await store.one(
        writer.connection,
        deletions.HURRY_DELETIONS,
        writer.epoch,
        command.run_id,
        timedelta(seconds=command.claim_sec),
        command.limit,
    )
    return replies.DeletionsHurried(on_duty=row["on_duty"], hurried=row["hurried"])


async def end_cleanup(writer: Writer, command: EndCleanup) -> Reply:
    row = await store.one(writer.connection, deletions.END_CLEANUP, writer.epoch, command.run_id)
    return replies.Recorded(changed=row["changed"])


async def record_deletion(writer: Writer, command: RecordDeletion) -> Reply:
    row = await store.one(
        writer.connection, deletions.RECORD_DELETION, writer.epoch, command.sandbox_id, command.services_error
    )
    if row["changed"]:
        log.info("sandbox.deleted", sandbox_id=command.sandbox_id)
    return replies.Recorded(changed=row["changed"])


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
    return replies.Recorded(changed=row["changed"])


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
    return replies.SandboxReleased(
        sandbox_id=command.sandbox_id,
        status="pending_deletion",
        deletion_requested_at=row["deletion_requested_at"],
    )
