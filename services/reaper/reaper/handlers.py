"""What the reaper does for each tick and command."""

import asyncio

import structlog

from reaper.asking import NoAnswer, ask
from reaper.cleanup import CleanUp
from reaper.jobs import Jobs
from reaper.settings import Settings
from sandbox_broker.bus import Requester
from sandbox_broker.messages import CleanUpNow, ExpireLeases, LeasesExpired, Reply

EXPIRY_PIECE = 50
"""Leases ended by one command: other maintenance waits for one such piece at most."""

log = structlog.get_logger()


async def expire_overdue(settings: Settings, requester: Requester) -> None:
    """Ends every lease that is overdue by more than the grace period, by the clock of the database."""
    command = ExpireLeases(grace_sec=settings.grace_period_minutes * 60, limit=EXPIRY_PIECE)
    try:
        while True:
            reply = await ask(requester, command)
            assert isinstance(reply, LeasesExpired)  # noqa: S101 (the contract of ExpireLeases)
            if len(reply.sandbox_ids) < EXPIRY_PIECE:
                return
    except NoAnswer as error:
        log.warning("expiry.postponed", error=str(error))


async def clean_up_now(cleanup: CleanUp, jobs: Jobs, command: CleanUpNow) -> Reply:
    """Joins the run that is at work, or begins one."""
    answer = jobs.join(command.job_id, command.request_id)
    cleanup.wake()
    return await asyncio.shield(answer)
