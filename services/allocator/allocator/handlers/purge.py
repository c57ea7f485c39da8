"""What is over: stale sandboxes, and records that nobody needs any more."""

from datetime import timedelta

import structlog

from allocator import purge, store
from allocator.writer import Writer
from sandbox_broker import messages
from sandbox_broker.messages import DeleteStale, PurgeRecords, Reply

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
