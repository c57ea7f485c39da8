"""Expiry of overdue leases."""

import structlog

from reaper.allocator_requests import CommandNotDone, request_reply
from reaper.settings import Settings
from sandbox_broker.contract.commands import ExpireLeases
from sandbox_broker.contract.replies import LeasesExpired
from sandbox_broker.messaging.rpc_client import RpcClient

BATCH_SIZE = 50
"""Leases that one command ends. Other maintenance commands wait for one such batch at most."""

log = structlog.get_logger()


async def expire_overdue(settings: Settings, requester: RpcClient) -> None:
    """Have the allocator end all leases that are overdue by more than the grace period, by PostgreSQL's clock."""
    command = ExpireLeases(grace_sec=settings.grace_period_minutes * 60, limit=BATCH_SIZE)
    try:
        while True:
            reply = await request_reply(requester, command)
            assert isinstance(reply, LeasesExpired)  # noqa: S101 (the contract of ExpireLeases)
            if len(reply.sandbox_ids) < BATCH_SIZE:
                return
    except CommandNotDone as error:
        log.warning("expiry.postponed", error=str(error))
