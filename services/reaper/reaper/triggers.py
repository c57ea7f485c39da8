"""Starts of a clean-up run: by tick, and by an administrator's command. An event wakes it directly."""

import asyncio

from aio_pika.abc import AbstractConnection

from reaper.admin_jobs import AdminJobs
from reaper.cleanup import CleanUp
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow, Command
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.command_worker import serve_commands
from sandbox_broker.messaging.publisher import Publisher


class Triggers:
    def __init__(self, cleanup: CleanUp, jobs: AdminJobs, publisher: Publisher) -> None:
        self._cleanup = cleanup
        self._jobs = jobs
        self._publisher = publisher

    async def handle_tick(self) -> None:
        self._cleanup.wake()

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
