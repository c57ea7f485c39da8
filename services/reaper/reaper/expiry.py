"""Expiry of overdue leases."""

import structlog

from reaper.settings import Settings
from sandbox_broker.contract.commands import ExpireLeases
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone

BATCH_SIZE = 50
"""Leases that one command ends. Other maintenance commands wait for one such batch at most."""

log = structlog.get_logger()


async def expire_overdue(settings: Settings, allocator: MaintenanceClient) -> None:
    """Have the allocator end all leases that are overdue by more than the grace period, by PostgreSQL's clock."""
    command = ExpireLeases(grace_sec=settings.grace_period_minutes * 60, limit=BATCH_SIZE)
    try:
        while True:
            reply = await allocator.request(command)
            if len(reply.sandbox_ids) < BATCH_SIZE:
                return
    except CommandNotDone as error:
        log.warning("expiry.postponed", error=str(error))
