"""What is over: sandboxes that have been stale for a day, and records that nobody needs any more."""

import structlog

from csp_syncer.asking import Stopped, ask
from csp_syncer.settings import Settings
from sandbox_broker.bus import Requester
from sandbox_broker.messages import DeleteStale, Purged, PurgeRecords

STALE_HOURS = 24
PIECE = 500
"""Rows changed by one command."""

log = structlog.get_logger()


async def purge(settings: Settings, requester: Requester) -> None:
    """Whatever it does not get done, the next run finds."""
    retention_sec = settings.record_retention_days * 24 * 3600
    try:
        for command in (
            DeleteStale(stale_for_sec=STALE_HOURS * 3600, limit=PIECE),
            PurgeRecords(status="deleted", for_sec=retention_sec, limit=PIECE),
        ):
            while await _count(requester, command) == PIECE:
                pass
    except Stopped as stopped:
        log.warning("purge.postponed", error=str(stopped))


async def _count(requester: Requester, command: DeleteStale | PurgeRecords) -> int:
    reply = await ask(requester, command)
    assert isinstance(reply, Purged)  # noqa: S101 (the contract of both)
    return reply.count
