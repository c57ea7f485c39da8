"""When the csp-syncer syncs: when a command asks for it, and on its ticks."""

import asyncio

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from csp_syncer.handlers import Syncer
from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Publisher, Subscription, Unroutable, answer
from sandbox_broker.messages import (
    Command,
    InvalidCommand,
    InvalidEnvelope,
    Refused,
    Reply,
    SyncPool,
    decode_commands,
    encode_commands,
)

MAX_WAITING = 100
"""Requests that may wait for one sync."""

log = structlog.get_logger()


async def tick(publisher: Publisher) -> None:
    """Becomes a command. So all syncs run where the commands are consumed, by one replica, and a tick joins the
    sync that an administrator has started as well as the other way round."""
    body = encode_commands([SyncPool(request_id="tick")])
    await publisher.wait_connected()  # the first tick may come before; the next is a whole period away
    try:
        await publisher.publish(topology.COMMANDS.name, topology.SYNCER_COMMANDS.name, body)
    except (Disconnected, Unroutable) as error:
        log.warning("sync.postponed", error=str(error))


class Schedule:
    def __init__(self, publisher: Publisher, syncer: Syncer) -> None:
        self._publisher = publisher
        self._syncer = syncer

    async def commands(self, connection: AbstractConnection) -> None:
        """Handles every command in a task of its own, so that one which comes during a sync joins it."""
        subscription = await Subscription.open(connection, topology.SYNCER_COMMANDS, prefetch=MAX_WAITING)
        handling: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            while deliveries := await subscription.batch(MAX_WAITING):
                for delivery in deliveries:
                    task = group.create_task(self._handle(subscription, delivery))
                    handling.add(task)
                    task.add_done_callback(handling.discard)
            # The connection is gone: the commands come again over the next one, and join the sync that runs on.
            for task in handling:
                task.cancel()

    async def _handle(self, subscription: Subscription, delivery: DeliveredMessage) -> None:
        try:
            commands = decode_commands(delivery.body)
        except InvalidEnvelope as error:
            log.error("message.rejected", queue=topology.SYNCER_COMMANDS.name, reason=str(error))
            await subscription.reject(delivery)
            return
        replies = [await self._reply(command) for command in commands]
        try:
            await answer(self._publisher, delivery, replies)
        except Disconnected as error:
            log.warning("reply.lost", error=str(error))
        await subscription.ack(delivery)

    async def _reply(self, command: Command | InvalidCommand) -> Reply:
        if isinstance(command, SyncPool):
            return await self._syncer.sync_pool(force=command.force, job_id=command.job_id)
        reason = str(command) if isinstance(command, InvalidCommand) else f"{command.type} is not for it"
        return Refused(code="INVALID_COMMAND", message=f"The csp-syncer does not understand this: {reason}")
