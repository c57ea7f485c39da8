"""Starts of a clean-up run: by tick, by event, and by an administrator's command."""

import asyncio
from datetime import UTC, datetime

import orjson
from aio_pika.abc import AbstractConnection

from reaper.admin_jobs import AdminJobs
from reaper.cleanup import CleanUp
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow, Command
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.command_worker import serve_commands
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.observability.metrics import QUEUE_WAIT

PREFETCH = 200


class Triggers:
    def __init__(self, cleanup: CleanUp, jobs: AdminJobs, publisher: Publisher) -> None:
        self._cleanup = cleanup
        self._jobs = jobs
        self._publisher = publisher

    async def handle_tick(self) -> None:
        self._cleanup.wake()

    async def consume_events(self, connection: AbstractConnection) -> None:
        """Wake the clean-up run for each released sandbox, until the connection is lost. The run asks the allocator
        for due deletions, so a lost or repeated event does no harm."""
        subscription = await Subscription.open(connection, topology.REAPER_EVENTS, prefetch=PREFETCH)
        while deliveries := await subscription.batch(PREFETCH):
            self._cleanup.wake()
            _observe_wait(deliveries[0].body)
            await subscription.ack(deliveries[-1], all_before=True)

    async def consume_commands(self, connection: AbstractConnection) -> None:
        """Handle commands until the connection is lost."""

        async def handle(command: Command) -> Reply | None:
            if isinstance(command, CleanUpNow):
                return await self._clean_up_now(command)
            return None

        await serve_commands(connection, topology.REAPER_COMMANDS, self._publisher, handle)

    async def _clean_up_now(self, command: CleanUpNow) -> Reply:
        """Join the current clean-up run, or start one, and wait for its end."""
        reply = self._jobs.join(command.job_id, command.request_id)
        self._cleanup.wake()
        return await asyncio.shield(reply)


def _observe_wait(body: bytes) -> None:
    """Observe the age of an event, counted from the change that it reports: its time in the outbox is included."""
    try:
        happened_at = datetime.fromisoformat(orjson.loads(body)["time"])
    except (ValueError, KeyError, TypeError):
        return
    age_sec = (datetime.now(UTC) - happened_at).total_seconds()
    QUEUE_WAIT.labels(topology.REAPER_EVENTS.name).observe(max(0.0, age_sec))
