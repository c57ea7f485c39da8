"""What is over: stale sandboxes, and records that nobody needs any more."""

from datetime import timedelta

import structlog

from allocator import purge, store
from allocator.writer import Writer
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import DeleteStale, PurgeRecords
from sandbox_broker.contract.replies import Reply

log = structlog.get_logger()


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
    return replies.Purged(count=row["count"])


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
    return replies.Purged(count=row["count"])
