"""Purge: mark long-stale sandboxes as deleted, and remove old records and old personal data."""

import structlog

from csp_syncer.settings import Settings
from sandbox_broker.contract.commands import DeleteStale, PurgeAudit, PurgePersonalData, PurgeRecords
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone

STALE_HOURS = 24
BATCH_SIZE = 500
"""Rows that one command changes."""

log = structlog.get_logger()


async def purge(settings: Settings, allocator: MaintenanceClient) -> None:
    """Run one purge. Work that is left after a refusal is done by the next run."""
    retention_sec = settings.record_retention_days * 24 * 3600
    try:
        for command in (
            DeleteStale(stale_for_sec=STALE_HOURS * 3600, limit=BATCH_SIZE),
            PurgeRecords(status="deleted", for_sec=retention_sec, limit=BATCH_SIZE),
            PurgeAudit(for_sec=settings.audit_retention_days * 24 * 3600, limit=BATCH_SIZE),
            PurgePersonalData(for_sec=settings.lease_personal_days * 24 * 3600, limit=BATCH_SIZE),
        ):
            while (await allocator.request(command)).count == BATCH_SIZE:
                pass
    except CommandNotDone as error:
        log.warning("purge.postponed", error=str(error))
