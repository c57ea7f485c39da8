"""When the csp-syncer syncs: when a command asks for it, and on its ticks."""

import structlog
from aio_pika.abc import AbstractConnection

from csp_syncer.handlers import Syncer
from sandbox_broker import story, topology, tracing
from sandbox_broker.bus import Disconnected, Publisher, Unroutable
from sandbox_broker.messages import Command, Reply, SyncPool, encode_commands
from sandbox_broker.serving import serve

log = structlog.get_logger()


async def tick(publisher: Publisher) -> None:
    """Becomes a command. So all syncs run where the commands are consumed, by one replica, and a tick joins the
    sync that an administrator has started as well as the other way round."""
    command = SyncPool(request_id=story.request_id() or "tick", traceparent=tracing.traceparent())
    body = encode_commands([command])
    await publisher.wait_connected()  # the first tick may come before; the next is a whole period away
    try:
        await publisher.publish(topology.COMMANDS_FROM_SYNCER.name, topology.SYNCER_COMMANDS.name, body)
    except (Disconnected, Unroutable) as error:
        log.warning("sync.postponed", error=str(error))


class Schedule:
    def __init__(self, publisher: Publisher, syncer: Syncer) -> None:
        self._publisher = publisher
        self._syncer = syncer

    async def commands(self, connection: AbstractConnection) -> None:
        async def handle(command: Command) -> Reply | None:
            if isinstance(command, SyncPool):
                return await self._syncer.sync_pool(force=command.force, job_id=command.job_id)
            return None

        await serve(connection, topology.SYNCER_COMMANDS, self._publisher, handle)
