"""Deletions: claim the due ones, record their results, retry failed ones."""

from datetime import timedelta

import structlog

from allocator.sql import deletions
from allocator.write_session import WriteSession
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    EndCleanup,
    HurryDeletions,
    RecordDeletion,
    RecordDeletionFailure,
    RetryDeletion,
)
from sandbox_broker.contract.replies import Reply, refuse

log = structlog.get_logger()


async def claim_deletions(session: WriteSession, command: ClaimDeletions) -> Reply:
    rows = await deletions.claim_deletions(
        session,
        run_id=command.run_id,
        claim=timedelta(seconds=command.claim_sec),
        limit=command.limit,
        untried=command.untried,
    )
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


async def hurry_deletions(session: WriteSession, command: HurryDeletions) -> Reply:
    row = await deletions.hurry_deletions(
        session, run_id=command.run_id, claim=timedelta(seconds=command.claim_sec), limit=command.limit
    )
    return replies.DeletionsHurried(on_duty=row["on_duty"], hurried=row["hurried"])


async def end_cleanup(session: WriteSession, command: EndCleanup) -> Reply:
    return replies.Recorded(changed=await deletions.end_cleanup(session, run_id=command.run_id))


async def record_deletion(session: WriteSession, command: RecordDeletion) -> Reply:
    row = await deletions.record_deletion(
        session, sandbox_id=command.sandbox_id, services_error=command.services_error
    )
    if row["changed"]:
        log.info("sandbox.deleted", sandbox_id=command.sandbox_id)
    if row["remaining_email"] is not None:
        log.error(
            "access.user_remains",
            sandbox_id=command.sandbox_id,
            email=row["remaining_email"],
            user_id=row["remaining_user_id"],
            action="Delete this user in CSP by hand, because its account is gone.",
        )
    return replies.Recorded(changed=row["changed"])


async def record_deletion_failure(session: WriteSession, command: RecordDeletionFailure) -> Reply:
    retry_in = None if command.retry_in_sec is None else timedelta(seconds=command.retry_in_sec)
    changed = await deletions.record_deletion_failure(
        session,
        sandbox_id=command.sandbox_id,
        attempts=command.attempts,
        error=command.error,
        retry_in=retry_in,
        run_id=command.run_id,
        services_error=command.services_error,
    )
    if changed:
        log.warning(
            "sandbox.deletion_failed" if retry_in is None else "sandbox.deletion_postponed",
            sandbox_id=command.sandbox_id,
            attempts=command.attempts + 1,
            error=command.error,
            retry_in_sec=command.retry_in_sec,
        )
    return replies.Recorded(changed=changed)


async def retry_deletion(session: WriteSession, command: RetryDeletion) -> Reply:
    row = await deletions.retry_deletion(
        session,
        sandbox_id=command.sandbox_id,
        request_id=command.request_id,
        traceparent=command.traceparent,
        end_hold=command.end_hold,
    )
    if row["status"] is None:
        return refuse("SANDBOX_NOT_FOUND", sandbox_id=command.sandbox_id)
    if not row["changed"]:
        if row["on_hold"]:
            return refuse("NOT_DELETION_FAILED", cause="on_hold", sandbox_id=command.sandbox_id)
        return refuse("NOT_DELETION_FAILED", sandbox_id=command.sandbox_id, status=row["status"])
    log.info("sandbox.deletion_retried", sandbox_id=command.sandbox_id)
    return replies.SandboxReleased(
        sandbox_id=command.sandbox_id,
        status="pending_deletion",
        deletion_requested_at=row["deletion_requested_at"],
    )
