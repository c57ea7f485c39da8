"""Purge: delete stale sandboxes and remove expired records."""

from datetime import timedelta

import structlog

from allocator.sql import purge
from allocator.write_session import WriteSession
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import DeleteStale, PurgeRecords
from sandbox_broker.contract.replies import Reply

log = structlog.get_logger()


async def delete_stale(session: WriteSession, command: DeleteStale) -> Reply:
    count = await purge.delete_stale(
        session, stale_for=timedelta(seconds=command.stale_for_sec), limit=command.limit
    )
    if count:
        log.info("stale.deleted", count=count)
    return replies.Purged(count=count)


async def purge_records(session: WriteSession, command: PurgeRecords) -> Reply:
    count = await purge.purge_records(
        session, status=command.status, for_at_least=timedelta(seconds=command.for_sec), limit=command.limit
    )
    if count:
        log.info("records.purged", status=command.status, count=count)
    return replies.Purged(count=count)
