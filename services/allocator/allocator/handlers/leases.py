"""Leases that end without their students: overdue, or by an administrator. The SQL is in store.py."""

from datetime import timedelta

import structlog

from allocator import domain, metrics, store
from allocator.writer import Overtaken, Writer
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import EndLease, ExpireLeases
from sandbox_broker.contract.replies import Reply

log = structlog.get_logger()


async def expire_leases(writer: Writer, command: ExpireLeases) -> Reply:
    row = await store.one(
        writer.connection, store.EXPIRE, writer.epoch, timedelta(seconds=command.grace_sec), command.limit
    )
    for sandbox_id in row["sandbox_ids"]:
        log.info("lease.expired", sandbox_id=sandbox_id)
    metrics.EXPIRED.inc(len(row["sandbox_ids"]))
    return replies.LeasesExpired(sandbox_ids=tuple(row["sandbox_ids"]))


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
    return replies.SandboxReleased(
        sandbox_id=command.sandbox_id,
        status=row["status"],
        deletion_requested_at=row["deletion_requested_at"],
    )
