"""Starts of a sync: by command and by tick."""

import structlog
from aio_pika.abc import AbstractConnection

from csp_syncer.syncer import Syncer
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import Command, SyncPool
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.command_worker import serve_commands
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.observability import log_context, tracing

log = structlog.get_logger()


async def send_sync_command(publisher: Publisher) -> None:
    """Handle a tick: send SyncPool to this service's own queue. All syncs then run in the one replica that consumes
    the queue, and a tick and an administrator's sync join each other."""
    command = SyncPool(request_id=log_context.request_id() or "tick", traceparent=tracing.traceparent())
    body = encode_commands([command])
    # The first tick can come before the connection. Waiting saves a whole period.
    await publisher.wait_connected()
    try:
        await publisher.publish(topology.COMMANDS_FROM_SYNCER.name, topology.SYNCER_COMMANDS.name, body)
    except (Disconnected, Unroutable) as error:
        log.warning("sync.postponed", error=str(error))


class CommandConsumer:
    """Consumes the csp-syncer's command queue."""

    def __init__(self, publisher: Publisher, syncer: Syncer) -> None:
        self._publisher = publisher
        self._syncer = syncer

    async def consume(self, connection: AbstractConnection) -> None:
        """Handle commands until the connection is lost."""

        async def handle(command: Command) -> Reply | None:
            if isinstance(command, SyncPool):
                return await self._syncer.sync_pool(force=command.force, job_id=command.job_id)
            return None

        await serve_commands(connection, topology.SYNCER_COMMANDS, self._publisher, handle)
